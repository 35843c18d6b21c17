"""Tables of questions with candidates to choose from, in the columns that data sets have them in.

A row of the normal form has `text_a` (what the candidates continue or answer), `text_b` where there
is a question beside it, `choices` (two or more texts, as many as the row has), and `label`: the
right one's number, from 0. Of the names below the first that a table has in full are taken:

| what | columns |
|---|---|
| texts | text_a and text_b; context, article or passage, with question; sent1 and sent2 (SWAG); \
ctx_a and ctx_b (HellaSwag); premise and question (COPA); else one of context, question, \
question_stem, premise, goal, sentence, ctx, text, text_a |
| candidates | a list under choices, options, endings or candidates (also {"text": [...], \
"label": [...]}, as in ARC); or a column each: choice1, ending0, option1, answerA, sol1, ... |
| label | label, answer, answerKey, correct or gold: a number, a letter from A, or the text |
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import datasets

from adapters_jax.data.columns import (
    Choice,
    are_hidden,
    check_encodable,
    named,
    refuse_twins,
    shown,
)
from adapters_jax.data.forms import Place

PAIRS = (
    ('text_a', 'text_b'),
    *((text, 'question') for text in ('context', 'article', 'passage')),
    ('sent1', 'sent2'),
    ('ctx_a', 'ctx_b'),
    ('premise', 'question'),
)
SINGLES = (
    *('context', 'question', 'question_stem', 'premise', 'goal', 'sentence', 'ctx', 'text'),
    'text_a',
)
LISTS = ('choices', 'options', 'endings', 'candidates')
LABELS = ('label', 'answer', 'answerkey', 'answer_key', 'correct', 'gold')
_ONE_OF = re.compile(r'(choice|ending|option|candidate|answer|sol)_?(\d+|[a-e])', re.IGNORECASE)
# COPA's column `question` names the question that its paper asks (Roemmele et al. 2011).
_ASKED = {'cause': 'What was the cause?', 'effect': 'What happened as a result?'}


@dataclasses.dataclass(frozen=True)
class Choices:
    """The form of such rows; `first` is the number of the first candidate in the table's labels."""

    kind: ClassVar[str] = 'choice'
    names_classes: ClassVar[bool] = False
    whole_lines: ClassVar[bool] = False

    choice: Choice
    first: int = 0

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Return the form that the config's section `data` asks for."""
        return cls(Choice(**(data.get('columns') or {})), int(data.get('first_choice') or 0))

    def header_in(self, cells: Sequence[str]) -> bool:
        """Whether a file's first line names its columns; files without a header are refused."""
        del cells
        return True

    def choose(self, names: Sequence[str], labelled: bool, where: str) -> dict[str, str]:
        """Find the columns, as the table above says; see `Form.choose`."""
        found = given = self._given(names, labelled, where)
        free = {name.casefold(): name for name in names if name not in found.values()}
        if 'text_a' not in found:
            found = found | _texts(free, where)
        if not any(key.startswith('choice') for key in found):
            found = found | _candidates(names, free, where)
        # Where a label is named and absent, another column is none.
        if 'label' not in self.choice.given:
            found = found | _label(names, free, labelled, where)
        refuse_twins((name for key, name in found.items() if key not in given), names, where)
        return found

    def _given(self, names: Sequence[str], labelled: bool, where: str) -> dict[str, str]:
        """Return the columns that the config names."""
        given = dict(self.choice.given)
        several = [name for name in self.choice.choices.split('+') if name]
        if len(several) == 1:
            given['choices'] = several[0]
        elif several:
            given |= {f'choice_{i}': name for i, name in enumerate(several)}
        found = {key: named(names, value) for key, value in given.items()}
        if not labelled and found.get('label', '') is None:
            del found['label']
        for key, name in found.items():
            if name is None:
                option = 'choices' if key.startswith('choice') else key
                raise ValueError(
                    f'{where} has no column {given[key]!r} (data.columns.{option}); its columns '
                    f'are {shown(names)}.'
                )
        return found

    def build(
        self, values: Mapping[str, Sequence[Any]], labelled: bool, place: Place
    ) -> datasets.Dataset:
        """Make rows of the normal form; see `Form.build`."""
        rows = len(next(iter(values.values())))
        listed = [_listed(values, i, place) for i in range(rows)]
        built: dict[str, list] = {'text_a': [_text(values, i, place) for i in range(rows)]}
        if 'text_b' in values:
            asked = [_question(value, place(i)) for i, value in enumerate(values['text_b'])]
            built['text_b'] = [_ASKED.get(text, text) for text in asked]
        built['choices'] = [texts for texts, _ in listed]
        labels = values.get('label', ())
        if not labelled and are_hidden(labels):
            labels = ()
        if any(_plain(label) for label in labels):
            given = zip(labels, listed, strict=True)
            built['label'] = [self._number(x, *own, place(i)) for i, (x, own) in enumerate(given)]
        elif labelled:
            raise ValueError(f'{place(0)}: no label, here or on any later row; labels are needed.')
        return datasets.Dataset.from_dict(built, features=_features(built))

    def _number(self, label: Any, choices: list[str], names: list[str], where: str) -> int:
        """Return the number from 0 of the candidate that a label means."""
        text = _plain(label)
        if text in names:
            return names.index(text)
        number = -1
        if re.fullmatch(r'\d+(\.0)?', text):
            number = int(float(text)) - self.first
            if isinstance(label, str) and choices.count(text) and choices[number:][:1] != [text]:
                raise ValueError(
                    f'{where}: the label {label!r} may be the number of a candidate or the text of '
                    'another one; give it as a number, not a text, or as a letter from A'
                )
        elif re.fullmatch('[A-Za-z]', text):
            number = ord(text.upper()) - ord('A')
            if number >= len(choices) and choices.count(text) == 1:
                number = choices.index(text)
            elif text in choices and choices[number:][:1] not in ([], [text]):
                raise ValueError(
                    f'{where}: the label {label!r} may be the letter of a candidate or the text of '
                    f'another one; give a number from {self.first} (data.first_choice)'
                )
        elif choices.count(text) == 1:
            number = choices.index(text)
        if not 0 <= number < len(choices):
            raise ValueError(
                f'{where}: the label {label!r} is none of the {len(choices)} candidates; give a '
                f'number from {self.first} (data.first_choice), a letter from A, or the text of one'
            )
        return number


