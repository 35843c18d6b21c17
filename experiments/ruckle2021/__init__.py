"""Rücklé et al. (2021): the lowest adapters cost time and are worth little.

`python -m experiments.ruckle2021 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/ruckle2021.py; times are those
of experiments/bench/adapter_drop.py.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from adapters_jax.interop import adapter_folder
from adapters_jax.interop.backbones import load_backbone
from configs.papers import ruckle2021 as recipe
from experiments.bench import adapter_drop
from experiments.papers import figures
from experiments.papers.runner import evaluation
from experiments.papers.study import Cell, Finding, Paper, Results, spread

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
        scores = {
            way: {task: _dropped(results, way, task, runs) for task in results.tasks(way)}
            for way in ('adapter', 'robust')
        }
        timed = adapter_drop.measure('pfeiffer', load_backbone('minilm'), _ROWS, _TOKENS, _ROUNDS)
        times = {mode: [line['ratio']['value'] for line in own] for mode, own in timed.items()}
        return {'scores': scores, 'times': times}

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return what figure 2 and the tables are said to show."""
        scores, times = results.examined['scores'], results.examined['times']
        tasks = results.tasks('robust')
        whole = statistics.fmean(scores['adapter'][task][0] for task in tasks)
        layers = len(times['training']) - 1
        half = layers * 5 // 12  # the paper's 5 of 12
        plain, robust = (
            statistics.fmean(scores[way][task][half] for task in tasks)
            for way in ('adapter', 'robust')
        )
        left = f'[{",".join(map(str, range(half)))}]'
        own = [row for row in results.of('specialised') if _text(row.settings) == left]
        special = statistics.fmean(row.mean for row in own)
        dropped = f'{half} of {layers} layers'
        for name, kept, share in (('specialised', special, 97.1), ('robust', robust, 95.4)):
            yield Finding(
                f'without the lowest 5 of 12 adapters {name} AdapterDrop keeps {share} % of the '
                'score (held to be so here from two points less on)',
                'figure 2',
                f'{100 * kept / whole:.1f} %, {dropped}',
                100 * kept / whole >= share - 2,
            )
        yield Finding(
            'adapters that were not trained for it lose more',
            'figure 2',
            f'{100 * plain / whole:.1f} %, {dropped}',
            plain < min(special, robust),
        )
        for mode, claim in (('training', '26 % faster'), ('inference', '21 to 42 % faster')):
            faster = 100 * (1 / times[mode][half] - 1)
            what = 'a step of training' if mode == 'training' else 'inference for several tasks'
            yield Finding(
                f'{what} is {claim} with 5 of 12 layers shared',
                'tables 3 and 5',
                f'{faster:.0f} %, {dropped}' + ', one task' * (mode == 'inference'),
                faster > 10 if mode == 'training' else None,
            )

    def draw(self, results: Results, directory: Path) -> list[Path]:
        """Draw figure 2: scores over the number of dropped layers."""
        found = []
        for task in results.tasks('robust'):
            series = {
                self.titles[way]: [
                    (number, 100 * score, 0.0)
                    for number, score in enumerate(results.examined['scores'][way][task])
                ]
                for way in ('adapter', 'robust')
            }
            series['trained for the number'] = [
                (len(_layers(row.settings)), 100 * row.mean, 100 * spread(row.scores))
                for row in results.of('specialised', task)
            ]
            path = directory / f'dropped_{task}.png'
            label = 'lowest layers without adapters'
            found.append(figures.lines(series, label, f'{task}, %', path, scale='linear'))
        return found


def _dropped(results: Results, way: str, task: str, runs: Path) -> list[float]:
    row = results.best(way, task)
    folders = [runs / workdir for workdir in row.workdirs]
    layers = adapter_folder.load(folders[0] / 'adapter').backbone['layers']
    return [
        statistics.fmean(
            evaluation(folder, row.split, count)['metrics'][row.metric] for folder in folders
        )
        for count in range(layers + 1)
    ]


def _layers(settings: dict[str, Any]) -> list[str]:
    return _text(settings).strip('[]').split(',')


def _text(settings: dict[str, Any]) -> str:
    value = settings[recipe.LEFT_OUT]
    return value if isinstance(value, str) else f'[{",".join(map(str, value))}]'
