"""What a backbone offers and an adapter may use: the only thing that both sides know.

A backbone calls a `Sites` object at the named points of its forward pass and is otherwise plain.
`Sites` itself is the identity at each of them, so a backbone without an adapter compiles to
exactly the plain model. Adapters override what they need (`adapters/method.py`).

The sites are, in the order in which a forward pass meets them:

==================================================  ==============================================
`words`                                             word vectors, before positions and LayerNorm
`embeddings`                                        after the embedding LayerNorm, and before what
                                                    gives narrow word vectors the hidden size
`target`                                            the same of a decoder
`linear` at query, key, value, output, up, down     each projection; sees input, weights, output
`key_value`                                         the keys and values of an attention, per head
`sub_layer` at attention, cross_attention,          a sub-layer's output, before and after the
feed_forward                                        residual connection and its LayerNorm
`block`                                             a block's output
`output`                                            the last block's output
`undo`                                              before output embeddings, the words' own
`vector`                                            each bias, and each LayerNorm's two vectors
==================================================  ==============================================
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from adapters_jax import functional
from adapters_jax.quantize import Quantized

SUB_LAYERS = ('attention', 'cross_attention', 'feed_forward')
PROJECTIONS = {
    'attention': ('query', 'key', 'value', 'output'),
    'cross_attention': ('query', 'key', 'value', 'output'),
    'feed_forward': ('up', 'down', 'gate'),  # a gate where the family has one
}
KEYS = ('key', 'value')


# The places of a block, in the order in which a forward pass meets them.
STAGES = (*(stage for name in SUB_LAYERS for stage in (name, f'{name}_end')), 'block_end')


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """A place in the forward pass: a block's number and one of `STAGES` by its index.

    A sub-layer's place is before it; its '_end' is where its output has been computed and residual
    connection and LayerNorm have not.
    """

    layer: int
    index: int = 0

    @classmethod
    def of(cls, layer: int, stage: str) -> 'Place':
        """Return the place of a stage by its name."""
        return cls(layer, STAGES.index(stage))

    @property
    def stage(self) -> str:
        """The stage's name."""
        return STAGES[self.index]

    @property
    def vectors(self) -> int:
        """How many vectors a token has here: the hidden state, or a sub-layer's output and the
        residual input that it will be added to."""
        return 2 if self.stage in {f'{name}_end' for name in SUB_LAYERS} else 1


START = Place(0)


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """The sizes of a backbone that an adapter's parameters depend on."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    word: int  # width of the word embeddings; differs from `hidden` where they are factorised
    vocabulary: int
    positions: int
    inner: int = 0  # width of queries, keys and values; given as 0, it is `hidden`
    decoder_layers: int = 0  # how many of the layers, the last ones, have cross-attention
    gated: bool = False  # whether the feed-forward networks have a gate
    reads_words: bool = True  # or else images or sound
    word_scale: float = 1.0  # by which words' vectors are larger than in their table

    def __post_init__(self) -> None:
        """Say how wide attention is where nobody has."""
        object.__setattr__(self, 'inner', self.inner or self.hidden)

    def projections(self, layer: int) -> dict[str, tuple[str, ...]]:
        """Return the projections of a layer by sub-layer."""
        found = dict(PROJECTIONS)
        if layer < self.layers - self.decoder_layers:
            del found['cross_attention']
        if not self.gated:
            found['feed_forward'] = tuple(n for n in found['feed_forward'] if n != 'gate')
        return found


@struct.dataclass
class Words:
    """What the embedding module is about to add up: word vectors and where they stand."""

    vectors: Float[Array, 'B T E']
    token_types: Int[Array, 'B T']
    positions: Int[Array, 'B T']
    mask: Bool[Array, '#B 1 #T T'] | None
    tags: Int[Array, 'B T'] | None = None


@struct.dataclass
class Stream:
    """What flows through the blocks: the hidden states and what every site may look at.

    `bias` is added to the scores of every attention over the sequence itself; `before` counts the
    keys that a site will put before those of the sequence and that move these on. `at` is there
    where tokens are decoded one after another: the number of keys and values that are kept of those
    before; the mask then tells which of all keys each of these sees. They need not follow on one
    another: they may be what is written next in several texts of a row.
    `carry` belongs to the adapter: what it computed at one site for use at a later one.
    """

    hidden: Float[Array, 'B T D']
    mask: Bool[Array, '#B 1 #T T'] | None
    word_vectors: Float[Array, 'B T E']
    tags: Int[Array, 'B T'] | None = None
    bias: Float[Array, '1 H T S'] | None = None
    at: Int[Array, ''] | None = None
    before: int = struct.field(pytree_node=False, default=0)
    carry: dict[str, Any] = struct.field(default_factory=dict)

    def of(self, places: Int[Array, 'B N']) -> 'Stream':
        """Return the stream of some of the tokens: N of each row, by their places in it."""
        mask = seen_from(self.mask, places)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (len(places), *mask.shape[1:]))
            mask = taken(mask[:, 0].swapaxes(1, 2), places).swapaxes(1, 2)[:, None]
        return self.replace(
            hidden=taken(self.hidden, places),
            mask=mask,
            word_vectors=taken(self.word_vectors, places),
            tags=None if self.tags is None else taken(self.tags, places),
        )


def taken(x: Shaped[Array, 'B T ...'], places: Int[Array, 'B N']) -> Shaped[Array, 'B N ...']:
    """Return N entries of each row."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)


