"""Questions with their contexts as tokens: a context longer than a row is cut into windows.

Windows of one context overlap, so that an answer at the border of one lies inside another. Each is
an example of its own, and knows which question it is of. Question and context are tokenized apart
and put together here, because a context is shared by many questions and a window must know which
characters each of its tokens stands for.
"""

import dataclasses
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import datasets
import numpy as np
from jaxtyping import Int32

from adapters_jax.data import answers, tokenize
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.tokenize import BATCH, Tokenizer, check_length

_LOG = logging.getLogger(__name__)
_TOKENS, _EXAMPLES = ('input_ids', 'token_type_ids'), ('first', 'last')
JOINERS = '\u200d'  # characters that, besides combining marks, belong to the one before


@dataclasses.dataclass(frozen=True)
class Shape:
    """How contexts are cut into windows; all lengths are in tokens.

    max_length: of a window with its question and special tokens. stride: what two windows of one
    context share. question: the most that is kept of a question. types: whether token types tell
    the context from the question; without, all are 0.
    Raises ValueError where windows would not get on.
    """

    max_length: int
    stride: int
    question: int
    types: bool = True

    def check(self, special: int, positions: int | None) -> None:
        """Raises ValueError where the longest question leaves no room, or no model takes it."""
        check_length(self.max_length, positions, special)
        room = self.max_length - special - self.question
        if room <= self.stride:
            raise ValueError(
                f'data.max_length is {self.max_length}, which beside task.question_length = '
                f'{self.question} and {special} special tokens leaves {room} for the context; '
                f'expected more than task.stride = {self.stride}: raise the first or lower the '
                'others'
            )

    def windows(self, pieces: int, room: int) -> Iterator[tuple[int, int]]:
        """The first piece of each window of a context, and the one after its last."""
        first = 0
        while True:
            yield first, min(first + room, pieces)
            if first + room >= pieces:
                return
            first += room - self.stride


class Pieces(NamedTuple):
    """A text's tokens, and the characters that each stands for: from, and to before."""

    ids: Int32[np.ndarray, ' n']
    characters: Int32[np.ndarray, 'n 2']


class Frame(NamedTuple):
    """The special tokens of a pair, with all token types: [CLS] A [SEP] B [SEP]."""

    head: tuple[int, ...]
    middle: tuple[int, ...]
    tail: tuple[int, ...]
    types: tuple[int, int, int, int, int]  # of head, first text, middle, second text and tail

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return len(self.head) + len(self.middle) + len(self.tail)


