"""Per-row routing: a bank bound to a batch whose rows name their adapters.

The parameters of each group of rows are gathered by its index, and the method's site functions are
mapped over the groups: nothing in a method knows of it. Rows of other members, and rows without an
adapter, keep what the backbone computed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters.bank import BACKBONE, Bank, Kind, is_constant
from adapters_jax.adapters.blocks import Stack
from adapters_jax.adapters.method import Method
from adapters_jax.params import Tree, flatten, map_with_path
from adapters_jax.sites import KeyValue, Linear, Sites, Stream, SubLayer, Words

# Members up to which the product that chooses among them costs less than what it replaces.
_FEW = 64

Bind = Callable[[Method, Tree, PRNGKeyArray | None, str], Any]


def bind_bank(
    bank: Bank,
    params: Tree,
    key: PRNGKeyArray | None,
    scope: str,
    index: Int[Array, 'G'] | Int[Array, 'B S'],
    bind: Bind,
) -> Sites:
    """Return the sites of a bank for rows that name their members by number, or none by -1."""
    index = index[:, 0] if index.ndim == 2 else index
    stacked = bank.stack(params)
    return Kinds(
        tuple(
            _bind_kind(
                kind, stacked[kind.name], functional.fold(key, i), f'{scope}/{i}', index, bind
            )
            for i, kind in enumerate(bank.kinds)
        )
    )


def _bind_kind(
    kind: Kind, tree: Tree, key: PRNGKeyArray | None, scope: str, index: Array, bind: Bind
) -> 'Routed':
    numbers = jnp.array(kind.numbers)
    place = jnp.argmax(index[:, None] == numbers[None], axis=1)
    mine = (index[:, None] == numbers[None]).any(1)
    shared = {path for path in flatten(tree) if kind.alike and is_constant(path)}
    own = map_with_path(lambda path, x: x if path in shared else _of_each(x, place), tree)
    keys = (
        None
        if key is None
        else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(index)))
    )
    vectors = flatten(own.pop(BACKBONE, {}))
    axes = map_with_path(lambda path, _: None if path in shared else 0, own)
    return Routed(own, keys, vectors, mine, kind.method, scope, bind, axes)


def _of_each(x: Float[Array, 'M ...'], place: Int[Array, 'G']) -> Float[Array, 'G ...']:
    """Return the parameters of each group's member.

    Of a few members by a product with zeros and ones, which is exact, and which a CPU does ten
    times as fast as it gathers; so is its gradient, a product too instead of a scatter.
    """
    if not 1 < len(x) <= _FEW or not jnp.issubdtype(x.dtype, jnp.floating):
        return x[place]
    chosen = jax.nn.one_hot(place, len(x), dtype=x.dtype)
    rows = jnp.dot(chosen, x.reshape(len(x), -1), precision=jax.lax.Precision.HIGHEST)
    return rows.reshape(len(place), *x.shape[1:])


@struct.dataclass
class Kinds(Stack):
    """The kinds of a bank: each changes its own rows only, so one may follow the other."""

    def vector(self, path, value):
        """Let each kind replace its rows' biases and LayerNorm vectors."""
        for member in self.members:
            value = member.vector(path, value)
        return value

    def sub_layer(self, layer, name, end):
        """Let each kind end its rows of a sub-layer."""
        result = end.finish(end.output)
        for member in self.members:
            if member.ends(layer, name):
                result = member.choose(member.sub_layer(layer, name, end), result)
        return result


