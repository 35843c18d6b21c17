"""Which adapter to take: the members of a grid, by method, with what each is worth and costs.

The rule: of the methods trained to the end, those whose best member scores at most `sweep.margin`
worse than the best of all are as good as it; of these, the cheapest is recommended. Cheap is few
trained parameters (`sweep.cost=parameters`; of equals, few FLOPs in inference) or few FLOPs
(`inference`; of equals, few parameters). All of it follows from the seed. Seconds are told beside
it, and decide nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from adapters_jax.config import Config
from adapters_jax.training import grid, ranking
from adapters_jax.tuning import populations, report

COSTS = ('parameters', 'inference')
_ROUNDING = 1e-9  # 0.52 - 0.05 is a little more than 0.47


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A method and its best member.

    Attributes:
        method: its text in a config.
        member: the name of the member.
        settings: what else the member has on the axes of the grid.
        score: its best, on the validation split; None where it has none.
        steps: how many it was trained.
        ended: whether that was to its end, and it was not ended at a rung.
        parameters: how many are trained, the head's too.
        flops: of inference, as a multiple of those of the backbone with a head alone.
    """

    method: str
    member: str
    settings: dict[str, Any]
    score: float | None
    steps: int
    ended: bool
    parameters: int
    flops: float


def check(config: Config, members: Sequence[grid.Member]) -> None:
    """Refuse what a recommendation of one of the members cannot be made by.

    Raises:
        ValueError: naming the value and what was expected.
    """
    if config.sweep.cost not in COSTS:
        raise ValueError(f'sweep.cost is {config.sweep.cost!r}; expected one of {", ".join(COSTS)}')
    if not config.sweep.margin >= 0:
        raise ValueError(f'sweep.margin is {config.sweep.margin}; expected 0 or more')
    if config.sweep.recommend:
        _check_costs(members)


def _check_costs(members: Sequence[grid.Member]) -> None:
    """Refuse members that differ in what a cost depends on beside the method.

    Costs are told by method, and measured with the backbone, head and texts of one member.
    """
    first, *others = [populations.built_from(member.config) for member in members]
    keys = {key for other in others for key in first if first[key] != other[key]} - {'method'}
    if keys:
        raise ValueError(
            f'sweep.recommend compares what methods cost, and the members differ in '
            f'{", ".join(sorted(keys))} too, on which the cost of each depends; make a sweep for '
            'each value, or set sweep.recommend to False'
        )


def best_of_each(found: Sequence[Candidate], higher_is_better: bool) -> list[Candidate]:
    """Return of each method its best member, and these from the best to the worst.

    A member that was trained to its end comes before one that was not, whatever their scores.
    """
    merit = ranking.merit(lambda candidate: candidate.score, higher_is_better)

    def order(c: Candidate) -> tuple[Any, ...]:
        return c.score is None, not c.ended, 0 if c.ended else -c.steps, merit(c)

    ranked = sorted(found, key=order)
    best: dict[str, Candidate] = {}
    for candidate in ranked:
        best.setdefault(candidate.method, candidate)
    return list(best.values())


def recommend(
    candidates: Sequence[Candidate], margin: float, cost: str, higher_is_better: bool
) -> Candidate:
    """Return the cheapest of those that are as good as the best (see the head of this file).

    `candidates` are those of `best_of_each`, of which the first one has a score.
    """
    sign = 1 if higher_is_better else -1
    ended = [c for c in candidates if c.ended and c.score is not None] or list(candidates[:1])
    bar = max(sign * c.score for c in ended) - margin - _ROUNDING
    good = [c for c in ended if sign * c.score >= bar]
    return min(good, key=lambda c: (*_costs(c, cost), c.method))


def _costs(candidate: Candidate, cost: str) -> tuple[float, float]:
    both = float(candidate.parameters), candidate.flops
    return both if cost == 'parameters' else both[::-1]


def frontier(candidates: Sequence[Candidate], higher_is_better: bool) -> list[Candidate]:
    """Return those trained to the end than which none is as small and better; the smallest first.

    (The Pareto frontier of score and trained parameters.)
    """
    sign = 1 if higher_is_better else -1
    ended = [c for c in candidates if c.ended and c.score is not None]
    found: list[Candidate] = []
    for candidate in sorted(ended, key=lambda c: (c.parameters, -sign * c.score)):
        if not found or sign * candidate.score > sign * found[-1].score:
            found.append(candidate)
    return found


def reason(chosen: Candidate, candidates: Sequence[Candidate], config: Config, primary: str) -> str:
    """Return in a sentence why this one of `best_of_each` is recommended."""
    best, given = candidates[0], config.sweep
    if not best.ended:
        return f'no method was trained to the end, and this one has the best {primary}'
    count = sum(c.ended for c in candidates)
    what = {'parameters': 'trained parameters', 'inference': 'FLOPs in inference'}[given.cost]
    return (
        f'of {count} methods trained to the end, those within {given.margin:g} of the best '
        f'{primary} ({best.score:.4f}, {best.method}) count as equal, and this one has the fewest '
        f'{what} of them: {chosen.parameters:,} parameters, {chosen.flops:.3f} times the FLOPs of '
        'the bare backbone'
    )


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the lines of the table of a sweep.json's candidates, the head first."""
    candidates = [Candidate(**values) for values in result['candidates']]
    keys = list(candidates[0].settings)
    head = ['method', *keys, result['primary'], 'steps', 'parameters', 'inference FLOPs']
    lines = [[*head, 'inference time', 'seconds a step']]
    for c in candidates:
        settings = [c.settings[key] for key in keys]
        measured = result['measured'][c.method]
        lines.append(
            [
                c.method,
                *(f'{x:g}' if isinstance(x, float) else str(x) for x in settings),
                '-' if c.score is None else f'{c.score:.4f}',
                f'{c.steps}' if c.ended else f'{c.steps}, ended',
                f'{c.parameters:,}',
                f'{c.flops:.3f}',
                f'{measured["inference"]:.2f}',
                f'{measured["training"]:.3f}',
            ]
        )
    return lines


def markdown_table(result: Mapping[str, Any]) -> str:
    """Return `table` as Markdown, methods as code."""
    head, *lines = table(result)
    rows = [head, ['---'] * len(head), *([f'`{row[0]}`', *row[1:]] for row in lines)]
    return '\n'.join(map(ranking.line, rows))


def markdown(result: Mapping[str, Any], members: str) -> str:
    """Return the report of a choice: `members` is the table of all members."""
    command = report.command('W', result['recommended']['member'])
    return '\n\n'.join(
        [
            f'# Recommended: `{result["recommended"]["method"]}`',
            result['reason'][0].upper() + result['reason'][1:] + '.',
            'To train it by itself, and for longer (W is this folder):\n\n'
            f'    {command} --config.training.steps=N',
            markdown_table(result),
            "FLOPs and time of inference are multiples of the backbone's with a head alone; "
            'seconds are of one member and of the machine that the sweep ran on.',
            f'## All members\n\n{members}',
        ]
    )
