"""Binds a method to its parameters: what a backbone calls at its sites.

A method's functions are pure in the parameters of one place; this is where the parameters of each
place are found in the tree, each call gets a random key of its own, and the members of a union are
called one after another.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
from jaxtyping import Array, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters.method import At, Change, Method, acts
from adapters_jax.adapters.union import Union
from adapters_jax.params import Tree
from adapters_jax.sites import SUB_LAYERS, Sites, Stream, SubLayer


def bind(method: Method, params: Tree, key: PRNGKeyArray | None, scope: str = '') -> Sites:
    """Return the sites that a method makes with these parameters; no key, no dropout.

    `scope` names this adapter among all that are bound: its part of `Stream.carry`.
    """
    if not isinstance(method, Union):
        return Adapted(params=params, key=key, method=method, scope=scope)
    members = enumerate(method.named().items())
    return Chain(
        tuple(
            bind(member, params.get(name, {}), functional.fold(key, i), f'{scope}/{i}')
            for i, (name, member) in members
        )
    )


@struct.dataclass
class Adapted(Sites):
    """A method bound to its parameters: what a backbone calls at its sites."""

    params: Tree
    key: PRNGKeyArray | None
    method: Method = struct.field(pytree_node=False)
    scope: str = struct.field(pytree_node=False, default='')

    def _scoped(self, stream: Stream, call: Callable[[Stream], Stream]) -> Stream:
        """Let the method see, in the stream's carry, what it left there itself and no more."""
        carry = stream.carry
        own = call(stream.replace(carry=carry.get(self.scope, {})))
        self.method.require(
            not carry or own.hidden.shape == stream.hidden.shape,
            'another adapter has looked at the text without the vectors that are inserted here; '
            f'list {self.method.architecture} first in the union',
        )
        return own.replace(carry=carry | ({self.scope: own.carry} if own.carry else {}))

    def _at(self, layer: int, name: str, site: int) -> At:
        key = functional.fold(self.key, layer + 1, site)
        shared, constants = (self.params.get(name, {}) for name in ('shared', 'constants'))
        return At(layer=layer, name=name, shared=shared, key=key, constants=constants)

    def _find(self, *path: str) -> Tree | None:
        node: Any = self.params
        for name in path:
            node = node.get(name) if isinstance(node, Mapping) else None
        return node

    def words(self, words):
        """Let the method change the word vectors."""
        return self.method.words(self.params, words, self._at(-1, 'words', 40))

    def embeddings(self, stream):
        """Let the method change the embedded input."""
        at = self._at(-1, 'embeddings', 0)
        return self._scoped(stream, lambda s: self.method.embeddings(self.params, s, at))

    def linear(self, layer, sub_layer, name, end):
        """Let the method change a projection's output."""
        params = self._find(f'layer_{layer}', sub_layer, name)
        if params is None:
            return end.output
        site = 100 + 10 * SUB_LAYERS.index(sub_layer) + _PROJECTION_NUMBER[name]
        return self.method.linear(params, end, self._at(layer, f'{sub_layer}/{name}', site))

    def key_value(self, layer, sub_layer, seen):
        """Let the method extend the keys and values."""
        params = self._find(f'layer_{layer}', sub_layer)
        if params is None:
            return seen
        at = self._at(layer, sub_layer, 10 + SUB_LAYERS.index(sub_layer))
        return self.method.key_value(params, seen, at)

    def sub_layer(self, layer, name, end):
        """Let the method end a sub-layer."""
        return self.close(layer, name, end, self.adapt(layer, name, end).output)

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Return what the method makes of a sub-layer's output."""
        params = self._find(f'layer_{layer}', name)
        if params is None:
            return Change(end.output)
        carry = end.stream.carry.get(self.scope, {})
        end = end.replace(stream=end.stream.replace(carry=carry))
        return self.method.adapt(params, end, self._at(layer, name, SUB_LAYERS.index(name)))

    def close(self, layer: int, name: str, end: SubLayer, output: Array) -> Array:
        """End a sub-layer with what `adapt` returned."""
        return self.method.close(end, output) if self.ends(layer, name) else end.finish(output)

    def ends(self, layer: int, name: str) -> bool:
        """Tell whether the method acts on the end of this sub-layer."""
        return acts(type(self.method), 'adapt') and self._find(f'layer_{layer}', name) is not None

    def block(self, layer, stream):
        """Let the method change a block's output."""
        params = self._find(f'layer_{layer}', 'block')
        if params is None:
            return stream
        at = self._at(layer, 'block', 20)
        return self._scoped(stream, lambda s: self.method.block(params, s, at))

    def output(self, stream):
        """Let the method change the last hidden states."""
        params = self._find('output')
        if params is None:
            return stream
        at = self._at(-1, 'output', 30)
        return self._scoped(stream, lambda s: self.method.output(params, s, at))


_PROJECTION_NUMBER = {
    name: i for i, name in enumerate(('query', 'key', 'value', 'output', 'up', 'down'))
}


@struct.dataclass
class Chain(Sites):
    """Several adapters at once, each passing on what the one before it returned.

    A sub-layer can be ended only once, so at most one member may act there (see `Union`).
    """

    members: tuple[Sites, ...]

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
        """Let the member that acts on this sub-layer end it."""
        return self.close(layer, name, end, self.adapt(layer, name, end).output)

    def adapt(self, layer: int, name: str, end: SubLayer) -> Change:
        """Let the member that acts on this sub-layer change its output."""
        member = self._ending(layer, name)
        return Change(end.output) if member is None else member.adapt(layer, name, end)

    def close(self, layer: int, name: str, end: SubLayer, output: Array) -> Array:
        """End a sub-layer as the member that acts on it does."""
        member = self._ending(layer, name)
        return end.finish(output) if member is None else member.close(layer, name, end, output)

    def _ending(self, layer: int, name: str) -> Any:
        return next((member for member in self.members if member.ends(layer, name)), None)

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

    def ends(self, layer, name):
        """Tell whether a member acts on the end of a sub-layer."""
        return any(member.ends(layer, name) for member in self.members)
