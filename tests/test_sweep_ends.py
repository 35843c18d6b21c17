"""Members of a grid that end before their steps do, or that could never take them."""

import json

import pytest
import test_sweep
import toy

from adapters_jax.sweep import sweep
from adapters_jax.tuning import populations

config = test_sweep.config

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone and texts."""
    folder = tmp_path_factory.mktemp('ends')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 160)
    return folder


def test_one_that_diverges_in_its_first_step_took_none(toys, tmp_path):
    given = config(toys, 'optimizer.learning_rate=1e-3,1e38', optimizer__clip_norm=0.0)
    given.optimizer.warmup, given.training.evaluate_every, given.training.steps = 0.0, 1, 4
    result = sweep(given, tmp_path / 'w')
    lost = result['members'][-1]
    assert lost['state'].startswith('diverged: ') and lost['steps'] == 0
    read = [
        json.loads((tmp_path / 'w' / 'members' / row['name'] / 'summary.json').read_text())
        for row in result['members']
    ]
    assert [summary['total_steps'] for summary in read] == [4, 4]
    assert 0 < read[1]['seconds'] < read[0]['seconds']


def test_a_schedule_that_the_steps_are_too_few_for_is_refused_before_any_step(toys, tmp_path):
    given = config(toys, 'method=head,adalora[r=2,target_r=1,tinit=50]', training__steps=4)
    with pytest.raises(ValueError, match='tinit=50'):
        sweep(given, tmp_path / 'w')
    assert not (tmp_path / 'w' / 'members').exists()


@pytest.mark.parametrize(
    'options',
    [
        {'sweep__grid': ('seed=0,1',)},
        {'sweep__grid': ('seed=0,1',), 'sweep__pruner': 'halving'},
        {'sweep__space': ('seed=0,1',), 'sweep__trials': 2},
    ],
    ids=['grid', 'halving', 'search'],
)
def test_files_that_the_system_does_not_allow_are_no_trial_s_mistake(
    toys, tmp_path, monkeypatch, options
):
    """Nothing is put on record: where more are allowed, or in parts, the same command goes on."""
    monkeypatch.setattr(populations, '_FILES_OPEN', 2**40)
    given = toy.change(config(toys, training__steps=2), **options)
    with pytest.raises(ValueError, match=r'files would be open at once.*let sweep.size say'):
        sweep(given, tmp_path / 'w')
    monkeypatch.undo()
    assert all(row['score'] is not None for row in sweep(given, tmp_path / 'w')['members'])
