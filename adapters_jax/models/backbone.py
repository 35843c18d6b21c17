"""The backbone of every family: what the input becomes, a stack of blocks, and perhaps a decoder.

What differs between families is said by values: the options of the block (`block.BlockConfig`), and
the stem, which is the embedding module that a stack begins with. A family's own file has its stem,
the translation of its config.json and the names of its tensors; `families.py` lists them.

Layers are numbered through, the decoder's after the encoder's, as the public adapter libraries do:
an adapter's parameters name a layer by this number alone.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from adapters_jax import functional, quantize
from adapters_jax.models import leaves
from adapters_jax.models.block import BlockConfig, Memory, rematerialised
from adapters_jax.models.layers import Dense, Norm
from adapters_jax.sharding import Layout, spread_rows
from adapters_jax.sites import IDENTITY, START, Dimensions, Place, Sites, Stream


@struct.dataclass
class Inputs:
    """What a stem turns into vectors: the ids of tokens, or pixels, or frames of sound.

    What is None has the family's own default. `at` is that of `sites.Stream`, and given together
    with the positions of these tokens, and `kept`, those of all whose keys are kept.
    """

    values: Int[Array, 'B T'] | Float[Array, 'B ...']
    token_types: Int[Array, 'B T'] | None = None
    positions: Int[Array, 'B T'] | None = None
    mask: Bool[Array, '#B 1 #T S'] | None = None
    tags: Int[Array, 'B T'] | None = None
    at: Int[Array, ''] | None = None
    kept: Int[Array, 'S'] | None = None


class Stem(Protocol):
    """What a stack begins with: the settings of its module. Equal settings are equal stems.

    `reads` is the column of a batch that it takes: 'input_ids', 'pixels' or 'sound'.
    """

    reads: ClassVar[str]

    @property
    def scale(self) -> float:
        """By what it multiplies the vectors of its table of words, if it has one."""

    @property
    def word(self) -> int:
        """The width of its vectors before anything is made of them; 0: the hidden size."""

    def module(self, config: 'BackboneConfig', block: BlockConfig, dtype: Any) -> nn.Module:
        """Return the module, whose call takes inputs, sites, whether there is no dropout, and the
        table of a stem that it shares word vectors with (or None), and returns a stream.

        A stem of words moreover has a method `table`, which returns its own.
        """

    def example(self) -> Array:
        """Return the smallest input."""


def longest(stack: 'Decoder | BackboneConfig') -> int | None:
    """Return how many tokens a stack takes at most; None where it knows distances alone."""
    return None if getattr(stack.stem, 'relative', False) else stack.positions


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The second stack of an encoder-decoder: it reads what it has written, and the encoder."""

    layers: int
    positions: int  # the longest text it writes, in tokens
    block: BlockConfig
    stem: Stem
    start_id: int  # what every text begins with
    vocabulary: int = 0  # of what it writes; 0: the encoder's
    pad_id: int = -1  # behind a text that it wrote; -1: the encoder's
    final_norm: bool = False
    shared_words: bool = True  # whether its word vectors are the encoder's
    tied: bool = True  # whether scores of words are products with its word vectors
    scale: float = 1.0  # of the states before these products
    transformed: bool = False  # whether they first go through the head that BERT has


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """What a checkpoint's config.json says, under the names of this project."""

    family: str
    layers: int  # of the encoder
    vocabulary: int
    positions: int  # the longest input it takes, in tokens, patches or frames
    pad_id: int
    block: BlockConfig
    stem: Stem
    pooler: bool = False
    final_norm: bool = False  # pre-LN stacks end in a LayerNorm
    final_dropout: bool = False  # after it
    decoder: Decoder | None = None

    @property
    def reads(self) -> str:
        """What it reads, as batches call it; see `Stem`."""
        return self.stem.reads

    @property
    def depth(self) -> int:
        """The number of all layers."""
        return self.layers + (self.decoder.layers if self.decoder else 0)

    @property
    def written(self) -> int:
        """The number of words that it scores: those that it writes, if it has a decoder."""
        return (self.decoder.vocabulary if self.decoder else 0) or self.vocabulary

    @property
    def dimensions(self) -> Dimensions:
        """The sizes an adapter depends on."""
        b = self.block
        return Dimensions(
            layers=self.depth,
            hidden=b.hidden,
            feed_forward=b.feed_forward,
            heads=b.heads,
            word=self.stem.word or b.hidden,
            vocabulary=self.vocabulary,
            positions=self.positions,
            inner=b.inner,
            decoder_layers=self.depth - self.layers,
            gated=b.gated,
            reads_words=self.reads == 'input_ids',
            word_scale=self.stem.scale,
        )


class Table(nn.Module):
    """A table of vectors."""

    rows: int
    features: int

    @nn.compact
    def __call__(self) -> Float[Array, 'V D'] | quantize.Quantized:
        """Return all of them."""
        return leaves.leaf(self, 'embedding', leaves.normal, (self.rows, self.features))


