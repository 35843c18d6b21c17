"""Texts without labels, of any length: what a language model is trained on.

A row is one text: a line of a .txt file, or a table's text column. What is longer than the model
takes is cut into consecutive parts, of which none is lost.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import datasets
import numpy as np

from adapters_jax.data import tokenize
from adapters_jax.data.columns import SINGLES, Choice, check_encodable, named, shown
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.forms import Place
from adapters_jax.data.masking import WORDS
from adapters_jax.data.tokenize import Tokenizer

_COLUMNS = (*tokenize.COLUMNS, WORDS, 'offsets', 'rows')


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The form of such rows: `text_a` and nothing else; blank texts are left out."""

    kind: ClassVar[str] = 'text'
    names_classes: ClassVar[bool] = False
    whole_lines: ClassVar[bool] = True

    choice: Choice

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Return the form that the config's section `data` asks for."""
        return cls(Choice(**(data.get('columns') or {})))

    def header_in(self, cells: Sequence[str]) -> bool:
        """Whether a file's first line names its columns: a single one only by a usual name."""
        if len(cells) == 1 and not self.choice.given:
            return cells[0].strip().casefold() in SINGLES
        return self.choice.header_in(cells)

    def choose(self, names: Sequence[str], labelled: bool, where: str) -> dict[str, str]:
        """Find the column of texts; see `Form.choose`."""
        given = self.choice.given.get('text_a')
        usual = [name for name in names if name.casefold() in SINGLES]
        found = named(names, given) if given is not None else None
        if given is None and len(usual or names) == 1:
            found = (usual or names)[0]
        if found is None:
            raise ValueError(
                f'{where}: data.columns.text_a is {given!r}, and the columns are {shown(names)}; '
                'set it to the one that holds the text.'
            )
        return {'text_a': found}

    def build(
        self, values: Mapping[str, Sequence[Any]], labelled: bool, place: Place
    ) -> datasets.Dataset:
        """Make rows of the texts that are not blank; see `Form.build`."""
        texts = values['text_a']
        for row, text in enumerate(texts):
            if text is not None and not isinstance(text, str):
                raise ValueError(f'{place(row)}: {text!r} stands where a text must.')
            check_encodable(text or '', f'{place(row)}: the text')
        kept = [text for text in texts if text and text.strip()]
        return datasets.Dataset.from_dict(
            {'text_a': kept}, features=datasets.Features({'text_a': datasets.Value('string')})
        )


def encode(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    cache_dir: str | os.PathLike | None = None,
    positions: int | None = None,
) -> Encoded:
    """Encode texts in parts of at most `max_length` tokens, special ones included.

    The result's `rows` say which text each part is of; its token column 'word' numbers the words of
    a text, -1 at special tokens. Between two parts a word of several tokens may be divided.

    Raises:
        ValueError: `max_length` fits no text or no model.
    """
    tokenize.check_length(max_length, positions, tokenizer.num_special_tokens_to_add())
    found = tokenize.remembered(
        lambda: _encode(texts, tokenizer, max_length),
        _COLUMNS,
        cache_dir,
        *([texts, ['in parts']], tokenizer, max_length),
    )
    names = (*tokenize.COLUMNS, WORDS)
    tokens = {name: found[name] for name in names}
    return Encoded(tokens, found['offsets'], {}, rows=found['rows'])


def _encode(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> dict[str, np.ndarray]:
    columns: dict[str, list] = {name: [] for name in (*tokenize.COLUMNS, WORDS)}
    rows = []
    for begin in range(0, len(texts), tokenize.BATCH):
        batch = tokenizer(
            list(texts[begin : begin + tokenize.BATCH]),
            max_length=max_length,
            truncation=True,
            return_overflowing_tokens=True,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=True,
            verbose=False,
        )
        rows += [begin + row for row in batch['overflow_to_sample_mapping']]
        for name in tokenize.COLUMNS:
            columns[name].extend(np.array(ids, np.int32) for ids in batch[name])
        columns[WORDS].extend(_words(encoding.word_ids) for encoding in batch.encodings)
    lengths = [len(ids) for ids in columns['input_ids']]
    flat = {name: np.concatenate(column) for name, column in columns.items()}
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return flat | {'offsets': offsets, 'rows': np.array(rows, np.int64)}


def _words(numbers: Sequence[int | None]) -> np.ndarray:
    return np.array([-1 if number is None else number for number in numbers], np.int32)
