"""How a split becomes batches: the choice between packing and buckets, made once per run."""

import logging

import numpy as np

from adapters_jax.config import Config
from adapters_jax.data import policies
from adapters_jax.model import Model

_LOG = logging.getLogger(__name__)
BATCHINGS = ('packed', 'buckets')


def check(config: Config, model: Model, devices: int) -> None:
    """Refuse batch sizes that cannot be cut as the config asks.

    Raises:
        ValueError: naming the value and what it must divide by.
    """
    training = config.training
    if config.data.batching not in BATCHINGS:
        raise ValueError(
            f'data.batching is {config.data.batching!r}; expected one of {", ".join(BATCHINGS)}'
        )
    for key in ('batch_size', 'accumulate'):
        if training[key] < 1:
            raise ValueError(f'training.{key} is {training[key]}; expected 1 or more')
    parts = devices * training.accumulate
    if _batching(config, model) == 'buckets' and training.batch_size % parts:
        raise ValueError(
            f'training.batch_size is {training.batch_size}, which does not divide over {devices} '
            f'devices x {training.accumulate} accumulation steps; choose a multiple of {parts}'
        )


def choose(
    config: Config, model: Model, lengths: np.ndarray, devices: int, training: bool
) -> policies.Policy:
    """Return how examples of these lengths are laid out in rows.

    Evaluation takes four times the training batch: it keeps no activations.
    """
    parts = devices * (config.training.accumulate if training else 1)
    size = config.training.batch_size * (1 if training else 4)
    if _batching(config, model) == 'packed':
        return policies.choose_packing(
            lengths, size, max_length=config.data.max_length, rows_multiple=parts
        )
    return policies.choose_buckets(lengths, -(-size // parts) * parts)


def _batching(config: Config, model: Model) -> str:
    if config.data.batching == 'packed' and not model.method.packable:
        _LOG.warning(
            'method %s cannot share a row between texts: batching by length buckets instead',
            model.method.architecture,
        )
        return 'buckets'
    return config.data.batching
