"""Multi-head attention, with a backward pass written by hand.

Automatic differentiation transposes whole batches of attention weights, for which XLA's CPU
compiler takes longer than for all projections of a layer. Here heads come before tokens
(`B H T K`), and only the small factor of a product is ever transposed. A GPU has kernels for most
shapes (`fused_attention.py`), which compute the same.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from adapters_jax import functional

_LOG = logging.getLogger(__name__)
_KERNELS = contextvars.ContextVar('kernels', default=True)


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Trace attention without kernels, for instance to count its products."""
    token = _KERNELS.set(False)
    try:
        yield
    finally:
        _KERNELS.reset(token)


def attend(
    query: Float[Array, 'B T H K'],
    key: Float[Array, 'B S H K'],
    value: Float[Array, 'B S H K'],
    mask: Bool[Array, '#B 1 #T S'] | None,
    rate: float = 0.0,
    rng: PRNGKeyArray | None = None,
    bias: Float[Array, '#B H T S'] | None = None,
    scale: float | None = None,
) -> Float[Array, 'B T H K']:
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    Masked scores become the least finite number, not minus infinity: a row with nothing to attend
    to (padding) then gets uniform weights instead of NaN. The softmax runs in float32. With `rng`,
    weights are dropped at `rate`. `bias` is added to the scores (Raffel et al. 2020, section 2.1),
    which are multiplied by `scale`, or else divided by the square root of K.
    """
    words = None if rng is None or rate == 0.0 else functional.words_of(rng)
    usual = query.shape[-1] ** -0.5
    scale = usual if scale is None else scale
    if jax.default_backend() == 'gpu' and _KERNELS.get() and bias is None and scale == usual:
        kernels = _kernels()
        if kernels and kernels.suits(query, key):
            return kernels.mix(rate, query, key, value, mask, words)
    scaled = query / query.shape[-1] ** 0.5 if scale == usual else query * scale
    heads = (x.swapaxes(1, 2) for x in (scaled, key, value))
    return _mix(rate, *heads, mask, words, bias).swapaxes(1, 2)


@functools.cache
def _kernels() -> ModuleType | None:
    """Return the kernels of a GPU; a CPU does without importing Pallas.

    None where this JAX cannot compile them: since 0.11 it announces that Pallas will leave Triton.
    """
    try:
        from adapters_jax import fused_attention
    except ImportError as error:
        _LOG.warning(
            'attention is computed without kernels, which takes longer and more memory: this '
            'version of JAX lacks what they are written in (%s); jax==0.10.2 has it',
            error,
        )
        return None
    return fused_attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(
    rate: float,
    query: Float[Array, 'B H T K'],
    key: Float[Array, 'B H S K'],
    value: Float[Array, 'B H S K'],
    mask: Bool[Array, '#B 1 #T S'] | None,
    words: UInt32[Array, '2'] | None,
    bias: Float[Array, '#B H T S'] | None,
) -> Float[Array, 'B H T K']:
    return _forward(rate, query, key, value, mask, words, bias)[0]


def _forward(rate, query, key, value, mask, words, bias):
    scores = _product('BHTK,BHSK->BHTS', query, key)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = _product('BHTS,BHSK->BHTK', _dropped(weights, words, rate), value).astype(value.dtype)
    return mixed, (query, key, value, mask, words, bias, weights, mixed)


def _backward(rate, saved, gradient):
    """Return the gradients of query, key and value.

    A softmax takes from the gradient of each weight the mean over its row, which is the product of
    the output and its gradient (Dao et al. 2022, appendix B.2, eq. 4).
    """
    query, key, value, mask, words, bias, weights, mixed = saved
    mean = jnp.sum(gradient * mixed, axis=-1, keepdims=True, dtype=jnp.float32)
    of_weights = _product('BHTK,BHSK->BHTS', gradient, value)
    of_scores = weights * (_dropped(of_weights, words, rate) - mean)
    if mask is not None:  # in a row with nothing to attend to, weights of what is masked are not 0
        of_scores = jnp.where(mask, of_scores, 0)
    of_bias = None
    if bias is not None:
        axes = (0,) if bias.shape[0] == 1 else ()
        of_bias = of_scores.sum(axes, keepdims=True, dtype=jnp.float32).astype(bias.dtype)
    of_scores = of_scores.astype(query.dtype)
    of_query = _product('BHTS,BHSK->BHTK', of_scores, key)
    of_key = _product('BHTK,BHTS->BHKS', query, of_scores).swapaxes(2, 3)
    # Dropout's scale goes to the gradient: what the forward pass has in the same words, here the
    # dropped weights, XLA's CPU compiler takes from there and keeps for all that time.
    if words is not None:
        weights = jnp.where(functional.kept(words, weights.shape, rate), weights, 0)
        gradient = functional.scaled(gradient, rate)
    of_value = _product('BHTK,BHTS->BHKS', gradient, weights).swapaxes(2, 3)
    pairs = (of_query, query), (of_key, key), (of_value, value)
    return *(own.astype(of.dtype) for own, of in pairs), None, None, of_bias


_mix.defvjp(_forward, _backward)


def _product(spec: str, left: Array, right: Array) -> Array:
    """Return the product, summed in float32."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _dropped(x: Array, words: UInt32[Array, '2'] | None, rate: float) -> Array:
    if words is None:
        return x
    return functional.scaled_up(x, functional.kept(words, x.shape, rate), rate)
