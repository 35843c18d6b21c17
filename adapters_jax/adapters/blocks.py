"""What each block of a composition does at each site: sites made of other adapters' sites.

A block knows nothing of methods. It hands on what it is given, whole (`Stack`), or a part of the
sequence (`SplitTokens`) or of the batch (`SplitRows`), and joins what comes back: in order, as a
mean (`Mean`) or by attention (`Fused`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, PRNGKeyArray

from adapters_jax.adapters import fusion
from adapters_jax.adapters.fusion import FusionConfig
from adapters_jax.adapters.method import Change
from adapters_jax.params import Tree
from adapters_jax.sites import KeyValue, Linear, Sites, Stream, SubLayer


@struct.dataclass
class Stack(Sites):
    """One after another, each on what the one before it returned."""

    members: tuple[Any, ...]

    def words(self, words):
        """Let each member change the word vectors."""
        for member in self.members:
            words = member.words(words)
        return words

    def embeddings(self, stream):
        """Let each member change the embedded input."""
        for member in self.members:
            stream = member.embeddings(stream)
        return stream

    def linear(self, layer, sub_layer, name, end):
        """Let each member change a projection's output."""
        for member in self.members:
            end = end.replace(output=member.linear(layer, sub_layer, name, end))
        return end.output

    def key_value(self, layer, sub_layer, seen):
        """Let each member extend the keys and values."""
        for member in self.members:
            seen = member.key_value(layer, sub_layer, seen)
        return seen

    def sub_layer(self, layer, name, end):
        """Let each member change a sub-layer's output; the last of them ends it."""
        return self.close(layer, name, end, self.adapt(layer, name, end).output)

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Return what the members make of a sub-layer's output, and what the last one added."""
        change = Change(end.output)
        for member in self.members:
            if member.ends(layer, name):
                change = member.adapt(layer, name, end.replace(output=change.output))
        return change

    def close(self, layer: int, name: str, end: SubLayer, output: Array) -> Array:
        """End a sub-layer as the last member does that acts on it."""
        member = self._last(layer, name)
        return end.finish(output) if member is None else member.close(layer, name, end, output)

    def read(self, layer: int, name: str, end: SubLayer) -> tuple[Array, Array]:
        """Return what the last member reads, and what its result is added to."""
        return self._last(layer, name).read(layer, name, end)

    def ends(self, layer: int, name: str) -> bool:
        """Tell whether a member acts on the end of a sub-layer."""
        return any(member.ends(layer, name) for member in self.members)

    def _last(self, layer: int, name: str) -> Any:
        acting = [member for member in self.members if member.ends(layer, name)]
        return acting[-1] if acting else None

    def block(self, layer, stream):
        """Let each member change a block's output."""
        for member in self.members:
            stream = member.block(layer, stream)
        return stream

    def output(self, stream):
        """Let each member change the last hidden states."""
        for member in self.members:
            stream = member.output(stream)
        return stream


@struct.dataclass
class Mean(Stack):
    """Each on the same input; what they return is averaged with fixed weights."""

    weights: tuple[float, ...] = struct.field(pytree_node=False)

    def _mean(self, values: Sequence[Array]) -> Array:
        return sum(w * x for w, x in zip(self.weights, values, strict=True))

    def _stream(self, stream: Stream, call: Callable[[Any, Stream], Stream]) -> Stream:
        found, carry = [], stream.carry
        for member in self.members:
            changed = call(member, stream.replace(carry=carry))
            carry = changed.carry
            found.append(changed.hidden)
        return stream.replace(hidden=self._mean(found), carry=carry)

    def embeddings(self, stream):
        """Average the embedded inputs."""
        return self._stream(stream, lambda member, s: member.embeddings(s))

    def linear(self, layer, sub_layer, name, end):
        """Average the projections' outputs."""
        return self._mean([m.linear(layer, sub_layer, name, end) for m in self.members])

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Average the sub-layers' outputs, and what was added to them."""
        found = [member.adapt(layer, name, end) for member in self.members]
        ups = [jnp.zeros_like(end.output) if x.up is None else x.up for x in found]
        return Change(self._mean([x.output for x in found]), self._mean(ups))

    def block(self, layer, stream):
        """Average the blocks' outputs."""
        return self._stream(stream, lambda member, s: member.block(layer, s))

    def output(self, stream):
        """Average the last hidden states."""
        return self._stream(stream, lambda member, s: member.output(s))


