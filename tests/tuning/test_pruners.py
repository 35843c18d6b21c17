"""Who goes on: functions of the scores alone."""

import optuna
import pytest

from adapters_jax.config import base
from adapters_jax.tuning import pruning
from adapters_jax.tuning.pruning import Rule


def ended(number, *scores, state=optuna.trial.TrialState.COMPLETE, total=0):
    values = dict(scores)
    last = scores[-1][1] if scores else None
    trial = optuna.trial.create_trial(
        state=state,
        value=last,
        intermediate_values=values,
        user_attrs={pruning.TOTAL_STEPS: total} if total else {},
    )
    trial.number = number
    return trial


def at(step, **scores):
    return {name: [(step, score)] for name, score in scores.items()}


def test_rungs():
    assert Rule('halving', 2.0, 0.25, True).shares == [0.25, 0.5]
    assert Rule('halving', 3.0, 1 / 9, True).shares == pytest.approx([1 / 9, 1 / 3])
    assert Rule('none', 2.0, 0.25, True).shares == []


@pytest.mark.parametrize(('higher', 'kept'), [(True, {'b', 'c'}), (False, {'a', 'c'})])
def test_the_best_half_is_kept(higher, kept):
    scores = {'a': 0.1, 'b': 0.9, 'c': 0.5, 'lost': None}
    assert pruning.keep(scores, 2.0, higher) == kept


def test_of_equals_the_first_are_kept_and_one_without_a_score_never():
    assert pruning.keep(dict.fromkeys('abcd', 0.5), 2.0, True) == {'a', 'b'}
    assert pruning.keep({'a': 0.5, 'b': None}, 1.01, True) == {'a'}
    assert pruning.keep({}, 2.0, True) == set()


def test_the_best_score_until_a_step():
    scores = [(5, 0.3), (15, 0.2), (20, 0.9)]
    assert pruning.best_until(scores, 15, True) == 0.3
    assert pruning.best_until(scores, 15, False) == 0.2
    assert pruning.best_until(scores, 4, True) is None


def test_below_the_median_of_the_others_and_of_those_before():
    rule = Rule('median', 2.0, 0.2, True)
    members = at(20, a=0.1, b=0.5, c=0.6, d=0.7, e=0.8, f=0.9)
    found = pruning.prune(rule, [], members, list(members), 100)
    assert found == dict.fromkeys('abc', 'pruned at step 20: below the median')
    # Five others are the least that a median is taken of, and before a fifth nobody ends.
    few = {name: members[name] for name in 'abcde'}
    assert pruning.prune(rule, [], few, list(few), 100) == {}
    assert pruning.prune(rule, [], members, list(members), 101) == {}
    before = [ended(i, (20, 0.05), (100, 0.9)) for i in range(6)]
    assert pruning.prune(rule, before, few, list(few), 100) == {}
    assert set(pruning.prune(rule, [ended(9, (20, 1.0))], few, list(few), 100)) == {'a', 'b', 'c'}


def test_the_median_is_of_the_pruned_of_earlier_populations_too():
    rule = Rule('median', 2.0, 0.2, True)
    pruned = [ended(i, (20, 0.9), state=optuna.trial.TrialState.PRUNED) for i in range(5)]
    members = at(20, a=0.1, b=0.95)
    assert set(pruning.prune(rule, pruned, members, ['a', 'b'], 100)) == {'a'}
    lost = [ended(i, state=optuna.trial.TrialState.PRUNED) for i in range(5)]
    assert pruning.prune(rule, lost, members, ['a', 'b'], 100) == {}


def test_where_lower_is_better_the_median_is_an_upper_bound():
    rule = Rule('median', 2.0, 0.1, False)
    members = at(20, a=0.1, b=0.5, c=0.6, d=0.7, e=0.8, f=0.9)
    members['without'] = []
    found = pruning.prune(rule, [], members, list(members), 100)
    assert set(found) == {'d', 'e', 'f'}


def test_halving_decides_at_the_first_evaluation_after_a_rung():
    rule = Rule('halving', 2.0, 0.25, True)
    members = {'a': [(20, 0.9), (30, 0.9)], 'b': [(20, 0.1), (30, 0.2)]}
    found = pruning.prune(rule, [], members, ['a', 'b'], 100)
    assert found == {'b': 'pruned at step 30: not among the best 1/2'}
    later = {name: [*scores, (40, 0.5)] for name, scores in members.items()}
    assert pruning.prune(rule, [], later, ['a', 'b'], 100) == {}
    assert pruning.prune(rule, [], members, [], 100) == {}
    assert pruning.prune(rule, [], {'a': []}, ['a'], 100) == {}


def test_halving_compares_with_all_that_came_as_far():
    rule = Rule('halving', 2.0, 0.25, True)
    better = [ended(i, (25, 0.95)) for i in range(4)]
    short = [ended(i, (10, 0.95)) for i in range(4)]
    members = at(25, a=0.9, b=0.1)
    assert set(pruning.prune(rule, better, members, ['a', 'b'], 100)) == {'a', 'b'}
    assert set(pruning.prune(rule, short, members, ['a', 'b'], 100)) == {'b'}
    later = [ended(i, (50, 0.95)) for i in range(4)]  # evaluated less often
    assert set(pruning.prune(rule, later, members, ['a', 'b'], 100)) == {'b'}


def test_rungs_are_shares_of_the_steps_whatever_floats_say():
    rule = Rule('halving', 3.0, 0.1, True)  # 0.1 * 3 is more than 0.3
    assert set(pruning.prune(rule, [], at(30, a=0.9, b=0.1), ['a', 'b'], 100)) == {'b'}
    median = Rule('median', 2.0, 0.55, True)
    members = at(55, a=0.1, b=0.5, c=0.6, d=0.7, e=0.8, f=0.9)
    assert set(pruning.prune(median, [], members, list(members), 100)) == {'a', 'b', 'c'}


def test_two_rungs_before_one_evaluation_are_decided_one_after_the_other():
    rule = Rule('halving', 2.0, 0.25, True)
    members = {name: [(50, float(i))] for i, name in enumerate('abcdefgh')}
    assert set(pruning.prune(rule, [], members, list(members), 100)) == set('abcdef')


def test_trials_of_other_lengths_are_compared_after_the_same_share_of_their_steps():
    rule = Rule('halving', 2.0, 0.25, True)
    scores = [[(25, 0.8), (50, 0.9)], [(25, 0.8), (50, 0.9)], [(25, 0.6)], [(25, 0.61)]]
    before = [ended(i, *each, total=100) for i, each in enumerate(scores)]
    for total in (100, 200):
        member = at(total // 4, a=0.85)
        assert pruning.prune(rule, before, member, ['a'], total) == {}
        assert set(pruning.prune(rule, before, at(total // 4, a=0.6), ['a'], total)) == {'a'}


@pytest.mark.parametrize(
    ('key', 'value', 'expected'),
    [
        ('pruner', 'best', "sweep.pruner is 'best'; expected one of none, median, halving"),
        ('reduction', 1.0, 'sweep.reduction is 1.0; expected a number above 1'),
        ('grace', 1.0, r'sweep.grace is 1.0; expected a share of the steps in \(0, 1\)'),
    ],
)
def test_mistakes_are_named(key, value, expected):
    config = base()
    config.sweep[key] = value
    with pytest.raises(ValueError, match=expected):
        pruning.rule_of(config)
