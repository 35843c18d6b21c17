"""Stop words: what every text has, and what therefore tells none from another. Or so one thinks.

For questions it is wrong: 'who', 'where' and 'how many' are all that tells what is asked for.
`experiments/preprocessing.py` measures it.
"""

import dataclasses
import functools
import hashlib

import stop_words

from adapters_jax.data.preprocess.document import Document
from adapters_jax.data.preprocess.step import TextStep


@dataclasses.dataclass(frozen=True)
class StopWords(TextStep):
    """Takes away the words in the list of a language, whatever their case, with their tags.

    language: a name or code of the library `stop-words` ('english', 'en'), or several. Its entries
    of several words are not looked for, and a script without spaces between words has few words
    that could be in a list. Raises ValueError, listing the languages, for one that there is not.
    """

    language: str | tuple[str, ...] = 'en'

    def __post_init__(self) -> None:
        several = isinstance(self.language, list | tuple)
        names = tuple(self.language) if several else (self.language,)
        object.__setattr__(self, 'language', names)
        known = stop_words.LANGUAGE_MAPPING
        for name in names:
            if name not in (*known, *known.values()):
                listed = ', '.join(f'{code} ({full})' for code, full in sorted(known.items()))
                raise ValueError(f'stop_words has no language {name!r}; known: {listed}')

    @functools.cached_property
    def words(self) -> frozenset[str]:
        """The list, as `fold` writes words."""
        # Some lists have a byte order mark or quotes in them.
        entries = (w for name in self.language for w in stop_words.get_stop_words(name))
        return frozenset(fold(entry.strip('\ufeff",')) for entry in entries) - {''}

    @functools.cached_property
    def source(self) -> str:
        """How long the list is, and a name of its content."""
        digest = hashlib.sha256('\n'.join(sorted(self.words)).encode()).hexdigest()
        return f'{len(self.words)} stop words, {digest[:12]}'

    def apply(self, document: Document) -> Document:
        """The text without stop words."""
        keep = [fold(word) not in self.words for word in document.words]
        return document if all(keep) else document.filtered(keep)


def fold(word: str) -> str:
    """A word as lists are searched for it: without case, with the apostrophe of typewriters."""
    return word.casefold().replace('’', "'")
