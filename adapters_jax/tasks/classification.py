"""One of C classes for a text or a pair of texts."""

import dataclasses
from typing import ClassVar, Literal

from adapters_jax.tasks.classifier import Classifier
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.texts import TextTask


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(Classifier, TextTask):
    """Choose one of `labels` for a text; see `Classifier`."""

    name: ClassVar[str] = 'classification'
    label_kind: ClassVar[Literal['class', 'number']] = 'class'
