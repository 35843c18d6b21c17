"""The blocks of a composition that give each adapter a part of the batch, or copy it.

A part of the sequence (`SplitTokens`), of the rows (`SplitRows`), or a copy of all rows (`Tiled`,
and `SplitRows` on what it returns). What each adapter returns is put together again in order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from adapters_jax.adapters.blocks import Stack
from adapters_jax.adapters.method import Change
from adapters_jax.sites import KeyValue, Linear, Sites, Stream, SubLayer, Words


@struct.dataclass
class SplitTokens(Stack):
    """Each on a part of the sequence."""

    splits: tuple[int, ...] = struct.field(pytree_node=False)

    def _parts(self, tokens: int) -> list[tuple[Any, slice]]:
        if sum(self.splits) != tokens:
            raise ValueError(
                f'split has splits={list(self.splits)}, {sum(self.splits)} tokens in all, but the '
                f'rows have {tokens}; give lengths that sum to it'
            )
        return list(zip(self.members, _slices(self.splits), strict=True))

    def linear(self, layer, sub_layer, name, end):
        """Let each member change its part of a projection's output."""

        def cut(part: slice) -> Linear:
            return end.replace(
                inputs=end.inputs[:, part],
                output=end.output[:, part],
                mask=_tokens_mask(end.mask, part),
            )

        pieces = self._parts(end.output.shape[1])
        return jnp.concatenate(
            [m.linear(layer, sub_layer, name, cut(part)) for m, part in pieces], axis=1
        )

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Let each member change its part of a sub-layer's output."""
        pieces = self._parts(end.output.shape[1])
        return _join([m.adapt(layer, name, _tokens(end, part)) for m, part in pieces], axis=1)

    def close(self, layer, name, end, output, otherwise=SubLayer.finish):
        """Let each member end its part of a sub-layer."""
        pieces, rest = self._parts(output.shape[1]), otherwise(end, output)
        ended = [
            m.close(layer, name, _tokens(end, part), output[:, part], _given(rest[:, part]))
            for m, part in pieces
        ]
        return jnp.concatenate(ended, axis=1)

    def closes(self, layer: int, name: str) -> bool:
        """Tell whether every member leaves residual connection and LayerNorm to the backbone."""
        return all(member.closes(layer, name) for member in self.members)


