"""What is proposed follows from the seed and from what is on record, and nothing on record goes."""

import itertools

import pytest
from optuna.trial import TrialState

from adapters_jax import files
from adapters_jax.tuning import space, study
from adapters_jax.tuning.study import Outcome, Study

SPACE = space.distributions(
    space.parse(('a=log(1e-4,1)', 'b=int(2,10)', 'c=x,y,z', 'd=uniform(0,1)'))
)


def opened(folder, sampler='tpe', seed=0):
    return Study(folder / 'study.db', SPACE, sampler, seed, True)


def outcome(params):
    """Return what a trial is told; some are pruned, some have no score."""
    score = params['d'] - abs(params['b'] - 6) / 10
    if params['c'] == 'z':
        return Outcome(None, [], 'diverged: the loss of step 3 is nan')
    ended = 'pruned at step 5: below the median' if score < 0 else 'all steps taken'
    return Outcome(score, [(5, score / 2), (10, score)], ended)


def grow(folder, count, batch=4, **options):
    """Go on with a study until it has so many trials; return their values."""
    folder.mkdir(exist_ok=True)
    with opened(folder, **options) as found:
        for numbers in found.batches(batch, count):
            for number in numbers:
                found.tell(number, outcome(found.trials[number].params))
        return values(found)


def values(found):
    return [(t.number, t.state, t.params, t.value, t.intermediate_values) for t in found.trials]


@pytest.mark.parametrize(
    'sampler',
    [pytest.param(s, marks=pytest.mark.slow if s == 'random' else ()) for s in study.SAMPLERS],
)
def test_a_seed_decides_what_is_proposed(tmp_path, sampler):
    whole = grow(tmp_path / 'one', 16, sampler=sampler)
    assert grow(tmp_path / 'two', 16, sampler=sampler) == whole
    assert grow(tmp_path / 'three', 16, sampler=sampler, seed=1) != whole
    assert len({trial[2]['d'] for trial in whole}) == 16


def test_a_study_that_stops_anywhere_goes_on_as_if_it_had_not(tmp_path):
    """Closed and opened again between any two things that it writes."""
    whole = grow(tmp_path / 'whole', 12)
    for first in range(0, 12, 4):
        for _ in range(4):
            with opened(tmp_path) as found:
                found.ask()
        for number in range(first, first + 4):
            with opened(tmp_path) as found:
                assert len(found.trials) == first + 4
                assert len(found.ended) == number
                found.tell(number, outcome(found.trials[number].params))
    with opened(tmp_path) as found:
        assert values(found) == whole


def test_more_trials_come_in_batches_of_their_own(tmp_path):
    few = grow(tmp_path, 6)
    with opened(tmp_path) as found:
        assert list(found.batches(4, 6)) == [range(4), range(4, 6)]
    assert grow(tmp_path, 9)[:6] == few
    with opened(tmp_path) as found:
        assert list(found.batches(4, 9)) == [range(4), range(4, 6), range(6, 9)]
        again = found.batches(4, 20)
        assert list(itertools.islice(again, 4))[-1] == range(9, 13)
    with opened(tmp_path) as found:  # stopped while it was trained
        assert list(found.batches(4, 30))[3:5] == [range(9, 13), range(13, 17)]


def test_trials_that_do_not_say_who_was_proposed_with_them_were_so_by_their_number(tmp_path):
    """Those of an earlier version."""
    with opened(tmp_path) as found:
        for number in range(6):
            found.ask()
            del found.trials[number].user_attrs['last_of_batch']
        assert list(found.batches(4, 9)) == [range(4), range(4, 6), range(6, 9)]


@pytest.mark.parametrize('sampler', study.SAMPLERS)
def test_no_trial_repeats_another_until_all_values_were_tried(tmp_path, sampler):
    few = space.distributions(space.parse(('a=1,2,3', 'b=int(0,2)')))
    with Study(tmp_path / 'study.db', few, sampler, 0, True) as found:
        for number in range(12):
            params = found.ask().params
            found.tell(number, Outcome(int(params['a']) - params['b'], [], 'all steps taken'))
        drawn = [tuple(trial.params.values()) for trial in found.trials]
    assert len(set(drawn[:9])) == 9 and len(drawn) == 12


def test_half_of_an_end_is_none(tmp_path):
    with opened(tmp_path) as found:
        found.ask()
        found._storage.set_trial_intermediate_value(1, 5, 0.25)
    with opened(tmp_path) as found:
        assert found.ended == []
        found.tell(0, Outcome(0.5, [(5, 0.25), (10, 0.5)], 'all steps taken'))
        found.tell(0, Outcome(0.7, [], 'told again'))
    with opened(tmp_path) as found:
        (trial,) = found.ended
        assert (trial.value, trial.intermediate_values) == (0.5, {5: 0.25, 10: 0.5})
        assert trial.user_attrs['finished'] == 'all steps taken'


@pytest.mark.parametrize('name', ['a?b', 'a%20b', 'a{b}#c', 'file:a'])
def test_a_folder_may_have_any_name(tmp_path, name):
    """Studies in several such folders have been one, in a file beside them."""
    folder = tmp_path / name
    folder.mkdir()
    with opened(folder) as found:
        found.ask()
        assert len(found._read()) == 1
    assert [path.name for path in tmp_path.rglob('*')] == [name, 'study.db']


@pytest.mark.parametrize(
    ('score', 'finished', 'expected'),
    [
        (0.5, 'all steps taken', TrialState.COMPLETE),
        (0.5, 'no improvement in 3 evaluations', TrialState.COMPLETE),
        (0.5, 'pruned at step 5: below the median', TrialState.PRUNED),
        (0.5, 'diverged: the loss of step 7 is nan', TrialState.PRUNED),
        (None, 'all steps taken', TrialState.PRUNED),
    ],
)
def test_a_trial_is_complete_if_it_was_trained_to_its_end(score, finished, expected):
    assert Outcome(score, [], finished).state == expected


def test_what_is_told_moves_the_search(tmp_path):
    """After the first ten, TPE proposes what scored well."""
    found = grow(tmp_path, 40)
    first, last = found[:10], found[-10:]
    assert sum(t[2]['c'] == 'z' for t in last) < 4
    mean = [sum(t[2]['d'] for t in part) / 10 for part in (first, last)]
    assert mean[1] > mean[0] + 0.1


def test_a_file_that_is_no_study(tmp_path):
    (tmp_path / 'study.db').write_bytes(b'no database at all' * 1000)
    with pytest.raises(ValueError, match=r'study.db cannot be used .* intact copy of it'):
        opened(tmp_path)


def test_a_file_that_cannot_be_made(tmp_path):
    with pytest.raises(files.DiskError, match=r'absent/study\.db cannot be written'):
        Study(tmp_path / 'absent' / 'study.db', SPACE, 'tpe', 0, True)


@pytest.mark.parametrize(
    ('sampler', 'seed', 'expected'),
    [
        ('bayes', 0, "sweep.sampler is 'bayes'; expected one of tpe, random"),
        ('tpe', -1, 'sweep.seed is -1; expected 0 or more'),
    ],
)
def test_mistakes_are_named(tmp_path, sampler, seed, expected):
    with pytest.raises(ValueError, match=expected):
        opened(tmp_path, sampler, seed)
