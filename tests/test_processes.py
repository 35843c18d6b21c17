"""Several processes train one run: two, with four devices each, over the loopback."""

import contextlib
import json
import re
import shutil
import signal
import socket
import time

import command
import numpy as np
import pytest
import toy

from adapters_jax import processes
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.run import Run

STEPS = 50
# What the library that connects processes says, in the pieces that it writes.
GLOO = re.compile(
    r'\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+'
)
PFEIFFER = 'pfeiffer[reduction_factor=2,dropout=0.1]'
MESHES = {'data': (8, 1, 1), 'fsdp': (1, 8, 1), 'tensor': (4, 1, 2), 'mixed': (2, 2, 2)}

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    toy.write_backbone(folder / 'bert', layers=2)
    toy.write_backbone(folder / 'shallow')
    # 47 of the held-out texts: a number that divides over nothing.
    toy.write_texts(folder / 'texts.csv', 240)
    toy.write_texts(folder / 'held_out.csv', 47, seed=1)
    return folder


def arguments(toys, workdir, mesh=(1, 1, 1), method=PFEIFFER, **changes):
    settings = {
        'backbone': toys / 'bert',
        'data.train': toys / 'texts.csv',
        'data.validation': toys / 'held_out.csv',
        'data.test': toys / 'held_out.csv',
        'data.cache_dir': 'none',
        'training.steps': STEPS,
        'training.checkpoint_every': 8,
        'training.evaluate_every': 25,
        'training.patience': 0,
    }
    settings |= dict(zip(('mesh.data', 'mesh.fsdp', 'mesh.tensor'), mesh, strict=True))
    settings |= {key.replace('__', '.'): value for key, value in changes.items()}
    flags = [f'--config.{key}={value}' for key, value in settings.items()]
    return [f'--config=configs/text_classification.py:method={method}', *flags, _workdir(workdir)]


def _workdir(folder):
    return f'--workdir={folder}'


def free_port():
    with contextlib.closing(socket.socket()) as listening:
        listening.bind(('127.0.0.1', 0))
        return listening.getsockname()[1]


def no_change():
    pass


def dawdle():
    """Be late where a run that was stopped leaves."""
    leave = Run._leave

    def late(*args):
        time.sleep(5)
        leave(*args)

    Run._leave = late


def start(module, given, folder, devices=4, count=2, prepare=no_change):
    """Start a command in `count` processes that know of one another; `given` may differ by each.

    `prepare` is called before in the last process.
    """
    where = [f'--distributed=127.0.0.1:{free_port()}', f'--processes={count}']
    lines = given if isinstance(given[0], list) else [given] * count
    return [
        command.Command(
            module,
            [*line, *where, f'--process={i}'],
            folder / f'process{i}',
            devices=devices,
            prepare=prepare if i == count - 1 else no_change,
        )
        for i, line in enumerate(lines)
    ]


def finish(commands):
    return [process.finish() for process in commands]


def ours(text):
    """Return the lines that are not of the library that connects the processes.

    Its threads write in the midst of one another's lines.
    """
    return [line for line in text.split('\n') if GLOO.sub('', line).strip()]


def told(done):
    return ours(done.err)


def steps_taken(workdir):
    path = workdir / 'metrics.jsonl'
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


@pytest.fixture(scope='module')
def alone(toys, tmp_path_factory):
    """What one device finds, by method: the losses, and the test split's evaluation."""
    found = {}

    def get(method):
        if method not in found:
            folder = tmp_path_factory.mktemp('alone')
            done = command.run(
                'train', *arguments(toys, folder, method=method), folder=folder / 'o'
            )
            assert done.status == 0, done.err
            done = command.run('evaluate', _workdir(folder), folder=folder / 'o')
            assert done.status == 0, done.err
            found[method] = losses(folder), evaluation(folder)
        return found[method]

    return get


def losses(workdir):
    steps, values = zip(*toy.losses(workdir), strict=True)
    assert steps == tuple(range(1, STEPS + 1))
    return values


