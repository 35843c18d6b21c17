"""Successive halving over a grid: all its populations train side by side, from rung to rung.

At a rung the best of all members go on from their state, in populations that may compute different
methods. (Jamieson and Talwalkar 2016, with the members' numbers and steps as in Li et al. 2018.)
"""

import contextlib
import logging
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import jax

from adapters_jax import processes
from adapters_jax.training import grid
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.population_run import PopulationRun
from adapters_jax.training.progress import Progress, share_of_steps
from adapters_jax.tuning import populations, pruning
from adapters_jax.tuning.pruning import Rule

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def opened(
    groups: Sequence[Sequence[grid.Member]],
    experiments: Sequence[Experiment],
    workdir: Path,
    chunk: int,
) -> Iterator[list[PopulationRun]]:
    """Hold the folders of populations, and give their runs, of which nothing is trained yet.

    `experiments` are those of the first member of each. The runs are all on the devices at once, so
    those over one backbone have its frozen leaves in common.
    """
    known: dict[Hashable, jax.Array] = {}
    with contextlib.ExitStack() as held:
        runs = []
        for number, (group, built) in enumerate(zip(groups, experiments, strict=True)):
            own = workdir / populations.POPULATIONS / str(number)
            populations.check_files(group)
            held.enter_context(processes.locked(own))
            runs.append(PopulationRun(built, group, own, workdir / populations.MEMBERS, chunk))
            runs[-1].share_backbone(known)
        yield runs


def train(runs: Sequence[PopulationRun], rule: Rule) -> None:
    """Train the members of all runs, fewer from rung to rung, until each has ended.

    Who ends at a rung follows from the scores until there. A run that has come further before a
    kill has these on record, so the same members end, and every run goes on from where it was.
    """
    ended: dict[str, str] = {}
    for number, share in enumerate((*rule.shares, 1.0)):
        for run in runs:
            run.end({name: ended[name] for name in run.names if name in ended})
            if not run.finished:
                run.run(until=step_of(run, share))
        if share < 1:
            ended |= _losers(runs, rule, share, ended, number)


def step_of(run: PopulationRun, share: float) -> int:
    """Return the step of a run at which it has taken this share of all its steps."""
    return share_of_steps(run.total_steps, share)


def _losers(
    runs: Sequence[PopulationRun], rule: Rule, share: float, ended: dict[str, str], number: int
) -> dict[str, str]:
    """Return who ends at a rung, and why."""
    scores = {}
    for run in runs:
        step = step_of(run, share)
        for name, progress in run.progress.members.items():
            if name not in ended and _reached(progress, step):
                scores[name] = pruning.best_until(
                    run.progress.scores[name], step, rule.higher_is_better
                )
    kept = pruning.keep(scores, rule.reduction, rule.higher_is_better)
    _LOG.info('rung %d, after %.0f %%: %d of %d go on', number, 100 * share, len(kept), len(scores))
    what = f'pruned after {100 * share:.3g} % of the steps: not among the best 1/{rule.reduction:g}'
    return {name: what for name in scores if name not in kept}


def _reached(progress: Progress, step: int) -> bool:
    """Tell whether a member was still training when it had taken so many steps.

    One that was ended at this rung, or a later one, was; a run that goes on after a kill has that
    on record. One that diverged has on record the steps before the one that failed, which it began.
    """
    at_a_rung = progress.finished.startswith('pruned')
    begun = (progress.steps or 0) + progress.finished.startswith('diverged')
    return not progress.finished or at_a_rung or begun > step
