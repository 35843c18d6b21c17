"""Karimi Mahabadi et al. (2021): adapters of Kronecker products need a tenth of the parameters.

`python -m experiments.mahabadi2021 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/mahabadi2021.py.
"""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from configs.papers import mahabadi2021 as recipe
from configs.papers import protocol
from experiments.bench import memory, programs
from experiments.bench.timing import compare
from experiments.papers import figures
from experiments.papers.runner import trained_backbone
from experiments.papers.study import Cell, Finding, Paper, Results, on_a_par

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
    versions = protocol.BOTH

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return all rows on all tasks."""
        for task in TASKS[scale]:
            for way in recipe.WAYS:
                yield Cell(task, way)

    def examine(self, results: Results, runs: Path) -> dict[str, Any]:
        """Return seconds and bytes of a step, as parts of those of full fine-tuning."""
        methods = {way: recipe.WAYS[way].method for way in _MEASURED}
        backbone = trained_backbone(results, runs)
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

    def claims(self) -> Sequence[Callable[[Results], Iterator[Finding]]]:
        """Return what looks at table 1 and at section 5.2."""
        shares = (('compacter', 0.073), ('compacter++', 0.047))
        on_a_par = [functools.partial(_quality, way=way, share=share) for way, share in shares]
        return *on_a_par, _adapters, _biases, _costs

    def draw(self, results: Results, directory: Path) -> Iterator[Path]:
        """Draw the scores over the trained parameters (figure 1)."""
        ways = [way for way in recipe.WAYS if way != 'full']
        return figures.sizes(self, results, ways, directory)


def _quality(results: Results, way: str, share: float) -> Iterator[Finding]:
    claim = f'{Mahabadi2021.titles[way]} is on a par with full fine-tuning'
    yield on_a_par(results, way, claim, f'with {share} % of the parameters', 'table 1')


def _adapters(results: Results) -> Iterator[Finding]:
    tasks = results.common('compacter', 'adapter')
    gap = results.gap('compacter', 'adapter', tasks)
    times = statistics.fmean(
        results.best('adapter', task).trained / results.best('compacter', task).trained
        for task in tasks
    )
    yield Finding(
        'Compacter is on a par with adapters of many times its size, or less than a point below '
        'them (in the paper eleven times)',
        'table 1',
        f'{gap}; {times:.1f} times, heads and LayerNorms included',
        gap.above(-0.01),
    )


def _biases(results: Results) -> Iterator[Finding]:
    gap = results.gap('compacter', 'bitfit', results.common('compacter', 'bitfit'))
    claim = 'Compacter beats BitFit (in the paper by 1.5 points)'
    yield Finding(claim, 'table 1', str(gap), gap.better)


def _costs(results: Results) -> Iterator[Finding]:
    for kind, claims in (
        ('seconds', {'compacter': -13.41, 'compacter++': -26.51, 'bitfit': -35.06}),
        ('bytes', {'compacter++': -41.94, 'bitfit': -64.2}),
    ):
        found = {way: 100 * (results.examined[kind][way] - 1) for way in claims}
        told = [
            ', '.join(f'{way} {value:+.1f} %' for way, value in values.items())
            for values in (claims, found)
        ]
        yield Finding(
            f'a step needs fewer {kind} than that of full fine-tuning (in the paper: {told[0]})',
            'section 5.2',
            told[1],
            all(value < 0 for value in found.values()),
            tested=False,
        )
