"""The members of a sweep in order of merit, as rows of JSON values and as tables."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SEED = 'seed'
_EARLY = ('pruned', 'diverged')  # how the states begin of members that ended before their end


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one member: the score is that of its best step on the validation split."""

    name: str
    settings: dict[str, Any]
    score: float | None
    best_step: int
    steps: int
    state: str


def ended_whole(state: str) -> bool:
    """Tell whether a member of whose end this is said was trained to the end."""
    return not state.startswith(_EARLY)


def rank(rows: Sequence[Row], higher_is_better: bool) -> list[Row]:
    """Return the rows of those trained to the end, of the others, and of those without a score.

    Each from the best to the worst.
    """
    score = merit(lambda row: row.score, higher_is_better)
    return sorted(rows, key=lambda r: (r.score is None, not ended_whole(r.state), score(r)))


def over_seeds(rows: Sequence[Row], higher_is_better: bool) -> list[dict[str, Any]]:
    """Return, for each setting, mean and standard deviation over its seeds, the best mean first.

    They are of the members trained to the end. Settings that have none come last, with those of the
    members that came furthest: scores of different steps have no mean. One score has no deviation.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(_setting(row)), []).append(row)
    found = [_summarise(group) for group in groups.values()]
    mean = merit(lambda group: group['mean'], higher_is_better)
    return sorted(found, key=lambda group: (not group['whole'], mean(group)))


def _setting(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.settings.items() if key != SEED}


def _summarise(group: Sequence[Row]) -> dict[str, Any]:
    scored = [row for row in group if row.score is not None]
    whole = [row for row in scored if ended_whole(row.state)]
    last = max((row.steps for row in scored), default=0)
    scores = [row.score for row in whole or [row for row in scored if row.steps == last]]
    return {
        'settings': _setting(group[0]),
        'mean': statistics.fmean(scores) if scores else None,
        'deviation': statistics.stdev(scores) if len(scores) > 1 else None,
        'scores': scores,
        'members': [row.name for row in group],
        'whole': len(whole),
        **{state: sum(row.state.startswith(state) for row in group) for state in _EARLY},
    }


def merit(score: Callable[[Any], float | None], higher_is_better: bool) -> Callable[[Any], float]:
    """Return a key to sort by, from the best to the worst; what has no score comes last."""
    sign = -1 if higher_is_better else 1

    def key(item: Any) -> float:
        value = score(item)
        return math.inf if value is None or math.isnan(value) else sign * value

    return key


def markdown(rows: Sequence[Row], metric: str) -> str:
    """Return a Markdown table of the members."""
    keys = list(rows[0].settings)
    lines = [line([*keys, metric, 'best step', 'steps', 'state', 'member'])]
    lines.append(line(['---'] * (len(keys) + 5)))
    for row in rows:
        settings = [_setting_text(row.settings[key]) for key in keys]
        facts = [
            _score_text(row.score),
            str(row.best_step),
            str(row.steps),
            row.state,
            f'`{row.name}`',
        ]
        lines.append(line([*settings, *facts]))
    return '\n'.join(lines) + '\n'


def line(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    # An HTML entity would be shown as such where a cell is code.
    escaped = [cell.replace('|', r'\|') for cell in cells]
    return f'| {" | ".join(escaped)} |'


def text(groups: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Return what `over_seeds` found as aligned columns."""
    keys = list(groups[0]['settings'])
    table = [[*keys, metric, 's.d.', 'runs', *_EARLY]]
    for group in groups:
        settings = [_setting_text(group['settings'][key]) for key in keys]
        numbers = [_score_text(group['mean']), _score_text(group['deviation'])]
        counts = [len(group['members']), *(group[state] for state in _EARLY)]
        table.append([*settings, *numbers, *map(str, counts)])
    return columns(table)


def columns(table: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return '\n'.join(
        '  ' + '  '.join(f'{cell:<{width}}' for cell, width in zip(cells, widths, strict=True))
        for cells in table
    )


def _setting_text(value: Any) -> str:
    return f'{value:g}' if isinstance(value, float) else str(value)


def _score_text(value: float | None) -> str:
    return '-' if value is None else f'{value:.4f}'
