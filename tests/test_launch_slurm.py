"""launch/slurm.sbatch: how its tasks start, and which ends put the job back into the queue."""

import re
import signal

import pytest
from machine import Machine

# A task's status as srun's: that of its shell, unless another task's is in $OTHER.
SRUN = """
while [ "${1#--}" != "$1" ]; do options="${options:-} $1"; shift; done
echo "srun$options" >>"$CALLS"
SLURM_PROCID=1 "$@" || status=$?
exit "${OTHER:-${status:-0}}"
"""


@pytest.fixture
def cluster(tmp_path):
    """A machine whose SLURM runs a job's task here; what run.sh does is in $TASK."""
    machine = Machine(tmp_path)
    machine.fake('srun', SRUN)
    machine.fake('squeue', 'echo "${STATE:-RUNNING}"')
    machine.fake('scontrol', None)
    (machine.root / 'launch' / 'run.sh').write_text(
        'echo "run <$*> ${ADAPTERS_JAX_DISTRIBUTED:-}" >>"$CALLS"\n'
        '[ "$1" = --prepare ] || eval "${TASK:-}"\n'
    )

    def job(*words, cwd=machine.root, **environ):
        given = {'SLURM_JOB_ID': '7', 'SLURM_JOB_NUM_NODES': '1'} | environ
        done, calls = machine.run('slurm.sbatch', *words, cwd=cwd, **given)
        assert list(machine.root.glob('.slurm-*')) == []
        return done, calls

    return job


def test_a_job_prepares_once_and_runs_its_tasks(cluster):
    done, calls = cluster('train', '--workdir=a b')
    assert done.returncode == 0, done.stderr
    assert calls == ['run <--prepare> ', 'srun --kill-on-bad-exit=1', 'run <train --workdir=a b> ']


@pytest.mark.parametrize(
    ('given', 'distributed'),
    [
        ({'SLURM_NTASKS': '1'}, ''),
        ({'SLURM_NTASKS': '2'}, 'auto'),
        ({'SLURM_JOB_NUM_NODES': '2'}, 'auto'),
        ({'SLURM_NTASKS': '1', 'SLURM_GPUS_ON_NODE': '8'}, ''),
        (
            {'SLURM_NTASKS': '16', 'SLURM_JOB_NUM_NODES': '2', 'SLURM_GPUS_ON_NODE': '8'},
            'auto',
        ),
    ],
)
def test_several_tasks_find_one_another(cluster, given, distributed):
    done, calls = cluster('train', **given)
    assert done.returncode == 0, done.stderr
    assert calls[-1] == f'run <train> {distributed}'


def test_gpus_that_no_task_would_use_are_told_of(cluster):
    given = {'SLURM_NTASKS': '2', 'SLURM_JOB_NUM_NODES': '2', 'SLURM_GPUS_ON_NODE': '8'}
    done, calls = cluster('train', **given)
    assert (done.returncode, calls) == (1, [])
    assert 'give --ntasks-per-node=8' in done.stderr


def test_an_element_of_an_array_gets_its_number(cluster):
    words = ['sweep', '--shard=%a/32', '--workdir=runs/%a of %a']
    _, calls = cluster(*words, SLURM_ARRAY_TASK_ID='3')
    assert calls[-1] == 'run <sweep --shard=3/32 --workdir=runs/3 of 3> '
    _, calls = cluster(*words)
    assert calls[-1] == 'run <sweep --shard=%a/32 --workdir=runs/%a of %a> '


REQUEUED = 'scontrol <requeue> <7>'


@pytest.mark.parametrize('status', [143, 137, 134])
def test_what_a_signal_ended_goes_back_into_the_queue(cluster, status):
    done, calls = cluster('train', TASK=f'exit {status}', SLURM_RESTART_COUNT='2')
    assert (done.returncode, calls[-1]) == (status, REQUEUED)
    assert f'status {status}: back into the queue (restart 3 of 10)' in done.stderr


@pytest.mark.parametrize(
    ('given', 'status', 'told'),
    [
        ({'TASK': ''}, 0, ''),
        ({'TASK': 'exit 1'}, 1, ''),
        ({'TASK': 'exit 2'}, 2, 'task 1 on .* ended with a mistake'),
        # A mistake of one task, after which srun has stopped the others.
        ({'TASK': 'exit 2', 'OTHER': '143'}, 2, 'ended with a mistake'),
        ({'TASK': 'exit 143', 'STATE': 'CANCELLED'}, 143, 'the job is CANCELLED: not requeued'),
        ({'TASK': 'exit 143', 'SLURM_RESTART_COUNT': '10'}, 1, 'after 10 restarts: not requeued'),
        ({'TASK': 'exit 143', 'ADAPTERS_JAX_RESTARTS': '0'}, 1, 'after 0 restarts: not requeued'),
    ],
)
def test_the_rest_ends(cluster, given, status, told):
    done, calls = cluster('train', **given)
    assert done.returncode == status and REQUEUED not in calls
    assert re.search(told, done.stderr)


def test_a_task_waits_for_its_command_to_save(cluster):
    """SIGTERM reaches the shell of the task and the command: the shell must not go first."""
    save = 'trap "sleep 0.3; echo saved >>\\"$CALLS\\"; exit 143" TERM; '
    signalled = 'kill -TERM $PPID $$; while :; do sleep 0.1; done'
    done, calls = cluster('train', TASK=save + signalled)
    assert (done.returncode, calls[-2:]) == (128 + signal.SIGTERM, ['saved', REQUEUED])


def test_a_limit_of_restarts_that_is_no_number_is_told_at_the_beginning(cluster):
    done, calls = cluster('train', TASK='exit 143', ADAPTERS_JAX_RESTARTS='ten')
    assert done.returncode and calls == []
    assert "ADAPTERS_JAX_RESTARTS is 'ten'; expected a number, such as 10" in done.stderr


@pytest.mark.parametrize('given', [{'cwd': '/'}, {'SLURM_JOB_ID': ''}])
def test_a_job_outside_of_a_checkout_says_so(cluster, given):
    done, calls = cluster('train', **given)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert 'submit this file with sbatch from the checkout, or with --chdir' in done.stderr
