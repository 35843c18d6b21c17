"""Is one group of runs better than another, or was that luck?

Seeds are paired: what the same seed gives to both (the order of the data, the head's first values)
cancels. With few seeds the paired test of Student has little power, and where it can be told which
examples were predicted right, McNemar's exact test says more: about these examples and these runs,
though, and not about other seeds (Dror et al. 2018, section 3).
"""

import dataclasses
import statistics
from collections.abc import Sequence

from scipy import stats

from experiments.report.runs import Group


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far a group is from the one it is compared with.

    `by_seeds` is the probability of so large a mean difference without a true one (None: fewer than
    two common seeds), `by_examples` that of so uneven a split of the examples which one of the two
    alone predicted right (None: not told).
    """

    seeds: int
    mean: float
    low: float | None  # of the 95 % interval of the mean; None with less than two seeds
    high: float | None
    by_seeds: float | None
    by_examples: float | None


def compare(group: Group, base: Group, metric: str) -> Difference | None:
    """Return the difference of a metric over common seeds; None where there are none."""
    theirs = {run.seed: run for run in base.runs}
    pairs = [(run, theirs[run.seed]) for run in group.runs if run.seed in theirs]
    if not pairs:
        return None
    differences = [own.metrics[metric] - other.metrics[metric] for own, other in pairs]
    mean = statistics.mean(differences)
    low, high, by_seeds = student(differences)
    rights = [(own.right, other.right) for own, other in pairs]
    return Difference(len(pairs), mean, low, high, by_seeds, _mcnemar(rights))


def student(differences: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Return the 95 % interval of the mean, and the probability of one so far from 0 by luck."""
    if len(differences) < 2:
        return None, None, None
    if statistics.stdev(differences) == 0:  # no test can say how sure it is
        mean = differences[0]
        return mean, mean, 1.0 if mean == 0 else 0.0
    found = stats.ttest_1samp(differences, 0.0)
    interval = found.confidence_interval(0.95)
    return float(interval.low), float(interval.high), float(found.pvalue)


def _mcnemar(
    rights: Sequence[tuple[Sequence[bool] | None, Sequence[bool] | None]],
) -> float | None:
    """Return McNemar's exact probability over the examples of all pairs of runs."""
    only = [0, 0]
    for own, other in rights:
        if own is None or other is None or len(own) != len(other):
            return None
        for a, b in zip(own, other, strict=True):
            only[0] += a and not b
            only[1] += b and not a
    if not sum(only):
        return 1.0
    return float(stats.binomtest(only[0], sum(only), 0.5).pvalue)
