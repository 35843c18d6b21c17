"""What rows a task wants of a table, whatever the table's source.

`sources` finds tables, `text_files` reads them; a form says which of their columns it takes and
what it makes of them.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import datasets

from adapters_jax.data import columns
from adapters_jax.data.columns import Choice

_LOG = logging.getLogger(__name__)

Place = Callable[[int], str]  # where a row stands, for messages


class Form(Protocol):
    """The rows that a task wants.

    Attributes:
        kind: of labels: one of `columns.KINDS`, or what else a message may call them.
        names_classes: whether the numbers by which a hub data set stores classes become names.
        whole_lines: whether each line of a .txt file is one text, tabs and all.
    """

    kind: str
    names_classes: bool
    whole_lines: bool

    def header_in(self, cells: Sequence[str]) -> bool:
        """Whether a file's first line names its columns."""

    def choose(self, names: Sequence[str], labelled: bool, where: str) -> dict[str, str]:
        """Find the columns of a table: the form's own keys, with the columns' names.

        Raises:
            ValueError: one is missing, or more than one would do.
        """

    def build(
        self, values: Mapping[str, Sequence[Any]], labelled: bool, place: Place
    ) -> datasets.Dataset:
        """Make rows of the chosen columns.

        Raises:
            ValueError: a value that is none, with its place.
        """


@dataclasses.dataclass(frozen=True)
class Texts:
    """A text or a pair with one label; see `columns.build`."""

    whole_lines: ClassVar[bool] = False

    choice: Choice
    kind: str
    separator: str = ','
    skip_empty: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any], kind: str) -> Self:
        """Return the form that the config's section `data` asks for."""
        given = Choice(**(data.get('columns') or {}))
        # As typed in a shell, like the delimiter.
        separator = (data.get('label_separator') or ',').replace('\\t', '\t')
        return cls(given, kind, separator, bool(data.get('skip_empty')))

    @property
    def names_classes(self) -> bool:
        """Whether labels are names."""
        return self.kind != 'number'

    def header_in(self, cells: Sequence[str]) -> bool:
        """Whether a file's first line names its columns."""
        return self.choice.header_in(cells)

    def choose(self, names: Sequence[str], labelled: bool, where: str) -> dict[str, str]:
        """Find the texts and the label; see `columns.choose`."""
        return columns.choose(names, self.choice, labelled, where)

    def build(
        self, values: Mapping[str, Sequence[Any]], labelled: bool, place: Place
    ) -> datasets.Dataset:
        """Check the values; see `columns.build`."""
        if self.skip_empty:
            values, place = _without_empty(values, place)
        return columns.build(values, self.kind, labelled, place, self.separator)


def _without_empty(
    values: Mapping[str, Sequence[Any]], place: Place
) -> tuple[dict[str, list[Any]], Place]:
    """Leave out the rows with an empty text, and say how many there were."""
    kept = columns.with_texts(values)
    skipped = sorted(set(range(len(next(iter(values.values()))))) - set(kept))
    if not kept:
        raise ValueError(f'{place(0)}: no text, here or on any later row.')
    if skipped:
        _LOG.warning('skipped %d rows without a text, from %s on', len(skipped), place(skipped[0]))
    chosen = {key: [column[row] for row in kept] for key, column in values.items()}
    return chosen, lambda row: place(kept[row])
