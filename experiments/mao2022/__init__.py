"""Mao et al. (2022): methods that are gated together are better than each, above all with few data.

`python -m experiments.mao2022 --scale=small --data=DATA --output=DIR`; see
experiments/papers/command.py. The rows are those of configs/papers/mao2022.py.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from configs.papers import mao2022 as recipe
from configs.papers import protocol
from experiments.papers import figures
from experiments.papers.study import Cell, Finding, Paper, Results, points, spread

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

    def findings(self, results: Results) -> Iterator[Finding]:
        """Return what the tables are said to show."""
        few = [task for task in results.tasks('unipelt') if task.endswith('@100')]
        many = [task for task in results.tasks('unipelt') if '@' not in task]
        if few:
            yield from _better(results, few, 'with 100 examples', 'table 1')
        if many:
            yield from _better(results, many, 'with all examples', 'table 2')
            best = [max(results.best(way, task).mean for way in PARTS) for task in many]
            gap = results.score('unipelt', many) - sum(best) / len(best)
            yield Finding(
                'UniPELT is above the best of its parts on each task, by 0.5 points on average',
                'table 2',
                points(gap),
                gap > 0,
            )

    def draw(self, results: Results, directory: Path) -> list[Path]:
        """Draw the scores over the number of examples."""
        found = []
        names = dict.fromkeys(task.partition('@')[0] for task in results.tasks('unipelt'))
        for name in names:
            series = {
                self.titles[way]: [
                    (_examples(row.task), 100 * row.mean, 100 * spread(row.scores))
                    for row in results.of(way)
                    if row.task.partition('@')[0] == name
                ]
                for way in recipe.WAYS
            }
            path = directory / f'examples_{name}.png'
            found.append(figures.lines(series, 'training examples', f'{name}, %', path))
        return found


def _better(results: Results, tasks: Sequence[str], when: str, where: str) -> Iterator[Finding]:
    own = results.score('unipelt', tasks)
    parts = {way: results.score(way, tasks) for way in PARTS}
    best = max(parts, key=parts.__getitem__)
    yield Finding(
        f'{when} UniPELT beats the best of its parts by 1 to 4 points',
        where,
        f'{points(own - parts[best])} ({Mao2022.titles[best]})',
        own > parts[best],
    )
    gap = own - results.score('full', tasks)
    yield Finding(f'{when} it beats full fine-tuning', where, points(gap), gap > 0)


def _examples(task: str) -> int:
    return int(task.partition('@')[2] or protocol.SMALL_EXAMPLES)
