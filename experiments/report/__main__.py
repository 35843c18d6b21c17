"""Finished runs -> a table with mean and deviation over seeds, significance, and figures.

    python -m experiments.report --runs=DIR[,DIR...] --output=OUT [--split=test] [--metric=NAME]
        [--baseline=method=full] [--ignore=data.dir,...]

Every folder in or below DIR that `train` and `evaluate` have written is a run. Runs whose configs
differ in the seed alone are one row, named by the settings that differ between rows; `--ignore`
leaves settings out of that. With `--baseline`, settings that one row alone has (`key=value;...`),
each other row is tested against it. Writes OUT/report.md, .csv, .json, and the figures scores.png,
sizes.png and courses.png.
"""

import csv
import dataclasses
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from adapters_jax import entry, files
from experiments.output import commits, write
from experiments.report import figures
from experiments.report.runs import Group, Run, find, groups, seconds_of
from experiments.report.significance import compare


def choose_metric(runs: Sequence[Run], metric: str) -> str:
    """Return the metric to report: the given one, or that by which the runs chose their best step.

    Raises:
        ValueError: not all runs have it, or they chose by different ones, or have no metrics.
    """
    names = {metric} if metric else {run.summary['primary'] for run in runs}
    if len(names) > 1:
        raise ValueError(f'the runs chose by {", ".join(sorted(names))}; name one by --metric')
    (name,) = names
    for run in runs:
        if not run.metrics:
            raise ValueError(
                f'{run.workdir} has no metrics of {run.split}, whose examples have no labels; '
                'report another --split'
            )
        if name not in run.metrics:
            known = ', '.join(run.metrics)
            raise ValueError(f'{run.workdir} has no metric {name!r} of {run.split}, but {known}')
    return name


def choose_baseline(found: Sequence[Group], baseline: str) -> Group | None:
    """Return the group that has the settings `key=value;...`; None where nothing is asked for.

    Raises:
        ValueError: no such settings, or none, or several, have them.
    """
    if not baseline:
        return None
    parts = [part for part in baseline.split(';') if part]
    if wrong := [part for part in parts if '=' not in part]:
        raise ValueError(
            f'--baseline={baseline} has {wrong[0]!r}; expected key=value;key=value, such as '
            'method=full'
        )
    wanted = dict(part.split('=', 1) for part in parts)
    fitting = [
        group
        for group in found
        if all(str(group.settings.get(key)) == value for key, value in wanted.items())
    ]
    if len(fitting) != 1:
        names = '; '.join(group.name for group in found)
        raise ValueError(f'--baseline={baseline} fits {len(fitting)} rows of: {names}')
    return fitting[0]


def row(group: Group, metric: str, base: Group | None) -> dict[str, Any]:
    """Return the numbers of a group as JSON values."""
    values = group.values(metric)
    summary = group.runs[0].summary
    difference = None if base in (None, group) else compare(group, base, metric)
    return {
        'settings': group.settings,
        'seeds': [run.seed for run in group.runs],
        'mean': statistics.mean(values),
        'deviation': statistics.stdev(values) if len(values) > 1 else None,
        'values': values,
        'trainable_parameters': summary['trainable_parameters'],
        'total_parameters': summary['total_parameters'],
        'seconds': statistics.mean(seconds_of(run.summary) for run in group.runs),
        'difference': None if difference is None else dataclasses.asdict(difference),
        'hardware': sorted({run.summary['hardware'] for run in group.runs}),
        'commits': sorted({run.summary['commit'] for run in group.runs}),
    }


