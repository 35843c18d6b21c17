"""`load`: recordings and what is said in them, in one form, whatever the source.

The result has one `datasets.Dataset` a split with the columns `audio` (an object of the file's
`path` and, of hub data sets, its `bytes`) and `target` (the words; absent where a split has none).
Sources are those of `sources.py`, without `glue`, with the columns `data.columns.text_a` (the
audio) and `data.columns.label` (the words). Paths in a table are relative to `data.dir` or, where
that is not set, to the folder of `data.train`.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import datasets
import numpy as np
from jaxtyping import Int64

from adapters_jax.data import audio, columns, folders, sources
from adapters_jax.data.columns import Choice, check_encodable, named
from adapters_jax.data.forms import Place

USUAL = {
    'text_a': ('audio', 'path', 'file', 'file_name', 'filename', 'audio_path', 'wav', 'sound'),
    'label': ('text', 'sentence', 'transcript', 'transcription', 'target', 'label'),
}
FEATURE = {'path': datasets.Value('string'), 'bytes': datasets.Value('binary')}


@dataclasses.dataclass(frozen=True)
class Recordings:
    """The form of such rows; `folder` is where relative paths begin."""

    kind: ClassVar[str] = 'text'
    names_classes: ClassVar[bool] = False
    whole_lines: ClassVar[bool] = False

    choice: Choice
    folder: pathlib.Path

    def header_in(self, cells: Sequence[str]) -> bool:
        """Whether a file's first line names its columns."""
        return self.choice.named_in(cells, (name for own in USUAL.values() for name in own))

    def choose(self, names: Sequence[str], labelled: bool, where: str) -> dict[str, str]:
        """Find the two columns; see `Form.choose`."""
        found = {}
        for key, needed in (('text_a', True), ('label', labelled)):
            own = self._candidates(key, names)
            if len(own) == 1:
                found[key] = own[0]
            elif needed:
                few = f'several columns ({columns.shown(own)}) may be' if own else 'no column is'
                raise ValueError(
                    f'{where}: {few} {"the audio" if key == "text_a" else "what is said"}; set '
                    f'data.columns.{key} to one of {columns.shown(names)}.'
                )
        return found

    def _candidates(self, key: str, names: Sequence[str]) -> list[str]:
        given = self.choice.given.get(key)
        if given is not None:
            own = named(names, given)
            return [] if own is None else [own]
        return [name for name in names if name.casefold() in USUAL[key]]

    def build(
        self, values: Mapping[str, Sequence[Any]], labelled: bool, place: Place
    ) -> datasets.Dataset:
        """Check that every recording is there, and that each row has words or none has."""
        found = [self._audio(one, place, row) for row, one in enumerate(values['text_a'])]
        features: dict[str, Any] = {'audio': FEATURE}
        rows: dict[str, list[Any]] = {'audio': found}
        words = values.get('label', ())
        if labelled or any(words):
            for row, text in enumerate(words):
                if not isinstance(text, str) or not text.strip():
                    raise ValueError(f'{place(row)}: {text!r} stands where what is said must.')
                check_encodable(text, f'{place(row)}: what is said')
            rows['target'] = [' '.join(text.split()) for text in words]
            features['target'] = datasets.Value('string')
        return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

    def _audio(self, given: Any, place: Place, row: int) -> dict[str, Any]:
        if isinstance(given, Mapping) and given.get('bytes') is not None:
            return {'path': given.get('path') or place(row), 'bytes': given['bytes']}
        path = given.get('path') if isinstance(given, Mapping) else given
        if not isinstance(path, str) or not path.strip():
            raise ValueError(f'{place(row)}: {given!r} stands where the path of a sound file must.')
        file = self.folder / pathlib.Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f'{place(row)}: there is no file {file}; {folders.content(file.parent, 5)}.'
            )
        return {'path': str(file), 'bytes': None}


def load(data: Mapping[str, Any]) -> dict[str, datasets.Dataset]:
    """Read the splits that `data` describes.

    Raises:
        ValueError, FileNotFoundError: with one sentence on what to change.
    """
    remedy = 'data.dir, data.train or data.name to recordings and what is said in them'
    sources.refuse_glue(data, 'no recordings', remedy)
    table = pathlib.Path(data.get('train') or '').expanduser()
    folder = pathlib.Path(data.get('dir') or table.parent).expanduser()
    form = Recordings(Choice(**(data.get('columns') or {})), folder)
    if sources.source_of(data) == 'hub':
        found = sources.from_hub(data, functools.partial(_hub_split, form))
        return sources.finish(found, data, same_recording)
    return sources.read(data, form, same_recording)


def same_recording(rows: datasets.Dataset) -> Int64[np.ndarray, ' N']:
    """A number for each row: rows of one file, or of the same bytes, share it.

    The same words may be on both sides of a cut: others say them, or say them anew.
    """
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in _names(rows['audio'][:])])


def _names(recordings: Sequence[audio.Recording]) -> list[str]:
    """A name for each recording; those of the same bytes have the same one."""
    paths = [None if r['bytes'] is not None else pathlib.Path(r['path']) for r in recordings]
    files = {path: path.resolve() for path in dict.fromkeys(paths) if path}
    sizes = Counter(file.stat().st_size for file in set(files.values()))

    @functools.cache
    def of_file(file: pathlib.Path) -> str:
        # What is as long as no other one need not be read.
        return str(file) if sizes[file.stat().st_size] == 1 else _digest(file.read_bytes())

    pairs = zip(recordings, paths, strict=True)
    return [of_file(files[path]) if path else _digest(given['bytes']) for given, path in pairs]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hub_split(
    form: Recordings, rows: datasets.Dataset, labelled: bool, where: str
) -> datasets.Dataset:
    typed = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Audio)]
    if len(typed) == 1 and 'text_a' not in form.choice.given:
        # Beside it many sets have a column of the files' names.
        form = dataclasses.replace(form, choice=dataclasses.replace(form.choice, text_a=typed[0]))
    chosen = form.choose(rows.column_names, labelled, where)
    if isinstance(rows.features[chosen['text_a']], datasets.Audio):
        rows = rows.cast_column(chosen['text_a'], datasets.Audio(decode=False))
    values = {key: rows[name][:] for key, name in chosen.items()}
    return form.build(values, labelled, functools.partial('{}, row {}'.format, where))
