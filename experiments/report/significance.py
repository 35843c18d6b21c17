"""Is one group of runs better than another, or was that luck?

Seeds are paired: what the same seed gives to both (the order of the data, the head's first values)
cancels. With few seeds the paired test of Student has little power, and where it can be told which
examples were predicted right, McNemar's exact test says more: about these examples and these runs,
though, and not about other seeds (Dror et al. 2018, section 3).
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy import stats

from experiments.report.runs import Group, Run

_ROUNDING = 1e-9  # what differences of scores differ by where the scores differ by the same


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a group is from the one it is compared with.

    `by_seeds` is the probability of so large a mean difference without a true one (None: fewer than
    two common seeds, or no spread), `by_examples` that of so uneven a split of the examples which
    one of the two predicted right more often (None: not told, or not the `same_examples`).
    """

    seeds: int
    mean: float
    low: float | None  # of the 95 % interval of the mean; None as `by_seeds` is
    high: float | None
    by_seeds: float | None
    by_examples: float | None
    same_examples: bool


def compare(group: Group, base: Group, metric: str) -> Difference | None:
    """Return the difference of a metric over common seeds; None where there are none."""
    theirs = {run.seed: run for run in base.runs}
    pairs = [(run, theirs[run.seed]) for run in group.runs if run.seed in theirs]
    if not pairs:
        return None
    differences = [own.metrics[metric] - other.metrics[metric] for own, other in pairs]
    mean = statistics.mean(differences)
    low, high, by_seeds = student(differences)
    same = _same_examples(pairs)
    by_examples = _mcnemar([(own.right, other.right) for own, other in pairs]) if same else None
    return Difference(len(pairs), mean, low, high, by_seeds, by_examples, same)


def _same_examples(pairs: Sequence[tuple[Run, Run]]) -> bool:
    """Return whether all runs that tell their examples tell the same ones, in the same order."""
    told = [run.examples for pair in pairs for run in pair if run.examples is not None]
    return all(examples == told[0] for examples in told)


def student(differences: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the 95 % interval of the mean, and the probability of one so far from 0 by luck.

    None of fewer than two, and of equal ones that are not 0: what a few seeds happen to share says
    nothing of how far others spread.
    """
    if len(differences) < 2:
        return None, None, None
    if statistics.stdev(differences) < _ROUNDING:
        nothing = abs(statistics.fmean(differences)) < _ROUNDING
        return (0.0, 0.0, 1.0) if nothing else (None, None, None)
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(found.pvalue)


def stratified(strata: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of the strata's means, which are no sample themselves.

    Degrees of freedom are by Welch and Satterthwaite. It is endless where a stratum has a single
    value, or none of them any spread.
    """
    if min(map(len, strata)) < 2 or max(map(statistics.stdev, strata)) < _ROUNDING:
        return -math.inf, math.inf
    parts = [statistics.variance(own) / len(own) for own in strata]
    squares = (part**2 / (len(own) - 1) for part, own in zip(parts, strata, strict=True))
    freedom = sum(parts) ** 2 / sum(squares)
    middle = statistics.fmean(map(statistics.fmean, strata))
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(sum(parts)) / len(strata)
    return middle - reach, middle + reach


def _mcnemar(
    rights: Sequence[tuple[Sequence[bool] | None, Sequence[bool] | None]],
) -> float | None:
    """Return McNemar's exact probability over the examples, each counted once.

    Seeds agree on most examples, so that each would count as often as there are seeds: an example
    is of the side that predicted it right with more of them.
    """
    balance: list[int] = []
    for own, other in rights:
        if own is None or other is None:
            return None
        balance = balance or [0] * len(own)
        balance = [n + a - b for n, a, b in zip(balance, own, other, strict=True)]
    ours, theirs = (sum(sign * n > 0 for n in balance) for sign in (1, -1))
    return float(stats.binomtest(ours, ours + theirs, 0.5).pvalue) if ours + theirs else 1.0
