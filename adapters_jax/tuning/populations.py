"""The runs of a sweep: checked beforehand, built once where they share their parts, and read back.

What decides which runs there are - a grid, a search, halving - is none of this file's business.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from adapters_jax import config as configs
from adapters_jax import files, params, processes
from adapters_jax.config import Config
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.tasks.task import Task
from adapters_jax.training import experiment, grid, loop, ranking
from adapters_jax.training.monitor import METRICS
from adapters_jax.training.optimizer import OptimizerConfig
from adapters_jax.training.population_run import PopulationRun, Prune
from adapters_jax.training.progress import CONFIG, DATA, SUMMARY, read_end

MEMBERS, POPULATIONS = 'members', 'populations'
_FILES_OPEN = 4  # of a member: its lock, and what its monitor writes
_FEWER = 'let sweep.size say how many members train together'

# What an experiment is not built from: members that differ in these keys alone share one.
_NOT_BUILT_FROM = ('seed', 'data.seed', 'optimizer.', 'training.', 'sweep.')
# The sections of a config that name the examples, and make tokens of them.
_OF_DATA = ('data', 'task', 'backbone', 'adapters')
_BUILT_FROM = ('training.dtype', 'training.frozen_dtype', 'training.remat')


def check(config: Config) -> None:
    """Refuse a member's config that could not be trained, without reading data.

    Raises:
        ValueError: the first mistake found.
    """
    if config.tasks:
        raise ValueError(
            f'a sweep trains one task, but the config has {", ".join(config.tasks)}; sweep '
            'over one of them, or train them together with `python -m adapters_jax.train`'
        )
    if config.training.adapter_drop != 'none':
        raise ValueError(
            f'training.adapter_drop is {config.training.adapter_drop!r}, with which each member '
            "would drop other layers in a step than the others; set 'none', or train by itself"
        )
    experiment.check_numbers(config)
    OptimizerConfig(**config.optimizer.to_dict())
    HeadConfig(**config.head.to_dict())
    loop.check(config)


def built_from(config: Config) -> dict[str, Any]:
    """Return the keys of a config, with their values, that its experiment is built from."""
    return {
        key: value
        for key, value in configs.decisive(config).items()
        if key in _BUILT_FROM or not key.startswith(_NOT_BUILT_FROM)
    }


class NotPossibleError(ValueError):
    """Members that cannot be trained, whatever is tried again."""


class Builder:
    """Builds experiments, and gives the last one again where a config asks for the same parts."""

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}
        self._built: experiment.Experiment | None = None

    def __call__(self, config: Config) -> experiment.Experiment:
        """Return the experiment of a config.

        Raises:
            ValueError, FileNotFoundError: as `experiment.build`.
        """
        parts = built_from(config)
        if self._built is None or parts != self._parts:
            same = bool(self._parts) and parts['backbone'] == self._parts['backbone']
            backbone = self._built.backbone if same else None
            self._built = experiment.build(config, backbone)
            self._parts = parts
        return dataclasses.replace(self._built, config=config)


def check_built(run: experiment.Experiment) -> Task:
    """As `check_data`, of a member that will be trained.

    Raises:
        ValueError: no validation split, nothing to train, or too few steps for the method.
    """
    check_trained(run.model, run.config, run)
    task = check_data(run)
    if run.config.training.steps:  # else they are known only once the data lie in batches
        run.model.method.optimizer(optax.identity(), run.config.training.steps)
    return task


def check_data(run: experiment.Experiment) -> Task:
    """Return the task by which members are compared.

    Raises:
        ValueError: no validation split to compare them on.
    """
    if not run.validation_splits:
        raise ValueError(
            'a sweep picks its best member on a validation split, and there is none; set '
            'data.validation, or data.split_fractions'
        )
    return run.task


def check_trained(model: Model, config: Config, run: experiment.Experiment) -> None:
    """Refuse a config whose model over an experiment's backbone would train nothing.

    Raises:
        ValueError: see `experiment.check_trained`.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), run.backbone.params)
    experiment.check_trained(params.partition(shapes, model.rules)[0], config)


