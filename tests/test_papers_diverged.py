"""Runs of a protocol that diverge have a score of 0, and keep no others from their report."""

import pytest
from all_papers import paper

from adapters_jax import files
from adapters_jax.training import grid
from adapters_jax.training.run import NonFiniteLossError
from experiments.papers import runner as runners
from experiments.papers.runner import Runner

LOST = 'diverged: the loss of step 2 is nan'


def write_summary(folder, finished):
    values = {'finished': finished, 'primary': 'accuracy', 'metrics': {}, 'seconds': 2.0}
    values |= {'trainable_parameters': 3, 'total_parameters': 9, 'hardware': 'one', 'commit': 'c'}
    if finished != LOST:
        values['metrics'] = {'validation': {'accuracy': 0.5}}
        files.write_json(folder / 'evaluation_test.json', {'metrics': {'accuracy': 0.75}})
    files.write_json(folder / 'summary.json', values)


def all_diverge(config, workdir):
    for member in grid.expand(config):
        folder = files.make_directory(workdir / 'members' / member.name)
        write_summary(folder, LOST)
    raise NonFiniteLossError('all members have no score')


def test_a_cell_of_which_all_runs_diverge_has_scores_of_0(tmp_path, monkeypatch):
    own = Runner(paper('hu2022'), 'small', '', tmp_path, ['cr'])
    monkeypatch.setattr(runners, 'sweep', all_diverge)
    own.train(grid.Shard(0, 1))  # one cell does not keep the others from it
    (found,) = own.rows(next(cell for cell in own.cells if cell.way == 'lora'))
    assert (found.scores, found.validation, found.diverged) == ([0.0] * 3, [0.0] * 3, 6)
    own = Runner(paper('pfeiffer2021'), 'small', '', tmp_path, ['cr'])
    for cell in (cell for cell in own.cells if cell.way == 'adapter'):
        own.rows(cell)
    with pytest.raises(
        ValueError, match=r'begins with adapter on .*, whose run of seed 0 diverged'
    ):
        own.rows(next(cell for cell in own.cells if cell.way == 'fusion'))


def test_a_run_alone_that_diverges_has_a_score_of_0(tmp_path, monkeypatch):
    own, tried = Runner(paper('ruckle2021'), 'small', '', tmp_path, ['cr']), []
    (cell,) = (cell for cell in own.cells if cell.way == 'robust')

    def train(config, workdir):
        tried.append(config.seed)
        files.make_directory(workdir)
        if config.seed != 1:
            raise NonFiniteLossError(LOST)
        write_summary(workdir, 'all steps taken')

    monkeypatch.setattr(runners, 'train', train)
    for _ in range(2):
        (found,) = own.rows(cell)
        assert (found.scores, found.diverged, found.trained) == ([0.0, 0.75, 0.0], 2, 3)
        assert found.spent == 2.0
    assert tried == [0, 1, 2, 1]  # what diverged would diverge again


def test_runs_alone_that_all_diverge_are_told(tmp_path, monkeypatch):
    own = Runner(paper('ruckle2021'), 'small', '', tmp_path, ['cr'])

    def train(config, workdir):
        files.make_directory(workdir)
        raise NonFiniteLossError(LOST)

    monkeypatch.setattr(runners, 'train', train)
    with pytest.raises(ValueError, match='all runs of robust on cr diverged'):
        own.rows(next(cell for cell in own.cells if cell.way == 'robust'))
