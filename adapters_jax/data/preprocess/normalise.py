"""Letters: one form for what looks or means the same.

What this is good for depends on the backbone. A tokenizer of lower-cased text folds case by itself;
one that tells case apart has other pieces for 'Aspen' and 'aspen', and ligatures, wide letters and
combining marks are unknown to most.
"""

import dataclasses
import unicodedata

from adapters_jax.data.preprocess.document import Document
from adapters_jax.data.preprocess.step import TextStep

FORMS = ('NFC', 'NFD', 'NFKC', 'NFKD')


@dataclasses.dataclass(frozen=True)
class Normalise(TextStep):
    """A normal form of Unicode (Unicode Standard Annex 15); doing it twice changes nothing more.

    Raises ValueError for a form that there is not.
    """

    form: str

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f'the normal form is {self.form!r}; expected one of {FORMS}')

    def apply(self, document: Document) -> Document:
        """The text in the normal form."""
        return document.mapped(lambda text: unicodedata.normalize(self.form, text))


@dataclasses.dataclass(frozen=True)
class Lower(TextStep):
    """Small letters for capital ones."""

    def apply(self, document: Document) -> Document:
        """The text in small letters."""
        return document.mapped(str.lower)
