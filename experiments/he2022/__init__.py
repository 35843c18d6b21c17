"""He et al. (2022): what sets adapters, prefixes and LoRA apart, and what combines them best.

`python -m experiments.he2022 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/he2022.py.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from configs.papers import he2022 as recipe
from experiments.papers import figures
from experiments.papers.study import Cell, Finding, Paper, Results, all_better, on_a_par

TASKS = {'full': ('mnli', 'sst2'), 'small': ('trec', 'cr')}


class He2022(Paper):
    """Table 2 and section 4: which form, which place, and the combination."""

    name = 'he2022'
    title = 'He et al. (2022), Towards a Unified View of Parameter-Efficient Transfer Learning'
    titles: ClassVar = {
        'mam': 'MAM: prefix, and parallel adapters at the feed-forward networks',
        'full': 'full fine-tuning',
        'bitfit': 'BitFit',
        'prefix': 'prefix tuning',
        'lora': 'LoRA at attention',
        'lora_ffn': 'LoRA at the feed-forward networks',
        'seq_attention': 'sequential adapters at attention',
        'seq_ffn': 'sequential adapters at the feed-forward networks',
        'par_attention': 'parallel adapters at attention',
        'par_ffn': 'parallel adapters at the feed-forward networks',
    }
    recipe = staticmethod(recipe.get_config)

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return all rows on all tasks."""
        for task in TASKS[scale]:
            for way in recipe.WAYS:
                yield Cell(task, way)

    def claims(self) -> Sequence[Callable[[Results], Iterator[Finding]]]:
        """Return what looks at table 2 and at section 4."""
        over = [functools.partial(_combined, way=way) for way in ('prefix', 'bitfit')]
        return _quality, *over, *(functools.partial(_design, claim=claim) for claim in _DESIGNS)

    def draw(self, results: Results, directory: Path) -> Iterator[Path]:
        """Draw the scores over the trained parameters (figure 2)."""
        ways = [way for way in recipe.WAYS if way != 'full']
        return figures.sizes(self, results, ways, directory)


def _quality(results: Results) -> Iterator[Finding]:
    published = '0.2 and 0.4 points less on MNLI and SST-2'
    yield on_a_par(results, 'mam', 'MAM is as good as full fine-tuning', published, 'table 2')


def _combined(results: Results, way: str) -> Iterator[Finding]:
    gap = results.gap('mam', way, results.common('mam', way))
    yield Finding(f'MAM beats {He2022.titles[way]}', 'table 2', str(gap), gap.better)


_DESIGNS = {
    'parallel adapters beat sequential ones': (
        'section 4.3',
        [('par_attention', 'seq_attention'), ('par_ffn', 'seq_ffn')],
    ),
    'changing the feed-forward networks is worth more than changing attention': (
        'section 4.4',
        [('par_ffn', 'par_attention'), ('seq_ffn', 'seq_attention'), ('lora_ffn', 'lora')],
    ),
}


def _design(results: Results, claim: str) -> Iterator[Finding]:
    where, pairs = _DESIGNS[claim]
    tasks = results.common(*dict.fromkeys(way for pair in pairs for way in pair))
    gaps = {pair: results.gap(*pair, tasks) for pair in pairs}
    told = ', '.join(f'{gap} ({a} against {b})' for (a, b), gap in gaps.items())
    yield Finding(claim, where, told, all_better(gaps.values()))
