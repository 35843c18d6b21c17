"""The weights in a checkpoint's folder, in whichever of the four usual layouts they come.

`model.safetensors` or `pytorch_model.bin`, each whole or in shards that an index file names.
Tensors are views of memory-mapped files, and a tensor that nobody asks for is never copied.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from adapters_jax.interop import torch_pickle

SAFETENSORS = 'model.safetensors'
TORCH = 'pytorch_model.bin'
# In order of preference: safetensors cannot hold code, and whole files need no index.
WEIGHT_FILES = (SAFETENSORS, f'{SAFETENSORS}.index.json', TORCH, f'{TORCH}.index.json')

_LFS_POINTER = b'version https://git-lfs'
_DTYPES = {
    'F64': np.float64,
    'F32': np.float32,
    'F16': np.float16,
    'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2,
    'I64': np.int64,
    'I32': np.int32,
    'I16': np.int16,
    'I8': np.int8,
    'U64': np.uint64,
    'U32': np.uint32,
    'U16': np.uint16,
    'U8': np.uint8,
    'BOOL': np.bool_,
    'C64': np.complex64,
}


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of one safetensors file by name; each is mapped into memory when asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a truncated or corrupt file, or a dtype that numpy does not have.
    """

    def __init__(self, path: Path) -> None:
        check_is_weights(path)
        try:
            # The library's own check: the header parses, offsets are in order and cover the file.
            with safe_open(path, framework='np'):
                pass
        except SafetensorError as error:
            raise ValueError(f'{path} is not a whole safetensors file: {error}') from error
        with path.open('rb') as file:
            header_length = int.from_bytes(file.read(8), 'little')
            header = json.loads(file.read(header_length))
        header.pop('__metadata__', None)
        self._path = path
        self._start = 8 + header_length
        self._entries: dict[str, dict[str, Any]] = header

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        if entry['dtype'] not in _DTYPES:
            raise ValueError(
                f'{self._path}: {name} is stored as {entry["dtype"]}, unknown to numpy'
            )
        dtype, shape = np.dtype(_DTYPES[entry['dtype']]), tuple(entry['shape'])
        begin, end = entry['data_offsets']
        if begin == end:
            return np.zeros(shape, dtype)
        mapped = np.memmap(self._path, np.uint8, 'r', self._start + begin, end - begin)
        return np.require(np.asarray(mapped).view(dtype).reshape(shape), requirements='A')

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Shards(Mapping[str, np.ndarray]):
    """The tensors of several files as one mapping."""

    def __init__(self, files: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        self._file_of = {name: file for file in files.values() for name in file}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def read_tensors(directory: Path | str) -> Mapping[str, np.ndarray]:
    """Return the weights in a checkpoint's folder by torch name, read from disk when asked for.

    safetensors are preferred to pickles, which are read without being executed.

    Raises:
        FileNotFoundError: the folder, a weight file in it, or a shard that an index names is
            missing; what is there is listed.
        ValueError: a truncated or corrupt file, or an index that disagrees with its shards.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f'{directory} is not a folder; expected one with a checkpoint in it'
        )
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return (
                _read_index(directory / name)
                if name.endswith('.json')
                else _reader(name)(directory / name)
            )
    raise FileNotFoundError(
        f'{directory} has no weights: expected one of {", ".join(WEIGHT_FILES)}; it holds '
        f'{contents(directory)}'
    )


def values_sha256(tensors: Mapping[str, np.ndarray], without: Collection[str] = ()) -> str:
    """Return the sha256 of names, shapes and numbers rounded to float16, in the names' order.

    So it is the same for files that keep the same weights in 32 and in 16 bits. `without` are names
    of tensors that some files have and others do not.
    """
    digest = hashlib.sha256()
    for name in sorted(set(tensors).difference(without)):
        with np.errstate(over='ignore'):  # other weights may be larger than these 16 bits allow
            values = np.ascontiguousarray(tensors[name], np.float16)
        digest.update(f'{name}:{values.shape}\n'.encode())
        digest.update(values.data)
    return digest.hexdigest()


def contents(directory: Path) -> str:
    """Return the names in a folder, for messages."""
    names = sorted(path.name for path in directory.iterdir())
    more = f' and {len(names) - 20} more' if len(names) > 20 else ''
    return ', '.join(names[:20]) + more if names else 'nothing'


def check_is_weights(path: Path) -> None:
    """Raise ValueError for the text that git keeps in place of a large file."""
    with path.open('rb') as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f'{path} is a Git LFS pointer, not the weights: run `git lfs pull`')


def _reader(name: str) -> Callable[[Path], Mapping[str, np.ndarray]]:
    return SafetensorsFile if name.endswith('.safetensors') else _read_torch


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    check_is_weights(path)
    return torch_pickle.load(path)


def _read_index(path: Path) -> Shards:
    weight_map = _weight_map(path)
    files = sorted(set(weight_map.values()))
    # A name with a folder in it could lead anywhere on the disk.
    outside = [file for file in files if Path(file).name != file]
    if outside:
        raise ValueError(f'{path} names shards outside its folder: {", ".join(outside)}')
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f'{path} names shards that are missing: {", ".join(missing)}; the folder holds '
            f'{contents(path.parent)}'
        )
    shards = {file: _reader(file)(path.parent / file) for file in files}
    found = {(name, file) for file, tensors in shards.items() for name in tensors}
    differing = sorted({name for name, _ in found ^ set(weight_map.items())})
    if differing:
        raise ValueError(
            f'{path} and its shards disagree about where these tensors are: {", ".join(differing)}'
        )
    return Shards(shards)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text('utf-8'))['weight_map']
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not an index of shards: {error!r}') from error
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{path} is not an index of shards: 'weight_map' must map names to files")
    return weight_map
