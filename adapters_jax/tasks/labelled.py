"""Tasks whose example has one label and one vector of outputs, whatever the example is.

What a label is and what the outputs mean is each kind's own; where examples come from, and how they
are encoded, depends on whether they are texts (`texts`) or images (`image_classification`).
"""

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapters_jax.data.encoded import Encoded
from adapters_jax.tasks.task import Rows, Task


class LabelledTask(Task):
    """One label for an example."""

    @abc.abstractmethod
    def label_column(self, values: Sequence[Any]) -> np.ndarray:
        """Turn the labels of N examples into an array [N], int32 for classes, float32 for numbers.

        Labels that are sets of classes become [N, C], bool.

        Raises:
            ValueError: a label that the task cannot stand for.
        """

    @abc.abstractmethod
    def _scores(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute the reported metrics of finite outputs [N, C] and labels [N], N > 0."""

    @abc.abstractmethod
    def _describe(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """Return what is predicted for each row of finite outputs [N, C]."""

    def metrics(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute the reported metrics of outputs [N, C] and labels [N], or [N, C]; see `score`.

        Raises:
            ValueError: no examples, or shapes that do not fit.
        """
        outputs, labels = self._checked(outputs), np.asarray(labels)
        wide = self.labels_in['label'].wide
        if labels.shape != (outputs.shape if wide else (len(outputs),)):
            raise ValueError(f'{len(outputs)} outputs need as many labels, not {labels.shape}')
        if not len(outputs):
            raise ValueError('metrics need at least one labelled example, but the split has none')
        return self._finite_or_nan(outputs, lambda: self._scores(outputs, labels))

    def predictions(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """Return one JSON-able object for each row of outputs [N, C]; see `predict`.

        Raises:
            ValueError: a shape that does not fit, or outputs that are not finite.
        """
        return self._describe(self._finite(self._checked(outputs)))

    def _score(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        return self.metrics(outputs, encoded.examples['label'])

    def _predict(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[dict[str, Any]]:
        return self._describe(outputs)