def seen_from(
    mask: Bool[Array, '#B 1 #T S'] | None, places: Int[Array, 'B N']
) -> Bool[Array, '#B 1 #N S'] | None:
    """Return what N tokens of each row see; one row of a mask is that of all tokens."""
    if mask is None or mask.shape[2] == 1:
        return mask
    mask = jnp.broadcast_to(mask, (len(places), *mask.shape[1:]))
    return taken(mask[:, 0], places)[:, None]


@struct.dataclass
class LayerNorm:
    """A LayerNorm's vectors, one for all rows or one a row, as a function; RMSNorm has no bias."""

    scale: Float[Array, 'D'] | Float[Array, 'B 1 D']
    bias: Float[Array, 'D'] | Float[Array, 'B 1 D'] | None
    epsilon: float = struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
        """Normalise the last axis."""
        if self.bias is None:
            return functional.rms_norm(x, self.scale, self.epsilon)
        return functional.layer_norm(x, self.scale, self.bias, self.epsilon)


@struct.dataclass
class SubLayer:
    """The end of a sub-layer: its output, its residual input, and the LayerNorm that follows.

    `norm` is None in a pre-LN block, where nothing follows the residual connection.
    """

    output: Float[Array, 'B T D']
    residual: Float[Array, 'B T D']
    norm: LayerNorm | None
    stream: Stream

    def normalise(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        """Apply the LayerNorm where there is one."""
        return x if self.norm is None else self.norm(x)

    def finish(self, output: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        """Add the residual and normalise: what the backbone does with `output` by itself."""
        return self.normalise(output + self.residual)


@struct.dataclass
class Linear:
    """A projection that was just computed: `output` is `inputs @ kernel + bias`.

    The kernel is as it is stored: `functional.dense` takes it so, `quantize.dequantize` makes it
    floats.
    `mask` tells which of the inputs belong together: the tokens of one text.
    """

    inputs: Float[Array, 'B T I']
    kernel: Float[Array, 'I O'] | Quantized
    bias: Float[Array, 'O'] | Float[Array, 'B 1 O'] | None
    output: Float[Array, 'B T O']
    mask: Bool[Array, '#B 1 #T T'] | None


@struct.dataclass
class KeyValue:
    """The keys and values of an attention, what they are computed from, and who may see them.

    `inputs` is what the queries come from, and `text_mask` tells which of them belong together.
    """

    inputs: Float[Array, 'B T D']
    key: Float[Array, 'B S H K']
    value: Float[Array, 'B S H K']
    mask: Bool[Array, '#B 1 #T S'] | None
    text_mask: Bool[Array, '#B 1 #T T'] | None


@struct.dataclass
class Sites:
    """The identity at every site; a pytree, so that it passes through remat like an array."""

    def vector(self, path: str, value: Float[Array, 'O']) -> Float[Array, 'O']:
        """Replace a bias or a LayerNorm's vector, for all rows or, with [B, 1, O], for each.

        `path` is the leaf's, below 'backbone': 'layer_3/attention/query/bias'.
        """
        return value

    def words(self, words: Words) -> Words:
        """Change or extend the word vectors before they meet positions and LayerNorm."""
        return words

    def embeddings(self, stream: Stream) -> Stream:
        """Change the embedded input, or prepare what later sites of the adapter share."""
        return stream

    def target(self, stream: Stream) -> Stream:
        """Prepare, of a decoder's embedded input, what later sites share; its vectors stay."""
        return stream

    def linear(self, layer: int, sub_layer: str, name: str, end: Linear) -> Float[Array, 'B T O']:
        """Change the output of a projection."""
        return end.output

    def key_value(self, layer: int, sub_layer: str, seen: KeyValue) -> KeyValue:
        """Change or extend the keys and values of an attention, and its mask with them."""
        return seen

    def sees_keys(self, layer: int, sub_layer: str) -> bool:
        """Tell whether it may look at keys and values of an attention; else none need be there."""
        own = type(self)
        return own.linear is not Sites.linear or own.key_value is not Sites.key_value

    def sub_layer(self, layer: int, name: str, end: SubLayer) -> Float[Array, 'B T D']:
        """Return the sub-layer's result after residual connection and LayerNorm."""
        return end.finish(end.output)

    def block(self, layer: int, stream: Stream) -> Stream:
        """Change the output of a block."""
        return stream

    def output(self, stream: Stream) -> Stream:
        """Change the output of the last block."""
        return stream

    def undo(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
        """Take back `embeddings` from vectors that are about to meet the word embeddings again."""
        return x


IDENTITY = Sites()
