"""A domain of its own: what a web framework says to its users, in English and in other languages.

The strings are those of Django's translations (BSD licence), which its wheel on the package index
carries as .po files.
"""

import csv
import hashlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import polib

from adapters_jax import wheels

PIN = ('Django', '5.2.8', '37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f')
_SHARES = (('test', 0.2), ('validation', 0.3), ('train', 1.0))  # up to which a string's hash lies
_ODD = re.compile(r'[<>{}\n]|%(?!\()')  # markup, and strings in which order matters


def write(folder: Path, language: str) -> dict[str, int]:
    """Write train.tsv, validation.tsv and test.tsv of source and target; return their sizes.

    A string's split follows from its own letters, whatever version or language it is of.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[tuple[str, str]]] = {name: [] for name, _ in _SHARES}
    for source, target in sorted(set(_strings(language))):
        splits[_split_of(source)].append((source, target))
    for name, rows in splits.items():
        with (folder / f'{name}.tsv').open('w', encoding='utf-8', newline='') as file:
            lines = csv.writer(file, delimiter='\t', quoting=csv.QUOTE_NONE, quotechar=None)
            lines.writerows([('source', 'target'), *rows])
    return {name: len(rows) for name, rows in splits.items()}


def _strings(language: str) -> Iterator[tuple[str, str]]:
    """Yield the strings that have been translated, of one line, without markup."""
    with zipfile.ZipFile(wheels.fetch(*PIN)) as wheel:
        names = [n for n in wheel.namelist() if re.search(rf'/{language}/LC_MESSAGES/.*\.po$', n)]
        for name in names:
            for entry in polib.pofile(wheel.read(name).decode('utf-8')):
                pair = entry.msgid.strip(), entry.msgstr.strip()
                fine = entry.translated() and not entry.obsolete and all(pair)
                if fine and not any(_ODD.search(text) or '\t' in text for text in pair):
                    yield pair


def _split_of(text: str) -> str:
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name, limit in _SHARES if share < limit)
