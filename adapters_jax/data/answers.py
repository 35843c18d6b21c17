"""From the characters of an answer to the pieces that a model chooses among, and back.

Pieces and answers need not begin and end at the same characters ("6" in "6½"). An answer's label is
the shortest run of pieces that holds it, and what sticks out of the answer on either side is kept
beside it, so that the answer comes back to the character.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator

import datasets
import numpy as np
from jaxtyping import Int32, Int64

from adapters_jax.data.encoded import Encoded

_LOG = logging.getLogger(__name__)
NOWHERE = (-1, -1)


def label(encoded: Encoded, begins: Int64[np.ndarray, ' N'], rows: datasets.Dataset) -> Encoded:
    """Gives windows the places of their answers.

    begins: the piece of its context that each of the N windows begins with. Of several answers the
    first one is the label.
    Added are the example columns `start` and `end`, int32 [N]: the places in the example of the
    answer's first and last piece, or 0, the place of [CLS], where the window does not hold it whole
    or there is none; and aside `outside`, int32 [L, 2]: how many characters of an answer's first
    piece precede it, and of its last piece follow it (below 0 where the answer reaches further).
    """
    bounds = np.array(
        [
            (starts[0], starts[0] + len(answers[0])) if answers else NOWHERE
            for answers, starts in zip(rows['answers'][:], rows['starts'][:], strict=True)
        ]
    ).reshape(-1, 2)
    pieces = np.array(
        [
            NOWHERE if tuple(of) == NOWHERE else pieces_of(own, *of)
            for own, of in zip(_characters(encoded, begins, len(rows)), bounds, strict=True)
        ]
    ).reshape(-1, 2)
    own, first, last = encoded.rows, encoded.examples['first'], encoded.examples['last']
    places = pieces[own] - begins[:, None] + first[:, None]
    held = (pieces[own, 0] >= 0) & (places[:, 0] >= first) & (places[:, 1] <= last)
    places = np.where(held[:, None], places, 0).astype(np.int32)
    labelled = dataclasses.replace(
        encoded,
        examples=encoded.examples | {'start': places[:, 0].copy(), 'end': places[:, 1].copy()},
        aside=encoded.aside | {'outside': _outside(encoded, places, held, bounds)},
    )
    _tell(labelled, bounds[:, 0] >= 0, pieces[:, 0] >= 0)
    return labelled


def _characters(
    encoded: Encoded, begins: Int64[np.ndarray, ' N'], count: int
) -> Iterator[Int32[np.ndarray, 'n 2']]:
    """The characters of all pieces of each context, put together from its windows."""
    ends = np.searchsorted(encoded.rows, np.arange(count + 1))
    starts = encoded.offsets[:-1] + encoded.examples['first']
    stops = encoded.offsets[:-1] + encoded.examples['last'] + 1
    for first, end in itertools.pairwise(ends):
        # Of each window what comes before the next one, and all of the last.
        new = np.append(starts[first : end - 1] + np.diff(begins[first:end]), stops[end - 1])
        parts = zip(starts[first:end], new, strict=True)
        yield np.concatenate([encoded.aside['characters'][a:b] for a, b in parts])


def pieces_of(characters: Int32[np.ndarray, 'n 2'], begin: int, end: int) -> tuple[int, int]:
    """The first and the last piece with any of the characters from `begin` to before `end`."""
    touching = np.flatnonzero((characters[:, 0] < end) & (characters[:, 1] > begin))
    return (int(touching[0]), int(touching[-1])) if len(touching) else NOWHERE


def _outside(
    encoded: Encoded,
    places: Int32[np.ndarray, 'N 2'],
    held: np.ndarray,
    bounds: Int64[np.ndarray, 'R 2'],
) -> Int32[np.ndarray, 'L 2']:
    outside = np.zeros((int(encoded.offsets[-1]), 2), np.int32)
    at = (encoded.offsets[:-1, None] + places)[held]
    wanted, characters = bounds[encoded.rows[held]], encoded.aside['characters']
    outside[at[:, 0], 0] = wanted[:, 0] - characters[at[:, 0], 0]
    outside[at[:, 1], 1] = characters[at[:, 1], 1] - wanted[:, 1]
    return outside


def restore(encoded: Encoded) -> tuple[Int64[np.ndarray, ' M'], Int64[np.ndarray, 'M 2']]:
    """The examples that hold their answer, and its characters: from, and to before."""
    start, end = encoded.examples['start'], encoded.examples['end']
    held = np.flatnonzero(start)
    first, last = encoded.offsets[held] + start[held], encoded.offsets[held] + end[held]
    characters, outside = encoded.aside['characters'], encoded.aside['outside']
    begin = characters[first, 0].astype(np.int64) + outside[first, 0]
    return held, np.stack([begin, characters[last, 1] - outside[last, 1]], 1)


def _tell(encoded: Encoded, answered: np.ndarray, placed: np.ndarray) -> None:
    """Log which answers a model could not give, and which not to the character."""
    held, _ = restore(encoded)
    within = np.isin(np.arange(len(answered)), encoded.rows[held])
    at = encoded.offsets[held, None] + np.stack(
        [encoded.examples['start'][held], encoded.examples['end'][held]], 1
    )
    outside = encoded.aside['outside'][at, [0, 1]]
    inexact = encoded.rows[held][(outside > 0).any(1)]
    for count, what in (
        ((answered & ~placed).sum(), 'stand in characters that the tokenizer drops'),
        ((placed & ~within).sum(), 'lie whole in no window; raise data.max_length or task.stride'),
        (len(np.unique(inexact)), 'begin or end inside a piece, so a prediction says a bit more'),
    ):
        if count:
            _LOG.warning('%d of %d answers %s.', count, answered.sum(), what)
