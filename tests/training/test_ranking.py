"""Members in order of merit: who was trained to the end comes first, and is in the mean."""

import pytest

from adapters_jax.training import ranking
from adapters_jax.training.ranking import Row

ENDED, PRUNED, DIVERGED = (
    'all steps taken',
    'pruned at step 4: below',
    'diverged: the loss of step 6',
)


def row(name, score, state=ENDED, steps=16, rate=0.1, seed=0):
    return Row(name, {'rate': rate, 'seed': seed}, score, steps, steps, state)


def names(rows):
    return ''.join(row.name for row in rows)


@pytest.mark.parametrize(('higher', 'order'), [(True, 'badcn'), (False, 'abcdn')])
def test_who_was_trained_to_the_end_comes_first(higher, order):
    rows = [
        row('n', None, DIVERGED),
        row('c', 0.8, PRUNED),
        row('d', 0.9, DIVERGED),  # after its first evaluation
        row('a', 0.5),
        row('b', 0.6, 'no improvement in 2 evaluations'),
    ]
    assert names(ranking.rank(rows, higher)) == order


def test_the_mean_is_of_those_trained_to_the_end():
    rows = [
        row('a', 0.9, PRUNED, 4),
        row('b', 0.5, seed=1),
        row('c', 0.7, seed=2),
        row('d', None, DIVERGED, 5, seed=3),
        row('e', 0.8, PRUNED, 4, rate=0.2),
        row('f', 0.6, PRUNED, 8, rate=0.2, seed=1),
    ]
    one, other = ranking.over_seeds(rows, True)
    assert one['scores'] == [0.5, 0.7] and one['mean'] == pytest.approx(0.6)
    assert (one['whole'], one['pruned'], one['diverged']) == (2, 1, 1)
    # With the same mean, but of fewer steps; and these are not of the same step.
    assert (other['scores'], other['deviation'], other['whole']) == ([0.6], None, 0)
    head, first, second = ranking.text([one, other], 'accuracy').splitlines()
    assert head.split() == ['rate', 'accuracy', 's.d.', 'runs', 'pruned', 'diverged']
    assert first.split()[-3:] == ['4', '1', '1'] and second.split()[-3:] == ['2', '2', '0']


def test_a_setting_without_any_score():
    (found,) = ranking.over_seeds([row('a', None, DIVERGED)], True)
    assert (found['mean'], found['scores'], found['diverged']) == (None, [], 1)
