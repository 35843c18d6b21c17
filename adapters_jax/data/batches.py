"""Which examples go into which batch, and where: planned for a whole epoch at once.

A plan is a pure function of the lengths, the policy, the seed and the epoch. No step of it knows
how many processes or threads there are, so each of them can assemble any part of any batch by its
number, and a run continues from a batch number alone.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer

from adapters_jax.data.encoded import PART, Encoded, ranges
from adapters_jax.data.policies import (
    WINDOW,
    Buckets,
    Packed,
    Policy,
    bucket_of,
    choose_buckets,
    choose_packing,
    pack,
    sort_in_windows,
)

__all__ = [
    'Buckets',
    'Packed',
    'Plan',
    'Policy',
    'assemble',
    'choose_buckets',
    'choose_packing',
    'lay_out',
    'plan_epoch',
]

# Separates this use of the run's seed from every other.
PURPOSE = int.from_bytes(b'epoch', 'big') % 2**32

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of one epoch: N examples in the order in which they are computed.

    example: which one. length: its tokens. row: its row in its batch. slot: its place among the
    examples of that row. column: its first token's place in the row. first: [M + 1], where each of
    M batches begins among the N. widths: [M], the length of the batch's rows. Every batch has
    `rows` rows and `segments` slots in each; the last batch of an epoch may end in empty ones.
    """

    example: Int64[np.ndarray, ' N']
    length: Int64[np.ndarray, ' N']
    row: Int64[np.ndarray, ' N']
    slot: Int64[np.ndarray, ' N']
    column: Int64[np.ndarray, ' N']
    first: Int64[np.ndarray, ' M+1']
    widths: Int64[np.ndarray, ' M']
    rows: int
    segments: int

    def __len__(self) -> int:
        return len(self.widths)

    @property
    def padding(self) -> float:
        """The share of computed tokens that are padding, empty rows included."""
        return float(1 - self.length.sum() / (self.rows * self.widths.sum()))

    @property
    def shapes(self) -> set[tuple[int, int, int]]:
        """The different (B, T, S) of the batches: as many programs are compiled."""
        return {(self.rows, int(width), self.segments) for width in np.unique(self.widths)}

    @property
    def examples_per_batch(self) -> Int64[np.ndarray, ' M']:
        """How many examples each batch has."""
        return np.diff(self.first)


def plan_epoch(
    lengths: Integer[np.ndarray, ' N'], policy: Policy, seed: int, epoch: int, shuffle: bool
) -> Plan:
    """Plans an epoch in which every example comes exactly once.

    lengths: tokens of each example. seed, epoch: non-negative; without shuffle they change nothing.
    The number of batches is the same in every epoch. Raises ValueError where an example is empty or
    too long for the policy.
    """
    rng = np.random.default_rng([PURPOSE, seed, epoch]) if shuffle else None
    return lay_out(lengths, policy, rng)


def lay_out(
    lengths: Integer[np.ndarray, ' N'], policy: Policy, rng: np.random.Generator | None
) -> Plan:
    """Plans one pass over the examples, in an order drawn from `rng`, or as they are without it.

    Raises ValueError as plan_epoch does.
    """
    lengths = np.asarray(lengths, np.int64)
    check_lengths(lengths, policy)
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    if isinstance(policy, Packed):
        return _plan_packed(lengths, policy, order, rng)
    return _plan_buckets(lengths, policy, order, rng)


def check_lengths(lengths: Int64[np.ndarray, ' N'], policy: Policy) -> None:
    """Raises ValueError where there is no example, or one is empty or too long for the policy."""
    longest = policy.row_length if isinstance(policy, Packed) else policy.lengths[-1]
    if not lengths.size:
        raise ValueError('There are no examples to plan batches of.')
    if lengths.min() < 1 or lengths.max() > longest:
        raise ValueError(
            f'Rows of {longest} tokens hold examples of 1 to {longest} tokens, but these '
            f'{len(lengths)} have {lengths.min()} to {lengths.max()}. Choose the policy from the '
            'lengths of this split.'
        )


