"""Train many adapters as populations: a grid, a search, or a choice between methods.

    python -m adapters_jax.sweep --config=configs/papers/houlsby2019.py:task=rte --workdir=W
    python -m adapters_jax.sweep --config=configs/sweeps/search.py:task=trec --workdir=W
    python -m adapters_jax.sweep --config=configs/choose.py:task=trec --workdir=W

Writes `W/members/NAME` (each the workdir of a run, as `train` leaves it), `W/sweep.json` and
`W/sweep.md` (what came of each), and `W/best`: the adapter with the best score on the validation
split. A search leaves `W/study.db` and `W/sweep.png` besides, a choice `W/recommended` and
`W/choose.png`. Run again with the same workdir, it goes on where it was; a search that is finished,
if it is given more `sweep.trials`.

Many jobs may work on one grid: `--shard=I/N` trains every N-th population, and the same sweep
without it ranks what they have left, and trains what is missing.
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from adapters_jax import config as configs
from adapters_jax import entry, files, processes
from adapters_jax.config import Config
from adapters_jax.train import CONFIG, check_same_elsewhere, check_same_run
from adapters_jax.training import grid, ranking
from adapters_jax.training.progress import read_end
from adapters_jax.tuning import choose, populations, pruning, report, results, rungs, search
from adapters_jax.tuning.populations import MEMBERS
from adapters_jax.tuning.results import RESULT

_LOG = logging.getLogger('adapters_jax.sweep')  # __name__ is '__main__' on the command line


def sweep(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Train what the config's section `sweep` describes; return what is written to sweep.json.

    Raises:
        ValueError, FileNotFoundError: a mistake in the sweep, the config or the data, before any
            step.
        NonFiniteLossError: the loss of every member stopped being a number.
    """
    _check_counts(config)
    workdir = Path(workdir)
    searched = bool(config.sweep.space)
    members = search.check(config) if searched else expand(config)
    with processes.locked(workdir):
        with processes.together():
            check_same_run(_as_begun(config, workdir), workdir)
            if (result := _finished(config, workdir)) is not None:
                _LOG.info('%s is finished already; another --workdir trains again', workdir)
                return result
            groups = grid.populations(members, config.sweep.size)
            build = populations.Builder()
            side_by_side = config.sweep.pruner != 'none' or config.sweep.recommend
            # Each trial of a search is looked at when it is drawn; here are mere examples of them.
            check = populations.check_data if searched else populations.check_built
            runs, found = [], []
            for group in groups:
                run = build(group[0].config)
                check_same_elsewhere(config, run)
                found.append(check(run))
                if side_by_side or not runs:  # others are built again when it is their turn
                    runs.append(run)
            task = populations.common_task(found)
        # Written only now: a config with a mistake in it makes no claim on the workdir.
        if processes.is_writer():
            files.write_json(workdir / CONFIG, configs.to_json(config))
        done = results.Results(config, workdir, task)
        if searched:
            with search.open_study(config, workdir, task.higher_is_better) as study:
                search.search(config, workdir, build, runs[0], study)
                done.of_search(study)
        elif side_by_side:
            rule = pruning.rule_of(config, task.higher_is_better)
            with rungs.opened(groups, runs, workdir, config.sweep.chunk) as opened:
                costs = done.costs(members, runs[0], opened) if config.sweep.recommend else None
                rungs.train(opened, rule)
            done.of_grid(members, costs)
        else:
            for number in range(len(groups)):
                _train(build, groups, workdir, number, config.sweep.chunk)
            done.of_grid(members)
        return read_end(workdir / RESULT)


def _as_begun(config: Config, workdir: Path) -> Config:
    """Return the config with the trials that a workdir's search has: it may be given more."""
    path, begun = workdir / CONFIG, copy.deepcopy(config)
    if config.sweep.space and path.exists():
        begun.sweep.trials = min(config.sweep.trials, configs.read(path).sweep.trials)
    return begun


def _finished(config: Config, workdir: Path) -> dict[str, Any] | None:
    """Return what a sweep has written at its end, unless it is to have more trials than then."""
    if not (workdir / RESULT).exists():
        return None
    result = read_end(workdir / RESULT)
    more = config.sweep.space and len(result['members']) < config.sweep.trials
    return None if more else result


