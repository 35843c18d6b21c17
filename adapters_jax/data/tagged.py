"""`load`: sentences of words that have tags, from whatever source a config names, in one form.

The result has one `datasets.Dataset` a split with the columns

| column | what it holds |
|---|---|
| tokens | the words of the sentence |
| tags | as many; '' for one that is not known (absent where a split is unlabelled) |
| scheme | the one that all tags of the file are in (`schemes.py`; absent with them) |
| file, line | where the sentence stands: its file, or the hub's data set and row |
| frame | of CoNLL files: the text of the file before, between and after the tags |

Keys of `data` are those of `sources.py`, without `glue`. `columns.text_a` is the column of words
and `columns.label` that of tags: positions in CoNLL files (from 0; -1 is the last), names or
positions in CoNLL-U, names elsewhere. `header` and `quoting` have no meaning here.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from jaxtyping import Int64

from adapters_jax.data import columns, conll, folders, schemes, sources, splits, text_files

# Of CoNLL files; many corpora have none at all, as `eng.train`.
SUFFIXES = (
    *('.conllu', '.conll', '.txt', '.tsv', '.bio', '.iob', '.iob1', '.iob2', '.iobes', '.bioes'),
    *('.bilou', '.conll03', '.conllx', '.ner', '.pos', '.tags', '.col', '.annotated', ''),
)
WORDS = ('tokens', 'words')
TAGS = ('tags', 'ner_tags', 'pos_tags', 'labels', 'upos')

_TEXT = datasets.Value('string')
FEATURES = {
    **dict.fromkeys(('tokens', 'tags', 'frame'), datasets.List(_TEXT)),
    **{'scheme': _TEXT, 'file': _TEXT, 'line': datasets.Value('int64')},
}

Splits = dict[str, datasets.Dataset]


def load(data: Mapping[str, Any]) -> Splits:
    """Reads the splits that `data` (a mapping or ConfigDict) describes.

    Returns 'train', 'validation' and 'test' as far as there are any. Raises ValueError or
    FileNotFoundError with one sentence on what to change.
    """
    if (data.get('columns') or {}).get('text_b'):
        raise ValueError(
            f'data.columns.text_b is {data["columns"]["text_b"]!r}, but a sentence that is tagged '
            'is no pair: text_a is the column of words, label that of tags.'
        )
    source = sources.source_of(data)
    if source not in ('files', 'hub'):
        raise ValueError(
            f'data.{"glue" if source == "glue" else "name"} names texts without tags; set data.dir '
            'or data.train to CoNLL, CoNLL-U or JSONL files, or data.name to a hub data set.'
        )
    found = _from_files(data) if source == 'files' else _from_hub(data)
    return sources.finish(found, data, _same_sentences)


def rows(sentences: Sequence[Sequence[str]]) -> datasets.Dataset:
    """Sentences without tags that come from no file."""
    features = datasets.Features({'tokens': FEATURES['tokens']})
    return datasets.Dataset.from_dict({'tokens': list(sentences)}, features=features)


def place(row: Mapping[str, Any], word: int) -> str:
    """Where a word of a sentence stands: 'train.conll, line 3'."""
    before = sum(text.count('\n') for text in row.get('frame', ())[: word + 1])
    return f'{row["file"]}, line {row["line"] + before}'


def suffix(rows: datasets.Dataset) -> str:
    """The ending of the file that a split with frames comes from."""
    ending = text_files.suffix_of(pathlib.Path(rows[0]['file']))
    return ending if ending and ending in SUFFIXES else '.conll'


def _same_sentences(rows: datasets.Dataset) -> Int64[np.ndarray, ' N']:
    """A number for each sentence, the same for those of the same words."""
    return splits.same_text_groups([' '.join(words) for words in rows['tokens']], None)


def _from_files(data: Mapping[str, Any]) -> Splits:
    files = folders.find_files(data, (*SUFFIXES, *text_files.OBJECTS), within=True)
    return {split: _from_file(path, data, split != 'test') for split, path in files.items()}


def _from_file(path: pathlib.Path, data: Mapping[str, Any], labelled: bool) -> datasets.Dataset:
    word, tag = _columns(data)
    encoding = data.get('encoding') or 'utf-8-sig'
    given = text_files.Layout(encoding, data.get('delimiter') or '')
    if text_files.suffix_of(path) in text_files.OBJECTS:
        table = text_files.open_table(path, given)
        chosen = _chosen(table.names, data, labelled, str(path))
        values, lines = table.read(chosen)
        return _build(values, str(path), lines, labelled)
    layout = conll.Layout(encoding, word, tag, given.delimiter, labelled)
    found = conll.read(path, layout)
    values = {'tokens': [one.words for one in found], 'frame': [one.frame for one in found]}
    values |= {'tags': [one.tags for one in found]}
    return _build(values, str(path), [one.line for one in found], labelled)


def _columns(data: Mapping[str, Any]) -> tuple[str | int, str | int]:
    given = data.get('columns') or {}
    return tuple('' if given.get(key) is None else given[key] for key in ('text_a', 'label'))


def _chosen(
    names: Sequence[str], data: Mapping[str, Any], labelled: bool, where: str
) -> dict[str, str]:
    """Finds the columns of words and tags by the config's names, else by the usual ones."""
    found = {}
    keys = (('tokens', 'text_a', WORDS), ('tags', 'label', TAGS))
    for (column, key, usual), given in zip(keys, _columns(data), strict=True):
        there = [name for name in names if (name == given if given else name.lower() in usual)]
        if len(there) == 1:
            found[column] = there[0]
        elif there or labelled or column == 'tokens':
            raise ValueError(
                f'{where}: {"several columns" if there else "no column"} for the {column} '
                f'(expected {given or " or ".join(usual)}); its columns are {", ".join(names)}. '
                f'Set data.columns.{key}.'
            )
    return found