def assemble(
    encoded: Encoded,
    plan: Plan,
    index: int,
    pad_id: int,
    rows: tuple[int, int] | None = None,
) -> Batch:
    """The arrays of batch `index`, or of its rows from rows[0] to before rows[1].

    Token columns are [B, T], with pad_id in input_ids and 0 elsewhere where there is no token.
    positions restart at 0 in each text; segments number the texts of a row from 1, and are 0
    on padding. example_mask, example_id (-1 where there is none) and the example columns are
    [B, S, ...]; starts (each text's first token) is [B, S], or [B, S * K] where an example may be K
    texts: those of the example at place s have the places, and the segments but one, from s * K
    on. What is to be written for an example begins at its first column: 'target_ids' and 'label'
    with 'target_positions' and 'target_segments', [B, T]. Where the examples have a column `task`,
    the rows have a column `adapter`, [B]: the task of the row's examples, -1 in an empty row.
    """
    first, last = rows or (0, plan.rows)
    entries = slice(plan.first[index], plan.first[index + 1])
    row = plan.row[entries]
    # Entries are in order of their rows, so the part wanted is a slice as well.
    begin, end = np.searchsorted(row, (first, last))
    entries = slice(entries.start + begin, entries.start + end)
    row, slot = row[begin:end] - first, plan.slot[entries]
    examples = _Placed(plan.example[entries], row, slot, plan.column[entries])
    shape = (last - first, int(plan.widths[index]))
    slots = (last - first, plan.segments)
    texts = _Texts.of(encoded, examples)
    arrays = _token_arrays(encoded, texts, shape, pad_id)
    arrays |= _example_arrays(encoded, examples, texts, slots)
    if encoded.target:
        written = _Texts.to_write(encoded, examples)
        arrays |= _target_arrays(encoded, written, shape)
    return arrays


class _Placed(NamedTuple):
    """E examples: their numbers, and each one's row, place in the row and first column there."""

    example: Int64[np.ndarray, ' E']
    row: Int64[np.ndarray, ' E']
    slot: Int64[np.ndarray, ' E']
    column: Int64[np.ndarray, ' E']


class _Texts(NamedTuple):
    """The P texts of some examples: where they are among all tokens, and in a batch."""

    source: Int64[np.ndarray, ' P']
    length: Int64[np.ndarray, ' P']
    row: Int64[np.ndarray, ' P']
    place: Int64[np.ndarray, ' P']
    column: Int64[np.ndarray, ' P']

    @classmethod
    def of(cls, encoded: Encoded, placed: _Placed) -> '_Texts':
        """Return the texts of placed examples, each of which begins at a column of its row."""
        example, row, slot, column = placed
        begins, first = encoded.texts
        counts = first[example + 1] - first[example]
        text = ranges(first[example], counts)
        place = ranges(slot * encoded.most_texts, counts)
        # As far behind the example's first token here as it is among all tokens.
        column = begins[text] + np.repeat(column - encoded.offsets[example], counts)
        length = begins[text + 1] - begins[text]
        return cls(begins[text], length, np.repeat(row, counts), place, column)

    @classmethod
    def to_write(cls, encoded: Encoded, placed: _Placed) -> '_Texts':
        """Return what is to be written for placed examples."""
        example, row, slot, column = placed
        begins = encoded.target_offsets
        return cls(begins[example], begins[example + 1] - begins[example], row, slot, column)


def _target_arrays(encoded: Encoded, texts: _Texts, shape: tuple[int, int]) -> Batch:
    source, placed = _placing(texts, shape)
    arrays = {name: placed(values[source]) for name, values in encoded.target.items()}
    return arrays | _places(texts, placed, 'target_')


def _token_arrays(encoded: Encoded, texts: _Texts, shape: tuple[int, int], pad_id: int) -> Batch:
    source, placed = _placing(texts, shape)
    batch = {
        name: placed(values[source], pad_id if name == 'input_ids' else 0)
        for name, values in encoded.tokens.items()
        if name != PART
    }
    return batch | _places(texts, placed)


