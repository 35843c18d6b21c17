"""Small pure functions that backbones, heads and adapters all need.

They stand on the ground floor because `models/` and `adapters/` do not know each other, and both
have to apply, say, the very same activation under the very same name.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt32

from adapters_jax import products, quantize, xla

Activation = Callable[[Array], Array]


def _gelu_new(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


@jax.custom_vjp
def _gelu(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    return (wide * _normal(wide)).astype(x.dtype)


def _normal(x: Array) -> Array:
    """Return the standard normal distribution function.

    By erf and not, as in jax.nn, by erfc, whose two branches take a CPU three times as long.
    """
    return 0.5 + 0.5 * jax.lax.erf(x * np.float32(0.5**0.5))


def _gelu_gradient(x: Array, gradient: Array) -> tuple[Array]:
    # From the input alone: what differentiation keeps of the way there is float32, twice as large.
    # The distribution function is one minus that of -x, since XLA's CPU compiler keeps what it
    # finds computed twice in the same words: an array as large as the input in each layer.
    wide = x.astype(jnp.float32)
    normal = 0.5 - 0.5 * jax.lax.erf(wide * np.float32(-(0.5**0.5)))
    density = np.float32((2 * np.pi) ** -0.5) * jnp.exp(-0.5 * jnp.square(wide))
    return ((gradient * (normal + wide * density)).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_gradient)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


# The names are those of Hugging Face's `ACT2FN`, which configs of models and adapters use;
# 'leakyrelu' is AdapterHub's.
ACTIVATIONS: dict[str, Activation] = {
    'gelu': _gelu,
    'gelu_new': _gelu_new,
    'gelu_pytorch_tanh': _gelu_new,
    'gelu_accurate': _gelu_new,
    'gelu_python': _gelu,
    'gelu_fast': _gelu_new,
    'quick_gelu': _quick_gelu,
    'relu': jax.nn.relu,
    'relu6': jax.nn.relu6,
    'relu2': lambda x: jnp.square(jax.nn.relu(x)),
    'leaky_relu': jax.nn.leaky_relu,
    'leakyrelu': jax.nn.leaky_relu,
    'silu': jax.nn.silu,
    'swish': jax.nn.silu,
    'mish': jax.nn.mish,
    'sigmoid': jax.nn.sigmoid,
    'tanh': jnp.tanh,
    'linear': lambda x: x,
}


def activation(name: str) -> Activation:
    """Return the activation that Hugging Face configs call `name`.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f'unknown activation {name!r}; known: {", ".join(sorted(ACTIVATIONS))}')
    return ACTIVATIONS[name]