def common_task(found: Sequence[Task]) -> Task:
    """Return the task that all members share, as far as their comparison goes.

    Raises:
        ValueError: they are scored by different metrics.
    """
    metrics = sorted({task.primary for task in found})
    if len(metrics) > 1:
        raise ValueError(
            f'the members of the sweep are scored by different metrics ({", ".join(metrics)}), so '
            'they cannot be compared; set task.primary, or make a sweep of each'
        )
    return found[0]


def check_files(members: Sequence[grid.Member]) -> None:
    """Refuse more members than the system allows files for; see `files.check_descriptors`."""
    files.check_descriptors(_FILES_OPEN * len(members), _FEWER)


def train(
    build: Builder,
    group: Sequence[grid.Member],
    workdir: Path,
    name: str,
    chunk: int,
    prune: Prune | None = None,
) -> None:
    """Train the population `name`, unless each of its members has ended.

    Raises:
        NotPossibleError: it cannot be built, by a mistake that shows beside the data alone.
        ValueError: other members were trained when the data were others.
    """
    own = workdir / POPULATIONS / name
    with processes.locked(own):
        if all_ended(group, workdir):
            return
        check_files(group)
        try:
            built = build(group[0].config)
        except ValueError as error:
            raise NotPossibleError(str(error)) from error
        _check_data(group[0].config, built.fingerprints, workdir / MEMBERS)
        try:
            run = PopulationRun(built, group, own, workdir / MEMBERS, chunk, prune)
        except ValueError as error:
            raise NotPossibleError(str(error)) from error
        run.run()


def _check_data(config: Config, found: Mapping[str, str], members: Path) -> None:
    """Refuse to compare with members that had other data under the same names."""

    def named(own: Config) -> dict[str, Any]:
        decisive = configs.decisive(own).items()
        return {k: v for k, v in decisive if k.split('.')[0] in _OF_DATA and k != 'data.seed'}

    def scored(fingerprints: Mapping[str, str]) -> dict[str, str]:
        return {k: v for k, v in fingerprints.items() if not k.startswith('test')}

    for path in sorted(members.glob(f'*/{DATA}')):
        known = json.loads(path.read_text('utf-8'))
        if scored(known) == scored(found):
            continue
        if named(configs.read(path.with_name(CONFIG))) == named(config):
            raise ValueError(
                f'{path.parent} was trained when the data were others, so that it cannot be '
                'compared with members that are trained now; bring back the files that its '
                f'{CONFIG} names, or sweep in another --workdir'
            )


def all_ended(group: Sequence[grid.Member], workdir: Path) -> bool:
    """Tell whether each member of a population has its summary."""
    return all((workdir / MEMBERS / member.name / SUMMARY).exists() for member in group)


def row(member: grid.Member, workdir: Path) -> ranking.Row:
    """Return what came of a member that has ended."""
    summary = read_summary(member, workdir)
    first = next(iter(summary['metrics'].values()), {})
    return ranking.Row(
        name=member.name,
        settings=member.settings,
        score=first.get(summary['primary']),
        best_step=summary['best_step'],
        steps=summary['steps'],
        state=summary['finished'],
    )


def scores(member: grid.Member, workdir: Path) -> list[tuple[int, float]]:
    """Return the steps of a member's evaluations, and its scores there on the deciding split.

    Those that are no numbers are left out; JSON has them as texts.
    """
    summary = read_summary(member, workdir)
    decisive = next(iter(summary['metrics']), None)
    lines = (workdir / MEMBERS / member.name / METRICS).read_text('utf-8').splitlines()
    found = [line for line in map(json.loads, lines) if line['split'] == decisive]
    values = [(line['step'], line['values'][summary['primary']]) for line in found]
    return [(step, value) for step, value in values if not isinstance(value, str)]


def read_summary(member: grid.Member, workdir: Path) -> dict[str, Any]:
    """Read the summary of a member that has ended."""
    return read_end(workdir / MEMBERS / member.name / SUMMARY)
