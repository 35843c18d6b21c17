"""He et al. (2022): what sets adapters, prefixes and LoRA apart, and what combines them best.

`python -m experiments.he2022 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/he2022.py.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from configs.papers import he2022 as recipe
from experiments.papers import figures
from experiments.papers.study import Cell, Finding, Paper, Results, points

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

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return what section 4 is said to show."""
        tasks = results.common('mam', 'full')
        gap = results.score('mam', tasks) - results.score('full', tasks)
        share = statistics.fmean(results.best('mam', task).share for task in tasks)
        yield Finding(
            'MAM is as good as full fine-tuning (0.2 and 0.4 points less on MNLI and SST-2; held '
            'to be so here within one point)',
            'table 2',
            f'{points(gap)} with {share:.1f} %, its reparametrisation included',
            gap >= -0.01,
        )
        for way in ('prefix', 'bitfit'):
            gap = results.score('mam', tasks) - results.score(way, tasks)
            yield Finding(f'MAM beats {self.titles[way]}', 'table 2', points(gap), gap > 0)
        pairs = {
            'parallel adapters beat sequential ones': [
                ('par_attention', 'seq_attention'),
                ('par_ffn', 'seq_ffn'),
            ],
            'changing the feed-forward networks is worth more than changing attention': [
                ('par_ffn', 'par_attention'),
                ('seq_ffn', 'seq_attention'),
                ('lora_ffn', 'lora'),
            ],
        }
        for claim, compared in pairs.items():
            gaps = [results.score(a, tasks) - results.score(b, tasks) for a, b in compared]
            told = ', '.join(
                f'{points(gap)} ({a} against {b})'
                for gap, (a, b) in zip(gaps, compared, strict=True)
            )
            yield Finding(claim, 'sections 4.3 and 4.4', told, statistics.fmean(gaps) > 0)

    def draw(self, results: Results, directory: Path) -> list[Path]:
        """Draw the scores over the trained parameters (figure 2)."""
        ways = [way for way in recipe.WAYS if way != 'full']
        return list(figures.sizes(self, results, ways, directory))
