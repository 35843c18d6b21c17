"""launch/tpu_vm.sh and launch/gke_xpk.sh: what they show, and that they run what they show.

tests/launch/*.txt holds what --dry-run prints. After a change that is meant, look at the difference
that this makes in them:
    ADAPTERS_JAX_UPDATE=1 python -m pytest tests/test_launch_remote.py -k dry_run
"""

import os
import shlex
import subprocess

import pytest
from machine import ROOT, Machine

GOLDENS = ROOT / 'tests' / 'launch'
SETTINGS = {
    'TPU_ZONE': 'us-west4-a',
    'TPU_TYPE': 'v5litepod-16',
    'TPU_RUNTIME': 'v2-alpha-tpuv5-lite',
    'XPK_CLUSTER': 'main',
    'XPK_ZONE': 'us-west4-a',
    'XPK_TYPE': 'v5litepod-16',
}
TRAIN = ['train', '--config=configs/glue.py:task=rte,method=lora[r=8]', "--workdir=/mnt/it's mine"]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


DRY_RUNS = {
    'tpu_vm': [
        ['create', 'mine'],
        ['sync', 'mine'],
        ['run', 'mine', *TRAIN],
        ['logs', 'mine'],
        ['stop', 'mine'],
        ['delete', 'mine'],
    ],
    'gke_xpk': [['create', 'mine', *TRAIN], ['list'], ['logs', 'mine'], ['delete', 'mine']],
}
CHOICES = {'TPU_PROJECT': 'p', 'TPU_SPOT': 'yes', 'TPU_ENV': 'launch/tpu.env', 'XPK_PROJECT': 'p'}
CHOICES |= {'XPK_SLICES': '2', 'XPK_IMAGE': 'python:3.13', 'XPK_ENV': 'gke.env'}


def dry_run(machine, script):
    machine.fake('git', '[ "$3" = status ] || echo git "$*" >>"$CALLS"')
    found = []
    for given in (SETTINGS, SETTINGS | CHOICES):
        for words in DRY_RUNS[script]:
            done, calls = machine.run(f'{script}.sh', '--dry-run', *words, **given)
            assert (done.returncode, done.stderr, calls) == (0, '', [])
            found.append(f'# {shlex.join(words)}\n{done.stdout}')
        found.append('\n')
    return ''.join(found).replace(str(machine.root), 'CHECKOUT').rstrip() + '\n'


@pytest.mark.parametrize('script', DRY_RUNS)
def test_dry_run_prints_what_it_always_did(machine, script):
    golden = GOLDENS / f'{script}.txt'
    found = dry_run(machine, script)
    if os.environ.get('ADAPTERS_JAX_UPDATE'):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize('script', DRY_RUNS)
def test_what_dry_run_prints_is_what_runs(machine, script):
    """Pasted into a shell, the printed commands reach the tools with the words of the real run."""
    for name in ('gcloud', 'xpk', 'kubectl'):
        machine.fake(name, None)
    machine.fake('git', '[ "$3" = status ] || [ "$1" = clone ] || : >"${@: -2:1}"')
    machine.fake('mktemp', 'mkdir -p "$HOME/kept"; echo "$HOME/kept"')
    for words in DRY_RUNS[script]:
        shown, _ = machine.run(f'{script}.sh', '--dry-run', *words, **SETTINGS, **CHOICES)
        done, calls = machine.run(f'{script}.sh', *words, **SETTINGS, **CHOICES)
        assert done.returncode == 0 and calls, done.stderr
        machine.calls.write_text('')
        pasted = shown.stdout.replace('/tmp/adapters_jax', str(machine.root / 'kept'))
        env = {'PATH': str(machine.path), 'CALLS': str(machine.calls), 'HOME': str(machine.root)}
        subprocess.run(['bash', '-ec', pasted], env=env, check=True)
        assert machine.calls.read_text().splitlines() == calls


