"""Questions about a text, from SQuAD's files or any table, in one normal form.

The result has one `datasets.Dataset` a split with the columns `id`, `question`, `context` and,
where the split is labelled, `answers` and `starts`: the texts of a question's answers and where
each begins in the context, in characters. A question that its context does not answer has none;
where that holds of a whole test split and nothing says so (`is_impossible`), its answers are kept
secret, as on the hub.

Read are SQuAD 1.1 and 2.0 as JSON, the same in JSONL (a line is an article, a paragraph or a
question), hub data sets, and tables with a question in each row. What is seen of an answer is
its characters in the context, so each is compared with them here, while its place is still known.
"""

import collections
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from adapters_jax.data import columns, folders, sources, splits, text_files

# What a column may be called, and the key of `data.columns` that names it otherwise.
NAMES = {
    'question': ('question',),
    'context': ('context', 'passage', 'paragraph', 'review'),
    'answers': ('answers', 'answer', 'answer_text', 'human_ans_spans'),
    'start': ('answer_start', 'answer_starts', 'start', 'human_ans_indices'),
    'id': ('id', 'qid', 'question_id', 'q_review_id'),
}
KEYS = {'question': 'text_a', 'context': 'text_b', 'answers': 'label'}
# How SubjQA writes that there is no answer; it also appends the word to every context.
NO_ANSWER = 'ANSWERNOTFOUND'
# Halves of characters, which no text can be encoded with.
_SPAN = re.compile(r'[(\[]?\s*(\d+)\s*(?:,\s*(\d+)\s*)?[)\]]?')

_LOG = logging.getLogger(__name__)

Node = tuple[str, Mapping[str, Any]]  # where an object stands, and the object


class Answer(NamedTuple):
    """An answer as a file has it: its text and, where they are given, its bounds in characters."""

    text: str
    start: int | None = None
    end: int | None = None


class Question(NamedTuple):
    """A question in the normal form; `answers` is None where nothing is said of them."""

    place: str
    id: str
    question: str
    context: str
    answers: list[tuple[str, int]] | None


def read(data: Mapping[str, Any]) -> sources.Splits:
    """Reads the splits that the config's section `data` describes; see `data.sources`.

    Questions about one context stay together where a split is cut off another.
    Raises ValueError or FileNotFoundError with one sentence on what to change.
    """
    source = sources.source_of(data)
    if source in ('glue', 'builtin'):
        key = 'glue' if source == 'glue' else 'name'
        raise ValueError(
            f'data.{key} is {data[key]!r}, which has no questions about a text; set data.train to '
            'a file of SQuAD, data.dir to a folder, or data.name to a hub id such as squad'
        )
    found = _from_hub(data) if source == 'hub' else _from_files(data)
    return sources.finish(found, data, _paragraphs)


def _paragraphs(rows: datasets.Dataset) -> np.ndarray:
    return splits.same_text_groups(rows['context'][:], None)


def _from_files(data: Mapping[str, Any]) -> sources.Splits:
    layout, found = sources.layout_of(data, True), {}
    for split, path in folders.find_files(data).items():
        nodes = [flat for node in _objects(path, layout) for flat in _flatten(node)]
        found[split] = build(nodes, data.get('columns') or {}, split != 'test', str(path))
    return found


def _from_hub(data: Mapping[str, Any]) -> sources.Splits:
    def read(rows: datasets.Dataset, labelled: bool, where: str) -> datasets.Dataset:
        nodes = [(f'{where}, row {i}', row) for i, row in enumerate(rows)]
        return build(nodes, data.get('columns') or {}, labelled, where)

    return sources.from_hub(data, read)


def _objects(path: Path, layout: text_files.Layout) -> Iterator[Node]:
    """The objects of a file: those of a list, the lines of a table, or the one that it holds."""
    if text_files.suffix_of(path) != '.json' or text_files.file_of(path)[1]:
        for line, record in text_files.open_table(path, layout).objects():
            yield f'{path}, line {line}', record
        return
    document = text_files.read_json(path, layout.encoding)
    several = isinstance(document, list)
    for number, node in enumerate(document if several else [document], 1):
        yield f'{path}, entry {number}' if several else str(path), node


def _flatten(node: Node, above: Mapping[str, Any] | None = None) -> Iterator[Node]:
    """The questions of an article, of a paragraph, or the object itself, with their context."""
    place, record = node
    if not isinstance(record, Mapping):
        raise ValueError(f'{place}: {str(record)[:60]!r} where an object must stand.')
    for key in ('data', 'paragraphs', 'qas'):
        if isinstance(record.get(key), list):
            kept = {'context': record['context']} if 'context' in record else above
            for number, inner in enumerate(record[key]):
                yield from _flatten((f'{place}, {key}[{number}]', inner), kept)
            return
    yield place, {**(above or {}), **record}


