"""The kinds of tasks by name, as configs and the folders of adapters write them."""

from collections.abc import Mapping, Sequence
from typing import Any

from adapters_jax.tasks.task import Task

_KINDS: dict[str, type[Task]] = {}


def register(cls: type[Task]) -> type[Task]:
    """Make a kind of task known under its name."""
    _KINDS[cls.name] = cls
    return cls


def names() -> list[str]:
    """Return what kinds of tasks are called."""
    return sorted(_KINDS)


def kind(name: str) -> type[Task]:
    """Return the class of tasks that is called `name`.

    Raises:
        ValueError: an unknown kind; the known ones are listed.
    """
    if name not in _KINDS:
        raise ValueError(f'unknown task {name!r}; known: {", ".join(names())}')
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