class Backbone(nn.Module):
    """One or two stacks of blocks.

    What comes before the place `trunk` runs without dropout, since nothing there is trained; a
    trunk of at least one layer includes the embeddings.
    `remat` says what of each block's activations is computed again in the backward pass.
    """

    config: BackboneConfig
    dtype: Any = jnp.float32
    trunk: Place = START
    remat: str = 'none'

    def setup(self) -> None:
        """Name the parts as the parameter tree does."""
        c, block = self.config, rematerialised(self.remat)
        self.embeddings = c.stem.module(c, c.block, self.dtype)
        self.blocks = [block(c.block, i, name=f'layer_{i}') for i in range(c.layers)]
        if c.final_norm:
            self.final_norm = _norm(c.block, 'final_norm')
        if c.pooler:
            self.pooler = Dense(c.block.hidden)
        if c.decoder is not None:
            d = c.decoder
            self.decoder_embeddings = d.stem.module(c, d.block, self.dtype)
            self.decoder_blocks = [
                block(d.block, i, name=f'layer_{i}') for i in range(c.layers, c.depth)
            ]
            if d.final_norm:
                self.decoder_final_norm = _norm(d.block, 'decoder_final_norm')

    def __call__(
        self,
        values: Int[Array, 'B T'] | Float[Array, 'B ...'],
        token_type_ids: Int[Array, 'B T'] | None = None,
        positions: Int[Array, 'B T'] | None = None,
        mask: Bool[Array, '#B 1 #T T'] | None = None,
        tags: Int[Array, 'B T'] | None = None,
        sites: Sites = IDENTITY,
        deterministic: bool = True,
        all_hidden: bool = False,
        known: Float[Array, 'B T N D'] | None = None,
        target: Inputs | None = None,
        target_mask: Bool[Array, '#B 1 #T S'] | None = None,
        places: Int[Array, 'B N'] | None = None,
    ) -> Float[Array, 'B T D'] | list[Float[Array, 'B T D']]:
        """Return the last hidden states, or with `all_hidden` the input's and every layer's.

        With `places`, of an encoder alone, they are [B, N, D]: those of N tokens of each row, and
        of the last layer no more is computed than these need. Sites there must leave it to
        attention to bring tokens together.

        With a `target` they are the decoder's, which sees of the encoder's what `target_mask` says
        (everything, if None), or with `all_hidden` the encoder's followed by the decoder's.

        `known` is what `model.trunk_outputs` returned for these inputs: computation begins there.
        With more vectors a token than the place has, they are the outputs of the trunk's blocks.
        """
        inputs = Inputs(values, token_type_ids, positions, mask, tags)
        collected, own = self._encode(inputs, sites, deterministic, known, places)
        if target is None:
            return collected if all_hidden else collected[-1]
        memory = collected[-1]
        if target_mask is not None and target_mask.shape[-1] != memory.shape[1]:
            target_mask = own[:, :, :1]  # vectors were inserted; such rows have one text each
        decoded = self.decode(
            target, memory, target_mask, sites, deterministic, all_hidden=True, own=own
        )
        return [*collected, *decoded] if all_hidden else decoded[-1]

    def encode(
        self, inputs: Inputs, sites: Sites = IDENTITY
    ) -> tuple[Float[Array, 'B S D'], Bool[Array, '#B 1 #S S'] | None]:
        """Return the encoder's last hidden states, and their mask: of what sites insert, too."""
        collected, mask = self._encode(inputs, sites, True)
        return collected[-1], mask

    def _encode(
        self,
        inputs: Inputs,
        sites: Sites,
        deterministic: bool,
        known: Float[Array, 'B T N D'] | None = None,
        places: Int[Array, 'B N'] | None = None,
    ) -> tuple[list[Float[Array, 'B S D']], Bool[Array, '#B 1 #S S'] | None]:
        stream = self.embeddings(inputs, sites, deterministic or self.trunk.layer > 0)
        collected = self._run(self.blocks, stream, sites, deterministic, known, places=places)
        if self.config.final_norm:
            still = deterministic or self.trunk.layer >= self.config.layers
            collected[-1] = self._end(self.final_norm, collected[-1], sites, still)
        return collected, stream.mask

    def decode(
        self,
        target: Inputs,
        memory: Float[Array, 'B S D'],
        mask: Bool[Array, '#B 1 #T S'] | None = None,
        sites: Sites = IDENTITY,
        deterministic: bool = True,
        all_hidden: bool = False,
        own: Bool[Array, '#B 1 #S S'] | None = None,
    ) -> Float[Array, 'B T D'] | list[Float[Array, 'B T D']]:
        """Return the decoder's last hidden states, or with `all_hidden` all of them.

        `mask` tells which of the memory each token sees, and `own` which of the memory belong
        together: that is the mask, too, where a row is one text. Where `target.at` is given, what
        the decoder needs of these tokens is kept in the collection 'cache' for those after them,
        and `memory` is looked at with the first of them only.
        """
        c = self.config.decoder
        shared = self.embeddings.table() if c.shared_words else None
        still = deterministic or self.trunk.layer > self.config.layers
        stream = self.decoder_embeddings(target, sites, still, shared)
        given = Memory(memory, mask, mask if own is None else own)
        collected = self._run(self.decoder_blocks, stream, sites, deterministic, None, given)
        if c.final_norm:
            collected[-1] = self._end(self.decoder_final_norm, collected[-1], sites, deterministic)
        return collected if all_hidden else collected[-1]

    def _run(
        self,
        blocks: list[nn.Module],
        stream: Stream,
        sites: Sites,
        deterministic: bool,
        known: Float[Array, 'B T N D'] | None,
        memory: Memory | None = None,
        places: Int[Array, 'B N'] | None = None,
    ) -> list[Float[Array, 'B T D']]:
        """Return the hidden states before and after every block; of the last, those of `places`."""
        trunk = self.trunk
        known = None if known is None else known.astype(stream.hidden.dtype)
        stream = stream.replace(hidden=spread_rows(stream.hidden))
        collected = [stream.hidden]
        if known is not None and trunk.layer == self.config.layers:
            stream = self._replay(stream, known, sites)
        for block in blocks:
            i = block.layer
            if known is None or i > trunk.layer:
                still = deterministic or i < trunk.layer
                here, places = (places, None) if block is blocks[-1] else (None, places)
                stream = block(stream, sites, still, memory, trunk, None, here)
            elif i == trunk.layer:
                stream = block(stream, sites, deterministic, memory, trunk, known)
            stream = stream.replace(hidden=spread_rows(stream.hidden))
            collected.append(stream.hidden)
        stream = stream if places is None else stream.of(places)  # what no block has done
        collected[-1] = sites.output(stream).hidden
        return collected

    def _end(
        self, norm: Norm, x: Float[Array, 'B T D'], sites: Sites, deterministic: bool
    ) -> Float[Array, 'B T D']:
        x = norm(x.shape[-1], sites)(x)
        if deterministic or not self.config.final_dropout:
            return x
        return functional.dropout(x, self.config.block.dropout, self.make_rng('dropout'))

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

    def table(self) -> Float[Array, 'V D'] | quantize.Quantized:
        """Return the word vectors that are compared with what the last layer says."""
        decoder = self.config.decoder
        own = decoder is not None and not decoder.shared_words
        return (self.decoder_embeddings if own else self.embeddings).table()

    def initialise(
        self, values: Array, target: Int[Array, 'B T'] | None = None
    ) -> Float[Array, 'B T D']:
        """Touch every parameter once: what `init` of a randomly initialised model runs."""
        hidden = self(values, target=None if target is None else Inputs(target))
        return self.pool(hidden[:, :1]) if self.config.pooler else hidden


