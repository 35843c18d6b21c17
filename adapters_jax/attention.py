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

from adapters_jax import functional, quantize

# A kernel [D, H * K] and what is added to its product: [H * K], [B, 1, H * K], or nothing.
Affine = tuple[Array | quantize.Quantized, Array | None]

_LOG = logging.getLogger(__name__)
# Of the scores of a query: see `_largest`.
PIECE, MOST_PIECES = 32, 16
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


def asks_little(query: Float[Array, 'B T H K'], inputs: Float[Array, 'B S D']) -> bool:
    """Tell whether `attend_to_inputs` is worth it: half of the arithmetic or less."""
    tokens, size, seen = query.shape[1], query.shape[3], inputs.shape[1]
    return 2 * tokens * (size + seen) <= size * seen


def attend_to_inputs(
    query: Float[Array, 'B T H K'],
    inputs: Float[Array, 'B S D'],
    key: Affine,
    value: Affine,
    mask: Bool[Array, '#B 1 #T S'] | None,
    rate: float,
    rng: PRNGKeyArray | None,
    scale: float,
) -> Float[Array, 'B T H K']:
    """Return what `attend` does (Vaswani et al. 2017, eq. 1) with affine maps of the inputs.

    Neither is computed: `q (x W)^T = (q W^T) x^T` and `a (x W) = (a x) W`, which is less to do
    where few tokens ask. What is added to every key adds the same to all scores of a query, and so
    nothing to their softmax; it stays, for the gradient of nearly zero that `attend` has for it.
    """
    rows, tokens, heads, _ = query.shape
    (into_key, of_key), (into_value, of_value) = (_by_head(own, query) for own in (key, value))
    asked = _product('BTHK,DHK->BHTD', query, into_key).astype(query.dtype)
    # One product a row, of all heads' questions.
    scores = _product('BQD,BSD->BQS', asked.reshape(rows, heads * tokens, -1), inputs)
    scores = scores.reshape(rows, heads, tokens, -1)
    if of_key is not None:
        scores += (query * of_key).sum(-1, dtype=jnp.float32).swapaxes(1, 2)[..., None]
    scores *= scale
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = _softmax(scores).astype(inputs.dtype)
    words = None if rng is None or rate == 0.0 else functional.words_of(rng)
    weights = _dropped(weights, words, rate)
    mixed = _product('BQS,BSD->BQD', weights.reshape(rows, heads * tokens, -1), inputs)
    mixed = mixed.astype(inputs.dtype).reshape(rows, heads, tokens, -1)
    found = _product('BHTD,DHK->BTHK', mixed, into_value).astype(query.dtype)
    if of_value is None:
        return found
    return found + weights.sum(-1).swapaxes(1, 2)[..., None] * of_value


def _by_head(
    given: Affine, query: Float[Array, 'B T H K']
) -> tuple[Float[Array, 'D H K'], Float[Array, '#B 1 H K'] | None]:
    """Return an affine map's parts with an axis of heads, in the query's number format."""
    kernel, bias = given
    heads, dtype = query.shape[2:], query.dtype
    kernel = quantize.dequantize(kernel).astype(dtype)
    kernel = kernel.reshape(len(kernel), *heads)
    return kernel, None if bias is None else bias.astype(dtype).reshape(-1, 1, *heads)


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
    weights = _softmax(scores).astype(value.dtype)
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


def _softmax(scores: Float[Array, '... S']) -> Float[Array, '... S']:
    """Return the softmax over the last axis, in float32."""
    weights = jnp.exp(scores - _largest(scores))
    return weights / weights.sum(-1, keepdims=True)


def _largest(scores: Float[Array, '... S']) -> Float[Array, '... 1']:
    """Return the largest number of the last axis, by which nothing is differentiated.

    XLA's CPU compiler takes much longer for a maximum over more than 32 numbers than for a sum
    (`python -m experiments.bench.kernels`); here it is first that of equal pieces.
    """
    scores, seen = jax.lax.stop_gradient(scores), scores.shape[-1]
    most = MOST_PIECES if jax.default_backend() == 'cpu' else 1
    fitting = (n for n in range(-(-seen // PIECE), most + 1) if seen % n == 0)
    pieces = jnp.split(scores, next(fitting, 1), axis=-1)
    return functools.reduce(jnp.maximum, pieces).max(-1, keepdims=True)


def _product(spec: str, left: Array, right: Array) -> Array:
    """Return the product, summed in float32."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def _dropped(x: Array, words: UInt32[Array, '2'] | None, rate: float) -> Array:
    if words is None:
        return x
    return functional.scaled_up(x, functional.kept(words, x.shape, rate), rate)
