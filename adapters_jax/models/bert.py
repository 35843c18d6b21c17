"""BERT and RoBERTa: an embedding module, a translated config and a table of tensor names.

RoBERTa is the same network with positions that start after the padding id and one token type
(Liu et al. 2019, section 3; Devlin et al. 2019, section 3).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from adapters_jax import functional, quantize
from adapters_jax.models.block import BlockConfig, Dense, Norm, rematerialised
from adapters_jax.sharding import Layout, spread_rows
from adapters_jax.sites import IDENTITY, START, Dimensions, Place, Sites, Stream, Words


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """What a checkpoint's config.json says, under the names of this project."""

    family: str
    layers: int
    vocabulary: int
    positions: int  # the longest text the position table serves, in tokens
    token_types: int
    pad_id: int
    block: BlockConfig
    position_offset: int = 0  # RoBERTa counts positions from pad_id + 1
    pooler: bool = True

    @property
    def dimensions(self) -> Dimensions:
        """The sizes an adapter depends on."""
        b = self.block
        return Dimensions(
            layers=self.layers,
            hidden=b.hidden,
            feed_forward=b.feed_forward,
            heads=b.heads,
            word=b.hidden,
            vocabulary=self.vocabulary,
            positions=self.positions,
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> 'BertConfig':
        """Translate a Hugging Face config.json of model type bert or roberta.

        Raises:
            ValueError: a setting this module does not compute, or a missing key.
        """
        hf = {key: value for key, value in hf.items() if value is not None}  # null says nothing
        family = hf.get('model_type', 'bert')
        _check_supported(hf)
        try:
            offset = hf['pad_token_id'] + 1 if family == 'roberta' else 0
            block = BlockConfig(
                hidden=hf['hidden_size'],
                feed_forward=hf['intermediate_size'],
                heads=hf['num_attention_heads'],
                activation=hf.get('hidden_act', 'gelu'),
                norm_epsilon=hf.get('layer_norm_eps', 1e-12),
                dropout=hf.get('hidden_dropout_prob', 0.1),
                attention_dropout=hf.get('attention_probs_dropout_prob', 0.1),
            )
            return cls(
                family=family,
                layers=hf['num_hidden_layers'],
                vocabulary=hf['vocab_size'],
                positions=hf['max_position_embeddings'] - offset,
                token_types=hf['type_vocab_size'],
                pad_id=hf.get('pad_token_id', 0),
                block=block,
                position_offset=offset,
            )
        except KeyError as error:
            raise ValueError(f'config.json lacks the key {error}, which {family} needs') from error


def _check_supported(hf: Mapping[str, Any]) -> None:
    position_type = hf.get('position_embedding_type', 'absolute')
    if position_type != 'absolute':
        raise ValueError(
            f'position_embedding_type {position_type!r} is not supported; expected "absolute"'
        )
    for key in ('is_decoder', 'add_cross_attention'):
        if hf.get(key, False):
            raise ValueError(
                f'{key}=true in config.json: only encoders of this family are supported'
            )


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normalised (Devlin 2019, fig. 2)."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, 'B T'],
        token_type_ids: Int[Array, 'B T'],
        positions: Int[Array, 'B T'],
        mask: Bool[Array, '#B 1 #T T'] | None,
        tags: Int[Array, 'B T'] | None,
        sites: Sites,
        deterministic: bool,
    ) -> Stream:
        """Return the stream that the blocks start with: the embedded input and what it is of."""
        c = self.config
        sizes = {
            'word': c.vocabulary,
            'position': c.positions + c.position_offset,
            'token_type': c.token_types,
        }
        tables = {name: _Table(rows, c.block.hidden, name=name)() for name, rows in sizes.items()}
        vectors = quantize.rows(tables['word'], input_ids)
        words = sites.words(Words(vectors, token_type_ids, positions, mask, tags))
        places = jnp.take(tables['position'], words.positions + c.position_offset, axis=0)
        types = jnp.take(tables['token_type'], words.token_types, axis=0)
        norm = Norm(c.block.norm_epsilon, 'embeddings', name='norm')(c.block.hidden, sites)
        x = norm(words.vectors + places + types)
        x = functional.dropout(
            x, c.block.dropout, None if deterministic else self.make_rng('dropout')
        )
        vectors = words.vectors.astype(self.dtype)
        return sites.embeddings(Stream(x.astype(self.dtype), words.mask, vectors, words.tags))


class _Table(nn.Module):
    rows: int
    features: int

    @nn.compact
    def __call__(self) -> Float[Array, 'V D'] | quantize.Quantized:
        return self.param('embedding', nn.initializers.normal(0.02), (self.rows, self.features))


