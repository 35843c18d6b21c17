"""Hu et al. (2022): low-rank updates of two matrices are as good as training all of them.

`python -m experiments.hu2022 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/hu2022.py.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from configs.papers import hu2022 as recipe
from configs.papers import protocol
from experiments.papers import figures
from experiments.papers.study import Cell, Finding, Paper, Results, points, spread

_RANK = 'method.r'
_BY = {'ranks': (_RANK,), 'matrices': ('method',)}
_ABLATED = {'full': ('mnli',), 'small': ('trec', 'cr')}


class Hu2022(Paper):
    """Tables 2, 5 and 6."""

    name = 'hu2022'
    title = 'Hu et al. (2022), LoRA: Low-Rank Adaptation of Large Language Models'
    titles: ClassVar = {
        'lora': 'LoRA, r = 8, query and value',
        'full': 'full fine-tuning',
        'bitfit': 'BitFit',
        'adapter': 'adapters after the feed-forward networks',
        'ranks': 'LoRA, query and value',
        'matrices': 'LoRA',
    }
    recipe = staticmethod(recipe.get_config)

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return all rows on all tasks; at full scale some begin with the adapter of MNLI."""
        for task in protocol.SMALL_TASKS if scale == 'small' else recipe.SETTINGS:
            for way in recipe.WAYS:
                if way in _BY and task not in _ABLATED[scale]:
                    continue
                begins = scale == 'full' and way == 'lora' and task in recipe.FROM_IT
                sources = (recipe.START,) if begins else ()
                yield Cell(task, way, _BY.get(way, ()), 'lora' if begins else '', sources)

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return what the tables are said to show."""
        tasks = results.common('lora', 'full')
        gap = results.score('lora', tasks) - results.score('full', tasks)
        share = statistics.fmean(results.best('lora', task).share for task in tasks)
        yield Finding(
            'LoRA is as good as full fine-tuning, 87.2 to 86.4, with 0.24 % of the parameters '
            '(held to be so here from one point below on)',
            'table 2',
            f'{points(gap)} with {share:.2f} %',
            gap >= -0.01,
        )
        for other, claim in (('bitfit', '2.0'), ('adapter', '2.8')):
            gap = results.score('lora', tasks) - results.score(other, tasks)
            yield Finding(
                f'LoRA beats {self.titles[other]} by {claim} points',
                'table 2',
                points(gap),
                gap > 0,
            )
        if results.of('ranks'):
            yield self._ranks(results)
        if results.of('matrices'):
            yield self._matrices(results)

    def _ranks(self, results: Results) -> Finding:
        means = {rank: results.score('ranks', **{_RANK: rank}) for rank in _ranks(results)}
        return Finding(
            'a very small rank is enough: r = 1 and r = 64 are within half a point '
            '(held to be so here within one)',
            'table 6',
            ', '.join(f'{rank}: {100 * mean:.1f}' for rank, mean in means.items()),
            abs(means[1] - means[64]) <= 0.01,
        )

    def _matrices(self, results: Results) -> Finding:
        chosen = results.values('matrices', 'method')
        means = {text: results.score('matrices', method=text) for text in chosen}
        both, alone = means[_lora('[q,v]')], [means[_lora(f'[{m}]')] for m in 'qk']
        return Finding(
            'of the same number of parameters, query and value together are worth more than '
            'query or key alone',
            'table 5',
            ', '.join(f'{_letters(text)}: {100 * mean:.1f}' for text, mean in means.items()),
            both > max(alone),
        )

    def draw(self, results: Results, directory: Path) -> list[Path]:
        """Draw scores over ranks."""
        if not results.of('ranks'):
            return []
        series = {
            task: [
                (row.settings[_RANK], 100 * row.mean, 100 * spread(row.scores))
                for row in results.of('ranks', task)
            ]
            for task in results.tasks('ranks')
        }
        return [figures.lines(series, 'rank', 'score, %', directory / 'ranks.png')]


def _ranks(results: Results) -> list[int]:
    return results.values('ranks', _RANK)


def _lora(matrices: str) -> str:
    (text,) = (m for m in recipe.MATRICES if m.startswith(matrices + ','))
    return f'lora[attn_matrices={text},alpha=8]'


def _letters(text: str) -> str:
    return text.partition('[attn_matrices=[')[2].partition(']')[0].replace(',', '+')
