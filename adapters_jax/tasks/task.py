"""What the training loop, evaluation and prediction need to know of a task, whatever its kind.

A task is a small immutable value: it turns labels into numbers, outputs of the head into a loss,
into metrics and into predictions, and writes itself into the folder of an adapter. It holds no
arrays, so it may be a static argument of a jitted function.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

_KINDS: dict[str, type['Task']] = {}


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
    label_kind: ClassVar[Literal['class', 'number']]
    known_metrics: ClassVar[Collection[str]]
    default_metrics: ClassVar[tuple[str, ...]]
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    metric_names: tuple[str, ...] = ()
    primary: str = ''

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

    @abc.abstractmethod
    def label_column(self, values: Sequence[Any]) -> np.ndarray:
        """Turn the labels of N examples into an array [N], int32 for classes, float32 for numbers.

        Raises:
            ValueError: a label that the task cannot stand for.
        """

    @abc.abstractmethod
    def loss(
        self,
        outputs: Float[Array, 'B S C'],
        batch: Mapping[str, Array],
        label_smoothing: float = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the losses of the batch's real examples, and their count."""

    def parts(self, outputs: Any, batch: Any, label_smoothing: Any = 0.0) -> dict[str, Any]:
        """Return each task's loss and count, where there are several; see `Mixture.parts`."""
        return {}

    @abc.abstractmethod
    def _scores(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute the reported metrics of finite outputs [N, C] and labels [N], N > 0."""

    @abc.abstractmethod
    def _describe(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """Return what is predicted for each row of finite outputs [N, C]."""

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

    def metrics(self, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute the reported metrics once, over all outputs [N, C] and labels [N] of a split.

        Every metric is NaN where an output is not finite: the model has diverged, and one member
        of a population may do so without ending the others.

        Raises:
            ValueError: no examples, or shapes that do not fit.
        """
        outputs, labels = self._checked(outputs), np.asarray(labels)
        if labels.shape != (len(outputs),):
            raise ValueError(f'{len(outputs)} outputs need as many labels, not {labels.shape}')
        if not len(outputs):
            raise ValueError('metrics need at least one labelled example, but the split has none')
        if not np.isfinite(outputs).all():
            return dict.fromkeys(self.metric_names, math.nan)
        return self._scores(outputs, labels)

    def predictions(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """Return one JSON-able object for each row of outputs [N, C], with the key `prediction`.

        Raises:
            ValueError: a shape that does not fit, or outputs that are not finite.
        """
        outputs = self._checked(outputs)
        bad = np.flatnonzero(~np.isfinite(outputs).all(-1))
        if len(bad):
            raise ValueError(
                f'the model gives outputs that are not finite for {len(bad)} of {len(outputs)} '
                f'examples (the first is number {bad[0]}): its training has diverged'
            )
        return self._describe(outputs)

    def _checked(self, outputs: np.ndarray) -> np.ndarray:
        outputs = np.asarray(outputs)
        if outputs.ndim != 2 or outputs.shape[1] != self.num_outputs:
            raise ValueError(
                f'outputs must have the shape [N, {self.num_outputs}], not {list(outputs.shape)}'
            )
        return outputs

    def to_json(self) -> dict[str, Any]:
        """Return the kind and every field as JSON-able values; `from_json` turns it back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
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


def register(cls: type[Task]) -> type[Task]:
    """Make a kind of task known under its name."""
    _KINDS[cls.name] = cls
    return cls


def kind(name: str) -> type[Task]:
    """Return the class of tasks that is called `name`.

    Raises:
        ValueError: an unknown kind; the known ones are listed.
    """
    if name not in _KINDS:
        raise ValueError(f'unknown task {name!r}; known: {", ".join(sorted(_KINDS))}')
    return _KINDS[name]


def create(name: str, *, metrics: Sequence[str] = (), **fields: Any) -> Task:
    """Make a task of the kind `name`, reporting `metrics`, from the kind's own settings.

    Raises:
        ValueError: an unknown kind or setting, or a value that the kind does not take.
    """
    return from_json({'name': name, 'metric_names': tuple(metrics), **fields})


def from_json(data: Mapping[str, Any]) -> Task:
    """Return the task that `to_json` described.

    Raises:
        ValueError: an unknown kind or setting, or a value that the kind does not take.
    """
    fields = dict(data)
    return kind(fields.pop('name', '')).from_fields(**fields)


def masked_sum(
    example_loss: Callable[[Float32[Array, 'B S C'], Array], Float32[Array, 'B S']],
    outputs: Float[Array, 'B S C'],
    labels: Array,
    mask: Bool[Array, 'B S'],
) -> tuple[Float32[Array, ''], Float32[Array, '']]:
    """Sum a loss over the examples of a batch that are real, and count these.

    Empty places are zeroed before the loss as well as after it: a NaN there would otherwise come
    back through the gradient of the branch that the second `where` discards.
    """
    outputs = jnp.where(mask[..., None], outputs.astype(jnp.float32), 0.0)
    losses = example_loss(outputs, labels)
    return jnp.where(mask, losses, 0.0).sum(), mask.sum(dtype=jnp.float32)