def sweep_shard(config: Config, workdir: str | Path, shard: grid.Shard) -> list[str]:
    """Train the populations of one of the jobs that share a workdir; return their members' names.

    Any number of jobs, each with its own shard, may do this at once, and again after a kill: a job
    holds the population that it trains, not the workdir.

    Raises:
        ValueError, FileNotFoundError: as `sweep`; a sweep whose populations depend on one another.
        InUseError: another job trains one of these populations.
    """
    _check_counts(config)
    if config.sweep.space or config.sweep.pruner != 'none' or config.sweep.recommend:
        raise ValueError(
            f'--shard={shard.index}/{shard.count}: a search, sweep.pruner and sweep.recommend '
            'compare all members with one another; run this sweep without --shard'
        )
    workdir = Path(workdir)
    groups = grid.populations(expand(config), config.sweep.size)
    mine = shard.numbers(len(groups))
    build = populations.Builder()
    with processes.together():
        check_same_run(config, workdir)
        found = []
        for number in mine or [0]:
            run = build(groups[number][0].config)
            check_same_elsewhere(config, run)
            found.append(populations.check_built(run))
        populations.common_task(found)
    if processes.is_writer():
        files.write_json(workdir / CONFIG, configs.to_json(config))
    if not mine:
        counts = f'{len(groups)} population(s), {shard.count} shards'
        _LOG.info(
            'nothing to train for this shard: %s; a smaller sweep.size, above 0, makes more',
            counts,
        )
    for number in mine:
        _train(build, groups, workdir, number, config.sweep.chunk)
    return [member.name for number in mine for member in groups[number]]


def _check_counts(config: Config) -> None:
    for key in ('size', 'chunk'):
        if config.sweep[key] < 0:
            raise ValueError(f'sweep.{key} is {config.sweep[key]}; expected 0 or more')


def expand(config: Config) -> list[grid.Member]:
    """Return the members of a config's grid, each of which could be trained.

    Raises:
        ValueError: a mistake in the sweep's own keys, or in a member's config.
    """
    if pruning.rule_of(config).pruner == 'median':
        raise ValueError(
            "sweep.pruner is 'median', which compares with the trials of a search that have ended; "
            "expected 'none' or 'halving' with a sweep.grid"
        )
    members = grid.expand(config)
    choose.check(config, members)
    for member in members:
        populations.check(member.config)
    return members


def _train(
    build: populations.Builder,
    groups: Sequence[Sequence[grid.Member]],
    workdir: Path,
    number: int,
    chunk: int,
) -> None:
    """Train a population, unless each of its members is finished."""
    group = groups[number]
    _LOG.info('population %d of %d: %d members', number + 1, len(groups), len(group))
    populations.train(build, group, workdir, str(number), chunk)


def main(config: Config, workdir: str, shard: str) -> None:
    """Sweep, and print what was reached by which settings, and what was written."""
    if shard:
        names = sweep_shard(config, workdir, grid.Shard.parse(shard))
        print(f'wrote {len(names)} of the members in {workdir}/{MEMBERS}')
        print('when all shards are done, the same sweep without --shard ranks them')
        return
    result = sweep(config, workdir)
    best = result['members'][0]
    print('\n'.join(_told(result)))
    print(f'best member: {best["name"]}, {best["score"]:.4f} at step {best["best_step"]}')
    again = result['recommended']['member'] if 'recommended' in result else best['name']
    print(f'to train {again} by itself: {report.command(workdir, again)}')
    print(f'wrote {workdir}: {", ".join(results.written(result))}')


def _told(result: dict[str, Any]) -> list[str]:
    """Return what a terminal is told of a sweep: by settings, by trial, or by method."""
    primary = result['primary']
    if 'importance' in result:
        return [f'{primary} on validation, best trials:', report.text(result)]
    if 'recommended' in result:
        shown = ranking.columns(choose.table(result))
        return [shown, f'recommended: {result["recommended"]["method"]}', f'  {result["reason"]}']
    shown = ranking.text(result['settings'], primary)
    return [f'{primary} on validation, mean over seeds:', shown]


def _define() -> dict[str, flags.FlagHolder]:
    config = config_flags.DEFINE_config_file('config', None, 'FILE.py[:key=value,...]')
    workdir = flags.DEFINE_string('workdir', None, 'Directory of the sweep.')
    shard = flags.DEFINE_string(
        'shard', '', 'INDEX/COUNT: train this part of the grid, beside the jobs that train others.'
    )
    return {'config': config, 'workdir': workdir, 'shard': shard}


if __name__ == '__main__':
    entry.run_on_many(_define, main)