def build(
    nodes: Sequence[Node], given: Mapping[str, Any], labelled: bool, source: str
) -> datasets.Dataset:
    """Checks questions, and puts them into a Dataset with the normal names.

    nodes: an object for each question, with the place where it stands. given: `data.columns`.
    labelled: whether answers must be there. source: the file, for messages.
    Raises ValueError naming the place: an empty text, an answer that is not in its context, an id
    of two questions, answers for some questions only.
    """
    if not nodes:
        raise ValueError(f'{source} has no questions; it must hold at least one.')
    names = list(dict.fromkeys(name for _, node in nodes for name in node))
    chosen, notes = _choose(names, given, labelled, source), collections.Counter()
    questions = _merge((_question(*node, chosen, notes) for node in nodes), notes)
    _tell(notes, source)
    features = {name: datasets.Value('string') for name in ('id', 'question', 'context')}
    values = {name: [getattr(q, name) for q in questions] for name in features}
    secret = not labelled and _are_secret(questions, nodes, chosen)
    if not secret and _are_labelled(questions, labelled, source):
        features['answers'] = datasets.List(datasets.Value('string'))
        features['starts'] = datasets.List(datasets.Value('int32'))
        values['answers'] = [[text for text, _ in q.answers] for q in questions]
        values['starts'] = [[start for _, start in q.answers] for q in questions]
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def _are_secret(
    questions: Sequence[Question], nodes: Sequence[Node], chosen: Mapping[str, str]
) -> bool:
    """Whether no question has an answer, and none is said to have none."""
    said = any(
        _is_impossible(node) or NO_ANSWER in str(node.get(chosen.get('answers')))
        for _, node in nodes
    )
    return not said and not any(q.answers for q in questions)


def _is_impossible(node: Mapping[str, Any]) -> bool:
    # Tables write it in any case, and as a number.
    return str(node.get('is_impossible')).strip().casefold() in ('true', '1', '1.0')


def _are_labelled(questions: Sequence[Question], needed: bool, source: str) -> bool:
    without = [q.place for q in questions if q.answers is None]
    if without and (needed or len(without) < len(questions)):
        raise ValueError(
            f'{without[0]}: the question has no answers ({len(without)} of {len(questions)} in '
            f'{source} have none); one that its text does not answer has an empty list of them.'
        )
    return not without


def _choose(
    names: Sequence[str], given: Mapping[str, Any], labelled: bool, source: str
) -> dict[str, str]:
    """The name of each column that there is; a question and a context there must be."""
    folded, chosen = {name.casefold(): name for name in names}, {}
    for key, known in NAMES.items():
        own = given.get(KEYS.get(key, ''))
        set_ = own not in ('', None)
        there = [columns.named(names, own)] if set_ else [folded[k] for k in known if k in folded]
        if key == 'answers' and there == [None] and not labelled:
            there = []
        if None in there or len(there) > 1 or (key in ('question', 'context') and not there):
            said = repr(own) if set_ else f'one of {", ".join(known)}'
            how = f'set data.columns.{KEYS[key]}' if key in KEYS else 'leave one of them'
            raise ValueError(
                f'{source}: the {key} should be in the column {said}, but there are '
                f'{columns.shown(names)}; {how}.'
            )
        if there and not set_:
            columns.refuse_twins(there, names, source)
        if there:
            chosen[key] = there[0]
    return chosen


def _question(
    place: str, node: Mapping[str, Any], chosen: Mapping[str, str], notes: collections.Counter
) -> Question:
    own = {key: node.get(name) for key, name in chosen.items()}
    if own.get('id') not in ('', None):
        place = f'{place}, question {own["id"]!r}'
    question = _text(own['question'], 'question', place)
    context = _text(own['context'], 'context', place)
    if context.endswith(NO_ANSWER):
        context = _text(context.removesuffix(NO_ANSWER).rstrip(), 'context', place)
    answers = [] if _is_impossible(node) else _answers(own.get('answers'), own.get('start'), place)
    if answers is not None:
        answers = [_locate(answer, context, place, notes) for answer in answers]
    id_ = '' if own.get('id') is None else str(own['id'])
    columns.check_encodable(id_, f'{place}: the id')
    return Question(place, id_, question, context, answers)