def cells(result: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the table, the head first."""
    keys = list(result['rows'][0]['settings'])
    head = [*keys, result['metric'], 'seeds', 'trained parameters', 'seconds']
    tested = any(row['difference'] for row in result['rows'])
    lines = [head + ['difference', 'p, seeds', 'p, examples'] * tested]
    for own in result['rows']:
        share = 100 * own['trainable_parameters'] / own['total_parameters']
        spread = '' if own['deviation'] is None else f' ± {own["deviation"]:.4f}'
        line = [str(own['settings'][key]) for key in keys]
        line += [f'{own["mean"]:.4f}{spread}', str(len(own['seeds']))]
        digits = '.1f' if share >= 0.1 else '.1g'
        line += [f'{own["trainable_parameters"]:,} ({share:{digits}} %)', f'{own["seconds"]:.0f}']
        lines.append(line + _tests(own['difference']) * tested)
    return lines


def _tests(difference: dict[str, Any] | None) -> list[str]:
    if difference is None:
        return ['', '', '']
    text = f'{difference["mean"]:+.4f}'
    if difference['low'] is not None:
        text += f' ({difference["low"]:+.4f} to {difference["high"]:+.4f})'
    found = (difference['by_seeds'], difference['by_examples'])
    return [text, *('' if p is None else f'{p:.2g}' for p in found)]


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it where it comes from."""
    head, *lines = cells(result)
    hardware = '; '.join(sorted({kind for own in result['rows'] for kind in own['hardware']}))
    made = commits(name for own in result['rows'] for name in own['commits'])
    note = f'{result["metric"]} on {result["split"]}, mean ± s.d. over seeds; seconds of training '
    note += f'on {hardware}; commits {made}.'
    if result['baseline']:
        note += (
            f' Differences are to {result["baseline"]}, over common seeds, with the 95 % interval '
            "of their mean; p by seeds is of Student's paired test, p by examples of McNemar's "
            'exact test over the examples, each of the side that had it right with more seeds.'
            f'{_not_tested(result["rows"])}'
        )
    rows = [head, ['---'] * len(head), *lines]
    return '\n'.join([*(f'| {" | ".join(map(_escaped, line))} |' for line in rows), '', note])


def _not_tested(rows: Sequence[dict[str, Any]]) -> str:
    other = [row['difference'] for row in rows if row['difference'] is not None]
    count = sum(not difference['same_examples'] for difference in other)
    told = f' Of {count} of {len(other)} rows there is no p by examples: '
    return f'{told}the runs were not tested on the same examples in the same order.' * bool(count)


def _escaped(cell: str) -> str:
    """Return a cell as Markdown; methods that act together have a | between them."""
    return cell.replace('|', '\\|')


def main(
    runs: Sequence[str], output: str, split: str, metric: str, baseline: str, ignore: Sequence[str]
) -> None:
    """Read, test, draw and write."""
    read = find(runs, split)
    name, found = choose_metric(read, metric), groups(read, ignore)
    base = choose_baseline(found, baseline)
    directory = files.make_directory(output)
    result = {
        'metric': name,
        'split': split,
        'baseline': base.name if base else '',
        'rows': [row(group, name, base) for group in found],
    }
    write(directory, 'report', result, render)
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(cells(result))
    files.write_text(directory / 'report.csv', text.getvalue())
    _draw(found, name, directory)


def _draw(found: Sequence[Group], metric: str, directory: Path) -> None:
    figures.scores(found, metric, directory / 'scores.png')
    figures.sizes(found, metric, directory / 'sizes.png')
    primary = found[0].runs[0].summary['primary']
    drawn = figures.courses(found, primary, directory / 'courses.png')
    print(f'wrote {directory}/: report.csv, scores.png, sizes.png{", courses.png" * drawn}')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'runs': flags.DEFINE_list('runs', None, 'Folders with finished runs, in or below them.'),
        'output': flags.DEFINE_string('output', None, 'Directory of the report.'),
        'split': flags.DEFINE_string('split', 'test', 'Which evaluation is reported.'),
        'metric': flags.DEFINE_string('metric', '', 'Of it, which metric; default: the primary.'),
        'baseline': flags.DEFINE_string(
            'baseline', '', 'Settings of the row to test against, as key=value;key=value.'
        ),
        'ignore': flags.DEFINE_list('ignore', [], 'Settings that make no row of their own.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