def _from_hub(data: Mapping[str, Any]) -> Splits:
    def read(rows: datasets.Dataset, labelled: bool, where: str) -> datasets.Dataset:
        chosen = _chosen(rows.column_names, data, labelled, where)
        values = {column: rows[name][:] for column, name in chosen.items()}
        kind = getattr(rows.features[chosen['tags']], 'feature', None) if 'tags' in chosen else None
        if isinstance(kind, datasets.ClassLabel):
            sentences = enumerate(values['tags'], 1)
            values['tags'] = [_named(tags, kind, f'{where}, line {i}') for i, tags in sentences]
        return _build(values, where, range(1, len(rows) + 1), labelled)

    return sources.from_hub(data, read)


def _named(
    numbers: list[int | None] | None, kind: datasets.ClassLabel, where: str
) -> list[str] | None:
    """The tags that numbers stand for. Raises ValueError for a number that stands for none."""
    # The hub marks what is kept secret by -1.
    names = dict(enumerate(kind.names)) | dict.fromkeys((-1, None), schemes.UNKNOWN)
    strange = next((number for number in numbers or () if number not in names), None)
    if strange is not None:
        raise ValueError(
            f'{where}: the number {strange} among the tags; expected 0 to {kind.num_classes - 1}, '
            'or -1 where a tag is not known.'
        )
    return numbers and [names[number] for number in numbers]


def _build(
    values: dict[str, list], file: str, lines: Sequence[int], labelled: bool
) -> datasets.Dataset:
    """Checks sentences and puts them into a Dataset.

    A split of which no tag is known is unlabelled. Raises ValueError naming file and line.
    """
    tags = values.pop('tags', None) or [None] * len(lines)
    for words, own, line in zip(values['tokens'], tags, lines, strict=True):
        _check(words, own, labelled, f'{file}, line {line}')
    if any(any(own or ()) for own in tags):
        both = zip(values['tokens'], tags, strict=True)
        values['tags'] = [own or [''] * len(words) for words, own in both]
        values['scheme'] = [schemes.detect(values['tags'])] * len(lines)
    elif labelled:
        raise ValueError(f'{file}: no word has a tag; tags are needed to train and to choose by.')
    values |= {'file': [file] * len(lines), 'line': list(lines)}
    features = datasets.Features({column: FEATURES[column] for column in values})
    return datasets.Dataset.from_dict(values, features=features)


def _check(words: Any, tags: Any, labelled: bool, where: str) -> None:
    check_words(words, where)
    if tags is None and not labelled:
        return
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f'{where}: the tags are {str(tags)[:60]}; expected a list of texts.')
    if len(tags) != len(words):
        raise ValueError(f'{where}: {len(words)} words have {len(tags)} tags; expected as many.')
    for tag in tags:
        columns.check_encodable(tag, f'{where}: the tag {tag!r}')


def check_words(words: Any, where: str) -> None:
    """Refuse what is no list of words that are not empty."""
    if not isinstance(words, list) or not all(isinstance(w, str) and w for w in words):
        raise ValueError(
            f'{where}: the tokens are {str(words)[:60]}; expected a list of words, none of them '
            'empty.'
        )
    for word in words:
        columns.check_encodable(word, f'{where}: the word {word!r}')
