"""What mattered in a search, on studies made up for it."""

import shlex

import pytest

from adapters_jax.tuning import report, space
from adapters_jax.tuning.study import Outcome, Study

SPACE = space.distributions(space.parse(('a=uniform(0,1)', 'b=uniform(0,1)', 'c=x,y')))


def importances(folder, count, score):
    """Return the importances in a random search of `count` trials, scored by a function."""
    with Study(folder / 'study.db', SPACE, 'random', 0, True) as study:
        for number in range(count):
            params = study.ask().params
            study.tell(number, Outcome(score(params), [], 'all steps taken'))
        return report.importances(study, 0)


def test_the_key_that_the_score_follows_explains_it(tmp_path):
    found = importances(tmp_path, 30, lambda params: params['b'])
    assert next(iter(found)) == 'b' and found['b'] > 0.8
    assert found.keys() == SPACE.keys() and sum(found.values()) < 1.001


def test_what_only_two_keys_together_explain_is_the_share_of_neither(tmp_path):
    found = importances(tmp_path, 30, lambda p: (p['a'] > 0.5) ^ (p['b'] > 0.5))
    assert sum(found.values()) < 0.8


@pytest.mark.parametrize(('count', 'score'), [(3, lambda p: p['b']), (5, lambda p: 0.5)])
def test_too_few_trials_or_equal_scores_explain_nothing(tmp_path, count, score):
    assert importances(tmp_path, count, score) == {}


def test_the_command_for_a_member_can_be_pasted():
    config = '--config=configs/again.py:my runs/W/members/trial-0001'
    words = ['python', '-m', 'adapters_jax.train', config, '--workdir=NEW']
    assert shlex.split(report.command('my runs/W', 'trial-0001')) == words
