"""TIES, DARE and pruning by magnitude compute what `peft` computes, on the same numbers."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from adapters_jax.adapters import arithmetic, sparsify

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
KEY = jax.random.key(3)
CASES = st.tuples(
    st.integers(0, 10_000),
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.25, 0.5, 0.77, 0.999]),
)


def draw(seed, count):
    """Return so many random adapters of one leaf, in numpy and in torch."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((4, 7)).astype(np.float32) for _ in range(count)]
    return [{'x': {'b': array}} for array in arrays], [torch.tensor(array) for array in arrays]


def assert_equal(tree, expected):
    np.testing.assert_allclose(tree['x']['b'], expected.numpy(), rtol=1e-5, atol=2e-6)


@QUICK
@given(CASES)
def test_pruning_by_magnitude(case):
    seed, weights, density = case
    trees, tensors = draw(seed, len(weights))
    expected = merge_utils.magnitude_prune(tensors, torch.tensor(weights), density)
    assert_equal(sparsify.magnitude_prune(trees, weights, density), expected)
    assert_equal(
        sparsify.trim(trees[0], density), merge_utils.prune(tensors[0], density, 'magnitude')
    )


@QUICK
@given(CASES, st.sampled_from(['total', 'frequency']))
def test_ties(case, elect):
    seed, weights, density = case
    trees, tensors = draw(seed, len(weights))
    expected = merge_utils.ties(tensors, torch.tensor(weights), density, elect)
    assert_equal(sparsify.ties(trees, weights, density, elect), expected)


def masks(shape, count, density):
    """Return the masks that `sparsify` draws for the leaf `x/b` of so many adapters."""
    ones = {'x': {'b': np.ones(shape, np.float32)}}
    keys = [jax.random.fold_in(KEY, i) for i in range(count)]
    dropped = [sparsify.drop(ones, density, key)['x']['b'] for key in keys]
    return [torch.tensor((mask != 0).astype(np.float32)) for mask in dropped]


@QUICK
@given(CASES, st.sampled_from(['total', 'frequency', None]))
def test_dare_with_the_same_mask(case, elect):
    seed, weights, density = case
    trees, tensors = draw(seed, len(weights))
    with mock.patch('torch.bernoulli', side_effect=masks((4, 7), len(weights), density)):
        if elect is None:
            expected = merge_utils.dare_linear(tensors, torch.tensor(weights), density)
            found = sparsify.dare_linear(trees, weights, density, KEY)
        else:
            expected = merge_utils.dare_ties(tensors, torch.tensor(weights), density, elect)
            found = sparsify.dare_ties(trees, weights, density, KEY, elect)
    assert_equal(found, expected)


def test_what_is_dropped_depends_on_key_adapter_and_leaf():
    ones = np.ones((40, 50), np.float32)
    tree = {'x': {'a': ones, 'b': ones}}
    dropped = sparsify.drop(tree, 0.25, KEY)['x']
    assert set(np.unique(dropped['a'])) == {0.0, 4.0}
    assert 0.2 < (dropped['a'] != 0).mean() < 0.3
    assert not np.array_equal(dropped['a'], dropped['b'])
    again = sparsify.drop({'x': {'a': ones}}, 0.25, KEY)['x']
    np.testing.assert_array_equal(dropped['a'], again['a'])
    merged = sparsify.dare_linear([tree, tree], [1.0, 1.0], 0.25, KEY)['x']['a']
    assert set(np.unique(merged)) == {0.0, 4.0, 8.0}


def test_dropping_keeps_the_mean():
    tree = {'b': np.full((300, 300), 2.0, np.float32)}
    assert abs(sparsify.drop(tree, 0.3, KEY)['b'].mean() - 2) < 0.05


def test_trimming_a_whole_adapter_at_once():
    tree = {'a': np.array([9.0, -1.0, 8.0], np.float32), 'b': np.array([[0.5, -7.0]], np.float32)}
    found = sparsify.trim(tree, 0.6, whole=True)
    np.testing.assert_array_equal(found['a'], [9, 0, 8])
    np.testing.assert_array_equal(found['b'], [[0, -7]])
    apart = sparsify.trim(tree, 0.6)
    np.testing.assert_array_equal(apart['a'], [9, 0, 0])
    np.testing.assert_array_equal(apart['b'], [[0, -7]])
    merged = sparsify.ties([tree, tree], [2.0, 2.0], 0.6, whole=True)
    np.testing.assert_array_equal(merged['a'], [18, 0, 16])
    pruned = sparsify.magnitude_prune([tree], [1.0], 0.6, whole=True)
    np.testing.assert_array_equal(pruned['a'], [9, 0, 8])


def test_ties_by_hand():
    """Two adapters agree on the first entry; on the second the larger one wins, alone."""
    trees = [{'b': np.array([2.0, -3.0, 1.0])}, {'b': np.array([4.0, 1.0, 0.0])}]
    found = sparsify.ties(trees, [1.0, 1.0], 1.0)
    np.testing.assert_array_equal(found['b'], [3.0, -3.0, 1.0])


def test_full_density_changes_nothing():
    trees, _ = draw(0, 2)
    expected = arithmetic.add(trees, [0.5, 0.5])['x']['b']
    for found in (
        sparsify.magnitude_prune(trees, [0.5, 0.5], 1.0),
        sparsify.dare_linear(trees, [0.5, 0.5], 1.0, KEY),
    ):
        np.testing.assert_array_equal(found['x']['b'], expected)


def test_half_precision_and_constants_stay_as_they_are():
    tree = {
        'constants': {'a': jnp.full(4, 3.0)},
        'layer_0': {'b': jnp.array([1.0, -2.0, 0.5], jnp.bfloat16)},
    }
    merges = [
        sparsify.ties([tree, tree], [1.0, 1.0], 0.5),
        sparsify.dare_ties([tree, tree], [1.0, 1.0], 0.5, KEY),
        sparsify.trim(tree, 0.5),
    ]
    for merged in merges:
        np.testing.assert_array_equal(merged['constants']['a'], np.full(4, 3.0))
        assert merged['layer_0']['b'].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merges[0]['layer_0']['b'], [0, -2, 0])


def test_densities_and_votes_that_mean_nothing():
    trees, _ = draw(0, 2)
    with pytest.raises(ValueError, match=re.escape('density=1.5 is not a share')):
        sparsify.trim(trees[0], 1.5)
    with pytest.raises(ValueError, match=re.escape('density=0 is not a probability')):
        sparsify.drop(trees[0], 0, KEY)
    with pytest.raises(ValueError, match="elect='mean' is unknown; expected 'total' or 'freq"):
        sparsify.ties(trees, [1, 1], 0.5, 'mean')
