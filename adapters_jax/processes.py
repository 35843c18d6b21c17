"""The processes of one run: how they find one another, who writes, and what they decide together.

Every process runs the same program over its own part of the batches and holds the same trained
leaves, so one of them writes what a run leaves on the disk. What only one of them can know - that
the directory is in use, that a file is missing on its disk, that it was asked to end - has to reach
the others before they wait for it in vain.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
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
_LONGEST = 2048  # bytes of what is told to the other processes
_FAILED, _VALUE = 'failed', 'value'  # the keys of what is told
_SEEN_WITHIN = 5  # seconds until other machines see what one has written


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


def barrier() -> None:
    """Wait until every process has come here.

    Raises:
        ElsewhereError: one of them has failed instead.
    """
    gather(None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let what one process cannot do end all of them; every process must pass here.

    The first that has failed raises its own error. Inside they may `gather`: there they are told of
    one that has failed before it came so far.

    Raises:
        ElsewhereError: on the others.
    """
    if jax.process_count() == 1:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except ElsewhereError:
        raise  # all have been told, and none waits here
    except Exception as error:
        if is_told(error):  # by a block within this one
            raise
        failed = error
    message = {} if failed is None else {_FAILED: str(failed) or type(failed).__name__}
    first, messages = _exchange(message)
    if first == jax.process_index():
        failed.is_told = True
        raise failed
    if first is not None:
        raise _elsewhere(first, messages) from failed


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
    """Return every process's own small JSON value, in the order of the processes.

    Raises:
        ElsewhereError: one of them has failed instead, in what all do `together`.
        ValueError: the value is too large.
    """
    if jax.process_count() == 1:
        return [value]
    first, messages = _exchange({_VALUE: value})
    if first is not None:
        raise _elsewhere(first, messages)
    return [message[_VALUE] for message in messages]


def check_alike(given: Mapping[str, Any]) -> None:
    """Refuse JSON values, by what they are called, that are not the same for all processes.

    Raises:
        ValueError: another one than process 0 has; what differs is named.
        ElsewhereError: the same, of another process.
    """
    if jax.process_count() == 1:
        return
    texts = {name: json.dumps(value, sort_keys=True) for name, value in given.items()}
    own = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    with together():
        first = gather(own)[0]
        differing = [name for name in own if own[name] != first[name]]
        if differing:
            raise ValueError(
                f'not the same here as for process 0: {", ".join(differing)}; give all processes '
                'the same command, over the same files'
            )


def _exchange(message: dict[str, Any]) -> tuple[int | None, list[dict[str, Any]]]:
    """Return the first process whose message is that it has failed, and all messages."""
    if _FAILED in message:
        message = _cut(message[_FAILED])
    text = json.dumps(message).encode()
    if len(text) > _LONGEST:
        raise ValueError(f'{len(text)} bytes are to be told to all processes, of {_LONGEST}')
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(_LONGEST), np.uint8))
    messages = [json.loads(row.tobytes()) for row in rows]
    failed = (number for number, message in enumerate(messages) if _FAILED in message)
    return next(failed, None), messages


def _cut(told: str) -> dict[str, str]:
    """Return the message that this process has failed, cut to what can be told of it.

    Outside of ASCII a letter takes six bytes, and some take twelve.
    """
    while len(json.dumps(message := {_FAILED: told})) > _LONGEST:
        told = told[: len(told) * 3 // 4]
    return message


def _elsewhere(number: int, messages: Sequence[Mapping[str, Any]]) -> ElsewhereError:
    return ElsewhereError(f'process {number}: {messages[number][_FAILED]}')


@contextlib.contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Hold a directory for this run alone: the writer holds the lock, for all processes.

    Raises:
        InUseError, DiskError: as `files.lock`, on the writer.
        ValueError: the directory is not the same one for all processes.
        ElsewhereError: the same, on the others.
    """
    with contextlib.ExitStack() as held:
        with together():
            if is_writer():
                held.enter_context(files.lock(directory))
        check_shared(Path(directory), 'give a --workdir on a disk that all processes share')
        yield


def check_shared(directory: Path, remedy: str) -> None:
    """Refuse a directory that is not the same one for all processes; the writer has made it.

    `remedy` ends the sentence.

    Raises:
        ValueError: this process does not see what the writer has just made there.
        ElsewhereError: another one does not.
    """
    if jax.process_count() == 1:
        return
    probe = directory / gather(f'.{secrets.token_hex(4)}.tmp')[0]
    try:
        with together():
            if is_writer():
                with files.explained(directory):
                    probe.touch()
            barrier()
            until = time.monotonic() + _SEEN_WITHIN
            while not probe.exists():
                if time.monotonic() > until:
                    raise ValueError(
                        f'{directory} is not the same directory for process 0 and process '
                        f'{jax.process_index()}; {remedy}'
                    )
                time.sleep(0.1)
    finally:
        if is_writer():
            probe.unlink(missing_ok=True)


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