def evaluation(workdir):
    values = json.loads((workdir / 'evaluation_test.json').read_text())
    return {key: values[key] for key in ('metrics', 'examples', 'confusion')}


def check(toys, folder, alone, mesh, method):
    """Train and evaluate on two processes of four devices, and compare with one device."""
    workdir = folder / 'run'
    done = finish(start('train', arguments(toys, workdir, mesh, method), folder))
    assert [d.status for d in done] == [0, 0], [d.err for d in done]
    assert 'best on validation' in done[0].out
    assert not ours(done[1].out) and not ours(done[1].err), done[1]
    expected, exact = alone(method)
    np.testing.assert_allclose(losses(workdir), expected, rtol=1e-5)
    done = finish(start('evaluate', [_workdir(workdir)], folder / 'evaluate'))
    assert [d.status for d in done] == [0, 0], [d.err for d in done]
    assert evaluation(workdir) == exact
    lines = toy.read_lines(workdir / 'predictions_test.jsonl')
    assert len(lines) == exact['examples'] == 47


def test_two_processes_of_four_devices_are_one_device(toys, tmp_path):
    """The tests below evaluate by two processes, too."""
    changes = {'backbone': toys / 'shallow', 'training.steps': 12}
    changes |= {'training.checkpoint_every': 5, 'training.evaluate_every': 6}
    given = arguments(toys, tmp_path / 'one', **changes)
    done = command.run('train', *given, folder=tmp_path / 'alone')
    assert done.status == 0, done.err
    given = arguments(toys, tmp_path / 'two', MESHES['mixed'], **changes)
    done = finish(start('train', given, tmp_path))
    assert [d.status for d in done] == [0, 0], [d.err for d in done]
    assert 'best on validation' in done[0].out
    assert not ours(done[1].out) and not ours(done[1].err), done[1]
    found, expected = (toy.losses(tmp_path / name) for name in ('two', 'one'))
    assert [step for step, _ in found] == list(range(1, 13))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    read = [json.loads((tmp_path / w / 'summary.json').read_text()) for w in ('two', 'one')]
    assert read[0]['metrics'] == read[1]['metrics']


@pytest.mark.slow
@pytest.mark.parametrize('method', [PFEIFFER, 'lora', 'houlsby'])
@pytest.mark.parametrize('mesh', MESHES)
def test_every_mesh_and_three_methods(toys, tmp_path, alone, mesh, method):
    check(toys, tmp_path, alone, MESHES[mesh], method)


