"""Exact evaluation: every example counts once, on any number of devices."""

import functools
from collections import deque
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from adapters_jax.data import pipeline
from adapters_jax.data.batches import Batch
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.policies import Policy
from adapters_jax.params import Tree
from adapters_jax.sharding import own_rows, put_batch, replicated

Forward = Callable[[Tree, Tree, Mapping[str, jax.Array]], jax.Array]
_IN_FLIGHT = 2  # batches that the device works on while the host prepares the next


@functools.lru_cache(maxsize=8)
def _gather(mesh: Mesh) -> Callable[..., tuple[jax.Array, ...]]:
    """Return what brings arrays to all devices, compiled once for all evaluations of a run."""
    return jax.jit(lambda *arrays: arrays, out_shardings=replicated(mesh))


def outputs(
    forward: Forward,
    trainable: Tree,
    frozen: Tree,
    encoded: Encoded,
    policy: Policy,
    pad_id: int,
    mesh: Mesh,
    per_token: bool = False,
    transform: Callable[[Batch], Batch] | None = None,
) -> Float[np.ndarray, 'N W']:
    """Return the outputs of every example of a split, in the split's order.

    With `per_token` the outputs of `forward` are [B, T, ...], and those of the examples' tokens
    are returned end to end, as the columns `tokens` of the split are. `transform` is what is done
    to a batch before the model sees it.

    Raises:
        RuntimeError: an example that no batch, or more than one, carried.
    """
    collected: dict[int, np.ndarray] = {}
    waiting: deque[tuple[jax.Array, ...]] = deque()
    # Every process sees the outputs of all rows, so all find the same scores.
    gather = _gather(mesh)
    alone = jax.process_count() == 1  # its devices need not meet (`sharding.read_by_all`)

    def collect() -> None:
        values, examples, mask, starts = (np.asarray(array) for array in waiting.popleft())
        rows, slots = np.nonzero(mask)
        for row, slot, example in zip(rows, slots, examples[mask].tolist(), strict=True):
            if example in collected:
                raise RuntimeError(f'example {example} was evaluated twice')
            if per_token:
                start = starts[row, slot]
                collected[example] = values[row, start : start + encoded.lengths[example]]
            else:
                collected[example] = values[row, slot]

    rows = own_rows(mesh, pipeline.rows_of(policy))
    for batch in pipeline.eval_batches(encoded, policy, pad_id, rows=rows, transform=transform):
        placed = put_batch(batch, mesh)
        found = forward(trainable, frozen, placed)
        known = (placed[name] for name in ('example_id', 'example_mask', 'starts'))
        waiting.append((found, *known) if alone else gather(found, *known))
        if len(waiting) > _IN_FLIGHT:
            collect()
    while waiting:
        collect()
    if len(collected) != len(encoded):
        raise RuntimeError(f'{len(collected)} of {len(encoded)} examples were evaluated')
    in_order = [collected[i] for i in range(len(encoded))]
    return np.concatenate(in_order) if per_token else np.stack(in_order)
