"""A sweep of which nothing can be ranked says why, and what might help."""

import re

import pytest

from adapters_jax.training.ranking import Row
from adapters_jax.training.run import NonFiniteLossError
from adapters_jax.tuning import results


def rows(*states):
    return [Row(f'm{i}', {}, None, 0, 0, state) for i, state in enumerate(states)]


def test_why_there_is_no_score_decides_what_is_advised():
    impossible = 'not possible: training.batch_size is 16, which does not divide'
    with pytest.raises(
        ValueError, match=re.escape(f'(m0: {impossible}); try other values')
    ) as told:
        results._refuse_none(rows(impossible))
    assert 'learning_rate' not in str(told.value) and 'diverged' not in str(told.value)
    with pytest.raises(NonFiniteLossError, match=r'all 2 members .* have no score .*learning_rate'):
        results._refuse_none(rows(impossible, 'diverged: the loss of step 3 is nan'))
