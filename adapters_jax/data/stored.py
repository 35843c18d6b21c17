"""An array larger than memory, in a folder of its own: mapped when read, and whole or not there.

The folder holds the bare numbers and a header that says of what they are; the header comes last.
What is kept can always be computed again, so a flaw is said and mended, and is never an error.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import mmap
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax import files

NUMBERS, HEADER = 'numbers.bin', 'header.json'
MARGIN = 2**28  # bytes left free on the disk: checkpoints and adapters go there, too
SAMPLES = 64  # pages whose checksums are compared when an array is read; all would take minutes
POLL = 0.5  # seconds between looks at whether another run has finished writing

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """An array that is, or will be, in `directory`.

    `of` says in JSON values what decides the numbers; an array stored of something else is none.
    """

    directory: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    of: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of the numbers."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def read(self) -> np.ndarray | None:
        """The array, mapped from the disk, or None where it is not there; flaws are logged."""
        if not (self.directory / HEADER).is_file():
            return None
        flaw = self._flaw()
        if flaw:
            _LOG.warning('What %s holds is damaged (%s): computing it again.', self.directory, flaw)
        return None if flaw else self._map()

    def make(self, fill: Callable[[np.ndarray], None]) -> np.ndarray:
        """The array as it is stored; where it is not, `fill` writes the numbers first.

        Of several processes that make the same array one fills it and the others wait for it. A
        write that fails or is killed leaves nothing that `read` would find. Raises DiskError where
        the disk is full or the directory may not be written to.
        """
        with _alone(self.directory):
            if self._flaw():
                self._write(fill)
        return self._map()

    def _write(self, fill: Callable[[np.ndarray], None]) -> None:
        (self.directory / HEADER).unlink(missing_ok=True)
        for left_by_a_kill in self.directory.glob('.*.tmp'):
            left_by_a_kill.unlink()
        with files.atomic(self.directory / NUMBERS) as temporary:
            _reserve(temporary, self.nbytes)
            array = np.memmap(temporary, self.dtype, 'r+', shape=self.shape)
            fill(array)
            array.flush()
            samples = self._samples(temporary)
        files.write_json(self.directory / HEADER, self._header | {'samples': samples})

    def _map(self) -> np.ndarray:
        mapped = np.memmap(self.directory / NUMBERS, self.dtype, 'r', shape=self.shape)
        # A plain array over the map: indexing a numpy.memmap costs more and means the same.
        return mapped.view(np.ndarray)

    @property
    def _header(self) -> dict[str, Any]:
        shape, dtype = list(self.shape), np.dtype(self.dtype).name
        return {'of': dict(self.of), 'shape': shape, 'dtype': dtype, 'bytes': self.nbytes}

    def _flaw(self) -> str:
        """What is wrong with the files, in words; nothing where they hold this array."""
        try:
            header = json.loads((self.directory / HEADER).read_text('utf-8'))
            size = (self.directory / NUMBERS).stat().st_size
        except (OSError, ValueError) as error:
            return str(error)
        if not isinstance(header, dict) or header | self._header != header:
            return f'{HEADER} describes another array'
        if size != self.nbytes:
            return f'{NUMBERS} has {size} bytes instead of {self.nbytes}'
        if header.get('samples') != self._samples(self.directory / NUMBERS):
            return f'{NUMBERS} holds other numbers than were written'
        return ''

    def _samples(self, path: Path) -> list[int]:
        """The checksums of pages spread evenly from the first to the last."""
        last = max(0, self.nbytes - mmap.PAGESIZE)
        places = np.unique(np.linspace(0, last, SAMPLES).astype(np.int64))
        with path.open('rb') as file:
            return [zlib.crc32(_page(file, int(place))) for place in places]


def remembered(stored: Stored, fill: Callable[[np.ndarray], None], what: str) -> np.ndarray:
    """The array of a cache; where it is not there, `fill` writes it first.

    what: the cache, for messages. Raises DiskError where it would leave too little of the disk.
    """
    found = stored.read()
    if found is not None:
        return found
    remedy = "free some space, or set another data.cache_dir, or 'none'"
    check_room(stored.directory, stored.nbytes, what, remedy)
    return stored.make(fill)


def check_mapped(columns: Iterable[np.ndarray]) -> None:
    """Look whether arrays that are mapped from files can be read.

    Reading on where a file was cut would end the process (SIGBUS) without a word.

    Raises:
        OSError: a file that is shorter than it was.
    """
    for column in columns:
        if isinstance(column.base, np.memmap):
            with contextlib.suppress(FileNotFoundError):  # what was mapped of it stays readable
                size = Path(column.base.filename).stat().st_size
                if size < column.nbytes:
                    raise OSError(
                        f'{column.base.filename} has been cut to {size} bytes of {column.nbytes} '
                        'while it was read; the same command computes it again'
                    )


def check_room(directory: Path, needed: int, what: str, remedy: str) -> None:
    """Raises DiskError, which names the remedy, where so many bytes more do not fit on the disk."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed + MARGIN > free:
        raise files.DiskError(
            errno.ENOSPC,
            f'{what} needs {readable(needed)} in {directory}, but of the {readable(free)} free '
            f'there {readable(MARGIN)} are to stay free: {remedy}',
        )


def readable(size: int) -> str:
    """Bytes in words: '1.2 GB'."""
    for unit, scale in (('GB', 10**9), ('MB', 10**6), ('kB', 10**3)):
        if size >= scale:
            return f'{size / scale:,.1f} {unit}'
    return f'{size} bytes'


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a directory's lock; wait for it where another run holds it."""
    with contextlib.ExitStack() as held:
        waiting = False
        while True:
            try:
                held.enter_context(files.lock(directory))
                break
            except files.InUseError:
                if not waiting:
                    _LOG.info('Another run is writing %s: waiting for it.', directory)
                waiting = True
                time.sleep(POLL)
        yield


def _reserve(path: Path, size: int) -> None:
    """Make a file of that size whose room is taken.

    A write through a map to a disk that has become full would end the process.
    """
    with path.open('wb') as file:
        if hasattr(os, 'posix_fallocate'):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _page(file: Any, place: int) -> bytes:
    file.seek(place)
    return file.read(mmap.PAGESIZE)