@struct.dataclass
class SplitRows(Stack):
    """Each on a part of the batch; without sizes, on parts of equal size."""

    sizes: tuple[int, ...] | None = struct.field(pytree_node=False)

    def _parts(self, rows: int) -> list[tuple[Any, slice]]:
        count = len(self.members)
        sizes = (rows // count,) * count if self.sizes is None else self.sizes
        if sum(sizes) != rows:
            raise ValueError(
                f'batch_split has batch_sizes={list(sizes)}, {sum(sizes)} rows in all, but the '
                f'batch has {rows}; give numbers that sum to it'
            )
        pieces = zip(self.members, _slices(sizes), strict=True)
        return [(member, part) for member, part in pieces if part.start < part.stop]

    def _stream(self, stream: Stream, call: Callable[[Any, Stream], Stream]) -> Stream:
        found, carry = [], stream.carry
        for member, part in self._parts(len(stream.hidden)):
            changed = call(member, _rows_of_stream(stream, part).replace(carry=carry))
            carry = changed.carry
            found.append(changed.hidden)
        return stream.replace(hidden=jnp.concatenate(found), carry=carry)

    def words(self, words):
        """Let each member change its rows of the word vectors."""
        pieces = self._parts(len(words.vectors))
        found = [member.words(_rows_of_words(words, part)) for member, part in pieces]
        masks = [x.mask for x in found]
        tags = None if words.tags is None else jnp.concatenate([x.tags for x in found])
        return Words(
            vectors=jnp.concatenate([x.vectors for x in found]),
            token_types=jnp.concatenate([x.token_types for x in found]),
            positions=jnp.concatenate([x.positions for x in found]),
            mask=words.mask if masks[0] is None or len(words.mask) == 1 else jnp.concatenate(masks),
            tags=tags,
        )

    def embeddings(self, stream):
        """Let each member change its rows of the embedded input."""
        return self._stream(stream, lambda member, s: member.embeddings(s))

    def target(self, stream):
        """Let each member look at its rows of a decoder's embedded input."""
        return self._stream(stream, lambda member, s: member.target(s))

    def linear(self, layer, sub_layer, name, end):
        """Let each member change its rows of a projection's output."""

        def cut(part: slice) -> Linear:
            return end.replace(
                inputs=end.inputs[part],
                output=end.output[part],
                mask=_rows(end.mask, part),
                bias=None if end.bias is None else _vector_rows(end.bias, part),
            )

        pieces = self._parts(len(end.output))
        return jnp.concatenate([m.linear(layer, sub_layer, name, cut(part)) for m, part in pieces])

    def key_value(self, layer, sub_layer, seen):
        """Let each member extend the keys and values of its rows.

        Where they extend them by different numbers, the shorter ones begin with masked places.
        """

        def cut(part: slice) -> KeyValue:
            return KeyValue(
                inputs=seen.inputs[part],
                key=seen.key[part],
                value=seen.value[part],
                mask=_rows(seen.mask, part),
                text_mask=_rows(seen.text_mask, part),
            )

        pieces = self._parts(len(seen.key))
        found = [member.key_value(layer, sub_layer, cut(part)) for member, part in pieces]
        longest = max(one.key.shape[1] for one in found)
        if longest == seen.key.shape[1]:
            return seen
        masks = [_padded_mask(one, longest) for one in found]
        queries = max(mask.shape[2] for mask in masks)
        masks = [jnp.broadcast_to(m, (*m.shape[:2], queries, longest)) for m in masks]
        return seen.replace(
            key=jnp.concatenate([_padded(one.key, longest) for one in found]),
            value=jnp.concatenate([_padded(one.value, longest) for one in found]),
            mask=jnp.concatenate(masks),
        )

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Let each member change its rows of a sub-layer's output."""
        pieces = self._parts(len(end.output))
        return _join([m.adapt(layer, name, _cut(end, part)) for m, part in pieces], axis=0)

    def close(self, layer, name, end, output, otherwise=SubLayer.finish):
        """Let each member end its rows of a sub-layer."""
        pieces, rest = self._parts(len(output)), otherwise(end, output)
        ended = [
            m.close(layer, name, _cut(end, part), output[part], _given(rest[part]))
            for m, part in pieces
        ]
        return jnp.concatenate(ended)

    def closes(self, layer: int, name: str) -> bool:
        """Tell whether every member leaves residual connection and LayerNorm to the backbone."""
        return all(member.closes(layer, name) for member in self.members)

    def block(self, layer, stream):
        """Let each member change its rows of a block's output."""
        return self._stream(stream, lambda member, s: member.block(layer, s))

    def output(self, stream):
        """Let each member change its rows of the last hidden states."""
        return self._stream(stream, lambda member, s: member.output(s))


@struct.dataclass
class Tiled(Sites):
    """Copies the batch, one copy after another, once the stream comes to layer `before`.

    What lies below is computed once for all copies; no adapter acts there.
    """

    inner: Any
    copies: int = struct.field(pytree_node=False)
    before: int = struct.field(pytree_node=False)  # 0: the embedded input, -1: the word vectors

    def _copied(self, x: Any, rows: int) -> Any:
        """Copy each array that has a row for each of the batch."""

        def copy(x: Array) -> Array:
            return jnp.tile(x, (self.copies,) + (1,) * (x.ndim - 1)) if len(x) == rows else x

        return jax.tree.map(copy, x)

    def words(self, words):
        """Copy the word vectors where an adapter changes these."""
        if self.before >= 0:
            return words
        return self.inner.words(self._copied(words, len(words.vectors)))

    def embeddings(self, stream):
        """Copy the embedded input where the lowest layer is adapted."""
        if self.before > 0:
            return stream
        if self.before == 0:
            stream = self._copied(stream, len(stream.hidden))
        return self.inner.embeddings(stream)

    def target(self, stream):
        """Hand on to the adapters."""
        return self.inner.target(stream)

    def linear(self, layer, sub_layer, name, end):
        """Hand on to the adapters above the trunk."""
        below = layer < self.before
        return end.output if below else self.inner.linear(layer, sub_layer, name, end)

    def key_value(self, layer, sub_layer, seen):
        """Hand on to the adapters above the trunk."""
        return seen if layer < self.before else self.inner.key_value(layer, sub_layer, seen)

    def sees_keys(self, layer, sub_layer):
        """Hand on to the adapters above the trunk."""
        return layer >= self.before and self.inner.sees_keys(layer, sub_layer)

    def sub_layer(self, layer, name, end):
        """Hand on to the adapters above the trunk."""
        below = layer < self.before
        return end.finish(end.output) if below else self.inner.sub_layer(layer, name, end)

    def block(self, layer, stream):
        """Copy the output of the last block below the adapters."""
        if layer == self.before - 1:
            return self._copied(stream, len(stream.hidden))
        return stream if layer < self.before else self.inner.block(layer, stream)

    def output(self, stream):
        """Hand on to the adapters."""
        return self.inner.output(stream)


def _given(ended: Array) -> Callable[..., Array]:
    """Return how a part ends that no member ends: as the whole was ended, which is not divided.

    What lies below in a stack may divide the batch, too, by sizes of the whole.
    """
    return lambda *_: ended


def _slices(sizes: Sequence[int]) -> list[slice]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _rows(x: Array | None, part: slice) -> Array | None:
    return x if x is None or len(x) == 1 else x[part]


def _vector_rows(x: Array | None, part: slice) -> Array | None:
    return x if x is None or x.ndim == 1 or len(x) == 1 else x[part]


def _rows_of_words(words: Words, part: slice) -> Words:
    return Words(
        vectors=words.vectors[part],
        token_types=_rows(words.token_types, part),
        positions=words.positions[part],
        mask=_rows(words.mask, part),
        tags=None if words.tags is None else words.tags[part],
    )


def _rows_of_stream(stream: Stream, part: slice) -> Stream:
    return stream.replace(
        hidden=stream.hidden[part],
        mask=_rows(stream.mask, part),
        word_vectors=stream.word_vectors[part],
        tags=None if stream.tags is None else stream.tags[part],
    )


def _cut(end: SubLayer, part: slice) -> SubLayer:
    norm = end.norm
    if norm is not None:
        norm = norm.replace(
            scale=_vector_rows(norm.scale, part), bias=_vector_rows(norm.bias, part)
        )
    return SubLayer(
        output=end.output[part],
        residual=end.residual[part],
        norm=norm,
        stream=_rows_of_stream(end.stream, part),
    )


def _join(changes: Sequence[Change], axis: int) -> Change:
    output = jnp.concatenate([change.output for change in changes], axis)
    ups = [jnp.zeros_like(c.output) if c.up is None else c.up for c in changes]
    return Change(output, jnp.concatenate(ups, axis))


def _tokens(end: SubLayer, part: slice) -> SubLayer:
    mask = _tokens_mask(end.stream.mask, part)
    stream = end.stream.replace(hidden=end.stream.hidden[:, part], mask=mask)
    return end.replace(output=end.output[:, part], residual=end.residual[:, part], stream=stream)


def _tokens_mask(mask: Bool[Array, '#B 1 #T T'] | None, part: slice) -> Array | None:
    if mask is None:
        return None
    mask = mask[..., part]
    return mask if mask.shape[2] == 1 else mask[:, :, part]


def _padded(x: Array, length: int) -> Array:
    return jnp.pad(x, ((0, 0), (length - x.shape[1], 0), (0, 0), (0, 0)))


def _padded_mask(seen: KeyValue, length: int) -> Bool[Array, 'B 1 #T S']:
    rows, own = seen.key.shape[:2]
    mask = jnp.ones((1, 1, 1, own), bool) if seen.mask is None else seen.mask
    mask = jnp.broadcast_to(mask, (rows, 1, *mask.shape[2:]))
    return jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (length - own, 0)))
