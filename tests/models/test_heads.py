import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_leaf

from adapters_jax.models.heads import HeadConfig, PooledHead, first_token, init_head, mean_pool
from adapters_jax.params import map_with_path

HIDDEN = np.random.default_rng(0).standard_normal((2, 6, 8)).astype(np.float32)
# Two texts and padding in the first row; one text that fills the second.
SEGMENTS = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
STARTS = np.array([[0, 2], [0, 0]], np.int32)
MEANS = np.stack(
    [
        [HIDDEN[0, :2].mean(0), HIDDEN[0, 2:5].mean(0)],
        [HIDDEN[1].mean(0), np.zeros(8)],
    ]
)
FIRSTS = np.stack([[HIDDEN[0, 0], HIDDEN[0, 2]], [HIDDEN[1, 0], HIDDEN[1, 0]]])


def test_mean_pooling_is_over_each_text_and_an_empty_place_is_zero():
    np.testing.assert_allclose(mean_pool(HIDDEN, SEGMENTS, 2), MEANS, atol=1e-6)


def test_mean_pooling_of_low_precision_states_is_exact():
    hidden = jnp.asarray(np.random.default_rng(0).random((1, 301, 4)), jnp.bfloat16)
    segments = np.ones((1, 301), np.int32)
    exact = np.asarray(hidden, np.float64).mean(1)
    np.testing.assert_allclose(mean_pool(hidden, segments, 1)[:, 0], exact, atol=1e-6)


def test_the_first_token_is_where_the_text_starts():
    np.testing.assert_array_equal(first_token(HIDDEN, STARTS), FIRSTS)


def numpy_head(params, x, layers):
    for i in range(layers):
        dense = params[f'dense_{i}']
        x = x @ dense['kernel'] + dense['bias']
        x = np.tanh(x) if i < layers - 1 else x
    return x


@pytest.mark.parametrize('layers', [1, 3])
@pytest.mark.parametrize('pooling', ['mean', 'cls', 'pooler'])
def test_a_head_pools_and_projects(pooling, layers):
    head = PooledHead(HeadConfig(pooling, layers), 5)
    rng = np.random.default_rng(1)
    params = map_with_path(
        lambda path, leaf: random_leaf(rng, path, leaf.shape),
        init_head(head, jax.random.key(0), 8),
    )
    x = {'mean': MEANS, 'cls': FIRSTS, 'pooler': np.sin(FIRSTS)}[pooling]
    outputs = head.apply({'params': params}, HIDDEN, SEGMENTS, STARTS, jnp.sin, True)
    assert outputs.shape == (2, 2, 5)
    np.testing.assert_allclose(outputs, numpy_head(params, x, layers), atol=1e-5)


def test_outputs_are_float32_whatever_the_states_are():
    head = PooledHead(HeadConfig('cls'), 2)
    params = init_head(head, jax.random.key(0), 8)
    low = jnp.asarray(HIDDEN, jnp.bfloat16)
    assert head.apply({'params': params}, low, SEGMENTS, STARTS, jnp.sin, True).dtype == jnp.float32


def test_dropout_precedes_every_layer_and_needs_a_key():
    head = PooledHead(HeadConfig('cls', layers=1, dropout=0.5), 2)
    params = {'dense_0': {'kernel': np.ones((8, 2), np.float32), 'bias': np.zeros(2, np.float32)}}
    ones = np.ones_like(HIDDEN)

    def outputs(key=None):
        rngs = {} if key is None else {'dropout': jax.random.key(key)}
        return head.apply(
            {'params': params}, ones, SEGMENTS, STARTS, jnp.sin, key is None, rngs=rngs
        )

    np.testing.assert_array_equal(outputs(), 8.0)
    dropped = np.stack([outputs(key) for key in range(50)])
    # Each output is twice the number of kept entries, of which there are eight.
    assert set(np.unique(dropped)) <= set(range(0, 17, 2))
    assert abs(dropped.mean() - 8) < 5 * np.sqrt(8 / 200)


def test_a_fresh_head_is_small_and_as_wide_as_asked():
    params = init_head(PooledHead(HeadConfig(layers=2), 3), jax.random.key(0), 8)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        'dense_0': {'kernel': (8, 8), 'bias': (8,)},
        'dense_1': {'kernel': (8, 3), 'bias': (3,)},
    }
    assert 0.01 < params['dense_0']['kernel'].std() < 0.03


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'pooling': 'max'}, r"head.pooling is 'max'; expected one of \('mean', 'cls', 'pooler'\)"),
        ({'layers': 0}, 'head.layers is 0; expected a whole number, 1 or more'),
        ({'layers': 1.5}, r'head.layers is 1\.5; expected a whole number'),
        ({'dropout': 1.0}, r'head.dropout is 1.0; expected a number in \[0, 1\)'),
        ({'activation': 'tahn'}, "unknown activation 'tahn'; known: .*tanh"),
    ],
)
def test_a_head_that_cannot_be_built_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        HeadConfig(**options)


def test_json_brings_a_head_back():
    config = HeadConfig('cls', 2, 'relu', 0.25)
    assert HeadConfig(**config.to_json()) == config
