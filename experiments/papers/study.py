"""What a paper's protocol consists of: rows of its tables on tasks, and findings to look for.

A cell is a row on a task, and is one sweep; a paper (`experiments/PAPER/`) says which cells there
are, what is done with the adapters that they leave, and what it found that ours should show too.
"""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.config import Config, assign
from experiments.report import significance

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of a paper on a task; each value of the keys `by` is a row of its own.

    It begins with, or fuses, the adapters that the row `source` left on the tasks `sources`: of the
    settings `source_settings`, and of its first seed, which nobody has chosen.
    """

    task: str
    way: str
    by: tuple[str, ...] = ()
    source: str = ''
    sources: tuple[str, ...] = ()
    source_settings: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f'{self.way} on {self.task}'


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a cell with one value of each key that is told apart.

    `chosen` are the other settings, those with the best mean score on the validation split;
    `scores` are of the split that is reported, one for each seed. A run that diverged has 0.
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
    seconds: float  # of one of its runs
    spent: float  # seconds of all runs, those that were not chosen too
    diverged: int  # of all of them
    machines: list[str]
    commits: list[str]

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
    """A claim of a paper, what was found here, and whether it holds; None: undecided.

    It is `tested` where an interval decides, and not where single timings or means alone do.
    """

    claim: str
    where: str  # in the paper
    found: str
    holds: bool | None
    tested: bool = True


@dataclasses.dataclass(frozen=True)
class Table:
    """What a report shows as a table: its heads, its lines, and a sentence below them."""

    head: list[str]
    lines: list[list[str]]
    note: str


@dataclasses.dataclass(frozen=True)
class Gap:
    """By how much scores differ: the mean over pairs of runs, and its 95 % interval.

    The interval is endless where nothing tells how far other seeds would spread.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f'{100 * self.mean:+.1f} points (no interval)'
        low, high = 100 * self.low, 100 * self.high
        return f'{100 * self.mean:+.1f} points ({low:+.1f} to {high:+.1f})'

    @property
    def better(self) -> bool | None:
        """Whether it is above 0; None where the interval says neither."""
        return self.above(0.0)

    def above(self, margin: float) -> bool | None:
        """Whether it is above a margin; None where the interval says neither."""
        if self.low > margin:
            return True
        return False if self.high < margin else None

    def within(self, margin: float) -> bool | None:
        """Whether it is less than a margin either way; None where the interval does not say."""
        if -margin < self.low and self.high < margin:
            return True
        return False if self.low > margin or self.high < -margin else None


class MissingError(LookupError):
    """Nothing was trained of what is asked for."""


class Results:
    """The rows of a protocol at a scale, and what else was found."""

    def __init__(self, rows: Sequence[Row], examined: Mapping[str, Any], scale: str) -> None:
        self.rows, self.examined, self.scale = list(rows), examined, scale

    def of(self, way: str, task: str = '', settings: Settings | None = None) -> list[Row]:
        """Return the rows of a way, in all tasks or one, with these settings."""
        return [
            row
            for row in self.rows
            if row.way == way
            and task in ('', row.task)
            and all(row.settings.get(key) == value for key, value in (settings or {}).items())
        ]

    def tasks(self, way: str) -> list[str]:
        """Return the tasks that a way was trained on, in order."""
        return list(dict.fromkeys(row.task for row in self.of(way)))

    def common(self, *ways: str) -> list[str]:
        """Return the tasks that all these ways were trained on.

        Raises:
            MissingError: there are none.
        """
        found = [t for t in self.tasks(ways[0]) if all(t in self.tasks(way) for way in ways[1:])]
        return some(found, ' and '.join(ways))

    def best(self, way: str, task: str, settings: Settings | None = None) -> Row:
        """Return the row with the best mean on the validation split.

        Raises:
            MissingError: there is none.
        """
        rows = some(self.of(way, task, settings), f'{way} on {task} with {settings or {}}')
        return max(rows, key=lambda row: statistics.fmean(row.validation))

    def score(self, way: str, tasks: Sequence[str], settings: Settings | None = None) -> float:
        """Return the mean over tasks of a way's best score in each, by the validation split.

        Raises:
            MissingError: nothing of it was trained.
        """
        best = [self.best(way, task, settings) for task in some(tasks, f'{way} on any task')]
        return statistics.fmean(row.mean for row in best)

    def validation(self, way: str, tasks: Sequence[str]) -> float:
        """Return the mean over tasks of a way's best score on each one's validation split.

        Raises:
            MissingError: nothing of it was trained.
        """
        best = [self.best(way, task) for task in some(tasks, f'{way} on any task')]
        return statistics.fmean(statistics.fmean(row.validation) for row in best)

    def gap(
        self,
        way: str,
        other: str,
        tasks: Sequence[str],
        settings: Settings | None = None,
        others: Settings | None = None,
    ) -> Gap:
        """Return by how much a way is better than another, over pairs of one task and seed.

        The interval is over seeds, of these tasks and these test texts: others are not spoken of.

        Raises:
            MissingError: one of them was not trained.
        """
        return gap_of(
            [
                paired(self.best(way, task, settings), self.best(other, task, others))
                for task in some(tasks, f'{way} and {other} on any task')
            ]
        )

    def values(self, way: str, key: str) -> list[Any]:
        """Return the values of a key that a way's rows are told apart by, in order.

        Raises:
            MissingError: it was not trained.
        """
        return some(list(dict.fromkeys(row.settings[key] for row in self.of(way))), way)


