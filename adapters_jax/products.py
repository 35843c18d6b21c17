"""Matrix products whose gradients are computed in the order of factors that a CPU is quick at.

A gradient is a product with one factor transposed. Eigen, with which XLA multiplies on a CPU, reads
a transposed factor in an order that no cache likes, and the more so the larger it is; so the
smaller one is written down transposed. The numbers are those of differentiation, to rounding.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax import sharding, xla

_stop = jax.lax.stop_gradient


def product(x: Float[Array, '... I'], kernel: Float[Array, 'I O']) -> Float[Array, '... O']:
    """Return `x @ kernel`; the gradient for `x` is `input_gradient`."""
    return _with_input_gradient(_stop(x) @ kernel, x, _stop(kernel))


def trained_product(x: Float[Array, '... I'], kernel: Float[Array, 'I O']) -> Float[Array, '... O']:
    """Return `x @ kernel`; the gradient for the kernel, a narrow one, is `kernel_gradient`."""
    return _with_kernel_gradient(x @ _stop(kernel), _stop(x), kernel)


@jax.custom_vjp
def _with_input_gradient(y: Array, x: Array, kernel: Array) -> Array:
    return y


def _keep_kernel(y: Any, x: Any, kernel: Any) -> tuple[Array, Array | None]:
    """Keep the kernel where somebody asks for a gradient of `x`."""
    return y.value, kernel.value if x.perturbed else None


def _input_gradient(kernel: Array | None, gradient: Array) -> tuple[Array, Array | None, None]:
    if kernel is None:
        return gradient, None, None
    # Devices with parts of a kernel would each have to be sent all of it a second time.
    alone = sharding.devices_of(gradient) == 1
    return gradient, (input_gradient if alone else _against_rows)(gradient, kernel), None


_with_input_gradient.defvjp(_keep_kernel, _input_gradient, symbolic_zeros=True)


@jax.custom_vjp
def _with_kernel_gradient(y: Array, x: Array, kernel: Array) -> Array:
    return y


_with_kernel_gradient.defvjp(
    lambda y, x, kernel: (y, x), lambda x, gradient: (gradient, None, kernel_gradient(x, gradient))
)


@jax.custom_batching.custom_vmap
def input_gradient(
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


@input_gradient.def_vmap
def _of_members(
    size: int, batched: tuple[bool, bool], gradient: Array, kernel: Array
) -> tuple[Array, bool]:
    if not batched[1]:
        return input_gradient(gradient, kernel), True
    axes = 0 if batched[0] else None, 0
    return jax.vmap(_against_rows, axes, axis_size=size)(gradient, kernel), True


def _against_rows(gradient: Array, kernel: Array) -> Array:
    """Return `gradient @ kernel.T` in one operation, as differentiation has it."""
    return jax.lax.dot_general(gradient, kernel, (((gradient.ndim - 1,), (1,)), ((), ())))


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
