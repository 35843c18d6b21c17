"""Finds the files of a data set in a folder, and says what is there where they are not."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adapters_jax.data import text_files

SPLITS = {
    'train': ('train',),
    'validation': ('validation', 'dev', 'valid', 'val'),
    'test': ('test',),
}
# Beside these, in names such as eng.testa: the splits of CoNLL-2002 and CoNLL-2003.
_OF_CONLL = {'train': (), 'validation': ('testa',), 'test': ('testb',)}


def find_files(
    data: Mapping[str, Any], suffixes: Sequence[str] = text_files.SUFFIXES, within: bool = False
) -> dict[str, pathlib.Path]:
    """The file of each split: those that `data` names, else those that its `dir` holds.

    suffixes: the endings of names that are looked for. within: where there is no file train.*, one
    with that word in its name will do (en_ewt-ud-train.conllu), and so for the other splits.

    Raises FileNotFoundError saying what is there instead, or ValueError where two files would do.
    """
    folder = pathlib.Path(data.get('dir') or '.').expanduser()
    if data.get('dir') and not folder.is_dir():
        raise FileNotFoundError(
            f'data.dir is {str(folder)!r}, which is not a folder; {content(folder.parent)}.'
        )
    named = {s: folder / pathlib.Path(data[s]).expanduser() for s in SPLITS if data.get(s)}
    for split, path in named.items():
        if path.is_dir():
            raise FileNotFoundError(
                f'data.{split}: {path} is a folder; name a file in it, or give it as data.dir '
                f'({content(path)}).'
            )
        file, keys = text_files.file_of(path)
        if not file.is_file():
            raise FileNotFoundError(
                f'data.{split}: there is no file {path}; {content(path.parent)}.'
            )
        if keys and text_files.suffix_of(path) != '.json':
            raise ValueError(
                f'data.{split}: {path} names lists of {file.name}, but only a .json file has such; '
                f'leave out #{"+".join(keys)}.'
            )
    return named or _detect(folder, suffixes, within)


def content(folder: pathlib.Path, most: int = 20) -> str:
    """What a folder holds, as a clause for a message that says where a relative one is."""
    folder = folder.absolute()
    if not folder.is_dir():
        return f'the folder {folder} does not exist'
    names = sorted(path.name for path in folder.iterdir())
    shown = ', '.join(names[:most]) + (', ...' if len(names) > most else '')
    return f'{folder} holds {shown}' if names else f'{folder} is empty'


def _detect(folder: pathlib.Path, suffixes: Sequence[str], within: bool) -> dict[str, pathlib.Path]:
    found = {}
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for split in SPLITS:
        there = [path for path in files if _is_exactly(path, split, suffixes)]
        if within and not there:
            there = [path for path in files if _has_within(path, split, suffixes)]
        # Beside its CoNLL-U files a treebank has its texts under the same names.
        there = [path for path in there if '.conllu' in path.suffixes] or there
        if len(there) > 1:
            raise ValueError(
                f'{folder} has several files for {split}: {", ".join(p.name for p in there)}. Name '
                f'the one to use in data.{split}, and the other splits likewise.'
            )
        if there:
            found[split] = there[0]
    if 'train' not in found:
        raise FileNotFoundError(
            f'data.dir is {str(folder)!r}, which has no train{suffixes[0]} (or another of '
            f'{", ".join(suffixes)}); {content(folder)}. '
            'For a GLUE folder set data.glue too.'
        )
    return found


def _is_exactly(path: pathlib.Path, split: str, suffixes: Sequence[str]) -> bool:
    name = path.name.lower().removesuffix('.gz')
    return any(name == stem + suffix for stem in SPLITS[split] for suffix in suffixes)


def _has_within(path: pathlib.Path, split: str, suffixes: Sequence[str]) -> bool:
    """Whether a split's word stands between the signs and digits of a name, and no other's does."""
    name = path.name.lower().removesuffix('.gz')
    words = set(re.findall('[a-z]+', name))
    meant = {s for s, stems in SPLITS.items() if words & {*stems, *_OF_CONLL[s]}}
    ending = pathlib.PurePath(name).suffix
    return meant == {split} and (ending in suffixes or _is_split(ending[1:]))


def _is_split(word: str) -> bool:
    return any(word in (*SPLITS[split], *_OF_CONLL[split]) for split in SPLITS)
