"""Dropout's masks: the rate, and that nothing in them can be foretold.

Bits from a hash are only as good as what is measured of them: rates by row and by bit of the index,
pairs of neighbours and of equal places under other keys, runs, and agreement between devices.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax import functional, sharding

SIGMAS = 5  # of some hundred comparisons with fixed keys; a chance of one in a million each


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
    np.testing.assert_allclose(y[kept], 3.0 / (1 - rate), rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 3.0, rtol=5 * deviation / np.sqrt(kept.size) / (1 - rate))


def test_dropout_needs_a_key_and_a_rate():
    x = jnp.arange(8.0)
    assert functional.dropout(x, 0.5, None) is x
    assert functional.dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize('rate', [-0.1, 1.0, 1.5])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=rf'the rate of dropout is {rate}; expected a number in'):
        functional.dropout(jnp.ones(3), rate, jax.random.key(0))


def test_dropout_keeps_the_type_and_stays_finite_near_one():
    key = jax.random.key(0)
    assert functional.dropout(jnp.ones(9, jnp.bfloat16), 0.1, key).dtype == jnp.bfloat16
    assert np.isfinite(functional.dropout(jnp.ones(9), 1 - 1e-9, key)).all()


def masks(rate, shape, count, key=0):
    """Return `count` masks as a training run draws them: of steps on end."""
    keys = jax.vmap(lambda step: jax.random.fold_in(jax.random.key(key), step))(jnp.arange(count))
    draw = jax.vmap(lambda k: functional.kept(functional.words_of(k), shape, rate))
    return np.asarray(jax.jit(draw)(keys))


def assert_unrelated(a, b, rate):
    """Assert that two masks agree as often as two that have nothing to do with each other."""
    both = rate * rate
    dropped = ~a & ~b
    deviation = np.sqrt(both * (1 - both) / dropped.size)
    assert abs(dropped.mean() - both) < SIGMAS * deviation


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('shape', [(64, 12, 32, 32), (256, 32, 48), (393_216,)])
def test_neighbours_in_a_mask_are_unrelated(rate, shape):
    mask = masks(rate, shape, 1)[0]
    for axis, distance in itertools.product(range(len(shape)), (1, 2, 3, 8, 16)):
        if distance < shape[axis]:
            near = np.take(mask, range(shape[axis] - distance), axis)
            far = np.take(mask, range(distance, shape[axis]), axis)
            assert_unrelated(near, far, rate)


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_masks_of_other_steps_are_unrelated(rate):
    found = masks(rate, (32, 12, 32, 32), 24)
    for a, b in itertools.combinations(found, 2):
        assert_unrelated(a, b, rate)
    # Nor does a step repeat another one, moved along.
    flat = found.reshape(len(found), -1)
    for shift in (1, 2, 12, 32, 1024):
        assert_unrelated(flat[0, shift:], flat[1, :-shift], rate)


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_keys_that_differ_in_one_bit_have_unrelated_masks(rate):
    words = np.array([0x12345678, 0x9ABCDEF0], np.uint32)
    shape = (1 << 17,)
    first = np.asarray(functional.kept(jnp.asarray(words), shape, rate))
    for bit in range(64):
        other = words.copy()
        other[bit // 32] ^= np.uint32(1 << bit % 32)
        assert_unrelated(first, np.asarray(functional.kept(jnp.asarray(other), shape, rate)), rate)


@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_no_bit_of_an_entrys_number_tells_whether_it_is_kept(rate):
    mask = masks(rate, (1 << 20,), 1)[0]
    numbers = np.arange(mask.size)
    deviation = np.sqrt(rate * (1 - rate) / (mask.size / 2))
    for bit in range(20):
        assert abs(mask[numbers >> bit & 1 == 1].mean() - (1 - rate)) < SIGMAS * deviation


def test_how_many_of_eight_on_end_are_dropped_is_binomial():
    rate, eights = 0.3, 1 << 17
    dropped = (~masks(rate, (eights, 8), 1)[0]).sum(1)
    counts = np.bincount(dropped, minlength=9)
    ways = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1])
    expected = eights * ways * rate ** np.arange(9) * (1 - rate) ** np.arange(8, -1, -1)
    # The chi-square of 8 degrees of freedom has the mean 8 and the deviation 4.
    assert ((counts - expected) ** 2 / expected).sum() < 8 + SIGMAS * 4


def test_each_place_of_a_batch_is_dropped_as_often_as_any_other_over_many_steps():
    rate, steps = 0.1, 2000
    kept = masks(rate, (32, 48), steps).mean(0)
    deviation = np.sqrt(rate * (1 - rate) / steps)
    z = (kept - (1 - rate)) / deviation
    assert abs(z.std() - 1) < 0.1
    assert np.abs(z).max() < SIGMAS


def test_devices_that_have_parts_of_an_array_draw_the_mask_of_the_whole():
    mesh = sharding.make_mesh(8)
    x, key = jnp.ones((16, 4, 6)), jax.random.key(1)
    whole = functional.dropout(x, 0.5, key)
    parts = jax.device_put(x, NamedSharding(mesh, P('data')))
    drop = jax.jit(lambda x: functional.dropout(x, 0.5, key))
    np.testing.assert_array_equal(drop(parts), whole)
    assert 'all-' not in drop.lower(parts).compile().as_text()
