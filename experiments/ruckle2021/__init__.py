"""Rücklé et al. (2021): the lowest adapters cost time and are worth little.

`python -m experiments.ruckle2021 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/ruckle2021.py; times are those
of experiments/bench/adapter_drop.py.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from configs.papers import ruckle2021 as recipe
from experiments.bench import adapter_drop
from experiments.papers import figures
from experiments.papers.runner import score, trained_backbone
from experiments.papers.study import Cell, Finding, Paper, Results, Row, Table, some, spread

TASKS = {'full': ('cola', 'sst2', 'mrpc', 'stsb', 'qqp', 'mnli', 'qnli', 'rte')}
TASKS['small'] = ('trec', 'cr')
_ROWS, _TOKENS, _ROUNDS = 16, 64, 5


class Ruckle2021(Paper):
    """Figure 2 and tables 3 and 5."""

    name = 'ruckle2021'
    title = 'Rücklé et al. (2021), AdapterDrop: On the Efficiency of Adapters in Transformers'
    titles: ClassVar = {
        'adapter': 'Pfeiffer adapters in all layers',
        'full': 'full fine-tuning',
        'specialised': 'without the lowest',
        'robust': 'AdapterDrop, robust',
    }
    recipe = staticmethod(recipe.get_config)

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return all rows on all tasks."""
        for task in TASKS[scale]:
            for way in recipe.WAYS:
                yield Cell(task, way, (recipe.LEFT_OUT,) if way == 'specialised' else ())

    def examine(self, results: Results, runs: Path) -> dict[str, Any]:
        """Return scores with 0, 1, ... layers dropped, and the times of a step and a forward pass.

        The scores are the means over seeds of the adapters trained plainly and robustly.
        """
        backbone = trained_backbone(results, runs)
        counts = range(backbone.config.dimensions.layers + 1)
        scores = {
            way: {task: _dropped(results, way, task, runs, counts) for task in results.tasks(way)}
            for way in ('adapter', 'robust')
        }
        timed = adapter_drop.measure('pfeiffer', backbone, _ROWS, _TOKENS, _ROUNDS)
        times = {mode: [line['ratio']['value'] for line in own] for mode, own in timed.items()}
        return {'scores': scores, 'times': times}

    def claims(self) -> Sequence[Callable[[Results], Iterator[Finding]]]:
        """Return what looks at figure 2 and at the tables."""
        return _scores, _times

    def draw(self, results: Results, directory: Path) -> Iterator[Path]:
        """Draw figure 2, scores over the number of dropped layers, and scores over times."""
        for task in results.tasks('robust'):
            series = {
                self.titles[way]: [
                    (number, 100 * score, 0.0)
                    for number, score in enumerate(results.examined['scores'][way][task])
                ]
                for way in ('adapter', 'robust')
            }
            series['trained for the number'] = [
                (len(_left_out(row)), 100 * row.mean, 100 * spread(row.scores))
                for row in results.of('specialised', task)
            ]
            path = directory / f'dropped_{task}.png'
            label = 'lowest layers without adapters'
            yield figures.lines(series, label, f'{task}, %', path, scale='linear')
        if results.of('specialised'):
            yield _draw_speeds(results, directory / 'speeds.png')

    def tables(self, results: Results) -> Iterator[Table]:
        """Return what is gained in time beside what is lost in score, by dropped layers."""
        tasks = [t for t in results.tasks('robust') if t in results.tasks('specialised')]
        if tasks:
            yield _speeds(results, tasks)


def _speeds(results: Results, tasks: Sequence[str]) -> Table:
    """Return the table of speeds and mean scores."""
    times, scores = results.examined['times'], results.examined['scores']

    def mean(way: str, number: int) -> str:
        return f'{100 * statistics.fmean(scores[way][task][number] for task in tasks):.1f}'

    lines = [
        [
            str(number),
            *(f'{100 * (1 / times[mode][number] - 1):.0f} %' for mode in ('training', 'inference')),
            _own_mean(results, tasks, number),
            mean('robust', number),
            mean('adapter', number),
        ]
        for number in range(len(times['training']))
    ]
    told = [f'{name}, %' for name in ('trained for the number', 'robust', 'trained for none')]
    return Table(
        ['lowest layers without adapters', 'a step is faster by', 'inference by', *told],
        lines,
        f'Speed and score of AdapterDrop: mean scores on {" and ".join(tasks)}. Faster than with '
        f'adapters in all layers, {_ROWS} texts of {_TOKENS} tokens; a faster step is that of '
        'adapters trained for the number, the others gain at inference (robust ones, in training, '
        'as much as is drawn).',
    )


