"""One of C classes for an example: what is learned, and how it is judged and told.

Texts and images differ in where they come from alone; both are classified by this.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float, Float32

from adapters_jax.data.encoded import Encoded
from adapters_jax.lazy import Functions
from adapters_jax.tasks.classes import checked_labels, cross_entropy_sum, ids_of, listed
from adapters_jax.tasks.labelled import LabelledTask
from adapters_jax.tasks.task import Column, Rows

sklearn_metrics = Functions('sklearn.metrics')
Metric = Callable[['Classifier', np.ndarray, np.ndarray], float]
MAX_TABLE = 20  # classes of which a terminal still shows the whole confusion matrix


def _accuracy(task: 'Classifier', labels: np.ndarray, predicted: np.ndarray) -> float:
    return sklearn_metrics.accuracy_score(labels, predicted)


def _matthews(task: 'Classifier', labels: np.ndarray, predicted: np.ndarray) -> float:
    """Matthews' correlation; 0 where either side knows one class only and it is undefined."""
    if len(set(labels)) < 2 or len(set(predicted)) < 2:
        return 0.0
    return sklearn_metrics.matthews_corrcoef(labels, predicted)


def _of_positive(score: Callable[..., float]) -> Metric:
    """Take a score of the positive class against all others; 0 where it is undefined."""

    def metric(task: 'Classifier', labels: np.ndarray, predicted: np.ndarray) -> float:
        positive = task.labels.index(task.positive)
        return score(labels == positive, predicted == positive, zero_division=0.0)

    return metric


def _averaged(score: Callable[..., float], average: str) -> Metric:
    """Average a score over the classes that occur among the labels or the predictions."""

    def metric(task: 'Classifier', labels: np.ndarray, predicted: np.ndarray) -> float:
        return score(labels, predicted, average=average, zero_division=0.0)

    return metric


