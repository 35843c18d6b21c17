"""`load`: texts and what is to be written for them (translations, summaries), in one form.

The result has one `datasets.Dataset` a split with the columns `text_a` and `target` (the text to be
written; absent where a split has none). Sources are those of `sources.py`, without `glue`, with the
columns `data.columns.text_a` and `data.columns.label`. Where `data.languages` is 'de,en' they are
moreover

- a folder of files with a text a line and the language in the name: train.de and train.en, also
  val.de.gz, test_2016_flickr.en.gz (the split's word somewhere in the name;
  one file of each split a language), or
- a table or a hub data set with a column `translation` of objects, or columns named by language.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import datasets

from adapters_jax.data import columns, folders, sources, text_files
from adapters_jax.data.columns import Choice, check_encodable, named, shown
from adapters_jax.data.forms import Place
from adapters_jax.data.text_files import Layout

USUAL = {
    'text_a': ('source', 'src', 'text', 'document', 'article', 'dialogue', 'input'),
    'label': ('target', 'tgt', 'summary', 'highlights', 'output', 'translation', 'label'),
}
# What columns of numbers are called, also that of a table that pandas has written.
NUMBERS = ('', 'id', 'idx', 'index', 'guid', 'uid', 'unnamed: 0')
# What is to be written is no class, and is not called `label` among rows.
_COLUMNS = {'text_a': 'text_a', 'label': 'target'}
OBJECTS = 'translation'  # what hub data sets call the column of {'de': ..., 'en': ...}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The form of such rows."""

    kind: ClassVar[str] = 'text'
    names_classes: ClassVar[bool] = False
    whole_lines: ClassVar[bool] = False

    choice: Choice
    languages: tuple[str, ...] = ()

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Return the form that the config's section `data` asks for."""
        return cls(Choice(**(data.get('columns') or {})), languages_of(data))

    def header_in(self, cells: Sequence[str]) -> bool:
        """Whether a file's first line names its columns; see `Choice.header_in`."""
        usual = {name for own in USUAL.values() for name in own}
        return self.choice.header_in(cells, usual | set(self.languages))

    def choose(self, names: Sequence[str], labelled: bool, where: str) -> dict[str, str]:
        """Find the two columns; see `Form.choose`."""
        if self.languages and OBJECTS in names:
            return {'text_a': OBJECTS}
        found = self._found(names)
        for key in USUAL if labelled else ('text_a',):
            if key not in found:
                raise ValueError(
                    f'{where}: no column for data.columns.{key} among {shown(names)}; set it, or '
                    "data.languages to the names of two, such as 'de,en'."
                )
        if len(set(found.values())) < len(found):
            raise ValueError(f'{where}: one column is used twice in {found}; set data.columns.')
        return found

    def _found(self, names: Sequence[str]) -> dict[str, str]:
        """Return the columns that the config or their names tell, and of two columns both."""
        given = {key: self.choice.given[key] for key in USUAL if key in self.choice.given}
        found = {key: name for key, own in given.items() if (name := named(names, own)) is not None}
        free = [name for name in names if name not in found.values()]
        open_keys = [(place, key) for place, key in enumerate(USUAL) if key not in given]
        known = {key: self._known(key, place, free) for place, key in open_keys}
        found |= {key: own[0] for key, own in known.items() if len(own) == 1}
        missing = [key for key, own in known.items() if not own]
        left = [name for name in names if name not in found.values()]
        # Of two columns each is one, the first one the text if no name tells.
        by_place = len(names) == 2 and len(missing) == len(left) and not self.languages
        if by_place and not any(name.casefold() in NUMBERS for name in left):
            found |= zip(missing, left, strict=True)
        return found

    def _known(self, key: str, place: int, names: Sequence[str]) -> list[str]:
        """Return the columns that may be the one of a key by their names."""
        if not self.languages:
            return [name for name in names if name.casefold() in USUAL[key]]
        language = self.languages[place]
        own = [name for name in names if name.casefold() == language.casefold()]
        return [language] if language in own else own

    def build(
        self, values: Mapping[str, Sequence[Any]], labelled: bool, place: Place
    ) -> datasets.Dataset:
        """Check the texts: none is empty, and each row has both or no row has a second one."""
        taken = dict(values)
        if self.languages and 'label' not in taken and _are_objects(taken['text_a']):
            both = [row if isinstance(row, Mapping) else {} for row in taken['text_a']]
            for key, language in zip(('text_a', 'label'), self.languages, strict=True):
                taken[key] = [row.get(language) for row in both]
        if 'label' in taken and not labelled and not any(taken['label']):
            del taken['label']
        for key, column in taken.items():
            for row, text in enumerate(column):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f'{place(row)}: {text!r} stands where a text must ({key}).')
                check_encodable(text, f'{place(row)}: the text')
        rows = {_COLUMNS[key]: list(column) for key, column in taken.items()}
        features = datasets.Features(dict.fromkeys(rows, datasets.Value('string')))
        return datasets.Dataset.from_dict(rows, features=features)


