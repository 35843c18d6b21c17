"""Hyper-parameters as values: frozen so that they hash, plain so that they are JSON, and checked.

A method is a static argument of compiled functions, so its fields must be hashable; it is written
to files and configs, so each must be a JSON value and come back as it was. Types are checked
against the annotations, because a config parsed from text is where a wrong one comes from.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from flax.core import FrozenDict


def freeze(value: Any) -> Any:
    """Return the value with lists as tuples and dicts as hashable dicts with text for keys."""
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    if isinstance(value, Mapping):
        return FrozenDict({str(key): freeze(item) for key, item in value.items()})
    return value


def thaw(value: Any) -> Any:
    """Return the value as JSON has it: the inverse of `freeze`."""
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    return value


def check(owner: str, instance: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        ValueError: a field of another type; the sentence begins with `owner`.
    """
    hints = _type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if not fits(value, hints[field.name]):
            raise ValueError(
                f'{owner}: {field.name}={thaw(value)!r} is not valid; '
                f'expected {expected(hints[field.name])}'
            )


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def fits(value: Any, annotation: Any) -> bool:
    """Tell whether a frozen value is of the annotated type; whole numbers are numbers too."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, arguments[0]) for item in value)
    if origin is Mapping:
        items = value.items() if isinstance(value, Mapping) else [(None, None)]
        return all(fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in items)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation


_WORDS = {
    float: 'a number',
    int: 'a whole number',
    bool: 'True or False',
    str: 'text',
    types.NoneType: 'None',
}


def expected(annotation: Any) -> str:
    """Say in words what `fits` accepts."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return ' or '.join(expected(option) for option in arguments)
    if origin is Literal:
        return ' or '.join(map(repr, arguments))
    if origin is tuple:
        return f'a list, each item {expected(arguments[0])}'
    if origin is Mapping:
        return f'a dict, each value {expected(arguments[1])}'
    return _WORDS.get(annotation, getattr(annotation, '__name__', str(annotation)))
