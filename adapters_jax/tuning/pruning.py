"""Who of those that train side by side goes on: rules over the scores that are on record.

A rule is a function of the evaluations of the members and of the trials that ended before. All of
that is in checkpoints and in the study, so a run that was killed ends the same members again.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial

from adapters_jax.config import Config
from adapters_jax.training import ranking
from adapters_jax.training.run import share_of_steps

PRUNERS = ('none', 'median', 'halving')
TOTAL_STEPS = 'total_steps'  # the attribute of a trial that says how many it was to take

# The evaluations of one member: the steps, and the scores there, where they are numbers.
Scores = Sequence[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a config says of ending members early; see the section `sweep` of `defaults.py`."""

    pruner: str
    reduction: float
    grace: float
    higher_is_better: bool

    @property
    def shares(self) -> list[float]:
        """The rungs, at which those that are not among the best end, as shares of all steps."""
        shares = [] if self.pruner == 'none' else [self.grace]
        while shares and shares[-1] * self.reduction < 1:
            shares.append(shares[-1] * self.reduction)
        return shares


def rule_of(config: Config, higher_is_better: bool = True) -> Rule:
    """Read a config's rule, for scores of which higher or lower ones are better.

    Raises:
        ValueError: a pruner that there is not, or a number out of its range.
    """
    given = config.sweep
    if given.pruner not in PRUNERS:
        raise ValueError(f'sweep.pruner is {given.pruner!r}; expected one of {", ".join(PRUNERS)}')
    if not 1 < given.reduction < math.inf:
        raise ValueError(f'sweep.reduction is {given.reduction}; expected a number above 1')
    if not 0 < given.grace < 1:
        raise ValueError(f'sweep.grace is {given.grace}; expected a share of the steps in (0, 1)')
    return Rule(given.pruner, given.reduction, given.grace, higher_is_better)


class _Race(NamedTuple):
    """Who trains, and what is on record; see `prune`."""

    history: Sequence[FrozenTrial]
    members: Mapping[str, Scores]
    alive: Sequence[str]
    total_steps: int


def prune(
    rule: Rule,
    history: Sequence[FrozenTrial],
    members: Mapping[str, Scores],
    alive: Sequence[str],
    total_steps: int,
) -> dict[str, str]:
    """Return who of the members alive ends after the evaluation just made, and why.

    Args:
        rule: how it is decided.
        history: the trials that ended before these members began.
        members: the evaluations of all members of the population by name, of those too that have
            ended.
        alive: the names of those that still train.
        total_steps: of the population.
    """
    decide = {'none': _none, 'median': _median, 'halving': _halving}[rule.pruner]
    return decide(rule, _Race(history, members, alive, total_steps))


def best_until(scores: Scores, step: int, higher_is_better: bool) -> float | None:
    """Return the best of the scores up to a step; None where there is no number among them."""
    found = [value for at, value in scores if at <= step]
    return (max if higher_is_better else min)(found, default=None)


def keep(scores: Mapping[str, float | None], reduction: float, higher_is_better: bool) -> set[str]:
    """Return the names of the best 1/`reduction`, rounded up; of equals those that come first.

    One without a score is never among them.
    """
    order = sorted(scores, key=ranking.merit(lambda name: scores[name], higher_is_better))
    count = math.ceil(len(scores) / reduction)
    return {name for name in order[:count] if scores[name] is not None}


def _none(*_: object) -> dict[str, str]:
    return {}


def _median(rule: Rule, race: _Race) -> dict[str, str]:
    """Ask Optuna's MedianPruner for each member, with the others as trials that have ended."""
    warmup = share_of_steps(race.total_steps, rule.grace)
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=warmup)
    # Those that were pruned too: it is the median of all that came as far.
    ended = [_as_trial(_scores(trial)) for trial in race.history if trial.intermediate_values]
    peers = {name: _as_trial(scores) for name, scores in race.members.items() if scores}
    direction = 'maximize' if rule.higher_is_better else 'minimize'
    pruned = {}
    for name in (name for name in race.alive if name in peers):
        study = optuna.create_study(pruner=pruner, direction=direction)
        study.add_trials([*ended, *(peer for other, peer in peers.items() if other != name)])
        if pruner.prune(study, peers[name]):
            pruned[name] = f'pruned at step {race.members[name][-1][0]}: below the median'
    return pruned


def _scores(trial: FrozenTrial) -> Scores:
    return sorted(trial.intermediate_values.items())


def _as_trial(scores: Scores) -> FrozenTrial:
    return optuna.trial.create_trial(value=scores[-1][1], intermediate_values=dict(scores))


def _halving(rule: Rule, race: _Race) -> dict[str, str]:
    """Keep the best of all that were ever scored at this rung, as asynchronous halving does.

    Li et al. 2020 (ASHA), where a population takes the place of a worker. A rung is decided at the
    first evaluation at or after it; of several that lie before one evaluation, one after the other.
    """
    steps = [0, 0, *sorted({at for name in race.alive for at, _ in race.members[name]})]
    before, step = steps[-2:]
    alive = list(race.alive)
    for share in rule.shares:
        if before < share_of_steps(race.total_steps, share) <= step:
            better = rule.higher_is_better
            scores = {name: best_until(race.members[name], step, better) for name in alive}
            kept = keep(scores | _earlier(rule, race, share, step), rule.reduction, better)
            alive = [name for name in alive if name in kept]
    what = f'pruned at step {step}: not among the best 1/{rule.reduction:g}'
    return {name: what for name in race.alive if name not in alive}


def _earlier(rule: Rule, race: _Race, share: float, step: int) -> dict[str, float]:
    """Return the scores of earlier trials that reached a rung, after the same share of their steps.

    How many steps a trial takes may be what is searched.
    """
    found, part = {}, step / race.total_steps
    for trial in race.history:
        scores, own = _scores(trial), trial.user_attrs.get(TOTAL_STEPS, race.total_steps)
        until = best_until(scores, share_of_steps(own, part), rule.higher_is_better)
        # One that was evaluated only later says nothing of this step.
        if until is not None and scores[-1][0] >= share_of_steps(own, share):
            found[f'{trial.number}'] = until
    return found