@pytest.mark.slow
def test_the_trunk_is_computed_by_all_and_kept_by_one(toys, tmp_path):
    method = 'pfeiffer[reduction_factor=2,leave_out=[0]]'
    changes = {'training__trunk_cache': 'float32'}

    def given(folder, mesh):
        cache = {'data__cache_dir': folder / 'cache'}
        return arguments(toys, folder / 'run', mesh, method, **changes, **cache)

    done = command.run('train', *given(tmp_path / 'one', (1, 1, 1)), folder=tmp_path / 'one')
    assert done.status == 0, done.err
    for again in ('computed once and kept', 'is read from'):
        two = tmp_path / 'two'
        done = finish(start('train', given(two, MESHES['mixed']), two))
        assert [d.status for d in done] == [0, 0], [d.err for d in done]
        assert again in done[0].err
        expected = losses(tmp_path / 'one' / 'run')
        np.testing.assert_allclose(losses(two / 'run'), expected, rtol=1e-5)
        shutil.rmtree(two / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('spread', [True, False])
def test_a_sweep_is_that_of_one_device(toys, tmp_path, spread):
    """Of eight members each device trains one, or some rows of each."""
    grid = "('optimizer.learning_rate=1e-3,1e-2', 'seed=0,1,2,3')"

    def given(folder, mesh):
        changes = {'sweep__grid': grid, 'mesh__members': spread, 'training__steps': 12}
        changes['training__evaluate_every'] = 6
        return arguments(toys, folder / 'run', mesh, **changes)

    one, two = tmp_path / 'one', tmp_path / 'two'
    done = command.run('sweep', *given(one, (1, 1, 1)), folder=one)
    assert done.status == 0, done.err
    done = finish(start('sweep', given(two, MESHES['data']), two))
    assert [d.status for d in done] == [0, 0], [d.err for d in done]
    members = sorted((one / 'run' / 'members').iterdir())
    assert len(members) == 8
    for member in members:
        other = two / 'run' / 'members' / member.name
        found, expected = toy.losses(other), toy.losses(member)
        assert len(found) == 12
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        read = [json.loads((m / 'summary.json').read_text()) for m in (other, member)]
        assert read[0]['metrics'] == read[1]['metrics']


@pytest.mark.slow
def test_sigterm_to_one_stops_all_and_the_run_goes_on_elsewhere(toys, tmp_path, alone):
    """It is told to a process that does not write, and goes on in one process on another mesh."""
    workdir = tmp_path / 'run'
    given = arguments(toys, workdir, MESHES['fsdp'])
    commands = start('train', given, tmp_path, prepare=dawdle)
    assert commands[1].wait_for(lambda: steps_taken(workdir) >= 5), finish(commands)
    commands[1].signal(signal.SIGTERM)
    done = finish(commands)
    assert [d.status for d in done] == [128 + signal.SIGTERM] * 2, [d.err for d in done]
    step = int(re.search(r'stopped by SIGTERM after step (\d+)', done[0].err)[1])
    assert (workdir / 'checkpoints' / str(step)).is_dir() and step < STEPS
    second = arguments(toys, workdir, (2, 1, 2))
    again = command.run('train', *second, folder=tmp_path / 'again', devices=4)
    assert again.status == 0, again.err
    assert f'continuing from the checkpoint of step {step}' in again.err
    np.testing.assert_allclose(losses(workdir), alone(PFEIFFER)[0], rtol=1e-5)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_nothing_is_lost(toys, tmp_path, alone):
    workdir = tmp_path / 'run'
    given = arguments(toys, workdir, MESHES['data'])
    commands = start('train', given, tmp_path)
    assert commands[0].wait_for(lambda: steps_taken(workdir) >= 12), finish(commands)
    commands[1].signal(signal.SIGKILL)
    done = finish(commands)
    assert done[1].status == -signal.SIGKILL and done[0].status != 0
    again = finish(start('train', given, tmp_path / 'again'))
    assert [d.status for d in again] == [0, 0], [d.err for d in again]
    assert 'continuing from the checkpoint of step' in again[0].err
    np.testing.assert_allclose(losses(workdir), alone(PFEIFFER)[0], rtol=1e-5)


def test_a_mistake_is_told_once_and_ends_all(toys, tmp_path):
    """All have made it, or one of them alone, before the others ask whether texts are stored."""
    wrong = {'data__train': toys / 'absent.csv', 'mesh': (-1, 1, 1)}
    workdir = tmp_path / 'run'
    done = finish(start('train', arguments(toys, workdir, **wrong), tmp_path / 'both'))
    assert [d.status for d in done] == [2, 2], [d.err for d in done]
    assert [len(told(d)) for d in done] == [1, 0], [d.err for d in done]
    assert told(done[0])[0].startswith('error: data.train: there is no file')
    stored = {'data__cache_dir': tmp_path / 'cache', 'mesh': (-1, 1, 1)}
    lines = [arguments(toys, workdir, **stored), arguments(toys, workdir, **stored | wrong)]
    for given in (lines, lines[::-1]):
        done = finish(start('train', given, tmp_path / 'one'))
        assert [d.status for d in done] == [2, 2], [d.err for d in done]
        number = '' if given[0] == lines[1] else 'process 1: '
        said = f'error: {number}data.train: there is no file'
        assert told(done[0])[-1].startswith(said), done[0].err
    assert not (workdir / 'config.json').exists()


def have_other_files():
    """Find other data under the same name, as where each machine has files of its own."""
    Experiment.fingerprints = property(lambda _: {'train': 'others'})


@pytest.mark.parametrize('differing', ['config', 'data'])
def test_processes_that_would_train_something_else_are_refused(toys, tmp_path, differing):
    workdir, mesh = tmp_path / 'run', (-1, 1, 1)
    lines = [arguments(toys, workdir, mesh), arguments(toys, workdir, mesh)]
    lines[1] += ['--config.seed=1'] if differing == 'config' else []
    prepare = have_other_files if differing == 'data' else no_change
    done = finish(start('train', lines, tmp_path, prepare=prepare))
    assert [d.status for d in done] == [2, 2], [d.err for d in done]
    said = f'process 1: not the same here as for process 0: {differing}; give all processes the'
    assert said in done[0].err and not (workdir / 'config.json').exists()


def test_directories_that_are_not_shared_are_refused(toys, tmp_path):
    lines = [arguments(toys, tmp_path / name) for name in ('mine', 'yours')]
    done = finish(start('train', lines, tmp_path))
    assert [d.status for d in done] == [2, 2], [d.err for d in done]
    assert 'yours is not the same directory for process 0 and process 1' in done[0].err
    assert 'give a --workdir on a disk that all processes share' in done[0].err


@pytest.mark.parametrize(
    ('flags', 'sentence'),
    [
        (['--distributed=localhost'], "--distributed is 'localhost'; expected none, auto, or the"),
        (['--distributed=h:1'], r'with --processes=0 and --process=-1; expected how many'),
        (['--distributed=h:1', '--processes=2', '--process=2'], r'--process=2; expected how many'),
        (['--distributed=auto'], r'No cluster is recognised here \(SLURM'),
    ],
)
def test_what_cannot_be_started_is_refused(toys, tmp_path, flags, sentence):
    given = [*arguments(toys, tmp_path / 'run'), *flags]
    assert re.search(sentence, command.refused('train', *given, folder=tmp_path))


def test_the_environment_stands_in_for_flags(monkeypatch):
    seen = []
    monkeypatch.setattr('jax.distributed.initialize', lambda **given: seen.append(given))
    processes.initialise()
    assert not seen
    for name, value in {'DISTRIBUTED': '[::1]:7', 'PROCESSES': '4', 'PROCESS': '0'}.items():
        monkeypatch.setenv(f'ADAPTERS_JAX_{name}', value)
    processes.initialise()
    processes.initialise('host:80', 3, 2)
    processes.initialise('none')
    found = [(s['coordinator_address'], s['num_processes'], s['process_id']) for s in seen]
    assert found == [('[::1]:7', 4, 0), ('host:80', 3, 2)]
    monkeypatch.setenv('ADAPTERS_JAX_PROCESS', 'first')
    with pytest.raises(ValueError, match="ADAPTERS_JAX_PROCESS is 'first'; expected a whole"):
        processes.initialise()


def test_a_mistake_that_all_were_told_of_is_not_told_again(monkeypatch):
    """The others have left the outer block, too, and would never answer."""
    told = []

    def exchange(message):
        told.append(message)
        return 0, [message, {}]

    monkeypatch.setattr('jax.process_count', lambda: 2)
    monkeypatch.setattr(processes, '_exchange', exchange)
    inside = processes.together(), processes.together()
    with pytest.raises(ValueError, match='no such file'), inside[0], inside[1]:
        raise ValueError('no such file')
    assert told == [{'failed': 'no such file'}]


@pytest.mark.parametrize('told', ['x' * 5000, 'é' * 2000, '\U0001f600' * 1000, '"\n\x1b' * 800])
def test_a_failure_is_told_in_as_many_bytes_as_there_are(told):
    message = processes._cut(told)
    assert 1000 < len(json.dumps(message).encode()) <= processes._LONGEST
    assert told.startswith(message[processes._FAILED])
    assert processes._cut('a sentence') == {processes._FAILED: 'a sentence'}
