"""Attention on an NVIDIA GPU as one kernel a direction: the weights never leave the chip.

Written out (`attention.py`), a layer writes and reads `B H T S` numbers some twenty times, and
turns heads and tokens over besides, for which a GPU takes longer than for the products themselves.
Here a program of the GPU has one head of one row and a block of its queries or keys; it goes over
the blocks of the other side and keeps a running softmax (Dao et al. 2022, algorithms 1 and 4).
Dropout takes the bits that `functional.kept` gives each entry, so that nothing but rounding differs
from what is written out. Profiles of a step: experiments/results/profiles/bert_base_h100.txt.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, UInt32

from adapters_jax import functional, sharding

BLOCK = 64  # queries, or keys, that are worked on at a time
SHORT = (16, 32)  # numbers of tokens that are less than a block, and no less than a product takes
WIDTHS = (16, 32, 64, 128)  # of a head
WHOLE = 128  # so many keys have their gradients, and those of all queries, found by one program
FEW = 16  # queries at a time, where one program finds all gradients: its registers are full
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
    return whole and query.shape[3] in WIDTHS and sharding.devices_of(query) == 1


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
    # Of each row of scores also the largest, and one over the sum of exponentials relative to it.
    mixed, largest, inverse = run('mix', 'queries', BLOCK, outputs=outputs, interpret=interpret)
    return mixed, (query, key, value, mask, words, mixed, largest, inverse)


def _backward(rate, interpret, saved, gradient):
    query, key, value, mask, words, mixed, largest, inverse = saved
    given = {'queries': [query, mixed, gradient], 'keys': [key, value], 'rows': [largest, inverse]}
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
    part = pl.BlockSpec((None, block, None, K), lambda b, h, i: (b, i, h, 0))
    whole = {
        'queries': pl.BlockSpec((None, T, None, K), lambda b, h, i: (b, 0, h, 0)),
        'keys': pl.BlockSpec((None, S, None, K), lambda b, h, i: (b, 0, h, 0)),
        'rows': pl.BlockSpec((None, None, T), lambda b, h, i: (b, h, 0)),
    }
    if along == 'queries':
        row = pl.BlockSpec((None, None, block), lambda b, h, i: (b, h, i))
        specs = whole | {'queries': part, 'rows': row}
        seen = pl.BlockSpec((None, None, block, S), lambda b, h, i: (b, 0, i, 0))
    else:
        specs = whole | {'keys': part}
        mask = None if mask is None else mask.swapaxes(2, 3)  # keys before queries, for all heads
        seen = pl.BlockSpec((None, None, block, T), lambda b, h, i: (b, 0, i, 0))
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
    gradients of keys; nor need the mask, which a step turns over once.
    """

    H: int
    T: int
    S: int
    scale: float
    rate: float

    def first_row(self) -> Array:
        """Return the number of the head's first row of weights, among those of all heads."""
        return (pl.program_id(0) * self.H + pl.program_id(1)) * self.T

    def scores(self, query, key, mask) -> Array:
        """Return the scaled products, and the least number where there is nothing to see."""
        scores = self.scale * _product(query, key, 1, 1)
        return scores if mask is None else jnp.where(mask, scores, _LEAST)

    def keep(self, words_ref, row, column, shape, turned=False) -> Array | None:
        """Return which weights of a tile stay, by the numbers of its first row and column."""
        if words_ref is None:
            return None
        T, S = reversed(shape) if turned else shape
        # Of a weight's number, row * S + column, each part is multiplied once and for all.
        rows = functional.spread(_counted(row, T) * np.uint32(self.S))
        columns = functional.spread(_counted(column, S))
        numbers = rows[None] + columns[:, None] if turned else rows[:, None] + columns[None]
        return functional.kept_at(numbers, (words_ref[0], words_ref[1]), self.rate)

    def dropped(self, x, keep) -> Array:
        """Return the weights, or their gradients, after dropout."""
        return x if keep is None else functional.scaled_up(x, keep, self.rate)

    def of_scores(self, weights, of_weights, mean, mask) -> Array:
        """Return the gradients of the products (Dao et al. 2022, appendix B.2, eq. 4)."""
        gradient = self.scale * weights * (of_weights - mean)
        return gradient if mask is None else jnp.where(mask, gradient, 0.0)


