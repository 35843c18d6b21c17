"""Runs `python -m adapters_jax.NAME ...` in a process of its own, without importing JAX each time.

Every command is a fork of one server process that has imported the libraries, and nothing more; it
executes the module as `__main__`, with its own arguments, output files, signals and exit status.
"""

import dataclasses
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

ROOT = Path(__file__).parents[1]
_LIBRARIES = ['adapters_jax.entry', 'adapters_jax.training.loop', 'adapters_jax.training.inference']
_LIBRARIES += ['transformers.models.bert', 'tensorboardX', 'pyarrow.parquet']
_LIBRARIES += ['adapters_jax.tuning.results', 'adapters_jax.tuning.rungs', 'scipy.stats']
_LIBRARIES += ['sklearn.metrics', 'sklearn.model_selection']

QUICK = {
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': 0,
}


@dataclasses.dataclass
class Finished:
    """What a command left: exit status (negative: the signal that ended it) and its output."""

    status: int
    out: str
    err: str


class Command:
    """A command that runs in the background."""

    def __init__(self, module: str, arguments: list[str], folder: Path, **options) -> None:
        """Start it; its output goes to files in `folder`. `options` are those of `_execute`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / 'stdout', folder / 'stderr'
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(_LIBRARIES)
        options = {'cache': jax.config.jax_compilation_cache_dir} | options
        self._process = context.Process(
            target=_execute,
            args=(f'adapters_jax.{module}', arguments, str(self._out), str(self._err), options),
        )
        self._process.start()

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self._process.pid, number)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Return whether the condition came true while the command ran."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.001)
        return condition()

    def finish(self, seconds: float = 300) -> Finished:
        """Wait for its end.

        Raises:
            TimeoutError: it had not ended by then; it is killed.
        """
        self._process.join(seconds)
        if self.running:
            self.signal(signal.SIGKILL)
            self._process.join()
            raise TimeoutError(f'not ended after {seconds} s; stderr: {self._err.read_text()}')
        return Finished(self._process.exitcode, self._out.read_text(), self._err.read_text())


def _execute(module: str, arguments: list[str], out: str, err: str, options: dict) -> None:
    """Run a module as `__main__`.

    `cache`: a folder of compiled programs; `read_only_cache`: add none to it. `prepare`: a function
    called before. `file_size`: the largest file that the system lets the command write, in bytes.
    `devices`: how many processors to show JAX.
    """
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    jax.config.update('jax_num_cpu_devices', options.get('devices', 1))
    if options['cache']:
        use_cache(options['cache'])
    if options.get('read_only_cache'):
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 1e9)
    if 'prepare' in options:
        options['prepare']()
    if 'file_size' in options:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options['file_size'],) * 2)
    runpy.run_module(module, run_name='__main__', alter_sys=True)


def use_cache(directory: str) -> None:
    """Keep compiled programs in a folder."""
    for name, value in (QUICK | {'jax_compilation_cache_dir': directory}).items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
