"""What mattered in a search, on studies made up for it."""

import itertools
import shlex

import pytest

from adapters_jax.tuning import report, space
from adapters_jax.tuning.study import Outcome, Study

SPACE = space.distributions(space.parse(('a=uniform(0,1)', 'b=uniform(0,1)', 'c=x,y')))


def importances(folder, count, score, drawn=SPACE, seed=0):
    """Return the importances in a random search of `count` trials, scored by a function."""
    with Study(folder / 'study.db', drawn, 'random', seed, True) as study:
        for number in range(count):
            params = study.ask().params
            study.tell(number, Outcome(score(params), [], 'all steps taken'))
        return report.importances(study, seed)


def test_the_key_that_the_score_follows_explains_it(tmp_path):
    found = importances(tmp_path, 30, lambda params: params['b'])
    assert next(iter(found)) == 'b' and found['b'] > 0.8
    assert found.keys() == SPACE.keys() and sum(found.values()) < 1.001


def test_what_only_two_keys_together_explain_is_the_share_of_neither(tmp_path):
    found = importances(tmp_path, 30, lambda p: (p['a'] > 0.5) ^ (p['b'] > 0.5))
    assert sum(found.values()) < 0.8


def test_a_large_seed_is_one_too(tmp_path):
    found = importances(tmp_path, 30, lambda params: params['b'], seed=2**32)
    assert next(iter(found)) == 'b' and found['b'] > 0.8


@pytest.mark.parametrize('unit', [1e-10, 1e200])
def test_the_unit_of_a_score_does_not_matter(tmp_path, unit):
    found = importances(tmp_path, 30, lambda params: unit * params['b'])
    assert next(iter(found)) == 'b' and found['b'] > 0.8


def test_the_unit_of_a_key_does_not_matter(tmp_path):
    small = space.distributions(space.parse(('a=log(1e-9,1e-7)', 'b=uniform(0,1)', 'c=x,y')))
    found = importances(tmp_path, 30, lambda params: 1e7 * params['a'], small)
    assert next(iter(found)) == 'a' and found['a'] > 0.8


def test_scores_that_rounding_alone_tells_apart_explain_nothing(tmp_path):
    assert importances(tmp_path, 5, lambda params: 0.57 + 1e-10 * params['b']) == {}


def test_trials_of_the_same_values_explain_nothing(tmp_path):
    """Only those with one value were trained to their end, and rounding gave them other scores."""
    scores = itertools.count(0.5, 1e-3)
    drawn = space.distributions(space.parse(('c=x,y',)))

    def score(params):
        return None if params['c'] == 'y' else next(scores)

    assert importances(tmp_path, 16, score, drawn) == {}


@pytest.mark.parametrize(('count', 'score'), [(3, lambda p: p['b']), (5, lambda p: 0.5)])
def test_too_few_trials_or_equal_scores_explain_nothing(tmp_path, count, score):
    assert importances(tmp_path, count, score) == {}


def test_the_command_for_a_member_can_be_pasted():
    config = '--config=configs/again.py:my runs/W/members/trial-0001'
    words = ['python', '-m', 'adapters_jax.train', config, '--workdir=NEW']
    assert shlex.split(report.command('my runs/W', 'trial-0001')) == words
