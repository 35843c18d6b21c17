"""How a split becomes batches: packing or buckets, and in how many parts, chosen once per run."""

import logging
from collections.abc import Sequence

import numpy as np

from adapters_jax import tasks
from adapters_jax.adapters.method import Method
from adapters_jax.config import Config
from adapters_jax.data import batches, pipeline, policies
from adapters_jax.data.shares import Mixing
from adapters_jax.model import Model
from adapters_jax.tasks.task import Task
from adapters_jax.training import cutting

_LOG = logging.getLogger(__name__)
TOKENS = 'input_ids'
BATCHINGS = ('packed', 'buckets')
_SHORT = 8  # tokens of the shortest rows for a few examples


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
    parts = devices * _asked(config)
    reads = tasks.kind(config.task.name).reads
    if not _packed(config, method, reads) and training.batch_size % parts:
        raise ValueError(
            f'training.batch_size is {training.batch_size}, which does not divide over {devices} '
            f'devices x {_asked(config)} accumulation steps; choose a multiple of {parts}'
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
    parts = _asked(config) if training else devices
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


def choose_forward(
    config: Config, model: Model, lengths: np.ndarray, devices: int, few: bool
) -> policies.Policy:
    """Return how examples are laid out to be passed forward.

    As `choose` has it, or, with `few`, whatever their lengths in one of few shapes: rows and
    lengths are powers of two, or what there is at most of them. More examples than a batch holds
    are many.
    """
    most = config.training.batch_size * 4
    if not few or len(lengths) > most:
        return choose(config, model, lengths, devices, training=False)
    rows, longest = min(_power(len(lengths)), most), int(lengths.max(initial=1))
    if model.config.reads == TOKENS:
        longest = max(longest, min(_power(longest, _SHORT), config.data.max_length))
    return policies.Buckets((longest,), -(-rows // devices) * devices)


def _power(count: int, least: int = 1) -> int:
    """Return the power of two that is `count` or the next one above it, and `least` or more."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def choose_mixed(
    config: Config, method: Method, groups: Sequence[np.ndarray], mixing: Mixing, longest: int
) -> policies.Policy:
    """Return how training examples of several tasks are laid out, of which each row holds one.

    `groups` are the tasks' lengths, which are at most `longest`.
    """
    shares = mixing.average(np.array([len(lengths) for lengths in groups]))
    size, parts = config.training.batch_size, _asked(config)
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


def choose_parts(config: Config, model: Model, task: Task, policy: policies.Policy) -> int:
    """Return how many parts a training batch is cut into: as the config says, or as is best here.

    Like the batches this does not depend on the number of devices, and so neither does what dropout
    draws.
    """
    if config.training.accumulate:
        return config.training.accumulate
    packed = isinstance(policy, policies.Packed)
    length = policy.row_length if packed else policy.lengths[0]  # the shortest of the buckets
    read = {TOKENS: length, 'pixels': model.config.positions, 'sound': getattr(task, 'frames', 0)}
    written = length if model.config.decoder is not None else 0
    # Whisper's encoder takes two frames to a vector (Radford et al. 2023, section 2.2).
    tokens = read[model.config.reads] // (2 if model.config.reads == 'sound' else 1) + written
    return cutting.quick_parts(pipeline.rows_of(policy), tokens)


def filled_rows(config: Config, rows: int, devices: int, parts: int) -> int:
    """Return how many rows a training batch has on these devices; warn where many are empty."""
    multiple = devices * parts
    filled = -(-rows // multiple) * multiple
    if filled > 1.1 * rows:
        _LOG.warning(
            'A batch of %d rows does not divide over %d devices x %d accumulation steps, and is '
            'filled up to %d with empty rows; a training.batch_size of %d would use them.',
            *(rows, devices, parts, filled),
            config.training.batch_size * filled // rows,
        )
    return filled


def _asked(config: Config) -> int:
    """Return the parts that rows must divide into; those of our own choice go by the rows."""
    return config.training.accumulate or 1


def _packed(config: Config, method: Method, reads: str = TOKENS) -> bool:
    """Whether examples share rows; those that are no tokens have one each."""
    return config.data.batching == 'packed' and method.packable and reads == TOKENS
