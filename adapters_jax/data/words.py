"""Sentences of words to token ids, with the word that each token begins.

What is learned of a word is read at its first piece (Devlin et al. 2019, section 5.3). Sentences
longer than a row become windows (`windows.py`). Whatever the tokenizer makes of a word, be it
nothing at all, each word has exactly one token that stands for it.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32, Int64

from adapters_jax.data import tokenize, windows
from adapters_jax.data.encoded import Encoded

NAMES = (*tokenize.COLUMNS, 'word', 'offsets', 'rows')

_LOG = logging.getLogger(__name__)


class _Frame(NamedTuple):
    """The special tokens before and after a text, and the token types of these and the text."""

    before: list[int]
    after: list[int]
    types: tuple[int, int, int]


def encode(
    sentences: Sequence[Sequence[str]],
    tokenizer: tokenize.Tokenizer,
    max_length: int,
    cache_dir: str | os.PathLike | None = None,
    positions: int | None = None,
) -> Encoded:
    """Encodes sentences of words that are not empty; there are no labels.

    The column `word` (aside) is the number of the word that a token stands for, -1 where it stands
    for none. A sentence of more than max_length tokens becomes several examples, see `rows`. Raises
    ValueError where max_length fits no text or no model, as `tokenize.encode` does.
    """
    tokenize.check_length(max_length, positions, tokenizer.num_special_tokens_to_add(False))
    arrays = tokenize.remembered(
        lambda: _arrays(sentences, tokenizer, max_length),
        NAMES,
        cache_dir,
        *([sentences], tokenizer, max_length),
    )
    rows = arrays['rows']
    long = len(np.unique(rows[1:][np.diff(rows) == 0]))
    if long:
        _LOG.info(
            '%d of %d sentences are longer than max_length = %d and are read in windows.',
            *(long, len(sentences), max_length),
        )
    return Encoded(
        tokens={name: arrays[name] for name in tokenize.COLUMNS},
        offsets=arrays['offsets'],
        examples={},
        aside={'word': arrays['word']},
        rows=rows,
    )


def _arrays(
    sentences: Sequence[Sequence[str]], tokenizer: tokenize.Tokenizer, max_length: int
) -> dict[str, np.ndarray]:
    frame = _frame(tokenizer.backend_tokenizer)
    room = max_length - len(frame.before) - len(frame.after)
    columns: dict[str, list] = {name: [] for name in (*tokenize.COLUMNS, 'word')}
    lengths, rows = [], []
    for number, (ids, owner, words) in enumerate(_pieces(sentences, tokenizer, room)):
        sizes = np.bincount(owner, minlength=words)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        for window in windows.cut(sizes, room):
            own = slice(starts[window.begin], starts[window.end])
            word = np.full(own.stop - own.start, -1, np.int32)
            word[starts[window.first : window.last] - own.start] = range(window.first, window.last)
            columns['input_ids'].append(_framed(ids[own], frame.before, frame.after))
            columns['word'].append(_framed(word, [-1] * len(frame.before), [-1] * len(frame.after)))
            lengths.append(len(columns['word'][-1]))
            parts = (len(frame.before), len(word), len(frame.after))
            columns['token_type_ids'].append(np.repeat(np.int32(frame.types), parts))
            rows.append(number)
    flat = {name: np.concatenate(column) for name, column in columns.items()}
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return flat | {'offsets': offsets, 'rows': np.array(rows, np.int64)}


def _framed(middle: np.ndarray, before: list[int], after: list[int]) -> Int32[np.ndarray, ' T']:
    return np.concatenate([before, middle, after]).astype(np.int32)


def _frame(tokenizer: tokenizers.Tokenizer) -> _Frame:
    probe = tokenizer.encode('a')
    special = np.array(probe.special_tokens_mask, bool)
    first, last = np.flatnonzero(~special)[[0, -1]]
    types = [probe.type_ids[i] for i in (0, first, -1)]
    return _Frame(probe.ids[:first], probe.ids[last + 1 :], tuple(types))


def _pieces(
    sentences: Sequence[Sequence[str]], tokenizer: tokenize.Tokenizer, room: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The pieces of each sentence, the word that each belongs to, and the number of words.

    Words are divided by blanks, as every tokenizer expects, and found again by their places. A word
    of nothing that the tokenizer sees is unknown to it; one of more pieces than half a row loses
    the last ones.
    """
    most, unknown = windows.largest_word(room), 0
    for begin in range(0, len(sentences), tokenize.BATCH):
        part = sentences[begin : begin + tokenize.BATCH]
        texts = [''.join(' ' + word for word in words) for words in part]
        found = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for words, encoding in zip(part, found, strict=True):
            ids, owner = np.array(encoding.ids, np.int32), _owners(words, encoding.offsets)
            missing = np.setdiff1d(np.arange(len(words)), owner)
            place = np.searchsorted(owner, missing)
            ids = np.insert(ids, place, tokenizer.unk_token_id)
            owner = np.insert(owner, place, missing)
            kept = np.arange(len(owner)) - np.searchsorted(owner, owner) < most
            unknown += len(missing)
            yield ids[kept], owner[kept], len(words)
    if unknown:
        _LOG.warning(
            'The tokenizer sees nothing in %d words (such as invisible signs): they are given to '
            'the model as %s.',
            *(unknown, tokenizer.unk_token),
        )


def _owners(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> Int64[np.ndarray, ' P']:
    """The number of the word of each piece, from where it begins in the words' text."""
    blanks = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
    begins = np.array([begin for begin, _ in offsets], np.int64)
    return np.searchsorted(blanks, begins, 'right') - 1
