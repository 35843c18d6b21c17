"""Several tasks in one stream of batches: which rows of which task come when.

Each task has an endless stream of rows: its examples in one order, then in another, every pass over
all of them before the next. An epoch takes the next rows of each stream, as many as its share. So a
small task comes again in fresh orders, of a large one an epoch takes a part and the next epoch goes
on from there, and an epoch's plan is a function of its number, as it is for a single task.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from adapters_jax.data.batches import Plan, lay_out
from adapters_jax.data.encoded import TAGS, Encoded, tokens_on_end
from adapters_jax.data.policies import WINDOW, Buckets, Packed, Policy, bucket_of, sort_in_windows
from adapters_jax.data.shares import Mixing, apportion, interleave

# Separate these uses of the run's seed from every other.
PASS, BATCHES = (int.from_bytes(name, 'big') for name in (b'pass', b'mix'))

# Whole numbers up to this one are float32 numbers.
FLOAT32_WHOLE = 2**24


def join(sets: Sequence[Encoded]) -> Encoded:
    """The examples of several tasks as one set, with the task's number in the column `task`.

    Columns that differ in type, labels of classes and labels that are numbers, become float32;
    those that differ in width become as wide as the widest one.
    Raises ValueError where the sets have different columns, or whole numbers that float32 has not.
    """
    first = sets[0]
    columns = [sorted({*one.tokens, *one.examples} - {TAGS}) for one in sets]
    for other in columns[1:]:
        if other != columns[0]:
            raise ValueError(
                f'one task has the columns {columns[0]}, another one {other}; they must be the '
                'same to be mixed'
            )
    ends = np.cumsum([0, *(one.offsets[-1] for one in sets)])
    numbers = [np.full(len(one), task, np.int32) for task, one in enumerate(sets)]
    examples = {name: _joined([one.examples[name] for one in sets]) for name in first.examples}
    return Encoded(
        tokens=tokens_on_end(sets),
        offsets=np.concatenate(
            [[0], *(one.offsets[1:] + end for one, end in zip(sets, ends, strict=False))]
        ).astype(np.int64),
        examples=examples | {'task': np.concatenate(numbers)},
        truncated=sum(one.truncated for one in sets),
    )


def _joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    if len({column.shape[1:] for column in columns}) > 1:
        columns = _widened(columns)
    if len({column.dtype for column in columns}) == 1:
        return np.concatenate(columns)
    for column in columns:
        if column.dtype.kind in 'iu' and column.size and np.abs(column).max() > FLOAT32_WHOLE:
            raise ValueError(f'a label is {np.abs(column).max()}, too large a number of classes')
    return np.concatenate([column.astype(np.float32) for column in columns])


def _widened(columns: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The columns with as many numbers an example as the widest one has, zeros at their end."""
    matrices = [column.reshape(len(column), -1) for column in columns]
    widest = max(matrix.shape[1] for matrix in matrices)
    return [np.pad(matrix, ((0, 0), (0, widest - matrix.shape[1]))) for matrix in matrices]


