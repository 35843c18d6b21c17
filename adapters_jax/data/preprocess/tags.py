"""Parts of speech: a tag for each word, for adapters whose embedding layer reads tags.

Who tags is not decided here. A tagger is a function from texts, as lists of words, to as many lists
of tags; the one of spaCy is made here, and one that is an adapter of this project is handed in by
whoever may load adapters.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from adapters_jax.data.preprocess.document import Document
from adapters_jax.data.preprocess.step import Step

# Universal Dependencies, version 2 (Nivre et al. 2020, table 2).
UNIVERSAL = (
    *('ADJ', 'ADP', 'ADV', 'AUX', 'CCONJ', 'DET', 'INTJ', 'NOUN', 'NUM', 'PART', 'PRON', 'PROPN'),
    *('PUNCT', 'SCONJ', 'SYM', 'VERB', 'X'),
)

Tagger = Callable[[Sequence[Sequence[str]]], list[list[str]]]

# Components of a spaCy pipeline that no part of speech depends on.
_NOT_NEEDED = ('ner', 'lemmatizer', 'entity_linker', 'textcat')


class LoadedTagger(NamedTuple):
    """A tagger, the tags that it may give beside '' (none), and words that name it and its version.

    Another tagger, or another version, must have another name.
    """

    tag: Tagger
    inventory: tuple[str, ...]
    source: str


LoadTagger = Callable[[str], LoadedTagger]


@dataclasses.dataclass(frozen=True)
class Tags(Step):
    """Gives each word a tag; a word for which the tagger has none gets ''."""

    tagger: LoadedTagger

    @property
    def source(self) -> str:
        """The tagger's name."""
        return self.tagger.source

    @property
    def inventory(self) -> tuple[str, ...]:
        """The tagger's tags."""
        return self.tagger.inventory

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents with tags.

        Raises:
            ValueError: a tagger that gives another number of tags than a text has words, a tag that
                is not in its inventory, or no tag at all.
        """
        words = [document.words for document in documents]
        # A text without words (control characters) is none that a tagger must know how to take.
        found = iter(self.tagger.tag([own for own in words if own]))
        tags = [next(found) if own else [] for own in words]
        for own, given in zip(words, tags, strict=True):
            self._check(own, given)
        if any(words) and not any(tag for given in tags for tag in given):
            raise ValueError(
                f'{self.source} gave no word a part of speech; expected a pipeline with a tagger'
            )
        return [d.tagged(given) for d, given in zip(documents, tags, strict=True)]

    def _check(self, words: Sequence[str], tags: Sequence[str]) -> None:
        if len(words) != len(tags):
            raise ValueError(
                f'{self.source} gave {len(tags)} tags to the {len(words)} words of '
                f'{" ".join(words)[:60]!r}; expected one for each'
            )
        unknown = sorted({*tags} - {'', *self.inventory})
        if unknown:
            raise ValueError(
                f'{self.source} gave the tag {unknown[0]!r}, which is none of '
                f'{", ".join(self.inventory)}'
            )


def create(load_adapter: LoadTagger, spacy: str = '', adapter: str = '') -> Tags:
    """The step with the tagger that is named.

    spacy: a pipeline's name or directory. adapter: the directory of a tagging adapter.
    Raises ValueError where not exactly one of them is given, or it cannot be loaded.
    """
    for name, value in (('spacy', spacy), ('adapter', adapter)):
        if not isinstance(value, str):
            raise ValueError(f'tags: {name}={value!r} is not valid; expected a name or a directory')
    if bool(spacy) == bool(adapter):
        raise ValueError(
            'tags needs one tagger: a spaCy pipeline (tags[spacy=en_core_web_sm]) or a tagging '
            'adapter (tags[adapter=DIR])'
        )
    return Tags(load_spacy(spacy) if spacy else load_adapter(adapter))


@functools.lru_cache(maxsize=4)
def load_spacy(name: str) -> LoadedTagger:
    """The tagger of a spaCy pipeline, which gives universal parts of speech.

    Raises ValueError, with the command that mends it, where spaCy or the pipeline is missing.
    """
    try:
        import spacy
    except ImportError as error:
        raise ValueError(
            f'tags[spacy={name}] needs spaCy, which is not installed: pip install "spacy==3.8.18"'
        ) from error
    try:
        pipeline = spacy.load(name, exclude=_NOT_NEEDED)
    except OSError as error:
        raise ValueError(
            f'spaCy finds no pipeline {name!r}; install it (python -m spacy download {name}), or '
            'give the directory of one'
        ) from error
    meta = pipeline.meta
    source = f'spaCy {meta["lang"]}_{meta["name"]} {meta["version"]}'
    return LoadedTagger(functools.partial(_tag_with, pipeline), UNIVERSAL, source)


def _tag_with(pipeline: Any, texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Tag words as they are; a sign that spaCy calls a space is no word to it."""
    from spacy.tokens import Doc

    documents = (Doc(pipeline.vocab, words=list(words)) for words in texts)
    return [
        ['' if token.pos_ == 'SPACE' else token.pos_ for token in document]
        for document in pipeline.pipe(documents)
    ]
