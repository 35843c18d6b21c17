"""Exact evaluation: every example counts once, on any number of devices."""

from collections import deque
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from adapters_jax.data import pipeline
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.policies import Policy
from adapters_jax.params import Tree
from adapters_jax.sharding import put_batch

Forward = Callable[[Tree, Tree, Mapping[str, jax.Array]], jax.Array]
_IN_FLIGHT = 2  # batches that the device works on while the host prepares the next


def outputs(
    forward: Forward,
    trainable: Tree,
    frozen: Tree,
    encoded: Encoded,
    policy: Policy,
    pad_id: int,
    mesh: Mesh,
) -> Float[np.ndarray, 'N C']:
    """Return the outputs of every example of a split, in the split's order.

    Raises:
        RuntimeError: an example that no batch, or more than one, carried.
    """
    collected: dict[int, np.ndarray] = {}
    waiting: deque[tuple[Mapping[str, np.ndarray], jax.Array]] = deque()

    def collect() -> None:
        batch, result = waiting.popleft()
        mask = batch['example_mask']
        values = np.asarray(result)[mask]
        for example, row in zip(batch['example_id'][mask].tolist(), values, strict=True):
            if example in collected:
                raise RuntimeError(f'example {example} was evaluated twice')
            collected[example] = row

    for batch in pipeline.eval_batches(encoded, policy, pad_id):
        waiting.append((batch, forward(trainable, frozen, put_batch(batch, mesh))))
        if len(waiting) > _IN_FLIGHT:
            collect()
    while waiting:
        collect()
    if len(collected) != len(encoded):
        raise RuntimeError(f'{len(collected)} of {len(encoded)} examples were evaluated')
    return np.stack([collected[i] for i in range(len(encoded))])
