"""The small parts that adapters are made of: dense layers and LayerNorms as plain dicts of arrays.

A method's site functions must be pure in plain trees, so they cannot use modules; this is the
little that they need instead.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.params import Tree

KernelInit = Callable[[PRNGKeyArray, tuple[int, ...]], Array]

_EPSILON = 1e-5  # of torch's LayerNorm, which published adapters were trained with


def normal(sigma: float) -> KernelInit:
    """Return the initialiser N(0, sigma²)."""
    return initializers.normal(sigma)


def truncated_normal(sigma: float) -> KernelInit:
    """Return N(0, sigma²) cut at two sigma, without widening it to make up for the cut."""
    return initializers.truncated_normal(sigma, lower=-2.0, upper=2.0)


def uniform_by_inputs(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, 'I O']:
    """Draw from U(-1/sqrt(I), 1/sqrt(I)): Kaiming uniform with slope sqrt(5) (He et al. 2015)."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def normal_by_inputs(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, 'I O']:
    """Draw from N(0, 1/I), which keeps the variance of what passes through."""
    return jax.random.normal(key, shape) * shape[0] ** -0.5


zeros: KernelInit = initializers.zeros


def dense(key: PRNGKeyArray, kernel: KernelInit, inputs: int, outputs: int) -> Tree:
    """Return the parameters of a dense layer, its bias zero."""
    return {'kernel': kernel(key, (inputs, outputs)), 'bias': jnp.zeros(outputs)}


def norm(features: int) -> Tree:
    """Return the parameters of a LayerNorm: the identity but for the normalisation."""
    return {'scale': jnp.ones(features), 'bias': jnp.zeros(features)}


def apply_dense(params: Tree, x: Float[Array, '... I']) -> Float[Array, '... O']:
    """Apply a dense layer in the type of `x`."""
    return functional.trained_dense(x, params['kernel'], params.get('bias'))


def apply_norm(params: Tree, x: Float[Array, '... D']) -> Float[Array, '... D']:
    """Apply a LayerNorm with torch's epsilon."""
    return functional.layer_norm(x, params['scale'], params['bias'], _EPSILON)
