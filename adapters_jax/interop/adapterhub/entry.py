"""One line of a table of tensors: some leaves of ours, some tensors of theirs, and both ways.

Most lines are one leaf and one tensor. A prefix is one tensor and two leaves a layer; an orthogonal
projection is one leaf and two tensors. A tensor may moreover lie in the file several times.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

Arrays = tuple[np.ndarray, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Leaves by path, tensors by name without the model's prefix, and how each becomes the other.

    `copies` names what else the tensors of the first name are stored as.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: Callable[..., Arrays]
    write: Callable[..., Arrays]
    copies: tuple[tuple[str, str], ...] = ()  # (further name, name among `theirs`)
    # Of the tensors, from those of the leaves; where it is not given, `write` is asked.
    shapes: Callable[..., tuple[Shape, ...]] | None = None


def same(path: str, name: str, *copies: str) -> Entry:
    """Return the entry of a leaf that is stored as it is."""
    return _both(path, name, lambda x: (x,), lambda x: (x,), copies)


def turned(path: str, name: str) -> Entry:
    """Return the entry of kernels [..., I, O], which torch stores as [..., O, I]."""
    return _both(path, name, lambda x: (x.swapaxes(-1, -2),), lambda x: (x.swapaxes(-1, -2),))


def column(path: str, name: str) -> Entry:
    """Return the entry of a vector [O] that is stored as [O, 1]."""
    return _both(path, name, lambda x: (x[:, 0],), lambda x: (x[:, None],))


def dense(path: str, name: str, leaf: str) -> Entry:
    """Return the entry of a dense layer's `kernel` or `bias`."""
    if leaf == 'kernel':
        return turned(f'{path}/kernel', f'{name}.weight')
    return same(f'{path}/bias', f'{name}.bias')


def _both(
    path: str,
    name: str,
    read: Callable[..., Arrays],
    write: Callable[..., Arrays],
    copies: Iterable[str] = (),
) -> Entry:
    return Entry((path,), (name,), read, write, tuple((copy, name) for copy in copies))


def shapes(table: Iterable[Entry], leaves: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes of the tensors, copies left out, that leaves of these shapes become."""
    found: dict[str, Shape] = {}
    for entry in table:
        own = [leaves[path] for path in entry.ours]
        if entry.shapes is None:
            # Views of one number, so that nothing large is made for its shape's sake.
            written = entry.write(*(np.broadcast_to(np.float32(0), shape) for shape in own))
            found |= zip(entry.theirs, (x.shape for x in written), strict=True)
        else:
            found |= zip(entry.theirs, entry.shapes(*own), strict=True)
    return found


def tensors(table: Iterable[Entry], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors, copies included, that the leaves become."""
    found: dict[str, np.ndarray] = {}
    for entry in table:
        found |= _written(entry, leaves)
        found |= {copy: found[name] for copy, name in entry.copies}
    return found


def leaves(table: Iterable[Entry], found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the leaves by path that the tensors become; copies are not looked at."""
    return {
        path: leaf
        for entry in table
        for path, leaf in zip(
            entry.ours, entry.read(*(found[name] for name in entry.theirs)), strict=True
        )
    }


def drop_copies(table: Iterable[Entry], found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors without the copies, which must equal what they are copies of.

    Raises:
        ValueError: a copy that differs.
    """
    kept = dict(found)
    for copy, name in (pair for entry in table for pair in entry.copies):
        if copy not in kept:
            continue
        twin = kept.pop(copy)
        if name in kept and not np.array_equal(twin, kept[name]):
            raise ValueError(f'{copy} should be a copy of {name}, but differs from it')
    return kept


def _written(entry: Entry, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    arrays = entry.write(*(np.asarray(leaves[path]) for path in entry.ours))
    return dict(zip(entry.theirs, arrays, strict=True))
