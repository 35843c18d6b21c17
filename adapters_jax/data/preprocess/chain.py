"""The chain of steps that a config names, as one value: what it does, and what it is.

The steps a text went through are a part of what an adapter is trained on. So a chain describes
itself for the adapter's folder, and one that is made of that description does the same or refuses.
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from adapters_jax import grammar
from adapters_jax.data.preprocess import tags
from adapters_jax.data.preprocess.document import Document
from adapters_jax.data.preprocess.normalise import FORMS, Lower, Normalise
from adapters_jax.data.preprocess.step import Step
from adapters_jax.data.preprocess.stop_words import StopWords

FORMAT = 1  # raised whenever the same steps would make other texts of the same ones

STEPS: dict[str, Callable[..., Step]] = {
    **{form.lower(): functools.partial(Normalise, form) for form in FORMS},
    'lower': Lower,
    'stop_words': StopWords,
}
_TAGS = 'tags'


class Stage(NamedTuple):
    """The texts after a step, and how many of them it would have left empty."""

    name: str
    documents: list[Document]
    emptied: int


@dataclasses.dataclass(frozen=True)
class Chain:
    """Steps in their order, each with the text that names it; none change nothing.

    Raises ValueError where more than one of them tags.
    """

    names: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        tagging = [name for name, step in self if step.inventory]
        if len(tagging) > 1:
            raise ValueError(f'{" and ".join(tagging)} both tag the words; keep one of them')

    def __iter__(self) -> Iterator[tuple[str, Step]]:
        return zip(self.names, self.steps, strict=True)

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def inventory(self) -> tuple[str, ...]:
        """The tags that words may get, in the order of their ids from 1; empty without tags."""
        return next((step.inventory for step in self.steps if step.inventory), ())

    @property
    def num_tags(self) -> int:
        """How many ids of tags there are, that of no tag (0) included; 0 without tags."""
        return len(self.inventory) + 1 if self.inventory else 0

    def stages(self, texts: Sequence[str]) -> Iterator[Stage]:
        """What the texts are after each step.

        A text of whose letters and digits nothing would be left stays as it was before the step:
        an example must say something, and there must be as many as before.
        """
        documents = [Document(text) for text in texts]
        for name, step in self:
            changed = step(documents)
            emptied = [_is_empty(new, old) for new, old in zip(changed, documents, strict=True)]
            documents = [
                old if empty else new
                for old, new, empty in zip(documents, changed, emptied, strict=True)
            ]
            yield Stage(name, documents, sum(emptied))

    def run(self, texts: Sequence[str]) -> tuple[list[Document], int]:
        """The texts after the last step, and how often a step would have left one empty."""
        documents, emptied = [Document(text) for text in texts], 0
        for stage in self.stages(texts):
            documents, emptied = stage.documents, emptied + stage.emptied
        return documents, emptied

    def to_json(self) -> list[dict[str, Any]]:
        """Each step's name, and what it takes from elsewhere, as JSON values."""
        return [_describe(name, step) for name, step in self]

    @property
    def identity(self) -> str:
        """A text that two chains share only if they do the same."""
        return json.dumps([FORMAT, self.to_json()])


def _is_empty(new: Document, old: Document) -> bool:
    return not any(map(str.isalnum, new.text)) and any(map(str.isalnum, old.text))


def _describe(name: str, step: Step) -> dict[str, Any]:
    found = {'step': name, 'source': step.source, 'tags': list(step.inventory)}
    return {key: value for key, value in found.items() if value}


def create(names: Iterable[str], load_adapter: tags.LoadTagger) -> Chain:
    """The chain of these steps, each written `name` or `name[option=value,...]`.

    load_adapter: what makes a tagger of the directory of a tagging adapter.
    Raises ValueError for an unknown step or option, listing those there are, or an invalid value.
    """
    given = tuple(name.strip() for name in names)
    return Chain(given, tuple(_step(name, load_adapter) for name in given))


def _step(text: str, load_adapter: tags.LoadTagger) -> Step:
    name, options = grammar.parse_one(text, what='step of data.preprocess')
    known = STEPS | {_TAGS: functools.partial(tags.create, load_adapter)}
    if name not in known:
        raise ValueError(
            f'unknown step {name!r} in data.preprocess; known: {", ".join(sorted(known))}'
        )
    allowed = list(inspect.signature(known[name]).parameters)
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise ValueError(
            f'{name} has no option {unknown[0]!r}; known: {", ".join(allowed) or "none"}'
        )
    return known[name](**options)


def from_json(values: Iterable[Mapping[str, Any]], load_adapter: tags.LoadTagger) -> Chain:
    """The chain that `to_json` described.

    Raises:
        ValueError: a step that takes something else from elsewhere than it did then.
    """
    described = [dict(value) for value in values]
    chain = create([str(value.get('step', '')) for value in described], load_adapter)
    for then, now in zip(described, chain.to_json(), strict=True):
        if then != now:
            raise ValueError(
                f'the adapter was trained on texts after the step {then["step"]} with '
                f'{then.get("source", "nothing")!r}, but here it works with '
                f'{now.get("source", "nothing")!r}; install the version that it was trained with'
            )
    return chain
