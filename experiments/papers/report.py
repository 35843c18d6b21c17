"""A protocol's report: ours beside what was published, and whether its findings hold here."""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.training import grid
from experiments import edges
from experiments.output import commits
from experiments.papers.study import Finding, Paper, Results, Row, Table, spread, told_share

EXPECTED = 'expected.json'
VERDICTS = {True: 'confirmed', False: '**not confirmed**', None: 'undecided'}


def folder(paper: str, scale: str, version: str) -> str:
    """Return the name of a report's folder."""
    return f'{paper}_{scale}' + f'_{version}' * (version != 'paper')


def read_expected(paper: str) -> dict[str, Any]:
    """Return the published numbers of a paper.

    `rows` are scores by way and task, in per cent, and `trained` the trained parameters by way: of
    the row with these `settings`, or of that which has in each task the value of the setting in
    `best_of` which is best on the validation split.
    """
    path = Path(__file__).parents[1] / paper / EXPECTED
    return json.loads(path.read_text('utf-8'))


def judged(
    paper: Paper,
    results: Results,
    directory: Path,
    version: str = 'paper',
    options: Sequence[str] = (),
) -> dict[str, Any]:
    """Return all of a report that follows from its rows, and draw its figures.

    `version` and `options` are those that the rows were trained with.
    """
    protocol: dict[str, list[str]] = {}
    for cell in paper.cells(results.scale):
        protocol.setdefault(cell.task, []).append(cell.way)
    return {
        'titles': dict(paper.titles),
        'expected': read_expected(paper.name),
        'protocol': protocol,
        'figures': [path.name for path in paper.draw(results, directory)],
        'tables': [dataclasses.asdict(table) for table in paper.tables(results)],
        **to_json(results, list(paper.findings(results))),
        'unanswered': paper.unanswered(results),
        'edges': _edges(paper, results, version, options),
    }


def _edges(paper: Paper, results: Results, version: str, options: Sequence[str]) -> str:
    """Return how often the largest or smallest value that was tried is the one that was chosen."""
    choices: dict[str, list[edges.Choice]] = {}
    for cell in paper.cells(results.scale):
        rows = results.of(cell.way, cell.task)
        texts = paper.config(cell, results.scale, version, options).sweep.grid if rows else ()
        tried = {axis.key: axis.values for axis in map(grid.parse_axis, texts)}
        for key, value in ((key, value) for row in rows for key, value in row.chosen.items()):
            if isinstance(value, int | float):
                choices.setdefault(key, []).append((value, [*map(float, tried[key])]))
    return ' '.join(filter(None, (edges.told(own, f'`{key}`') for key, own in choices.items())))


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


def extended(
    before: Mapping[str, Any],
    results: Results,
    version: str = 'paper',
    options: Sequence[str] = (),
) -> Results:
    """Return results with the rows that an earlier report has beside them, which come first.

    Raises:
        ValueError: a report of another scale or source, or of other options.
    """
    check_same(before, results.scale, version, options)
    known, _ = from_json(before)
    new = {(row.task, row.way) for row in results.rows}
    rows = [row for row in known.rows if (row.task, row.way) not in new] + results.rows
    return Results(rows, _merged(known.examined, results.examined), results.scale)


def check_same(before: Mapping[str, Any], scale: str, version: str, options: Sequence[str]) -> None:
    """Refuse to extend a report by rows that were made in another way.

    Raises:
        ValueError: a report of another scale or source, or of other options.
    """
    if before.get('source', 'paper') != version:
        raise ValueError(
            f'the report that is there is of source {before["source"]!r}, not {version!r}; set '
            'another --output'
        )
    if (earlier := before.get('options', [])) != list(options):
        raise ValueError(
            f'the report that is there is of {_told_options(earlier)}, not '
            f'{_told_options(options)}; set another --output'
        )
    if before['scale'] != scale:
        raise ValueError(
            f'the report that is there is of scale {before["scale"]!r}, not {scale!r}; set '
            'another --output'
        )


def _told_options(options: Sequence[str]) -> str:
    return ' '.join(f'--option={option}' for option in options) or 'no --option'


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
        'are in points, with the 95 % interval of their mean over seeds, of these tasks and these '
        'test texts (Student; of several tasks by Welch and Satterthwaite); what the interval '
        'leaves open is undecided. Where there is no test, single timings or means decide. '
        f'{result["settings"]}{_whose(result)} '
        f'Tasks: {told_tasks(result)}.{_open(result)}{_sentence(result.get("edges", ""))} '
        'All runs together: '
        f'{minutes(results):.0f} minutes of training on {_machines(results)}; commits '
        f'{commits(name for row in results.rows for name in row.commits)}. '
        f'Made by `{result["command"]}`. Published, in brackets where '
        'a row and task are the same (trained parameters are those of the backbone of the paper): '
        f'{expected["source"]}.'
    )
    means = [f'{row} {own["mean"]}' for row, own in expected['rows'].items() if 'mean' in own]
    note += f' Means: {", ".join(means)}.' if means else ''
    note += f' Also: {expected["others"]}.' if 'others' in expected else ''
    drawn = [f'![{name.removesuffix(".png")}]({name})' for name in result['figures']]
    tables = [_table(Table(**own)) for own in result['tables']]
    parts = [f'**{result["title"]}**', scores(result), told(findings), *tables, note, *drawn]
    return '\n\n'.join(parts)


