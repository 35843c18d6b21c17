"""Where arrays live: the mesh of devices, and who holds what of a batch and of the parameters.

A mesh has three axes. The rows of a batch are spread over `data` and `fsdp`; a leaf of the
parameters lies as the first rule says that matches its path, on `fsdp` (its parts are gathered
where they are used) or `tensor` (its parts are worked with where they are), or whole everywhere.

That of a population may have `members` in the place of `data`: each device computes its own members
on whole batches.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax.params import Tree, cast, flatten

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')
MEMBERS = 'members'  # the axis that a population's mesh may have besides
_ALIGNMENT = 64  # bytes, of what XLA takes as an array of a CPU without copying it


@dataclasses.dataclass(frozen=True)
class Layout:
    """Leaves whose whole path matches `pattern` lie so: an axis, several or None a dimension."""

    pattern: str
    spec: P

    @classmethod
    def parse(cls, text: str) -> 'Layout':
        """Read `REGEX=axis,axis`: `-` for a dimension left whole, `fsdp+tensor` for two axes.

        Raises:
            ValueError: no such form, an axis that no mesh has, or one that is named twice.
        """
        pattern, found, dimensions = text.rpartition('=')
        parts = [part.strip().split('+') for part in dimensions.split(',')]
        names = [name for part in parts if part != ['-'] for name in part]
        if not found or not {*names} <= {*AXES} or len({*names}) < len(names):
            raise ValueError(
                f"mesh.rules has {text!r}; expected 'REGEX=axis,axis' with each of the axes "
                f"{', '.join(AXES)} once at most, or '-', as in 'adapters/.*/kernel=fsdp,-'"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f'mesh.rules has {text!r}, whose REGEX is none: {error}') from error
        dimension = (None if p == ['-'] else p[0] if len(p) == 1 else tuple(p) for p in parts)
        return cls(pattern, P(*dimension))


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    members: int = 1,
) -> Mesh:
    """Return a mesh of that many devices an axis; `data` is -1 for all that the others leave.

    So many `members` are spread over the devices of `data`, in the place of rows, if their number
    divides over these and the other axes have no more than one device. (XLA 0.10 ends the process
    over programs in which weights lie in parts as well.)

    Axes are Auto: Linen layers take no `out_sharding`, which Explicit axes would demand. `devices`
    are those that there are (default: JAX's); to compile a program they need not be at hand.

    Raises:
        ValueError: more devices asked for than there are, or a number that does not divide them.
    """
    devices = jax.devices() if devices is None else devices
    available = len(devices)
    for name, size in (('fsdp', fsdp), ('tensor', tensor)):
        if not 1 <= size <= available:
            raise ValueError(
                f'mesh.{name} is {size} but {available} devices are present; expected a number '
                f'from 1 to {available}'
            )
    inner = fsdp * tensor
    if data == -1 and available % inner:
        raise ValueError(
            f'mesh.fsdp x mesh.tensor is {inner}, which does not divide the {available} devices '
            'present; choose sizes that do, or set mesh.data'
        )
    data = available // inner if data == -1 else data
    if not data >= 1 or data * inner > available:
        raise ValueError(
            f'mesh.data is {data} but {available} devices are present'
            + (f', of which mesh.fsdp x mesh.tensor takes {inner} each' if inner > 1 else '')
            + f'; expected -1 (all) or a number from 1 to {max(1, available // inner)}'
        )
    if data * inner < available and jax.process_count() > 1:
        raise ValueError(
            f'the mesh takes {data * inner} of {available} devices in {jax.process_count()} '
            'processes, which would leave some without work; set mesh.data to -1'
        )
    axes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    if inner == 1 and data > 1 and members % data == 0:
        axes = {MEMBERS: data, **axes, 'data': 1}
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(AxisType.Auto,) * len(axes),
        devices=devices[: data * inner],
    )


def row_parts(mesh: Mesh) -> int:
    """Return into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its rows are spread over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROWS))


