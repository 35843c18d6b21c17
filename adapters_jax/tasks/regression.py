"""One number for a text or a pair of texts, such as the similarity of two sentences."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from adapters_jax.lazy import Functions
from adapters_jax.tasks.losses import masked_sum, refuse_smoothing
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.task import Column
from adapters_jax.tasks.texts import TextTask

sklearn_metrics, stats = Functions('sklearn.metrics'), Functions('scipy.stats')
Metric = Callable[[np.ndarray, np.ndarray], float]
FLOAT32_MAX = float(np.finfo(np.float32).max)


def _correlation(statistic: Callable[..., Any]) -> Metric:
    """Take a correlation that is 0, not undefined, where either side is constant."""

    def metric(labels: np.ndarray, predicted: np.ndarray) -> float:
        if _is_constant(labels) or _is_constant(predicted):
            return 0.0
        return statistic(labels, predicted).statistic

    return metric


def _is_constant(values: np.ndarray) -> bool:
    """Whether float64 rounding is all that tells the values apart."""
    return np.ptp(values) <= 1e-12 * np.abs(values).max()


METRICS: dict[str, Metric] = {
    'pearson': _correlation(stats.pearsonr),
    'spearman': _correlation(stats.spearmanr),
    'mse': sklearn_metrics.mean_squared_error,
    'mae': sklearn_metrics.mean_absolute_error,
}


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression(TextTask):
    """Give a number, in the unit of the training labels and not clipped to their range."""

    name: ClassVar[str] = 'regression'
    label_kind: ClassVar[Literal['class', 'number']] = 'number'
    labels_in: ClassVar[Mapping[str, Column]] = {'label': Column('example', np.float32)}
    known_metrics: ClassVar[Mapping[str, Metric]] = METRICS
    default_metrics: ClassVar[tuple[str, ...]] = ('pearson', 'spearman', 'mse')
    lower_is_better: ClassVar[frozenset[str]] = frozenset({'mse', 'mae'})

    @property
    def num_outputs(self) -> int:
        """One number."""
        return 1

    def label_column(self, values: Sequence[float | str]) -> np.ndarray:
        """Turn N numbers, or texts that spell numbers, into float32 [N].

        Raises:
            ValueError: a label that is no finite number.
        """
        column = np.empty(len(values), np.float32)
        for index, value in enumerate(values):
            column[index] = _number(value, index)
        return column

    def loss(
        self,
        outputs: Float[Array, 'B S 1'],
        batch: Mapping[str, Array],
        label_smoothing: float = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the squared errors of the real examples, and their count.

        Args:
            outputs: predictions.
            batch: has `label`, float32 [B, S], and `example_mask`, bool [B, S].
            label_smoothing: must be 0, since numbers have no smoothing.

        Raises:
            ValueError: another label smoothing.
        """
        refuse_smoothing(label_smoothing, 'a regression')

        def squared_error(
            predicted: Float32[Array, 'B S 1'], labels: Float[Array, 'B S']
        ) -> Float32[Array, 'B S']:
            return jnp.square(predicted[..., 0] - labels.astype(jnp.float32))

        return masked_sum(squared_error, outputs, batch['label'], batch['example_mask'])

    def _scores(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        predicted, labels = outputs[:, 0].astype(np.float64), labels.astype(np.float64)
        return {name: float(METRICS[name](labels, predicted)) for name in self.metric_names}

    def _describe(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        return [{'prediction': value} for value in outputs[:, 0].tolist()]


def _number(value: float | str, index: int) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not abs(number) <= FLOAT32_MAX:
        raise ValueError(f'the label of example {index} must be a finite number, not {value!r}')
    return number
