"""Binds a method to its parameters: what a backbone calls at its sites.

A method's functions are pure in the parameters of one place; this is where the parameters of each
place are found in the tree and each call gets a random key of its own. Members of unions and of
compositions are bound one by one and joined by `blocks` and `slices`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
from jaxtyping import Array, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters import blocks, composition, slices
from adapters_jax.adapters.bank import Bank
from adapters_jax.adapters.blocks import Ending, Stack
from adapters_jax.adapters.composed import Composed
from adapters_jax.adapters.composition import Composition, Fuse
from adapters_jax.adapters.method import At, Change, Method, acts
from adapters_jax.adapters.routing import bind_bank
from adapters_jax.adapters.union import Union
from adapters_jax.params import Tree, flatten
from adapters_jax.sites import KEYS, SUB_LAYERS, Sites, Stream, SubLayer


def bind(
    method: Method,
    params: Tree,
    key: PRNGKeyArray | None,
    scope: str = '',
    record: dict[str, Array] | None = None,
    rows: Array | None = None,
) -> Sites:
    """Return the sites that a method makes with these parameters; no key, no dropout.

    `scope` names this adapter among all that are bound: its part of `Stream.carry`. `record` is
    filled with the weights of AdapterFusion while the sites are called, under
    '{fusion}/layer_{i}/{sub_layer}'. `rows` are the numbers of the rows' adapters, for a bank.

    Raises:
        ValueError: a bank without `rows`.
    """
    if isinstance(method, Bank):
        method.require(rows is not None, "the batch has no column 'adapter' to choose members by")
        return bind_bank(method, params, key, scope, rows, bind)
    if isinstance(method, Union):
        members = enumerate(method.named().items())
        return Stack(
            tuple(
                bind(member, params.get(name, {}), functional.fold(key, i), f'{scope}/{i}')
                for i, (name, member) in members
            )
        )
    if isinstance(method, Composed):
        return _bind_composed(method, params, key, scope, record)
    return Adapted(params=params, key=key, method=method, scope=scope)


def _bind_composed(
    method: Composed,
    params: Tree,
    key: PRNGKeyArray | None,
    scope: str,
    record: dict[str, Array] | None,
) -> Sites:
    """Return the sites of the tree of blocks."""
    seen: list[str] = []  # a fusion may act several times, with the same parameters

    def build(node: str | Composition, key: PRNGKeyArray | None, scope: str) -> Any:
        if isinstance(node, str):
            return bind(method.members[node], params.get(node, {}), key, scope)
        members = tuple(
            build(child, functional.fold(key, i), f'{scope}/{i}')
            for i, child in enumerate(node.children)
        )
        if isinstance(node, Fuse):
            own = params.get('fusion', {}).get(node.fusion, {})
            folded = functional.fold(key, len(members))
            seen.append(node.fusion)
            times = seen.count(node.fusion)
            called = node.fusion if times == 1 else f'{node.fusion}#{times}'
            return blocks.Fused(members, own, folded, method.fusion, record, called)
        return _BLOCKS[type(node)](node, members)

    whole = build(method.tree, key, scope)
    if method.replicas == 1:
        return whole
    return slices.Tiled(whole, method.replicas, _lowest(method, params))


def _lowest(method: Composed, params: Tree) -> int:
    """Return the lowest adapted layer; 0 too for the embedded input, -1 for word vectors."""
    leaves = [m for n in method.members.values() for m in getattr(n, 'members', (n,))]
    if any(leaf.reserved_positions or leaf.inserted.count for leaf in leaves):
        return -1
    if any(acts(type(leaf), 'embeddings') for leaf in leaves):
        return 0
    found = (re.search(r'(?:^|/)layer_(\d+)/', path) for path in flatten(params))
    return min((int(layer[1]) for layer in found if layer), default=0)


_BLOCKS: dict[type[Composition], Callable[[Any, tuple[Any, ...]], Any]] = {
    composition.Stack: lambda node, members: Stack(members),
    composition.Average: lambda node, members: blocks.Mean(members, node.weights),
    composition.Split: lambda node, members: slices.SplitTokens(members, node.splits),
    composition.BatchSplit: lambda node, members: slices.SplitRows(members, node.batch_sizes),
    composition.Parallel: lambda node, members: slices.SplitRows(members, None),
}


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

    def target(self, stream):
        """Let the method look at a decoder's embedded input."""
        at = self._at(-1, 'target', 50)
        return self._scoped(stream, lambda s: self.method.target(self.params, s, at))

    def linear(self, layer, sub_layer, name, end):
        """Let the method change a projection's output."""
        params = self._find(f'layer_{layer}', sub_layer, name)
        if not isinstance(params, Mapping):  # an array of that name is the sub-layer's own
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

    def sees_keys(self, layer, sub_layer):
        """Tell whether the method acts on the keys and values here, or on their projections."""
        here, method = self._find(f'layer_{layer}', sub_layer), type(self.method)
        projected = acts(method, 'linear') and any(name in (here or {}) for name in KEYS)
        return projected or (here is not None and acts(method, 'key_value'))

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

    def close(
        self,
        layer: int,
        name: str,
        end: SubLayer,
        output: Array,
        otherwise: Ending = SubLayer.finish,
    ) -> Array:
        """End a sub-layer with what `adapt` returned; `otherwise` where the method is not."""
        acts_here = self.ends(layer, name)
        return self.method.close(end, output) if acts_here else otherwise(end, output)

    def closes(self, layer: int, name: str) -> bool:
        """Tell whether residual connection and LayerNorm follow on what `adapt` returns."""
        return self.method.closes or not self.ends(layer, name)

    def read(self, layer: int, name: str, end: SubLayer) -> tuple[Array, Array]:
        """Return what the method reads, and what its result is added to."""
        return self.method.read(end)

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

    def undo(self, x):
        """Let the method take back what it did to the embedded input."""
        return self.method.inverse(self.params, x)

    def output(self, stream):
        """Let the method change the last hidden states."""
        params = self._find('output')
        if params is None:
            return stream
        at = self._at(-1, 'output', 30)
        return self._scoped(stream, lambda s: self.method.output(params, s, at))


_PROJECTION_NUMBER = {
    name: i for i, name in enumerate(('query', 'key', 'value', 'output', 'up', 'down', 'gate'))
}
