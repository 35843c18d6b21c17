"""Many adapters in one program: each row of a batch goes through the one that it names.

Adapters of one method are stacked leaf by leaf, so that a row's own parameters are gathered by its
index; smaller ones are padded with zeros where that changes nothing. What is done with a bank at
the sites is in `routing`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters import fields
from adapters_jax.adapters.baselines import FullFineTuning, TopLayers
from adapters_jax.adapters.composed import Composed
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.union import Union
from adapters_jax.params import Tree, flatten, map_with_path, unflatten
from adapters_jax.sites import Dimensions, Place

BACKBONE = 'backbone'  # where a bank keeps members' own copies of leaves of the backbone


def widest(methods: Sequence[Method]) -> Method:
    """Return the method that can compute what each of these does, once padded.

    Raises:
        ValueError: they differ in more than sizes that can be padded with zeros.
    """
    first = methods[0]
    if all(method == first for method in methods):
        return first
    if all(isinstance(m, Union) and len(m.members) == len(first.members) for m in methods):
        columns = zip(*(method.members for method in methods), strict=True)
        return Union(members=tuple(widest(column) for column in columns))
    candidates = [m for m in methods if all(other.fits(m) for other in methods)]
    if not candidates:
        names = ', '.join(dict.fromkeys(str(m.to_json()) for m in methods))
        raise ValueError(
            'these methods differ in more than sizes that can be padded with zeros (the width of a '
            f'bottleneck, the rank of LoRA): {names}'
        )
    return candidates[0]


def pad(method: Method, params: Tree, widest: Method) -> Tree:
    """Return an adapter's parameters with zeros up to the sizes of the widest method."""

    def padded(path: str, leaf: Any) -> Array:
        own, name = _owner(method, path), _inside(method, path)
        sizes = own.padding(name, leaf.shape, _owner(widest, path))
        widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(leaf.shape)]
        return jnp.pad(jnp.asarray(leaf), widths)

    return map_with_path(padded, params)


def multipliers(method: Method, params: Tree, widest: Method) -> Tree:
    """Return what padded parameters are multiplied by to compute what the own ones do.

    It is 0 on the padding, so no gradient goes there, and holds the ratio of two methods' scales.
    """

    def factors(path: str, leaf: Any) -> Array:
        scale = _owner(method, path).rescale(_inside(method, path), _owner(widest, path))
        return jnp.full(leaf.shape, scale, jnp.float32)

    return pad(method, map_with_path(factors, params), widest)


def unpad(params: Tree, shapes: Tree) -> Tree:
    """Return padded parameters cut to the given shapes."""
    wanted = flatten(shapes)
    return {
        path: leaf[tuple(slice(size) for size in wanted[path].shape)]
        for path, leaf in flatten(params).items()
    }


def _owner(method: Method, path: str) -> Method:
    return method.named()[path.split('/')[0]] if isinstance(method, Union) else method


def _inside(method: Method, path: str) -> str:
    return path.partition('/')[2] if isinstance(method, Union) else path


