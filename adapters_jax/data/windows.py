"""Long sentences as windows that overlap, so that no word is lost and none lacks its context.

A window is a run of whole words whose pieces fit a row. Each word counts in one window only: the
one in which the nearer of its two edges is the farthest away.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer


class Window(NamedTuple):
    """The words from `begin` to before `end`; those from `first` to before `last` count here."""

    begin: int
    end: int
    first: int
    last: int


def largest_word(room: int) -> int:
    """Return how many pieces of a word are kept, so that windows of `room` pieces can go on."""
    return max(1, room // 2)


def cut(sizes: Integer[np.ndarray, ' W'], room: int) -> list[Window]:
    """Cut a sentence of W words of so many pieces each into windows of at most `room` pieces.

    Neighbours share up to half a window. `sizes` are 1 to `largest_word(room)`; a sentence without
    words is one window without words.
    """
    ends = np.cumsum(sizes)
    starts = ends - sizes
    parts = _parts(starts, ends, room)
    # The middle of what two neighbours share: nearer to its start the left one reaches farther.
    borders = [
        int(np.searchsorted(starts + ends, starts[right] + ends[left - 1]))
        for (_, left), (right, _) in itertools.pairwise(parts)
    ]
    scored = zip([0, *borders], [*borders, len(sizes)], strict=True)
    return [Window(*part, *own) for part, own in zip(parts, scored, strict=True)]


def _parts(
    starts: Integer[np.ndarray, ' W'], ends: Integer[np.ndarray, ' W'], room: int
) -> list[tuple[int, int]]:
    """Return the windows' words as (begin, end): each as full as it can be."""
    if not len(ends) or ends[-1] <= room:
        return [(0, len(ends))]
    parts, begin = [], 0
    while True:
        end = int(np.searchsorted(ends, starts[begin] + room, 'right'))
        parts.append((begin, end))
        if end == len(ends):
            return parts
        # The next word has at most half a window's pieces, so the overlap and it fit in one.
        begin = int(np.searchsorted(starts, ends[end - 1] - room // 2))
