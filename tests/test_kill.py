"""A run that is killed, wherever, and started again ends with the very bits of one that was not."""

import json
import random
import re
import signal
import subprocess
import time

import command
import pytest
import toy

STEPS, EVERY = 48, 9


pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone, data, and a run that nobody disturbed, with its batches."""
    folder = tmp_path_factory.mktemp('kill')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 240)
    done = command.run(
        'train',
        *arguments(folder, folder / 'whole'),
        folder=folder / 'out',
        recorded=str(folder / 'batches'),
    )
    assert done.status == 0, done.err
    assert len(batches(folder / 'batches')) == STEPS
    return folder


def arguments(toys, workdir):
    """Return a command line with everything random in it: dropout, order, initialisation."""
    return [
        '--config=configs/text_classification.py:method=pfeiffer[reduction_factor=2,dropout=0.1]',
        f'--config.backbone={toys / "bert"}',
        f'--config.data.train={toys / "texts.csv"}',
        '--config.data.cache_dir=none',
        '--config.mesh.data=1',
        '--config.optimizer.learning_rate=0.01',
        f'--config.training.steps={STEPS}',
        f'--config.training.checkpoint_every={EVERY}',
        '--config.training.evaluate_every=30',
        '--config.training.patience=0',
        f'--workdir={workdir}',
    ]


def batches(path):
    return path.read_text().splitlines() if path.exists() else []


def steps_taken(workdir):
    """Return how many steps metrics.jsonl has; while the run writes, its last line may be cut."""
    path = workdir / 'metrics.jsonl'
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


def check_same(toys, workdir):
    """Every number and every bit is that of the undisturbed run."""
    whole = toys / 'whole'
    for name in ('adapter.safetensors', 'head.safetensors', 'adapter_config.json'):
        ours, theirs = (w / 'adapter' / name for w in (workdir, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert [step for step, _ in toy.losses(workdir)] == list(range(1, STEPS + 1))
    assert toy.losses(workdir) == toy.losses(whole)
    assert (workdir / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
    ours, theirs = (json.loads((w / 'summary.json').read_text()) for w in (workdir, whole))
    for key in ('finished', 'steps', 'best_step', 'metrics', 'trainable_parameters', 'padding'):
        assert ours[key] == theirs[key], key
    assert not list(workdir.rglob('*.tmp')) and not list(workdir.rglob('*orbax-checkpoint-tmp*'))


def check_batches(toys, record, begun_after):
    """An attempt saw the undisturbed run's batches, from where its checkpoint was."""
    expected = batches(toys / 'batches')[begun_after:]
    seen = batches(record)
    # The last line may have been cut by the kill; it was then never trained on.
    seen = seen if not seen or seen[-1] in expected else seen[:-1]
    assert seen == expected[: len(seen)]
    return len(seen)


def start(toys, folder, number, again=()):
    workdir = folder / 'run'
    record = folder / f'batches{number}'
    process = command.Command(
        'train',
        [*arguments(toys, workdir), *again],
        folder / f'out{number}',
        recorded=str(record),
    )
    return process, workdir, record


def begun_after(folder, number):
    said = (folder / f'out{number}' / 'stderr').read_text()
    found = re.findall(r'continuing from the checkpoint of step (\d+)', said)
    return int(found[0]) if found else 0


def writing_a_checkpoint(workdir, after):
    """Whether a checkpoint is half-written, once some steps are taken."""
    return lambda: (
        steps_taken(workdir) >= after
        and any((workdir / 'checkpoints').glob('*orbax-checkpoint-tmp*'))
    )


def at_step(workdir, step):
    return lambda: steps_taken(workdir) >= step


@pytest.mark.parametrize(
    'kills',
    [
        [writing_a_checkpoint],
        pytest.param([at_step, writing_a_checkpoint, at_step], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_killed_at_any_step_and_while_a_checkpoint_is_written(toys, tmp_path, kills):
    rng = random.Random(0)
    places = sorted(rng.sample(range(10, STEPS - 15), len(kills)))
    seen = []
    for number, (when, step) in enumerate(zip(kills, places, strict=True)):
        process, workdir, record = start(toys, tmp_path, number)
        assert process.wait_for(when(workdir, step)), 'ended before it was killed'
        process.signal(signal.SIGKILL)
        assert process.finish().status == -signal.SIGKILL
        seen.append(check_batches(toys, record, begun_after(tmp_path, number)))
        assert not (workdir / 'summary.json').exists()
    process, workdir, record = start(toys, tmp_path, 'last')
    done = process.finish()
    assert done.status == 0, done.err
    resumed = begun_after(tmp_path, 'last')
    assert resumed % EVERY in (0, 30 % EVERY, 60 % EVERY) and resumed > 0
    assert check_batches(toys, record, resumed) == STEPS - resumed
    assert sum(seen) >= 10
    check_same(toys, workdir)

    # Started once more, it says that it is finished, and touches nothing.
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.name != '.lock'}
    process, workdir, record = start(toys, tmp_path, 'again')
    done = process.finish()
    assert done.status == 0
    assert f'{workdir} is finished already; another --workdir trains again' in done.err
    assert 'best on validation, at step' in done.out and not batches(record)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.name != '.lock'} == before


def test_sigterm_saves_says_so_and_exits_with_143(toys, tmp_path):
    process, workdir, _ = start(toys, tmp_path, 0)
    assert process.wait_for(at_step(workdir, 20))
    check_second_is_refused(toys, tmp_path, process, workdir)
    process.signal(signal.SIGTERM)
    done = process.finish()
    assert done.status == 128 + signal.SIGTERM
    assert 'Traceback' not in done.err
    told = re.search(r'stopped by SIGTERM after step (\d+); the same command goes on', done.err)
    step = int(told[1])
    assert (workdir / 'checkpoints' / str(step)).is_dir()
    process, workdir, record = start(toys, tmp_path, 1)
    assert process.finish().status == 0
    assert begun_after(tmp_path, 1) == step
    assert check_batches(toys, record, step) == STEPS - step
    check_same(toys, workdir)

    # What a kill between the last step and the summary leaves: nothing is trained again.
    (workdir / 'summary.json').unlink()
    process, workdir, record = start(toys, tmp_path, 2)
    assert process.finish().status == 0
    assert not batches(record)
    check_same(toys, workdir)


def check_second_is_refused(toys, folder, process, workdir):
    """While a run holds its workdir, another one says so and does nothing."""
    process.signal(signal.SIGSTOP)
    try:
        sentence = command.refused('train', *arguments(toys, workdir), folder=folder / 'second')
    finally:
        process.signal(signal.SIGCONT)
    assert re.search(rf'{workdir} is in use by another run \(process \d+ on .*\): wait', sentence)


@pytest.mark.slow
def test_the_real_command_killed_eight_times(toys, tmp_path):
    """As a user does it: `python -m adapters_jax.train`, again and again."""
    workdir, rng = tmp_path / 'run', random.Random(1)
    line = command.python_of('train', *arguments(toys, workdir))
    killed = 0
    for _ in range(8):
        process = subprocess.Popen(line, cwd=command.ROOT, stderr=subprocess.DEVNULL)
        begun, wait = steps_taken(workdir), rng.randint(1, 2 * EVERY)
        while process.poll() is None and steps_taken(workdir) <= begun + wait:
            time.sleep(0.001)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 4
    done = subprocess.run(line, cwd=command.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_same(toys, workdir)
