"""From the columns somebody happened to choose to `text_a`, `text_b` and `label`.

Everything after this module sees these three columns only. Names are guessed only where there is
exactly one guess; each value is checked here, while the line it came from is still known.
"""

import dataclasses
import decimal
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets

_SURROGATE = re.compile('[\ud800-\udfff]')
_WRITTEN_LIST = re.compile(r'\[[^\]]*\]')  # as str(list) and json.dumps leave it in a cell
_SWITCHES = frozenset(('0', '1', '0.0', '1.0', 'false', 'true', 'False', 'True'))

PAIRS = (
    ('text_a', 'text_b'),
    ('sentence1', 'sentence2'),
    ('question1', 'question2'),
    ('premise', 'hypothesis'),
    ('text1', 'text2'),
    ('#1 string', '#2 string'),
)
SINGLES = (
    *('text', 'sentence', 'content', 'question', 'query', 'utterance', 'review', 'tweet'),
    *('message', 'document', 'body', 'comment', 'title'),
)
LABELS = (
    *('label', 'labels', 'class', 'category', 'target', 'score', 'similarity', 'gold_label'),
    *('sentiment', 'intent', 'rating', 'stars', 'quality', 'is_duplicate'),
)
USUAL = frozenset((*SINGLES, *LABELS, *(name for pair in PAIRS for name in pair)))
KINDS = ('class', 'number', 'classes')
_FEATURES = {
    'class': datasets.Value('string'),
    'number': datasets.Value('float64'),
    'classes': datasets.Sequence(datasets.Value('string')),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the user says on columns; '' or None leaves one to be detected."""

    text_a: str | int | None = None
    text_b: str | int | None = None
    label: str | int | None = None
    choices: str = ''  # of `data.choices` alone

    @property
    def given(self) -> dict[str, str | int]:
        """The columns of texts and label that are set."""
        given = {key: getattr(self, key) for key in ('text_a', 'text_b', 'label')}
        return {key: value for key, value in given.items() if value not in ('', None)}

    def named_in(self, cells: Sequence[str], usual: Iterable[str]) -> bool:
        """Whether one of the cells is a usual name of a column, or one that is set."""
        own = (str(name).casefold() for name in self.given.values() if not _is_index(name))
        known = {*(name.casefold() for name in usual), *own}
        return any(cell.strip().casefold() in known for cell in cells)

    def header_in(self, cells: Sequence[str], usual: Iterable[str] = USUAL) -> bool:
        """Whether a file's first line names its columns; `usual`: what they are often called.

        Raises ValueError where neither the line nor the choice tells.
        """
        usual = tuple(usual)
        named = self.named_in(cells, usual)
        places = {key: int(name) for key, name in self.given.items() if _is_index(name)}
        if 'text_a' in self.given and len(places) == len(self.given):
            texts = [cells[i] for key, i in places.items() if key != 'label' and i < len(cells)]
            # Only a class may be called what a column is called; a text is hardly such a word.
            if not named or 'label' not in places or self.named_in(texts, usual):
                return named
        elif named or 'text_a' in self.given:
            return True
        raise ValueError(
            f'Cannot tell whether the first line, {shown(cells)}, names the columns. Set '
            'data.header to True or False, and data.columns.text_a and data.columns.label to '
            'names or, without a header, to positions counted from 0.'
            f'{self._otherwise_divided(cells, usual)}'
        )

    def _otherwise_divided(self, cells: Sequence[str], usual: Iterable[str]) -> str:
        """A hint where a line that was not divided names columns between other signs."""
        signs = [s for s in ';\t|,' if len(cells) == 1 and self.named_in(cells[0].split(s), usual)]
        return f' If {signs[0]!r} divides its columns, set data.delimiter to that.' if signs else ''


def choose(names: Sequence[str], choice: Choice, labelled: bool, where: str) -> dict[str, str]:
    """Finds the columns of a table: {'text_a': name, ['text_b': name,] ['label': name]}.

    labelled: whether a missing label is an error. where: the file, for messages.
    Raises ValueError listing the columns, where one is missing or more than one would do.
    """
    given = {key: named(names, value) for key, value in choice.given.items()}
    # Where the one that is named is absent, another is no label, whatever it is called.
    unlabelled = not labelled and given.get('label', '') is None
    if unlabelled:
        del given['label']
    for key, name in given.items():
        if name is None:
            raise ValueError(
                f'{where} has no column {choice.given[key]!r} (data.columns.{key}); its columns '
                f'are {shown(names)}, or 0 to {len(names) - 1} by position.'
            )
    if 'text_b' in given and 'text_a' not in given:
        raise ValueError('data.columns.text_b is set without data.columns.text_a; set both.')
    free = [name for name in names if name not in given.values()]
    detected = {}
    if 'text_a' not in given:
        detected |= _detect_texts(free, where, names)
    if 'label' not in given and not unlabelled:
        detected |= _detect_label(free, labelled, where)
    refuse_twins(detected.values(), names, where)
    given |= detected
    if len(set(given.values())) < len(given):
        raise ValueError(f'{where}: one column is used twice in {given}; set data.columns.')
    return given


def build(
    columns: Mapping[str, Sequence[Any]],
    kind: str,
    labelled: bool,
    place: Callable[[int], str],
    separator: str = ',',
) -> datasets.Dataset:
    """Checks the chosen columns and puts them into a Dataset with the normal names.

    kind: 'class' (labels become str), 'number' (float) or 'classes' (list of str; of a list, or of
    a text with `separator` between the names). labelled: whether labels must be there; else a
    split all of whose labels are empty, or -1, is unlabelled. place(i): where row i stands, for
    messages.
    Raises ValueError naming the row: empty text, missing label, a number that is none.
    """
    if kind not in KINDS:
        raise ValueError(f'label_kind is {kind!r}; it must be one of {KINDS}.')
    features = {key: datasets.Value('string') for key in columns if key != 'label'}
    values = {key: _texts(columns[key], key, place) for key in features}
    labels = columns.get('label', ())
    if not labelled and are_hidden(labels):
        labels = ()
    # The empty text is the empty set; a split of such alone is unlabelled only where it may be.
    sets = labelled and kind == 'classes' and any(isinstance(label, str) for label in labels)
    if sets or any(not _missing(label) for label in labels):
        names = functools.partial(class_names, separator=separator)
        convert = {'class': class_name, 'number': _number, 'classes': names}[kind]
        values['label'] = [convert(label, i, place) for i, label in enumerate(labels)]
        if kind == 'classes':
            _refuse_switches(values['label'], place)
            values['label'] = [list(dict.fromkeys(own)) for own in values['label']]
        features['label'] = _FEATURES[kind]
    elif labelled:
        raise ValueError(f'{place(0)}: no label, here or on any later row; labels are needed.')
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def with_texts(columns: Mapping[str, Sequence[Any]]) -> list[int]:
    """The rows none of whose texts is empty."""
    texts = [column for key, column in columns.items() if key != 'label']
    return [i for i, row in enumerate(zip(*texts, strict=True)) if not any(map(_missing, row))]


def at_lines(path: pathlib.Path, lines: Sequence[int]) -> Callable[[int], str]:
    """Names the place of a row: 'train.csv, line 3'."""
    return lambda row: f'{path}, line {lines[row]}'


def class_name(value: Any, row: int, place: Callable[[int], str]) -> str:
    """A class as readable text: 'sports', '3' (also from 3.0 and 3.00), 'true'."""
    if _missing(value):
        raise ValueError(f'{place(row)}: the label is empty; give one or remove the row.')
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | decimal.Decimal) and value % 1 == 0:
        return str(int(value))
    if not isinstance(value, str | int | float | decimal.Decimal):
        raise ValueError(f'{place(row)}: the label {value!r} is neither text nor a number.')
    check_encodable(str(value), f'{place(row)}: the label')
    return str(value).strip()


def class_names(value: Any, row: int, place: Callable[[int], str], separator: str) -> list[str]:
    """The classes of a list or of one text; the empty one is a set, too."""
    if isinstance(value, str):
        if _WRITTEN_LIST.fullmatch(value.strip()):
            raise ValueError(
                f'{place(row)}: the labels are {value!r}, a list written as a text; give the names '
                f'alone with {separator!r} (data.label_separator) between them and nothing where '
                'none applies, or lists in JSONL or Parquet.'
            )
        value = [name for name in value.split(separator) if name.strip()]
    if not isinstance(value, list | tuple):
        raise ValueError(
            f'{place(row)}: the labels are {value!r}; give a list, or a text with {separator!r} '
            '(data.label_separator) between the names; an empty one says that none applies.'
        )
    return [class_name(name, row, place) for name in value]


def _refuse_switches(sets: Sequence[Sequence[str]], place: Callable[[int], str]) -> None:
    """Raises ValueError where each row has a 0 or a 1 for every class instead of names.

    Taken for names these would be two classes, 0 and 1, which nearly every row has.
    """
    several = len({len(own) for own in sets}) == 1 and len(sets[0]) > 1
    if not several or not {name for own in sets for name in own} <= _SWITCHES:
        return
    twice = next((row for row, own in enumerate(sets) if len(set(own)) < len(own)), None)
    if twice is not None:
        raise ValueError(
            f'{place(twice)}: the labels are {", ".join(sets[twice][:12])}, a 0 or a 1 for each '
            f'of {len(sets[0])} classes, it seems; give the names of those that apply.'
        )


def _number(value: Any, row: int, place: Callable[[int], str]) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f'{place(row)}: the label {value!r} is not a finite number, which a regression needs '
            '(with a point, not a comma).'
        )
    return number


def _missing(value: Any) -> bool:
    if isinstance(value, float):  # what tables have in the place of nothing
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def _texts(values: Sequence[Any], key: str, place: Callable[[int], str]) -> list[str]:
    for row, value in enumerate(values):
        if _missing(value):
            raise ValueError(
                f'{place(row)}: {key} is empty; give a text or remove the row '
                '(data.skip_empty leaves out all such).'
            )
        if not isinstance(value, str):
            raise ValueError(f'{place(row)}: {key} is {value!r}, which is not a text.')
        check_encodable(value, f'{place(row)}: {key}')
    return list(values)


def check_encodable(text: str, what: str) -> None:
    """Raises ValueError where a text holds half a character, as cut JSON escapes leave it."""
    half = _SURROGATE.search(text)
    if half:
        raise ValueError(
            f'{what} holds {half.group()!r} at character {half.start()}, which is half of a '
            'character; mend the text or remove it.'
        )


def named(names: Sequence[str], value: str | int) -> str | None:
    """The column that a name, or a position counted from 0, stands for; None for no column."""
    if value in names:
        return value
    return names[int(value)] if _is_index(value) and 0 <= int(value) < len(names) else None


def refuse_twins(chosen: Iterable[str], names: Sequence[str], where: str) -> None:
    """Raises ValueError where another column has the name of one that was detected."""
    for own in chosen:
        twins = [name for name in names if name.casefold() == own.casefold()]
        if len(twins) > 1:
            raise ValueError(
                f'{where} has several columns of one name, {shown(twins)}; give the file one of '
                'them alone, or each a name of its own.'
            )


def are_hidden(labels: Sequence[Any]) -> bool:
    """Whether labels are all -1, by which the hub marks those that are kept secret, or absent."""
    hidden = {str(label).strip() for label in labels if label is not None}
    return bool(hidden) and hidden <= {'-1', '-1.0'}


def _is_index(value: str | int) -> bool:
    return isinstance(value, int) or value.isdecimal()


def _detect_texts(names: Sequence[str], where: str, columns: Sequence[str]) -> dict[str, str]:
    found = {name.casefold(): name for name in names}
    pairs = [pair for pair in PAIRS if found.keys() >= set(pair)]
    singles = [name for name in SINGLES if name in found]
    if len(pairs) + len(singles) == 1:
        keys = ('text_a', 'text_b') if pairs else ('text_a',)
        return {k: found[name] for k, name in zip(keys, [*sum(pairs, ()), *singles], strict=True)}
    reason = 'several columns could hold' if pairs or singles else 'no column is known to hold'
    raise ValueError(
        f'{where}: {reason} the text; its columns are {shown(columns)}. Set '
        'data.columns.text_a (and data.columns.text_b for pairs).'
    )


def _detect_label(names: Sequence[str], labelled: bool, where: str) -> dict[str, str]:
    found = [name for name in names if name.casefold() in LABELS]
    if len(found) == 1:
        return {'label': found[0]}
    if not found and not labelled:
        return {}
    reason = 'several columns could hold' if found else 'no column is known to hold'
    raise ValueError(
        f'{where}: {reason} the label; its columns are {shown(names)}. Set data.columns.label.'
    )


def shown(names: Sequence[str]) -> str:
    """Names of columns for a message."""
    return ', '.join(repr(name[:40]) for name in names)
