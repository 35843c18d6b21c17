"""Where arrays live: the mesh of devices, and who holds what of a batch and of the parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor')


def make_mesh(data: int = -1) -> Mesh:
    """Return a mesh whose `data` axis spans that many devices (-1: all of them).

    Axes are Auto: Linen layers take no `out_sharding`, which Explicit axes would demand.

    Raises:
        ValueError: more devices asked for than there are.
    """
    available = jax.device_count()
    data = available if data == -1 else data
    if not 1 <= data <= available:
        raise ValueError(
            f'mesh.data is {data} but {available} devices are present; '
            f'expected -1 (all) or a number from 1 to {available}'
        )
    if data < available and jax.process_count() > 1:
        raise ValueError(
            f'mesh.data is {data} of {available} devices in {jax.process_count()} processes, which '
            'would leave some without work; set -1'
        )
    devices = jax.devices()[:data]
    return jax.make_mesh((data, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its rows are spread over the `data` axis."""
    return NamedSharding(mesh, P('data'))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Place this process's rows of a batch on its devices.

    Raises:
        ValueError: rows that do not divide over the devices.
    """
    rows, devices = len(next(iter(batch.values()))), mesh.shape['data']
    local = devices // jax.process_count()
    if rows % local:
        raise ValueError(
            f'a batch of {rows} rows does not divide over {local} devices; choose '
            f'training.batch_size so that it gives a multiple of {local} rows, or fewer devices '
            'through mesh.data'
        )
    sharding = by_rows(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Place a copy of every leaf on every device."""
    return jax.device_put(tree, replicated(mesh))
