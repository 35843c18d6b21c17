"""The processes of one run: how they find one another, who writes, and what they decide together.

Every process runs the same program over its own part of the batches and holds the same trained
leaves, so one of them writes what a run leaves on the disk. What only one of them can know - that
the directory is in use, that a file is missing on its disk, that it was asked to end - has to reach
the others before they wait for it in vain.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax import files

NONE, AUTO = 'none', 'auto'
_ENVIRONMENT = 'ADAPTERS_JAX_'  # + DISTRIBUTED, PROCESSES, PROCESS: where a flag is not given
_TIMEOUT = 300  # seconds for all processes to start
_LONGEST = 2048  # bytes of a sentence that is told to the other processes


class ElsewhereError(RuntimeError):
    """Another process of the run has met a mistake, and has told it."""


def initialise(distributed: str = '', processes: int = 0, process: int = -1) -> None:
    """Join the other processes of this run; to be called before anything asks for devices.

    Args:
        distributed: 'none'; 'auto', by what JAX recognises (SLURM, Open MPI, Cloud TPU, GKE,
            Kubernetes); or HOST:PORT, where process 0 listens. Empty: as the environment variable
            ADAPTERS_JAX_DISTRIBUTED says, or 'none'.
        processes: how many there are, with HOST:PORT; 0: ADAPTERS_JAX_PROCESSES.
        process: which one this is, from 0, with HOST:PORT; -1: ADAPTERS_JAX_PROCESS.

    Raises:
        ValueError: no such way to start, numbers that cannot be, or no cluster that is recognised.
        TimeoutError: the others did not come.
    """
    where = distributed or os.environ.get(f'{_ENVIRONMENT}DISTRIBUTED') or NONE
    if where == NONE:
        return
    given: dict[str, Any] = {}
    if where != AUTO:
        given = _explicit(where, processes, process, os.environ)
    # Its handler would take SIGTERM from a process that does not train yet, and end nothing.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(initialization_timeout=_TIMEOUT, **given)
    except ValueError as error:
        raise ValueError(
            f'--distributed={where}: {error} No cluster is recognised here (SLURM, Open MPI, Cloud '
            'TPU, GKE, Kubernetes); start the command under one of them, or name the coordinator: '
            '--distributed=HOST:PORT --processes=N --process=I'
        ) from error
    except RuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
            raise
        raise TimeoutError(
            f'--distributed={where}: not all processes came within {_TIMEOUT} s; start the same '
            'command once for each of them, and let all reach the coordinator'
        ) from error


def _explicit(
    where: str, processes: int, process: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Return the arguments of JAX's initialisation for a coordinator that is named."""
    if not re.fullmatch(r'(\[[0-9a-fA-F:.]+\]|[^\s:\[\]]+):\d{1,5}', where):
        raise ValueError(
            f'--distributed is {where!r}; expected {NONE}, {AUTO}, or the HOST:PORT at which '
            'process 0 listens'
        )
    processes = processes or _number(environment, 'PROCESSES', 0)
    process = process if process >= 0 else _number(environment, 'PROCESS', -1)
    if not 0 <= process < processes:
        raise ValueError(
            f'--distributed={where} with --processes={processes} and --process={process}; expected '
            'how many processes there are, and which of them this is, from 0'
        )
    return {
        'coordinator_address': where,
        'num_processes': processes,
        'process_id': process,
        'cluster_detection_method': 'deactivate',
    }


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(_ENVIRONMENT + name, '').strip()
    if text and not text.isdecimal():
        raise ValueError(f'{_ENVIRONMENT}{name} is {text!r}; expected a whole number')
    return int(text) if text else default


def is_writer() -> bool:
    """Tell whether this process is the one that writes files and logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let what one process cannot do end all of them; every process must pass here.

    The first that has failed raises its own error.

    Raises:
        ElsewhereError: on the others.
    """
    if jax.process_count() == 1:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told = gather('' if failed is None else str(failed) or type(failed).__name__)
    first = next((number for number, sentence in enumerate(told) if sentence), None)
    if first == jax.process_index():
        failed.is_told = True
        raise failed
    if first is not None:
        raise ElsewhereError(f'process {first}: {told[first]}') from failed


def is_told(error: BaseException) -> bool:
    """Tell whether all processes have been told of this error by `together`."""
    return getattr(error, 'is_told', False)


def leave() -> None:
    """Part from the other processes of this run, once all of them have come here.

    The first one serves the others' coordination: were it gone before, JAX would end them.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def gather(value: Any) -> list[Any]:
    """Return every process's own small JSON value, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    if len(text) > _LONGEST:
        text = json.dumps(str(value)[: _LONGEST // 8]).encode()  # a letter may take six bytes
    padded = np.frombuffer(text.ljust(_LONGEST), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row.tobytes()) for row in rows]


@contextlib.contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Hold a directory for this run alone: the writer holds the lock, for all processes.

    Raises:
        InUseError, DiskError: as `files.lock`, on the writer.
        ElsewhereError: the same, on the others.
    """
    with contextlib.ExitStack() as held:
        with together():
            if is_writer():
                held.enter_context(files.lock(directory))
        with together():
            _check_shared(Path(directory))
        yield


def _check_shared(directory: Path) -> None:
    """Refuse a directory that is not the same one for all processes.

    Raises:
        ValueError: this process does not see what the writer has just written there.
    """
    if jax.process_count() == 1:
        return
    path = directory / files.LOCK_FILE
    there = files.holder() if is_writer() else path.read_text('utf-8') if path.is_file() else ''
    seen = gather(there)
    if seen[jax.process_index()] != seen[0]:
        raise ValueError(
            f'{directory} is not the same directory for process 0 and process '
            f'{jax.process_index()}; give a --workdir on a disk that all processes share'
        )


class Request:
    """A request that may reach any process, and of which all learn at the same step.

    What each has been asked travels beside the step, and is read one step late, so that the host
    never waits for the devices.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._made = False
        self._under_way: jax.Array | None = None
        self._everywhere = NamedSharding(mesh, P(mesh.axis_names))
        self._shape = (mesh.size,)
        whole = NamedSharding(mesh, P())
        self._sum = jax.jit(lambda flags: flags.sum(), out_shardings=whole)

    def make(self, *_: Any) -> None:
        """Ask for it: from a signal's handler, too."""
        self._made = True

    def at_step(self) -> bool:
        """Tell what all processes together have been asked, up to the step before.

        Every process must call it at every step.
        """
        if jax.process_count() == 1:
            return self._made
        made, before = np.int32(self._made), self._under_way
        flags = jax.make_array_from_callback(
            self._shape, self._everywhere, lambda index: np.full(1, made)
        )
        self._under_way = self._sum(flags)
        return before is not None and int(before) > 0
