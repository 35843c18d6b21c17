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


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_expectation(rate):
    x = jnp.full((1000, 400), 3.0)
    y = functional.dropout(x, rate, jax.random.key(0))
    kept = np.asarray(y != 0)
    deviation = np.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation / np.sqrt(kept.size)
    # No row and no column is dropped more than chance has it.
    for axis, n in ((0, 1000), (1, 400)):
        assert np.abs(kept.mean(axis) - (1 - rate)).max() < 6 * deviation / np.sqrt(n)
    threshold = round(rate * 2**16)
    np.testing.assert_allclose(y[kept], 3.0 / (1 - threshold / 2**16), rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 3.0, rtol=5 * deviation / np.sqrt(kept.size) / (1 - rate))


def test_dropout_needs_a_key_and_a_rate():
    x = jnp.arange(8.0)
    assert functional.dropout(x, 0.5, None) is x
    assert functional.dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_keeps_the_type_and_stays_finite_near_one():
    key = jax.random.key(0)
    assert functional.dropout(jnp.ones(9, jnp.bfloat16), 0.1, key).dtype == jnp.bfloat16
    assert np.isfinite(functional.dropout(jnp.ones(9), 1 - 1e-9, key)).all()


def test_fold_chains_and_passes_none():
    key = jax.random.key(3)
    assert functional.fold(None, 1, 2) is None
    folded = jax.random.fold_in(jax.random.fold_in(key, 1), 2)
    assert functional.fold(key, 1, 2) == folded
    assert functional.fold(key, 2, 1) != folded


def random_attention(seed, B=2, T=5, S=7, H=3, K=4):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, H, K), (B, S, H, K), (B, S, H, K))
    return [2 * rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize('mask_shape', [None, (2, 1, 1, 7), (2, 1, 5, 7), (1, 1, 5, 7)])
def test_attention_is_that_of_torch(mask_shape):
    query, key, value = random_attention(0)
    mask = None
    if mask_shape:
        mask = np.random.default_rng(1).random(mask_shape) < 0.5
        mask[..., 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x).transpose(1, 2) for x in (query, key, value)),
        attn_mask=None if mask is None else torch.from_numpy(mask),
    )
    ours = functional.attend(query, key, value, mask)
    np.testing.assert_allclose(ours, expected.transpose(1, 2), atol=2e-6)


def test_a_row_with_nothing_to_attend_to_is_finite_and_so_is_its_gradient():
    query, key, value = random_attention(0)
    mask = np.zeros((2, 1, 5, 7), bool)
    mask[:, :, 1:, 0] = True

    @jax.jit
    def forward_and_gradient(q):
        mixed, pull = jax.vjp(lambda q: functional.attend(q, key, value, mask), q)
        return mixed, pull(mixed)[0]

    mixed, gradient = forward_and_gradient(query)
    np.testing.assert_allclose(mixed[:, 0], value.mean(1), atol=1e-6)
    np.testing.assert_allclose(mixed[:, 1:], np.stack([value[:, 0]] * 4, 1), atol=1e-6)
    np.testing.assert_array_equal(gradient, np.zeros_like(query))


def test_what_is_masked_has_no_part_however_small_the_other_scores_are():
    _, _, value = random_attention(0)
    query, key = np.full((2, 5, 3, 4), 100, np.float32), np.full((2, 7, 3, 4), -100, np.float32)
    key[:, 2] = 100
    mask = np.arange(7).reshape(1, 1, 1, 7) != 2
    expected = np.broadcast_to(np.delete(value, 2, 1).mean(1, keepdims=True), query.shape)
    np.testing.assert_allclose(functional.attend(query, key, value, mask), expected, atol=1e-6)


def test_attention_drops_weights_with_a_key_only():
    query, key, value = random_attention(0)
    still = functional.attend(query, key, value, None, 0.5)
    np.testing.assert_array_equal(still, functional.attend(query, key, value, None))
    keys = jax.random.split(jax.random.key(0), 1000)
    drop = jax.vmap(lambda k: functional.attend(query, key, value, None, 0.5, k))
    dropped = jax.jit(drop)(keys)
    assert not np.allclose(dropped[0], still)
    error = np.asarray(dropped.std(0)) / np.sqrt(len(keys))
    assert (np.abs(dropped.mean(0) - still) < 6 * error + 1e-6).all()


@pytest.mark.parametrize(('inputs', 'outputs'), [(12, 3), (3, 12), (5, 5)])
@pytest.mark.parametrize('lead', [(), (4,), (2, 4)])
def test_a_trained_product_differs_from_a_product_in_no_number(inputs, outputs, lead):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((*lead, inputs), (inputs, outputs)), strict=False)
    )
    weights = jax.random.normal(keys[2], (*lead, outputs))

    def gradients(product):
        def loss(x, kernel):
            return (weights * jnp.tanh(product(x, kernel))).sum()

        return product(x, kernel), *jax.grad(loss, (0, 1))(x, kernel)

    found, expected = (
        gradients(f) for f in (functional.trained_product, lambda x, kernel: x @ kernel)
    )
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_trained_product_of_members_is_that_of_each():
    keys = jax.random.split(jax.random.key(1), 2)
    x, kernels = (
        jax.random.normal(key, shape) for key, shape in zip(keys, ((4, 6), (3, 6, 2)), strict=True)
    )

    def gradient(kernel):
        return jax.grad(lambda k: jnp.square(functional.trained_product(x, k)).sum())(kernel)

    together = jax.vmap(gradient)(kernels)
    for i, kernel in enumerate(kernels):
        np.testing.assert_allclose(together[i], gradient(kernel), rtol=1e-5)
