"""A protocol's report: ours beside what was published, and whether its findings hold here."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.papers.study import Finding, Results, Row, spread, told_share

EXPECTED = 'expected.json'
VERDICTS = {True: 'confirmed', False: '**not confirmed**', None: 'undecided'}


def read_expected(paper: str) -> dict[str, Any]:
    """Return the published numbers of a paper: `rows`, by way and task, in per cent."""
    path = Path(__file__).parents[1] / paper / EXPECTED
    return json.loads(path.read_text('utf-8'))


def to_json(results: Results, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return rows, findings and what was examined as JSON values."""
    return {
        'rows': [dataclasses.asdict(row) for row in results.rows],
        'examined': dict(results.examined),
        'findings': [dataclasses.asdict(finding) for finding in findings],
    }


def from_json(values: Mapping[str, Any]) -> tuple[Results, list[Finding]]:
    """Return what `to_json` was given."""
    rows = [Row(**row) for row in values['rows']]
    findings = [Finding(**own) for own in values['findings']]
    return Results(rows, values['examined'], values['scale']), findings


def extended(before: Mapping[str, Any], results: Results) -> Results:
    """Return results with the rows that an earlier report has beside them, which come first.

    Raises:
        ValueError: a report of another scale.
    """
    known, _ = from_json(before)
    if known.scale != results.scale:
        raise ValueError(
            f'the report that is there is of scale {known.scale!r}, not {results.scale!r}; set '
            'another --output'
        )
    new = {(row.task, row.way) for row in results.rows}
    rows = [row for row in known.rows if (row.task, row.way) not in new] + results.rows
    return Results(rows, _merged(known.examined, results.examined), results.scale)


def _merged(old: Any, new: Any) -> Any:
    """Return what was examined then and now; now counts where both say something."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown report: scores, findings, and how they were made."""
    results, findings = from_json(result)
    expected = result['expected']
    note = (
        f'Scores in per cent, mean ± s.d. of {_seeds(results)} seeds, on the splits named; rates '
        'and what else a row leaves open are those with the best mean on the validation split. '
        'Trained parameters are those of the first task, its head included. Differences of scores '
        'are in points, with the 95 % interval of their mean over tasks and seeds (Student); what '
        f'the interval leaves open is undecided. {result["settings"]} All runs together: '
        f'{minutes(results):.0f} minutes of training on {_all(results, "machines")}; commits '
        f'{_all(results, "commits")}. Made by `{result["command"]}`. Published, in brackets where '
        f'a row and task are the same: {expected["source"]}.'
    )
    means = [f'{row} {own["mean"]}' for row, own in expected['rows'].items() if 'mean' in own]
    note += f' Means: {", ".join(means)}.' if means else ''
    note += f' Also: {expected["others"]}.' if 'others' in expected else ''
    drawn = [f'![{name.removesuffix(".png")}]({name})' for name in result['figures']]
    parts = [f'**{result["title"]}**', scores(result), told(findings), note, *drawn]
    return '\n\n'.join(parts)


def minutes(results: Results) -> float:
    """Return the time that all runs took together, a cell's once."""
    return sum(row.spent for row in results.rows) / 60


def _all(results: Results, what: str) -> str:
    found = sorted({name for row in results.rows for name in getattr(row, what)})
    return ', '.join(f'`{name[:7]}`' if what == 'commits' else name for name in found)


def _seeds(results: Results) -> str:
    counts = sorted({len(row.seeds) for row in results.rows})
    return ' or '.join(map(str, counts))


def scores(result: Mapping[str, Any]) -> str:
    """Return the table of scores, a line for each row of the paper and a column for each task."""
    results, _ = from_json(result)
    tasks = list(dict.fromkeys(row.task for row in results.rows))
    splits = {row.task: f'{row.metric}, {row.split}' for row in results.rows}
    lines = {}
    for row in results.rows:
        key = row.way, json.dumps(row.settings)
        lines.setdefault(key, {})[row.task] = row
    head = ['row', 'trained', *(f'{task} ({splits[task]})' for task in tasks), 'mean']
    table = [head, ['---'] * len(head)]
    for rows in lines.values():
        table.append(_line(rows, tasks, result))
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in table)


def _line(rows: Mapping[str, Row], tasks: Sequence[str], result: Mapping[str, Any]) -> list[str]:
    first = next(iter(rows.values()))
    own = ', '.join(f'{k.removeprefix("method.")}={_short(v)}' for k, v in first.settings.items())
    name = result['titles'].get(first.way, first.way) + (f', {own}' if own else '')
    same = result['expected'].get('settings', {}).get(first.way, {}) == first.settings
    published = result['expected']['rows'].get(first.way, {}) if same else {}
    cells = [name, f'{first.trained:,} ({told_share(first.share)})']
    for task in tasks:
        cells.append(_score(rows[task]) if task in rows else '')
        if task in rows and task in published:
            cells[-1] += f' [{published[task]}]'
    whole = len(rows) == len(tasks)
    cells.append(f'{100 * statistics.fmean(row.mean for row in rows.values()):.1f}' * whole)
    return cells


def _short(value: Any) -> str:
    return f'{value:g}' if isinstance(value, int | float) else f'`{value}`'


def _score(row: Row) -> str:
    deviation = f' ± {100 * spread(row.scores):.1f}' if len(row.scores) > 1 else ''
    lost = f', {row.diverged} of all runs diverged' * bool(row.diverged)
    return f'{100 * row.mean:.1f}{deviation}{lost}'


def told(findings: Sequence[Finding]) -> str:
    """Return the table of findings."""
    table = [['the paper finds', 'where', 'here', ''], ['---'] * 4]
    for own in findings:
        table.append([own.claim, own.where, own.found, VERDICTS[own.holds]])
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in table)
