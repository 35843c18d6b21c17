"""Heads by number: each row's own gives what it does alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_leaf

from adapters_jax.models.heads import HeadBank, HeadConfig, PooledHead
from adapters_jax.params import flatten, map_with_path

# Two kinds that share a program with another head of theirs, and widths that all differ.
HEADS = (
    ('topics', HeadConfig(), 3),
    ('deep', HeadConfig('cls', 3, 'relu'), 5),
    ('score', HeadConfig('pooler'), 1),
    ('judged', HeadConfig(), 2),
    ('shallow', HeadConfig('cls', 3, 'relu'), 4),
)
BANK = HeadBank(HEADS)
ROWS = np.array([2, 4, -1, 0, 3, 1, 0, -1], np.int32)
HIDDEN = np.random.default_rng(0).standard_normal((8, 6, 8)).astype(np.float32)
# Two texts and padding in the first four rows; one text that fills each of the others.
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0]] * 4 + [[1] * 6] * 4, np.int32)
STARTS = np.array([[0, 2]] * 4 + [[0, 0]] * 4, np.int32)
POOLED = (HIDDEN, SEGMENTS, STARTS, jnp.sin)


@functools.cache
def fresh():
    return jax.jit(lambda: BANK.init(jax.random.key(0), 8))()


@pytest.fixture(scope='module')
def params():
    """All heads' parameters, far from their initialisation."""
    rng = np.random.default_rng(1)
    return map_with_path(lambda path, leaf: random_leaf(rng, path, leaf.shape), fresh())


@jax.jit
def together(params, rows):
    """Return the outputs of all rows, each through its own head."""
    return BANK.apply(params, *POOLED, rows, None)


@functools.partial(jax.jit, static_argnums=1)
def alone(params, number):
    """Return the outputs of all rows through one head by itself."""
    name, config, width = HEADS[number]
    variables = {'params': params[name]}
    return PooledHead(config, width).apply(variables, *POOLED, True)


def test_each_row_has_the_outputs_of_its_own_head(params):
    found = together(params, ROWS)
    assert found.shape == (8, 2, 5) == (8, 2, BANK.outputs) and found.dtype == jnp.float32
    for number, (_, _, width) in enumerate(HEADS):
        mine = number == ROWS
        expected = alone(params, number)[mine]
        np.testing.assert_allclose(found[mine][..., :width], expected, atol=1e-5)
        assert np.abs(expected).min() > 1e-3
        assert not found[mine][..., width:].any()
    assert not found[ROWS < 0].any()


@pytest.mark.parametrize('number', range(len(HEADS)))
def test_every_row_may_have_the_same_head(params, number):
    found = together(params, np.full(8, number, np.int32))
    expected = alone(params, number)
    np.testing.assert_allclose(found[..., : HEADS[number][2]], expected, atol=1e-5)


def test_a_head_learns_from_its_own_rows_alone(params):
    rows = np.where(ROWS == 1, -1, ROWS)  # nobody uses the head `deep`

    def whole(tree):
        return (together(tree, rows) ** 2).sum()

    def single(tree, number):
        return (alone(tree, number)[rows == number] ** 2).sum()

    found = jax.jit(jax.grad(whole))(params)
    for number, (name, _, _) in enumerate(HEADS):
        expected = flatten(jax.jit(jax.grad(single), static_argnums=1)(params, number)[name])
        for path, leaf in flatten(found[name]).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found['deep']))
    used = [leaf for name in ('topics', 'score') for leaf in jax.tree.leaves(found[name])]
    assert all(np.abs(leaf).max() > 0.1 for leaf in used)


def test_dropout_needs_a_key_and_is_drawn_for_each_row(params):
    """Each output is twice the number of kept entries, of which there are eight."""
    config = HeadConfig('cls', dropout=0.5)
    bank = HeadBank((('a', config, 2), ('b', config, 1)))
    tree = {
        name: {'dense_0': {'kernel': np.ones((8, n), np.float32), 'bias': np.zeros(n, np.float32)}}
        for name, _, n in bank.heads
    }
    given = (np.ones_like(HIDDEN), *POOLED[1:], np.array([0, 1] * 4, np.int32))
    np.testing.assert_array_equal(bank.apply(tree, *given, None)[..., 0], 8)
    draw = jax.jit(lambda key: bank.apply(tree, *given, key)[..., 0])
    dropped = np.stack([draw(jax.random.key(i)) for i in range(50)])
    assert set(np.unique(dropped)) <= set(range(0, 17, 2))
    assert abs(dropped.mean() - 8) < 5 * np.sqrt(8 / dropped.size)
    assert (dropped[:, 0] != dropped[:, 2]).any() and (dropped[0] != dropped[1]).any()


def test_fresh_heads_have_their_own_sizes_and_weights():
    own = fresh()
    assert {name: own[name][f'dense_{c.layers - 1}']['bias'].shape for name, c, _ in HEADS} == {
        name: (width,) for name, _, width in HEADS
    }
    first, second = (own[name]['dense_0']['kernel'] for name in ('deep', 'shallow'))
    assert first.shape == second.shape and (first != second).mean() > 0.9
