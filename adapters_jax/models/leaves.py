"""The leaves of modules, read without tracing how they would be drawn.

`Module.param` traces the initialiser at each use, to learn the shape that a leaf should have, which
takes about as long as tracing what is done with the leaf. Here the shape is told.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import errors
from jaxtyping import Array, Float, PRNGKeyArray

Shape = tuple[int, ...]
Draw = Callable[[PRNGKeyArray, Shape], Float[Array, '...']]
normal = nn.initializers.normal(0.02)
zeros, ones = nn.initializers.zeros, nn.initializers.ones


def leaf(module: nn.Module, name: str, draw: Draw, shape: Shape) -> Any:
    """Return the leaf `name` of a module; where the module is initialised it is drawn.

    Raises:
        ScopeParamShapeError: the leaf that is given has another shape.
        ScopeParamNotFoundError: none is given.
    """
    if not module.has_variable('params', name):
        return module.param(name, draw, shape)
    value = module.get_variable('params', name)
    (found, *_) = map(np.shape, jax.tree.leaves(value))  # of 8 bits: the numbers, then their scales
    if found != shape:
        raise errors.ScopeParamShapeError(name, '/'.join(module.path), found, shape)
    return value