def layer_norm(
    x: Float[Array, '... D'],
    scale: Float[Array, 'D'] | Float[Array, 'B 1 D'],
    bias: Float[Array, 'D'] | Float[Array, 'B 1 D'],
    epsilon: float,
) -> Float[Array, '... D']:
    """Normalise the last axis, in float32 whatever the input's type (Ba et al. 2016, eq. 4)."""
    given = epsilon, xla.gradient_once(x), against(scale, x), against(bias, x)
    if jax.default_backend() == 'cpu':
        # With a backward pass by hand, what rematerialisation computes again is word for word what
        # was computed before, and XLA's CPU compiler takes the first for the second. Steps take no
        # longer without.
        return _layer_norm_and_moments(*given)[0]
    return layer_norm_by_hand(*given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm_by_hand(
    epsilon: float,
    x: Float[Array, '... D'],
    scale: Float[Array, '... D'],
    bias: Float[Array, '... D'],
) -> Float[Array, '... D']:
    """Normalise as `layer_norm` does (Ba et al. 2016, eq. 4); the backward pass is by hand.

    It keeps the input and its moments, where differentiation keeps several float32 arrays of the
    input's size. `scale` and `bias` have as many axes as `x`, those that are shared of length 1.
    """
    return _layer_norm_and_moments(epsilon, x, scale, bias)[0]


def _layer_norm_and_moments(epsilon: float, x: Array, scale: Array, bias: Array) -> Any:
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (wide - mean) * inverse * scale + bias
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _layer_norm_gradients(epsilon: float, saved: Any, gradient: Array) -> tuple[Array, ...]:
    x, scale, bias, mean, inverse = saved
    normal = (x.astype(jnp.float32) - mean) * inverse
    own = gradient * scale.astype(jnp.float32)
    along = own.mean(-1, keepdims=True) + normal * (own * normal).mean(-1, keepdims=True)
    of_x = (inverse * (own - along)).astype(x.dtype)
    of_scale = _summed(gradient * normal, scale)
    return of_x, of_scale, _summed(gradient.astype(jnp.float32), bias)


def _summed(gradient: Array, of: Array) -> Array:
    """Return the gradient of what was broadcast."""
    axes = tuple(i for i, size in enumerate(of.shape) if size != gradient.shape[i])
    return gradient.sum(axes, keepdims=True).astype(of.dtype)


layer_norm_by_hand.defvjp(_layer_norm_and_moments, _layer_norm_gradients)


def rms_norm(
    x: Float[Array, '... D'], scale: Float[Array, 'D'] | Float[Array, 'B 1 D'], epsilon: float
) -> Float[Array, '... D']:
    """Divide by the root mean square of the last axis (Zhang and Sennrich 2019, eq. 4)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + epsilon)
    return (wide * against(scale, x)).astype(x.dtype)


def against(vector: Float[Array, 'D'] | Float[Array, 'B 1 D'], x: Array) -> Array:
    """Return one vector for all rows of `x` in a shape that broadcasts; one a row already does."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,)) if vector.ndim == 1 else vector


def dense(
    x: Float[Array, '... I'],
    kernel: Float[Array, 'I O'] | quantize.Quantized,
    bias: Float[Array, 'O'] | Float[Array, 'B 1 O'] | None = None,
) -> Float[Array, '... O']:
    """Return `x @ kernel + bias`, computed in the type of `x`."""
    y = quantize.product(x, kernel)
    if bias is None:
        return y
    return y + against(bias.astype(x.dtype), y)


def trained_dense(
    x: Float[Array, '... I'],
    kernel: Float[Array, 'I O'],
    bias: Float[Array, 'O'] | Float[Array, 'B 1 O'] | None = None,
) -> Float[Array, '... O']:
    """Return `x @ kernel + bias` in the type of `x`, for a kernel that is trained.

    It differs from `dense` in its gradient alone: see `products.trained_product`.
    """
    y = products.trained_product(x, kernel.astype(x.dtype))
    return y if bias is None else y + against(bias.astype(x.dtype), y)


def dropout(x: Float[Array, '...'], rate: float, key: PRNGKeyArray | None) -> Float[Array, '...']:
    """Zero each entry with probability `rate` and scale the rest; no key, no dropout.

    Raises:
        ValueError: a rate below 0, or of 1 and above.
    """
    if not 0 <= rate < 1:
        raise ValueError(f'the rate of dropout is {rate}; expected a number in [0, 1)')
    if key is None or rate == 0.0:
        return x
    return _dropout(rate, x, words_of(key))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropout(rate: float, x: Array, words: UInt32[Array, '2']) -> Array:
    return scaled_up(x, kept(words, x.shape, rate), rate)


# What is kept is found again for the backward pass, which is cheaper than keeping it.
_dropout.defvjp(
    lambda rate, x, words: (_dropout(rate, x, words), words),
    lambda rate, words, gradient: (_dropout(rate, gradient, words), None),
)


def words_of(key: PRNGKeyArray) -> UInt32[Array, '2']:
    """Return the key as the two words that `kept` takes; keys that are folded have random ones."""
    return jax.random.key_data(key)[:2]


def kept(words: UInt32[Array, '2'], shape: tuple[int, ...], rate: float) -> Bool[Array, '...']:
    """Return which entries of an array dropout keeps: each with probability `1 - rate`.

    An entry's number in the array, counted along the last axis first, is hashed with the two words.
    """
    return kept_of(_numbers(shape), (words[0], words[1]), rate)


def kept_of(
    numbers: UInt32[Array, '...'], words: tuple[UInt32[Array, ''], UInt32[Array, '']], rate: float
) -> Bool[Array, '...']:
    """Return which of the entries with these numbers dropout keeps.

    The hash is four rounds of multiplication and shift (with constants that C. Wellons' search for
    the least biased found, hash-prospector, 2018 to 2022). JAX's own generator makes streams fit
    for cryptography out of twenty rounds of its kind, which on a CPU took a third of a training
    step; what a dropout mask needs of its bits, tests/test_dropout.py measures.
    An entry's bit depends on nothing but its number, so devices that have parts of an array agree.
    """
    return kept_at(spread(numbers), words, rate)


def spread(numbers: UInt32[Array, '...']) -> UInt32[Array, '...']:
    """Return the first round of the hash, which of a sum of numbers is the sum of its parts'."""
    return numbers * np.uint32(0x9E3779B9)


def kept_at(
    x: UInt32[Array, '...'], words: tuple[UInt32[Array, ''], UInt32[Array, '']], rate: float
) -> Bool[Array, '...']:
    """Return what `kept_of` does, for numbers that were `spread` before."""
    x = x + words[0]
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD) + words[1]
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return (x ^ (x >> np.uint32(16))) >= np.uint32(_threshold(rate))


def scaled_up(x: Float[Array, '...'], keep: Bool[Array, '...'], rate: float) -> Float[Array, '...']:
    """Zero what is not kept and scale the rest, so that the expectation stays."""
    return jnp.where(keep, scaled(x, rate), 0)


def scaled(x: Float[Array, '...'], rate: float) -> Float[Array, '...']:
    """Divide by the probability of being kept."""
    return (x * (2**32 / (2**32 - _threshold(rate)))).astype(x.dtype)


def _threshold(rate: float) -> int:
    return min(round(rate * 2**32), 2**32 - 1)


def _numbers(shape: tuple[int, ...]) -> UInt32[Array, '...']:
    """Return the number of each entry; the sum over axes can be cut like any array."""
    numbers = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        numbers += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return numbers


def fold(key: PRNGKeyArray | None, *data: int) -> PRNGKeyArray | None:
    """Fold integers into a key one after another; None stays None."""
    for item in data:
        key = None if key is None else jax.random.fold_in(key, item)
    return key
