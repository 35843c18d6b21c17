"""Tasks whose example is a text or a pair of texts, with one label and one vector of outputs.

What they share is where the texts come from and how they are encoded; what a label is and what the
outputs mean is each kind's own.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Literal

import datasets

from adapters_jax.data import columns, sources, tokenize
from adapters_jax.data.encoded import Encoded
from adapters_jax.tasks.labelled import LabelledTask
from adapters_jax.tasks.task import Encoding, Objects, Rows


class TextTask(LabelledTask):
    """One label for a text or a pair."""

    label_kind: ClassVar[Literal['class', 'number', 'classes']]
    takes_steps: ClassVar[bool] = True

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names; see `data.sources`."""
        return sources.load(data, cls.label_kind)

    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Turn texts into tokens and labels into numbers; longer texts are cut."""
        return tokenize.encode(
            rows,
            encoding.tokenizer,
            encoding.max_length,
            label_ids=self.label_column,
            cache_dir=encoding.cache_dir,
            positions=encoding.positions,
            chain=encoding.chain,
        )

    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the objects' texts; see `text_rows`."""
        return text_rows(objects, lines, pair)

    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the texts, and the label as `gold`."""
        texts = {key: row[key] for key in ('text_a', 'text_b') if key in row}
        return texts | ({'gold': row['label']} if 'label' in row else {})


def text_rows(objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
    """Return the objects' texts under `text_a` and, for an adapter of pairs, `text_b`.

    Where the adapter does not say (`pair` is None), the first object's fields do. `lines` are the
    objects' numbers in their file.

    Raises:
        ValueError: an object without the fields of the first one or with a text too many, or a
            text that is none.
    """
    if pair is None:
        pair = 'text_b' in objects[0]
    names, wanted = {'text_a': 'text'}, '"text"'
    if pair:
        names = {'text_a': 'text_a', 'text_b': 'text_b'}
        wanted = '"text_a" and "text_b": the adapter is for pairs'
    elif 'text_a' in objects[0]:
        names, wanted = {'text_a': 'text_a'}, '"text_a", as the first one has'
    lines = list(lines)
    check_texts(objects, lines, names.values(), wanted)
    for number, given in zip(lines, objects, strict=True):
        if not pair and 'text_b' in given:
            raise ValueError(
                f"input line {number} has a second text under 'text_b', and the adapter is for "
                'single ones; join the two, or leave it out'
            )
    columns = {key: [given[name] for given in objects] for key, name in names.items()}
    return datasets.Dataset.from_dict(columns)


def check_texts(
    objects: Objects, lines: Iterable[int], names: Collection[str], wanted: str
) -> None:
    """Refuse an object that has no text under one of the names.

    Raises:
        ValueError: its line, what it has, and what was `wanted`.
    """
    for number, given in zip(lines, objects, strict=True):
        for name in names:
            if name not in given:
                raise ValueError(
                    f'input line {number} has no text under {name!r}; expected {wanted} '
                    f'(this one has: {", ".join(given)})'
                )
            if not isinstance(given[name], str):
                raise ValueError(
                    f'input line {number}: {name!r} is {given[name]!r}; expected a text'
                )
            if not given[name].strip():
                raise ValueError(f'input line {number}: the text under {name!r} is empty')
            columns.check_encodable(given[name], f'input line {number}: the {name}')