def encode(
    rows: datasets.Dataset,
    tokenizer: Tokenizer,
    shape: Shape,
    positions: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Encoded:
    """Encodes the rows of `data.squad`; the N examples are the windows of all questions.

    Example columns, int32 [N]: `first` and `last`, the places in the example of the context's first
    and last piece (an empty range where it has none); of labelled rows also those that
    `answers.label` adds. Aside, int32 [L, 2]: `characters`, from where to before where in the
    context each piece stands. cache_dir: where windows are kept between runs; None for nowhere.
    Raises ValueError where the shape fits no model.
    """
    frame = frame_of(tokenizer)
    frame = frame if shape.types else frame._replace(types=(0,) * len(frame.types))
    shape.check(frame.size, positions)
    texts = rows['question'][:], rows['context'][:]
    # So that no other form of them is found.
    kind = [f'windows {shape.stride} {shape.question}' + ' of one type' * (not shape.types)]
    arrays = tokenize.remembered(
        lambda: _cut(*texts, tokenizer, frame, shape),
        (*_TOKENS, *_EXAMPLES, 'characters', 'offsets', 'rows', 'begins', 'truncated'),
        cache_dir,
        *([*texts, kind], tokenizer, shape.max_length),
    )
    truncated = int(arrays['truncated'])
    if truncated:
        _LOG.warning(
            '%d of %d questions (%.1f %%) are longer than task.question_length = %d and were cut.',
            *(truncated, len(rows), 100 * truncated / len(rows), shape.question),
        )
    encoded = Encoded(
        tokens={name: arrays[name] for name in _TOKENS},
        offsets=arrays['offsets'],
        examples={name: arrays[name] for name in _EXAMPLES},
        truncated=truncated,
        aside={'characters': arrays['characters']},
        rows=arrays['rows'],
    )
    return answers.label(encoded, arrays['begins'], rows) if 'answers' in rows.features else encoded


def _cut(
    asked: Sequence[str],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    frame: Frame,
    shape: Shape,
) -> dict[str, np.ndarray]:
    """The windows of all questions, column by column; `begins`: the first piece of each."""
    questions, contexts = _pieces(asked, tokenizer), _pieces(texts, tokenizer)
    columns, cut = _Columns(frame), 0
    for row, (one, text) in enumerate(zip(asked, texts, strict=True)):
        question, context = questions[one].ids[: shape.question], contexts[text]
        cut += len(question) < len(questions[one].ids)
        room = shape.max_length - frame.size - len(question)
        for first, last in shape.windows(len(context.ids), room):
            columns.add(row, question, context, first, last)
    return columns.arrays() | {'truncated': np.array(cut)}


class _Columns:
    """The windows so far, column by column."""

    def __init__(self, frame: Frame) -> None:
        self._types = np.array(frame.types, np.int32)
        parts = (frame.head, frame.middle, frame.tail)
        self._head, self._middle, self._tail = (np.array(part, np.int32) for part in parts)
        empty, nowhere = np.zeros(0, np.int32), np.zeros((0, 2), np.int32)
        self._ids, self._kinds, self._characters = [empty], [empty], [nowhere]
        self._windows: list[tuple[int, int, int, int, int]] = []

    def add(self, row: int, question: np.ndarray, context: Pieces, first: int, last: int) -> None:
        """Put together the window of the context's pieces from `first` to before `last`."""
        parts = (self._head, question, self._middle, context.ids[first:last], self._tail)
        sizes = [len(part) for part in parts]
        before, length = sum(sizes[:3]), sum(sizes)
        self._ids += parts
        self._kinds.append(np.repeat(self._types, sizes))
        around = np.zeros((before, 2), np.int32), np.zeros((sizes[4], 2), np.int32)
        self._characters += (around[0], context.characters[first:last], around[1])
        self._windows.append((length, before, before + sizes[3] - 1, row, first))

    def arrays(self) -> dict[str, np.ndarray]:
        """All windows."""
        lengths, first, last, rows, begins = np.array(self._windows, np.int32).reshape(-1, 5).T
        return {
            'input_ids': np.concatenate(self._ids),
            'token_type_ids': np.concatenate(self._kinds),
            'characters': np.concatenate(self._characters),
            'offsets': np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            'first': first.copy(),
            'last': last.copy(),
            'rows': rows.astype(np.int64),
            'begins': begins.astype(np.int64),
        }


def frame_of(tokenizer: Tokenizer) -> Frame:
    """What a tokenizer puts around and between two texts.

    Raises ValueError where it ends a pair in no special token, or knows no pairs.
    """
    pair = tokenizer('a', 'a', return_token_type_ids=True)
    ids, types, of = pair['input_ids'], pair['token_type_ids'], pair.sequence_ids(0)
    a, b = (np.flatnonzero([which == text for which in of]) for text in (0, 1))
    if not len(a) or not len(b) or a[0] == 0 or b[-1] == len(ids) - 1:
        raise ValueError(
            f'the tokenizer makes {tokenizer.convert_ids_to_tokens(ids)} of the texts "a" and "a"; '
            'question answering expects special tokens before, between and behind them'
        )
    places = (0, a[0], a[-1] + 1, b[0], b[-1] + 1)
    return Frame(
        head=tuple(ids[: a[0]]),
        middle=tuple(ids[a[-1] + 1 : b[0]]),
        tail=tuple(ids[b[-1] + 1 :]),
        types=tuple(types[min(place, len(ids) - 1)] for place in places),
    )


def _pieces(texts: Sequence[str], tokenizer: Tokenizer) -> dict[str, Pieces]:
    """The pieces of each different text."""
    different, found = list(dict.fromkeys(texts)), {}
    for begin in range(0, len(different), BATCH):
        part = different[begin : begin + BATCH]
        batch = tokenizer(
            part,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for text, ids, spans in zip(part, batch['input_ids'], batch['offset_mapping'], strict=True):
            characters = np.array(spans, np.int32).reshape(-1, 2)
            found[text] = Pieces(np.array(ids, np.int32), _with_marks(characters, text))
    return found


def _with_marks(characters: Int32[np.ndarray, 'n 2'], text: str) -> Int32[np.ndarray, 'n 2']:
    """Let a piece end behind the combining marks that follow it and that no piece stands for.

    A tokenizer that drops accents says of "é", written as two characters, that "e" is all of it.
    """
    if text.isascii() or not len(characters):
        return characters
    marks = np.array([unicodedata.category(c)[0] == 'M' or c in JOINERS for c in text])
    if not marks.any():
        return characters
    others = np.append(np.flatnonzero(~marks), len(text))
    ends = characters[:, 1]
    behind = others[np.searchsorted(others, ends)]
    limit = np.maximum(ends, np.append(characters[1:, 0], len(text)))
    return np.stack([characters[:, 0], np.minimum(behind, limit)], 1).astype(np.int32)