class Bert(nn.Module):
    """The encoder: embeddings and a stack of post-LN blocks.

    What comes before the place `trunk` runs without dropout, since nothing there is trained; a
    trunk of at least one layer includes the embeddings.
    `remat` says what of each block's activations is computed again in the backward pass.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    trunk: Place = START
    remat: str = 'none'

    def setup(self) -> None:
        """Name the parts as the parameter tree does."""
        c = self.config
        self.embeddings = Embeddings(c, self.dtype)
        block = rematerialised(self.remat)
        self.blocks = [block(c.block, i, name=f'layer_{i}') for i in range(c.layers)]
        if c.pooler:
            self.pooler = Dense(c.block.hidden)

    def __call__(
        self,
        input_ids: Int[Array, 'B T'],
        token_type_ids: Int[Array, 'B T'] | None = None,
        positions: Int[Array, 'B T'] | None = None,
        mask: Bool[Array, '#B 1 #T T'] | None = None,
        tags: Int[Array, 'B T'] | None = None,
        sites: Sites = IDENTITY,
        deterministic: bool = True,
        all_hidden: bool = False,
        known: Float[Array, 'B T N D'] | None = None,
    ) -> Float[Array, 'B T D'] | list[Float[Array, 'B T D']]:
        """Return the last hidden states, or with `all_hidden` the input's and every layer's.

        `known` is what `trunk_outputs` returned for these inputs: computation begins there. With
        more vectors a token than the place has, they are the outputs of the trunk's blocks.
        """
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        if positions is None:
            positions = default_positions(self.config, input_ids)
        trunk = self.trunk
        still = deterministic or trunk.layer > 0
        stream = self.embeddings(input_ids, token_type_ids, positions, mask, tags, sites, still)
        known = None if known is None else known.astype(stream.hidden.dtype)
        stream = stream.replace(hidden=spread_rows(stream.hidden))
        collected = [stream.hidden]
        if known is not None and trunk.layer == len(self.blocks):
            stream = self._replay(stream, known, sites)
        for i, block in enumerate(self.blocks):
            if known is None or i > trunk.layer:
                still = deterministic or i < trunk.layer
                stream = block(stream, sites, still, None, None, trunk)
            elif i == trunk.layer:
                stream = block(stream, sites, deterministic, None, None, trunk, known)
            stream = stream.replace(hidden=spread_rows(stream.hidden))
            collected.append(stream.hidden)
        stream = sites.output(stream)
        collected[-1] = stream.hidden
        return collected if all_hidden else stream.hidden

    def _replay(self, stream: Stream, known: Float[Array, 'B T N D'], sites: Sites) -> Stream:
        """Show the stored outputs of all blocks, or of the last one, to the sites."""
        if known.shape[2] == 1:
            return stream.replace(hidden=known[:, :, 0])
        for i in range(known.shape[2]):
            stream = sites.block(i, stream.replace(hidden=known[:, :, i]))
        return stream

    def pool(self, first: Float[Array, 'B S D'], sites: Sites = IDENTITY) -> Float[Array, 'B S D']:
        """Apply the checkpoint's own pooler to the first tokens' hidden states."""
        return jnp.tanh(self.pooler(first, lambda bias: sites.vector('pooler/bias', bias)))

    def initialise(self, input_ids: Int[Array, 'B T']) -> Float[Array, 'B T D']:
        """Touch every parameter once: what `init` of a randomly initialised model runs."""
        hidden = self(input_ids)
        return self.pool(hidden[:, :1]) if self.config.pooler else hidden


# Where the parameters lie on a mesh: matrices that end in heads or hidden units are cut along
# these, and so are those that begin with them (Shoeybi et al. 2019, section 3, figure 3).
_INTO = r'backbone/layer_\d+/(attention/(query|key|value)|feed_forward/up)'
_OUT_OF = r'backbone/layer_\d+/(attention/output|feed_forward/down)'
LAYOUTS = (
    Layout(f'{_INTO}/kernel', P('fsdp', 'tensor')),
    Layout(f'{_INTO}/bias', P('tensor')),
    Layout(f'{_OUT_OF}/kernel', P('tensor', 'fsdp')),
    Layout(r'backbone/embeddings/(word|position)/embedding', P(None, ('fsdp', 'tensor'))),
    Layout(r'backbone/pooler/kernel', P('fsdp', 'tensor')),
)

# The matrices that may be kept in 8 bits, and the axis whose indices are their channels.
CHANNELS = (
    (r'backbone/layer_\d+/.*/kernel', 1),
    (r'backbone/pooler/kernel', 1),
    (r'backbone/embeddings/word/embedding', 0),
)


def default_positions(config: BertConfig, input_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """Return the positions that the original model gives to unpacked rows.

    BERT counts every column; RoBERTa counts the tokens that are not padding, and places padding at
    the padding id itself (-1 here, before the offset).
    """
    if not config.position_offset:
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    real = (input_ids != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real - 1


def tensor_names(config: BertConfig) -> dict[str, tuple[str, bool]]:
    """Return, for each torch tensor (without prefix), our path below `backbone` and whether to
    transpose it (torch keeps dense weights as [out, in])."""
    names = {
        f'embeddings.{name}_embeddings.weight': (f'embeddings/{name}/embedding', False)
        for name in ('word', 'position', 'token_type')
    }
    names |= _norm('embeddings.LayerNorm', 'embeddings/norm')
    for i in range(config.layers):
        theirs, ours = f'encoder.layer.{i}', f'layer_{i}'
        for name in ('query', 'key', 'value'):
            names |= _dense(f'{theirs}.attention.self.{name}', f'{ours}/attention/{name}')
        names |= _dense(f'{theirs}.attention.output.dense', f'{ours}/attention/output')
        names |= _norm(f'{theirs}.attention.output.LayerNorm', f'{ours}/attention/norm')
        names |= _dense(f'{theirs}.intermediate.dense', f'{ours}/feed_forward/up')
        names |= _dense(f'{theirs}.output.dense', f'{ours}/feed_forward/down')
        names |= _norm(f'{theirs}.output.LayerNorm', f'{ours}/feed_forward/norm')
    return names | (_dense('pooler.dense', 'pooler') if config.pooler else {})


def _dense(theirs: str, ours: str) -> dict[str, tuple[str, bool]]:
    return {f'{theirs}.weight': (f'{ours}/kernel', True), f'{theirs}.bias': (f'{ours}/bias', False)}


def _norm(theirs: str, ours: str) -> dict[str, tuple[str, bool]]:
    return {f'{theirs}.weight': (f'{ours}/scale', False), f'{theirs}.bias': (f'{ours}/bias', False)}