def _norm(block: BlockConfig, name: str) -> Norm:
    return Norm(block.norm_epsilon, name, block.centred, name=name)


def shapes(config: BackboneConfig) -> dict[str, Any]:
    """Return the tree of a backbone's parameters as shapes, without computing anything."""
    model = Backbone(config)
    given = jax.eval_shape(lambda: config.stem.example())
    target = None if config.decoder is None else jax.ShapeDtypeStruct((1, 1), jnp.int32)
    key = jax.random.key(0)
    return jax.eval_shape(
        lambda values, target: model.init(key, values, target, method='initialise'), given, target
    )['params']


# Where the parameters lie on a mesh: matrices that end in heads or hidden units are cut along
# these, and so are those that begin with them (Shoeybi et al. 2019, section 3, figure 3).
_INTO = r'backbone/layer_\d+/((cross_)?attention/(query|key|value)|feed_forward/(up|gate))'
_OUT_OF = r'backbone/layer_\d+/((cross_)?attention/output|feed_forward/down)'
LAYOUTS = (
    Layout(f'{_INTO}/kernel', P('fsdp', 'tensor')),
    Layout(f'{_INTO}/bias', P('tensor')),
    Layout(f'{_OUT_OF}/kernel', P('tensor', 'fsdp')),
    Layout(
        r'backbone/(decoder_)?embeddings/(word|position)/embedding', P(None, ('fsdp', 'tensor'))
    ),
    Layout(r'backbone/pooler/kernel', P('fsdp', 'tensor')),
)

# The matrices that may be kept in 8 bits, and the axis whose indices are their channels.
CHANNELS = (
    (r'backbone/layer_\d+/.*/kernel', 1),
    (r'backbone/pooler/kernel', 1),
    (r'backbone/(decoder_)?embeddings/word/embedding', 0),
)
