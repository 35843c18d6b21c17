"""Which words of a batch are hidden from a masked language model, and by what (Devlin et al. 2019).

Nothing is drawn: whether a token is hidden is a function of the seed, the epoch, the example and
its place in it. So each epoch hides other words, a run that goes on hides the same ones, whatever
the batches, the processes and the threads, and an evaluation always hides the same.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from adapters_jax.data.batches import Batch

# Separates these uses of the run's seed from every other.
PURPOSE = int.from_bytes(b'mask', 'big')
ORDER, ACTION, WORD = range(3)
# Of the hidden tokens: those that become the mask token, and with these those that become any word.
MASKED, REPLACED = 0.8, 0.9
WORDS = 'word'  # the token column that numbers a text's words; -1 at special tokens


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are hidden: `rate` of those of each text, at least one; or `whole_words`."""

    rate: float
    whole_words: bool
    mask_id: int
    vocabulary: int

    def places(self, length: int, texts: int) -> int:
        """Return the most tokens (M) that are hidden in a row of `length` tokens in `texts`."""
        return min(length, math.ceil(self.rate * length) + texts)

    def __call__(self, batch: Batch, seed: int, epoch: int | None) -> Batch:
        """Return the batch with words hidden; epoch None is that of every evaluation.

        It needs the column 'word' [B, T], and has instead of it `masked` [B, M], the columns of the
        hidden tokens, `label` [B, M], what they were, and `chosen` [B, M], whether there is one.
        """
        draw = _Draw(seed, epoch)
        row, column = np.nonzero((batch['segments'] > 0) & (batch[WORDS] >= 0))
        segment = batch['segments'][row, column]
        example = batch['example_id'][row, segment - 1]
        place, word = batch['positions'][row, column], batch[WORDS][row, column]
        hidden = self._choose(
            draw, row * (segment.max(initial=0) + 1) + segment, example, word, place
        )
        row, column, example, place = (x[hidden] for x in (row, column, example, place))
        ids = batch['input_ids'].copy()
        ids[row, column] = self._replaced(draw, ids[row, column], example, place)
        size = self.places(ids.shape[1], batch['example_mask'].shape[1])
        hidden = located(batch['input_ids'], row, column, size)
        return {**_without_words(batch), 'input_ids': ids, **hidden}

    def _choose(
        self,
        draw: '_Draw',
        text: Int64[np.ndarray, ' K'],
        example: Int64[np.ndarray, ' K'],
        word: Int64[np.ndarray, ' K'],
        place: Int64[np.ndarray, ' K'],
    ) -> Int64[np.ndarray, ' H']:
        """Return which of K tokens are hidden, ascending; `text` numbers the texts of the batch."""
        unit = word if self.whole_words else place
        order = np.lexsort((place, unit, draw.bits(ORDER, example, unit), text))
        text, unit = text[order], unit[order]
        new_text = np.diff(text, prepend=-1) != 0
        begins = np.flatnonzero(new_text)
        counts = np.diff(np.append(begins, len(text)))
        rank = np.arange(len(text)) - np.repeat(begins, counts)
        wanted = np.repeat(np.maximum(1, np.floor(self.rate * counts + 0.5)), counts)
        # A word is hidden if all of it can be; of the first one, if not, as much as can.
        first = np.flatnonzero(new_text | (np.diff(unit, prepend=-1) != 0))
        sizes = np.diff(np.append(first, len(text)))
        begin = np.repeat(rank[first], sizes)
        whole = begin + np.repeat(sizes, sizes) <= wanted
        return np.sort(order[whole | ((begin == 0) & (rank < wanted))])

    def _replaced(
        self,
        draw: '_Draw',
        ids: Int64[np.ndarray, ' H'],
        example: Int64[np.ndarray, ' H'],
        place: Int64[np.ndarray, ' H'],
    ) -> Int64[np.ndarray, ' H']:
        """Return what stands in the places of hidden tokens."""
        action = draw.bits(ACTION, example, place) / 2.0**64
        words = (draw.bits(WORD, example, place) % np.uint64(self.vocabulary)).astype(ids.dtype)
        return np.where(action < MASKED, self.mask_id, np.where(action < REPLACED, words, ids))


def reveal(batch: Batch, mask_id: int) -> Batch:
    """Return the batch with the mask tokens that its texts have themselves as the hidden ones."""
    row, column = np.nonzero((batch['segments'] > 0) & (batch['input_ids'] == mask_id))
    most = int(np.bincount(row).max(initial=1))
    size = -(-most // 4) * 4  # few programs, however many masks texts have
    return {**_without_words(batch), **located(batch['input_ids'], row, column, size)}


def located(
    ids: np.ndarray, row: Int64[np.ndarray, ' H'], column: Int64[np.ndarray, ' H'], size: int
) -> Batch:
    """Return the columns [B, size] of tokens at these places, which ascend by row."""
    place = np.arange(len(row)) - np.searchsorted(row, row)
    columns = {name: np.zeros((len(ids), size), np.int32) for name in ('masked', 'label')}
    columns['masked'][row, place] = column
    columns['label'][row, place] = ids[row, column]
    chosen: Bool[np.ndarray, 'B M'] = np.zeros((len(ids), size), bool)
    chosen[row, place] = True
    return columns | {'chosen': chosen}


def _without_words(batch: Batch) -> Batch:
    return {name: column for name, column in batch.items() if name != WORDS}


class _Draw:
    """64 bits for every pair of numbers, from a seed and an epoch."""

    def __init__(self, seed: int, epoch: int | None) -> None:
        key = [PURPOSE, seed, 0 if epoch is None else epoch + 1]
        self._keys = np.random.SeedSequence(key).generate_state(3, np.uint64)

    def bits(
        self, use: int, first: Int64[np.ndarray, ' K'], second: Int64[np.ndarray, ' K']
    ) -> UInt64[np.ndarray, ' K']:
        """Return the bits of K pairs for one of the uses."""
        x = np.full(len(first), self._keys[use])
        for numbers in (first, second):
            x = _mix(x ^ numbers.astype(np.uint64))
        return x


def _mix(x: UInt64[np.ndarray, ' K']) -> UInt64[np.ndarray, ' K']:
    """Return the next numbers of SplitMix64 (Steele et al. 2014, figure 20)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
