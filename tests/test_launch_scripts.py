"""launch/run.sh and its settings, and what holds of every launch script."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from machine import LAUNCH, ROOT, Machine

SHELL_FILES = [*sorted(LAUNCH.glob('*.sh')), LAUNCH / 'slurm.sbatch', ROOT / '.ci' / 'run']


def shellcheck():
    """Return the checker that the test requirements install, or the system's."""
    own = Path(sys.executable).with_name('shellcheck')
    return str(own) if own.exists() else shutil.which('shellcheck')


@pytest.mark.parametrize('path', SHELL_FILES, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    if shellcheck() is None:
        pytest.skip('there is no shellcheck: pip install -r requirements-test.txt')
    done = subprocess.run(
        [shellcheck(), '--external-sources', path], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, '')


def test_every_setting_of_the_scripts_is_in_the_example():
    example = (LAUNCH / 'env.example').read_text()
    text = ''.join(path.read_text() for path in SHELL_FILES)
    names = ('TPU_ZONE', 'TPU_TYPE', 'TPU_RUNTIME', 'TPU_PROJECT', 'TPU_SPOT', 'TPU_ENV')
    names += tuple(f'XPK_{name}' for name in ('CLUSTER', 'ZONE', 'PROJECT', 'TYPE', 'SLICES'))
    names += ('XPK_IMAGE', 'XPK_RESTARTS', 'XPK_ENV', 'PYTHON')
    names += tuple(f'ADAPTERS_JAX_{name}' for name in ('VENV', 'EXTRA', 'RESTARTS'))
    for name in names:
        assert f'# {name}=' in example, name
        assert f'${{{name}' in text or f'${name}' in text or f'need {name} ' in text, name


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_the_first_run_makes_the_environment_and_later_ones_nothing(machine):
    done, calls = machine.run('run.sh', 'train', '--workdir=a b')
    assert done.returncode == 0, done.stderr
    assert [call.split()[0] for call in calls] == ['venv', 'install', 'ran']
    assert calls[-1] == 'ran -m adapters_jax.train --workdir=a b'
    assert 'found neither a TPU nor an NVIDIA GPU: JAX as it is' in done.stderr
    done, calls = machine.run('run.sh', 'predict')
    assert (done.returncode, calls) == (0, ['ran -m adapters_jax.predict'])
    assert done.stderr.count('\n') == 1


def test_prepare_runs_nothing(machine):
    done, calls = machine.run('run.sh', '--prepare')
    assert (done.returncode, [call.split()[0] for call in calls]) == (0, ['venv', 'install'])
    assert f'ready: {machine.root}/.venv/bin/python' in done.stderr


def test_experiments_are_commands_too(machine):
    done, calls = machine.run('run.sh', 'experiments.hu2022', '--shard=0/8')
    assert (done.returncode, calls[-1]) == (0, 'ran -m experiments.hu2022 --shard=0/8')


def test_help_is_the_head_of_the_script(machine):
    done, calls = machine.run('run.sh', '--help')
    assert (done.returncode, calls, done.stderr) == (0, [], '')
    assert 'bash launch/run.sh COMMAND [options]' in done.stdout and '#' not in done.stdout


@pytest.mark.parametrize('option', ['-h', '--help'])
@pytest.mark.parametrize('script', ['run', 'quickstart', 'test', 'tpu_vm', 'gke_xpk'])
def test_every_script_tells_how_it_is_called(machine, script, option):
    done, calls = machine.run(f'{script}.sh', option)
    assert (done.returncode, calls, done.stderr) == (0, [], '')
    assert f'bash launch/{script}.sh ' in done.stdout


@pytest.mark.parametrize('words', [['--workdir=W'], ['my', 'runs']])
def test_the_quickstart_takes_one_folder_and_no_options(machine, words):
    done, calls = machine.run('quickstart.sh', *words)
    assert (done.returncode, calls) == (1, [])
    assert done.stderr.startswith('[adapters_jax] error: expected ') and ' workdir' in done.stderr


@pytest.mark.parametrize('words', [['tarin', '--workdir=x'], []])
def test_an_unknown_command_is_told_before_anything_is_installed(machine, words):
    done, calls = machine.run('run.sh', *words)
    assert (done.returncode, calls) == (1, [])
    expected = 'expected train, evaluate, sweep, predict, convert, compile, preprocess,'
    expected += ' experiments.NAME, --prepare or --help'
    assert f"{expected}, got '{''.join(words[:1])}'" in done.stderr


@pytest.mark.parametrize(
    ('driver', 'extra'), [('580.65.06', 'cuda13'), ('575.51', 'cuda12'), ('535.1', 'cuda12')]
)
def test_nvidia_gpus_get_the_cuda_that_their_driver_takes(machine, driver, extra):
    machine.fake('nvidia-smi', f'printf "{driver}\\n{driver}\\n"')
    done, calls = machine.run('run.sh', 'train')
    assert f'found 2 NVIDIA GPU(s), driver {driver}: JAX with {extra}' in done.stderr
    installed = [call for call in calls if call.startswith('install')]
    assert len(installed) == 2 and installed[1].endswith(f'jax[{extra}]==9.8.7')
    assert [call for call in machine.run('run.sh', 'train')[1] if 'install' in call] == []
    # Other requirements are another environment, in which JAX's part is installed again.
    (machine.root / 'requirements.txt').write_text('jax==9.9.0\n')
    assert machine.run('run.sh', 'train')[1][-2].endswith(f'jax[{extra}]==9.9.0')


def test_a_failed_installation_of_the_extra_is_told_and_taken_up(machine):
    machine.fake('nvidia-smi', 'echo 580.1')
    machine.run('run.sh', '--prepare', ADAPTERS_JAX_EXTRA='none')
    done, calls = machine.run('run.sh', 'train', BROKEN='yes')
    assert done.returncode == 1 and len(calls) == 1
    assert 'pip could not install jax[cuda13]==9.8.7' in done.stderr
    assert [call.split()[0] for call in machine.run('run.sh', 'train')[1]] == ['install', 'ran']


def test_what_is_asked_for_is_not_looked_for(machine):
    machine.fake('nvidia-smi', 'echo asked >>"$CALLS"')
    for given in ({'ADAPTERS_JAX_EXTRA': 'none'}, {'JAX_PLATFORMS': 'cpu'}):
        done, calls = machine.run('run.sh', 'train', **given)
        assert 'asked' not in calls and not any('jax[' in call for call in calls)
        assert '='.join(*given.items()) in done.stderr
    done, calls = machine.run('run.sh', 'train', ADAPTERS_JAX_EXTRA='cuda')
    assert (done.returncode, calls) == (1, [])
    assert 'ADAPTERS_JAX_EXTRA=cuda: expected auto, cuda13, cuda12, tpu or none' in done.stderr


METADATA = """
case "$*" in
  *"Metadata-Flavor: Google"*/computeMetadata/v1/instance/attributes/worker-network-endpoints)
    printf %s 'a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3,d:4:10.0.0.4' ;;
  *) exit 22 ;;
esac
"""


def test_the_workers_of_a_tpu_slice_run_together(machine):
    machine.fake('curl', METADATA)
    said, ran = machine.commands('train', '--workdir=/mnt/w', ADAPTERS_JAX_EXTRA='tpu')
    assert 'found a TPU machine, one of 4 in its slice: JAX with tpu' in said
    assert '4 machines work together: --distributed=auto' in said
    assert ran == ['-m adapters_jax.train --workdir=/mnt/w --distributed=auto']
    for command in ('evaluate', 'sweep'):
        _, ran = machine.commands(command, TPU_WORKER_HOSTNAMES='a,b')
        assert ran == [f'-m adapters_jax.{command} --distributed=auto']


def test_processes_that_are_told_how_to_meet_are_left_so(machine):
    slice_ = {'TPU_WORKER_HOSTNAMES': 'a,b'}
    _, ran = machine.commands('train', '--distributed=none', **slice_)
    assert ran == ['-m adapters_jax.train --distributed=none']
    _, ran = machine.commands('train', ADAPTERS_JAX_DISTRIBUTED='a:1', **slice_)
    assert ran == ['-m adapters_jax.train']
    _, ran = machine.commands('predict', **slice_)
    assert ran == ['-m adapters_jax.predict']
    _, ran = machine.commands('train', TPU_WORKER_HOSTNAMES='a')
    assert ran == ['-m adapters_jax.train']


def test_settings_come_from_the_file_and_the_environment_has_the_last_word(machine):
    settings = machine.root / 'launch' / 'env'
    settings.write_text('ADAPTERS_JAX_VENV=/nowhere\nADAPTERS_JAX_EXTRA=cuda12 # why\n')
    given = str(machine.root / 'here')
    done, calls = machine.run('run.sh', '--prepare', ADAPTERS_JAX_VENV=given)
    assert f'ready: {given}/bin/python' in done.stderr and 'jax[cuda12]==9.8.7' in calls[-1]
    other = machine.root / 'other'
    other.write_text(f'ADAPTERS_JAX_VENV={given}\nHF_HOME=/data/hf\n')
    machine.fake('python3.12', '#!/bin/sh\nexit 1')
    ran = Path(given) / 'bin' / 'python'
    ran.write_text('#!/bin/sh\ncase "$*" in *adapters_jax*) echo "$HF_HOME" >>"$CALLS";; esac\n')
    given = {'ADAPTERS_JAX_ENV': str(other), 'JAX_PLATFORMS': 'cpu'}
    assert machine.run('run.sh', 'train', **given)[1] == ['/data/hf']
    done, _ = machine.run('run.sh', 'train', ADAPTERS_JAX_ENV='/no/such/file')
    assert done.returncode == 1 and 'names /no/such/file, which is no file' in done.stderr


def test_the_example_of_settings_is_shell_and_changes_nothing(machine):
    shutil.copy(LAUNCH / 'env.example', machine.root / 'launch' / 'env')
    done, calls = machine.run('run.sh', 'train')
    assert done.returncode == 0 and calls[-1] == 'ran -m adapters_jax.train'
