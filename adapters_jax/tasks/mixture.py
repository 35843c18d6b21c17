"""Several tasks learned at once: whose example each is, one loss, and one number to judge them by.

Each example of a batch belongs to one task, which its column `task` numbers. A task sees its own
examples only, with outputs of its own width and labels of its own kind, so its loss is what it
would be in a batch of these alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from adapters_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Tasks by name, in the order of their numbers, with the factors of their losses.

    It stands where a step takes a `Task`, and a run the task whose metric decides.

    Raises:
        ValueError: no tasks, a name that comes twice, or a weight that is not above 0.
    """

    names: tuple[str, ...]
    tasks: tuple[Task, ...]
    weights: tuple[float, ...]
    primary: str = 'mean'

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f'the tasks are named {self.names}; expected a name for each')
        if not len(self.names) == len(self.tasks) == len(self.weights):
            raise ValueError(
                f'{len(self.names)} names, {len(self.tasks)} tasks and {len(self.weights)} weights '
                'do not fit together'
            )
        for name, weight in zip(self.names, self.weights, strict=True):
            if not 0 < weight < math.inf:
                raise ValueError(f'the weight of task {name!r} is {weight}; expected more than 0')

    @property
    def outputs(self) -> dict[str, int]:
        """The numbers that each task's head gives."""
        named = zip(self.names, self.tasks, strict=True)
        return {name: task.num_outputs for name, task in named}

    @property
    def num_outputs(self) -> int:
        """The width of the outputs: that of the widest task."""
        return max(self.outputs.values())

    @property
    def generates(self) -> bool:
        """Whether an evaluation has to write texts, as that of a task has."""
        return any(task.generates for task in self.tasks)

    @property
    def draws(self) -> bool:
        """Whether a task makes other batches of its examples in each epoch."""
        return any(task.draws for task in self.tasks)

    def loss(
        self,
        outputs: Float[Array, 'B S C'],
        batch: Mapping[str, Array],
        label_smoothing: float | Float[Array, ''] = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of each task's loss times its weight, and the count of all examples.

        Args:
            outputs: of any head; those beyond a task's own are ignored.
            batch: has `task`, int32 [B, S], besides what the tasks' own losses need; `label` may be
                of another type than a task's own.
            label_smoothing: for the tasks that have classes.
        """
        parts = self.parts(outputs, batch, label_smoothing).values()
        totals = [w * total for w, (total, _) in zip(self.weights, parts, strict=True)]
        counts = [count for _, count in parts]
        return sum(totals[1:], totals[0]), sum(counts[1:], counts[0])

    def parts(
        self,
        outputs: Float[Array, 'B S C'],
        batch: Mapping[str, Array],
        label_smoothing: float | Float[Array, ''] = 0.0,
    ) -> dict[str, tuple[Float32[Array, ''], Float32[Array, '']]]:
        """Return each task's loss and the count of its examples by name; see `loss`."""
        found = {}
        for number, (name, task) in enumerate(zip(self.names, self.tasks, strict=True)):
            smoothing = label_smoothing if task.smooths else 0.0
            own = outputs[..., : task.num_outputs]
            found[name] = task.loss(own, self._own(batch, number), smoothing)
        return found

    def transform(self, batch: Mapping[str, Any], seed: int = 0, epoch: int | None = None) -> Any:
        """Return the batch as it is: none of the tasks that can be mixed changes its own."""
        return batch

    def reduced(self, outputs: Float[Array, 'B S C'], batch: Mapping[str, Array]) -> Array:
        """Return the outputs as they are: metrics are found for each task by itself."""
        return outputs

    def _own(self, batch: Mapping[str, Array], number: int) -> dict[str, Array]:
        """Return the batch with the examples of one task as the only real ones."""
        mine = batch['example_mask'] & (batch['task'] == number)
        own = {'example_mask': mine}
        for name, column in self.tasks[number].labels_in.items():
            # A row holds examples of one task. Labels of the others may be none of this task.
            where = mine if column.per == 'example' else mine.any(1, keepdims=True)
            labels = batch[name]
            if column.wide:
                labels, where = labels[..., : self.tasks[number].num_outputs], where[..., None]
            elif labels.ndim == 3:  # as wide as those of another task
                labels = labels[..., 0]
            own[name] = jnp.where(where, labels, column.empty).astype(column.dtype)
        return {**batch, **own}

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger mean is the better one."""
        return True

    def is_better(self, new: float, best: float | None) -> bool:
        """Whether `new` beats the best mean so far (None: none yet); NaN never does."""
        return not math.isnan(new) and (best is None or math.isnan(best) or new > best)

    def mean(self, metrics: Mapping[str, Mapping[str, float]]) -> float:
        """Return the mean of the tasks' primary metrics, of errors with the opposite sign."""
        scores = [
            metrics[name][task.primary] * (1 if task.higher_is_better else -1)
            for name, task in zip(self.names, self.tasks, strict=True)
        ]
        return math.fsum(scores) / len(scores)
