"""The papers whose protocols are tested, and rows of results that nobody trained."""

from experiments.papers.__main__ import find as paper
from experiments.papers.study import Row

__all__ = ['NAMES', 'paper', 'row']
NAMES = ('houlsby2019', 'pfeiffer2021', 'ruckle2021', 'hu2022', 'he2022', 'mahabadi2021', 'mao2022')


def row(task='cr', way='full', scores=(0.5, 0.7), validation=None, settings=None):
    return Row(
        task, way, settings or {}, {}, 'accuracy', 'test', list(range(len(scores))),
        list(validation or scores), list(scores), [], 10, 1000, 60.0, 120.0, 0, ['a processor'],
        ['abcdef0123'],
    )  # fmt: skip
