"""The short table of races in the README: of each the workload that stands for it.

All of them are in docs/results.md.
"""

from collections.abc import Mapping
from typing import Any

# What a race is called, and how many of its workloads are shown.
SHOWN = {
    'train_step': ('a training step', 1),
    'inference': ('a forward pass', 1),
    'epoch': ('an epoch', 2),
    'sweep': ('a sweep', 1),
    'decoding': ('writing texts', 1),
    'mixed_adapters': ('adapters mixed in a batch', 1),
    'first_step': ('from start to the first step', 2),
    'memory': ('memory of training', 1),
}


def render(on_cpu: Mapping[str, Any], on_gpu: Mapping[str, Any]) -> str:
    """Return the Markdown table of the stored races on both kinds of machine."""
    heads = ('race', 'workload', 'on', 'ours', 'theirs', 'theirs / ours')
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    for races in (on_gpu, on_cpu):
        for name in (name for name in SHOWN if name in races):
            called, count = SHOWN[name]
            first = races[name]
            rows = [first, *first['more']][:count]
            lines += [_line(called, first['hardware'], row) for row in rows]
    return '\n'.join(lines)


def _line(called: str, hardware: str, race: Mapping[str, Any]) -> str:
    sides = (amount(race[side], race['unit']) for side in ('ours', 'theirs'))
    return f'| {" | ".join((called, race["title"], hardware, *sides, ratio(race)))} |'


def amount(value: float, unit: str) -> str:
    """Return what a side takes, in words."""
    if unit == 's' and value < 0.1:
        return f'{1000 * value:.2f} ms'
    return f'{value:,.{3 if unit == "s" else 0}f} {unit}'


def ratio(race: Mapping[str, Any]) -> str:
    """Return the ratio theirs / ours, with the middle half of its rounds in brackets."""
    low, high = race['spread']
    alone = len(race['rounds']['ours']) == 1  # which has no spread
    return f'{race["ratio"]:.2f}' + ('' if alone else f' ({low:.2f} to {high:.2f})')
