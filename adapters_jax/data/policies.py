"""How texts of different lengths share a rectangle: packed rows or length buckets.

Padding is computed and thrown away, and each new rectangle is compiled anew. Packing puts several
texts into a row of one fixed length (Krell et al. 2021, arXiv:2107.02027); buckets sort texts of
like length together and round up to one of a few lengths. Both are chosen here from the lengths of
the data, by measuring the padding they would leave.
"""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64, Integer

WINDOW = 64  # batches among which shuffled examples are sorted by length
SAMPLE = 5000  # examples on which candidate row lengths are measured
TOLERANCE = 0.1  # how far the mean number of examples a batch may be from the one asked for

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Every batch is [rows, row_length], with at most max_segments examples in a row."""

    row_length: int
    rows: int
    max_segments: int

    def __post_init__(self):
        _require_positive(self)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Every batch is [batch_size, one of lengths], with one example in a row."""

    lengths: tuple[int, ...]
    batch_size: int

    def __post_init__(self):
        _require_positive(self)
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f'Bucket lengths are {self.lengths}; they must ascend.')


Policy = Packed | Buckets


def choose_packing(
    lengths: Integer[np.ndarray, ' N'],
    batch_size: int,
    max_length: int,
    rows_multiple: int = 1,
    max_padding: float = 0.05,
) -> Packed:
    """The packing with the shortest rows that does what is asked, for these lengths.

    Rows are a multiple of 8 long and hold the longest example; their measured padding stays below
    max_padding; a batch has a multiple of rows_multiple rows and on average batch_size examples,
    10 % more or less. Where no row length does all of this, padding counts first, and a warning
    says so. Raises ValueError where an example is longer than max_length.
    """
    shares = np.ones(1)
    return choose_shared_packing(
        [lengths], shares, batch_size, max_length, rows_multiple, max_padding
    )


