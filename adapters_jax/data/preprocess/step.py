"""What a step of the chain is: a value, and a pure function of texts."""

import abc
from collections.abc import Sequence
from typing import ClassVar

from adapters_jax.data.preprocess.document import Document


class Step(abc.ABC):
    """A step with its options: a frozen dataclass, checked on construction.

    source: what the step's result depends on beside its options (a list of words, a model), in
        words that differ whenever the results may. inventory: the tags that the step gives.
    """

    source: str = ''
    inventory: tuple[str, ...] = ()

    @abc.abstractmethod
    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents after the step, in their order."""


class TextStep(Step):
    """A step that looks at one text at a time."""

    source: ClassVar[str] = ''

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        """Return the documents after the step, in their order."""
        return [self.apply(document) for document in documents]

    @abc.abstractmethod
    def apply(self, document: Document) -> Document:
        """Return one document after the step."""
