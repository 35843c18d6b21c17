"""What the blocks of a composition do at each site: sites made of other adapters' sites.

A block knows nothing of methods. The blocks here hand on all of what they are given and join what
comes back: in order (`Stack`), as a mean (`Mean`) or by attention (`Fused`). Those that hand on a
part of it are in `slices`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, PRNGKeyArray

from adapters_jax.adapters import fusion
from adapters_jax.adapters.fusion import FusionConfig
from adapters_jax.adapters.method import Change
from adapters_jax.params import Tree
from adapters_jax.sites import Sites, Stream, SubLayer

Ending = Callable[[SubLayer, Array], Array]


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

    def target(self, stream):
        """Let each member look at a decoder's embedded input."""
        for member in self.members:
            stream = member.target(stream)
        return stream

    def undo(self, x):
        """Let each member take back what it did, the last one first."""
        for member in reversed(self.members):
            x = member.undo(x)
        return x

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

    def sees_keys(self, layer, sub_layer):
        """Tell whether a member may look at the keys and values."""
        return any(member.sees_keys(layer, sub_layer) for member in self.members)

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

    def close(
        self,
        layer: int,
        name: str,
        end: SubLayer,
        output: Array,
        otherwise: Ending = SubLayer.finish,
    ) -> Array:
        """End a sub-layer as the last member does that acts on it, or `otherwise`."""
        for member in self.members:
            otherwise = functools.partial(member.close, layer, name, otherwise=otherwise)
        return otherwise(end, output)

    def closes(self, layer: int, name: str) -> bool:
        """Tell whether residual connection and LayerNorm follow on what `adapt` returns."""
        member = self._last(layer, name)
        return member is None or member.closes(layer, name)

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

    def target(self, stream):
        """Let each member look at a decoder's embedded input."""
        return self._stream(stream, lambda member, s: member.target(s))

    def linear(self, layer, sub_layer, name, end):
        """Average the projections' outputs."""
        return self._mean([m.linear(layer, sub_layer, name, end) for m in self.members])

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Average the sub-layers' outputs, and what was added to them.

        Where a member has no residual connection and LayerNorm after it, only results that are
        ended can be compared: each member ends its own.
        """
        found = [member.adapt(layer, name, end) for member in self.members]
        ups = [jnp.zeros_like(end.output) if x.up is None else x.up for x in found]
        outputs = [x.output for x in found]
        if not self.closes(layer, name):
            pairs = zip(self.members, outputs, strict=True)
            outputs = [member.close(layer, name, end, output) for member, output in pairs]
        return Change(self._mean(outputs), self._mean(ups))

    def close(self, layer, name, end, output, otherwise=SubLayer.finish):
        """End a sub-layer, unless the members have."""
        if not self.ends(layer, name):
            return otherwise(end, output)
        return end.finish(output) if self.closes(layer, name) else output

    def closes(self, layer: int, name: str) -> bool:
        """Tell whether every member leaves residual connection and LayerNorm to the backbone."""
        return all(member.closes(layer, name) for member in self.members)

    def block(self, layer, stream):
        """Average the blocks' outputs."""
        return self._stream(stream, lambda member, s: member.block(layer, s))

    def output(self, stream):
        """Average the last hidden states."""
        return self._stream(stream, lambda member, s: member.output(s))


@struct.dataclass
class Fused(Stack):
    """Each on the same input; what they add is mixed by attention (AdapterFusion).

    `record`, where there is one, is filled with the weights of each place while it is traced, under
    the `called` of the fusion, which no other has.
    """

    params: Tree
    key: PRNGKeyArray | None
    config: FusionConfig = struct.field(pytree_node=False)
    record: dict[str, Array] | None = struct.field(pytree_node=False, default=None)
    called: str = struct.field(pytree_node=False, default='')

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
            self.record[f'{self.called}/layer_{layer}/{name}'] = mixed.weights
        return Change(mixed.output, mixed.output - residual)

    def _key(self, layer: int, name: str) -> PRNGKeyArray | None:
        return fusion.place_key(self.key, layer, name)
