"""Attention on an NVIDIA GPU as one kernel a direction: the weights never leave the chip.

Written out (`attention.py`), a layer writes and reads `B H T S` numbers some twenty times, and
turns heads and tokens over besides, for which a GPU takes longer than for the products themselves.
Here a program of the GPU has one head of one row and a block of its queries or keys; it goes over
the blocks of the other side and keeps a running softmax (Dao et al. 2022, algorithms 1 and 4).
Dropout takes the bits that `functional.kept` gives each entry, so that nothing but rounding differs
from what is written out.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, UInt32

from adapters_jax import functional

BLOCK = 64  # queries, or keys, that are worked on at a time
SHORT = (16, 32)  # numbers of tokens that are less than a block, and no less than a product takes
WIDTHS = (16, 32, 64, 128)  # of a head
WHOLE = 128  # so many keys have their gradients, and those of all queries, found by one program
# Of queries, where one program finds all gradients: it has few registers left.
FEW = 16
WARPS = 4
_LEAST = float(np.finfo(np.float32).min)

Queries = Float[Array, 'B T H K']
Keys = Float[Array, 'B S H K']
Mask = Bool[Array, '#B 1 #T S'] | None
Words = UInt32[Array, '2'] | None


def suits(query: Queries, key: Keys) -> bool:
    """Tell whether there are kernels for these shapes, where the arrays lie.

    Tokens must come in whole blocks, and all of them be on one device: XLA cannot cut a kernel.
    """
    lengths = query.shape[1], key.shape[1]
    whole = all(length % BLOCK == 0 or length in SHORT for length in lengths)
    return whole and query.shape[3] in WIDTHS and jax.typeof(query).sharding.mesh.size <= 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6))
def mix(
    rate: float,
    query: Queries,
    key: Keys,
    value: Keys,
    mask: Mask,
    words: Words,
    interpret: bool = False,
) -> Queries:
    """Return what `attention.attend` does, for shapes that `suits` accepts.

    Weights are dropped at `rate` where there are the `words` of a key. With `interpret`, the
    kernels run on any device, slowly.
    """
    return _forward(rate, query, key, value, mask, words, interpret)[0]


def _forward(rate, query, key, value, mask, words, interpret):
    given = {'queries': [query], 'keys': [key, value], 'rows': []}
    outputs = [('queries', value.dtype), ('rows', jnp.float32), ('rows', jnp.float32)]
    run = functools.partial(_run, given=given, mask=mask, words=words, rate=rate)
    # Of each row of scores also the largest, and the sum of exponentials relative to it.
    mixed, largest, total = run('mix', 'queries', BLOCK, outputs=outputs, interpret=interpret)
    return mixed, (query, key, value, mask, words, mixed, largest, total)


def _backward(rate, interpret, saved, gradient):
    query, key, value, mask, words, mixed, largest, total = saved
    given = {'queries': [query, mixed, gradient], 'keys': [key, value], 'rows': [largest, total]}
    run = functools.partial(
        _run, given=given, mask=mask, words=words, rate=rate, interpret=interpret
    )
    of_queries, of_keys = [('queries', query.dtype)], [('keys', key.dtype), ('keys', value.dtype)]
    if key.shape[1] <= WHOLE:
        gradients = run('of_all', 'keys', WHOLE, outputs=of_keys + of_queries)
    else:
        gradients = (
            *run('of_keys', 'keys', BLOCK, outputs=of_keys),
            *run('of_queries', 'queries', BLOCK, outputs=of_queries),
        )
    of_key, of_value, of_query = gradients
    return of_query, of_key, of_value, None, None


mix.defvjp(_forward, _backward)


def _run(
    name: str,
    along: str,
    block: int,
    *,
    given: dict[str, list[Array]],
    mask: Mask,
    words: Words,
    outputs: Sequence[tuple[str, Any]],
    rate: float,
    interpret: bool,
) -> Sequence[Array]:
    """Run a kernel for each head of each row and each block `along` its 'queries' or 'keys'.

    A kernel gets what is `given`, the mask and the words, and after them its outputs: a block of
    those along which it runs, and all of the others.
    """
    query, key = given['queries'][0], given['keys'][0]
    (B, T, H, K), S = query.shape, key.shape[1]
    length = T if along == 'queries' else S
    block = min(length, block)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (B, 1, T, S)).astype(jnp.int8)
        mask = mask if along == 'queries' else mask.swapaxes(2, 3)
    part = pl.BlockSpec((None, block, None, K), lambda b, h, i: (b, i, h, 0))
    whole = {
        'queries': pl.BlockSpec((None, T, None, K), lambda b, h, i: (b, 0, h, 0)),
        'keys': pl.BlockSpec((None, S, None, K), lambda b, h, i: (b, 0, h, 0)),
        'rows': pl.BlockSpec((None, None, T), lambda b, h, i: (b, h, 0)),
    }
    if along == 'queries':
        row = pl.BlockSpec((None, None, block), lambda b, h, i: (b, h, i))
        specs = whole | {'queries': part, 'rows': row}
    else:
        specs = whole | {'keys': part}
    other = S if along == 'queries' else T
    seen = pl.BlockSpec((None, None, block, other), lambda b, h, i: (b, 0, i, 0))
    shapes = {'queries': (B, T, H, K), 'keys': (B, S, H, K), 'rows': (B, H, T)}
    tile = _Tile(H, T, S, K**-0.5, 0.0 if words is None else rate)
    return pl.pallas_call(
        functools.partial(_KERNELS[name], tile),
        grid=(B, H, length // block),
        in_specs=[
            *(specs[kind] for kind, arrays in given.items() for _ in arrays),
            None if mask is None else seen,
            None if words is None else pl.BlockSpec((2,), lambda b, h, i: (0,)),
        ],
        out_specs=[specs[kind] for kind, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in outputs],
        name=f'attention_{name}',
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
    )(*(array for arrays in given.values() for array in arrays), mask, words)


class _Tile(NamedTuple):
    """What is the same for all tiles of weights, which have queries before keys.

    A `turned` tile has keys before queries, so that weights need not be turned over for the
    gradients of keys. Scores are in powers of 2, and what can be done to a row or to a sum is not
    done to each weight: on these a program spends its time.
    """

    H: int
    T: int
    S: int
    scale: float
    rate: float

    def first_row(self) -> Array:
        """Return the number of the head's first row of weights, among those of all heads."""
        return (pl.program_id(0) * self.H + pl.program_id(1)) * self.T

    def products(self, query, key, mask) -> Array:
        """Return the products, which are not scaled; the least number where nothing is seen."""
        products = _product(query, key, 1, 1)
        return products if mask is None else jnp.where(mask, products, _LEAST)

    def exponential(self, below) -> Array:
        """Return the exponential of a difference of scaled products."""
        return jnp.exp2((self.scale * math.log2(math.e)) * below)

    def keep(self, words_ref, row, column, shape, turned=False) -> Array | None:
        """Return which weights of a tile stay, by the numbers of its first row and column."""
        if words_ref is None:
            return None
        rows, columns = shape[::-1] if turned else shape
        row = (row + jnp.arange(rows)).astype(jnp.uint32) * np.uint32(self.S)
        column = (column + jnp.arange(columns)).astype(jnp.uint32)
        seeds = functional.seeds(row, words_ref[0]), functional.seeds(column)
        seeds = [x[None] if (axis == 0) == turned else x[:, None] for axis, x in enumerate(seeds)]
        return functional.kept_of(seeds[0] + seeds[1], words_ref[1], self.rate)

    def dropped(self, x, keep) -> Array:
        """Return the weights, or their gradients, after dropout."""
        return x if keep is None else functional.scaled_up(x, keep, self.rate)

    def of_products(self, weights, of_weights, mean, mask) -> Array:
        """Return the gradients of the scaled products (Dao et al. 2022, appendix B.2, eq. 4)."""
        gradient = weights * (of_weights - mean)
        return gradient if mask is None else jnp.where(mask, gradient, 0.0)


