"""Commands for the tests: run to their end or refused, with the batches that they trained on."""

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from experiments import commands
from experiments.commands import ROOT, Finished

__all__ = ['ROOT', 'Command', 'compiled_once', 'python_of', 'refused', 'run']


def python_of(module: str, *arguments: str) -> list[str]:
    """Return the command line that `Command` imitates."""
    return [sys.executable, '-m', f'adapters_jax.{module}', *arguments]


class Command(commands.Command):
    """A command that runs in the background."""

    def __init__(self, module, arguments, folder, recorded=None, **options) -> None:
        """Start it. `recorded`: a file that gets each batch trained on, one a line."""
        if recorded is not None:
            options['prepare'] = functools.partial(record_batches, Path(recorded))
        super().__init__(module, arguments, folder, **options)


def run(module: str, *arguments: str, folder: Path, **options) -> Finished:
    """Run a command to its end."""
    return Command(module, list(arguments), folder, **options).finish()


def refused(module: str, *arguments: str, folder: Path, **options) -> str:
    """Run a command that must fail as a user's mistake does; return the sentence."""
    done = run(module, *arguments, folder=folder, **options)
    assert done.status == 2, (done.status, done.out, done.err)
    assert 'Traceback' not in done.err, done.err
    lines = [line for line in done.err.split('\n') if line]
    errors = [line for line in lines if line.startswith('error: ')]
    assert lines[-1:] == errors, done.err
    return errors[0].removeprefix('error: ')


def record_batches(path: Path) -> None:
    """Append to a file, for every batch put on the devices in training, what is in it."""
    from adapters_jax import sharding

    put = sharding.put_batch

    def recording(batch, mesh):
        row = {name: column.tobytes().hex() for name, column in sorted(batch.items())}
        with path.open('a') as lines:
            lines.write(json.dumps(row) + '\n')
        return put(batch, mesh)

    # The loop looks it up in the module; evaluation has imported the name before.
    sharding.put_batch = recording


@contextlib.contextmanager
def compiled_once(directory: Path) -> Iterator[None]:
    """Share compiled programs between the runs of the block, and with commands it starts."""
    names = [*commands.QUICK, 'jax_compilation_cache_dir']
    before = {name: jax.config.values[name] for name in names}
    commands.use_cache(str(directory))
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
