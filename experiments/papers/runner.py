"""Trains the cells of a protocol, or a part of them, and reads what came of them.

A cell is a sweep, or, where no population can train it, one run after another. Its workdir is
named by what its numbers depend on, and by no path, so that papers share what they have in common
(full fine-tuning at small scale), and whatever is finished is not done again: a protocol may be
killed at any moment, and many jobs may work on one. A cell that cannot be trained yet is left for
another time, and does not keep the others from it.
"""

import hashlib
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax import config as configs
from adapters_jax import files
from adapters_jax.adapters.dropping import Dropped
from adapters_jax.config import Config
from adapters_jax.data import glue
from adapters_jax.evaluate import evaluate, evaluation_path
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import grid
from adapters_jax.training.progress import SUMMARY
from adapters_jax.training.run import NonFiniteLossError
from adapters_jax.tuning.populations import MEMBERS
from adapters_jax.tuning.results import RESULT as SWEPT
from configs import text_sets
from experiments.papers.study import Cell, Paper, Results, Row
from experiments.report.runs import seconds_of

_LOG = logging.getLogger('adapters_jax.papers')
SEED, FUSION = 'seed', 'fusion'
LOST = 'diverged.json'  # of a run that was trained alone; those of a population have a summary
# Keys that came when runs had names, with what was done before: named by them, all would run again.
LATER = {'task.token_types': True}
# Labels of test sets that nobody has: their tasks are reported on these splits.
SPLITS = dict.fromkeys(glue.TASKS, 'validation') | {'mnli': 'validation_matched'}


