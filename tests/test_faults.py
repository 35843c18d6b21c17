"""The campaign of faults, in small: it injects what it says, and sees what is lost or wrong."""

import json
import random
import shutil

import pytest

from adapters_jax.interop import adapter_folder
from experiments.commands import Command, Finished
from experiments.faults import __main__ as command
from experiments.faults import injections, report, runs
from experiments.faults.campaign import Campaign


def campaign(folder, count, monkeypatch, *names, seed=0, kinds=runs.KINDS[:1]):
    chosen = {name: injections.FAULTS[name] for name in names or injections.FAULTS}
    monkeypatch.setattr('experiments.faults.campaign.FAULTS', chosen)
    return Campaign(folder, count, seed, kinds).run(2) | {
        'hardware': 'a machine',
        'commit': 'a' * 12,
    }


@pytest.mark.slow
def test_three_faults_lose_nothing(tmp_path, monkeypatch):
    names = ['SIGKILL in the writing of a checkpoint', 'full disk']
    names += ['newest checkpoint: a bit flipped']
    result = campaign(tmp_path, 3, monkeypatch, *names)
    records = [record for trial in result['trials'] for record in trial['faults']]
    assert sorted(record['fault'] for record in records) == sorted(names)
    assert not [record for record in records if record['surprises']], records
    sums = report.totals(result)
    assert sums['injected'] >= 2 and not sums['lost'] and not sums['wrong']
    assert f'| all | {sums["injected"]} | {sums["injected"]} |  | 0 | 0 |' in report.render(result)
    assert not list((tmp_path / 'trials').iterdir())


@pytest.mark.slow
def test_forty_faults_in_every_kind_of_run_lose_nothing(tmp_path, monkeypatch):
    result = campaign(tmp_path, 42, monkeypatch, seed=1, kinds=runs.KINDS)
    sums = report.totals(result)
    assert sums['injected'] >= 36 and sums['ended as it must'] == sums['injected'], result
    assert not sums['lost'] and not sums['wrong'], result
    assert {row['fault'] for row in report.rows(result)} == set(injections.FAULTS)


def test_it_would_see_what_is_wrong(toy_run, tmp_path):
    workdir = shutil.copytree(toy_run, tmp_path / 'run')
    before = runs.results(workdir)
    assert list(before) and not list(runs.flaws(workdir, set()))
    metrics, adapter = workdir / 'metrics.jsonl', workdir / 'adapter' / adapter_folder.ADAPTER
    whole = metrics.read_text()
    metrics.write_text(whole.replace('0.', '1.', 1))
    adapter.write_bytes(adapter.read_bytes()[:-1])
    assert runs.differences(runs.results(workdir), before) == [
        f'adapter/{adapter_folder.ADAPTER}',
        'metrics.jsonl',
    ]
    (workdir / 'summary.json').write_text('{')
    metrics.write_text(whole + whole.split('\n')[0] + '\n')
    newest = runs.checkpoints(workdir)[runs.newest(workdir)]
    (newest / '_CHECKPOINT_METADATA').unlink()
    found = ' '.join(runs.flaws(workdir, set()))
    for name in ('adapter.safetensors: Safetensor', 'summary.json: JSON', 'has the steps [1, 2'):
        assert name in found
    assert f'checkpoint {newest.name}: _CHECKPOINT_METADATA is missing' in found
    assert 'checkpoint' not in ' '.join(runs.flaws(workdir, {newest}))


def test_a_checkpoint_counts_as_spoilt_until_it_is_set_aside(tmp_path):
    # The next attempt may be killed before it looks at its checkpoints.
    spoilt = tmp_path / '21'
    spoilt.mkdir()
    damaged = {spoilt: spoilt.stat().st_ino}
    attempt = injections.Attempt(lambda: None, tmp_path, 1.0, random.Random(0), damaged)
    assert attempt.still_damaged() == {spoilt}
    spoilt.rename(tmp_path / 'damaged-21')
    assert not attempt.still_damaged()
    spoilt.mkdir()
    assert not attempt.still_damaged()


@pytest.mark.parametrize('fault', ['SIGKILL at any time', 'started twice', 'SIGSTOP and SIGCONT'])
def test_a_run_that_fails_by_itself_is_a_surprise(tmp_path, fault):
    class Failing:
        running = False

        def wait_for(self, *_):
            return False

        def finish(self, *_):
            return Finished(2, '', 'error: something')

    attempt = injections.Attempt(Failing, tmp_path, 1.0, random.Random(0))
    ended = injections.FAULTS[fault](attempt)
    assert not ended.hit and ended.surprises == ('exit status 2',)


@pytest.fixture(scope='module')
def toy_run(tmp_path_factory):
    """The workdir of a short run."""
    folder = tmp_path_factory.mktemp('faults')
    toys = runs.write_toys(folder / 'toys')
    arguments = [*runs.KINDS[0].arguments(toys, folder), '--config.training.steps=14']
    assert Command('train', arguments, folder / 'output').finish().status == 0
    return folder / 'run'


def test_the_command_fails_where_something_was_lost(tmp_path, monkeypatch):
    record = {'fault': 'SIGTERM', 'hit': True, 'status': 143, 'steps': 9, 'checkpoint': 9}
    trial = {'run': 'a', 'lost': False, 'wrong': [], 'faults': [record | {'surprises': []}]}
    result = {'seed': 0, 'minutes': 1.0, 'steps': 60, 'checkpoint_every': 7, 'runs': ['a']}
    result['processes'] = 1

    def run(*spoilt):
        trials = [trial, *(trial | change for change in spoilt)]
        monkeypatch.setattr(Campaign, 'run', lambda *_: result | {'trials': trials})
        command.main(str(tmp_path), 1, 0, 1)

    run()
    assert json.loads((tmp_path / 'faults.json').read_text())['trials'] == [trial]
    assert 'are the same to the bit' in (tmp_path / 'faults.md').read_text()
    surprise = {'faults': [record | {'surprises': ['a traceback']}]}
    # One that crashed by itself, before its fault came, counts.
    crashed = {'faults': [record | {'hit': False, 'surprises': ['exit status 2']}]}
    for change in ({'lost': True}, {'wrong': ['metrics.jsonl']}, surprise, crashed):
        with pytest.raises(SystemExit) as caught:
            run(change)
        assert caught.value.code == 1
        same = 'are the same to the bit' in (tmp_path / 'faults.md').read_text()
        assert same == (change in (surprise, crashed))
    with pytest.raises(ValueError, match=r'--faults=0.*expected 1 or more'):
        command.main(str(tmp_path), 0, 0, 1)
