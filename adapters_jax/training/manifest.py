"""Tells a sound checkpoint from a damaged one, before anything tries to read its arrays.

A checkpoint is a directory named by its step. Its manifest holds the digest of every other file,
a digest of itself, and what the run must know of the checkpoint without opening it.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax import files

MANIFEST = 'manifest.json'
DAMAGED = 'damaged-'
# Orbax enters the time of completion into the first, and makes the second, after the manifest.
_METADATA, _COMMITTED = '_CHECKPOINT_METADATA', 'commit_success.txt'

_log = logging.getLogger(__name__)
Manifest = dict[str, Any]


def as_json(value: Any) -> Any:
    """Return `value` as it will be read back, which later changes to `value` do not alter."""
    return json.loads(json.dumps(files.plain(value)))


def write(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Seal a complete checkpoint: write its manifest, with the digests of its files."""
    content = as_json(manifest | {'files': _digests(directory)})
    files.write_json(directory / MANIFEST, {'seal': _seal(content), 'content': content})


def read(directory: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    try:
        sealed = json.loads((directory / MANIFEST).read_bytes())
        intact = sealed['seal'] == _seal(sealed['content'])
    except FileNotFoundError:
        raise FileNotFoundError(f'{MANIFEST} is missing') from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f'{MANIFEST} is not as it was written')
    return sealed['content']


def read_all(directory: Path) -> dict[int, Manifest]:
    """Return the manifests of all checkpoints in a directory by step, in order."""
    return {step: read(path) for step, path in sorted(_steps(directory).items())}


def best(manifests: Mapping[int, Manifest]) -> int | None:
    """Return the step with the largest metric, the earliest of equals; None without any metric."""
    measured = {s: m['metric'] for s, m in manifests.items() if _is_number(m['metric'])}
    return max(measured, key=lambda step: (measured[step], -step), default=None)


def set_damaged_aside(directory: Path) -> None:
    """Leave only sound checkpoints in the directory, and warn of each that is not.

    Damaged ones newer than every sound one are renamed, not removed. An incomplete one that is
    older is what an interrupted deletion left.
    """
    sound = False
    for step, path in sorted(_steps(directory).items(), reverse=True):
        fault = find_fault(path)
        if fault is None:
            sound = True
        elif sound:
            _log.warning('removed the incomplete checkpoint of step %d (%s)', step, fault)
            shutil.rmtree(path)
        else:
            aside = _free_name(directory / f'{DAMAGED}{step}')
            path.rename(aside)
            message = 'the checkpoint of step %d is damaged (%s): falling back to an earlier one'
            _log.warning(message + '; it is kept as %s', step, fault, aside)


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        expected, found = read(path)['files'], _digests(path)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f'{name} is missing'
        if found[name] != expected.get(name):
            return f'{name} is not as it was written'
    return None


def _steps(directory: Path) -> dict[int, Path]:
    found = directory.iterdir() if directory.is_dir() else ()
    return {int(path.name): path for path in found if path.name.isdecimal() and path.is_dir()}


def _free_name(path: Path) -> Path:
    count = sum(other.name.startswith(path.name) for other in path.parent.iterdir())
    return path.with_name(f'{path.name}-{count}') if count else path


def _digests(directory: Path) -> dict[str, str]:
    """Return the digest of each file of a checkpoint by its relative name."""
    found = (path for path in directory.rglob('*') if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in found}
    late = (MANIFEST, _METADATA, _COMMITTED)
    digests = {name: _digest_file(path) for name, path in names.items() if name not in late}
    return digests | {_METADATA: _digest_metadata(directory / _METADATA)}


def _digest_file(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'blake2b').hexdigest()[:32]


def _digest_metadata(path: Path) -> str:
    try:
        metadata = json.loads(path.read_bytes())
        metadata.pop('commit_timestamp_nsecs', None)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path.name} is missing') from None
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f'{path.name} is not as it was written') from None
    return _seal(metadata)


def _seal(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode()).hexdigest()[:32]


def _is_number(metric: Any) -> bool:
    return isinstance(metric, int | float) and math.isfinite(metric)