def _own_mean(results: Results, tasks: Sequence[str], number: int) -> str:
    """Return the mean score of adapters trained without so many layers, '' where there are none."""
    rows = [row for task in tasks for row in _without(results, task, number)]
    return f'{100 * statistics.fmean(row.mean for row in rows):.1f}' if rows else ''


def _without(results: Results, task: str, number: int) -> list[Row]:
    """Return the rows of a task that were trained with so many layers left out."""
    if not number:
        return results.of('adapter', task)
    return [row for row in results.of('specialised', task) if len(_left_out(row)) == number]


def _draw_speeds(results: Results, path: Path) -> Path:
    times = results.examined['times']['training']
    series = {
        task: [
            (round(100 * times[number]), 100 * row.mean, 100 * spread(row.scores))
            for number in range(len(times))
            for row in _without(results, task, number)
        ]
        for task in results.tasks('specialised')
    }
    label = (
        'time of a step of training, % of that with adapters in all layers;\n'
        'from the right: without them in the lowest 0, 1, 2, ...'
    )
    return figures.lines(series, label, 'score, %', path, scale='linear')


def _paper_share(layers: int) -> int:
    """Return as many of these layers as 5 are of the paper's 12."""
    return layers * 5 // 12


def _scores(results: Results) -> Iterator[Finding]:
    scores, tasks = results.examined['scores'], results.common('adapter', 'robust', 'specialised')
    layers = len(scores['robust'][tasks[0]]) - 1
    count = _paper_share(layers)
    plain, robust = (
        statistics.fmean(scores[way][task][count] for task in tasks)
        for way in ('adapter', 'robust')
    )
    own = some([row for row in results.of('specialised') if len(_left_out(row)) == count], 'it')
    special = statistics.fmean(row.mean for row in own)
    whole = statistics.fmean(scores['adapter'][task][0] for task in tasks)
    for name, kept, share in (('specialised', special, 97.1), ('robust', robust, 95.4)):
        yield Finding(
            f'without the lowest 5 of 12 adapters {name} AdapterDrop keeps {share} % of the score, '
            'or more',
            'figure 2',
            f'{100 * kept / whole:.1f} % without {count} of {layers}',
            100 * kept / whole >= share,
            tested=False,
        )
    yield Finding(
        'adapters that were not trained for it lose more',
        'figure 2',
        f'{100 * plain / whole:.1f} % without {count} of {layers}',
        plain < min(special, robust),
        tested=False,
    )


def _times(results: Results) -> Iterator[Finding]:
    times = results.examined['times']
    layers = len(times['training']) - 1
    count = _paper_share(layers)
    step = 100 * (1 / times['training'][count] - 1)
    claim = (
        'a step of training is more than 10 % faster without the lowest 5 of 12 (in the paper 26 %)'
    )
    found = f'{step:.0f} % without {count} of {layers} layers'
    yield Finding(claim, 'table 5', found, step > 10, tested=False)
    slower = 100 * (1 / times['inference'][layers] - 1)  # than without any adapter
    claim = 'adapters make inference less than 10 % slower (in the paper 4 to 6 %)'
    yield Finding(claim, 'section 3.3', f'{slower:.0f} %', slower < 10, tested=False)


def _dropped(
    results: Results, way: str, task: str, runs: Path, counts: Iterable[int]
) -> list[float]:
    row = results.best(way, task)
    folders = [runs / workdir for workdir in row.workdirs]
    return [
        statistics.fmean(score(folder, row.split, row.metric, count) for folder in folders)
        for count in counts
    ]


def _left_out(row: Row) -> Sequence[int]:
    """Return the layers without adapters of a row that was trained so."""
    value = row.settings[recipe.LEFT_OUT]
    return json.loads(value) if isinstance(value, str) else value
