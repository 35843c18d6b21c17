"""Times that can be compared on a machine that does other work, too.

What is compared runs in turns within one process, each round in another order, so that a slow
minute slows all of it alike. Only ratios are worth reporting: the median, and between which bounds
the middle half of the rounds lies.
"""

import contextlib
import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

LEAST = 0.02  # seconds of a measurement; what is faster is called several times for one


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as long one thing takes as another: the median of the rounds' ratios.

    Half of the rounds gave a ratio from `low` to `high`.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.value:.2f} ({self.low:.2f} to {self.high:.2f})'


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one call, one number a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one of the rounds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The bounds of the middle half of the rounds."""
        return quartiles(self.seconds)

    def over(self, other: 'Times') -> Ratio:
        """Return how many times as long this takes as the other, each round by itself.

        What slows a whole round cancels, which it does not in a ratio of two medians.

        Raises:
            ValueError: the two are not of the same rounds.
        """
        if len(self.seconds) != len(other.seconds):
            raise ValueError(
                f'{len(self.seconds)} and {len(other.seconds)} rounds cannot be compared; take the '
                'times of one call of `compare`'
            )
        pairs = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return Ratio(statistics.median(pairs), *quartiles(pairs))

    def to_json(self) -> dict[str, Any]:
        """Return the median and every round as JSON values."""
        return {'median': self.median, 'seconds': list(self.seconds)}


def quartiles(values: tuple[float, ...] | list[float]) -> tuple[float, float]:
    """Return the first and the third quartile; of a single value, that value twice."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method='inclusive')
    return first, third


def compare(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int = 9,
    warmup: int = 2,
    pause: float = 0.0,
) -> dict[str, Times]:
    """Return the times of functions without arguments, called in turns for `repeats` rounds.

    What a function returns is waited for. Each is called `warmup` times before (the first call may
    compile), and so often in a measurement that it lasts at least `LEAST` seconds. Before each
    measurement `pause` seconds pass, for what goes on after a call to come to its end.

    Raises:
        ValueError: nothing to compare, or fewer than one round or warm-up call.
    """
    if not functions or repeats < 1 or warmup < 1:
        raise ValueError(
            f'{len(functions)} functions, {repeats} rounds and {warmup} warm-up calls; '
            'expected one or more of each'
        )
    calls = {name: _calls(function, warmup) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with _without_collection():
        for round_ in range(repeats):
            for name in order(list(functions), round_):
                time.sleep(pause)
                seconds[name].append(_measure(functions[name], calls[name]))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def order(names: list[str], round_: int) -> list[str]:
    """Return the order of a round: rotated by one each time, every second round backwards.

    So each comes as often after any other one as before it, and as often first as last.
    """
    shift = round_ // 2 % len(names)
    rotated = names[shift:] + names[:shift]
    return rotated[::-1] if round_ % 2 else rotated


def _calls(function: Callable[[], Any], warmup: int) -> int:
    for _ in range(warmup):
        last = _measure(function, 1)
    return max(1, math.ceil(LEAST / max(last, 1e-9)))


def _measure(function: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(function())
    return (time.perf_counter() - started) / calls


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running in the middle of a measurement."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
