"""Number formats: what a step computes in, and what frozen weights are stored in."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from adapters_jax import quantize
from adapters_jax.config import Config
from adapters_jax.model import Model
from adapters_jax.models.backbone import CHANNELS
from adapters_jax.params import Tree, flatten, partition

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
FROZEN_DTYPES = DTYPES | {'int8': jnp.int8}


def choose_dtype(config: Config) -> Any:
    """Return the number format of activations.

    Raises:
        ValueError: none of that name.
    """
    return DTYPES[one_of(config, 'dtype', DTYPES)]


def choose_frozen_dtype(config: Config) -> Any:
    """Return the number format of frozen weights.

    Raises:
        ValueError: none of that name.
    """
    return FROZEN_DTYPES[one_of(config, 'frozen_dtype', FROZEN_DTYPES)]


def one_of(config: Config, key: str, known: Iterable[str]) -> str:
    """Return the value of a key of `config.training`.

    Raises:
        ValueError: it is none of those known.
    """
    name = config.training[key]
    if name not in known:
        raise ValueError(f'training.{key} is {name!r}; expected one of {", ".join(known)}')
    return name


def check_frozen_matrices(model: Model, backbone: Tree) -> None:
    """Refuse 8 bits where there is nothing to be kept in them.

    Raises:
        ValueError: every matrix of the backbone is trained.
    """
    _, frozen = partition(jax.eval_shape(model.init, jax.random.key(0), backbone), model.rules)
    if not quantize.any_matrix(flatten(frozen), CHANNELS):
        raise ValueError(
            "training.frozen_dtype is 'int8', but the method trains every matrix of the backbone "
            "and none is left to be kept in 8 bits; set training.frozen_dtype='float32'"
        )