@struct.dataclass
class Routed(Sites):
    """Members of one kind, gathered for G groups of rows: leaves are [G, ...]."""

    params: Tree
    keys: PRNGKeyArray | None
    vectors: dict[str, Array]
    mine: Bool[Array, 'G']
    method: Method = struct.field(pytree_node=False)
    scope: str = struct.field(pytree_node=False)
    bind: Bind = struct.field(pytree_node=False)
    axes: Any = struct.field(pytree_node=False)

    def choose(self, own: Array, other: Array) -> Array:
        """Return, of [B, ...], the own rows of the first and the other ones of the second."""
        mine = jnp.repeat(self.mine, len(own) // len(self.mine))
        return jnp.where(mine.reshape(-1, *[1] * (own.ndim - 1)), own, other)

    def _call(self, call: Callable[[Any, Any], Any], given: Any, axes: Any) -> Any:
        """Map `call(sites, given)` over the groups; `axes` says which leaves have rows."""
        groups = len(self.mine)

        def one(tree: Tree, key: PRNGKeyArray | None, part: Any) -> Any:
            return call(self.bind(self.method, tree, key, self.scope), part)

        def cut(x: Array, axis: int | None) -> Array:
            return x if axis is None else x.reshape(groups, -1, *x.shape[1:])

        leaves, form = jax.tree.flatten(given)
        flat = jax.tree.unflatten(form, [cut(x, a) for x, a in zip(leaves, axes, strict=True)])
        places = jax.tree.unflatten(form, axes)
        keys = None if self.keys is None else 0
        return jax.vmap(one, (self.axes, keys, places))(self.params, self.keys, flat)

    def _join(self, x: Array) -> Array:
        """Return [G, g, ...] as [B, ...]."""
        return x.reshape(-1, *x.shape[2:])

    def vector(self, path, value):
        """Replace a bias or a LayerNorm's vector for the own rows."""
        if path not in self.vectors:
            return value
        own = self.vectors[path][:, None]
        plain = value if value.ndim == 3 else value.reshape(1, 1, -1)
        return jnp.where(self.mine[:, None, None], own, plain)

    def words(self, words):
        """Change the own rows' word vectors; what is inserted there, others have at their end."""
        found = self._call(lambda sites, part: sites.words(part), words, _axes(words))
        found = self._rows(found, words)
        return _choose(self, found, words, found.vectors.shape[1] - words.vectors.shape[1])

    def embeddings(self, stream):
        """Change the own rows' embedded input."""
        found = self._call(lambda sites, part: sites.embeddings(part), stream, _axes(stream))
        found = self._rows(found, stream)
        return _choose(self, found, stream, found.hidden.shape[1] - stream.hidden.shape[1])

    def target(self, stream):
        """Let the members look at the own rows of a decoder's embedded input."""
        return self._stream(stream, -1, lambda s, x: s.target(x))

    def _rows(self, found: Any, given: Any) -> Any:
        """Return a struct of [G, g, ...] as one of rows; masks of all rows alike stay so."""
        rows = len(given.vectors if isinstance(given, Words) else given.hidden)
        joined = jax.tree.map(self._join, found)
        if joined.mask is not None and len(joined.mask) != rows:
            repeats = rows // len(joined.mask)
            joined = joined.replace(mask=jnp.repeat(joined.mask, repeats, axis=0))
        return joined

    def linear(self, layer, sub_layer, name, end):
        """Change the own rows of a projection's output."""
        if not self._has(layer, sub_layer, name):
            return end.output
        rows = len(end.output)
        mask = None if end.mask is None or len(end.mask) != rows else 0
        bias = None if end.bias is None or end.bias.ndim == 1 else 0
        kernel = jax.tree.map(lambda _: None, end.kernel)
        axes = _flat(Linear(0, kernel, bias, 0, mask), end)
        found = self._call(lambda s, x: s.linear(layer, sub_layer, name, x), end, axes)
        return self.choose(self._join(found), end.output)

    def key_value(self, layer, sub_layer, seen):
        """Extend the own rows' keys and values; other rows get masked places."""
        if not self._has(layer, sub_layer):
            return seen
        rows = len(seen.key)

        def masked(mask: Array | None) -> int | None:
            return None if mask is None or len(mask) != rows else 0

        axes = _flat(KeyValue(0, 0, 0, masked(seen.mask), masked(seen.text_mask)), seen)
        found = self._call(lambda s, x: s.key_value(layer, sub_layer, x), seen, axes)
        extra = found.key.shape[2] - seen.key.shape[1]
        if not extra:
            key, value = (self._join(x) for x in (found.key, found.value))
            return seen.replace(
                key=self.choose(key, seen.key), value=self.choose(value, seen.value)
            )
        mask = jnp.ones((1, 1, 1, seen.key.shape[1]), bool) if seen.mask is None else seen.mask
        front = jnp.repeat(self.mine, rows // len(self.mine)).reshape(-1, 1, 1, 1)
        front = jnp.broadcast_to(front, (rows, 1, mask.shape[2], extra))
        mask = jnp.broadcast_to(mask, (rows, *mask.shape[1:]))
        widths = ((0, 0), (extra, 0), (0, 0), (0, 0))
        return seen.replace(
            key=self.choose(self._join(found.key), jnp.pad(seen.key, widths)),
            value=self.choose(self._join(found.value), jnp.pad(seen.value, widths)),
            mask=jnp.concatenate([front, mask], axis=-1),
        )

    def sees_keys(self, layer: int, sub_layer: str) -> bool:
        """Tell whether the members may look at the keys and values."""
        return self._bound.sees_keys(layer, sub_layer)

    def sub_layer(self, layer, name, end):
        """End the own rows of a sub-layer; the others' are whatever comes out."""
        stream, norm = end.stream, end.norm
        if norm is not None:
            scale, bias = (None if x.ndim == 1 else 0 for x in (norm.scale, norm.bias))
            norm = norm.replace(scale=scale, bias=bias)
        axes = _flat(SubLayer(0, 0, norm, _stream_axes(stream)), end)
        found = self._call(lambda s, x: s.sub_layer(layer, name, x), end, axes)
        return self._join(found)

    def ends(self, layer: int, name: str) -> bool:
        """Tell whether the members act on the end of this sub-layer."""
        return self._bound.ends(layer, name)

    @property
    def _bound(self) -> Any:
        """The sites of all members at once, which tell where they act."""
        return self.bind(self.method, self.params, None, self.scope)

    def block(self, layer, stream):
        """Change the own rows of a block's output."""
        return self._stream(stream, layer, lambda s, x: s.block(layer, x))

    def output(self, stream):
        """Change the own rows of the last hidden states."""
        return self._stream(stream, -1, lambda s, x: s.output(x))

    def _stream(self, stream: Stream, layer: int, call: Callable[[Any, Any], Any]) -> Stream:
        found = self._rows(self._call(call, stream, _axes(stream)), stream)
        hidden = self.choose(found.hidden, stream.hidden)
        return stream.replace(hidden=hidden, carry=found.carry)

    def _has(self, layer: int, *path: str) -> bool:
        """Tell whether any member has parameters at a place, at whatever depth members lie."""
        wanted = '/'.join((f'layer_{layer}', *path)) + '/'
        return any(wanted in f'{name}/' for name in flatten(self.params))


def _flat(axes: Any, given: Any) -> list[int | None]:
    """Return the axes of a struct in the order of the given struct's leaves."""
    is_none = {'is_leaf': lambda x: x is None}
    pairs = zip(jax.tree.leaves(axes, **is_none), jax.tree.leaves(given, **is_none), strict=True)
    return [axis for axis, x in pairs if x is not None]


def _stream_axes(stream: Stream) -> Stream:
    """Return 0 for each leaf of a stream that has rows."""
    rows = len(stream.hidden)
    return jax.tree.map(lambda x: 0, stream).replace(
        mask=None if stream.mask is None or len(stream.mask) != rows else 0, bias=None, at=None
    )


def _axes(given: Stream | Words) -> list[int | None]:
    if isinstance(given, Stream):
        return _flat(_stream_axes(given), given)
    rows = len(given.vectors)
    axes = jax.tree.map(lambda x: 0, given)
    mask = None if given.mask is None or len(given.mask) != rows else 0
    return _flat(axes.replace(mask=mask), given)


def _choose(routed: Routed, found: Any, given: Any, extra: int) -> Any:
    """Return the own rows of `found` and the others of `given`, lengthened at their end."""
    rows = len(given.vectors if isinstance(given, Words) else given.hidden)
    if not extra and isinstance(given, Stream):
        hidden = routed.choose(found.hidden, given.hidden)
        return given.replace(hidden=hidden, carry=found.carry)

    def lengthened(x: Array | None) -> Array | None:
        return None if x is None else jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)))

    mask = given.mask
    if extra:
        length = (given.vectors if isinstance(given, Words) else given.hidden).shape[1]
        mask = jnp.ones((1, 1, 1, length), bool) if mask is None else mask
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, extra)))
        mask = jnp.broadcast_to(mask, (rows, *mask.shape[1:]))
        own = True if found.mask is None else found.mask
        mask = routed.choose(jnp.broadcast_to(own, mask.shape), mask)
    changed = {
        name: None
        if getattr(given, name) is None
        else routed.choose(getattr(found, name), lengthened(getattr(given, name)))
        for name in _COLUMNS[type(given)]
    }
    own = {} if isinstance(given, Words) else {'carry': found.carry}
    return given.replace(mask=mask, **changed, **own)


_COLUMNS = {
    Words: ('vectors', 'token_types', 'positions', 'tags'),
    Stream: ('hidden', 'word_vectors', 'tags'),
}