def _mix_kernel(
    tile, query_ref, key_ref, value_ref, mask_ref, words_ref, mixed_ref, largest_ref, total_ref
):
    query = query_ref[...]
    size, block = query.shape[0], min(BLOCK, tile.S)
    row = tile.first_row() + pl.program_id(2) * size

    def over(i, carry):
        largest, total, mixed = carry
        own = pl.ds(i * block, block)
        value = value_ref[own]
        products = tile.products(query, key_ref[own], _seen(mask_ref, own))
        above = jnp.maximum(largest, products.max(axis=1))
        weights = tile.exponential(products - above[:, None])
        shrunk = tile.exponential(largest - above)
        total = shrunk * total + weights.sum(axis=1)
        weights = tile.dropped(weights, tile.keep(words_ref, row, i * block, weights.shape))
        mixed = shrunk[:, None] * mixed + _product(weights.astype(value.dtype), value, 1, 0)
        return above, total, mixed

    start = jnp.full(size, -jnp.inf), jnp.zeros(size), jnp.zeros(query.shape, jnp.float32)
    largest, total, mixed = jax.lax.fori_loop(0, tile.S // block, over, start)
    mixed_ref[...] = (mixed / total[:, None]).astype(mixed_ref.dtype)
    largest_ref[...], total_ref[...] = largest, total


def _queries_kernel(
    tile, query_ref, mixed_ref, gradient_ref, key_ref, value_ref, largest_ref, total_ref,
    mask_ref, words_ref, of_query_ref,
):  # fmt: skip
    query, gradient = query_ref[...], gradient_ref[...]
    mean = _mean(gradient, mixed_ref[...])[:, None]
    largest, share = largest_ref[...][:, None], (1 / total_ref[...])[:, None]
    size, block = query.shape[0], min(BLOCK, tile.S)
    row = tile.first_row() + pl.program_id(2) * size

    def over(i, of_query):
        own = pl.ds(i * block, block)
        key, mask = key_ref[own], _seen(mask_ref, own)
        weights = share * tile.exponential(tile.products(query, key, mask) - largest)
        keep = tile.keep(words_ref, row, i * block, weights.shape)
        of_weights = tile.dropped(_product(gradient, value_ref[own], 1, 1), keep)
        of_products = tile.of_products(weights, of_weights, mean, mask).astype(key.dtype)
        return of_query + _product(of_products, key, 1, 0)

    start = jnp.zeros(query.shape, jnp.float32)
    of_query = jax.lax.fori_loop(0, tile.S // block, over, start)
    of_query_ref[...] = (tile.scale * of_query).astype(of_query_ref.dtype)


def _keys_kernel(
    tile, query_ref, mixed_ref, gradient_ref, key_ref, value_ref, largest_ref, total_ref,
    mask_ref, words_ref, of_key_ref, of_value_ref, of_query_ref=None,
):  # fmt: skip
    """Find the gradients of keys and values, and those of queries if there is no other block."""
    key, value = key_ref[...], value_ref[...]
    size, block = key.shape[0], min(BLOCK if of_query_ref is None else FEW, tile.T)
    first, column = tile.first_row(), pl.program_id(2) * size

    def over(i, carry):
        of_key, of_value = carry
        own = pl.ds(i * block, block)
        query, gradient, mask = query_ref[own], gradient_ref[own], _seen(mask_ref, own)
        mean = _mean(gradient, mixed_ref[own])[None]
        largest, share = largest_ref[own][None], (1 / total_ref[own])[None]
        weights = share * tile.exponential(tile.products(key, query, mask) - largest)
        keep = tile.keep(words_ref, first + i * block, column, weights.shape, turned=True)
        of_weights = tile.dropped(_product(value, gradient, 1, 1), keep)
        of_products = tile.of_products(weights, of_weights, mean, mask).astype(query.dtype)
        if of_query_ref is not None:
            of_query = tile.scale * _product(of_products, key, 0, 0)
            of_query_ref[own] = of_query.astype(of_query_ref.dtype)
        weights = tile.dropped(weights, keep).astype(gradient.dtype)
        of_value += _product(weights, gradient, 1, 0)
        return of_key + _product(of_products, query, 1, 0), of_value

    zeros = jnp.zeros(key.shape, jnp.float32)
    of_key, of_value = jax.lax.fori_loop(0, tile.T // block, over, (zeros, zeros))
    of_key_ref[...] = (tile.scale * of_key).astype(of_key_ref.dtype)
    of_value_ref[...] = of_value.astype(of_value_ref.dtype)


_KERNELS: dict[str, Callable[..., None]] = {
    'mix': _mix_kernel,
    'of_all': _keys_kernel,
    'of_queries': _queries_kernel,
    'of_keys': _keys_kernel,
}


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Return the product over these axes, summed in float32."""
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _seen(mask_ref: Any, own: Any) -> Array | None:
    return None if mask_ref is None else mask_ref[:, own].astype(jnp.int32) != 0


def _mean(gradient: Array, mixed: Array) -> Array:
    """Return the mean of each row's gradients of weights, under these weights."""
    return jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=1)
