"""What befalls a run from outside: each ends it in a sentence, and the same command finishes it."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import command
import pytest
import toy

from adapters_jax import entry
from adapters_jax.data.pipeline import HungWorkerError, WorkerError

STEPS = 24

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone, data, and a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp('survival')
    toy.write_backbone(folder / 'bert', layers=2)
    toy.write_texts(folder / 'texts.csv', 120)
    done = command.run('train', *arguments(folder, folder / 'calm'), folder=folder / 'out')
    assert done.status == 0, done.err
    return folder


def arguments(toys, folder):
    return [
        '--config=configs/text_classification.py:method=pfeiffer[reduction_factor=2,leave_out=[0]]',
        f'--config.backbone={toys / "bert"}',
        f'--config.data.train={toys / "texts.csv"}',
        f'--config.data.cache_dir={folder / "cache"}',
        '--config.mesh.data=1',
        '--config.training.trunk_cache=float32',
        f'--config.training.steps={STEPS}',
        '--config.training.checkpoint_every=5',
        '--config.training.evaluate_every=12',
        f'--workdir={folder / "run"}',
    ]


def steps_taken(folder):
    path = folder / 'run' / 'metrics.jsonl'
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


def check_the_same_command_finishes(toys, folder):
    done = command.run('train', *arguments(toys, folder), folder=folder / 'last')
    assert done.status == 0, done.err
    for name in ('metrics.jsonl', 'adapter/adapter.safetensors', 'adapter/head.safetensors'):
        ours, calm = ((f / 'run' / name).read_bytes() for f in (folder, toys / 'calm'))
        assert ours == calm, name
    return done.err


def spoil_batch(how):
    """Spoil, in the process that calls it, the worker that assembles a batch after step 12."""
    from adapters_jax.data import pipeline

    assemble, calls = pipeline.assemble, iter(range(10**9))

    def spoilt(*given):
        return how() if next(calls) == 20 else assemble(*given)

    pipeline.assemble, pipeline.PATIENCE = spoilt, 3.0


def fail():
    raise MemoryError('no memory left')


def hang():
    threading.Event().wait()


@pytest.mark.parametrize('kind', [WorkerError, HungWorkerError])
def test_what_befalls_a_worker_is_told_as_a_mistake_is(kind):
    assert issubclass(kind, entry.MISTAKES)


@pytest.mark.parametrize(
    'how, told',
    [
        pytest.param(
            fail,
            r'a data worker failed \(MemoryError: no memory left\); the same command goes on',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            hang,
            r'no data worker made a batch in 3 s; the same command goes on from the last',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_worker_that_fails_or_hangs_ends_the_run_in_a_sentence(toys, tmp_path, how, told):
    prepare = functools.partial(spoil_batch, how)
    given = arguments(toys, tmp_path)
    sentence = command.refused('train', *given, folder=tmp_path / 'first', prepare=prepare)
    assert re.fullmatch(f'{told}.*', sentence)
    assert 'continuing from the checkpoint of step' in check_the_same_command_finishes(
        toys, tmp_path
    )


@pytest.mark.slow
def test_a_trunk_cut_off_under_a_run_is_told_of_and_made_again(toys, tmp_path):
    process = command.Command('train', arguments(toys, tmp_path), tmp_path / 'first')
    assert process.wait_for(lambda: steps_taken(tmp_path) >= 6)
    process.signal(signal.SIGSTOP)
    for path in (tmp_path / 'cache' / 'trunk').glob('*/numbers.bin'):
        os.truncate(path, 100)
    process.signal(signal.SIGCONT)
    done = process.finish()
    assert done.status == 2 and 'Traceback' not in done.err, (done.status, done.err)
    assert re.search(r'error: .*numbers.bin has been cut to 100 bytes of \d+', done.err)
    assert 'is damaged' in check_the_same_command_finishes(toys, tmp_path)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_so(toys, tmp_path):
    process = command.Command('train', arguments(toys, tmp_path), tmp_path / 'first')
    assert process.wait_for(lambda: steps_taken(tmp_path) >= 6)
    process.signal(signal.SIGINT)
    done = process.finish()
    assert done.status == 128 + signal.SIGINT and 'Traceback' not in done.err
    step = re.search(r'stopped by SIGINT after step (\d+); the same command goes on', done.err)[1]
    said = check_the_same_command_finishes(toys, tmp_path)
    assert f'continuing from the checkpoint of step {step}' in said


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_ends_the_process_at_once(toys, tmp_path, number):
    prepare = functools.partial(stop_in_build, number)
    given = arguments(toys, tmp_path)
    done = command.run('train', *given, folder=tmp_path / 'first', prepare=prepare)
    assert done.status == 128 + number and 'Traceback' not in done.err
    assert f'stopped by {signal.Signals(number).name}' in done.err
    check_the_same_command_finishes(toys, tmp_path)


def stop_in_build(number):
    """Send the process a signal while it reads its data."""
    from adapters_jax.training import experiment

    build = experiment.build

    def stopping(*given):
        os.kill(os.getpid(), number)
        return build(*given)

    experiment.build = stopping


def test_a_signal_in_a_callback_that_can_raise_nothing_ends_the_process(tmp_path):
    """As JAX's callback of the garbage collector is, where those come that wait for a program."""
    given = f'--workdir={tmp_path}'
    done = command.run('evaluate', given, folder=tmp_path / 'out', prepare=stop_in_a_callback)
    assert (done.status, done.out) == (128 + signal.SIGTERM, '')
    assert done.err == 'stopped by SIGTERM with nothing to save; give the same command again\n'