def _placing(
    texts: _Texts, shape: tuple[int, int]
) -> tuple[Int64[np.ndarray, ' L'], Callable[..., np.ndarray]]:
    """Return where the texts' tokens are, and what puts columns of them into a rectangle."""
    target = ranges(texts.row * shape[1] + texts.column, texts.length)

    def placed(values: np.ndarray, empty: int = 0) -> np.ndarray:
        flat = np.full((shape[0] * shape[1], *values.shape[1:]), empty, values.dtype)
        flat[target] = values
        return flat.reshape(*shape, *values.shape[1:])

    return ranges(texts.source, texts.length), placed


def _places(texts: _Texts, placed: Callable[..., np.ndarray], prefix: str = '') -> Batch:
    """Return each token's place in its text, and the number of the text in its row."""
    lengths = texts.length
    return {
        f'{prefix}positions': placed(ranges(np.zeros_like(lengths), lengths).astype(np.int32)),
        f'{prefix}segments': placed(np.repeat(texts.place + 1, lengths).astype(np.int32)),
    }


def _example_arrays(
    encoded: Encoded,
    examples: _Placed,
    texts: _Texts,
    slots: tuple[int, int],
) -> dict[str, Int32[np.ndarray, 'B S'] | Bool[np.ndarray, 'B S'] | np.ndarray]:
    example, row, slot, _ = examples

    def placed(values: np.ndarray, empty: int = 0) -> np.ndarray:
        array = np.full((*slots, *values.shape[1:]), empty, values.dtype)
        array[row, slot] = values
        return array

    batch = {name: placed(values[example]) for name, values in encoded.examples.items()}
    batch['starts'] = np.zeros((slots[0], slots[1] * encoded.most_texts), np.int32)
    batch['starts'][texts.row, texts.place] = texts.column
    batch['example_mask'] = placed(np.ones(len(example), bool))
    batch['example_id'] = placed(example.astype(np.int32), -1)
    if 'task' in batch:
        batch['adapter'] = np.where(batch['example_mask'][:, 0], batch['task'][:, 0], -1)
    return batch


def _plan_packed(
    lengths: Int64[np.ndarray, ' N'],
    policy: Packed,
    order: Int64[np.ndarray, ' N'],
    rng: np.random.Generator | None,
) -> Plan:
    # Stable: among equal lengths the shuffled order stays, so rows differ from epoch to epoch.
    order = order[np.argsort(-lengths[order], kind='stable')]
    row, rows = pack(lengths[order].tolist(), policy.row_length, policy.max_segments)
    if rng is not None:
        row = rng.permutation(rows)[row]
    by_row = np.argsort(row, kind='stable')
    example, row = order[by_row], row[by_row]
    first_in_row = np.searchsorted(row, row)
    filled = np.cumsum(lengths[example]) - lengths[example]
    batches = -(-rows // policy.rows)
    return Plan(
        example=example,
        length=lengths[example],
        row=row % policy.rows,
        slot=np.arange(len(row)) - first_in_row,
        column=filled - filled[first_in_row],
        first=np.searchsorted(row, np.arange(batches + 1) * policy.rows),
        widths=np.full(batches, policy.row_length),
        rows=policy.rows,
        segments=policy.max_segments,
    )


def _plan_buckets(
    lengths: Int64[np.ndarray, ' N'],
    policy: Buckets,
    order: Int64[np.ndarray, ' N'],
    rng: np.random.Generator | None,
) -> Plan:
    size = policy.batch_size
    window = None if rng is None else WINDOW
    order = order[sort_in_windows(lengths[order], size, window)]
    full = len(order) // size
    if rng is not None:
        # The batch that is not full stays last.
        shuffled = order[: full * size].reshape(full, size)[rng.permutation(full)]
        order = np.concatenate([shuffled.ravel(), order[full * size :]])
    first = np.append(np.arange(0, len(order), size), len(order))
    zeros = np.zeros(len(order), np.int64)
    return Plan(
        example=order,
        length=lengths[order],
        row=np.arange(len(order)) % size,
        slot=zeros,
        column=zeros,
        first=first,
        widths=bucket_of(np.maximum.reduceat(lengths[order], first[:-1]), policy),
        rows=size,
        segments=1,
    )
