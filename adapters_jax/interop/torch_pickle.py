"""PyTorch's pickled checkpoints (pytorch_model.bin) as numpy arrays, without running any of them.

A pickle is a program: it may call whatever it can name. This reader lets it name a few things that
only describe tensors, and refuses everything else before it is called. What the pickle builds are
inert tuples; arrays are made from them afterwards, by numpy's own bounds-checked constructor, as
views of the memory-mapped file.

Two containers exist: since PyTorch 1.6 a zip archive with `data.pkl` and one uncompressed file a
storage; before that ('legacy') pickles one after the other, followed by the storages.
"""

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

_ZIP_MAGIC = b'PK\x03\x04'
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_ZIP_LOCAL_HEADER = struct.Struct(
    '<26xHH'
)  # its last two fields: lengths of the name and the extra
# What a pickle that is damaged, or built to do harm, makes the unpickler raise.
_MALFORMED = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
)

_STORAGES = {
    'DoubleStorage': np.float64,
    'FloatStorage': np.float32,
    'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': np.int64,
    'IntStorage': np.int32,
    'ShortStorage': np.int16,
    'CharStorage': np.int8,
    'ByteStorage': np.uint8,
    'BoolStorage': np.bool_,
    'ComplexFloatStorage': np.complex64,
    'ComplexDoubleStorage': np.complex128,
    'UntypedStorage': np.uint8,
}
_DTYPES = {
    'float64': np.float64,
    'float32': np.float32,
    'float16': np.float16,
    'bfloat16': ml_dtypes.bfloat16,
    'float8_e4m3fn': ml_dtypes.float8_e4m3fn,
    'float8_e5m2': ml_dtypes.float8_e5m2,
    'int64': np.int64,
    'int32': np.int32,
    'int16': np.int16,
    'int8': np.int8,
    'uint64': np.uint64,
    'uint32': np.uint32,
    'uint16': np.uint16,
    'uint8': np.uint8,
    'bool': np.bool_,
}


class RefusedGlobalError(pickle.UnpicklingError, ValueError):
    """A pickle that names something besides tensors and plain containers."""


# Everything below that a pickle can lay hands on is without attributes to set: the opcode BUILD
# changes the object before it, and must find nothing to change. Hence no frozen dataclass (it has a
# __dict__), no plain function, no array and no dtype.


class _StorageType(NamedTuple):
    name: str


class _DType(NamedTuple):
    name: str


class _Storage(NamedTuple):
    key: str
    type: str
    length: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class _Callable:
    __slots__ = ()


class _RebuildTensor(_Callable):
    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        _expect(storage, _Storage)
        return _tensor(storage, offset, shape, strides, storage.type)


class _RebuildTypedTensor(_Callable):
    def __call__(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        strides: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
        *rest: Any,
    ) -> _Tensor:
        _expect(storage, _Storage)
        _expect(dtype, _DType)
        return _tensor(storage, offset, shape, strides, dtype.name)


class _RebuildParameter(_Callable):
    def __call__(self, data: Any, *rest: Any) -> _Tensor:
        _expect(data, _Tensor)
        return data


class _Size(_Callable):
    def __call__(self, sizes: Any = ()) -> tuple[int, ...]:
        return _integers(sizes)


_ALLOWED: dict[tuple[str, str], Any] = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch', 'Size'): _Size(),
    ('torch._utils', '_rebuild_tensor_v2'): _RebuildTensor(),
    ('torch._utils', '_rebuild_tensor_v3'): _RebuildTypedTensor(),
    ('torch._utils', '_rebuild_parameter'): _RebuildParameter(),
    ('torch.storage', 'UntypedStorage'): _StorageType('UntypedStorage'),
    **{('torch', name): _StorageType(name) for name in _STORAGES},
    **{('torch', name): _DType(name) for name in _DTYPES},
}


def _tensor(storage: _Storage, offset: Any, shape: Any, strides: Any, dtype: str) -> _Tensor:
    _expect(offset, int)
    return _Tensor(storage, offset, _integers(shape), _integers(strides), dtype)


def _integers(values: Any) -> tuple[int, ...]:
    _expect(values, tuple)
    for value in values:
        _expect(value, int)
    return values