def _mix_kernel(
    tile, query_ref, key_ref, value_ref, mask_ref, words_ref, mixed_ref, largest_ref, inverse_ref
):
    query = query_ref[...]
    size, block = query.shape[0], min(BLOCK, tile.S)
    row = tile.first_row() + pl.program_id(2) * size

    def over(i, carry):
        largest, total, mixed = carry
        own = pl.ds(i * block, block)
        value = value_ref[own]
        scores = tile.scores(query, key_ref[own], _seen(mask_ref, (slice(None), own)))
        above = jnp.maximum(largest, scores.max(axis=1))
        weights = jnp.exp(scores - above[:, None])
        shrunk = jnp.exp(largest - above)
        total = shrunk * total + weights.sum(axis=1)
        weights = tile.dropped(weights, tile.keep(words_ref, row, i * block, scores.shape))
        mixed = shrunk[:, None] * mixed + _product(weights.astype(value.dtype), value, 1, 0)
        return above, total, mixed

    start = jnp.full(size, -jnp.inf), jnp.zeros(size), jnp.zeros(query.shape, jnp.float32)
    largest, total, mixed = jax.lax.fori_loop(0, tile.S // block, over, start)
    inverse = 1.0 / total
    mixed_ref[...] = (mixed * inverse[:, None]).astype(mixed_ref.dtype)
    largest_ref[...], inverse_ref[...] = largest, inverse


def _queries_kernel(
    tile, query_ref, mixed_ref, gradient_ref, key_ref, value_ref, largest_ref, inverse_ref,
    mask_ref, words_ref, of_query_ref,
):  # fmt: skip
    query, gradient = query_ref[...], gradient_ref[...]
    mean = _mean(gradient, mixed_ref[...])[:, None]
    largest, inverse = largest_ref[...][:, None], inverse_ref[...][:, None]
    size, block = query.shape[0], min(BLOCK, tile.S)
    row = tile.first_row() + pl.program_id(2) * size

    def over(i, of_query):
        own = pl.ds(i * block, block)
        key, mask = key_ref[own], _seen(mask_ref, (slice(None), own))
        weights = jnp.exp(tile.scores(query, key, mask) - largest) * inverse
        keep = tile.keep(words_ref, row, i * block, weights.shape)
        of_weights = tile.dropped(_product(gradient, value_ref[own], 1, 1), keep)
        of_scores = tile.of_scores(weights, of_weights, mean, mask).astype(key.dtype)
        return of_query + _product(of_scores, key, 1, 0)

    start = jnp.zeros(query.shape, jnp.float32)
    of_query = jax.lax.fori_loop(0, tile.S // block, over, start)
    of_query_ref[...] = of_query.astype(of_query_ref.dtype)


def _keys_kernel(
    tile, query_ref, mixed_ref, gradient_ref, key_ref, value_ref, largest_ref, inverse_ref,
    mask_ref, words_ref, of_key_ref, of_value_ref, of_query_ref=None,
):  # fmt: skip
    """Find the gradients of keys and values, and those of queries if there is no other block."""
    key, value = key_ref[...], value_ref[...]
    size, block = key.shape[0], min(BLOCK if of_query_ref is None else FEW, tile.T)
    first, column = tile.first_row(), pl.program_id(2) * size

    def over(i, carry):
        of_key, of_value = carry
        own = pl.ds(i * block, block)
        query, gradient = query_ref[own], gradient_ref[own]
        mean = _mean(gradient, mixed_ref[own])[None]
        mask = _seen(mask_ref, (slice(None), own))
        weights = jnp.exp(tile.scores(key, query, mask) - largest_ref[own][None])
        weights *= inverse_ref[own][None]
        keep = tile.keep(words_ref, first + i * block, column, weights.shape, turned=True)
        of_weights = tile.dropped(_product(value, gradient, 1, 1), keep)
        of_scores = tile.of_scores(weights, of_weights, mean, mask).astype(query.dtype)
        if of_query_ref is not None:
            of_query_ref[own] = _product(of_scores, key, 0, 0).astype(of_query_ref.dtype)
        weights = tile.dropped(weights, keep).astype(gradient.dtype)
        of_value += _product(weights, gradient, 1, 0)
        return of_key + _product(of_scores, query, 1, 0), of_value

    zeros = jnp.zeros(key.shape, jnp.float32)
    of_key, of_value = jax.lax.fori_loop(0, tile.T // block, over, (zeros, zeros))
    of_key_ref[...] = of_key.astype(of_key_ref.dtype)
    of_value_ref[...] = of_value.astype(of_value_ref.dtype)


_KERNELS: dict[str, Callable[..., None]] = {
    'mix': _mix_kernel,
    'of_all': _keys_kernel,
    'of_queries': _queries_kernel,
    'of_keys': _keys_kernel,
}


def _counted(first: Array, size: int) -> Array:
    return jnp.asarray(first, jnp.uint32) + jax.lax.iota(jnp.uint32, size)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Return the product over these axes, summed in float32."""
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _seen(mask_ref: Any, at: Any) -> Array | None:
    return None if mask_ref is None else mask_ref[at].astype(jnp.int32) != 0


def _mean(gradient: Array, mixed: Array) -> Array:
    """Return the mean of each row's gradients of weights, under these weights."""
    return jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=1)
