"""launch/slurm.sbatch on a real SLURM: jobs that lose a task, are stopped, refused, and arrays."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import slurm as clusters
import toy
from machine import ROOT

STEPS, EVERY = 150, 10
MARKER = 'installed-requirements.txt'

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp('slurm')
    try:
        with clusters.cluster(folder) as made:
            yield made
    except clusters.UnavailableError as error:
        pytest.skip(str(error))
    assert made.processes() == []


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toys')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 240)
    return folder


def arguments(toys, workdir):
    return [
        '--config=configs/text_classification.py:method=pfeiffer[size=4,dropout=0.1]',
        f'--config.backbone={toys / "bert"}',
        f'--config.data.train={toys / "texts.csv"}',
        '--config.data.cache_dir=none',
        f'--config.training.steps={STEPS}',
        f'--config.training.checkpoint_every={EVERY}',
        '--config.training.evaluate_every=50',
        '--config.training.patience=0',
        f'--workdir={workdir}',
    ]


def submit(slurm, toys, *words, tasks=2):
    """Submit from the checkout, with this environment; the output goes beside the data."""
    given = {'JAX_COMPILATION_CACHE_DIR': str(toys / 'compiled')}
    if (Path(sys.prefix) / MARKER).exists():
        given['ADAPTERS_JAX_VENV'] = sys.prefix
    options = [word for word in words if word.startswith('--array')]
    words = [word for word in words if word not in options]
    return slurm.submit(
        f'--ntasks={tasks}',
        f'--output={toys}/%A-%a.out' if options else f'--output={toys}/%j.out',
        *options,
        'launch/slurm.sbatch',
        *words,
        cwd=ROOT,
        **given,
    )


def taken(workdir):
    path = workdir / 'metrics.jsonl'
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


def process_of(job, task):
    """Return the process of a job's task that trains."""
    wanted = {f'SLURM_JOB_ID={job}'.encode(), f'SLURM_PROCID={task}'.encode()}
    for path in Path('/proc').glob('[0-9]*'):
        try:
            line, environ = ((path / name).read_bytes() for name in ('cmdline', 'environ'))
        except OSError:
            continue
        if b'-m\0adapters_jax.train' in line and wanted <= set(environ.split(b'\0')):
            return int(path.name)
    raise AssertionError(f'task {task} of job {job} does not train')


def test_a_killed_task_and_a_stop_leave_no_trace_in_the_numbers(slurm, toys):
    """One job undisturbed; one whose second task is killed, and which is then asked to stop."""
    devices = '--jax_num_cpu_devices=4'
    job = submit(slurm, toys, 'train', *arguments(toys, toys / 'whole'), devices)
    assert slurm.wait(job, 'COMPLETED', 'FAILED')['Restarts'] == '0'
    assert slurm.state(job)['JobState'] == 'COMPLETED', slurm.tell(job)

    workdir = toys / 'disturbed'
    job = submit(slurm, toys, 'train', *arguments(toys, workdir), devices)
    for restarts, step in enumerate((3 * EVERY, 8 * EVERY)):
        clusters.wait_for(lambda: taken(workdir) >= step, 600, lambda: slurm.tell(job))  # noqa: B023
        assert slurm.state(job)['JobState'] == 'RUNNING', slurm.tell(job)
        if restarts == 0:
            os.kill(process_of(job, 1), signal.SIGKILL)
        else:  # as SLURM does before the time limit, by --signal
            slurm.run('scancel', '--signal=TERM', job)
        slurm.wait(job, 'PENDING', 'FAILED')
        assert slurm.state(job)['Restarts'] == str(restarts + 1), slurm.tell(job)
    slurm.wait(job, 'COMPLETED', 'FAILED')
    told = slurm.tell(job)
    assert slurm.state(job)['JobState'] == 'COMPLETED', told
    assert 'back into the queue (restart 1 of 10)' in told
    assert 'stopped by SIGTERM after step' in told
    assert 'status 143: back into the queue (restart 2 of 10)' in told
    assert told.count('continuing from the checkpoint of step') == 2
    check_same(workdir, toys / 'whole')


def check_same(workdir, whole):
    """Every number is that of the undisturbed run."""
    assert [step for step, _ in toy.losses(workdir)] == list(range(1, STEPS + 1))
    assert toy.losses(workdir) == toy.losses(whole)
    assert (workdir / 'metrics.jsonl').read_bytes() == (whole / 'metrics.jsonl').read_bytes()
    ours, theirs = (json.loads((w / 'summary.json').read_text()) for w in (workdir, whole))
    for key in ('finished', 'steps', 'best_step', 'metrics'):
        assert ours[key] == theirs[key], key


def test_a_mistake_is_not_repeated(slurm, toys):
    given = [x for x in arguments(toys, toys / 'mistake') if 'data.train' not in x]
    missing = f'--config.data.train={toys / "nothing.csv"}'
    job = submit(slurm, toys, 'train', *given, missing, '--jax_num_cpu_devices=4')
    state = slurm.wait(job, 'FAILED', 'COMPLETED')
    assert (state['JobState'], state['ExitCode'], state['Restarts']) == ('FAILED', '2:0', '0')
    assert 'nothing.csv' in slurm.tell(job)
    assert 'ended with a mistake, which is told above: not requeued' in slurm.tell(job)


def test_a_cancelled_job_stays_cancelled(slurm, toys):
    workdir = toys / 'cancelled'
    job = submit(slurm, toys, 'train', *arguments(toys, workdir), '--jax_num_cpu_devices=4')
    clusters.wait_for(lambda: taken(workdir) >= EVERY, 600, lambda: slurm.tell(job))
    slurm.run('scancel', job)
    slurm.wait(job, 'CANCELLED')
    clusters.wait_for(lambda: not slurm.run('squeue', '--noheader'), 60, lambda: slurm.tell(job))
    assert slurm.state(job)['JobState'] == 'CANCELLED' and slurm.state(job)['Restarts'] == '0'


def test_a_sweep_is_an_array(slurm, toys):
    """Its elements share the workdir; the sweep that depends on them ranks what they have left."""
    given = [x for x in arguments(toys, toys / 'sweep') if 'training.' not in x]
    given += ['--config.training.steps=20', '--config.mesh.data=1', '--config.sweep.size=1']
    given += ["--config.sweep.grid=('seed=0,1',)"]
    array = submit(slurm, toys, '--array=0-1', 'sweep', '--shard=%a/2', *given, tasks=1)
    elements = [f'{array}_{number}' for number in range(2)]
    for element in elements:
        assert slurm.wait(element, 'COMPLETED', 'FAILED')['JobState'] == 'COMPLETED'
    members = {path.parent.name for path in (toys / 'sweep').glob('members/*/summary.json')}
    assert members == {'seed-0', 'seed-1'} and not (toys / 'sweep' / 'sweep.json').exists()
    ranked = submit(slurm, toys, 'sweep', *given, tasks=1)
    assert slurm.wait(ranked, 'COMPLETED', 'FAILED')['JobState'] == 'COMPLETED', slurm.tell(ranked)
    result = json.loads((toys / 'sweep' / 'sweep.json').read_text())
    assert {row['name'] for row in result['members']} == members
