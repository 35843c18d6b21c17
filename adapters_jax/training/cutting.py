"""A batch in parts, one after another: on a CPU less memory, and in training less time.

A part's activations take the memory of those of the part before, and fewer of them have left the
processor's cache when they are read again. Measured by `python -m experiments.bench.parts`.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
from jaxtyping import Array, Float

from adapters_jax import sharding
from adapters_jax.model import Batch, Model, inputs_of

# Tokens that a part of a batch has at least. It is a constant, and no matter of the machine's cores
# and caches, because dropout draws by parts.
PART = 1024
_ASKED = contextvars.ContextVar('asked', default=0)


@contextlib.contextmanager
def into(parts: int) -> Iterator[None]:
    """Trace forward passes in so many parts: 1, the whole batch, as other platforms have it."""
    token = _ASKED.set(parts)
    try:
        yield
    finally:
        _ASKED.reset(token)


def quick_parts(rows: int, tokens: int, devices: int = 1) -> int:
    """Return how many parts a batch is best cut into here: 1, except on a CPU.

    Parts have equally many rows on each device, of `tokens` tokens each, and `PART` tokens or more.
    """
    most = rows * tokens // PART if jax.default_backend() == 'cpu' else 1
    return next((n for n in range(most, 1, -1) if rows % (n * devices) == 0), 1)


def cut(batch: Batch, parts: int) -> Batch:
    """Return the columns as [parts, rows of a part, ...].

    Part i takes every `parts`-th row from row i on, so it has rows of every device.
    """
    return {
        name: column.reshape(-1, parts, *column.shape[1:]).swapaxes(0, 1)
        for name, column in batch.items()
    }


def forward(
    function: Callable[[Batch], Float[Array, 'B ...']], model: Model, batch: Batch
) -> Float[Array, 'B ...']:
    """Return `function(batch)`, which makes of each row something by itself, part after part.

    The batch stays whole where an adapter counts its rows.
    """
    rows = len(inputs_of(batch))
    alike = all(len(column) == rows for column in batch.values())  # a bank may tell of groups
    if not alike or model.method.divides:
        return function(batch)
    devices = sharding.devices_of(inputs_of(batch))
    parts = _ASKED.get() or quick_parts(rows, _tokens(model, batch), devices)
    if parts == 1:
        return function(batch)
    found = jax.lax.map(function, cut(batch, parts))
    return found.swapaxes(0, 1).reshape(rows, *found.shape[2:])


def _tokens(model: Model, batch: Batch) -> int:
    """Return how many vectors the backbone computes of a row, read and written."""
    written = batch['target_ids'].shape[1] if 'target_ids' in batch else 0
    if model.config.reads == 'pixels':
        return model.config.positions + written
    # Whisper's encoder takes two frames to a vector (Radford et al. 2023, section 2.2).
    return inputs_of(batch).shape[-1] // (2 if model.config.reads == 'sound' else 1) + written