def by_members(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what has an axis of members first: whole where the mesh has none."""
    return NamedSharding(mesh, P(MEMBERS) if MEMBERS in mesh.axis_names else P())


def read_by_all(where: NamedSharding) -> NamedSharding:
    """Return how arrays that lie so may be left where every process is to read them whole.

    One process alone reads the parts where they are. Bringing them together would let its devices
    meet, and XLA ends a process of which one device is a minute behind another (those of a CPU).
    """
    return where if jax.process_count() == 1 else replicated(where.mesh)


def own_rows(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Return which of a batch's rows this process has on its devices: from, to before.

    Raises:
        ValueError: rows that do not divide over the devices.
    """
    parts = row_parts(mesh)
    if rows % parts:
        raise ValueError(_not_divided(rows, parts))
    held = by_rows(mesh).addressable_devices_indices_map((rows,)).values()
    bounds = [(s.start or 0, rows if s.stop is None else s.stop) for (s,) in held]
    return min(start for start, _ in bounds), max(stop for _, stop in bounds)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Place a batch's rows, of which each process gives its own (`own_rows`), on the devices.

    Those of a CPU may work in the memory of the batch, which nobody may change then.

    Raises:
        ValueError: rows that do not divide over the devices.
    """
    given, parts = len(next(iter(batch.values()))), row_parts(mesh)
    # Processes hold equally many parts, some the same ones where `tensor` spans processes.
    first, last = own_rows(mesh, parts)
    held = last - first
    if given % held:
        raise ValueError(_not_divided(given, held))
    size = given // held
    rows, first = size * parts, size * first
    sharding = by_rows(mesh)

    def put(column: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return column[start - first : stop - first]

        return jax.make_array_from_callback((rows, *column.shape[1:]), sharding, part)

    return {name: put(column) for name, column in batch.items()}


def _not_divided(rows: int, parts: int) -> str:
    return (
        f'a batch of {rows} rows does not divide over {parts} devices; choose '
        f'training.batch_size so that it gives a multiple of {parts} rows, or fewer devices '
        'through mesh.data'
    )


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Place a copy of every leaf, which may be a random key, on every device of all processes."""
    return put(tree, replicated(mesh))


def put(tree: Any, where: NamedSharding) -> Any:
    """Place a copy of every leaf, which may be a random key, and of which each process has all."""

    def own(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = own(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.array(leaf)  # where it is aligned, a CPU's device would work in the given memory
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(own, tree)


def devices_of(x: Any) -> int:
    """Return over how many devices an array may lie in parts: one where a device has it for itself.

    So has each of those that compute their own members of a population.
    """
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind != AxisType.Manual)


def spread_rows(x: Any) -> Any:
    """Return the activations, of which each device computes its own rows whole; for use in `jit`.

    Left to itself, XLA may let them lie as the weights do that they come from: cut along their
    last dimension, and all rows on every device.
    """
    mesh = jax.typeof(x).sharding.mesh
    if (
        devices_of(x) == 1
        or not set(ROWS) <= set(mesh.axis_names)
        or not isinstance(x, jax.core.Tracer)
    ):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(ROWS)))


def layouts(tree: Tree, mesh: Mesh, rules: Sequence[Layout]) -> Tree:
    """Return each leaf's sharding: that of the first rule that matches its path, else whole.

    Raises:
        ValueError: a dimension that does not divide over its axes; all such leaves are counted.
    """
    leaves = flatten(tree)
    problems: list[str] = []
    found = {
        path: _layout(path, leaf.shape, mesh, rules, problems) for path, leaf in leaves.items()
    }
    if problems:
        more = f' (and {len(problems) - 1} more leaves)' if len(problems) > 1 else ''
        raise ValueError(
            f'{problems[0]}{more}; choose sizes that divide it, or leave these leaves whole by '
            '--config.mesh.rules="(\'REGEX=-\',)"'
        )
    # Not `unflatten`: a branch without leaves stays, so that the two trees can be mapped together.
    return jax.tree_util.tree_map_with_path(lambda path, _: found[name_of(path)], tree)


