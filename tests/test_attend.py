"""Attention against torch's, forward and backward, with and without masks and dropped weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from adapters_jax import functional
from adapters_jax.attention import _softmax, asks_little, attend, attend_to_inputs


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
    ours = attend(query, key, value, mask)
    np.testing.assert_allclose(ours, expected.transpose(1, 2), atol=2e-6)


def test_a_row_with_nothing_to_attend_to_is_finite_and_so_is_its_gradient():
    query, key, value = random_attention(0)
    mask = np.zeros((2, 1, 5, 7), bool)
    mask[:, :, 1:, 0] = True

    @jax.jit
    def forward_and_gradient(q):
        mixed, pull = jax.vjp(lambda q: attend(q, key, value, mask), q)
        return mixed, pull(mixed)[0]

    mixed, gradient = forward_and_gradient(query)
    np.testing.assert_allclose(mixed[:, 0], value.mean(1), atol=1e-6)
    np.testing.assert_allclose(mixed[:, 1:], np.stack([value[:, 0]] * 4, 1), atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 0], np.zeros_like(query[:, 0]))
    np.testing.assert_allclose(gradient[:, 1:], 0, atol=1e-5)  # one key: the weight is 1


def test_what_is_masked_has_no_part_however_small_the_other_scores_are():
    _, _, value = random_attention(0)
    query, key = np.full((2, 5, 3, 4), 100, np.float32), np.full((2, 7, 3, 4), -100, np.float32)
    key[:, 2] = 100
    mask = np.arange(7).reshape(1, 1, 1, 7) != 2
    expected = np.broadcast_to(np.delete(value, 2, 1).mean(1, keepdims=True), query.shape)
    np.testing.assert_allclose(attend(query, key, value, mask), expected, atol=1e-6)


def test_attention_drops_weights_with_a_key_only():
    query, key, value = random_attention(0)
    still = attend(query, key, value, None, 0.5)
    np.testing.assert_array_equal(still, attend(query, key, value, None))
    keys = jax.random.split(jax.random.key(0), 1000)
    drop = jax.vmap(lambda k: attend(query, key, value, None, 0.5, k))
    dropped = jax.jit(drop)(keys)
    assert not np.allclose(dropped[0], still)
    error = np.asarray(dropped.std(0)) / np.sqrt(len(keys))
    assert (np.abs(dropped.mean(0) - still) < 6 * error + 1e-6).all()


@pytest.mark.parametrize('rate', [0.0, 0.3])
@pytest.mark.parametrize('mask_shape', [None, (2, 1, 1, 7), (2, 1, 5, 7), (1, 1, 5, 7)])
@pytest.mark.parametrize('biases', [(), (12,), (2, 1, 12)], ids=['none', 'one', 'of each row'])
def test_keys_and_values_need_not_be_computed(mask_shape, biases, rate):
    """Outputs and gradients are those of attention to them, and so is what dropout keeps."""
    rng = np.random.default_rng(0)
    query = random_attention(0)[0]
    inputs = rng.standard_normal((2, 7, 6)).astype(np.float32)
    kernels = [rng.standard_normal((6, 12)).astype(np.float32) for _ in range(2)]
    added = [2 * rng.standard_normal(biases).astype(np.float32) if biases else None] * 2
    mask = None if mask_shape is None else rng.random(mask_shape) < 0.5
    given, key = (query, inputs, *zip(kernels, added, strict=True)), jax.random.key(3)

    def by_keys(query, inputs, *maps):
        made = (functional.dense(inputs, *own).reshape(2, 7, 3, 4) for own in maps)
        return attend(query, *made, mask, rate, key, scale=0.7)

    def by_inputs(*given):
        return attend_to_inputs(*given, mask, rate, key, 0.7)

    gradient = rng.standard_normal(query.shape).astype(np.float32)

    def both(function):
        mixed, pull = jax.vjp(jax.jit(function), *given)
        return mixed, pull(gradient)

    (expected, wanted), (found, own) = both(by_keys), both(by_inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # That of the keys' bias is nothing but rounding.
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for ours, theirs in zip(jax.tree.leaves(own), jax.tree.leaves(wanted), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=5e-6 * largest)


@pytest.mark.parametrize('seen', [1, 7, 32, 33, 64, 96, 100, 127, 512, 514])
def test_the_softmax_of_any_length_is_that_of_jax(seen):
    scores = 30 * np.random.default_rng(seen).standard_normal((2, 3, seen)).astype(np.float32)
    scores[0, 0] = np.finfo(np.float32).min  # nothing to attend to
    np.testing.assert_allclose(_softmax(scores), jax.nn.softmax(scores), rtol=1e-6)


def test_little_is_asked_by_few_tokens():
    x = jnp.zeros((2, 128, 384))
    assert asks_little(jnp.zeros((2, 1, 12, 32)), x) and asks_little(jnp.zeros((2, 12, 12, 32)), x)
    assert not asks_little(jnp.zeros((2, 13, 12, 32)), x)
    assert not asks_little(jnp.zeros((2, 1, 4, 2)), jnp.zeros((2, 3, 8)))


def plain(query, key, value, mask, keep=None, rate=0.0):
    """Attention as it is written down, for automatic differentiation."""
    scores = jnp.einsum('BTHK,BSHK->BHTS', query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -3e38)
    weights = jax.nn.softmax(scores, axis=-1)
    if keep is not None:
        weights = jnp.where(keep, weights / (1 - rate), 0)
    return jnp.einsum('BHTS,BSHK->BTHK', weights, value)


@pytest.mark.parametrize('rate', [0.0, 0.3])
@pytest.mark.parametrize('mask_shape', [None, (2, 1, 1, 7), (2, 1, 5, 7), (1, 1, 5, 7)])
def test_the_gradients_are_those_of_automatic_differentiation(mask_shape, rate):
    query, key, value = map(jnp.asarray, random_attention(2))
    target = np.random.default_rng(3).standard_normal(query.shape).astype(np.float32)
    mask = None
    if mask_shape:
        mask = np.random.default_rng(1).random(mask_shape) < 0.5
        mask[..., 0] = True
    rng = jax.random.key(4) if rate else None
    keep = None
    if rate:
        keep = functional.kept(functional.words_of(rng), (2, 3, 5, 7), rate)

    def ours(*given):
        return (attend(*given, mask, rate, rng) * target).sum()

    def theirs(*given):
        return (plain(*given, mask, keep, rate) * target).sum()

    found, expected = (
        jax.value_and_grad(f, argnums=(0, 1, 2))(query, key, value) for f in (ours, theirs)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6), found, expected
    )


def test_the_gradients_in_bfloat16_are_those_of_float32_to_its_digits():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in random_attention(5))

    def total(*given):
        return jnp.square(attend(*given, None).astype(jnp.float32)).sum()

    low = jax.grad(total, argnums=(0, 1, 2))(query, key, value)
    wide = (x.astype(jnp.float32) for x in (query, key, value))
    high = jax.grad(total, argnums=(0, 1, 2))(*wide)
    for a, b in zip(low, high, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.linalg.norm(a.astype(jnp.float32) - b) / np.linalg.norm(b)
        assert error < 0.02


def test_mapped_over_members_each_has_its_own_dropped_weights():
    query, key, value = random_attention(6)
    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(lambda k: attend(query, key, value, None, 0.5, k))(keys)
    alone = [attend(query, key, value, None, 0.5, k) for k in keys]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-6)
