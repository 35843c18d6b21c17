"""Finds the files of a data set in a folder, and says what is there where they are not."""

import pathlib
from collections.abc import Mapping
from typing import Any

from adapters_jax.data import text_files

SPLITS = {
    'train': ('train',),
    'validation': ('validation', 'dev', 'valid', 'val'),
    'test': ('test',),
}


def find_files(data: Mapping[str, Any]) -> dict[str, pathlib.Path]:
    """The file of each split: those that `data` names, else those that its `dir` holds.

    Raises FileNotFoundError saying what is there instead, or ValueError where two files would do.
    """
    folder = pathlib.Path(data.get('dir') or '.').expanduser()
    if data.get('dir') and not folder.is_dir():
        raise FileNotFoundError(
            f'data.dir is {str(folder)!r}, which is not a folder; {content(folder.parent)}.'
        )
    named = {s: folder / pathlib.Path(data[s]).expanduser() for s in SPLITS if data.get(s)}
    for split, path in named.items():
        if not path.is_file():
            raise FileNotFoundError(
                f'data.{split}: there is no file {path}; {content(path.parent)}.'
            )
    return named or _detect(folder)


def content(folder: pathlib.Path, most: int = 20) -> str:
    """What a folder holds, as a clause for a message."""
    if not folder.is_dir():
        return f'the folder {folder} does not exist'
    names = sorted(path.name for path in folder.iterdir())
    shown = ', '.join(names[:most]) + (', ...' if len(names) > most else '')
    return f'{folder} holds {shown}' if names else f'{folder} is empty'


def _detect(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    found = {}
    endings = [end + packed for end in text_files.SUFFIXES for packed in ('', '.gz')]
    for split, stems in SPLITS.items():
        names = {stem + ending for stem in stems for ending in endings}
        there = sorted(path for path in folder.iterdir() if path.name.lower() in names)
        if len(there) > 1:
            raise ValueError(
                f'{folder} has several files for {split}: {", ".join(p.name for p in there)}. Name '
                f'the one to use in data.{split}, and the other splits likewise.'
            )
        if there:
            found[split] = there[0]
    if 'train' not in found:
        raise FileNotFoundError(
            f'data.dir is {str(folder)!r}, which has no train.csv (or another of '
            f'{", ".join(text_files.SUFFIXES)}); {content(folder)}. '
            'For a GLUE folder set data.glue too.'
        )
    return found