def _are_objects(column: Sequence[Any]) -> bool:
    return bool(len(column)) and isinstance(column[0], Mapping)


def languages_of(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the language of the texts and that of what is to be written, where they are set.

    Raises:
        ValueError: not two of them.
    """
    given = data.get('languages') or ''
    found = tuple(name.strip() for name in given.split(',')) if given else ()
    if len(found) not in (0, 2) or not all(found) or len(set(found)) < len(found):
        raise ValueError(
            f"data.languages is {given!r}; expected two, that of the texts first: 'de,en'"
        )
    return found


def load(data: Mapping[str, Any]) -> dict[str, datasets.Dataset]:
    """Read the splits that `data` describes.

    Raises:
        ValueError, FileNotFoundError: with one sentence on what to change.
    """
    remedy = 'data.dir, data.train or data.name to texts and their translations or summaries'
    sources.refuse_glue(data, 'no texts to be written', remedy)
    languages = languages_of(data)
    if languages and data.get('dir') and not data.get('train'):
        folder = pathlib.Path(data['dir']).expanduser()
        found = _files(folder, languages)
        if found:
            encoding = data.get('encoding') or Layout().encoding
            return sources.finish(_read_files(found, encoding), data)
    return sources.read(data, Pairs.of(data))


def _files(folder: pathlib.Path, languages: tuple[str, ...]) -> dict[str, tuple[pathlib.Path, ...]]:
    """Return the two files of each split, where a folder has files by language.

    Raises:
        FileNotFoundError: no such folder, or a split with a file of one language alone.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'data.dir is {str(folder)!r}, which is not a folder.')
    found = {}
    for split, words in folders.SPLITS.items():
        own = [_in_language(folder, words, language) for language in languages]
        if any(own) and not all(own):
            missing = languages[own.index([])]
            raise FileNotFoundError(
                f'{folder} has a file of {split} in one language, but none in {missing!r}; '
                f'{folders.content(folder)}.'
            )
        if all(own):
            found[split] = _matched(folder, split, own)
    return found if 'train' in found else {}


_Files = Sequence[tuple[str, pathlib.Path]]  # with their names less language and .gz


def _in_language(folder: pathlib.Path, words: Sequence[str], language: str) -> _Files:
    found = []
    for path in sorted(folder.iterdir()):
        stem, _, ending = path.name.removesuffix('.gz').rpartition('.')
        if ending == language and set(re.findall('[a-z]+', stem.lower())) & set(words):
            found.append((stem, path))
    return found


def _matched(folder: pathlib.Path, split: str, own: Sequence[_Files]) -> tuple[pathlib.Path, ...]:
    """Return the two files of a split, whose names differ in the language alone.

    Raises:
        ValueError: no two do, or more than two.
    """
    first, second = own
    stems = {stem for stem, _ in first} & {stem for stem, _ in second}
    several = [[path for stem, path in files if not stems or stem in stems] for files in own]
    if stems and all(len(paths) == 1 for paths in several):
        return tuple(paths[0] for paths in several)
    names = ', '.join(sorted(path.name for paths in several for path in paths))
    if not stems:
        raise ValueError(
            f'{folder} has no two files for {split} whose names differ in the language alone, but '
            f'{names}; give the two that belong together one name.'
        )
    raise ValueError(
        f'{folder} has several files for {split}: {names}. Keep one for each language, and move '
        'the others out of the folder.'
    )


def _read_files(
    found: Mapping[str, tuple[pathlib.Path, ...]], encoding: str
) -> dict[str, datasets.Dataset]:
    form = Pairs(Choice())
    splits = {}
    for split, paths in found.items():
        (texts, lines), (targets, other) = (_lines(path, encoding) for path in paths)
        if odd := sorted(set(lines) ^ set(other)):
            has, lacks = paths if odd[0] in lines else paths[::-1]
            raise ValueError(
                f'{has} has a text on line {odd[0]} and {lacks} none there; each line of the one '
                'must have its own in the other.'
            )
        values = {'text_a': texts, 'label': targets}
        splits[split] = form.build(values, True, columns.at_lines(paths[0], lines))
    return splits


def _lines(path: pathlib.Path, encoding: str) -> tuple[list[str], list[int]]:
    """Return the lines that are not blank, and their numbers."""
    # No line has a line feed in it, so this divides none.
    layout = Layout(encoding, delimiter='\n', header=False, quoting='none')
    table = text_files.open_table(path, layout)
    values, numbers = table.read({'text': table.names[0]})
    kept = [(text, n) for text, n in zip(values['text'], numbers, strict=True) if text.strip()]
    return [text for text, _ in kept], [n for _, n in kept]
