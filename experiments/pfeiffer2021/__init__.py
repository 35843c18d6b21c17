"""Pfeiffer et al. (2021): adapters of other tasks, fused, help where a task has few examples.

`python -m experiments.pfeiffer2021 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/pfeiffer2021.py.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from adapters_jax import files
from adapters_jax.predict import read_lines
from configs.papers import pfeiffer2021 as recipe
from configs.papers import protocol
from experiments import fusion_heatmap
from experiments.papers.study import Cell, Finding, Gap, Paper, Results, some

_SOURCES = {'full': recipe.FULL_SOURCES.split('+'), 'small': recipe.SMALL_SOURCES.split('+')}
_SMALL_OF_GLUE = ('mrpc', 'rte')
_TEXTS = 200  # over which attention is averaged


class Pfeiffer2021(Paper):
    """Tables 1 and 2, and figure 5."""

    name = 'pfeiffer2021'
    title = (
        'Pfeiffer et al. (2021), AdapterFusion: Non-Destructive Task Composition for Transfer '
        'Learning'
    )
    titles: ClassVar = {
        'adapter': 'ST-A: a single-task adapter',
        'full': 'full fine-tuning',
        'head': 'the head alone',
        'fusion': 'AdapterFusion with ST-A',
    }
    recipe = staticmethod(recipe.get_config)

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return single-task adapters, then fusions; small tasks, at small scale, have @100."""
        sources = _SOURCES[scale]
        by = (recipe.SIZES,) if scale == 'full' else ()
        chosen = ((recipe.SIZES, recipe.FUSED_SIZE),) if by else ()
        few = [f'{task}@100' for task in protocol.SMALL_TASKS] if scale == 'small' else []
        targets = [*(s for s in sources if s in protocol.SMALL_TASKS), *few] if few else sources
        for task in dict.fromkeys([*sources, *few]):
            for way in ('adapter', 'full', 'head'):
                if way == 'adapter' or task in targets:
                    yield Cell(task, way, by if way == 'adapter' else ())
        for task in targets:
            own = task.partition('@')[0]
            fused = tuple(task if source == own else source for source in sources)
            yield Cell(task, 'fusion', (), 'adapter', fused, chosen)

    def examine(self, results: Results, runs: Path) -> dict[str, Any]:
        """Return how much of each adapter the fusions use, by layer (figure 5)."""
        found = {}
        for task in results.tasks('fusion'):
            row = results.best('fusion', task)
            workdir = runs / row.workdirs[0]
            told = read_lines(workdir / f'predictions_{row.split}.jsonl').values()
            rows = [_fields(one) for one in itertools.islice(told, _TEXTS)]
            names, weights = fusion_heatmap.mean_weights(workdir / 'adapter', rows)
            ((fusion, places),) = weights.items()
            order = sorted(places, key=lambda place: int(place.split('/')[0][6:]))
            found[task] = {
                'adapters': list(names[fusion]),
                'weights': [np.asarray(places[place]).tolist() for place in order],
            }
        return {'attention': found}

    def claims(self) -> Sequence[Callable[[Results], Iterator[Finding]]]:
        """Return what looks at the tables and at figure 5."""
        return _adapters, _fusion_of_few, _fusion_of_many, _attention

    def draw(self, results: Results, directory: Path) -> Iterator[Path]:
        """Draw figure 5 for each fusion."""
        for task, own in results.examined['attention'].items():
            places = {f'layer_{i}/feed_forward': np.array(w) for i, w in enumerate(own['weights'])}
            drawn = fusion_heatmap.draw({task: own['adapters']}, {task: places})
            path = directory / f'attention_{task.replace("@", "_")}.png'
            with files.atomic(path) as temporary:
                drawn.savefig(temporary, format='png')
            yield path


def _tasks(results: Results, few: bool, *ways: str) -> Sequence[str]:
    """Return the tasks with few examples, or the others, that these ways were trained on."""
    found = [t for t in results.common(*ways) if ('@' in t or t in _SMALL_OF_GLUE) == few]
    return some(found, ' and '.join(ways))


def _adapters(results: Results) -> Iterator[Finding]:
    gap = results.gap('adapter', 'full', _tasks(results, False, 'adapter', 'full'))
    yield Finding(
        'single-task adapters are as good as full fine-tuning, or less than a point below it',
        'table 1',
        str(gap),
        gap.above(-0.01),
    )


def _over_adapters(results: Results, few: bool) -> Gap:
    tasks = _tasks(results, few, 'fusion', 'adapter')
    fused = {recipe.SIZES: recipe.FUSED_SIZE} if results.scale == 'full' else None
    return results.gap('fusion', 'adapter', tasks, None, fused)


def _fusion_of_few(results: Results) -> Iterator[Finding]:
    gap = _over_adapters(results, few=True)
    claim = (
        'fusion helps where examples are few (in the paper by 5.1 points over ST-A on MRPC, 5.8 on '
        'RTE)'
    )
    yield Finding(claim, 'table 1', str(gap), gap.better)


def _fusion_of_many(results: Results) -> Iterator[Finding]:
    gap = _over_adapters(results, few=False)
    yield Finding(
        'where they are many it changes less than a point (in the paper at most half)',
        'table 1',
        str(gap),
        gap.within(0.01),
    )


def _attention(results: Results) -> Iterator[Finding]:
    shares = {t: _own_share(t, own) for t, own in results.examined['attention'].items()}
    few, many = (
        statistics.fmean(shares[task] for task in _tasks(results, own, 'fusion'))
        for own in (True, False)
    )
    yield Finding(
        'on average, tasks with many examples look at their own adapter more than those with few',
        'figure 5',
        f'many {many:.2f}, few {few:.2f} ('
        + ', '.join(f'{task}: {share:.2f}' for task, share in shares.items())
        + ')',
        many > few,
        tested=False,
    )


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a text as `predict` reads them."""
    if 'text_b' in row:
        return {key: row[key] for key in ('text_a', 'text_b')}
    return {'text': row['text_a']}


def _own_share(task: str, found: dict[str, Any]) -> float:
    place = found['adapters'].index(task.partition('@')[0])
    return statistics.fmean(weights[place] for weights in found['weights'])