def test_the_remote_command_line_keeps_its_words(machine):
    """What the workers' shell makes of --command is the command as it was given."""
    machine.fake('gcloud', 'printf "%s" "${@:7:1}" >>"$CALLS"')
    worker = machine.root.parent / 'worker' / 'adapters_jax' / 'launch'
    worker.mkdir(parents=True)
    (worker / 'run.sh').write_text('printf "%s\\n" "$ADAPTERS_JAX_EXTRA" "$@"; echo done >&2\n')
    done, _ = machine.run('tpu_vm.sh', 'run', 'mine', *TRAIN, **SETTINGS)
    remote = machine.calls.read_text().removeprefix('--command=')
    home = worker.parents[1]
    env = {'PATH': str(machine.path)}
    subprocess.run(['bash', '-c', remote + '\nwait'], cwd=home, env=env, check=True)
    assert (worker.parent / 'run.log').read_text().splitlines() == ['tpu', *TRAIN, 'done']
    # As long as it runs, there is no second one.
    (worker.parent / 'run.pid').write_text(str(os.getpid()))
    done = subprocess.run(['bash', '-c', remote], cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and 'a command runs here already' in done.stderr


def test_what_is_synced_is_the_commit(machine):
    """The bundle that is sent makes a checkout of HEAD, and again after another commit."""
    git = ['git', '-C', str(machine.root), '-c', 'user.name=x', '-c', 'user.email=x@y']
    home = machine.root.parent / 'worker'
    home.mkdir()
    machine.fake(
        'gcloud',
        f'[ "$4" != scp ] || cp "$5" {home}\n'
        f'[ "$4" != ssh ] || (cd {home} && bash -c "${{7#--command=}}")',
    )
    subprocess.run([*git, 'init', '-q'], check=True)
    for number in range(2):
        (machine.root / 'file').write_text(str(number))
        subprocess.run([*git, 'add', '.'], check=True)
        subprocess.run([*git, 'commit', '-qm', 'x'], check=True)
        done, _ = machine.run('tpu_vm.sh', 'sync', 'mine', **SETTINGS)
        assert (done.returncode, done.stderr) == (0, '')
        assert (home / 'adapters_jax' / 'file').read_text() == str(number)
        heads = [
            subprocess.run(['git', '-C', folder, 'rev-parse', 'HEAD'], capture_output=True).stdout
            for folder in (machine.root, home / 'adapters_jax')
        ]
        assert heads[0] == heads[1] != b''
    (machine.root / 'file').write_text('not committed')
    done, _ = machine.run('tpu_vm.sh', 'sync', 'mine', **SETTINGS)
    assert 'uncommitted changes stay here' in done.stderr
    assert (home / 'adapters_jax' / 'file').read_text() == '1'


@pytest.mark.parametrize(
    ('line', 'without', 'told'),
    [
        ('tpu_vm.sh create', None, 'the name of a TPU VM'),
        ('tpu_vm.sh build mine', None, "or delete, got 'build'"),
        ('tpu_vm.sh create mine', 'TPU_ZONE', 'TPU_ZONE is not set: give the zone'),
        ('tpu_vm.sh create mine', 'TPU_TYPE', 'TPU_TYPE is not set'),
        ('tpu_vm.sh create mine', 'TPU_RUNTIME', 'TPU_RUNTIME is not set'),
        ('tpu_vm.sh run mine', None, "after the name, got ''"),
        ('tpu_vm.sh run mine --workdir=x', None, "after the name, got '--workdir=x'"),
        ('tpu_vm.sh create mine --dry-run', None, '--dry-run stands before the first word'),
        ('tpu_vm.sh delete mine other', None, "unexpected argument 'other'"),
        ('gke_xpk.sh delete --dry-run mine', None, '--dry-run stands before the first word'),
        ('gke_xpk.sh delete mine other', None, "unexpected argument 'other'"),
        ('gke_xpk.sh list mine', None, "unexpected argument 'mine'"),
        ('gke_xpk.sh create', None, 'the name of a workload after create'),
        ('gke_xpk.sh create mine trian', None, "after the name, got 'trian'"),
        ('gke_xpk.sh stop mine', None, "or delete, got 'stop'"),
        ('gke_xpk.sh list', 'XPK_CLUSTER', 'XPK_CLUSTER is not set'),
        ('gke_xpk.sh create mine train', 'XPK_TYPE', 'XPK_TYPE is not set'),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_run(machine, line, without, told):
    for name in ('gcloud', 'xpk', 'kubectl'):
        machine.fake(name, None)
    script, *words = line.split()
    given = {key: value for key, value in SETTINGS.items() if key != without}
    done, calls = machine.run(script, *words, **given)
    assert (done.returncode, calls) == (1, [])
    assert done.stderr.startswith('[adapters_jax] error: ') and done.stderr.count('\n') == 1
    assert told in done.stderr
