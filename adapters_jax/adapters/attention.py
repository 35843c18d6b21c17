"""The attention adapter: each position attends to adapter vectors of the input's words.

It has four parts. An embedding layer turns the words (and, where there are any, their tags) into
adapter vectors, from a projection of the backbone's frozen word vectors. Multi-head self-attention
compares each position's hidden state with these vectors and takes their weighted sum (Vaswani et
al. 2017, section 3.2). A feed-forward network refines the sum, and an output layer, near zero at
first, maps it back to the backbone's width.

It comes in two forms. `AttentionAdapter` stands inside the layers, as a bottleneck adapter does.
`SideAttentionAdapter` is a small network beside the backbone that only reads from it until the very
end, so that training needs no backward pass through the backbone (cf. Sung et al. 2022).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from adapters_jax import attention, functional
from adapters_jax.adapters import parts
from adapters_jax.adapters.method import At, Change, Method, adapted_layers
from adapters_jax.params import Tree
from adapters_jax.sites import SUB_LAYERS, Dimensions, Stream, SubLayer

_WORDS, _STATE = 'attention_adapter/words', 'attention_adapter/state'  # in Stream.carry


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Attention(Method):
    """The options of both forms; R stands for `size`."""

    claims: ClassVar[tuple[str, ...]] = ('the adapter vectors of the words',)

    size: int = 64  # R, the width of the adapter's vectors
    heads: int = 4
    expansion: int = 2  # the feed-forward network's width as a multiple of R
    non_linearity: str = 'gelu_new'
    dropout: float = 0.0
    init_scale: float = 1e-3  # sigma of the output layer's kernel; 0 starts as the plain backbone
    init_weights_seed: int | None = None
    leave_out: tuple[int, ...] = ()
    tags: int = 0  # how many tags a word may have, none being one; 0: they are not looked at

    @property
    def stepwise(self) -> bool:
        """No: it attends to the words before by itself, whose vectors nobody keeps."""
        return False

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        super().__post_init__()
        for name, least in (('size', 1), ('heads', 1), ('expansion', 1), ('tags', 0)):
            value = getattr(self, name)
            self.require(value >= least, f'{name}={value} is not at least {least}')
        self.require(
            self.size % self.heads == 0, f'size={self.size} is not a multiple of heads={self.heads}'
        )
        self.require(0 <= self.dropout < 1, f'dropout={self.dropout} is not in [0, 1)')
        self.require(self.init_scale >= 0, f'init_scale={self.init_scale} is negative')
        functional.activation(self.non_linearity)

    @property
    def known_tags(self) -> int:
        """How many tags have a vector."""
        return self.tags

    def embeddings(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Compute the adapter vectors once, for every layer to attend to."""
        self.require(
            not self.tags or stream.tags is not None,
            f'tags={self.tags}, but the batch has no tags; tag the texts or set tags=0',
        )
        return self.target(params, stream, at)

    def target(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Compute the adapter vectors of a decoder's words, which nobody tags."""
        words = embed(at.shared['embedding'], stream.word_vectors, stream.tags)
        return stream.replace(carry=stream.carry | {_WORDS: words.astype(stream.hidden.dtype)})

    def _keys(self, key: PRNGKeyArray, *path: int) -> PRNGKeyArray:
        seed = self.init_weights_seed
        start = key if seed is None else jax.random.key(seed)
        return jax.random.split(functional.fold(start, *path), 8)

    def _init_embedding(self, keys: PRNGKeyArray, word: int) -> Tree:
        params = {
            'projection': parts.dense(keys[0], parts.normal_by_inputs, word, self.size),
            'norm': parts.norm(self.size),
        }
        if self.tags:
            table = jax.random.normal(keys[1], (self.tags, self.size))
            params['tags'] = {'embedding': table * 0.02}
        return params

    def _init_attention(self, keys: PRNGKeyArray, query: int) -> Tree:
        inputs = {'query': query, 'key': self.size, 'value': self.size, 'output': self.size}
        return {
            name: parts.dense(key, parts.normal_by_inputs, width, self.size)
            for key, (name, width) in zip(keys, inputs.items(), strict=True)
        }

    def _init_feed_forward(self, keys: PRNGKeyArray) -> Tree:
        wide = self.expansion * self.size
        return {
            'up': parts.dense(keys[0], parts.normal_by_inputs, self.size, wide),
            'down': parts.dense(keys[1], parts.normal_by_inputs, wide, self.size),
        }

    def _init_output(self, key: PRNGKeyArray, hidden: int) -> Tree:
        return parts.dense(key, parts.normal(self.init_scale), self.size, hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionAdapter(_Attention):
    """The attention adapter inside each layer.

    A position's query is its hidden state after the sub-layer's residual connection and LayerNorm;
    the adapter's output is added before the two, as a bottleneck adapter's is.
    """

    architecture: ClassVar[str] = 'attention'

    mh_adapter: bool = False  # after self-attention
    output_adapter: bool = True  # after the feed-forward network

    def __post_init__(self) -> None:
        """Refuse an adapter that is nowhere."""
        super().__post_init__()
        self.require(
            self.mh_adapter or self.output_adapter,
            'mh_adapter and output_adapter are both False; set at least one to True',
        )

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters."""
        wanted = {'attention': self.mh_adapter, 'feed_forward': self.output_adapter}
        names = [name for name in SUB_LAYERS if wanted.get(name)]
        shared = {'embedding': self._init_embedding(self._keys(key, 0), dimensions.word)}
        return {'shared': shared} | {
            f'layer_{i}': {
                name: self._init_one(
                    self._keys(key, i + 1, SUB_LAYERS.index(name)), dimensions.hidden
                )
                for name in names
            }
            for i in adapted_layers(self.leave_out, dimensions)
        }

    def _init_one(self, keys: PRNGKeyArray, hidden: int) -> Tree:
        return {
            'attention': self._init_attention(keys[:4], hidden),
            'feed_forward': self._init_feed_forward(keys[4:6]),
            'output': self._init_output(keys[6], hidden),
        }

    def adapt(self, params: Tree, end: SubLayer, at: At) -> Change:
        """Add the adapter's output to the sub-layer's."""
        stream = end.stream
        mixed = attend(
            params['attention'],
            end.finish(end.output),
            stream.carry[_WORDS],
            stream.mask,
            self.heads,
        )
        mixed = functional.dropout(mixed, self.dropout, functional.fold(at.key, 0))
        refined = feed_forward(params['feed_forward'], mixed, self.non_linearity)
        refined = functional.dropout(refined, self.dropout, functional.fold(at.key, 1))
        change = parts.apply_dense(params['output'], mixed + refined)
        return Change(end.output + change, change)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideAttentionAdapter(_Attention):
    """The attention adapter beside the backbone: a narrow network that reads each block's output.

    Its state, R wide, starts as the adapter vectors and is updated at each block that is not left
    out. Only after the last block is it mapped to the backbone's width and added, so the backbone
    is trunk from its first layer to its last.
    """

    architecture: ClassVar[str] = 'attention_side'

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters."""
        keys = self._keys(key, 0)
        shared = {'embedding': self._init_embedding(keys, dimensions.word)}
        output = self._init_output(keys[2], dimensions.hidden) | {'norm': parts.norm(self.size)}
        return {'shared': shared, 'output': output} | {
            f'layer_{i}': {'block': self._init_one(self._keys(key, i + 1), dimensions.hidden)}
            for i in adapted_layers(self.leave_out, dimensions)
        }

    def _init_one(self, keys: PRNGKeyArray, hidden: int) -> Tree:
        norm = {'norm': parts.norm(self.size)}
        return {
            'read': parts.dense(keys[6], parts.normal_by_inputs, hidden, self.size),
            'attention': self._init_attention(keys[:4], self.size) | norm,
            'feed_forward': self._init_feed_forward(keys[4:6]) | norm,
        }

    def first_layer(self, params: Tree, dimensions: Dimensions) -> int:
        """Return the number of layers: no trained leaf changes the output of any of them."""
        return dimensions.layers

    reads_trunk: ClassVar[bool] = True

    def embeddings(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Compute the adapter vectors, which are also the state's beginning."""
        return self.target(params, super().embeddings(params, stream, at), at)

    def target(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Begin the state of a decoder, too, with the vectors of its words."""
        stream = super().target(params, stream, at)
        return stream.replace(carry=stream.carry | {_STATE: stream.carry[_WORDS]})

    def block(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Update the state from a block's output; the backbone's own stream is left alone."""
        hidden = jax.lax.stop_gradient(stream.hidden)
        state = stream.carry[_STATE] + parts.apply_dense(params['read'], hidden)
        query = parts.apply_norm(params['attention']['norm'], state)
        mixed = attend(params['attention'], query, stream.carry[_WORDS], stream.mask, self.heads)
        state = state + functional.dropout(mixed, self.dropout, functional.fold(at.key, 0))
        x = parts.apply_norm(params['feed_forward']['norm'], state)
        refined = feed_forward(params['feed_forward'], x, self.non_linearity)
        state = state + functional.dropout(refined, self.dropout, functional.fold(at.key, 1))
        return stream.replace(carry=stream.carry | {_STATE: state})

    def output(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Add the state, mapped to the backbone's width, to the last hidden states."""
        state = parts.apply_norm(params['norm'], stream.carry[_STATE])
        return stream.replace(hidden=stream.hidden + parts.apply_dense(params, state))


def embed(
    params: Tree, word_vectors: Float[Array, 'B T E'], tags: Int[Array, 'B T'] | None
) -> Float[Array, 'B T R']:
    """Return the adapter vectors of the words: projected, with their tags' vectors, normalised.

    No gradient goes to the word vectors, even where a method trains the backbone's embeddings.
    """
    x = parts.apply_dense(params['projection'], jax.lax.stop_gradient(word_vectors))
    if 'tags' in params and tags is not None:
        x = x + jnp.take(params['tags']['embedding'].astype(x.dtype), tags, axis=0)
    return parts.apply_norm(params['norm'], x)


def attend(
    params: Tree,
    x: Float[Array, 'B T I'],
    words: Float[Array, 'B T R'],
    mask: Bool[Array, '#B 1 #T T'] | None,
    heads: int,
) -> Float[Array, 'B T R']:
    """Attend from `x` to the adapter vectors with several heads (Vaswani et al. 2017, 3.2.2)."""

    def project(name: str, inputs: Array) -> Float[Array, 'B T H K']:
        y = parts.apply_dense(params[name], inputs)
        return y.reshape(*y.shape[:-1], heads, -1)

    query, key, value = project('query', x), project('key', words), project('value', words)
    mixed = attention.attend(query, key, value, mask)
    return parts.apply_dense(params['output'], mixed.reshape(words.shape))


def feed_forward(
    params: Tree, x: Float[Array, 'B T R'], non_linearity: str
) -> Float[Array, 'B T R']:
    """Apply the two-layer perceptron (Vaswani et al. 2017, eq. 2)."""
    wide = functional.activation(non_linearity)(parts.apply_dense(params['up'], x))
    return parts.apply_dense(params['down'], wide)
