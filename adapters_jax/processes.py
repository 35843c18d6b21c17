"""The processes of one run: who writes, and how they wait for one another.

Every process runs the same program over its own part of the batches and holds the same trained
leaves, so one of them writes what a run leaves on the disk.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from adapters_jax import files


def is_writer() -> bool:
    """Tell whether this process is the one that writes files and logs."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def locked(directory: Path | str) -> Iterator[None]:
    """Hold a directory for this run alone: the writer holds the lock, for all processes.

    Raises:
        InUseError, DiskError: as `files.lock`.
    """
    with files.lock(directory) if is_writer() else contextlib.nullcontext():
        yield
