"""What a paper's protocol consists of: rows of its tables on tasks, and findings to look for.

A cell is a row on a task, and is one sweep; a paper (`experiments/PAPER/`) says which cells there
are, what is done with the adapters that they leave, and what it found that ours should show too.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of a paper on a task; each value of the keys `by` is a row of its own.

    `sources` are the tasks whose best adapter of the row `source` the config names with `{task}`.
    """

    task: str
    way: str
    by: tuple[str, ...] = ()
    source: str = ''
    sources: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f'{self.way} on {self.task}'


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a cell with one value of each key that is told apart.

    `chosen` are the other settings, those with the best mean score on the validation split;
    `scores` are of the split that is reported, one for each seed.
    """

    task: str
    way: str
    settings: dict[str, Any]
    chosen: dict[str, Any]
    metric: str
    split: str
    seeds: list[int]
    validation: list[float]
    scores: list[float]
    workdirs: list[str]
    trained: int
    total: int
    seconds: float  # of the whole cell, over its members

    @property
    def mean(self) -> float:
        """The mean score over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def share(self) -> float:
        """The trained part of all parameters, in per cent, the task's head included."""
        return 100 * self.trained / self.total


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim of a paper, what was found here, and whether it holds; None: not looked at."""

    claim: str
    where: str  # in the paper
    found: str
    holds: bool | None


class Results:
    """The rows of a protocol, and what else was found."""

    def __init__(self, rows: Sequence[Row], examined: Mapping[str, Any]) -> None:
        self.rows, self.examined = list(rows), examined

    def of(self, way: str, task: str = '', **settings: Any) -> list[Row]:
        """Return the rows of a way, in all tasks or one, with these settings (dots as '__')."""
        wanted = {key.replace('__', '.'): value for key, value in settings.items()}
        return [
            row
            for row in self.rows
            if row.way == way
            and task in ('', row.task)
            and all(row.settings.get(key) == value for key, value in wanted.items())
        ]

    def tasks(self, way: str) -> list[str]:
        """Return the tasks that a way was trained on, in order."""
        return list(dict.fromkeys(row.task for row in self.of(way)))

    def score(self, way: str, tasks: Sequence[str] = (), **settings: Any) -> float:
        """Return the mean over tasks of a way's best score in each, by the validation split."""
        best = [self.best(way, task, **settings) for task in tasks or self.tasks(way)]
        return statistics.fmean(row.mean for row in best)

    def best(self, way: str, task: str, **settings: Any) -> Row:
        """Return the row with the best mean on the validation split.

        Raises:
            LookupError: there is none.
        """
        rows = self.of(way, task, **settings)
        if not rows:
            raise LookupError(f'nothing was trained as {way!r} on {task!r} with {settings}')
        return max(rows, key=lambda row: statistics.fmean(row.validation))

    def values(self, way: str, key: str) -> list[Any]:
        """Return the values of a key that a way's rows are told apart by, in order."""
        return list(dict.fromkeys(row.settings[key] for row in self.of(way)))

    def common(self, *ways: str) -> list[str]:
        """Return the tasks that all these ways were trained on."""
        return [t for t in self.tasks(ways[0]) if all(t in self.tasks(way) for way in ways[1:])]


class Paper:
    """A protocol; a subclass for each paper."""

    name: str
    title: str
    titles: Mapping[str, str]  # of its rows
    recipe: Callable[[str], Config]  # `get_config` of configs/papers/NAME.py
    baseline = 'full'

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return the cells of a scale, those first that others need."""
        raise NotImplementedError

    def examine(self, results: Results, runs: Path) -> dict[str, Any]:
        """Return what the trained adapters, in the folder of runs, tell beside their scores."""
        return {}

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return the paper's findings, and what ours say of them."""
        raise NotImplementedError

    def draw(self, results: Results, directory: Path) -> list[Path]:
        """Draw the paper's figures; return their files."""
        return []


def spread(scores: Sequence[float]) -> float:
    """Return the standard deviation, 0 of a single score."""
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def points(difference: float) -> str:
    """Return a difference of scores in points, with its sign."""
    return f'{100 * difference:+.1f} points'