def _text(value: Any, what: str, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{place}: the {what} is {value!r}; give a text or remove the question.')
    columns.check_encodable(value, f'{place}: the {what}')
    return value


def _answers(value: Any, start: Any, place: str) -> list[Answer] | None:
    """The answers of a question, whichever way they are written; None where nothing is said."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None if start in ('', None) else []
    if isinstance(value, str):
        found = [] if value.strip() in ('', NO_ANSWER) else [_answer(value, start, place)]
    elif isinstance(value, Mapping):  # as Hugging Face has them: a list of texts, one of starts
        texts, starts = value.get('text'), value.get('answer_start')
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        found = [_answer(*pair, place) for pair in _pairs(texts, starts, place)]
    elif isinstance(value, list) and all(isinstance(one, str) for one in value):
        found = [_answer(*pair, place) for pair in _pairs(value, start, place)]
    elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        found = [_answer(one.get('text'), one.get('answer_start'), place) for one in value]
    else:
        raise ValueError(
            f'{place}: the answers are {str(value)[:60]!r}; expected a text, or a list of objects '
            'with text and answer_start.'
        )
    return found


def _pairs(texts: Any, starts: Any, place: str) -> Iterable[tuple[Any, Any]]:
    starts = [None] * len(texts or ()) if starts in ('', None) else starts
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(
            f'{place}: the answers are {str(texts)[:60]!r} with the starts {str(starts)[:60]!r}; '
            'expected two lists of one length.'
        )
    return zip(texts, starts, strict=True)


def _answer(text: Any, start: Any, place: str) -> Answer:
    """An answer with its bounds: a number, or a text of one or of two; -1 says nothing."""
    text = _text(text, 'text of an answer', place)
    if start in ('', None, -1, '-1'):
        return Answer(text)
    if type(start) is int and start >= 0:
        return Answer(text, start)
    whole = isinstance(start, float) and start.is_integer()
    found = _SPAN.fullmatch(str(int(start)) if whole else str(start).strip())
    if not found:
        raise ValueError(
            f'{place}: the answer {text[:60]!r} begins at {start!r}; expected the number of a '
            'character of the context, counted from 0.'
        )
    begin, end = found.groups()
    return Answer(text, int(begin), None if end is None else int(end))


def _locate(
    answer: Answer, context: str, place: str, notes: collections.Counter
) -> tuple[str, int]:
    """The characters of an answer, and where they begin in the context."""
    text, start, end = answer
    if end is not None and context[start:end].strip():
        found = context[start:end].rstrip()  # in SubjQA `end` may be behind the word it appends
        notes['written otherwise'] += found != text
        return found, start
    if start is not None and context.startswith(text, start):
        return text, start
    places = [match.start() for match in re.finditer(f'(?={re.escape(text)})', context)]
    if not places:
        raise ValueError(
            f'{place}: the answer {text[:60]!r} is nowhere in its context, which at '
            f'{start or 0} reads {context[start or 0 :][: min(60, len(text))]!r}; an answer must '
            'be a part of the context, to the letter.'
        )
    if start is None:
        notes['several places'] += len(places) > 1
        return text, places[0]
    notes['moved'] += 1
    return text, min(places, key=lambda found: abs(found - start))


def _merge(questions: Iterable[Question], notes: collections.Counter) -> list[Question]:
    """One question for each id: the answers of several annotators come together."""
    found: dict[str, Question] = {}
    for number, new in enumerate(questions, 1):
        key = new.id or str(number)
        old = found.get(key)
        if old is None:
            found[key] = new._replace(id=key)
            continue
        if old[2:4] != new[2:4] or (old.answers is None) != (new.answers is None):
            raise ValueError(
                f'{new.place}: {old.place} has the same id with another question or context; '
                'an id must be of one question.'
            )
        notes['same id'] += 1
        if new.answers:
            found[key] = old._replace(answers=list(dict.fromkeys([*old.answers, *new.answers])))
    return list(found.values())


_TOLD = {
    'moved': 'answers begin elsewhere than the file says: they are taken at the nearest place that '
    'reads so',
    'several places': 'answers without a start occur several times in their context: the first '
    'place is taken',
    'written otherwise': 'answers are written otherwise than the characters that their bounds '
    'name: these are taken',
    'same id': 'lines repeat a question, as several annotators answer it: their answers come '
    'together',
}


def _tell(notes: collections.Counter, source: str) -> None:
    for key, text in _TOLD.items():
        if notes[key]:
            _LOG.warning('%s: %s %s.', source, f'{notes[key]:,}', text)
