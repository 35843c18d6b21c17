"""Training batches in parts, one after another: less memory, and on a CPU less time.

A part's activations take the memory of those of the part before, and fewer of them have left the
processor's cache when the backward pass reads them. Measured by `python -m
experiments.bench.parts`; forward passes, which keep nothing, gain nothing that could be measured.
"""

import contextlib
from collections.abc import Iterator

import jax

from adapters_jax.model import Batch, Model

# Tokens that a part has at least. It is a constant, and no matter of the machine's cores or caches,
# because dropout draws by parts, and processes of one run must agree.
TOKENS = 1024
_fixed = 0


def automatic(model: Model, batch: Batch) -> int:
    """Return how many parts are best for a batch's rows here: on anything but a CPU, 1.

    Parts have equally many rows, also on each device, and `TOKENS` tokens or more. A batch whose
    columns are not of rows is one part.
    """
    if _fixed:
        return _fixed
    rows = {len(column) for column in batch.values()}
    if jax.default_backend() != 'cpu' or len(rows) > 1 or model.method.divides:
        return 1
    given, devices = rows.pop(), jax.device_count()
    most = given * _row_tokens(model, batch) // TOKENS
    return next((n for n in range(most, 1, -1) if given % (n * devices) == 0), 1)


@contextlib.contextmanager
def fixed(parts: int) -> Iterator[None]:
    """Let `automatic` say so many: 1 for programs that are traced here and run elsewhere."""
    global _fixed
    before, _fixed = _fixed, parts
    try:
        yield
    finally:
        _fixed = before


def cut(batch: Batch, parts: int) -> Batch:
    """Return the columns with an axis of parts before that of rows.

    Part i has every `parts`-th row from row i on, so that it has rows of every device.

    Raises:
        ValueError: rows that do not divide into that many parts.
    """
    rows = len(next(iter(batch.values())))
    if rows % parts:
        raise ValueError(
            f'a batch of {rows} rows does not divide into {parts} parts; choose '
            'training.accumulate so that it divides the rows of every batch'
        )
    return {
        name: column.reshape(-1, parts, *column.shape[1:]).swapaxes(0, 1)
        for name, column in batch.items()
    }


def _row_tokens(model: Model, batch: Batch) -> int:
    """Return how many tokens of a row the backbone reads and writes."""
    read = batch['input_ids'].shape[1] if 'input_ids' in batch else model.config.positions
    return read + (batch['target_ids'].shape[1] if 'target_ids' in batch else 0)
