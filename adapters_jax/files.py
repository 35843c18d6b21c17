"""Writing that is whole or not at all, so that a kill or a full disk never leaves half a result.

Everything is written under a temporary name beside its final one, brought to the disk, and renamed.
"""

import contextlib
import errno
import fcntl
import glob
import json
import logging
import math
import os
import resource
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

LOCK_FILE = '.lock'
T = TypeVar('T')

_log = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
# Locks that this process holds: record locks do not exclude their own process.
_held: set[Path] = set()
_OTHER_FILES = 512  # that a process has open beside: data, libraries, checkpoints
_READ_AGAIN_S = 60  # that a directory is read again which is being replaced
_BETWEEN_STEPS_S = 1.0  # that a replacement may take from its first step to its second
_OWN_HOST = f'{socket.gethostname()}-'  # of a temporary name; the process's number follows


class DiskError(OSError):
    """A full disk or a directory that may not be written to, in one sentence with a remedy."""

    def __str__(self) -> str:
        return self.strerror


class InUseError(RuntimeError):
    """Another run works in the same directory."""


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals to write `path` into a sentence with a remedy.

    Raises:
        DiskError: the disk is full, or the directory may not be written to; other errors pass.
        FileExistsError: a directory in it is a file.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        for above in (Path(path), *Path(path).parents):
            if error.errno in (errno.ENOTDIR, errno.EEXIST) and above.is_file():
                raise FileExistsError(
                    f'{above} is a file: remove it, or choose another directory'
                ) from error
        if error.errno not in _FULL + _FORBIDDEN:
            raise
        raise refusal(error.errno, path) from error


def refusal(code: int, path: Path | str) -> DiskError:
    """Return the error for an `errno` of a full disk or a directory that may not be written to."""
    reason = os.strerror(code).lower()
    if code in _FULL:
        remedy = f'no room to write {path} ({reason}): free some space, or choose another directory'
    else:
        remedy = f'{path} cannot be written ({reason}): choose a directory that you may write to'
    return DiskError(code, remedy)


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Give a name beside `path` to write a file or a directory to; it becomes `path` at the end.

    If the block fails, nothing of it remains and what was at `path` stays; what a killed process
    left of its own attempt at `path` is removed. A directory that takes the place of another is
    renamed in two steps; `recover` mends a kill between the two.

    Raises:
        DiskError: the disk is full, or the directory may not be written to.
        FileExistsError: a file is to replace a directory, a directory a file, or either a device or
            a pipe.
    """
    path = _target(path)
    temporary = path.with_name(f'.{path.name}.{_OWN_HOST}{os.getpid()}-{secrets.token_hex(4)}.tmp')
    with explained(path):
        _refuse_special(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        _remove_leftovers(path)
        try:
            yield temporary
            _sync_tree(temporary)
            _replace(temporary, path)
        finally:
            _remove(temporary)
        _sync(path.parent)


def recover(path: Path | str) -> None:
    """Bring back the directory that a kill caught between the two steps of its replacement.

    That is for its writers alone; see `read_whole`.
    """
    path = _target(path)
    previous = _previous(path)
    if not previous.exists():
        return
    if path.exists():
        shutil.rmtree(previous)
    else:
        previous.rename(path)


def read_whole(directory: Path | str, read: Callable[[Path], T]) -> T:
    """Return what `read` makes of a directory that `atomic` may be replacing at this moment.

    It is read again where it was replaced meanwhile, so that nothing is a mixture of the two, and
    nothing is changed. Where a kill has caught the replacement, what was there before is read.

    Raises:
        InUseError: it was replaced again each time that it was read, for a minute.
    """
    directory = _target(directory)
    start = time.monotonic()
    while (waited := time.monotonic() - start) < _READ_AGAIN_S:
        place = directory
        if not directory.exists() and _previous(directory).exists():
            if waited < _BETWEEN_STEPS_S:
                time.sleep(0.02)
                continue
            place = _previous(directory)
        with _stays(place) as stayed:
            try:
                found = read(place)
            except (OSError, ValueError):
                if stayed():
                    raise
            else:
                if stayed():
                    return found
    raise InUseError(
        f'{directory} was replaced again and again while it was read, for {_READ_AGAIN_S} s: '
        'wait for the run that writes it, or read a copy'
    )


def make_directory(path: Path | str) -> Path:
    """Make a directory, with its parents, where there is none; make sure it can be written to.

    Raises:
        DiskError: the disk is full, or the directory may not be written to.
        FileExistsError: there is a file of that name.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f'{path} is a file: remove it, or choose another directory')
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f'.{secrets.token_hex(4)}.tmp'
        probe.touch()
        probe.unlink()
    return path


