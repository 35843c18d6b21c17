"""Binds a method to its parameters: what a backbone calls at its sites.

A method's functions are pure in the parameters of one place; this is where the parameters of each
place are found in the tree, each call gets a random key of its own, and the members of a union are
called one after another.
"""

from collections.abc import Mapping
from typing import Any

from flax import struct
from jaxtyping import PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters.method import At, Method
from adapters_jax.adapters.union import Union
from adapters_jax.params import Tree
from adapters_jax.sites import SUB_LAYERS, Sites


def bind(method: Method, params: Tree, key: PRNGKeyArray | None) -> Sites:
    """Return the sites that a method makes with these parameters; no key, no dropout."""
    if not isinstance(method, Union):
        return Adapted(params=params, key=key, method=method)
    members = enumerate(method.named().items())
    return Chain(
        tuple(
            bind(member, params.get(name, {}), functional.fold(key, i))
            for i, (name, member) in members
        )
    )


@struct.dataclass
class Adapted(Sites):
    """A method bound to its parameters: what a backbone calls at its sites."""

    params: Tree
    key: PRNGKeyArray | None
    method: Method = struct.field(pytree_node=False)

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
        return self.method.embeddings(self.params, stream, self._at(-1, 'embeddings', 0))

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
        params = self._find(f'layer_{layer}', name)
        if params is None:
            return end.finish(end.output)
        return self.method.sub_layer(params, end, self._at(layer, name, SUB_LAYERS.index(name)))

    def ends(self, layer: int, name: str) -> bool:
        """Tell whether the method acts on the end of this sub-layer."""
        acts = type(self.method).sub_layer is not Method.sub_layer
        return acts and self._find(f'layer_{layer}', name) is not None

    def block(self, layer, stream):
        """Let the method change a block's output."""
        params = self._find(f'layer_{layer}', 'block')
        if params is None:
            return stream
        return self.method.block(params, stream, self._at(layer, 'block', 20))

    def output(self, stream):
        """Let the method change the last hidden states."""
        params = self._find('output')
        if params is None:
            return stream
        return self.method.output(params, stream, self._at(-1, 'output', 30))


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
        for member in self.members:
            if member.ends(layer, name):
                return member.sub_layer(layer, name, end)
        return end.finish(end.output)

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
