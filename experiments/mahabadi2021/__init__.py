"""Karimi Mahabadi et al. (2021): adapters of Kronecker products need a tenth of the parameters.

`python -m experiments.mahabadi2021 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/mahabadi2021.py.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from adapters_jax.interop.backbones import load_backbone
from configs.papers import mahabadi2021 as recipe
from experiments.bench import memory, programs
from experiments.bench.timing import compare
from experiments.papers import figures
from experiments.papers.study import Cell, Finding, Paper, Results, points

TASKS = {'full': ('cola', 'sst2', 'mrpc', 'qqp', 'stsb', 'mnli', 'qnli', 'rte')}
TASKS['small'] = ('trec', 'cr')
_MEASURED = ('full', 'adapter', 'compacter', 'compacter++', 'bitfit')
_ROWS, _TOKENS, _ROUNDS = 16, 64, 7


class Mahabadi2021(Paper):
    """Table 1 and section 5.2."""

    name = 'mahabadi2021'
    title = (
        'Karimi Mahabadi et al. (2021), Compacter: Efficient Low-Rank Hypercomplex Adapter Layers'
    )
    titles: ClassVar = {
        'compacter': 'Compacter',
        'compacter++': 'Compacter++',
        'phm_adapter': 'PHM adapters',
        'adapter': 'Houlsby adapters',
        'pfeiffer': 'Pfeiffer adapters',
        'bitfit': 'BitFit',
        'full': 'full fine-tuning',
    }
    recipe = staticmethod(recipe.get_config)

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return all rows on all tasks."""
        for task in TASKS[scale]:
            for way in recipe.WAYS:
                yield Cell(task, way)

    def examine(self, results: Results, runs: Path) -> dict[str, Any]:
        """Return seconds and bytes of a step, as parts of those of full fine-tuning."""
        methods = {way: recipe.WAYS[way].method for way in _MEASURED}
        backbone = load_backbone('minilm')
        batch = programs.random_batch(_ROWS, _TOKENS, backbone.config.vocabulary)
        made = {
            way: programs.training(*programs.make(backbone, method), batch)
            for way, method in methods.items()
        }
        times = compare({way: program.call for way, program in made.items()}, _ROUNDS)
        held = {
            way: memory.measure(backbone.config, memory.Setting(method), _ROWS, _TOKENS)['peak']
            for way, method in methods.items()
        }
        return {
            'seconds': {way: times[way].over(times['full']).value for way in methods},
            'bytes': {way: held[way] / held['full'] for way in methods},
        }

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return what table 1 and section 5.2 are said to show."""
        tasks = results.common('compacter', 'full')
        for way, claim in (('compacter', '0.073'), ('compacter++', '0.047')):
            gap = results.score(way, tasks) - results.score('full', tasks)
            share = statistics.fmean(results.best(way, task).share for task in tasks)
            yield Finding(
                f'{self.titles[way]} is on a par with full fine-tuning, with {claim} % of the '
                'parameters (held to be so here within one point)',
                'table 1',
                f'{points(gap)} with {share:.2f} %',
                gap >= -0.01,
            )
        gap = results.score('compacter', tasks) - results.score('adapter', tasks)
        ratio = statistics.fmean(
            results.best('adapter', task).trained / results.best('compacter', task).trained
            for task in tasks
        )
        yield Finding(
            'Compacter is on a par with adapters of eleven times its size (within one point)',
            'table 1',
            f'{points(gap)}, {ratio:.1f} times',
            gap >= -0.01,
        )
        gap = results.score('compacter', tasks) - results.score('bitfit', tasks)
        yield Finding('Compacter beats BitFit, by 1.5 points', 'table 1', points(gap), gap > 0)
        for kind, claims in (
            ('seconds', {'compacter': -13.41, 'compacter++': -26.51, 'bitfit': -35.06}),
            ('bytes', {'compacter++': -41.94, 'bitfit': -64.2}),
        ):
            found = {way: 100 * (results.examined[kind][way] - 1) for way in claims}
            yield Finding(
                f'of full fine-tuning, {kind} of a step: '
                + ', '.join(f'{way} {value:+.1f} %' for way, value in claims.items()),
                'section 5.2',
                ', '.join(f'{way} {value:+.1f} %' for way, value in found.items()),
                all(value < 0 for value in found.values()),
            )

    def draw(self, results: Results, directory: Path) -> list[Path]:
        """Draw the scores over the trained parameters (figure 1)."""
        ways = [way for way in recipe.WAYS if way != 'full']
        return list(figures.sizes(self, results, ways, directory))