def on_a_par(results: Results, way: str, claim: str, published: str, where: str) -> Finding:
    """Look whether a way is less than a point below full fine-tuning, with how many parameters.

    `published` is what the paper says of it, which is not what is tested.

    Raises:
        MissingError: one of the two was not trained.
    """
    tasks = results.common(way, 'full')
    gap = results.gap(way, 'full', tasks)
    share = statistics.fmean(results.best(way, task).share for task in tasks)
    said = f'{claim}, or less than a point below it (in the paper: {published})'
    return Finding(said, where, f'{gap} with {told_share(share)}', gap.above(-0.01))


def some(found: Sequence[Any], what: str) -> Sequence[Any]:
    """Return what was found.

    Raises:
        MissingError: it is empty.
    """
    if not found:
        raise MissingError(f'nothing was trained as {what}')
    return found


def paired(row: Row, base: Row) -> list[float]:
    """Return by how much a row is better than another of the same task, for each common seed.

    Raises:
        MissingError: they have none.
    """
    theirs = dict(zip(base.seeds, base.scores, strict=True))
    pairs = zip(row.seeds, row.scores, strict=True)
    found = [score - theirs[seed] for seed, score in pairs if seed in theirs]
    return list(some(found, f'{row.way} and {base.way} on {row.task} with a common seed'))


def gap_of(differences: Sequence[Sequence[float]]) -> Gap:
    """Return the mean of the tasks' mean differences, and its interval over their seeds."""
    means = map(statistics.fmean, differences)
    return Gap(statistics.fmean(means), *significance.stratified(differences))


def all_better(gaps: Iterable[Gap]) -> bool | None:
    """Return whether every gap is above 0: one that is below is enough to deny it."""
    verdicts = {gap.better for gap in gaps}
    return False if False in verdicts else True if verdicts == {True} else None


class Paper:
    """A protocol; a subclass for each paper."""

    name: str
    title: str
    titles: Mapping[str, str]  # of its rows
    recipe: Callable[[str], Config]  # `get_config` of configs/papers/NAME.py
    versions: Sequence[str] = ('paper',)  # and 'code', where the published code says otherwise

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return the cells of a scale, those first that others need."""
        raise NotImplementedError

    def config(self, cell: Cell, scale: str, version: str, options: Sequence[str]) -> Config:
        """Return a cell's sweep, without its data and sources, with options as KEY=VALUE.

        Raises:
            ValueError: an option without a value, or that the config refuses.
        """
        config = self.recipe(f'task={cell.task},way={cell.way},scale={scale},source={version}')
        for option in options:
            key, given, value = option.partition('=')
            if not given:
                raise ValueError(
                    f'--option={option} has no value; expected --option={option}=VALUE'
                )
            assign(config, key, value)
        return config

    def examine(self, results: Results, runs: Path) -> dict[str, Any]:
        """Return what the trained adapters, in the folder of runs, tell beside their scores."""
        return {}

    def claims(self) -> Sequence[Callable[[Results], Iterator[Finding]]]:
        """Return what looks for the paper's findings, apart where they are on different rows.

        What one of them has found stays when rows of a later finding were not trained.
        """
        raise NotImplementedError

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return the findings, but for those on rows that were not trained."""
        for claim in self.claims():
            with contextlib.suppress(MissingError):
                yield from claim(results)

    def unanswered(self, results: Results) -> list[str]:
        """Return, for each of `claims` that asks for rows that were not trained, which."""
        return [said for claim in self.claims() if (said := _missing(claim, results))]

    def tables(self, results: Results) -> Iterator[Table]:
        """Return what the report has as tables beside the scores."""
        yield from ()

    def draw(self, results: Results, directory: Path) -> Iterator[Path]:
        """Draw the paper's figures; return their files."""
        raise NotImplementedError


def _missing(claim: Callable[[Results], Iterator[Finding]], results: Results) -> str:
    """Return what a claim lacks, '' if nothing."""
    try:
        list(claim(results))
    except MissingError as error:
        return str(error)
    return ''


def spread(scores: Sequence[float]) -> float:
    """Return the standard deviation, 0 of a single score."""
    return statistics.stdev(scores) if len(scores) > 1 else 0.0


def told_share(share: float) -> str:
    """Return a share in per cent to two digits, and to the whole per cent above ten."""
    return f'{share:.0f} %' if share >= 10 else f'{share:.2g} %'
