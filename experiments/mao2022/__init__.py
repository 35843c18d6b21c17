"""Mao et al. (2022): methods that are gated together are better than each, above all with few data.

`python -m experiments.mao2022 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/mao2022.py.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from configs.papers import mao2022 as recipe
from configs.papers import protocol
from experiments.papers import figures
from experiments.papers.study import Cell, Finding, Paper, Results, gap_of, paired, some, spread

GLUE = ('sst2', 'mrpc', 'cola', 'rte', 'qnli', 'stsb', 'mnli', 'qqp')
PARTS = ('adapter', 'prefix', 'lora')
_FEW = {'full': (100, 500, 1000), 'small': (100,)}


class Mao2022(Paper):
    """Tables 1 and 2."""

    name = 'mao2022'
    title = (
        'Mao et al. (2022), UniPELT: A Unified Framework for Parameter-Efficient Language Model '
        'Tuning'
    )
    titles: ClassVar = {
        'unipelt': 'UniPELT (adapter, prefix, LoRA)',
        'unipelt_ap': 'UniPELT (adapter, prefix)',
        'adapter': 'adapters',
        'prefix': 'prefix tuning',
        'lora': 'LoRA',
        'bitfit': 'BitFit',
        'full': 'full fine-tuning',
    }
    recipe = staticmethod(recipe.get_config)

    def cells(self, scale: str) -> Iterator[Cell]:
        """Return all rows on all tasks, with few examples and with all (or 1,000) of them."""
        tasks = protocol.SMALL_TASKS if scale == 'small' else GLUE
        for count in (*_FEW[scale], None):
            for task in tasks:
                for way in recipe.WAYS:
                    yield Cell(f'{task}@{count}' if count else task, way)

    def claims(self) -> Sequence[Callable[[Results], Iterator[Finding]]]:
        """Return what looks at the tables."""
        over_full = [functools.partial(_full, few=few) for few in (True, False)]
        return _few, _many, *over_full

    def draw(self, results: Results, directory: Path) -> Iterator[Path]:
        """Draw the scores over the number of examples, where there are several numbers."""
        for name in dict.fromkeys(task.partition('@')[0] for task in results.tasks('unipelt')):
            series = {
                self.titles[way]: [
                    (count, 100 * row.mean, 100 * spread(row.scores))
                    for row in results.of(way)
                    if row.task.partition('@')[0] == name
                    and (count := _examples(row.task, results.scale))
                ]
                for way in recipe.WAYS
            }
            if max(map(len, series.values())) < 2:
                continue
            path = directory / f'examples_{name}.png'
            yield figures.lines(series, 'training examples', f'{name}, %', path)


def _examples(task: str, scale: str) -> int:
    """Return the number of examples that a task is trained with; 0: all that there are."""
    whole = protocol.SMALL_EXAMPLES if scale == 'small' else 0
    return int(task.partition('@')[2] or whole)


def _tasks(results: Results, few: bool) -> Sequence[str]:
    found = [task for task in results.common('unipelt', *PARTS) if ('@' in task) == few]
    return some(found, 'unipelt')


def _best_part(
    results: Results, tasks: Sequence[str], when: str, published: str, where: str
) -> Finding:
    part = max(PARTS, key=lambda way: results.validation(way, tasks))
    gap = results.gap('unipelt', part, tasks)
    said = f'with {when} examples UniPELT beats the best of its parts (in the paper {published})'
    found = f'{gap} over {Mao2022.titles[part]}, the best on validation'
    return Finding(said, where, found, gap.better)


def _few(results: Results) -> Iterator[Finding]:
    tasks = _tasks(results, few=True)
    yield _best_part(results, tasks, 'few', 'by 1 to 4 points', 'table 1')
    gap = gap_of([_over_best(results, task) for task in tasks])
    yield Finding(
        'it is above the best of its parts on each task, the upper bound of choosing among them',
        'table 1',
        str(gap),
        gap.better,
    )


def _over_best(results: Results, task: str) -> list[float]:
    """Return by how much it is better, for each seed, than that part which is best on the test."""
    best = max((results.best(way, task) for way in PARTS), key=lambda row: row.mean)
    return paired(results.best('unipelt', task), best)


def _many(results: Results) -> Iterator[Finding]:
    tasks = _tasks(results, few=False)
    yield _best_part(results, tasks, 'all', '83.5 to 83.0', 'table 2')


def _full(results: Results, few: bool) -> Iterator[Finding]:
    tasks = [task for task in _tasks(results, few) if task in results.tasks('full')]
    gap = results.gap('unipelt', 'full', tasks)
    claim = f'with {"few" if few else "all"} examples it beats full fine-tuning'
    yield Finding(claim, 'tables 1 and 2', str(gap), gap.better)