def name_of(path: Any) -> str:
    """Return the '/'-joined name of a path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _layout(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Layout], problems: list[str]
) -> NamedSharding:
    spec = next((rule.spec for rule in rules if re.fullmatch(rule.pattern, path)), P())
    if len(spec) > len(shape):
        if any(axis is not None for axis in spec[len(shape) :]):
            problems.append(f'{path} has {len(shape)} dimensions, but its rule is for {len(spec)}')
        spec = P(*spec[: len(shape)])
    for dimension, axes in enumerate(spec):
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        parts = math.prod(mesh.shape[name] for name in names)
        if shape[dimension] % parts:
            sizes = ' x '.join(f'mesh.{name}={mesh.shape[name]}' for name in names)
            problems.append(
                f'{path} is {shape}, whose dimension {dimension} of {shape[dimension]} does not '
                f'divide over {sizes}'
            )
    return NamedSharding(mesh, spec)


def like(shapes: Any, of: Tree, whole: NamedSharding) -> Any:
    """Return the shardings of an optimiser's state: each moment lies as the leaf it belongs to.

    `shapes` is the state, or its shapes; `of` are the shardings of the trainable leaves by the
    same names. What belongs to no leaf is whole everywhere.
    """
    leaves = flatten(of)

    def own(path: Any, x: Any) -> NamedSharding:
        named = '/' + name_of(path)
        found = [leaf for name, leaf in leaves.items() if named.endswith('/' + name)]
        fits = found and len(found[0].spec) <= len(x.shape)
        return found[0] if fits else whole

    return jax.tree_util.tree_map_with_path(own, shapes)


def describe(tree: Any, where: Any, dtype: Any = None) -> Any:
    """Return what `place` would put on devices: shapes, number formats and shardings alone."""

    def described(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        floating = dtype is not None and jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return jax.ShapeDtypeStruct(
            leaf.shape, dtype if floating else leaf.dtype, sharding=sharding
        )

    return jax.tree.map(described, tree, where)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that a device holds of a tree of placed arrays, or of their descriptions."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def place(tree: Tree, dtype: Any, where: Any, shared: bool = False) -> Tree:
    """Put a tree of host arrays on devices, floating-point leaves in `dtype`.

    `where` is a sharding, or a tree of them. A device gets, and a process reads, its own part of a
    leaf and no other. Each leaf gets memory of its own: two leaves may begin as one array, and a
    step that is given the tree for good cannot be given the same memory twice. With `shared` the
    devices of a CPU hold together what they hold alike; no step may be given such a tree for good.
    """
    if not isinstance(where, Mapping):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(lambda leaf, sharding: _put(leaf, dtype, sharding, shared), tree, where)


def _put(leaf: Any, dtype: Any, sharding: NamedSharding, shared: bool) -> jax.Array:
    host = np.asarray(leaf)
    parts: dict[str, np.ndarray] = {}
    shared = shared and {device.platform for device in sharding.device_set} == {'cpu'}

    def own(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in parts:
            part = np.asarray(cast(host[index], dtype), order='C')
            parts[str(index)] = _aligned(part) if shared else part
        return parts[str(index)]

    devices = sharding.addressable_devices_indices_map(host.shape).items()
    return jax.make_array_from_single_device_arrays(
        host.shape,
        sharding,
        [jax.device_put(own(index), device, may_alias=shared) for device, index in devices],
    )


def _aligned(x: np.ndarray) -> np.ndarray:
    """Return a copy that begins where XLA can work with it as it is, without another copy."""
    memory = np.empty(x.nbytes + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    copy = memory[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def to_host(tree: Any) -> Any:
    """Return every leaf whole as a numpy array, on every process.

    All processes must call it, with the same tree.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
