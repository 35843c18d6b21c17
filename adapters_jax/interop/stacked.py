"""Leaves of equal shape in several layers, as one tensor in the file.

A safetensors file spends some hundred bytes on the name and shape of each tensor. The smallest
adapters have vectors of a few hundred numbers in every layer, so a file with a tensor for each leaf
would be noticeably larger than what was trained. `layer_{0-11}/block/prefix/projection` of shape
[12, D, R] stands for twelve leaves.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

_LAYER = re.compile(r'(?P<before>|.*/)layer_(?P<number>\d+)/(?P<after>.+)')
_LAYERS = re.compile(
    r'(?P<before>|.*/)layer_\{(?P<numbers>\d+(-\d+)?(,\d+(-\d+)?)*)\}/(?P<after>.+)'
)


def stack(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors for the leaves: one for those that differ in their layer only."""
    groups: dict[tuple, dict[int, str]] = {}
    tensors = {}
    for path, leaf in leaves.items():
        match = _LAYER.fullmatch(path)
        if match is None:
            tensors[path] = leaf
        else:
            kind = (match['before'], match['after'], np.shape(leaf), np.asarray(leaf).dtype.name)
            groups.setdefault(kind, {})[int(match['number'])] = path
    for (before, after, *_), paths in groups.items():
        if len(paths) == 1:
            (path,) = paths.values()
            tensors[path] = leaves[path]
        else:
            name = f'{before}layer_{{{_write(sorted(paths))}}}/{after}'
            tensors[name] = np.stack([np.asarray(leaves[paths[i]]) for i in sorted(paths)])
    return tensors


def unstack(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the leaves that the tensors stand for: the inverse of `stack`.

    Raises:
        ValueError: a tensor that does not have one entry for each of its layers, or a leaf that
            two tensors give.
    """
    leaves: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        match = _LAYERS.fullmatch(name)
        if match is None:
            found = {name: tensor}
        else:
            numbers = _read(match['numbers'], len(tensor) if tensor.ndim else 0)
            if numbers is None:
                raise ValueError(
                    f'{name} has the shape {tensor.shape}; expected one entry for each layer that '
                    'its name lists'
                )
            paths = [f'{match["before"]}layer_{i}/{match["after"]}' for i in numbers]
            found = dict(zip(paths, tensor, strict=True))
        twice = sorted(set(found) & set(leaves))
        if twice:
            raise ValueError(f'{twice[0]} is there twice, the second time in {name}')
        leaves |= found
    return leaves


def _write(numbers: Iterable[int]) -> str:
    """Return ascending numbers as ranges: 0-3,5."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ','.join(str(a) if a == b else f'{a}-{b}' for a, b in ranges)


def _read(text: str, expected: int) -> list[int] | None:
    """Return the numbers that ranges list, or None unless there are as many as expected."""
    ends = [[int(end) for end in part.split('-')] for part in text.split(',')]
    spans = [(end[0], end[-1]) for end in ends]
    # Counted first: a damaged name could ask for a list that no memory holds.
    if sum(max(0, b - a + 1) for a, b in spans) != expected:
        return None
    return [i for a, b in spans for i in range(a, b + 1)]