def _texts(free: Mapping[str, str], where: str) -> dict[str, str]:
    for pair in PAIRS:
        if free.keys() >= set(pair):
            return {'text_a': free[pair[0]], 'text_b': free[pair[1]]}
    for name in SINGLES:
        if name in free:
            return {'text_a': free[name]}
    raise ValueError(
        f'{where}: no column is known to hold what the candidates belong to; its columns are '
        f'{shown(list(free.values()))}. Set data.columns.text_a (and .text_b for a question).'
    )


def _candidates(names: Sequence[str], free: Mapping[str, str], where: str) -> dict[str, str]:
    for name in LISTS:
        if name in free:
            return {'choices': free[name]}
    one_of = sorted(
        (found[1].casefold(), found[2].casefold().zfill(3), name)
        for name in names
        if (found := _ONE_OF.fullmatch(name))
    )
    if len(one_of) < 2 or len({stem for stem, _, _ in one_of}) > 1:
        raise ValueError(
            f'{where}: no columns are known to hold the candidates; its columns are '
            f"{shown(names)}. Set data.columns.choices to a list's name or to several joined by "
            "'+': 'ending0+ending1'."
        )
    return {f'choice_{i}': name for i, (_, _, name) in enumerate(one_of)}


def _label(
    names: Sequence[str], free: Mapping[str, str], labelled: bool, where: str
) -> dict[str, str]:
    label = [free[name] for name in LABELS if name in free]
    if len(label) > 1 or (labelled and not label):
        raise ValueError(
            f'{where}: {"several columns" if label else "no column"} could hold the label; its '
            f'columns are {shown(names)}. Set data.columns.label.'
        )
    return {'label': label[0]} if label else {}


def _listed(
    values: Mapping[str, Sequence[Any]], row: int, place: Place
) -> tuple[list[str], list[str]]:
    """Return a row's candidates, and the names that labels know them by, where they have some."""
    if 'choices' not in values:
        given = [column[row] for key, column in values.items() if key.startswith('choice_')]
        found, names = [_plain(value) for value in given], []
        while found and not found[-1]:  # a row may have fewer; a gap would move what follows it
            found.pop()
    else:
        given = values['choices'][row]
        own = given if isinstance(given, Mapping) else {'text': given}
        found, names = own.get('text'), [_plain(name) for name in own.get('label') or ()]
    texts = found if isinstance(found, list | tuple) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f'{place(row)}: the candidates are {given!r}; expected a list of two or more texts.'
        )
    for text in texts:
        check_encodable(text, f'{place(row)}: a candidate')
    return list(texts), names


def _text(values: Mapping[str, Sequence[Any]], row: int, place: Place) -> str:
    text = values.get('text_a', {row: None})[row]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f'{place(row)}: {text!r} stands where the text must that the candidates belong to.'
        )
    check_encodable(text, f'{place(row)}: the text')
    return text


def _question(value: Any, where: str) -> str:
    if not isinstance(value, str | None):
        raise ValueError(
            f'{where}: the question is {repr(value)[:60]}, which is not a text; give one text, or '
            'none.'
        )
    check_encodable(value or '', f'{where}: the question')
    return _plain(value)


def _plain(value: Any) -> str:
    """Return a value as text; nothing, and what the hub has in place of a secret label, is ''."""
    return '' if value is None else str(value).strip()


def _features(built: Mapping[str, Any]) -> datasets.Features:
    kinds = dict.fromkeys(built, datasets.Value('string'))
    kinds['choices'] = datasets.Sequence(datasets.Value('string'))
    if 'label' in built:
        kinds['label'] = datasets.Value('int64')
    return datasets.Features(kinds)