def stop_in_a_callback():
    """Send the process a signal while an object is taken away, in place of reading a config."""
    from adapters_jax import config

    class Gone:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def read(path):
        Gone()
        time.sleep(20)
        raise RuntimeError('the process goes on')

    config.read = read


@pytest.mark.slow
def test_a_pipe_that_ends_does_not_end_the_run(toys, tmp_path):
    """As `train ... 2>&1 | head -1` does it."""
    line = [sys.executable, '-m', 'adapters_jax.train', *arguments(toys, tmp_path)]
    with subprocess.Popen(
        line, cwd=command.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        process.stderr.readline()
        process.stderr.close()
    assert (tmp_path / 'run' / 'summary.json').exists()
    check_the_same_command_finishes(toys, tmp_path)


@pytest.fixture
def read_only(tmp_path):
    """A file system mounted read-only, where this process may mount one; and a way to undo it."""
    place = tmp_path / 'place'
    place.mkdir()
    mount = functools.partial(subprocess.run, capture_output=True, check=False)
    disk = ['mount', '-t', 'tmpfs', '-o', 'size=600m', 'tmpfs', place]
    if os.geteuid() or mount(disk).returncode:
        pytest.skip('needs the right to mount a file system')

    def switch(how):
        assert mount(['mount', '-o', f'remount,{how}', place]).returncode == 0

    yield place, switch
    subprocess.run(['umount', '-l', place], check=True)


@pytest.mark.slow
def test_a_workdir_that_becomes_read_only(toys, tmp_path, read_only):
    place, switch = read_only
    switch('ro')
    sentence = command.refused('train', *arguments(toys, place), folder=tmp_path / 'never')
    assert re.search(r'cannot be written \(read-only file system\): choose a directory', sentence)
    switch('rw')
    process = command.Command('train', arguments(toys, place), tmp_path / 'first')
    assert process.wait_for(lambda: steps_taken(place) >= 6)
    process.signal(signal.SIGTERM)
    assert process.finish().status == 143
    switch('ro')
    sentence = command.refused('train', *arguments(toys, place), folder=tmp_path / 'second')
    assert re.search(r'cannot be written \(read-only file system\): choose a directory', sentence)
    switch('rw')
    check_the_same_command_finishes(toys, place)
    shutil.rmtree(place / 'run')