def check_descriptors(count: int, remedy: str) -> None:
    """Refuse to open so many files at once, beside others, if the system does not allow it.

    Raises:
        ValueError: with `remedy` at its end.
    """
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES

    def enough(limit: int) -> bool:
        return limit == resource.RLIM_INFINITY or limit >= wanted

    if not enough(hard):
        raise ValueError(
            f'{count:,} files would be open at once, and this system allows a process {hard:,} '
            f'(`ulimit -Hn`); {remedy}'
        )
    if not enough(most):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_target(path: Path | str) -> None:
    """Make sure that a file can be written, before what is to be in it takes long to find.

    Raises:
        DiskError: its directory may not be written to.
        FileExistsError: it is a directory, a device or a pipe, or its directory is a file.
    """
    path = Path(path)
    with explained(path):
        if path.is_dir():
            raise FileExistsError(f'{path} is a directory: remove it, or choose another name')
        _refuse_special(path)
    make_directory(path.parent)


def _refuse_special(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        said = 'is a device or a pipe, which a file would take the place of'
        raise FileExistsError(f'{path} {said}: give the name of a file')


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, in UTF-8.

    Raises:
        DiskError: the disk is full, or the directory may not be written to.
    """
    with atomic(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def write_json(path: Path | str, value: Any) -> None:
    """Write a JSON file atomically; see `plain` for what becomes of arrays, NaN and infinity.

    Raises:
        DiskError: the disk is full, or the directory may not be written to.
    """
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + '\n')


def plain(value: Any) -> Any:
    """Return `value` as JSON can hold it.

    Arrays become lists or numbers, paths strings, and the floats that JSON does not have become
    'nan', 'inf' and '-inf'.
    """
    if hasattr(value, 'items'):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, 'tolist'):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def lock(directory: Path | str) -> Iterator[None]:
    """Hold a directory for this process alone; the lock goes when the process does.

    Processes that this one forks do not hold it, so workers that outlive a killed run are no
    obstacle to the next one.

    Raises:
        InUseError: another run holds it.
        DiskError: the directory may not be written to.
    """
    path = Path(directory).resolve() / LOCK_FILE
    # Not opened twice by one process: closing either file would release the lock.
    if path in _held:
        raise InUseError(_in_use(directory, 'this process'))
    with explained(directory):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer: what could not be written would be tried again on closing.
        file = path.open('a+b', buffering=0)
    with file:
        with explained(directory):
            _lock_or_refuse(file, directory)
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)


def _lock_or_refuse(file: Any, directory: Path | str) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            _log.warning('%s is on a file system without locks: start one run at a time', directory)
        elif error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            other = file.read().decode(errors='replace').strip() or 'another process'
            raise InUseError(_in_use(directory, other)) from error
        else:
            raise
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}'.encode())


def _in_use(directory: Path | str, holder: str) -> str:
    return (
        f'{directory} is in use by another run ({holder}): wait for it, stop it, '
        'or choose another directory'
    )


def _target(path: Path | str) -> Path:
    """Return what a link leads to: that is replaced, and the link stays."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def _stays(path: Path) -> Iterator[Callable[[], bool]]:
    """Give a function that tells if what is at `path` is still what was there at the start.

    It is held open meanwhile: the number of a directory that is gone and closed may be given to
    the next one, within one tick of the clock that directories are dated by.
    """
    descriptor = _open(path)
    if descriptor is None:
        yield lambda: not path.exists()
        return
    try:
        yield lambda: _is_open_as(path, descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _previous(path: Path) -> Path:
    return path.with_name(f'.{path.name}.previous')


def _replace(temporary: Path, path: Path) -> None:
    if path.exists() and path.is_dir() != temporary.is_dir():
        kind = 'directory' if path.is_dir() else 'file'
        raise FileExistsError(f'{path} is a {kind}: remove it, or choose another name')
    if not path.is_dir():
        temporary.replace(path)
        return
    previous = _previous(path)
    path.rename(previous)
    temporary.rename(path)
    shutil.rmtree(previous)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files and directories for `path` of processes that are no more."""
    own = f'.{path.name}.{_OWN_HOST}'
    for left in path.parent.glob(f'{glob.escape(own)}*.tmp'):
        process = left.name.removeprefix(own).partition('-')[0]
        if process.isdecimal() and not _runs(int(process)):
            _remove(left)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(path: Path) -> None:
    for inner in path.rglob('*') if path.is_dir() else ():
        _sync(inner)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
