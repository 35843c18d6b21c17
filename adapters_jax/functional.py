"""Small pure functions that backbones, heads and adapters all need.

They stand on the ground floor because `models/` and `adapters/` do not know each other, and both
have to apply, say, the very same activation under the very same name.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from adapters_jax import quantize

Activation = Callable[[Array], Array]


def _gelu_new(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


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
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    normal = (wide - mean) * jax.lax.rsqrt(variance + epsilon)
    return (normal * against(scale, x) + against(bias, x)).astype(x.dtype)


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

    It differs from `dense` in its gradient alone: see `trained_product`.
    """
    y = trained_product(x, kernel.astype(x.dtype))
    return y if bias is None else y + against(bias.astype(x.dtype), y)


def trained_product(x: Float[Array, '... I'], kernel: Float[Array, 'I O']) -> Array:
    """Return `x @ kernel`, whose gradient for the kernel transposes the narrower of its factors.

    The gradient is the product of `x`, transposed, and the output's gradient, or its transpose.
    XLA's CPU compiler writes the first factor of a product down transposed, and computes it again
    for that, in an order that no cache likes: for `double_seq_bn` over MiniLM this was half
    of a training step. An adapter's narrow side is a tenth of its wide one.
    """
    stop = jax.lax.stop_gradient
    return _with_kernel_gradient(x @ stop(kernel), stop(x), kernel)


@jax.custom_vjp
def _with_kernel_gradient(y: Array, x: Array, kernel: Array) -> Array:
    return y


def _keep_inputs(y: Array, x: Array, kernel: Array) -> tuple[Array, Array]:
    return y, x


def _kernel_gradient(x: Array, gradient: Array) -> tuple[Array, None, Array]:
    rows = tuple(range(x.ndim - 1))

    def over_rows(left: Array, right: Array) -> Array:
        return jax.lax.dot_general(left, right, ((rows, rows), ((), ())))

    narrow_last = gradient.shape[-1] < x.shape[-1]
    own = over_rows(gradient, x).T if narrow_last else over_rows(x, gradient)
    return gradient, None, own


_with_kernel_gradient.defvjp(_keep_inputs, _kernel_gradient)


def dropout(x: Float[Array, '...'], rate: float, key: PRNGKeyArray | None) -> Float[Array, '...']:
    """Zero each entry with probability `rate` and scale the rest; no key, no dropout.

    Sixteen random bits an entry decide, half of what a uniform float takes; the scale uses the
    rate that sixteen bits can express, so the expectation is exact.
    """
    if key is None or rate == 0.0:
        return x
    threshold = min(round(rate * 2**16), 2**16 - 1)
    keep = jax.random.bits(key, x.shape, jnp.uint16) >= threshold
    return jnp.where(keep, x * (2**16 / (2**16 - threshold)), 0).astype(x.dtype)


def fold(key: PRNGKeyArray | None, *data: int) -> PRNGKeyArray | None:
    """Fold integers into a key one after another; None stays None."""
    for item in data:
        key = None if key is None else jax.random.fold_in(key, item)
    return key


def attend(
    query: Float[Array, 'B T H K'],
    key: Float[Array, 'B S H K'],
    value: Float[Array, 'B S H K'],
    mask: Bool[Array, '#B 1 #T S'] | None,
    rate: float = 0.0,
    rng: PRNGKeyArray | None = None,
) -> Float[Array, 'B T H K']:
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, eq. 1).

    Masked scores become the least finite number, not minus infinity: a row with nothing to attend
    to (padding) then gets uniform weights instead of NaN. The softmax runs in float32.
    """
    scores = jnp.einsum('BTHK,BSHK->BHTS', query / query.shape[-1] ** 0.5, key)
    scores = scores.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(value.dtype), rate, rng)
    return jnp.einsum('BHTS,BSHK->BTHK', weights, value)
