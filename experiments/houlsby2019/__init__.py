"""Houlsby et al. (2019): a few per cent of the parameters are enough, of whatever size.

`python -m experiments.houlsby2019 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/houlsby2019.py.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from adapters_jax.interop import adapter_folder
from configs.papers import houlsby2019 as recipe
from configs.papers import protocol
from experiments.papers import figures
from experiments.papers.runner import evaluation
from experiments.papers.study import Cell, Finding, Paper, Results, points, spread

GLUE = ('cola', 'sst2', 'mrpc', 'stsb', 'qqp', 'mnli', 'qnli', 'rte')
_ABLATED = {'full': ('mnli', 'cola'), 'small': ('trec', 'cr')}
_BY = {'adapters': recipe.SIZES, 'top_layers': 'method.layers', 'init': recipe.SIGMA}


class Houlsby2019(Paper):
    """Table 1 and figures 3, 4 and 6."""

    name = 'houlsby2019'
    title = 'Houlsby et al. (2019), Parameter-Efficient Transfer Learning for NLP'
    titles: ClassVar = {
        'adapters': 'Houlsby adapters',
        'adapters64': 'Houlsby adapters, one size',
        'full': 'full fine-tuning',
        'top_layers': 'the highest layers',
        'layer_norm': 'LayerNorms alone',
        'init': 'adapters drawn with sigma',
    }
    recipe = staticmethod(recipe.get_config)

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return all rows on all tasks; those of the ablations on the tasks that the paper has."""
        for task in protocol.SMALL_TASKS if scale == 'small' else GLUE:
            for way in recipe.WAYS:
                if way == 'init' and task not in _ABLATED[scale]:
                    continue
                if way == 'adapters64' and scale == 'small':  # it is among `adapters`
                    continue
                yield Cell(task, way, (_BY[way],) if way in _BY else ())

    def examine(self, results: Results, runs: Path) -> dict[str, Any]:
        """Return the scores with the adapters of each span of layers taken out, first to last."""
        found = {}
        for task in results.tasks('init'):
            row = max(results.of('adapters', task), key=lambda row: row.trained)
            workdir = runs / row.workdirs[0]
            layers = adapter_folder.load(workdir / 'adapter').backbone['layers']
            whole = evaluation(workdir, row.split)['metrics'][row.metric]
            spans = [
                [
                    evaluation(workdir, row.split, range(first, last + 1))['metrics'][row.metric]
                    if first <= last
                    else None
                    for last in range(layers)
                ]
                for first in range(layers)
            ]
            found[task] = {'whole': whole, 'without': spans}
        return {'spans': found}

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return what tables and figures are said to show."""
        yield from self._quality(results)
        yield from self._sizes(results)
        if results.examined['spans']:
            yield from self._spans(results)
            yield self._starts(results)

    def _quality(self, results: Results) -> Iterator[Finding]:
        tasks = results.common('adapters', 'full')
        gap = results.score('adapters', tasks) - results.score('full', tasks)
        share = statistics.fmean(results.best('adapters', task).share for task in tasks)
        yield Finding(
            'adapters are within 0.4 points of full fine-tuning with 3.6 % of the parameters '
            '(held to be so here within one point)',
            'table 1',
            f'{points(gap)} with {share:.1f} %',
            gap >= -0.01,
        )
        gap = results.score('layer_norm', tasks) - results.score('adapters', tasks)
        yield Finding(
            'LayerNorms alone are not enough: 3.5 to 4 points less',
            'section 3.6',
            points(gap),
            gap < -0.01,
        )

    def _sizes(self, results: Results) -> Iterator[Finding]:
        tasks = results.common('adapters', 'top_layers')
        sizes = results.values('adapters', recipe.SIZES)
        means = [results.score('adapters', tasks, **{recipe.SIZES: size}) for size in sizes]
        yield Finding(
            'the size hardly matters: 0.5 points between the mean scores of 8, 64 and 256 '
            '(held to be so here within two)',
            'section 3.6',
            ', '.join(f'{size}: {100 * m:.1f}' for size, m in zip(sizes, means, strict=True)),
            max(means) - min(means) <= 0.02,
        )
        small = results.score('adapters', tasks, **{recipe.SIZES: sizes[0]})
        row = results.of('adapters', tasks[0], **{recipe.SIZES: sizes[0]})[0]
        lowest = results.values('top_layers', 'method.layers')[0]
        top = results.score('top_layers', tasks, **{'method.layers': lowest})
        trained = results.of('top_layers', tasks[0], **{'method.layers': lowest})[0].trained
        yield Finding(
            'with as few parameters, or far fewer, adapters beat training the highest layers',
            'figures 3 and 4',
            f'{points(small - top)}: size {sizes[0]} with {row.trained:,}, against {lowest} '
            f'layer(s) with {trained:,}',
            small > top,
        )

    def _spans(self, results: Results) -> Iterator[Finding]:
        spans = results.examined['spans'].values()
        single = [
            own['without'][layer][layer] - own['whole']
            for own in spans
            for layer in range(len(own['without']))
        ]
        whole = statistics.fmean(own['without'][0][-1] - own['whole'] for own in spans)
        yield Finding(
            'no single layer is needed: at most 2 points are lost without the adapters of one, '
            'much more without all',
            'figure 6, left',
            f'{points(min(single))} at worst, {points(whole)} without all',
            min(single) >= -0.02 and whole < 5 * min(single),
        )
        lower, upper = (
            statistics.fmean(own['without'][first][last] - own['whole'] for own in spans)
            for first, last in _halves(next(iter(spans))['without'])
        )
        yield Finding(
            'lower layers matter less than upper ones',
            'figure 6, left',
            f'{points(lower)} without the lower half, {points(upper)} without the upper',
            lower > upper,
        )

    def _starts(self, results: Results) -> Finding:
        tasks = results.tasks('init')
        means = {
            sigma: results.score('init', tasks, **{recipe.SIGMA: sigma})
            for sigma in results.values('init', recipe.SIGMA)
        }
        small = [mean for sigma, mean in means.items() if sigma <= 0.01]
        return Finding(
            'scores are the same for a sigma of 1e-2 and below, and fall above it',
            'figure 6, right',
            ', '.join(f'{sigma:g}: {100 * mean:.1f}' for sigma, mean in means.items()),
            max(small) - min(small) <= 0.02 and means[1.0] < min(small),
        )

    def draw(self, results: Results, directory: Path) -> list[Path]:
        """Draw figures 4 and 6."""
        ways = ('adapters', 'top_layers', 'layer_norm')
        drawn = list(figures.sizes(self, results, ways, directory))
        if results.examined['spans']:
            drawn.append(_draw_spans(results, directory / 'spans.png'))
            drawn.append(_draw_starts(results, directory / 'starts.png'))
        return drawn


def _halves(table: list[list[float | None]]) -> tuple[tuple[int, int], tuple[int, int]]:
    half = len(table) // 2
    return (0, half - 1), (half, len(table) - 1)


def _draw_spans(results: Results, path: Path) -> Path:
    maps = {
        task: [
            [None if value is None else 100 * (value - own['whole']) for value in line]
            for line in own['without']
        ]
        for task, own in results.examined['spans'].items()
    }
    return figures.heat(maps, 'last layer', 'first layer', 'points lost without them', path)


def _draw_starts(results: Results, path: Path) -> Path:
    series = {
        task: [
            (row.settings[recipe.SIGMA], 100 * row.mean, 100 * spread(row.scores))
            for row in results.of('init', task)
        ]
        for task in results.tasks('init')
    }
    return figures.lines(series, "sigma of the adapters' first values", 'score, %', path)
