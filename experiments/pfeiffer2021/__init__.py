"""Pfeiffer et al. (2021): adapters of other tasks, fused, help where a task has few examples.

`python -m experiments.pfeiffer2021 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/pfeiffer2021.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from adapters_jax import files
from configs.papers import pfeiffer2021 as recipe
from configs.papers import protocol
from experiments import fusion_heatmap
from experiments.papers.study import Cell, Finding, Paper, Results, points

_SOURCES = {'full': recipe.FULL_SOURCES.split('+'), 'small': recipe.SMALL_SOURCES.split('+')}
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
        few = [f'{task}@100' for task in protocol.SMALL_TASKS] if scale == 'small' else []
        targets = [*(s for s in sources if s in protocol.SMALL_TASKS), *few] if few else sources
        for task in dict.fromkeys([*sources, *few]):
            for way in ('adapter', 'full', 'head'):
                if way == 'adapter' or task in targets:
                    yield Cell(task, way, by if way == 'adapter' else ())
        for task in targets:
            own = task.partition('@')[0]
            fused = tuple(task if source == own else source for source in sources)
            yield Cell(task, 'fusion', (), 'adapter', fused)

    def examine(self, results: Results, runs: Path) -> dict[str, Any]:
        """Return how much of each adapter the fusions use, by layer (figure 5)."""
        found = {}
        for task in results.tasks('fusion'):
            row = results.best('fusion', task)
            workdir = runs / row.workdirs[0]
            lines = (workdir / f'predictions_{row.split}.jsonl').read_text('utf-8').splitlines()
            rows = [_fields(json.loads(line)) for line in lines[:_TEXTS]]
            names, weights = fusion_heatmap.mean_weights(workdir / 'adapter', rows)
            ((fusion, places),) = weights.items()
            order = sorted(places, key=lambda place: int(place.split('/')[0][6:]))
            found[task] = {
                'adapters': list(names[fusion]),
                'weights': [np.asarray(places[place]).tolist() for place in order],
            }
        return {'attention': found}

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return what the tables and figure 5 are said to show."""
        tasks = results.common('fusion', 'full')
        few = [task for task in tasks if '@' in task] or ['mrpc', 'rte']
        many = [task for task in tasks if task not in few]
        gap = results.score('adapter', many) - results.score('full', many)
        yield Finding(
            'single-task adapters are as good as full fine-tuning (held to be so here within one '
            'point)',
            'table 1',
            points(gap),
            gap >= -0.01,
        )
        for name, own, claim in (
            ('with few examples', few, 'fusion helps: 5.2 points on MRPC, 5.8 on RTE'),
            ('with many', many, 'it changes little: at most half a point'),
        ):
            gap = results.score('fusion', own) - results.score('adapter', own)
            yield Finding(
                f'{name} {claim}' + ' (held to be so here within one)' * (own is many),
                'table 1',
                f'{points(gap)} over ST-A',
                gap > 0 if own is few else abs(gap) <= 0.01,
            )
        used = results.examined['attention']
        own = {task: _own_share(task, found) for task, found in used.items()}
        first = 'tasks with many examples look at their own adapter more than those with few'
        yield Finding(
            first,
            'figure 5',
            ', '.join(f'{task}: {share:.2f}' for task, share in own.items()),
            np.mean([own[t] for t in many]) > np.mean([own[t] for t in few]),
        )

    def draw(self, results: Results, directory: Path) -> list[Path]:
        """Draw figure 5 for each fusion."""
        found = []
        for task, own in results.examined['attention'].items():
            places = {f'layer_{i}/feed_forward': np.array(w) for i, w in enumerate(own['weights'])}
            drawn = fusion_heatmap.draw({task: own['adapters']}, {task: places})
            path = directory / f'attention_{task.replace("@", "_")}.png'
            with files.atomic(path) as temporary:
                drawn.savefig(temporary, format='png')
            found.append(path)
        return found


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a text as `predict` reads them."""
    if 'text_b' in row:
        return {key: row[key] for key in ('text_a', 'text_b')}
    return {'text': row['text_a']}


def _own_share(task: str, found: dict[str, Any]) -> float:
    place = found['adapters'].index(task.partition('@')[0])
    return float(np.mean([weights[place] for weights in found['weights']]))