@struct.dataclass
class Fused(Stack):
    """Each on the same input; what they add is mixed by attention (AdapterFusion).

    `record`, where there is one, is filled with the weights of each place while it is traced.
    """

    params: Tree
    key: PRNGKeyArray | None
    config: FusionConfig = struct.field(pytree_node=False)
    record: dict[str, Array] | None = struct.field(pytree_node=False, default=None)

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Mix what the members add; the last of them says what is the query and the residual."""
        acting = [member for member in self.members if member.ends(layer, name)]
        if not acting:
            return Change(end.output)
        ups = jnp.stack([member.adapt(layer, name, end).up for member in acting], axis=2)
        read, residual = acting[-1].read(layer, name, end)
        query = end.output if self.config.query_before_ln else read
        place = self.params[f'layer_{layer}'][name]
        mixed = fusion.mix(place, query, ups, residual, self.config, self._key(layer, name))
        if self.record is not None:
            self.record[f'layer_{layer}/{name}'] = mixed.weights
        return Change(mixed.output, mixed.output - residual)

    def _key(self, layer: int, name: str) -> PRNGKeyArray | None:
        return fusion.place_key(self.key, layer, name)


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

        def cut(part: slice) -> SubLayer:
            stream = end.stream.replace(
                hidden=end.stream.hidden[:, part], mask=_tokens_mask(end.stream.mask, part)
            )
            return end.replace(
                output=end.output[:, part], residual=end.residual[:, part], stream=stream
            )

        pieces = self._parts(end.output.shape[1])
        return _join([m.adapt(layer, name, cut(part)) for m, part in pieces], axis=1)


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

    def embeddings(self, stream):
        """Let each member change its rows of the embedded input."""
        return self._stream(stream, lambda member, s: member.embeddings(s))

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

    def sub_layer(self, layer, name, end):
        """Let each member change and end its rows of a sub-layer."""
        pieces = self._parts(len(end.output))
        return jnp.concatenate([m.sub_layer(layer, name, _cut(end, part)) for m, part in pieces])

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Let each member change its rows of a sub-layer's output."""
        pieces = self._parts(len(end.output))
        return _join([m.adapt(layer, name, _cut(end, part)) for m, part in pieces], axis=0)

    def close(self, layer: int, name: str, end: SubLayer, output: Array) -> Array:
        """Let each member end its rows of a sub-layer."""
        pieces = self._parts(len(output))
        return jnp.concatenate(
            [m.close(layer, name, _cut(end, part), output[part]) for m, part in pieces]
        )

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
    before: int = struct.field(pytree_node=False)  # 0: the embeddings

    def _tile(self, stream: Stream) -> Stream:
        def copied(x: Array | None) -> Array | None:
            single = x is None or len(x) != len(stream.hidden)
            return x if single else jnp.tile(x, (self.copies,) + (1,) * (x.ndim - 1))

        return stream.replace(
            hidden=copied(stream.hidden),
            mask=copied(stream.mask),
            word_vectors=copied(stream.word_vectors),
            tags=copied(stream.tags),
        )

    def embeddings(self, stream):
        """Copy the embedded input where the lowest layer is adapted."""
        return stream if self.before else self.inner.embeddings(self._tile(stream))

    def linear(self, layer, sub_layer, name, end):
        """Hand on to the adapters above the trunk."""
        below = layer < self.before
        return end.output if below else self.inner.linear(layer, sub_layer, name, end)

    def key_value(self, layer, sub_layer, seen):
        """Hand on to the adapters above the trunk."""
        return seen if layer < self.before else self.inner.key_value(layer, sub_layer, seen)

    def sub_layer(self, layer, name, end):
        """Hand on to the adapters above the trunk."""
        below = layer < self.before
        return end.finish(end.output) if below else self.inner.sub_layer(layer, name, end)

    def block(self, layer, stream):
        """Copy the output of the last block below the adapters."""
        if layer == self.before - 1:
            return self._tile(stream)
        return stream if layer < self.before else self.inner.block(layer, stream)

    def output(self, stream):
        """Hand on to the adapters."""
        return self.inner.output(stream)


def _slices(sizes: Sequence[int]) -> list[slice]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _rows(x: Array | None, part: slice) -> Array | None:
    return x if x is None or len(x) == 1 else x[part]


def _vector_rows(x: Array, part: slice) -> Array:
    return x if x.ndim == 1 else x[part]


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