_SCORES: dict[str, Callable[..., float]] = {
    'f1': sklearn_metrics.f1_score,
    'precision': sklearn_metrics.precision_score,
    'recall': sklearn_metrics.recall_score,
}
METRICS: dict[str, Metric] = {
    'accuracy': _accuracy,
    'matthews': _matthews,
    **{name: _of_positive(score) for name, score in _SCORES.items()},
    **{
        f'{name}_{average}': _averaged(score, average)
        for name, score in _SCORES.items()
        for average in ('macro', 'micro', 'weighted')
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier(LabelledTask):
    """Choose one of `labels`.

    Attributes:
        labels: the names of the classes; the order gives their ids.
        positive: the class that `precision`, `recall` and `f1` are about; with two classes the
            second one unless named here, with more these metrics need it named.

    Raises:
        ValueError: fewer than two classes, a class named twice or not by a text, a positive class
            that is none of them, or a metric that lacks one.
    """

    labels_in: ClassVar[Mapping[str, Column]] = {'label': Column('example', np.int32)}
    smooths: ClassVar[bool] = True
    known_metrics: ClassVar[Mapping[str, Metric]] = METRICS
    default_metrics: ClassVar[tuple[str, ...]] = ('accuracy', 'f1_macro')

    labels: tuple[str, ...]
    positive: str = ''

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(labels=checked_labels(self.labels, self.name))
        if not self.positive and len(self.labels) == 2:
            self._set(positive=self.labels[1])
        if self.positive and self.positive not in self.labels:
            raise ValueError(
                f'the positive class {self.positive!r} is none of {listed(self.labels)}'
            )
        lacking = [metric for metric in self.metric_names if metric in _SCORES]
        if lacking and not self.positive:
            raise ValueError(
                f'{", ".join(lacking)} of {len(self.labels)} classes needs a positive class: set '
                f'`positive`, or use {lacking[0]}_macro'
            )

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return the classes: as given, else those of the training rows."""
        labels = given['labels']
        if train is not None and not labels:
            labels = sorted(set(train['label']))
        return {'labels': tuple(labels), 'positive': given['positive']}

    @property
    def num_outputs(self) -> int:
        """The number of classes."""
        return len(self.labels)

    def label_column(self, values: Sequence[str]) -> np.ndarray:
        """Turn N class names into their ids, int32 [N].

        Raises:
            ValueError: a label that is no class of this task.
        """
        ids = ids_of(values, self.labels)
        return np.asarray([ids[value] for value in values], np.int32)

    def loss(
        self,
        outputs: Float[Array, 'B S C'],
        batch: Mapping[str, Array],
        label_smoothing: float | Float[Array, ''] = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the cross-entropies (nats) of the real examples, and their count.

        Args:
            outputs: logits.
            batch: has `label`, int32 [B, S], and `example_mask`, bool [B, S].
            label_smoothing: share of the target spread evenly over all classes, 0 to 1
                (Szegedy et al. 2016, section 7).

        Raises:
            ValueError: a label smoothing outside 0 to 1.
        """
        return cross_entropy_sum(outputs, batch['label'], batch['example_mask'], label_smoothing)

    def _scores(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        self._check_ids(labels)
        predicted = outputs.argmax(-1)
        return {name: float(METRICS[name](self, labels, predicted)) for name in self.metric_names}

    def _check_ids(self, labels: np.ndarray) -> None:
        wrong = labels[(labels < 0) | (labels >= self.num_outputs)]
        if len(wrong):
            raise ValueError(
                f'labels must be class ids from 0 to {self.num_outputs - 1}, but {len(wrong)} of '
                f'{len(labels)} are not (the first is {wrong[0]}): is the split unlabelled?'
            )

    def _describe(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """Give the class under `prediction` and, as Hugging Face pipelines do, under `label`."""
        names = [self.labels[index] for index in outputs.argmax(-1)]
        return [
            {'prediction': name, 'label': name, 'logits': logits}
            for name, logits in zip(names, outputs.tolist(), strict=True)
        ]

    def details(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, Any]:
        """Return the confusion matrix and what its rows and columns are."""
        confusion = self.confusion(outputs, encoded.examples['label'])
        return {'confusion': confusion, 'labels': list(self.labels)}

    def details_text(self, details: Mapping[str, Any]) -> str:
        """Render the confusion matrix for a terminal."""
        return self.confusion_text(details['confusion'])

    def confusion(self, outputs: np.ndarray, labels: np.ndarray) -> list[list[int]]:
        """Count examples by true class (outer) and predicted class (inner).

        Raises:
            ValueError: labels that are no class ids.
        """
        outputs, labels = self._checked(outputs), np.asarray(labels)
        self._check_ids(labels)
        ids = np.arange(self.num_outputs)
        counts = np.zeros((len(ids), len(ids)), int)
        np.add.at(counts, (labels, outputs.argmax(-1)), 1)
        return counts.tolist()

    def confusion_text(self, confusion: Sequence[Sequence[int]]) -> str:
        """Render a confusion matrix for a terminal; of many classes the commonest errors only."""
        if self.num_outputs > MAX_TABLE:
            return self._commonest_errors(np.asarray(confusion))
        side = max(len(label) for label in (*self.labels, 'true \\ predicted'))
        cells = [[str(count) for count in row] for row in confusion]
        widths = [max(map(len, column)) for column in zip(self.labels, *cells, strict=True)]
        rows = zip(('true \\ predicted', *self.labels), (self.labels, *cells), strict=True)
        return '\n'.join(
            '  '.join([f'{head:<{side}}', *(f'{c:>{w}}' for c, w in zip(row, widths, strict=True))])
            for head, row in rows
        )

    def _commonest_errors(self, confusion: np.ndarray) -> str:
        errors = [
            (int(confusion[true, predicted]), self.labels[true], self.labels[predicted])
            for true, predicted in np.argwhere(confusion)
            if true != predicted
        ]
        errors.sort(key=lambda error: (-error[0], *error[1:]))
        lines = [f'{n:>6}  {true} -> {predicted}' for n, true, predicted in errors[:MAX_TABLE]]
        return '\n'.join([f'{sum(e[0] for e in errors)} errors; true -> predicted', *lines])
