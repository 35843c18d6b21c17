"""A spaCy pipeline that knows a few words: what tests tag with, since none can be downloaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import spacy


def write(folder: Path, known: Mapping[str, Sequence[str]], version: str = '1.2') -> str:
    """Write a pipeline that gives the words their tag, {tag: words}, and others none."""
    made = spacy.blank('en')
    rules = made.add_pipe('attribute_ruler')
    for tag, words in known.items():
        rules.add([[{'LOWER': word}] for word in words], {'POS': tag})
    made.meta['name'], made.meta['version'] = 'few_words', version
    made.to_disk(folder)
    return str(folder)
