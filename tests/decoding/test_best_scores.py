"""The best of many scores are found in two stages, and are those that one stage finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapters_jax.decoding.search import best


@pytest.mark.parametrize('width', [5, 31, 32, 33, 64, 320, 321, 1000])
@pytest.mark.parametrize('distinct', [2, 30, 10**6])
def test_the_best_are_those_of_a_sort(width, distinct):
    rng = np.random.default_rng(width)
    scores = rng.integers(0, distinct, (20, width)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    scores[:3] = -np.inf
    scores[1, width // 2] = 0  # a word that is forced leaves one score
    for count in (1, 4, min(10, width)):
        if count > width:
            continue
        values, where = best(jnp.asarray(scores), count)
        expected = np.argsort(-scores, axis=-1, kind='stable')[:, :count]
        np.testing.assert_array_equal(where, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=1))


def test_what_is_no_whole_group_is_padded_behind_all():
    scores = jnp.full((1, 33), -jnp.inf)
    for group in (2, 4, 8):
        _, where = jax.jit(lambda x, group=group: best(x, 3, group))(scores)
        assert where.tolist() == [[0, 1, 2]]
