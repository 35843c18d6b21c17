"""What the training loop, evaluation and prediction need to know of a task, whatever its kind.

A task is a small immutable value: it turns labels into numbers, outputs of the head into a loss,
into metrics and into predictions, and writes itself into the folder of an adapter. It holds no
arrays, so it may be a static argument of a jitted function.
"""

import abc
import dataclasses
import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import datasets
import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from adapters_jax.data.batches import Batch
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.preprocess.chain import Chain
from adapters_jax.data.tokenize import NO_STEPS, Tokenizer
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.heads import TOKENS, HeadConfig

Rows = datasets.Dataset  # a split as people know it; each row may be several examples, or a part
Objects = Sequence[dict[str, Any]]


class Column(NamedTuple):
    """A column of labels in a batch: one for each example [B, S], or for each token [B, T].

    `empty` is the label of what has none. A `wide` column has a label for each output, [..., C].
    """

    per: Literal['example', 'token']
    dtype: Any
    empty: int = 0
    wide: bool = False


class Encoding(NamedTuple):
    """How rows become tokens: by which tokenizer, of which length, and where they are kept.

    The tokenizer is None where the backbone reads no tokens; `positions` is how many the model can
    take; `cache_dir` may be None; `chain` are the steps that texts go through before.
    """

    tokenizer: Tokenizer | None
    max_length: int
    positions: int | None = None
    cache_dir: str | os.PathLike | None = None
    chain: Chain = NO_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A kind of task with its settings.

    Attributes:
        metric_names: the metrics to report; empty means the kind's default ones.
        primary: the metric that chooses the best checkpoint; empty means the first one reported.

    Raises:
        ValueError: an unknown metric, one named twice, or a primary metric that is not reported.
    """

    name: ClassVar[str]
    # Whether the head gives outputs for each token, instead of each example.
    per_token: ClassVar[bool] = False
    several_texts: ClassVar[bool] = False  # whether an example is several texts, which share a row
    reads: ClassVar[str] = 'input_ids'  # the column of a batch that the backbone reads
    draws: ClassVar[bool] = False  # whether `transform` makes other batches of it in each epoch
    smooths: ClassVar[bool] = False  # whether label smoothing has a meaning
    writes: ClassVar[bool] = False  # whether outputs are texts that a decoder writes
    # Whether texts may go through `data.preprocess`: not where labels are of their words.
    takes_steps: ClassVar[bool] = False
    labels_in: ClassVar[Mapping[str, Column]]  # the columns of labels by name
    known_metrics: ClassVar[Collection[str]]
    default_metrics: ClassVar[tuple[str, ...]]
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    metric_names: tuple[str, ...] = ()
    primary: str = ''

    @property
    def generates(self) -> bool:
        """Whether an evaluation has to write texts."""
        return False

    def __post_init__(self) -> None:
        names = tuple(self.metric_names) or self.default_metrics
        for metric in names:
            if metric not in self.known_metrics:
                raise ValueError(
                    f'unknown metric {metric!r} for {self.name}; '
                    f'known: {", ".join(sorted(self.known_metrics))}'
                )
        if len(set(names)) < len(names):
            raise ValueError(f'each metric may be named once, not {", ".join(names)}')
        if self.primary and self.primary not in names:
            raise ValueError(
                f'the primary metric {self.primary!r} is not among those reported '
                f'({", ".join(names)}): add it to them'
            )
        self._set(metric_names=names, primary=self.primary or names[0])

    def _set(self, **fields: Any) -> None:
        """Replace fields by their normal forms, which only construction may do."""
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @property
    @abc.abstractmethod
    def num_outputs(self) -> int:
        """Numbers that the head gives for one example (C)."""

    @classmethod
    @abc.abstractmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names, in the kind's normal form.

        Raises:
            ValueError, FileNotFoundError: with one sentence on what to change.
        """

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return the fields that the config's section `task`, or the training rows, decide.

        `train` is None where a run is only described (`adapters_jax.compile`).
        """
        return {}

    def fitted(self, config: BackboneConfig, directory: Path | None) -> Self:
        """Return the task for a backbone.

        `directory` is its folder, or None where a run is only described.
        """
        return self

    @property
    def layout(self) -> Hashable:
        """What tasks must have in common for their examples to share a batch."""
        return self.reads, self.per_token, self.several_texts

    def predicting(self) -> Self:
        """Return the task as it predicts for inputs, where that is another one than evaluating."""
        return self

    @abc.abstractmethod
    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Turn rows into tokens and, where they have labels, into the columns of `labels_in`.

        Raises:
            ValueError: a label that the task cannot stand for, or a row that no length fits.
        """

    @abc.abstractmethod
    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the rows to predict for of JSON objects with the task's fields.

        `lines` are the objects' numbers in their file; `pair` is whether an adapter takes two
        texts, where that is known.

        Raises:
            ValueError: an object without a field, or with a value that is none; its line is named.
        """

    @abc.abstractmethod
    def loss(
        self,
        outputs: Float[Array, 'B S C'],
        batch: Mapping[str, Array],
        label_smoothing: float = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the losses of the batch's real examples, and the count of losses."""

    @abc.abstractmethod
    def _score(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        """Compute the reported metrics of finite outputs; see `score`."""

    @abc.abstractmethod
    def _predict(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[dict[str, Any]]:
        """Return what is predicted for each row by finite outputs; see `predict`."""

    @abc.abstractmethod
    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a file of predictions repeats of a row: texts, and the label as `gold`."""

    def head(self, config: HeadConfig) -> HeadConfig:
        """Return the head that a config asks for as this task needs it."""
        return dataclasses.replace(config, pooling=TOKENS) if self.per_token else config

    def tuned(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> 'Task':
        """Return the task with what its settings leave to the outputs of the validation split."""
        return self

    def worded(
        self, predicted: list[dict[str, Any]], rows: Rows, tokenizer: Tokenizer
    ) -> list[dict[str, Any]]:
        """Return what `predict` found with words in place of their numbers."""
        return predicted

    def details(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, Any]:
        """Return what an evaluation reports besides the metrics, as JSON-able values."""
        return {}

    def details_text(self, details: Mapping[str, Any]) -> str:
        """Render details for a terminal."""
        return ''

    def native_files(self, rows: Rows, predicted: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Return predictions in the field's own formats: texts of files by their suffixes."""
        return {}

    def is_labelled(self, encoded: Encoded) -> bool:
        """Whether a split has labels."""
        known = encoded.examples.keys() | encoded.tokens.keys() | encoded.target.keys()
        return self.labels_in.keys() <= known

    def transform(self, batch: Batch, seed: int = 0, epoch: int | None = None) -> Batch:
        """Return a batch of host arrays as the model is to see it.

        It depends on nothing else than the arguments; epoch None is that of every evaluation.
        """
        return batch

    def width(self, encoded: Encoded) -> int:
        """Return how many numbers there are for an example (or token) of a split: see `reduced`."""
        return self.num_outputs

    def reduced(self, outputs: Float[Array, 'B S C'], batch: Mapping[str, Array]) -> Array:
        """Return what metrics and predictions need of a batch's outputs, [B, S, W] or [B, T, W].

        It is computed on the device, so that nothing large leaves it.
        """
        return outputs

    def batch_shapes(self, rows: int, length: int, texts: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of what a batch of the task has beside texts: its labels.

        It has `rows` rows of `length` tokens with `texts` examples each.
        """
        return {
            name: jax.ShapeDtypeStruct(
                (rows, texts if column.per == 'example' else length)
                + (self.num_outputs,) * column.wide,
                column.dtype,
            )
            for name, column in self.labels_in.items()
        }

    def parts(self, outputs: Any, batch: Any, label_smoothing: Any = 0.0) -> dict[str, Any]:
        """Return each task's loss and count, where there are several; see `Mixture.parts`."""
        return {}

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger primary metric is the better one."""
        return self.primary not in self.lower_is_better

    def is_better(self, new: float, best: float | None) -> bool:
        """Whether `new` beats the best primary metric so far (None: none yet); NaN never does."""
        if math.isnan(new):
            return False
        if best is None or math.isnan(best):
            return True
        return new > best if self.higher_is_better else new < best

    def score(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        """Compute the reported metrics once, over all outputs of a split.

        Every metric is NaN where an output is not finite: the model has diverged, and one member
        of a population may do so without ending the others.

        Args:
            outputs: what `reduced` returned: [N, W] for the N examples of `encoded`, or [L, W] for
                all their L tokens; W is `width`, which for most kinds is C.
            encoded: the split as `encode` made it.
            rows: the same as people know it.

        Raises:
            ValueError: no labelled examples, or shapes that do not fit.
        """
        outputs = self._checked(outputs, self._count(encoded), self.width(encoded))
        if not len(encoded) or not self.is_labelled(encoded):
            raise ValueError('metrics need at least one labelled example, but the split has none')
        return self._finite_or_nan(outputs, lambda: self._score(outputs, encoded, rows))

    def predict(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[dict[str, Any]]:
        """Return one JSON-able object for each row, with the key `prediction`; see `score`.

        Raises:
            ValueError: a shape that does not fit, or outputs that are not finite.
        """
        given = self._checked(outputs, self._count(encoded), self.width(encoded))
        outputs = self._finite(given)
        return self._predict(outputs, encoded, rows)

    def _count(self, encoded: Encoded) -> int:
        """Return how many vectors of outputs there are for a split."""
        return int(encoded.offsets[-1]) if self.per_token else len(encoded)

    def _checked(self, outputs: np.ndarray, count: int | None = None, width: int = 0) -> np.ndarray:
        width = width or self.num_outputs
        outputs, wanted = np.asarray(outputs), ['N' if count is None else count, width]
        right = outputs.ndim == 2 and outputs.shape[1] == width
        if not right or count not in (None, len(outputs)):
            shown = ', '.join(map(str, wanted))
            raise ValueError(f'outputs must have the shape [{shown}], not {list(outputs.shape)}')
        return outputs

    def _finite_or_nan(
        self, outputs: np.ndarray, scores: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        if not np.isfinite(outputs).all():
            return dict.fromkeys(self.metric_names, math.nan)
        return scores()

    def _finite(self, outputs: np.ndarray) -> np.ndarray:
        bad = np.flatnonzero(~np.isfinite(outputs).all(-1))
        if len(bad):
            what = 'tokens' if self.per_token else 'examples'
            raise ValueError(
                f'the model gives outputs that are not finite for {len(bad)} of {len(outputs)} '
                f'{what} (the first is number {bad[0]}): its training has diverged'
            )
        return outputs

    def to_json(self) -> dict[str, Any]:
        """Return the kind and every field as JSON-able values; `from_json` turns it back."""
        kept = [field for field in dataclasses.fields(self) if field.metadata.get('kept', True)]
        fields = {field.name: getattr(self, field.name) for field in kept}
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}
        return {'name': self.name, **plain}

    @classmethod
    def from_fields(cls, **fields: Any) -> Self:
        """Construct the task from named fields.

        Raises:
            ValueError: an unknown or a missing field.
        """
        known = dataclasses.fields(cls)
        unknown = sorted(fields.keys() - {field.name for field in known})
        if unknown:
            raise ValueError(
                f'{cls.name} has no setting {", ".join(map(repr, unknown))}; '
                f'known: {", ".join(field.name for field in known)}'
            )
        for field in known:
            if field.default is dataclasses.MISSING and field.name not in fields:
                raise ValueError(f'{cls.name} needs the setting {field.name!r}')
        return cls(**fields)