class Runner:
    """A protocol at a scale, over a folder of data, in a folder of runs.

    `tasks` are those that are done instead of all, with what they begin with; `options` are further
    settings of every run, as KEY=VALUE; `version` are the settings of the paper or of its code.

    Raises:
        ValueError: the protocol has no such task, or the paper no such version.
    """

    def __init__(
        self,
        paper: Paper,
        scale: str,
        data: str,
        runs: Path,
        tasks: Sequence[str] = (),
        options: Sequence[str] = (),
        version: str = 'paper',
    ) -> None:
        if version not in paper.versions:
            raise ValueError(
                f'--source is {version!r}; {paper.name} has {", ".join(paper.versions)} alone: its '
                'recipes are of one version; leave --source out'
            )
        self.paper, self.scale, self.data, self.runs = paper, scale, data, runs
        self.tasks, self.options, self.version = tasks, options, version
        self.cells = _chosen(list(paper.cells(scale)), tasks)

    def train(self, shard: grid.Shard) -> list[Cell]:
        """Train and evaluate every `shard.count`-th cell; return those that still wait for others.

        They are tried twice: what they wait for may have ended while the rest was trained.
        """
        cells = [self.cells[number] for number in shard.numbers(len(self.cells))]
        return self._tried(self._tried(cells))

    def _tried(self, cells: Sequence[Cell]) -> list[Cell]:
        """Train cells; return those that wait for others."""
        waiting = []
        for place, cell in enumerate(cells, 1):
            _LOG.info('%d of %d: %s', place, len(cells), cell.name)
            try:
                self.rows(cell)
            except (NotYetError, files.InUseError) as error:
                _LOG.warning('skipped: %s', error)
                waiting.append(cell)
        return waiting

    def rows(self, cell: Cell) -> list[Row]:
        """Return the rows of a cell, trained and evaluated now where they were not.

        Raises:
            NotYetError: it begins with adapters that are not trained yet.
            InUseError: another job trains it.
        """
        config = self.config(cell)
        workdir, members = self.runs / self.name_of(cell), grid.expand(config)
        if config.training.adapter_drop != 'none':
            _train_each(members, workdir / MEMBERS)
        elif not (workdir / SWEPT).exists():  # it may have been trained from another folder
            _sweep(config, workdir)
        groups: dict[str, list[grid.Member]] = {}
        for member in members:
            own = {key: member.settings[key] for key in cell.by}
            groups.setdefault(json.dumps(own), []).append(member)
        return [self._row(cell, json.loads(own), group, workdir) for own, group in groups.items()]

    def config(self, cell: Cell) -> Config:
        """Return the sweep of a cell.

        Raises:
            NotYetError: it begins with adapters that are not trained yet.
        """
        config = self._recipe(cell)
        if self.data:
            config.data.dir = str(Path(self.data) / _folder(cell.task))
        found = {task.partition('@')[0]: self._source(cell, task) for task in cell.sources}
        if cell.way == FUSION:
            config.adapters = ','.join(f'{task}={path}' for task, path in found.items())
        elif found:
            (config.start,) = map(str, found.values())
        return config

    def _recipe(self, cell: Cell) -> Config:
        return self.paper.config(cell, self.scale, self.version, self.options)

    def _needed(self, cell: Cell, task: str) -> Cell:
        return next(c for c in self.cells if (c.task, c.way) == (task, cell.source))

    def _source(self, cell: Cell, task: str) -> Path:
        """Return the adapter that a cell begins with: of the source's first seed.

        Raises:
            NotYetError: it is not trained yet.
            ValueError: it diverged, and there is none.
        """
        needed = self._needed(cell, task)
        if not self._ended(needed):
            raise NotYetError(f'{cell.name} begins with {needed.name}, which has not ended yet')
        wanted = dict(cell.source_settings)
        row = next(row for row in self.rows(needed) if wanted.items() <= row.settings.items())
        found = self.runs / row.workdirs[0] / 'adapter'
        if not found.exists():
            raise ValueError(
                f'{cell.name} begins with {needed.name}, whose run of seed {row.seeds[0]} diverged '
                f'({found.parent}); leave {cell.task} out by --tasks, or set by --option what '
                'makes it steadier'
            )
        return found

    def _ended(self, cell: Cell) -> bool:
        """Tell whether a cell's sweep has ended, also where all of its runs diverged."""
        workdir = self.runs / self.name_of(cell)
        if (workdir / SWEPT).exists():
            return True
        names = [member.name for member in grid.expand(self._recipe(cell))]
        paths = [workdir / MEMBERS / name / SUMMARY for name in names]
        return all(path.exists() and _diverged(_read(path)) for path in paths)

    def name_of(self, cell: Cell) -> str:
        """Return the name of a cell's workdir: a digest of its settings, and of its sources'."""
        settings = configs.decisive(self._recipe(cell))
        settings = {k: v for k, v in settings.items() if k not in LATER or v != LATER[k]}
        sources = [self.name_of(self._needed(cell, task)) for task in cell.sources]
        told = json.dumps([settings, sources, cell.source_settings], sort_keys=True)
        return f'{cell.task}-{cell.way}-{hashlib.sha256(told.encode()).hexdigest()[:10]}'

    def _row(
        self, cell: Cell, own: Mapping[str, Any], members: Sequence[grid.Member], workdir: Path
    ) -> Row:
        """Choose the other settings by the validation split, and evaluate their runs."""
        read = _summaries(members, workdir / MEMBERS, cell)
        by_rest: dict[str, list[grid.Member]] = {}
        for member in members:
            rest = {k: v for k, v in member.settings.items() if k not in (*own, SEED)}
            by_rest.setdefault(json.dumps(rest), []).append(member)
        scores = {rest: [_validation(read[m.name]) for m in ms] for rest, ms in by_rest.items()}
        chosen = max(scores, key=lambda rest: statistics.fmean(scores[rest]))
        found, split = by_rest[chosen], SPLITS.get(cell.task.partition('@')[0], 'test')
        summaries = [read[member.name] for member in found]
        metric, folders = summaries[0]['primary'], [workdir / MEMBERS / m.name for m in found]
        return Row(
            task=cell.task,
            way=cell.way,
            settings=dict(own),
            chosen=json.loads(chosen),
            metric=metric,
            split=split,
            seeds=[member.config.seed for member in found],
            validation=scores[chosen],
            scores=[score(folder, split, metric) for folder in folders],
            workdirs=[str(folder.relative_to(self.runs)) for folder in folders],
            trained=summaries[0]['trainable_parameters'],
            total=summaries[0]['total_parameters'],
            seconds=statistics.fmean(map(seconds_of, summaries)),
            spent=sum(map(seconds_of, read.values())),
            diverged=sum(map(_diverged, read.values())),
            machines=sorted({summary['hardware'] for summary in read.values()}),
            commits=sorted({summary['commit'] for summary in read.values()}),
        )


