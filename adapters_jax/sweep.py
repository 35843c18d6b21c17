"""Train a grid of adapters as populations, rank them, and keep the best.

    python -m adapters_jax.sweep --config=configs/sweeps/houlsby2019.py:task=rte --workdir=W

Writes `W/members/NAME` (each the workdir of a run, as `train` leaves it), `W/sweep.json` and
`W/sweep.md` (what came of each), and `W/best`: the adapter with the best score on the validation
split. Run again with the same workdir, it goes on where it was.

Many jobs may work in one workdir: `--shard=I/N` trains every N-th population, and the same sweep
without it ranks what they have left, and trains what is missing.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from adapters_jax import config as configs
from adapters_jax import entry, files, processes
from adapters_jax.config import Config
from adapters_jax.models.heads import HeadConfig
from adapters_jax.tasks.task import Task
from adapters_jax.train import CONFIG, SUMMARY, check_same_run
from adapters_jax.training import experiment, grid, loop, provenance, ranking
from adapters_jax.training.optimizer import OptimizerConfig
from adapters_jax.training.population_run import PopulationRun
from adapters_jax.training.run import NonFiniteLossError

_LOG = logging.getLogger('adapters_jax.sweep')  # __name__ is '__main__' on the command line
RESULT, TABLE, BEST = 'sweep.json', 'sweep.md', 'best'
MEMBERS, POPULATIONS = 'members', 'populations'

# What an experiment is not built from: members that differ in these keys alone share one.
_NOT_BUILT_FROM = ('seed', 'data.seed', 'optimizer.', 'training.', 'sweep.')
_BUILT_FROM = ('training.dtype', 'training.frozen_dtype', 'training.remat')


def sweep(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Train every member of the config's grid, and return what is written to sweep.json.

    Raises:
        ValueError, FileNotFoundError: a mistake in the grid, the config or the data, before any
            step.
        NonFiniteLossError: the loss of every member stopped being a number.
    """
    workdir = Path(workdir)
    members = expand(config)
    with processes.locked(workdir):
        with processes.together():
            check_same_run(config, workdir)
            if (workdir / RESULT).exists():
                _LOG.info('%s is finished already; another --workdir trains again', workdir)
                return json.loads((workdir / RESULT).read_text('utf-8'))
            groups = grid.populations(members, config.sweep.size)
            build = _Builder()
            task = _common_task([_check_data(build(group[0].config)) for group in groups])
        # Written only now: a config with a mistake in it makes no claim on the workdir.
        if processes.is_writer():
            files.write_json(workdir / CONFIG, configs.to_json(config))
        for number in range(len(groups)):
            _train(build, groups, workdir, number, config.sweep.chunk)
        with processes.together():
            if processes.is_writer():
                _conclude(members, workdir, task)
        return json.loads((workdir / RESULT).read_text('utf-8'))


def sweep_shard(config: Config, workdir: str | Path, shard: grid.Shard) -> list[str]:
    """Train the populations of one of the jobs that share a workdir; return their members' names.

    Any number of jobs, each with its own shard, may do this at once, and again after a kill: a job
    holds the population that it trains, not the workdir.

    Raises:
        ValueError, FileNotFoundError: as `sweep`.
        InUseError: another job trains one of these populations.
    """
    workdir = Path(workdir)
    groups = grid.populations(expand(config), config.sweep.size)
    mine = shard.numbers(len(groups))
    build = _Builder()
    with processes.together():
        check_same_run(config, workdir)
        _common_task([_check_data(build(groups[number][0].config)) for number in mine or [0]])
    if processes.is_writer():
        files.write_json(workdir / CONFIG, configs.to_json(config))
    if not mine:
        counts = f'{len(groups)} population(s), {shard.count} shards'
        _LOG.info('nothing to train for this one: %s; a lower sweep.size makes more', counts)
    for number in mine:
        _train(build, groups, workdir, number, config.sweep.chunk)
    return [member.name for number in mine for member in groups[number]]


def expand(config: Config) -> list[grid.Member]:
    """Return the members of a config's grid, each of which could be trained.

    Raises:
        ValueError: a mistake in the sweep's own keys, or in a member's config.
    """
    for key in ('size', 'chunk'):
        if config.sweep[key] < 0:
            raise ValueError(f'sweep.{key} is {config.sweep[key]}; expected 0 or more')
    members = grid.expand(config)
    for member in members:
        check(member.config)
    return members


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


