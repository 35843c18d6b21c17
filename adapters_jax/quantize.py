"""Frozen matrices in 8 bits: an integer for each weight, a float32 scale for each channel.

Nothing accumulates into a frozen weight, so it needs no more digits than a forward pass does.
Arrays and rounding are the library qwix's (symmetric, to the largest absolute value, after which
every weight is off by at most half a scale). Its matrix product is not used: for activations in
floating point it makes the whole matrix float32 before it multiplies, whatever their format, and
automatic differentiation would keep that until the backward pass.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from adapters_jax import products
from adapters_jax.lazy import Functions

if TYPE_CHECKING:
    from qwix import QArray as Quantized
else:
    Quantized = Any

qwix = Functions('qwix')  # which takes half a second, and few runs need

# Patterns of paths, and the axis of which every index is a channel: an output, or a word.
Channels = Sequence[tuple[str, int]]


def is_quantized(leaf: Any) -> bool:
    """Tell whether a leaf is kept in 8 bits."""
    return hasattr(leaf, 'qvalue')


def channel_axis(path: str, channels: Channels) -> int | None:
    """Return the axis of the channels of the matrix at `path`; None for what is no such matrix."""
    return next((axis for pattern, axis in channels if re.fullmatch(pattern, path)), None)


def any_matrix(paths: Iterable[str], channels: Channels) -> bool:
    """Tell whether one of the paths is that of a matrix."""
    return any(channel_axis(path, channels) is not None for path in paths)


def quantize(matrix: Float[Array, 'I O'], axis: int) -> Quantized:
    """Return a placed matrix in 8 bits; integers and scales lie where their floats did.

    A scale is found over the whole of its channel, however that is cut over devices.
    """
    return _quantizer(axis, _where(matrix.sharding, axis))(matrix)


@functools.cache
def _quantizer(axis: int, where: Quantized) -> Any:
    return jax.jit(functools.partial(to_int8, axis=axis), out_shardings=where)


def to_int8(matrix: Float[Array, 'I O'], axis: int) -> Quantized:
    """Return the matrix in 8 bits, with a scale for each index of `axis`."""
    return qwix.quantize(matrix, jnp.int8, channelwise_axes=(axis,))


def _where(whole: NamedSharding, axis: int) -> Quantized:
    """Return the shardings of a quantised matrix whose floats lie as `whole` says."""
    spec = P(*(name if i == axis else None for i, name in enumerate(whole.spec)))
    return qwix.QArray(whole, NamedSharding(whole.mesh, spec), qtype=jnp.int8)


def describe(matrix: Any, axis: int) -> tuple[Quantized, Quantized]:
    """Return the shapes and the shardings of what `quantize` would make of a described matrix."""
    shapes = jax.eval_shape(functools.partial(to_int8, axis=axis), matrix)
    return shapes, _where(matrix.sharding, axis)


def dequantize(matrix: Float[Array, 'I O'] | Quantized) -> Float[Array, 'I O']:
    """Return the matrix in floating point; one that is in it already stays as it is."""
    return qwix.dequantize(matrix) if is_quantized(matrix) else matrix


def product(
    x: Float[Array, '... I'], matrix: Float[Array, 'I O'] | Quantized
) -> Float[Array, '... O']:
    """Return `x @ matrix` in the type of `x`, for a matrix in any number format."""
    if not is_quantized(matrix) and matrix.dtype == x.dtype == jnp.float32:
        return products.product(x, matrix)
    return _converted_product(x, matrix)


# What the backward pass needs of a matrix is made of the stored numbers there again. Without this
# the copy in the activations' format, made for the forward pass, would be kept for all layers. (A
# CPU makes one of bfloat16, too: it multiplies in float32; and its compiler may yet find that both
# passes make the same copy.)
@jax.checkpoint
def _converted_product(
    x: Float[Array, '... I'], matrix: Float[Array, 'I O'] | Quantized
) -> Float[Array, '... O']:
    if not is_quantized(matrix):
        return products.product(x, matrix.astype(x.dtype))
    # Integers up to 127 are exact in bfloat16, too; scales are not.
    y = products.product(x, matrix.qvalue.astype(x.dtype))
    scale = matrix.scale.reshape((1,) * (y.ndim - 1) + (-1,))
    return (y.astype(jnp.float32) * scale).astype(x.dtype)


def against_rows(
    x: Float[Array, '... D'], table: Float[Array, 'V D'] | Quantized
) -> Float[Array, '... V']:
    """Return the product of `x` with every row of a table, in float32."""
    if not is_quantized(table) and table.dtype == x.dtype:
        return jnp.einsum('...D,VD->...V', x, table, preferred_element_type=jnp.float32)
    return _converted_against_rows(x, table)


@jax.checkpoint
def _converted_against_rows(
    x: Float[Array, '... D'], table: Float[Array, 'V D'] | Quantized
) -> Float[Array, '... V']:
    if not is_quantized(table):
        return against_rows(x, table.astype(x.dtype))
    y = against_rows(x, table.qvalue.astype(x.dtype))
    return y * table.scale.reshape((1,) * (y.ndim - 1) + (-1,))


def rows(table: Float[Array, 'V D'] | Quantized, ids: Int[Array, '...']) -> Float[Array, '... D']:
    """Return rows of a table in float32."""
    if not is_quantized(table):
        return jnp.take(table, ids, axis=0).astype(jnp.float32)
    return rows(table.qvalue, ids) * rows(table.scale, ids)