@dataclasses.dataclass(frozen=True)
class Kind:
    """Members whose parameters can be stacked: their places in the bank, and the widest method.

    `alike` members have the same options, so their constants are the same arrays.
    """

    name: str
    method: Method
    numbers: tuple[int, ...]
    alike: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank(Method):
    """Adapters by name; a batch's column `adapter` holds the number of each row's own, or -1.

    The column has G entries for B rows, B a multiple of G: each is for B / G rows on end. Members
    of different methods make several kinds; each costs a pass of its small adapter over all rows.

    Parameters are `{member: tree}`, or what `stack` makes of them. A member's copies of leaves of
    the backbone lie under `{member}/backbone`.
    """

    architecture: ClassVar[str] = 'bank'

    members: Mapping[str, Method]

    def __post_init__(self) -> None:
        """Refuse an empty bank, and members that train matrices of the backbone or combine rows."""
        object.__setattr__(self, 'members', fields.FrozenDict(self.members))
        self.require(bool(self.members), 'it has no members; give at least one')
        for name, member in self.members.items():
            whole = isinstance(member, FullFineTuning | TopLayers)
            self.require(
                not whole,
                f'{name} ({member.architecture}) changes whole matrices of the backbone, which '
                'cannot be chosen by row; use it by itself',
            )
            self.require(
                not isinstance(member, Bank) and not member.divides,
                f'{name} divides or copies the batch itself; use it by itself',
            )
            parts = member.members if isinstance(member, Union) else (member,)
            self.require(
                not any(getattr(part, 'count_keys', False) for part in parts),
                f'{name} has count_keys=True, which moves the keys of all rows alike; use it by '
                'itself',
            )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The members, grouped by what can be stacked."""
        groups: list[list[int]] = []
        methods = list(self.members.values())
        for number, method in enumerate(methods):
            for group in groups:
                if _stackable([*(methods[i] for i in group), method]):
                    group.append(number)
                    break
            else:
                groups.append([number])
        found = []
        for i, group in enumerate(groups):
            own = [methods[j] for j in group]
            alike = all(method == own[0] and not method.stores_constants for method in own)
            found.append(Kind(f'kind_{i}', widest(own), tuple(group), alike))
        return tuple(found)

    @property
    def stepwise(self) -> bool:
        """Whether every member is."""
        return all(member.stepwise for member in self.members.values())

    @property
    def packable(self) -> bool:
        """Whether every member is; each row then holds texts of one member."""
        return all(member.packable for member in self.members.values())

    @property
    def reserved_positions(self) -> int:
        """The most that a member takes."""
        return max(member.reserved_positions for member in self.members.values())

    @property
    def reads_trunk(self) -> bool:
        """Whether a member does."""
        return any(member.reads_trunk for member in self.members.values())

    @property
    def known_tags(self) -> int:
        """The most that a member knows."""
        return max(member.known_tags for member in self.members.values())

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return every member's fresh parameters by name."""
        return {
            name: member.init(functional.fold(key, i), dimensions, backbone)
            for i, (name, member) in enumerate(self.members.items())
        }

    def first_layer(self, params: Tree, dimensions: Dimensions) -> int:
        """Return the lowest of the members' first layers."""
        return self.first_place(params, dimensions).layer

    def first_place(self, params: Tree, dimensions: Dimensions) -> Place:
        """Return the first of the members' first places."""
        stacked = self.stack(params)
        return min(kind.method.first_place(stacked[kind.name], dimensions) for kind in self.kinds)

    def lengthen(self, segments, index=None):
        """Return the segments of the last hidden states, each row's by its own member.

        Where only other rows have vectors inserted, a row has as many empty places at its end.
        """
        rows = rows_of(index, len(segments))
        for kind in self.kinds:
            count = kind.method.inserted.count
            if not count:
                continue
            inserted = kind.method.lengthen(segments)
            appended = jnp.pad(segments, ((0, 0), (0, count)))
            mine = jnp.isin(rows, jnp.array(kind.numbers))
            segments = jnp.where(mine[:, None], inserted, appended)
        return segments

    def index(
        self, params: Tree, index: Int[Array, 'G'] | Int[Array, 'B S'] | None, rows: int
    ) -> Int[Array, 'G'] | Int[Array, 'B'] | Int[Array, 'B S'] | None:
        """Return the numbers to bind by: one a row where members have vectors of the backbone.

        Such a vector is used as it is for a row, so it cannot be given for a group of rows.
        """
        held = any(BACKBONE in path.split('/') for path in flatten(params))
        return rows_of(index, rows) if held and index is not None else index

    def stack(self, params: Tree) -> Tree:
        """Return the members' parameters stacked by kind; what is stacked already stays."""
        if all(kind.name in params for kind in self.kinds):
            return params
        names, methods = list(self.members), list(self.members.values())
        stacked = {}
        for kind in self.kinds:
            trees = [params.get(names[i], {}) for i in kind.numbers]
            own = [{k: x for k, x in tree.items() if k != BACKBONE} for tree in trees]
            wide = [
                jax.tree.map(
                    jnp.multiply,
                    pad(methods[i], tree, kind.method),
                    multipliers(methods[i], tree, kind.method),
                )
                if not kind.alike
                else tree
                for i, tree in zip(kind.numbers, own, strict=True)
            ]
            copies = [{BACKBONE: t[BACKBONE]} if BACKBONE in t else {} for t in trees]
            leaves = [flatten(w | c) for w, c in zip(wide, copies, strict=True)]
            stacked[kind.name] = unflatten(
                {
                    path: leaf
                    if kind.alike and is_constant(path)
                    else jnp.stack([one[path] for one in leaves])
                    for path, leaf in leaves[0].items()
                }
            )
        return stacked

    def to_json(self) -> dict[str, Any]:
        """Return the members as JSON values."""
        members = {name: member.to_json() for name, member in self.members.items()}
        return {'architecture': self.architecture, 'members': members}


def is_constant(path: str) -> bool:
    """Tell whether a leaf belongs to a method's constants."""
    return 'constants' in path.split('/')


def rows_of(index: Int[Array, 'G'] | Int[Array, 'B S'], rows: int) -> Int[Array, 'B']:
    """Return each row's number: a group's is that of all its rows."""
    index = index[:, 0] if index.ndim == 2 else index
    return jnp.repeat(index, rows // len(index))


def _stackable(methods: Sequence[Method]) -> bool:
    if any(isinstance(method, Composed) for method in methods):
        return all(method == methods[0] for method in methods)
    try:
        widest(methods)
    except ValueError:
        return False
    return True
