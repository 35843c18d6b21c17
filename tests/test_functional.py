import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from adapters_jax import functional

# AdapterHub's name for what Hugging Face calls 'leaky_relu'.
THEIRS = {'leakyrelu': 'leaky_relu'}


@pytest.mark.parametrize('name', sorted(functional.ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    x = np.linspace(-9, 9, 2001, dtype=np.float32)
    expected = ACT2FN[THEIRS.get(name, name)](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(functional.activation(name)(x), expected, atol=3e-6, rtol=0)


def test_an_unknown_activation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'gleu'; known: gelu, .*, tanh"):
        functional.activation('gleu')


# Next to a mean of 1000, E[x^2] - E[x]^2 would be off by 6 % in float32.
@pytest.mark.parametrize(('offset', 'tolerance'), [(0, 2e-6), (1000, 3e-4)])
def test_layer_norm_is_that_of_torch(offset, tolerance):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 3, 8)) + offset).astype(np.float32)
    scale, bias = rng.standard_normal((2, 8)).astype(np.float32)
    exact = [torch.from_numpy(a).double() for a in (x, scale, bias)]
    expected = torch.nn.functional.layer_norm(exact[0], (8,), *exact[1:], eps=1e-5)
    ours = functional.layer_norm(x, scale, bias, 1e-5)
    np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize('per_row', [False, True])
def test_layer_norm_by_hand_has_the_gradients_of_torch(per_row):
    """As an accelerator computes it; scales and biases of a batch's rows are summed over tokens."""
    rng = np.random.default_rng(1)
    x, gradient = rng.standard_normal((2, 4, 3, 8)).astype(np.float32)
    scale, bias = rng.standard_normal((2, 4 if per_row else 1, 1, 8)).astype(np.float32)
    exact = [torch.from_numpy(a).double().requires_grad_() for a in (x, scale, bias)]
    normal = torch.nn.functional.layer_norm(exact[0], (8,), eps=1e-5)
    expected = normal * exact[1] + exact[2]
    expected.backward(torch.from_numpy(gradient).double())
    found, pull = jax.vjp(lambda *a: functional.layer_norm_by_hand(1e-5, *a), x, scale, bias)
    np.testing.assert_allclose(found, expected.detach(), atol=2e-6)
    for ours, theirs in zip(pull(gradient), exact, strict=True):
        np.testing.assert_allclose(ours, theirs.grad, atol=5e-6)


def test_layer_norm_by_hand_in_bfloat16_is_that_of_differentiation():
    rng = np.random.default_rng(2)
    x, gradient = jnp.asarray(rng.standard_normal((2, 4, 3, 64)), jnp.bfloat16)
    scale, bias = jnp.asarray(rng.standard_normal((2, 64)), jnp.float32)
    wide = [a[None, None] for a in (scale, bias)]
    plain, pull = jax.vjp(lambda *a: functional.layer_norm(*a, 1e-5), x, scale, bias)
    found, own = jax.vjp(lambda *a: functional.layer_norm_by_hand(1e-5, *a), x, *wide)
    np.testing.assert_array_equal(found, plain)
    for ours, theirs in zip(own(gradient), pull(gradient), strict=True):
        assert ours.dtype == theirs.dtype
        error = np.linalg.norm(ours.reshape(theirs.shape) - theirs) / np.linalg.norm(theirs)
        assert error < 3e-3


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_slope_of_gelu_is_that_of_differentiation(dtype):
    x = jnp.linspace(-9, 9, 2001, dtype=dtype)
    slope = jax.vmap(jax.grad(functional.activation('gelu')))(x)
    exact = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x.astype(jnp.float32))
    assert slope.dtype == dtype
    np.testing.assert_allclose(slope, exact, atol=1e-6 if dtype == jnp.float32 else 8e-3)


def test_dropout_lets_the_gradient_through_where_it_let_the_entries():
    x, key = jnp.ones((50, 8)), jax.random.key(0)
    y, pull = jax.vjp(lambda x: functional.dropout(x, 0.3, key), x)
    np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], y)


def test_layer_norm_computes_in_float32_and_returns_the_type_it_got():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 256)) + 3, jnp.bfloat16)
    ones, zeros = jnp.ones(256), jnp.zeros(256)
    low = functional.layer_norm(x, ones, zeros, 1e-12)
    high = functional.layer_norm(x.astype(jnp.float32), ones, zeros, 1e-12)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


def test_dense_computes_in_the_type_of_its_input():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.standard_normal((2, 3, 4)), rng.standard_normal((4, 5)), np.ones(5)
    x, kernel, bias = (jnp.asarray(a, jnp.float32) for a in (x, kernel, bias))
    np.testing.assert_allclose(functional.dense(x, kernel, bias), x @ kernel + 1, atol=1e-6)
    np.testing.assert_allclose(functional.dense(x, kernel), x @ kernel, atol=1e-6)
    assert functional.dense(x.astype(jnp.bfloat16), kernel, bias).dtype == jnp.bfloat16
    assert functional.dense(x, kernel.astype(jnp.bfloat16), bias).dtype == jnp.float32


def test_fold_chains_and_passes_none():
    key = jax.random.key(3)
    assert functional.fold(None, 1, 2) is None
    folded = jax.random.fold_in(jax.random.fold_in(key, 1), 2)
    assert functional.fold(key, 1, 2) == folded
    assert functional.fold(key, 2, 1) != folded


# GELU has a slope of its own; with the others only what differentiation makes of them is rounded.
ROUNDED = ('gelu', 'relu')
SLOPES = [
    pytest.param(
        *(name, dtype),
        marks=pytest.mark.slow if dtype == jnp.bfloat16 and name not in ROUNDED else (),
    )
    for name in sorted(functional.ACTIVATIONS)
    for dtype in (jnp.float32, jnp.bfloat16)
]


@pytest.mark.parametrize(('name', 'dtype'), SLOPES)
def test_the_slope_of_an_activation_is_that_of_torch(name, dtype):
    x = np.linspace(-6, 6, 241, dtype=np.float32) + 0.01  # not at the corners of ReLU
    argument = torch.tensor(x, requires_grad=True)
    ACT2FN[THEIRS.get(name, name)](argument).sum().backward()
    slope = jax.grad(lambda x: functional.activation(name)(x).astype(jnp.float32).sum())
    found = slope(jnp.asarray(x, dtype))
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 0.04
    np.testing.assert_allclose(found.astype(jnp.float32), argument.grad, atol=tolerance)
