"""How a split becomes batches: the choice between packing and buckets, made once per run."""

import logging
from collections.abc import Sequence

import numpy as np

from adapters_jax import tasks
from adapters_jax.adapters.method import Method
from adapters_jax.config import Config
from adapters_jax.data import batches, policies
from adapters_jax.data.shares import Mixing
from adapters_jax.model import Model

_LOG = logging.getLogger(__name__)
TOKENS = 'input_ids'
BATCHINGS = ('packed', 'buckets')


def check(config: Config, method: Method, devices: int) -> None:
    """Refuse batch sizes that cannot be cut as the config asks; say so where nothing is packed.

    Raises:
        ValueError: naming the value and what it must divide by.
    """
    training = config.training
    if config.data.batching not in BATCHINGS:
        raise ValueError(
            f'data.batching is {config.data.batching!r}; expected one of {", ".join(BATCHINGS)}'
        )
    for key, least in (('batch_size', 1), ('accumulate', 0)):
        if training[key] < least:
            raise ValueError(f'training.{key} is {training[key]}; expected {least} or more')
    parts = devices * _parts(config)
    reads = tasks.kind(config.task.name).reads
    if not _packed(config, method, reads) and training.batch_size % parts:
        raise ValueError(
            f'training.batch_size is {training.batch_size}, which does not divide over {devices} '
            f'devices x {_parts(config)} accumulation steps; choose a multiple of {parts}'
        )
    if config.data.batching == 'packed' and reads == TOKENS and not method.packable:
        _LOG.warning(
            'method %s cannot share a row between texts: batching by length buckets instead',
            method.architecture,
        )


def choose(
    config: Config, model: Model, lengths: np.ndarray, devices: int, training: bool
) -> policies.Policy:
    """Return how examples of these lengths are laid out in rows.

    In training this does not depend on the number of devices, and so neither do the batches, nor
    the place in the data that a checkpoint remembers: `fill` makes the rows divide over them.
    Evaluation takes four times the training batch: it keeps no activations.
    """
    parts = _parts(config) if training else devices
    size = config.training.batch_size * (1 if training else 4)
    writes = model.config.decoder is not None and not training
    # A text is written for one row.
    if _packed(config, model.method, model.config.reads) and not writes:
        # Examples of several texts are longer than a text may be.
        longest = max(config.data.max_length, int(lengths.max(initial=1)))
        return policies.choose_packing(lengths, size, max_length=longest, rows_multiple=parts)
    size = -(-size // parts) * parts
    if model.config.reads != TOKENS and not model.config.decoder:  # as long as one another
        return policies.Buckets((int(lengths.max(initial=1)),), size)
    return policies.choose_buckets(lengths, size)


def choose_mixed(
    config: Config, method: Method, groups: Sequence[np.ndarray], mixing: Mixing, longest: int
) -> policies.Policy:
    """Return how training examples of several tasks are laid out, of which each row holds one.

    `groups` are the tasks' lengths, which are at most `longest`.
    """
    shares = mixing.average(np.array([len(lengths) for lengths in groups]))
    size, parts = config.training.batch_size, _parts(config)
    if _packed(config, method):
        return policies.choose_shared_packing(groups, shares, size, longest, parts)
    return policies.choose_shared_buckets(groups, shares, -(-size // parts) * parts)


def fill(batch: batches.Batch, rows: int, pad_id: int) -> batches.Batch:
    """Return the batch with empty rows at its end, so that it has `rows` of them."""
    missing = rows - len(next(iter(batch.values())))
    if not missing:
        return batch
    empty = {'input_ids': pad_id, 'example_id': -1, 'adapter': -1}

    def extended(name: str, column: np.ndarray) -> np.ndarray:
        widths = [(0, missing)] + [(0, 0)] * (column.ndim - 1)
        return np.pad(column, widths, constant_values=empty.get(name, 0))

    return {name: extended(name, column) for name, column in batch.items()}


def filled_rows(config: Config, rows: int, devices: int) -> int:
    """Return how many rows a training batch has on these devices; warn where many are empty."""
    parts = devices * _parts(config)
    filled = -(-rows // parts) * parts
    if filled > 1.1 * rows:
        _LOG.warning(
            'A batch has %d rows, of which %d devices x %d accumulation steps make %d, the others '
            'empty; a training.batch_size of %d would fill them.',
            *(rows, devices, _parts(config), filled),
            config.training.batch_size * filled // rows,
        )
    return filled


def _parts(config: Config) -> int:
    """Return what the rows of a device must divide by; a cut of our own choice goes by the rows."""
    return config.training.accumulate or 1


def _packed(config: Config, method: Method, reads: str = TOKENS) -> bool:
    """Whether examples share rows; those that are no tokens have one each."""
    return config.data.batching == 'packed' and method.packable and reads == TOKENS
