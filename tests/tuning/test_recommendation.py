"""The rule of the recommendation, on numbers made up for it."""

import pytest

from adapters_jax.config import base
from adapters_jax.training import grid
from adapters_jax.tuning import choose
from adapters_jax.tuning.choose import Candidate


def candidate(method, score, parameters, flops=1.0, ended=True, steps=100):
    settings = {'optimizer.learning_rate': 1e-3}
    return Candidate(method, f'{method}-1', settings, score, steps, ended, parameters, flops)


LARGE = candidate('large', 0.90, 9000, 1.2)
SMALL = candidate('small', 0.895, 900, 1.3)
TINY = candidate('tiny', 0.80, 90, 1.0)
LEAN = candidate('lean', 0.89, 5000, 1.1)
GONE = candidate('gone', 0.99, 10, 1.0, ended=False, steps=25)
ALL = [LARGE, SMALL, LEAN, TINY, GONE]


@pytest.mark.parametrize(
    ('margin', 'cost', 'expected'),
    [
        (0.0, 'parameters', LARGE),
        (0.01, 'parameters', SMALL),
        (0.01, 'inference', LEAN),
        (0.2, 'parameters', TINY),
    ],
)
def test_the_cheapest_within_the_margin_of_those_trained_to_the_end(margin, cost, expected):
    assert choose.recommend(ALL, margin, cost, True) is expected


@pytest.mark.parametrize(('best', 'other', 'margin'), [(0.52, 0.47, 0.05), (0.51, 0.41, 0.1)])
def test_exactly_the_margin_worse_is_as_good(best, other, margin):
    for sign in (1, -1):
        found = [candidate('best', sign * best, 900), candidate('other', sign * other, 90)]
        assert choose.recommend(found, margin, 'parameters', sign > 0).method == 'other'
        assert choose.recommend(found, margin - 1e-4, 'parameters', sign > 0).method == 'best'


def test_where_lower_is_better():
    found = [candidate('a', 0.30, 900), candidate('b', 0.31, 90), candidate('c', 0.5, 9)]
    assert choose.recommend(found, 0.02, 'parameters', False).method == 'b'
    assert [c.method for c in choose.frontier(found, False)] == ['c', 'b', 'a']


def test_equals_are_told_apart_by_the_other_cost_and_then_by_name():
    one, other = candidate('b', 0.9, 90, 1.2), candidate('a', 0.9, 90, 1.1)
    assert choose.recommend([one, other], 0.0, 'parameters', True) is other
    twin = candidate('c', 0.9, 90, 1.1)
    assert choose.recommend([twin, other], 0.0, 'inference', True) is other


def test_where_none_was_trained_to_the_end_the_best_is_taken():
    assert choose.recommend([GONE], 0.1, 'parameters', True) is GONE
    assert 'no method was trained to the end' in choose.reason(GONE, [GONE], base(), 'accuracy')


def test_the_frontier_is_of_those_trained_to_the_end():
    assert choose.frontier(ALL, True) == [TINY, SMALL, LARGE]


def test_each_method_is_judged_by_its_best_member_trained_to_the_end():
    members = [
        candidate('a', 0.95, 9, ended=False, steps=25),
        candidate('a', 0.7, 9),
        candidate('a', 0.8, 9),
        candidate('b', 0.9, 9, ended=False, steps=25),
        candidate('b', 0.6, 9, ended=False, steps=50),
        candidate('c', None, 9, ended=False, steps=3),
        candidate('d', 0.85, 9, steps=60),  # stopped early, where it no longer improved
    ]
    found = choose.best_of_each(members, True)
    assert [(c.method, c.score) for c in found] == [
        ('d', 0.85),
        ('a', 0.8),
        ('b', 0.6),
        ('c', None),
    ]


@pytest.mark.parametrize(
    ('key', 'value', 'expected'),
    [
        ('cost', 'time', "sweep.cost is 'time'; expected one of parameters, inference"),
        ('margin', -0.1, 'sweep.margin is -0.1; expected 0 or more'),
        ('margin', float('nan'), 'sweep.margin is nan; expected 0 or more'),
    ],
)
def test_mistakes_are_named(key, value, expected):
    config = base()
    config.sweep[key] = value
    with pytest.raises(ValueError, match=expected):
        choose.check(config, [])


@pytest.mark.parametrize(
    ('axis', 'told'),
    [
        ('backbone=a,b', 'backbone'),
        ('head.layers=1,2', 'head.layers'),
        ('task.mask_rate=0.1,0.2', 'task.mask_rate'),
        ('data.max_length=64,128', 'data.max_length'),
        ("data.preprocess=(),('lower',)", 'data.preprocess'),
        ('training.dtype=float32,bfloat16', 'training.dtype'),
        ('optimizer.learning_rate=1e-3,1e-2', ''),
        ('training.steps=10,20', ''),
        ('data.seed=0,1', ''),
    ],
)
def test_members_differ_in_nothing_that_costs_but_the_method(axis, told):
    config = base()
    config.sweep.grid = ('method=head,ia3', axis, 'seed=0,1')
    members = grid.expand(config)
    choose.check(config, members)
    config.sweep.recommend = True
    if not told:
        choose.check(config, members)
        return
    with pytest.raises(ValueError, match=f'the members differ in {told} too, on which'):
        choose.check(config, members)