class NotYetError(ValueError):
    """Something has to be trained before."""


def _folder(task: str) -> str:
    return 'sentences' if task.partition('@')[0] in text_sets.FILES else 'glue'


def _chosen(cells: list[Cell], tasks: Sequence[str]) -> list[Cell]:
    known = dict.fromkeys(cell.task for cell in cells)
    for task in tasks:
        if task not in known:
            raise ValueError(f'--tasks has {task!r}; the protocol has {", ".join(known)}')
    wanted = [cell for cell in cells if not tasks or cell.task in tasks]
    needed = {(task, cell.source) for cell in wanted for task in cell.sources}
    return [cell for cell in cells if cell in wanted or (cell.task, cell.way) in needed]


def _sweep(config: Config, workdir: Path) -> None:
    """Sweep; where all runs diverge nothing is best, and each says so in its own summary."""
    try:
        sweep(config, workdir)
    except NonFiniteLossError as error:
        _LOG.warning('%s: %s', workdir, error)


def _train_each(members: Sequence[grid.Member], folder: Path) -> None:
    """Train runs one after another; one that diverges keeps no other from it."""
    for member in members:
        own = folder / member.name
        if (own / LOST).exists():
            continue
        try:
            train(member.config, own)
        except NonFiniteLossError as error:
            _LOG.warning('%s: %s', own, error)
            files.write_json(own / LOST, {'finished': f'diverged: {error}', 'seconds': 0.0})


def _summaries(
    members: Sequence[grid.Member], folder: Path, cell: Cell
) -> dict[str, dict[str, Any]]:
    """Return what runs say of themselves; one that diverged alone has the counts of another.

    Raises:
        ValueError: every one of them diverged alone.
    """
    paths = {member.name: folder / member.name / SUMMARY for member in members}
    found = {name: _read(path) for name, path in paths.items() if path.exists()}
    if not found:
        raise ValueError(
            f'all runs of {cell.name} diverged (in {folder}) before any told its size; leave its '
            'task out by --tasks, or set by --option what makes them steadier'
        )
    other = next(iter(found.values()))
    return {
        name: found[name] if name in found else other | _read(path.with_name(LOST))
        for name, path in paths.items()
    }


def score(workdir: Path, split: str, metric: str, dropped: Dropped = 0) -> float:
    """Return what `evaluate` says, asked only where it has not been; 0 of a run that diverged."""
    summary = workdir / SUMMARY
    if not summary.exists() or _diverged(_read(summary)):
        return 0.0
    path = evaluation_path(workdir, split, dropped)
    found = _read(path) if path.exists() else evaluate(workdir, split, dropped)
    return found['metrics'][metric]


def trained_backbone(results: Results, runs: Path) -> LoadedBackbone:
    """Load the backbone that the rows were trained on: that of their scale, or of an option."""
    config = configs.read(runs / results.rows[0].workdirs[0] / 'config.json')
    return load_backbone(config.backbone)


def _validation(summary: Mapping[str, Any]) -> float:
    first = next(iter(summary['metrics'].values()), {})
    return 0.0 if _diverged(summary) else first[summary['primary']]


def _diverged(summary: Mapping[str, Any]) -> bool:
    return summary['finished'].startswith('diverged')


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text('utf-8'))
