"""Any number of C classes, also none, for a text or a pair of texts.

Each class is a question of its own with the answers yes and no, so its output is a logit against
zero, and a prediction is every class whose probability reaches a threshold.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from adapters_jax.lazy import Functions
from adapters_jax.tasks.classes import checked_labels, ids_of
from adapters_jax.tasks.losses import check_smoothing, masked_sum
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.task import Column, Rows
from adapters_jax.tasks.texts import TextTask

sklearn_metrics, special = Functions('sklearn.metrics'), Functions('scipy.special')
# Of labels and predictions, bool [N, C], and the logits, float [N, C].
Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def _averaged(score: Callable[..., float], average: str) -> Metric:
    """Average a score over classes or examples, or pool these; 0 where it is undefined."""

    def metric(labels: np.ndarray, predicted: np.ndarray, outputs: np.ndarray) -> float:
        return score(labels, predicted, average=average, zero_division=0.0)

    return metric


def _average_precision(labels: np.ndarray, predicted: np.ndarray, outputs: np.ndarray) -> float:
    """Average it over the classes that some example has; 0 where there is none."""
    there = labels.any(0)
    if not there.any():
        return 0.0
    return sklearn_metrics.average_precision_score(labels[:, there], outputs[:, there])


def _average_precision_micro(
    labels: np.ndarray, predicted: np.ndarray, outputs: np.ndarray
) -> float:
    """Rank all classes of all examples together; 0 where no example has one."""
    if not labels.any():
        return 0.0
    return sklearn_metrics.average_precision_score(labels, outputs, average='micro')


_SCORES: dict[str, Callable[..., float]] = {
    'f1': sklearn_metrics.f1_score,
    'precision': sklearn_metrics.precision_score,
    'recall': sklearn_metrics.recall_score,
}
METRICS: dict[str, Metric] = {
    **{
        f'{name}_{average}': _averaged(score, average)
        for name, score in _SCORES.items()
        for average in ('micro', 'macro', 'weighted', 'samples')
    },
    'subset_accuracy': lambda labels, predicted, _: sklearn_metrics.accuracy_score(
        labels, predicted
    ),
    'hamming_loss': lambda labels, predicted, _: sklearn_metrics.hamming_loss(labels, predicted),
    'average_precision': _average_precision,
    'average_precision_micro': _average_precision_micro,
}


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiLabel(TextTask):
    """Choose any of `labels`.

    Attributes:
        labels: the names of the classes; the order gives their ids.
        threshold: the least probability of a class that is predicted.

    Raises:
        ValueError: fewer than two classes, a class named twice or not by a text, or a threshold
            that no probability reaches or none misses.
    """

    name: ClassVar[str] = 'multi_label'
    label_kind: ClassVar[Literal['class', 'number', 'classes']] = 'classes'
    labels_in: ClassVar[Mapping[str, Column]] = {'label': Column('example', np.bool_, wide=True)}
    smooths: ClassVar[bool] = True
    known_metrics: ClassVar[Mapping[str, Metric]] = METRICS
    default_metrics: ClassVar[tuple[str, ...]] = (
        *('f1_micro', 'f1_macro', 'precision_micro', 'recall_micro'),
        *('subset_accuracy', 'hamming_loss', 'average_precision'),
    )
    lower_is_better: ClassVar[frozenset[str]] = frozenset({'hamming_loss'})

    labels: tuple[str, ...]
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(labels=checked_labels(self.labels, self.name))
        if not isinstance(self.threshold, int | float) or not 0 < self.threshold < 1:
            raise ValueError(
                f'the threshold of {self.name} is {self.threshold!r}; expected a probability '
                'between 0 and 1'
            )

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return the classes, as given or else those of the training rows, and the threshold."""
        labels = given['labels']
        if train is not None and not labels:
            labels = sorted({name for names in train['label'] for name in names})
        return {'labels': tuple(labels), 'threshold': given['label_threshold']}

    @property
    def num_outputs(self) -> int:
        """The number of classes."""
        return len(self.labels)

    def label_column(self, values: Sequence[Sequence[str]]) -> Bool[np.ndarray, 'N C']:
        """Turn N sets of class names into one bool for each class, [N, C].

        Raises:
            ValueError: a label that is no class of this task.
        """
        ids = ids_of((name for names in values for name in names), self.labels)
        column = np.zeros((len(values), len(self.labels)), np.bool_)
        for row, names in zip(column, values, strict=True):
            row[[ids[name] for name in names]] = True
        return column

    def loss(
        self,
        outputs: Float[Array, 'B S C'],
        batch: Mapping[str, Array],
        label_smoothing: float | Float[Array, ''] = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the binary cross-entropies (nats), and the count of real examples.

        An example's loss is the sum over its C classes, so that the step's is a mean over examples
        of sums over classes, as that of `classification` is.

        Args:
            outputs: logits.
            batch: has `label`, bool [B, S, C], and `example_mask`, bool [B, S].
            label_smoothing: share of each target that is moved to 1/2, 0 to 1.

        Raises:
            ValueError: a label smoothing outside 0 to 1.
        """
        check_smoothing(label_smoothing)

        def cross_entropy(
            logits: Float32[Array, 'B S C'], labels: Bool[Array, 'B S C']
        ) -> Float32[Array, 'B S']:
            target = labels.astype(jnp.float32) * (1 - label_smoothing) + label_smoothing / 2
            return (jax.nn.softplus(logits) - target * logits).sum(-1)

        return masked_sum(cross_entropy, outputs, batch['label'], batch['example_mask'])

    def _probabilities(self, outputs: np.ndarray) -> np.ndarray:
        return special.expit(outputs.astype(np.float64))

    def _scores(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        predicted = self._probabilities(outputs) >= self.threshold
        labels = labels.astype(np.bool_)
        return {
            name: float(METRICS[name](labels, predicted, outputs)) for name in self.metric_names
        }

    def _describe(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """Give the classes under `prediction`, in the order of `labels`."""
        probabilities = self._probabilities(outputs)
        chosen = [np.flatnonzero(row >= self.threshold) for row in probabilities]
        return [
            {'prediction': [self.labels[i] for i in ids], 'logits': logits, 'probabilities': own}
            for ids, logits, own in zip(
                chosen, outputs.tolist(), probabilities.tolist(), strict=True
            )
        ]
