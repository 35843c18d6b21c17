"""A SLURM cluster of one node, this machine: Debian's own packages, started for a test.

The packages are unpacked in the test's folder, not installed: configuration, spool, logs, keys and
programs lie there, and the machine is as it was when the daemons have ended.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ('slurmctld', 'slurmd', 'slurm-client', 'munge')
PROGRAMS = ('slurmctld', 'slurmd', 'slurmstepd', 'munged', 'mungekey', 'sbatch', 'srun', 'scontrol')

# No cgroups, which containers seldom allow. A requeued job may start again once the credential of
# its last start has expired, here after seconds; so no message about the last start may be sent
# again, as one is that waits for longer (for KillWait) than MessageTimeout. `config_overrides`:
# the CPUs are taken to be as many as given here.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
{plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=10
MessageTimeout=60
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class UnavailableError(RuntimeError):
    """There can be no SLURM on this machine, in one sentence."""


class Slurm:
    """A running cluster; `run` runs one of its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ('state', 'spool'):
            (folder / name).mkdir()
        own = _unpacked(folder / 'packages')
        libraries = sorted(own.glob('usr/lib/*-linux-gnu*'))
        plugins = [path / 'slurm-wlm' for path in libraries]
        self.environ = os.environ | {'SLURM_CONF': str(folder / 'slurm.conf')}
        if libraries:
            paths = [str(own / 'usr' / 'sbin'), str(own / 'usr' / 'bin'), os.environ['PATH']]
            found = [str(path) for path in (*plugins, *libraries)]
            self.environ |= {'PATH': ':'.join(paths), 'LD_LIBRARY_PATH': ':'.join(found)}
        with contextlib.ExitStack() as sockets:
            ports = [_free_port(sockets) for _ in range(2)]
        text = CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname().split('.')[0],
            ports=ports,
            plugins='\n'.join(f'PluginDir={path}' for path in plugins),
        )
        (folder / 'slurm.conf').write_text(text)
        self._daemons: list[subprocess.Popen] = []

    def program(self, name: str) -> str:
        """Return a program's path; before it is configured, Debian's has another name."""
        for candidate in (name, f'{name}-wlm'):
            if found := shutil.which(candidate, path=self.environ['PATH']):
                return found
        raise UnavailableError(f'the packages of SLURM have no {name}')

    def run(self, name: str, *arguments: str, **environ: str) -> str:
        """Run a command of SLURM; return what it prints."""
        done = subprocess.run(
            [self.program(name), *arguments],
            env=self.environ | environ,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (name, arguments, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, *arguments: str, cwd: Path, **environ: str) -> str:
        """Submit a job from a folder; return its number."""
        return self.run('sbatch', '--parsable', f'--chdir={cwd}', *arguments, **environ)

    def state(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` tells."""
        words = self.run('scontrol', '--oneliner', 'show', 'job', job).split()
        return dict(word.split('=', 1) for word in words if '=' in word)

    def wait(self, job: str, *states: str, seconds: float = 600) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        wait_for(lambda: self.state(job)['JobState'] in states, seconds, lambda: self.tell(job))
        return self.state(job)

    def tell(self, job: str) -> str:
        """Return what is known of a job, for a failing test."""
        state = self.state(job)
        output = Path(state.get('StdOut', '')).read_text() if 'StdOut' in state else ''
        return f'{state}\n{output}'

    def start(self) -> None:
        """Start the daemons, and wait until the node takes jobs."""
        folder = self.folder
        self.run('mungekey', '--create', f'--keyfile={folder}/munge.key')
        files = [
            f'--{kind}={folder}/munged.{kind}' for kind in ('log-file', 'pid-file', 'seed-file')
        ]
        munge = [f'--socket={folder}/munge.socket', f'--key-file={folder}/munge.key', *files]
        self._daemon('munged', '--foreground', '--force', *munge)
        wait_for((folder / 'munge.socket').exists, 10, self._logs)
        self._daemon('slurmctld', '-D', '-c', '-i')
        self._daemon('slurmd', '-D', '-d', self.program('slurmstepd'))
        ready = lambda: 'idle' in self.run('sinfo', '--noheader', '--format=%T')  # noqa: E731
        wait_for(lambda: _succeeds(ready), 60, self._logs)

    def stop(self) -> None:
        """Cancel what is left, and end the daemons in the order that lets each finish."""
        with contextlib.suppress(AssertionError, UnavailableError):
            self.run('scancel', '--state=RUNNING', '--user=root')
            self.run('scancel', '--user=root')
            wait_for(lambda: not self.run('squeue', '--noheader'), 60, self._logs)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / f'{name}.out').open('w') as out:
            line = [self.program(name), *arguments]
            options = {'stdout': out, 'stderr': subprocess.STDOUT, 'start_new_session': True}
            self._daemons.append(subprocess.Popen(line, env=self.environ, **options))

    def _logs(self) -> str:
        files = [*self.folder.glob('*.out'), *self.folder.glob('*.log')]
        return '\n'.join(f'{path}:\n{path.read_text()[-2000:]}' for path in files)

    def processes(self) -> list[str]:
        """Return the command lines of what still runs with this cluster's configuration."""
        found = []
        for path in Path('/proc').glob('[0-9]*'):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in (path / 'environ').read_bytes():
                    found.append((path / 'cmdline').read_bytes().replace(b'\0', b' ').decode())
        return found


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Run a cluster for the block.

    Raises:
        UnavailableError: why there can be none here.
    """
    if os.geteuid() != 0:
        raise UnavailableError('SLURM is started for the test by root only')
    made = Slurm(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def wait_for(condition: Callable[[], bool], seconds: float, tell: Callable[[], str]) -> None:
    """Wait until a condition holds; fail with what `tell` returns if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f'not within {seconds} s: {tell()}'
        time.sleep(0.01)


def _succeeds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except AssertionError:
        return False


def _unpacked(folder: Path) -> Path:
    """Return the folder of the packages that this machine lacks, fetched by apt-get."""
    (folder / 'archives' / 'partial').mkdir(parents=True)
    if all(map(shutil.which, PROGRAMS)):
        return folder
    if shutil.which('apt-get') is None:
        raise UnavailableError('SLURM is not installed, and there is no apt-get to fetch it with')
    fetch = ['apt-get', '--quiet', '--yes', '--no-install-recommends', '--download-only', 'install']
    fetch += ['-o', f'Dir::Cache::archives={folder}/archives', *PACKAGES]
    done = subprocess.run(fetch, capture_output=True, text=True)
    if done.returncode:
        subprocess.run(['apt-get', '--quiet', 'update'], capture_output=True)
        done = subprocess.run(fetch, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f'apt-get cannot fetch SLURM: {done.stderr.strip()[-300:]}')
    for package in (folder / 'archives').glob('*.deb'):
        subprocess.run(['dpkg', '--extract', package, folder], check=True)
    return folder


def _free_port(sockets: contextlib.ExitStack) -> int:
    listening = sockets.enter_context(contextlib.closing(socket.socket()))
    listening.bind(('127.0.0.1', 0))
    return listening.getsockname()[1]