def choose_shared_packing(
    groups: Sequence[Integer[np.ndarray, ' N']],
    shares: Float[np.ndarray, ' A'],
    batch_size: int,
    max_length: int,
    rows_multiple: int = 1,
    max_padding: float = 0.05,
) -> Packed:
    """As choose_packing, for rows that hold examples of one group (task) each.

    shares: of the groups among the examples; their sum is 1.
    """
    groups = [_checked(lengths, max_length) for lengths in groups]
    longest, shortest = max(x[0] for x in groups), min(x[-1] for x in groups)
    means = np.array([lengths.mean() for lengths in groups])
    best = None
    for row_length in range(_round_up(longest, 8), longest_row(max_length) + 1, 8):
        segments = max(1, min(int(2 * row_length / means.min()) + 1, row_length // int(shortest)))
        # What an example takes of its rows, with its part of their padding.
        taken = sum(
            share * mean / (1 - _packing_padding(lengths, row_length, segments))
            for share, mean, lengths in zip(shares, means, groups, strict=True)
        )
        padding, examples_a_row = 1 - shares @ means / taken, row_length / taken
        rows = rows_multiple * max(1, round(batch_size / examples_a_row / rows_multiple))
        mismatch = abs(rows * examples_a_row / batch_size - 1)
        cost = (max(padding - max_padding, 0), max(mismatch - TOLERANCE, 0))
        if best is None or cost < best[0]:
            best = cost, Packed(row_length, rows, segments), padding, rows * examples_a_row
        if not any(cost):
            break
    (over, _), policy, padding, examples = best
    # Less than a batch in all, as in a few predictions, leaves rows empty whatever is done.
    if over and sum(map(len, groups)) >= batch_size:
        _LOG.warning('No packing of these lengths pads less than %.1f %%.', 100 * padding)
    if abs(examples / batch_size - 1) > TOLERANCE:
        _LOG.warning(
            'A packed batch will have %.1f examples on average, not %d: its rows hold %d tokens '
            'and come in multiples of %d.',
            *(examples, batch_size, policy.row_length, rows_multiple),
        )
    return policy


def longest_row(max_length: int) -> int:
    """The most tokens of a row that texts of up to max_length tokens share.

    Beyond twice the longest text allowed, attention costs more than the padding saved.
    """
    return max(2 * _round_up(max_length, 8), 256)


def choose_shared_buckets(
    groups: Sequence[Integer[np.ndarray, ' N']],
    shares: Float[np.ndarray, ' A'],
    batch_size: int,
    max_buckets: int = 10,
) -> Buckets:
    """As choose_buckets, for examples of several groups (tasks) that come with these shares.

    Together they differ more in length than those of one, hence more buckets.
    """
    total = max(SAMPLE, sum(map(len, groups)))
    counts = np.maximum(np.round(total * shares), 1).astype(int)
    # Spread over the descending lengths, so that parts of a group are like the whole.
    drawn = [
        _checked(lengths, None)[np.arange(count) * len(lengths) // count]
        for lengths, count in zip(groups, counts, strict=True)
    ]
    return choose_buckets(np.concatenate(drawn), batch_size, max_buckets)


def choose_buckets(
    lengths: Integer[np.ndarray, ' N'],
    batch_size: int,
    max_buckets: int = 6,
    multiple_of: int = 8,
    max_padding: float = 0.2,
    max_length: int | None = None,
) -> Buckets:
    """At most max_buckets lengths, with the least padding for these examples.

    The padding measured is that of shuffled batches. The lengths are multiples of multiple_of, or
    of its half, quarter, ... where only that keeps padding below max_padding (short texts); where
    nothing does, a warning says so. Raises ValueError where an example is longer than max_length.
    """
    shuffled = np.random.default_rng(0).permutation(_checked(lengths, max_length))
    shuffled = shuffled[sort_in_windows(shuffled, batch_size, WINDOW)]
    longest = np.maximum.reduceat(shuffled, np.arange(0, len(shuffled), batch_size))
    found = []
    for multiple in (multiple_of >> i for i in range(multiple_of.bit_length())):
        policy = Buckets(_bucket_bounds(longest, max_buckets, multiple), batch_size)
        padding = 1 - shuffled.sum() / (bucket_of(longest, policy) * batch_size).sum()
        found.append((padding, policy))
        if padding < max_padding:
            return policy
    if len(lengths) < batch_size:  # as in a few predictions: whatever is done, rows are empty
        return min(found, key=lambda one: one[0])[1]
    _LOG.warning(
        'No %d bucket lengths pad less than %.1f %% of these examples in batches of %d.',
        *(max_buckets, 100 * min(padding for padding, _ in found), batch_size),
    )
    return found[0][1]


def pack(
    lengths: Sequence[int], row_length: int, max_segments: int
) -> tuple[Int64[np.ndarray, ' N'], int]:
    """Best-fit decreasing: the row of each example, for lengths that descend, and how many rows.

    Each example goes into the fullest row that still holds it. The result depends on the sorted
    lengths only, so every epoch of a data set has the same number of rows.
    """
    rows_with_space = [[] for _ in range(row_length + 1)]
    spaces = 0  # bit s is set while some open row has s tokens left
    counts = []
    rows = np.empty(len(lengths), np.int64)
    for i, length in enumerate(lengths):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = row_length, len(counts)
            counts.append(0)
        rows[i] = row
        counts[row] += 1
        space -= length
        if space and counts[row] < max_segments:
            rows_with_space[space].append(row)
            spaces |= 1 << space
    return rows, len(counts)


def sort_in_windows(
    lengths: Integer[np.ndarray, ' N'], batch_size: int, window: int | None
) -> Int64[np.ndarray, ' N']:
    """An order in which like lengths are neighbours, within windows of about `window` batches.

    Windows are of equal size to one batch, so that none is too short to sort; None is one window.
    Lengths descend in each: the last batch, which may have empty rows, is then a short one.
    """
    batch = np.arange(len(lengths)) // batch_size
    batches = -(-len(lengths) // batch_size)
    windows = 1 if window is None else max(1, round(batches / window))
    return np.lexsort((-lengths, batch * windows // max(batches, 1)))


def bucket_of(lengths: Integer[np.ndarray, ' N'], policy: Buckets) -> Int64[np.ndarray, ' N']:
    """The shortest bucket length that holds each length."""
    return np.array(policy.lengths)[np.searchsorted(policy.lengths, lengths)]


def _checked(lengths: Integer[np.ndarray, ' N'], max_length: int | None) -> Int64[np.ndarray, ' N']:
    """The lengths, descending."""
    lengths = np.sort(np.asarray(lengths, np.int64))[::-1]
    if not lengths.size or lengths[-1] < 1:
        raise ValueError('Lengths to plan for must be positive, and there must be at least one.')
    if max_length is not None and lengths[0] > max_length:
        raise ValueError(
            f'An example has {lengths[0]} tokens, but max_length is {max_length}; encode with the '
            'same max_length.'
        )
    return lengths


def _packing_padding(lengths: Int64[np.ndarray, ' N'], row_length: int, segments: int) -> float:
    """The share of padding in the rows that are used, on an even sample of descending lengths."""
    sample = lengths[:: -(-len(lengths) // SAMPLE)]
    _, rows = pack(sample.tolist(), row_length, segments)
    return 1 - sample.sum() / (rows * row_length)


def _bucket_bounds(
    lengths: Int64[np.ndarray, ' N'], max_buckets: int, multiple_of: int
) -> tuple[int, ...]:
    """The bounds of the least total length, each of these lengths rounded up to its bound.

    Dynamic programme over candidate bounds: cost(k, b) = min over a < b of cost(k - 1, a) plus
    bound b times the number of lengths between a and b.
    """
    counts = np.bincount(-(-lengths // multiple_of))
    bounds = np.flatnonzero(counts)
    upto = np.concatenate([[0], np.cumsum(counts[bounds])])
    # cost of one bucket from after candidate a to candidate b, [candidates + 1, candidates + 1]
    single = np.concatenate([[0], bounds])[None, :] * (upto[None, :] - upto[:, None])
    single = np.where(upto[None, :] > upto[:, None], single, np.inf)
    cost, choices = single[0].copy(), []
    for _ in range(1, min(max_buckets, len(bounds))):
        through = cost[:, None] + single
        choices.append(through.argmin(0))
        cost = through.min(0)
    chosen = [len(bounds)]
    for choice in reversed(choices):
        chosen.append(int(choice[chosen[-1]]))
    return tuple(int(bounds[i - 1]) * multiple_of for i in reversed(chosen))


def _round_up(value: int, multiple: int) -> int:
    return -(-int(value) // multiple) * multiple


def _require_positive(policy: Policy) -> None:
    for name, value in dataclasses.asdict(policy).items():
        if not value or min(np.atleast_1d(value)) < 1:
            raise ValueError(f'{type(policy).__name__}.{name} is {value}; it must be positive.')
