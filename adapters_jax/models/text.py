"""Stems of words: what encoder-decoders begin with on both sides, and a decoder of speech on one.

The vectors of words may be those of the other stack, and are then given with the call.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from adapters_jax import functional, quantize
from adapters_jax.models.backbone import BackboneConfig, Inputs, Table
from adapters_jax.models.block import BlockConfig
from adapters_jax.models.layers import Norm
from adapters_jax.sites import Sites, Stream, Words

LEARNED, SINES, RELATIVE = 'learned', 'sines', 'relative'


@dataclasses.dataclass(frozen=True)
class TextStem:
    """Words and where they stand.

    `kind` is 'learned' (a table of positions, whose first `offset` rows nobody uses), 'sines'
    (Vaswani et al. 2017, section 3.5, sines first), or 'relative': nothing is added to the vectors,
    but scores of attention get a bias by distance (Raffel et al. 2020, section 2.1).
    """

    reads: ClassVar[str] = 'input_ids'

    positions: int
    kind: str = LEARNED
    offset: int = 0
    scale: float = 1.0  # of the words' vectors
    norm: bool = False  # a LayerNorm after the sum
    decoder: bool = False  # whether it is the second stack's
    shared: bool = False  # whether its word vectors are the other stack's
    buckets: int = 32  # of distances
    distance: int = 128  # from which on all distances are one
    word: int = 0

    @property
    def relative(self) -> bool:
        """Whether it knows distances alone, so that texts may be of any length."""
        return self.kind == RELATIVE

    def module(self, config: BackboneConfig, block: BlockConfig, dtype: Any) -> nn.Module:
        """Return the embedding module."""
        return TextEmbeddings(config.written, self, block, dtype)

    def example(self) -> Int[Array, '1 1']:
        """Return the smallest input."""
        return jnp.zeros((1, 1), jnp.int32)


class TextEmbeddings(nn.Module):
    """The module of `TextStem`."""

    vocabulary: int
    stem: TextStem
    block: BlockConfig
    dtype: Any

    def setup(self) -> None:
        """Name the tables as the parameter tree does."""
        s, hidden = self.stem, self.block.hidden
        if not s.shared:
            self.word = Table(self.vocabulary, hidden)
        if s.kind == LEARNED:
            self.position = Table(s.positions + s.offset, hidden)
        if s.kind == RELATIVE:
            self.relative = Table(s.buckets, self.block.heads)
        if s.norm:
            where = 'decoder_embeddings/norm' if s.decoder else 'embeddings/norm'
            self.norm = Norm(self.block.norm_epsilon, where)

    def __call__(
        self, inputs: Inputs, sites: Sites, deterministic: bool, shared: Array | None = None
    ) -> Stream:
        """Return the stream that the blocks start with: the embedded input and what it is of."""
        s, ids = self.stem, inputs.values
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        positions = positions if inputs.positions is None else inputs.positions
        vectors = quantize.rows(shared if s.shared else self.word(), ids) * s.scale
        words = Words(vectors, jnp.zeros_like(ids), positions, inputs.mask, inputs.tags)
        words = words if s.decoder else sites.words(words)
        x = words.vectors
        if s.kind == LEARNED:
            x = x + jnp.take(self.position(), words.positions + s.offset, axis=0)
        elif s.kind == SINES:
            x = x + sines(words.positions, x.shape[-1])
        if s.norm:
            x = self.norm(x.shape[-1], sites)(x)
        rng = None if deterministic else self.make_rng('dropout')
        x = functional.dropout(x, self.block.dropout, rng).astype(self.dtype)
        stream = Stream(x, words.mask, words.vectors.astype(self.dtype), words.tags, at=inputs.at)
        stream = sites.target(stream) if s.decoder else sites.embeddings(stream)
        if s.kind != RELATIVE:
            return stream
        if inputs.at is None:
            queries = jnp.arange(stream.hidden.shape[1])
            keys = jnp.arange(stream.before + len(queries))
        else:  # no text is before another's tokens, so those of the first row are those of all
            queries = positions[0]
            keys = jnp.concatenate([jnp.arange(stream.before), stream.before + inputs.kept])
        return stream.replace(bias=self._bias(queries, keys))

    def _bias(self, queries: Int[Array, 'T'], keys: Int[Array, 'S']) -> Float[Array, '1 H T S']:
        s = self.stem
        apart = keys[None, :] - queries[:, None]
        found = buckets(apart, s.buckets, s.distance, both_ways=not s.decoder)
        bias = jnp.take(self.relative(), found, axis=0)
        return bias.transpose(2, 0, 1)[None].astype(jnp.float32)

    def table(self) -> Float[Array, 'V D'] | quantize.Quantized:
        """Return the word vectors."""
        return self.word()


def sines(positions: Int[Array, 'B T'], width: int) -> Float[Array, 'B T D']:
    """Return the vectors of positions: all sines, then all cosines."""
    rates = 10000 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[:, :, None].astype(jnp.float32) * rates.reshape(1, 1, -1)
    # Of an odd width the last cosine is left out.
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)[:, :, : width // 2]], axis=-1)


def buckets(
    apart: Int[Array, 'T S'], count: int, distance: int, both_ways: bool
) -> Int[Array, 'T S']:
    """Return the bucket of each distance (Raffel et al. 2020, section 2.1).

    Half of them are for one distance each, the others grow up to `distance`. A text that looks both
    ways has half of all for what comes after.
    """
    if both_ways:
        count //= 2
        offset = jnp.where(apart > 0, count, 0)
        apart = jnp.abs(apart)
    else:
        offset, apart = 0, -jnp.minimum(apart, 0)
    # A table, as logarithms of XLA fall below a whole number at some powers where others do not.
    table = jnp.asarray(_far_buckets(count, distance))
    return offset + table[jnp.minimum(apart, distance)]


@functools.lru_cache
def _far_buckets(count: int, distance: int) -> Int[np.ndarray, ' D']:
    """Return the bucket of each distance from 0 to `distance`, which has the last one."""
    exact = count // 2
    apart = np.arange(distance + 1)
    far = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact))
    far = far / np.float32(math.log(distance / exact)) * np.float32(count - exact)
    far = np.minimum(exact + far.astype(np.int32), count - 1)
    return np.where(apart < exact, apart, far).astype(np.int32)
