import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax.data.shares import SCHEDULES, Mixing, apportion, interleave

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=7).filter(any)


@settings(deadline=None)
@given(COUNTS)
def test_every_beginning_of_an_order_has_each_tasks_share_to_less_than_one(counts):
    order = interleave(np.array(counts))
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    had = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    wanted = np.arange(1, len(order) + 1)[:, None] * np.array(counts) / sum(counts)
    tasks = np.count_nonzero(counts)
    assert np.abs(had - wanted).max() <= (1 - 1 / (2 * tasks - 2) if tasks > 1 else 0) + 1e-9


@given(COUNTS, st.integers(0, 40))
def test_apportioned_counts_have_the_sum_and_are_next_to_the_quotas(weights, total):
    quotas = total * np.array(weights) / sum(weights)
    counts = apportion(quotas, total)
    assert counts.sum() == total and counts.min() >= 0
    assert np.abs(counts - quotas).max() < 1


def test_what_a_task_had_too_much_is_taken_off_first():
    assert apportion(np.array([-0.7, 1.4, 2.3]), 3).tolist() == [0, 1, 2]
    assert apportion(np.array([-0.9, 1.05, 2.75, -0.9]), 2).tolist() == [0, 0, 2, 0]


SIZES = np.array([2490, 5749, 67349])


@pytest.mark.parametrize(
    ('schedule', 'epoch', 'power'),
    [
        ('proportional', 3, 1.0),
        ('uniform', 3, 0.0),
        ('temperature', 3, 1 / 4),
        ('annealed', 0, 1.0),
        ('annealed', 2, 0.6),
        ('annealed', 4, 0.2),
        ('annealed', 9, 0.2),
    ],
)
def test_shares_are_powers_of_the_sizes(schedule, epoch, power):
    mixing = Mixing(schedule, temperature=4.0, epochs=5)
    wanted = SIZES.astype(float) ** power
    np.testing.assert_allclose(mixing.of(SIZES, epoch), wanted / wanted.sum(), rtol=1e-12)


def test_shares_can_be_given_and_are_averaged_over_the_epochs():
    given_shares = Mixing('shares', shares=(1.0, 1.0, 2.0))
    np.testing.assert_allclose(given_shares.of(SIZES, 7), [0.25, 0.25, 0.5])
    annealed = Mixing('annealed', epochs=3)
    each = [annealed.of(SIZES, epoch) for epoch in range(3)]
    np.testing.assert_allclose(annealed.average(SIZES), np.mean(each, axis=0))
    # A single epoch of annealing is its first: there is nothing to anneal towards.
    once = Mixing('annealed', epochs=1)
    np.testing.assert_allclose(once.of(SIZES, 0), Mixing('proportional').of(SIZES, 0))


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'schedule': 'often'}, f"'often'; expected one of {', '.join(SCHEDULES)}"),
        ({'temperature': 0.0}, 'temperature is 0.0; expected more than 0'),
        ({'steps': -1}, 'steps is -1; expected 0 or more'),
        ({'schedule': 'shares', 'shares': (1.0, 0.0)}, 'each must be above 0'),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(Mixing(), **wrong)