class _Builder:
    """Builds experiments, and gives the last one again where a config asks for the same parts."""

    def __init__(self) -> None:
        self._parts: dict[str, Any] = {}
        self._built: experiment.Experiment | None = None

    def __call__(self, config: Config) -> experiment.Experiment:
        parts = {
            key: value
            for key, value in configs.decisive(config).items()
            if key in _BUILT_FROM or not key.startswith(_NOT_BUILT_FROM)
        }
        if self._built is None or parts != self._parts:
            same = bool(self._parts) and parts['backbone'] == self._parts['backbone']
            backbone = self._built.backbone if same else None
            self._parts, self._built = parts, experiment.build(config, backbone)
        return dataclasses.replace(self._built, config=config)


def _check_data(run: experiment.Experiment) -> Task:
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


def _common_task(found: Sequence[Task]) -> Task:
    """Return the task that all members share, as far as their comparison goes.

    Raises:
        ValueError: they are scored by different metrics.
    """
    metrics = sorted({task.primary for task in found})
    if len(metrics) > 1:
        raise ValueError(
            f'the members of the grid are scored by different metrics ({", ".join(metrics)}), so '
            'they cannot be compared; set task.primary, or make a sweep of each'
        )
    return found[0]


def _train(
    build: _Builder, groups: Sequence[Sequence[grid.Member]], workdir: Path, number: int, chunk: int
) -> None:
    """Train a population, unless each of its members is finished."""
    group, folder = groups[number], workdir / MEMBERS
    _LOG.info('population %d of %d: %d members', number + 1, len(groups), len(group))
    own = workdir / POPULATIONS / str(number)
    with processes.locked(own):
        if not all((folder / member.name / SUMMARY).exists() for member in group):
            PopulationRun(build(group[0].config), group, own, folder, chunk).run()


def _conclude(members: Sequence[grid.Member], workdir: Path, task: Task) -> None:
    """Rank the members, copy the best one's adapter, and write what came of all."""
    rows = ranking.rank([_row(member, workdir) for member in members], task.higher_is_better)
    best = rows[0]
    if best.score is None:
        told = '; '.join(f'{row.name}: {row.state}' for row in rows[:5])
        raise NonFiniteLossError(
            f'all {len(rows)} members of the sweep diverged ({told}); try lower values of '
            'optimizer.learning_rate, a longer optimizer.warmup or a smaller optimizer.clip_norm, '
            'in another --workdir'
        )
    with files.atomic(workdir / BEST) as temporary:
        shutil.copytree(workdir / MEMBERS / best.name / 'adapter', temporary)
    files.write_text(workdir / TABLE, ranking.markdown(rows, task.primary))
    result = {
        'best': best.name,
        'primary': task.primary,
        'members': [dataclasses.asdict(row) for row in rows],
        'settings': ranking.over_seeds(rows, task.higher_is_better),
        **provenance.describe(),
    }
    files.write_json(workdir / RESULT, result)


def _row(member: grid.Member, workdir: Path) -> ranking.Row:
    summary = json.loads((workdir / MEMBERS / member.name / SUMMARY).read_text('utf-8'))
    first = next(iter(summary['metrics'].values()), {})
    return ranking.Row(
        name=member.name,
        settings=member.settings,
        score=first.get(summary['primary']),
        best_step=summary['best_step'],
        steps=summary['steps'],
        state=summary['finished'],
    )


def main(config: Config, workdir: str, shard: str) -> None:
    """Sweep, and print what was reached by which settings, and what was written."""
    if shard:
        names = sweep_shard(config, workdir, grid.Shard.parse(shard))
        print(f'wrote {len(names)} of the members in {workdir}/{MEMBERS}')
        print('when all shards are done, the same sweep without --shard ranks them')
        return
    result = sweep(config, workdir)
    print(f'{result["primary"]} on validation, mean over seeds:')
    print(ranking.text(result['settings'], result['primary']))
    best = result['members'][0]
    print(f'best member: {best["name"]}, {best["score"]:.4f} at step {best["best_step"]}')
    print(f'wrote {workdir}: best/, sweep.md, sweep.json, members/, config.json')


def _define() -> dict[str, flags.FlagHolder]:
    config = config_flags.DEFINE_config_file('config', None, 'FILE.py[:key=value,...]')
    workdir = flags.DEFINE_string('workdir', None, 'Directory of the sweep.')
    shard = flags.DEFINE_string(
        'shard', '', 'INDEX/COUNT: train this part of the grid, beside the jobs that train others.'
    )
    return {'config': config, 'workdir': workdir, 'shard': shard}


if __name__ == '__main__':
    entry.run_on_many(_define, main)