class Mixer:
    """The plans of a mixed run's epochs, by their numbers from 0.

    Every row holds examples of one task; rows of one task are neighbours in their batch. Packed
    batches have each task's share of rows to within one row at any point of an epoch; with buckets
    that holds of each window of batches, within which like lengths come together. No batch has
    empty rows, and every epoch has the same number of batches.
    """

    def __init__(
        self,
        lengths: Integer[np.ndarray, ' N'],
        task: Integer[np.ndarray, ' N'],
        policy: Policy,
        seed: int,
        mixing: Mixing,
    ):
        """Raises ValueError where a task has no example, or one that does not fit the policy."""
        self._policy, self._seed, self._mixing = policy, seed, mixing
        members = [np.flatnonzero(task == number) for number in range(int(task.max()) + 1)]
        self._streams = [
            _Stream(lengths[indices], indices, policy, (seed, number))
            for number, indices in enumerate(members)
        ]
        self.sizes = np.array([len(indices) for indices in members])
        self._passes = np.array([stream.rows for stream in self._streams])
        self._width = policy.batch_size if isinstance(policy, Buckets) else policy.rows
        nothing = np.zeros(len(self.sizes), np.int64)
        # The last epoch whose rows were counted, and all that the next one follows from.
        self._reached = self._begin = -1, nothing, nothing, np.zeros(len(self.sizes))
        self.batches = mixing.steps or -(-int(self._passes.sum()) // self._width)

    def rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Each task's rows in the epochs before, and in this one; int64 [A] both."""
        total = self.batches * self._width
        reached = self._reached  # one at a time: several threads ask
        if reached[0] > epoch:
            reached = self._begin
        done, before, counts, over = reached
        for number in range(done + 1, epoch + 1):
            before = before + counts
            # A share is one of examples, and a task of long texts needs more rows for as many.
            share = self._mixing.of(self.sizes, number) * self._passes / self.sizes
            over = over + total * share / share.sum()
            counts = apportion(over, total)
            over = over - counts
        self._reached = epoch, before, counts, over
        return before, counts

    def __call__(self, epoch: int) -> Plan:
        """The plan of an epoch."""
        before, counts = self.rows(epoch)
        order = interleave(counts)
        if isinstance(self._policy, Packed):
            order = np.sort(order.reshape(self.batches, self._width)).ravel()
        taken = [
            stream.take(begin, begin + count)
            for stream, begin, count in zip(self._streams, before, counts, strict=True)
        ]
        places = [np.flatnonzero(order == number)[t.row] for number, t in enumerate(taken)]
        entries = Entries(*map(np.concatenate, zip(*taken, strict=True)))
        entries = _sorted(entries._replace(row=np.concatenate(places)))
        if isinstance(self._policy, Buckets):
            entries = self._together(entries, order, epoch)
        return self._plan(entries)

    def _together(
        self, entries: 'Entries', order: Int64[np.ndarray, ' H'], epoch: int
    ) -> 'Entries':
        """Move rows of like length into the same batches, each within its window of batches."""
        place = sort_in_windows(entries.length, self._width, WINDOW)
        windows = max(1, round(self.batches / WINDOW))
        window = np.arange(self.batches) * windows // self.batches
        rng = np.random.default_rng([BATCHES, self._seed, epoch])
        shuffled = np.lexsort((rng.random(self.batches), window))
        place = place.reshape(self.batches, self._width)[shuffled]
        by_task = np.argsort(order[place], axis=1, kind='stable')
        place = np.take_along_axis(place, by_task, axis=1).ravel()
        row = np.empty_like(place)
        row[place] = np.arange(len(place))
        return _sorted(entries._replace(row=row))

    def _plan(self, entries: 'Entries') -> Plan:
        batch = entries.row // self._width
        first = np.searchsorted(batch, np.arange(self.batches + 1))
        if isinstance(self._policy, Buckets):
            widths = bucket_of(np.maximum.reduceat(entries.length, first[:-1]), self._policy)
        else:
            widths = np.full(self.batches, self._policy.row_length)
        return Plan(
            **entries._replace(row=entries.row % self._width)._asdict(),
            first=first,
            widths=widths,
            rows=self._width,
            segments=1 if isinstance(self._policy, Buckets) else self._policy.max_segments,
        )


class Entries(NamedTuple):
    """E examples and where they stand; the names are those of `Plan`."""

    row: Int64[np.ndarray, ' E']
    example: Int64[np.ndarray, ' E']
    length: Int64[np.ndarray, ' E']
    slot: Int64[np.ndarray, ' E']
    column: Int64[np.ndarray, ' E']


def _sorted(entries: Entries) -> Entries:
    order = np.argsort(entries.row, kind='stable')
    return Entries(*(column[order] for column in entries))


class _Stream:
    """The endless rows of one task: pass after pass over its examples, each in its own order."""

    def __init__(
        self,
        lengths: Integer[np.ndarray, ' N'],
        indices: Int64[np.ndarray, ' N'],
        policy: Policy,
        seed: tuple[int, int],
    ):
        """`indices`: the examples as they are called outside, of which these are the lengths."""
        single = {'rows': 1} if isinstance(policy, Packed) else {'batch_size': 1}
        self._lengths, self._indices, self._seed = lengths, indices, seed
        self._policy = dataclasses.replace(policy, **single)
        # Two, because an epoch's rows and the next one's begin in the pass that the last ends in.
        self._pass = functools.lru_cache(maxsize=2)(self._plan_pass)
        self.rows = len(self._pass(0))  # of a pass: as many in each, since lengths decide it

    def _plan_pass(self, number: int) -> Plan:
        """Plan a pass, in batches of one row each."""
        rng = np.random.default_rng([PASS, *self._seed, number])
        return lay_out(self._lengths, self._policy, rng)

    def take(self, begin: int, end: int) -> Entries:
        """The stream's rows from `begin` to before `end`; they are numbered from 0."""
        last = max(begin, end - 1) // self.rows
        parts = [self._cut(number, begin, end) for number in range(begin // self.rows, last + 1)]
        return Entries(*map(np.concatenate, zip(*parts, strict=True)))

    def _cut(self, number: int, begin: int, end: int) -> Entries:
        """What the rows from `begin` to before `end` have of a pass."""
        plan, start = self._pass(number), number * self.rows
        low, high = max(begin - start, 0), min(end - start, self.rows)
        first = plan.first[low : high + 1]
        here = slice(first[0], first[-1])
        return Entries(
            row=np.repeat(np.arange(low, high) + start - begin, np.diff(first)),
            example=self._indices[plan.example[here]],
            length=plan.length[here],
            slot=plan.slot[here],
            column=plan.column[here],
        )
