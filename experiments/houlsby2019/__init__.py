"""Houlsby et al. (2019): a few per cent of the parameters are enough, of whatever size.

`python -m experiments.houlsby2019 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/houlsby2019.py.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from configs.papers import houlsby2019 as recipe
from configs.papers import protocol
from experiments.papers import figures
from experiments.papers.runner import score, trained_backbone
from experiments.papers.study import Cell, Finding, Paper, Results, on_a_par, some

GLUE = ('cola', 'sst2', 'mrpc', 'stsb', 'qqp', 'mnli', 'qnli', 'rte')
_ABLATED = {'full': ('mnli', 'cola'), 'small': ('trec', 'cr')}
_BY = {'adapters': recipe.SIZES, 'top_layers': recipe.LAYERS, 'init': recipe.SIGMA}


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
    versions = protocol.BOTH

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
        """Return the scores with the adapters of each span of layers taken out, first to last.

        They are those of one size that were drawn as the paper draws them, means over the seeds.
        """
        tasks = results.tasks('init')
        layers = trained_backbone(results, runs).config.dimensions.layers if tasks else 0
        return {'spans': {task: _spans(results, task, runs, layers) for task in tasks}}

    def claims(self) -> Sequence[Callable[[Results], Iterator[Finding]]]:
        """Return what looks at table 1, and at figures 3, 4 and 6."""
        return _quality, _norms, _sizes, _highest, _layers, _starts

    def draw(self, results: Results, directory: Path) -> Iterator[Path]:
        """Draw figures 4 and 6."""
        ways = ('adapters', 'top_layers', 'layer_norm')
        yield from figures.sizes(self, results, ways, directory)
        if results.examined['spans']:
            yield _draw_spans(results, directory / 'spans.png')
            yield _draw_starts(results, directory / 'starts.png')


def _spans(results: Results, task: str, runs: Path, layers: int) -> dict[str, Any]:
    (row,) = results.of('init', task, {recipe.SIGMA: recipe.PAPER_SIGMA})
    folders = [runs / workdir for workdir in row.workdirs]

    def mean(dropped: range) -> float:
        return statistics.fmean(score(own, row.split, row.metric, dropped) for own in folders)

    without = [
        [mean(range(first, last + 1)) if first <= last else None for last in range(layers)]
        for first in range(layers)
    ]
    return {'whole': mean(range(0)), 'without': without}


def _quality(results: Results) -> Iterator[Finding]:
    claim = 'adapters are as good as full fine-tuning'
    published = '0.4 points less, with 3.6 % of the parameters'
    yield on_a_par(results, 'adapters', claim, published, 'table 1')


def _norms(results: Results) -> Iterator[Finding]:
    tasks = results.common('layer_norm', 'adapters')
    gap = results.gap('adapters', 'layer_norm', tasks)
    claim = 'adapters are better than LayerNorms alone (in the paper by 3.5 to 4 points)'
    yield Finding(claim, 'section 3.6', str(gap), gap.better)


def _sizes(results: Results) -> Iterator[Finding]:
    tasks, sizes = results.common('adapters'), results.values('adapters', recipe.SIZES)
    means = {size: results.score('adapters', tasks, {recipe.SIZES: size}) for size in sizes}
    yield Finding(
        'the size hardly matters: mean scores of the sizes are within one point (in the paper '
        'within 0.5, of 8, 64 and 256)',
        'section 3.6',
        ', '.join(f'{size}: {100 * mean:.1f}' for size, mean in means.items()),
        max(means.values()) - min(means.values()) <= 0.01,
        tested=False,
    )


def _highest(results: Results) -> Iterator[Finding]:
    tasks = results.common('adapters', 'top_layers')
    size = {recipe.SIZES: results.values('adapters', recipe.SIZES)[0]}
    layers = {recipe.LAYERS: results.values('top_layers', recipe.LAYERS)[0]}
    gap = results.gap('adapters', 'top_layers', tasks, size, layers)
    few, many = (
        results.best(way, tasks[0], own).trained
        for way, own in (('adapters', size), ('top_layers', layers))
    )
    yield Finding(
        'with far fewer parameters, adapters beat training the highest layer',
        'figures 3 and 4',
        f'{gap}: {few:,} against {many:,} parameters',
        gap.better,
    )


def _layers(results: Results) -> Iterator[Finding]:
    spans = list(some(list(results.examined['spans'].values()), 'init'))
    layers = len(spans[0]['without'])

    def lost(first: int, last: int) -> float:
        """Return how much is lost without the adapters of these layers."""
        return statistics.fmean(own['whole'] - own['without'][first][last] for own in spans)

    single, whole = max(lost(i, i) for i in range(layers)), lost(0, layers - 1)
    yield Finding(
        'no single layer is needed: without the adapters of one at most 2 points are lost, without '
        'all of them more than 10 points are lost (in the paper the score falls to that of the '
        'majority class)',
        'figure 6, left',
        f'at most {100 * single:.1f} points, {100 * whole:.1f} without all',
        single <= 0.02 and whole > 0.1,
        tested=False,
    )
    half = layers // 2
    lower, upper = lost(0, half - 1), lost(half, layers - 1)
    yield Finding(
        'lower layers matter less than upper ones',
        'figure 6, left',
        f'{100 * lower:.1f} points are lost without the lower half, {100 * upper:.1f} without the '
        'upper',
        lower < upper,
        tested=False,
    )


def _starts(results: Results) -> Iterator[Finding]:
    tasks = results.common('init')
    means = {
        sigma: results.score('init', tasks, {recipe.SIGMA: sigma})
        for sigma in results.values('init', recipe.SIGMA)
    }
    small = [mean for sigma, mean in means.items() if sigma <= recipe.PAPER_SIGMA]
    above = [mean for sigma, mean in means.items() if sigma > recipe.PAPER_SIGMA]
    large = some(above, f'init with a sigma above {recipe.PAPER_SIGMA:g}')
    yield Finding(
        'scores are the same for a sigma of 1e-2 and below (here: within one point), and fall '
        'above it',
        'figure 6, right',
        ', '.join(f'{sigma:g}: {100 * mean:.1f}' for sigma, mean in means.items()),
        max(small) - min(small) <= 0.01 and max(large) < min(small),
        tested=False,
    )


def _draw_spans(results: Results, path: Path) -> Path:
    maps = {
        task: [
            [None if value is None else 100 * (value - own['whole']) for value in line]
            for line in own['without']
        ]
        for task, own in results.examined['spans'].items()
    }
    return figures.heat(maps, 'last layer', 'first layer', 'points, without their adapters', path)


def _draw_starts(results: Results, path: Path) -> Path:
    series = figures.over(results, 'init', recipe.SIGMA)
    return figures.lines(series, "sigma of the adapters' first values", 'score, %', path)
