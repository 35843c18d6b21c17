"""What a search draws its trials from: the texts of `sweep.space`.

An axis is a list of values, written as in a grid, or a range. Values become texts again, so that a
trial is a member of a grid like any other, and its config can be written by hand.
"""

import dataclasses
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from adapters_jax.config import split_outside_brackets
from adapters_jax.training import grid

SPACE = 'sweep.space'
# Of each kind of range: the numbers that it takes, and how many of them.
_KINDS = {
    'uniform': (float, (2,)),
    'log': (float, (2,)),
    'int': (int, (2, 3)),
    'logint': (int, (2,)),
}
_RANGE = re.compile(rf'({"|".join(_KINDS)})\((.*)\)')
_EXAMPLES = 64  # combinations that a value is tried out in before it is refused
_SHAPES = 'uniform(LOW,HIGH), log(LOW,HIGH), int(LOW,HIGH[,STEP]) or logint(LOW,HIGH)'


@dataclasses.dataclass(frozen=True)
class Dimension:
    """A key, how its values are drawn, and texts with which it can be tried out.

    `ends` are all values of a list, and the two ends of a range.
    """

    key: str
    distribution: BaseDistribution
    ends: tuple[str, ...]


def parse(texts: Sequence[str]) -> dict[str, Dimension]:
    """Parse a config's `sweep.space`; return its dimensions by key, in their order.

    Raises:
        ValueError: a text that is neither a list of values nor a range, a range that is none, or
            keys that cannot be drawn together.
    """
    dimensions = [_dimension(text) for text in texts]
    grid.check_keys([dimension.key for dimension in dimensions], SPACE)
    return {dimension.key: dimension for dimension in dimensions}


def distributions(space: Mapping[str, Dimension]) -> dict[str, BaseDistribution]:
    """Return how Optuna draws each key's value."""
    return {key: dimension.distribution for key, dimension in space.items()}


def texts_of(params: Mapping[str, Any]) -> dict[str, str]:
    """Return drawn values as the texts of a grid."""
    return {key: value if isinstance(value, str) else repr(value) for key, value in params.items()}


def examples(space: Mapping[str, Dimension], key: str, number: int) -> Iterator[dict[str, str]]:
    """Yield combinations in which a key has the end of this number.

    First all keys have that of the same number, or their last, so that few combinations hold all
    ends; then come others, drawn with a seed of their own.
    """
    yield {other: d.ends[min(number, len(d.ends) - 1)] for other, d in space.items()}
    rng, end = random.Random(0), space[key].ends[number]
    for _ in range(_EXAMPLES):
        yield {other: rng.choice(d.ends) for other, d in space.items()} | {key: end}


def _dimension(text: str) -> Dimension:
    axis = grid.parse_axis(text, SPACE)
    ranges = [value for value in axis.values if _RANGE.fullmatch(value)]
    if not ranges:
        return Dimension(axis.key, CategoricalDistribution(axis.values), axis.values)
    if len(axis.values) > 1:
        raise ValueError(
            f'{SPACE} holds {text!r}, which has a range beside other values; expected one range, '
            f'{_SHAPES}, or values alone'
        )
    kind, inside = _RANGE.fullmatch(ranges[0]).groups()
    numbers = _numbers(text, kind, split_outside_brackets(inside))
    _check_bounds(text, kind, *numbers)
    return Dimension(axis.key, _distribution(kind, *numbers), tuple(map(repr, numbers[:2])))


def _numbers(text: str, kind: str, parts: Sequence[str]) -> list[Any]:
    of, counts = _KINDS[kind]
    try:
        numbers = [of(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        what = 'whole numbers' if of is int else 'numbers'
        raise ValueError(
            f'{SPACE} holds {text!r}, whose range is not one of {what}; expected {_SHAPES}'
        )
    return numbers


def _check_bounds(text: str, kind: str, low: Any, high: Any, step: int | None = None) -> None:
    if not low < high:
        raise ValueError(f'{SPACE} holds {text!r}; expected a range whose LOW is below its HIGH')
    if 'log' in kind and low <= 0:
        raise ValueError(f'{SPACE} holds {text!r}; expected a LOW above 0, as logarithms need')
    if step is not None and (step < 1 or (high - low) % step):
        raise ValueError(
            f'{SPACE} holds {text!r}; expected a STEP above 0 that leads from LOW to HIGH'
        )


def _distribution(kind: str, low: Any, high: Any, step: int = 1) -> BaseDistribution:
    if kind in ('int', 'logint'):
        return IntDistribution(low, high, log=kind == 'logint', step=step)
    return FloatDistribution(low, high, log=kind == 'log')
