"""Matrix products whose gradients are computed in the order of factors that a CPU is quick at.

A gradient is a product with one factor transposed. Eigen, with which XLA multiplies on a CPU, reads
a transposed factor in an order that no cache likes, and the more so the larger it is; so the
smaller one is written down transposed. The numbers are those of differentiation, to rounding; so
are those of higher derivatives.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax import sharding, xla


@jax.custom_vjp
def product(x: Float[Array, '... I'], kernel: Float[Array, 'I O']) -> Float[Array, '... O']:
    """Return `x @ kernel`; the gradient for `x` is `input_gradient`."""
    return x @ kernel


@jax.custom_vjp
def trained_product(x: Float[Array, '... I'], kernel: Float[Array, 'I O']) -> Float[Array, '... O']:
    """Return `x @ kernel`; the gradient for the kernel, a narrow one, is `kernel_gradient`."""
    return x @ kernel


def _keep(x: Any, kernel: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    """Return the product, and each factor where somebody asks for a gradient of the other."""
    kept = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return x.value @ kernel.value, kept


def _gradients(kept: tuple[Array | None, Array | None], gradient: Array) -> Any:
    x, kernel = kept
    of_x = None if kernel is None else _smaller_turned(gradient, kernel)
    return of_x, None if x is None else _against_columns(x, gradient)


def _trained_gradients(kept: tuple[Array | None, Array | None], gradient: Array) -> Any:
    x, kernel = kept
    of_x = None if kernel is None else _against_rows(gradient, kernel)
    return of_x, None if x is None else kernel_gradient(x, gradient)


product.defvjp(_keep, _gradients, symbolic_zeros=True)
trained_product.defvjp(_keep, _trained_gradients, symbolic_zeros=True)


def _smaller_turned(gradient: Float[Array, '... O'], kernel: Float[Array, 'I O']) -> Array:
    # Devices with parts of a kernel would each have to be sent all of it a second time.
    alone = sharding.devices_of(gradient) == 1
    return (input_gradient if alone else _against_rows)(gradient, kernel)


@jax.custom_vjp
def input_gradient(
    gradient: Float[Array, '... O'], kernel: Float[Array, 'I O']
) -> Float[Array, '... I']:
    """Return `gradient @ kernel.T`, which may be differentiated itself; see `_turned_over`."""
    return _turned_over(gradient, kernel)


input_gradient.defvjp(
    # By its own name: derivatives of a higher order differentiate this rule, too.
    lambda gradient, kernel: (input_gradient(gradient, kernel), (gradient, kernel)),
    lambda kept, second: (second @ kept[1], _against_columns(second, kept[0])),
)


@jax.custom_batching.custom_vmap
def _turned_over(
    gradient: Float[Array, '... O'], kernel: Float[Array, 'I O']
) -> Float[Array, '... I']:
    """Return `gradient @ kernel.T`; on a CPU the kernel is written down transposed, or all else is.

    With 512 rows and a kernel of 4096 x 1024 that is nearly twice as fast, and worth it up to as
    many rows as the kernel's longer side has (`python -m experiments.bench.products`). Members of
    a population over one kernel are more rows.
    """
    rows, (inputs, outputs) = math.prod(gradient.shape[:-1]), kernel.shape
    few = rows <= max(inputs, outputs) and gradient.dtype == jnp.float32
    if jax.default_backend() != 'cpu' or not few:
        return _against_rows(gradient, kernel)
    if rows * (inputs + outputs) > inputs * outputs:
        return gradient @ xla.apart(kernel.T)
    columns = xla.apart(gradient.reshape(rows, outputs).T)
    return xla.apart(kernel @ columns).T.reshape(*gradient.shape[:-1], inputs)


@_turned_over.def_vmap
def _of_members(
    size: int, batched: tuple[bool, bool], gradient: Array, kernel: Array
) -> tuple[Array, bool]:
    if not batched[1]:
        return _turned_over(gradient, kernel), True
    axes = 0 if batched[0] else None, 0
    return jax.vmap(_against_rows, axes, axis_size=size)(gradient, kernel), True


def _against_rows(gradient: Array, kernel: Array) -> Array:
    """Return `gradient @ kernel.T` in one operation, as differentiation has it."""
    return jax.lax.dot_general(gradient, kernel, (((gradient.ndim - 1,), (1,)), ((), ())))


def _against_columns(x: Array, gradient: Array) -> Array:
    """Return the product of `x`, transposed, and `gradient`, as differentiation has it."""
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(gradient, x, ((rows, rows), ((), ()))).T


def kernel_gradient(
    x: Float[Array, '... I'], gradient: Float[Array, '... O']
) -> Float[Array, 'I O']:
    """Return the product of `x`, transposed, and `gradient`; the narrower one is turned over.

    XLA's CPU compiler writes the first factor down transposed, and computes it again for that: for
    `double_seq_bn` over MiniLM this was half of a training step. An adapter's narrow side is a
    tenth of its wide one.
    """
    rows = tuple(range(x.ndim - 1))

    def summed(left: Array, right: Array) -> Array:
        return jax.lax.dot_general(left, right, ((rows, rows), ((), ())))

    if gradient.shape[-1] < x.shape[-1]:
        return xla.apart(summed(gradient, x)).T
    return summed(x, gradient)
