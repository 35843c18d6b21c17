"""The weights in a model.bin of CTranslate2: named arrays in a file that needs no code to read.

Some checkpoints can be had in this form only. The layout, version 6 (all numbers little-endian;
a string is its length with the closing zero in 2 bytes, its bytes, and the zero):

    uint32 version | string specification | uint32 revision | uint32 number of arrays
    each array:    string name | uint8 rank | uint32 sizes [rank] | uint8 type | uint32 bytes | data
    uint32 number of aliases
    each alias:    string name | string name of an array
"""

import dataclasses
import math
import struct

import ml_dtypes
import numpy as np

VERSION = 6
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)
_HIGHEST_RANK = 8  # far more than any array has: a larger number is a damaged file


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """What a model.bin holds; `aliases` are further names of arrays."""

    specification: str
    revision: int
    arrays: dict[str, np.ndarray]
    aliases: dict[str, str]


def read(content: bytes, name: str = 'model.bin') -> Contents:
    """Return the arrays in the bytes of a model.bin, as views of them; every byte is accounted for.

    `name` is what errors call it.

    Raises:
        ValueError: another version, or a file that is truncated or damaged.
    """
    reader = _Reader(content, name)
    version = reader.number('I', 'the version')
    if version != VERSION:
        raise ValueError(
            f'{name} begins with {version}, expected {VERSION}, the version of the CTranslate2 '
            'format that can be read here; convert the model again with a CTranslate2 of version 3 '
            'or 4, or fetch the file again'
        )
    specification = reader.string('the specification')
    revision = reader.number('I', 'the revision')
    arrays: dict[str, np.ndarray] = {}
    for _ in range(reader.number('I', 'the number of arrays')):
        found = reader.string("an array's name")
        if found in arrays:
            raise reader.damaged(f'there are two arrays {found!r}')
        arrays[found] = reader.array(found)
    aliases = {}
    for _ in range(reader.number('I', 'the number of aliases')):
        alias, found = reader.string('an alias'), reader.string('what an alias stands for')
        if alias in arrays or alias in aliases or found not in arrays:
            raise reader.damaged(f'{alias!r} is no other name of an array ({found!r})')
        aliases[alias] = found
    if reader.rest:
        raise reader.damaged(f'{reader.rest} bytes follow on the end')
    return Contents(specification, revision, arrays, aliases)


class _Reader:
    """Takes one value after another from bytes, and notices where they end too early."""

    def __init__(self, content: bytes, name: str) -> None:
        self._content, self._name, self._at = content, name, 0

    @property
    def rest(self) -> int:
        """The number of bytes that have not been taken."""
        return len(self._content) - self._at

    def number(self, kind: str, what: str) -> int:
        """Return an unsigned number: 'B', 'H' or 'I' of 1, 2 or 4 bytes."""
        return struct.unpack(f'<{kind}', self._take(struct.calcsize(f'<{kind}'), what))[0]

    def string(self, what: str) -> str:
        """Return a string."""
        raw = self._take(self.number('H', what), what)
        try:
            text = raw.decode('utf-8')
        except UnicodeDecodeError:
            text = ''
        if not text.endswith('\0') or '\0' in text[:-1]:
            raise self.damaged(f'{what} is no text that a zero closes')
        return text[:-1]

    def array(self, name: str) -> np.ndarray:
        """Return an array."""
        rank = self.number('B', f'the rank of {name}')
        if rank > _HIGHEST_RANK:
            raise self.damaged(f'{name} has {rank} dimensions')
        shape = tuple(self.number('I', f'the shape of {name}') for _ in range(rank))
        kind = self.number('B', f'the type of {name}')
        if kind >= len(_TYPES):
            raise self.damaged(f'{name} is of type {kind}, which is none')
        dtype = np.dtype(_TYPES[kind])
        size = self.number('I', f'the size of {name}')
        if size != math.prod(shape) * dtype.itemsize:
            raise self.damaged(f'{name} has {size} bytes for {shape} of {dtype}')
        return np.frombuffer(self._take(size, name), dtype).reshape(shape)

    def damaged(self, why: str) -> ValueError:
        """Return the error that says what is wrong before this place."""
        return ValueError(
            f'{self._name} is damaged, or no model of CTranslate2: {why} (before byte {self._at} '
            f'of {len(self._content)}); fetch it again'
        )

    def _take(self, count: int, what: str) -> memoryview | bytes:
        if count > self.rest:
            raise self.damaged(f'it ends within {what}')
        taken = self._content[self._at : self._at + count]
        self._at += count
        return taken