def _expect(value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise pickle.UnpicklingError(
            f'a {type(value).__name__} stands where a {kind.__name__} must'
        )


class _Unpickler(pickle.Unpickler):
    """An unpickler whose only globals are those of the allow-list."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of an allowed global; refuse any other."""
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise RefusedGlobalError(f'{module}.{name}') from None

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the description of a storage."""
        _expect(pid, tuple)
        kind, storage_type, key, _location, length, *view = pid
        if kind != 'storage' or any(part is not None for part in view):
            raise pickle.UnpicklingError(f'persistent id {kind!r} is not a whole storage')
        for value, expected in ((storage_type, _StorageType), (key, str), (length, int)):
            _expect(value, expected)
        return _Storage(key, storage_type.name, length)


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a PyTorch state dict by name, as read-only views of the mapped file.

    Tensors that share a storage share memory. bfloat16 and float8 have the dtypes of `ml_dtypes`.

    Raises:
        FileNotFoundError: there is no such file.
        RefusedGlobalError: the pickle names something that is neither a tensor nor a plain
            container; nothing of it was called.
        ValueError: a truncated or corrupt file, or one that is no dict of tensors.
    """
    path = Path(path)
    with path.open('rb') as file:
        try:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
            file.seek(0)
            read = _read_zip if is_zip else _read_legacy
            described, storages = read(file)
            return _arrays(described, storages)
        except RefusedGlobalError as error:
            raise RefusedGlobalError(
                f'{path} is refused: it asks for {error}, and only tensors and plain containers '
                'are read from a pickle; save the weights as safetensors, or as a bare state dict'
            ) from None
        except (*_MALFORMED, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f'{path} is not a whole PyTorch state dict: {error}') from error


def _arrays(described: Any, storages: Callable[[_Storage], np.ndarray]) -> dict[str, np.ndarray]:
    if not isinstance(described, Mapping):
        raise ValueError(f'it holds a {type(described).__name__}, expected a dict of tensors')
    others = [
        repr(name)
        for name, value in described.items()
        if not (isinstance(name, str) and isinstance(value, _Tensor))
    ]
    if others:
        raise ValueError(f'these entries are not named tensors: {", ".join(others[:20])}')
    return {name: _view(tensor, storages(tensor.storage)) for name, tensor in described.items()}


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    dtype = np.dtype(_STORAGES.get(tensor.dtype) or _DTYPES[tensor.dtype])
    if len(tensor.shape) != len(tensor.strides):
        raise ValueError(f'a tensor has shape {tensor.shape} but strides {tensor.strides}')
    # For a storage without type, torch counts the offset in elements of the tensor.
    view = np.ndarray(
        tensor.shape,
        dtype,
        buffer=storage,
        offset=tensor.offset * dtype.itemsize,
        strides=[stride * dtype.itemsize for stride in tensor.strides],
    )
    view.flags.writeable = False
    return view


def _unpickle(file: BinaryIO) -> Any:
    return _Unpickler(file, encoding='utf-8').load()


def _nbytes(storage: _Storage) -> int:
    return storage.length * np.dtype(_STORAGES[storage.type]).itemsize


def _mapped(file: BinaryIO) -> np.ndarray:
    return np.asarray(np.memmap(file, dtype=np.uint8, mode='r'))


def _aligned(content: np.ndarray) -> np.ndarray:
    # Views at odd addresses are slow, and not every consumer of arrays takes them.
    return content if content.ctypes.data % 16 == 0 else content.copy()


def _read_zip(file: BinaryIO) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    archive = zipfile.ZipFile(file)
    if any(entry.header_offset < 0 for entry in archive.infolist()):
        raise ValueError('its directory of contents points to before its beginning')
    pickles = [name for name in archive.namelist() if name.endswith('/data.pkl')]
    if len(pickles) != 1:
        raise ValueError(f'the zip archive has {len(pickles)} files named data.pkl, expected one')
    root = pickles[0].removesuffix('data.pkl')
    if f'{root}byteorder' in archive.namelist() and archive.read(f'{root}byteorder') != b'little':
        raise ValueError('it was written on a big-endian machine, which is not supported')
    mapped = _mapped(file)
    checked: dict[str, np.ndarray] = {}

    def storage_bytes(storage: _Storage) -> np.ndarray:
        if storage.key not in checked:
            checked[storage.key] = _zip_entry(archive, mapped, f'{root}data/{storage.key}')
        if len(checked[storage.key]) < _nbytes(storage):
            raise ValueError(f'storage {storage.key} is shorter than it should be')
        return checked[storage.key]

    return _unpickle(io.BytesIO(archive.read(pickles[0]))), storage_bytes


def _zip_entry(archive: zipfile.ZipFile, mapped: np.ndarray, name: str) -> np.ndarray:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        return np.frombuffer(archive.read(name), np.uint8)
    header = mapped[info.header_offset : info.header_offset + _ZIP_LOCAL_HEADER.size]
    start = info.header_offset + header.size + sum(_ZIP_LOCAL_HEADER.unpack(header.tobytes()))
    content = mapped[start : start + info.file_size]
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise ValueError(f'{name} inside it is damaged (its checksum differs)')
    return _aligned(content)


def _read_legacy(file: BinaryIO) -> tuple[Any, Callable[[_Storage], np.ndarray]]:
    if _unpickle(file) != _LEGACY_MAGIC or _unpickle(file) != _LEGACY_PROTOCOL:
        raise ValueError('it is neither a zip archive nor in the legacy format')
    if not _unpickle(file).get('little_endian', True):
        raise ValueError('it was written on a big-endian machine, which is not supported')
    types: dict[str, _Storage] = {}
    described = _LegacyUnpickler(file, types).load()
    keys = _unpickle(file)
    _expect(keys, list)
    found: dict[str, np.ndarray] = {}
    position = file.tell()
    mapped = _mapped(file)  # moves the file's position
    for key in keys:
        nbytes = _nbytes(types[key])
        header = types[key].length.to_bytes(8, 'little')
        content = mapped[position + 8 : position + 8 + nbytes]
        if mapped[position : position + 8].tobytes() != header or len(content) != nbytes:
            raise ValueError(f'it ends inside storage {key}, or its lengths disagree')
        found[key] = _aligned(content)
        position += 8 + nbytes
    return described, lambda storage: found[storage.key]


class _LegacyUnpickler(_Unpickler):
    """Notes every storage, since the legacy format gives a storage's dtype in the pickle alone."""

    def __init__(self, file: BinaryIO, types: dict[str, _Storage]) -> None:
        super().__init__(file, encoding='utf-8')
        self._types = types

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the description of a storage, and note it."""
        storage = super().persistent_load(pid)
        if self._types.setdefault(storage.key, storage) != storage:
            raise pickle.UnpicklingError(f'storage {storage.key} is described in two ways')
        return storage
