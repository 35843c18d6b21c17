"""Hu et al. (2022): low-rank updates of two matrices are as good as training all of them.

`python -m experiments.hu2022 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/hu2022.py.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from configs.papers import hu2022 as recipe
from configs.papers import protocol
from experiments.papers import figures
from experiments.papers.study import Cell, Finding, Paper, Results, all_better, on_a_par

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
    versions = protocol.BOTH

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return all rows on all tasks; at full scale some begin with the adapter of MNLI."""
        for task in protocol.SMALL_TASKS if scale == 'small' else recipe.SETTINGS:
            for way in recipe.WAYS:
                if way in _BY and task not in _ABLATED[scale]:
                    continue
                begins = scale == 'full' and way == 'lora' and task in recipe.FROM_IT
                sources = (recipe.START,) if begins else ()
                yield Cell(task, way, _BY.get(way, ()), 'lora' if begins else '', sources)

    def claims(self) -> Sequence[Callable[[Results], Iterator[Finding]]]:
        """Return what looks at the tables."""
        others = (('bitfit', 2.0), ('adapter', 2.8))
        beaten = [functools.partial(_other, other=way, published=gap) for way, gap in others]
        return _quality, *beaten, _ranks, _matrices

    def draw(self, results: Results, directory: Path) -> Iterator[Path]:
        """Draw scores over ranks."""
        if results.of('ranks'):
            series = figures.over(results, 'ranks', _RANK)
            yield figures.lines(series, 'rank', 'score, %', directory / 'ranks.png')


def _quality(results: Results) -> Iterator[Finding]:
    published = '87.2 to 86.4, with 0.24 % of the parameters'
    yield on_a_par(results, 'lora', 'LoRA is as good as full fine-tuning', published, 'table 2')


def _other(results: Results, other: str, published: float) -> Iterator[Finding]:
    gap = results.gap('lora', other, results.common('lora', other))
    claim = f'LoRA beats {Hu2022.titles[other]} (in the paper by {published} points)'
    yield Finding(claim, 'table 2', str(gap), gap.better)


def _ranks(results: Results) -> Iterator[Finding]:
    tasks, ranks = results.common('ranks'), results.values('ranks', _RANK)
    means = {rank: results.score('ranks', tasks, {_RANK: rank}) for rank in ranks}
    gap = results.gap('ranks', 'ranks', tasks, {_RANK: ranks[0]}, {_RANK: ranks[-1]})
    told = ', '.join(f'{rank}: {100 * mean:.1f}' for rank, mean in means.items())
    yield Finding(
        'a very small rank is enough: the smallest is less than a point below the largest (in the '
        'paper r = 1 is no worse than r = 64)',
        'table 6',
        f'{told}; {gap}',
        gap.above(-0.01),
    )


def _matrices(results: Results) -> Iterator[Finding]:
    tasks, chosen = results.common('matrices'), results.values('matrices', 'method')
    means = {text: results.score('matrices', tasks, {'method': text}) for text in chosen}
    told = ', '.join(f'{_letters(text)}: {100 * mean:.1f}' for text, mean in means.items())
    both = {'method': _of(chosen, '[q,v]')}
    gaps = {
        letter: results.gap(
            'matrices', 'matrices', tasks, both, {'method': _of(chosen, f'[{letter}]')}
        )
        for letter in 'qk'
    }
    beside = ', '.join(f'{gap} to {letter}' for letter, gap in gaps.items())
    yield Finding(
        'of the same number of parameters, query and value together are worth more than query or '
        'key alone',
        'table 5',
        f'{told}; {beside}',
        all_better(gaps.values()),
    )


def _of(chosen: Sequence[str], matrices: str) -> str:
    """Return the method of these matrices; alpha depends on the recipe's source."""
    (text,) = (method for method in chosen if f'attn_matrices={matrices},' in method)
    return text


def _letters(text: str) -> str:
    return text.partition('[attn_matrices=[')[2].partition(']')[0].replace(',', '+')
