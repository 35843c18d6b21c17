"""Trains the cells of a protocol, or a part of them, and reads what came of them.

A cell is a sweep, or, where no population can train it, one run after another. Its workdir is
named by what its numbers depend on, so that papers share what they have in common (full fine-tuning
at small scale), and whatever is finished is not done again: a protocol may be killed at any moment,
and many jobs may work on one.
"""

import hashlib
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax import config as configs
from adapters_jax.adapters.dropping import Dropped
from adapters_jax.config import Config, assign
from adapters_jax.data import glue
from adapters_jax.evaluate import evaluate, evaluation_path
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import grid
from adapters_jax.tuning.populations import MEMBERS
from adapters_jax.tuning.results import BEST
from experiments.papers.study import Cell, Paper, Row

_LOG = logging.getLogger('adapters_jax.papers')
# The folder in that of the data, by task; those of GLUE are all in one.
FOLDERS = dict.fromkeys(('trec', 'cr', 'subj', 'mpqa'), 'sentences')
FOLDERS |= {'banking77': 'banking77', 'clinc150': 'clinc150'}
SEED = 'seed'
# Labels of test sets that nobody has: their tasks are reported on these splits.
SPLITS = dict.fromkeys(glue.TASKS, 'validation') | {'mnli': 'validation_matched'}


class Runner:
    """A protocol at a scale, over a folder of data, in a folder of runs.

    `tasks` are those that are done instead of all, with what they begin with; `options` are further
    settings of every run, as KEY=VALUE.

    Raises:
        ValueError: the protocol has no such task.
    """

    def __init__(
        self,
        paper: Paper,
        scale: str,
        data: str,
        runs: Path,
        tasks: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        self.paper, self.scale, self.data, self.runs = paper, scale, data, runs
        self.options = options
        self.cells = _chosen(list(paper.cells(scale)), tasks)

    def config(self, cell: Cell) -> Config:
        """Return the sweep of a cell."""
        config = self.paper.recipe(f'task={cell.task},way={cell.way},scale={self.scale}')
        plain = cell.task.partition('@')[0]
        if self.data:
            config.data.dir = str(Path(self.data) / FOLDERS.get(plain, 'glue'))
        for option in self.options:
            key, _, value = option.partition('=')
            assign(config, key, value)
        found = {task: str(self._best(cell, task)) for task in cell.sources}
        if len(found) == 1 and not config.method.startswith('fuse'):
            (config.start,) = found.values()
        elif found:
            config.adapters = ','.join(
                f'{task.partition("@")[0]}={path}' for task, path in found.items()
            )
        return config

    def _best(self, cell: Cell, task: str) -> Path:
        needed = next(c for c in self.cells if (c.task, c.way) == (task, cell.source))
        return self.workdir(self.config(needed), needed) / BEST

    def workdir(self, config: Config, cell: Cell) -> Path:
        """Return the folder of a cell: its name, and a digest of what its numbers depend on."""
        decisive = configs.decisive(config)
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:10]
        return self.runs / f'{cell.task}-{cell.way}-{digest}'

    def train(self, shard: grid.Shard) -> None:
        """Train and evaluate every `shard.count`-th cell."""
        numbers = shard.numbers(len(self.cells))
        for place, number in enumerate(numbers, 1):
            cell = self.cells[number]
            _LOG.info('%d of %d: %s', place, len(numbers), cell.name)
            self.rows(cell)

    def rows(self, cell: Cell) -> list[Row]:
        """Return the rows of a cell, trained and evaluated now where they were not.

        Raises:
            FileNotFoundError: it begins with adapters that are not trained yet.
        """
        config = self.config(cell)
        self._check_sources(cell, config)
        workdir = self.workdir(config, cell)
        members = grid.expand(config)
        if config.training.adapter_drop == 'none':
            sweep(config, workdir)
        else:
            for member in members:
                train(member.config, workdir / MEMBERS / member.name)
        groups: dict[str, list[grid.Member]] = {}
        for member in members:
            own = {key: member.settings[key] for key in cell.by}
            groups.setdefault(json.dumps(own), []).append(member)
        return [
            self._row(cell, json.loads(own), group, workdir, len(members))
            for own, group in groups.items()
        ]

    def _check_sources(self, cell: Cell, config: Config) -> None:
        for task in cell.sources:
            folder = self._best(cell, task)
            if not folder.exists():
                raise FileNotFoundError(
                    f'{cell.name} begins with {cell.source} on {task}, which has not left '
                    f'{folder}; give the shard that trains it first'
                )

    def _row(
        self,
        cell: Cell,
        own: Mapping[str, Any],
        members: Sequence[grid.Member],
        workdir: Path,
        count: int,
    ) -> Row:
        """Choose the other settings by the validation split, and evaluate their runs."""
        by_rest: dict[str, list[grid.Member]] = {}
        for member in members:
            rest = {k: v for k, v in member.settings.items() if k not in (*own, SEED)}
            by_rest.setdefault(json.dumps(rest), []).append(member)
        scored = {rest: [_validation(m, workdir) for m in group] for rest, group in by_rest.items()}
        whole = {rest: own for rest, own in scored.items() if None not in own}
        if not whole:
            raise FloatingPointError(f'every setting of {cell.name} has a run that diverged')
        chosen = max(whole, key=lambda rest: statistics.fmean(whole[rest]))
        found, split = by_rest[chosen], SPLITS.get(cell.task.partition('@')[0], 'test')
        folders = [workdir / MEMBERS / member.name for member in found]
        summaries = [_read(folder / 'summary.json') for folder in folders]
        metric = summaries[0]['primary']
        return Row(
            task=cell.task,
            way=cell.way,
            settings=dict(own),
            chosen=json.loads(chosen),
            metric=metric,
            split=split,
            seeds=[member.config.seed for member in found],
            validation=whole[chosen],
            scores=[evaluation(folder, split)['metrics'][metric] for folder in folders],
            workdirs=[str(folder.relative_to(self.runs)) for folder in folders],
            trained=summaries[0]['trainable_parameters'],
            total=summaries[0]['total_parameters'],
            seconds=sum(s['seconds'] / s.get('population', 1) for s in summaries) / len(summaries),
        )


def _chosen(cells: list[Cell], tasks: Sequence[str]) -> list[Cell]:
    known = dict.fromkeys(cell.task for cell in cells)
    for task in tasks:
        if task not in known:
            raise ValueError(f'--tasks has {task!r}; the protocol has {", ".join(known)}')
    wanted = [cell for cell in cells if not tasks or cell.task in tasks]
    needed = {(task, cell.source) for cell in wanted for task in cell.sources}
    return [cell for cell in cells if cell in wanted or (cell.task, cell.way) in needed]


def evaluation(workdir: Path, split: str, dropped: Dropped = 0) -> dict[str, Any]:
    """Return what `evaluate` says, which is asked only where it has not been."""
    path = evaluation_path(workdir, split, dropped)
    return _read(path) if path.exists() else evaluate(workdir, split, dropped)


def _validation(member: grid.Member, workdir: Path) -> float | None:
    summary = _read(workdir / MEMBERS / member.name / 'summary.json')
    first = next(iter(summary['metrics'].values()), {})
    return first.get(summary['primary']) if 'diverged' not in summary['finished'] else None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text('utf-8'))