def _whose(result: Mapping[str, Any]) -> str:
    code, options = result['source'] != 'paper', result.get('options', [])
    told = ' Settings are those of the published code (`--source=code`).' * code
    instead = ', in place of what is said above' * bool(result['settings'])
    return told + f' All runs have `{_told_options(options)}`{instead}.' * bool(options)


def _sentence(text: str) -> str:
    return f' {text}' * bool(text)


def told_tasks(result: Mapping[str, Any]) -> str:
    """Return which tasks of its protocol a report has: 'trec (of trec, cr, mpqa)'.

    In part are those of which some rows were trained alone, as adapters that others begin with are.
    """
    trained = {(row['task'], row['way']) for row in result['rows']}
    whole, part = [], []
    for task, ways in result['protocol'].items():
        found = sum((task, way) in trained for way in ways)
        (whole if found == len(ways) else part if found else []).append(task)
    if len(whole) == len(result['protocol']):
        return f'{", ".join(whole)} (all)'
    told = ', '.join(whole) + '; ' * bool(whole and part)
    told += f'in part {", ".join(part)}' * bool(part)
    return f'{told} (of {", ".join(result["protocol"])})'


def _open(result: Mapping[str, Any]) -> str:
    """Return how many claims ask for what was not trained."""
    count = len(result['unanswered'])
    return f' {count} more of the claims ask for rows that were not trained.' * bool(count)


def minutes(results: Results) -> float:
    """Return the time that all runs took together, a cell's once."""
    return sum(row.spent for row in results.rows) / 60


def _machines(results: Results) -> str:
    return ', '.join(sorted({name for row in results.rows for name in row.machines}))


def _seeds(results: Results) -> str:
    counts = sorted({len(row.seeds) for row in results.rows})
    return ' or '.join(map(str, counts))


def scores(result: Mapping[str, Any]) -> str:
    """Return the table of scores, a line for each row of the paper and a column for each task."""
    results, _ = from_json(result)
    tasks = list(dict.fromkeys(row.task for row in results.rows))
    splits = {row.task: f'{row.metric}, {row.split}' for row in results.rows}
    head = ['row', 'trained', *(f'{task} ({splits[task]})' for task in tasks), 'mean']
    lines = [
        _line(name, rows, tasks, published) for name, rows, published in _named(results, result)
    ]
    return _table(Table(head, lines, ''))


def _named(
    results: Results, result: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Row], dict[str, Any]]]:
    """Return each line's name, its rows by task, and what was published of it."""
    expected = result['expected']
    for way in dict.fromkeys(row.way for row in results.rows):
        title, best_of = result['titles'].get(way, way), expected.get('best_of', {}).get(way)
        same: dict[str, dict[str, Row]] = {}
        for row in results.of(way):
            same.setdefault(json.dumps(row.settings), {})[row.task] = row
        for rows in same.values():
            own = next(iter(rows.values())).settings
            meant = not best_of and expected.get('settings', {}).get(way, {}) == own
            told = [title, *(f'{_option(k)}={_short(v)}' for k, v in own.items())]
            yield ', '.join(told), rows, _published(expected, way) if meant else {}
        if best_of:
            best = {task: results.best(way, task) for task in results.tasks(way)}
            name = f'{title}, the best {_option(best_of)} in each task'
            yield name, best, _published(expected, way)


def _published(expected: Mapping[str, Any], way: str) -> dict[str, Any]:
    """Return the published scores of a way, its trained parameters, and the tasks of its mean."""
    tasks = {task for row in expected['rows'].values() for task in row} - {'mean'}
    trained = expected.get('trained', {}).get(way, '')
    return {'tasks': tasks, 'trained': trained, 'scores': expected['rows'].get(way, {})}


def _line(
    name: str, rows: Mapping[str, Row], tasks: Sequence[str], published: Mapping[str, Any]
) -> list[str]:
    first, theirs = next(iter(rows.values())), published.get('scores', {})
    trained = f'{first.trained:,} ({told_share(first.share)})'
    cells = [name, trained + _bracketed(published.get('trained'))]
    for task in tasks:
        cells.append(_score(rows[task]) + _bracketed(theirs.get(task)) if task in rows else '')
    if len(rows) < len(tasks):
        return [*cells, '']
    mean = f'{100 * statistics.fmean(row.mean for row in rows.values()):.1f}'
    # A mean over other tasks would stand beside ours as if it were the same.
    same = published.get('tasks') == set(tasks)
    return [*cells, mean + _bracketed(theirs.get('mean') if same else None)]


def _bracketed(published: float | str | None) -> str:
    return f' [{published}]' if published else ''


def _option(key: str) -> str:
    return key.removeprefix('method.')


def _short(value: Any) -> str:
    return f'{value:g}' if isinstance(value, int | float) else f'`{value}`'


def _score(row: Row) -> str:
    deviation = f' ± {100 * spread(row.scores):.1f}' if len(row.scores) > 1 else ''
    lost = f', {row.diverged} of all runs diverged' * bool(row.diverged)
    return f'{100 * row.mean:.1f}{deviation}{lost}'


def told(findings: Sequence[Finding]) -> str:
    """Return the table of findings."""
    lines = [[own.claim, own.where, own.found, verdict(own)] for own in findings]
    return _table(Table(['the paper finds', 'where', 'here', ''], lines, ''))


def verdict(finding: Finding) -> str:
    """Return whether a finding holds, and whether a test says so."""
    return VERDICTS[finding.holds] + ', without a test' * (not finding.tested)


def _table(table: Table) -> str:
    lines = [table.head, ['---'] * len(table.head), *table.lines]
    told = '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)
    return f'{told}\n\n{table.note}' if table.note else told
