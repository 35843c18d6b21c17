"""The picture of all races: a bar for each, as long as theirs takes times ours.

    python -m experiments.bench.chart

draws the stored results once more, as experiments/results/bench/bench.png.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from adapters_jax.tuning.plots import save

STORED = Path(__file__).parents[1] / 'results' / 'bench' / 'bench.json'
_BETTER, _WORSE, _GREY = '#1f4e79', '#b3261e', '#8a8a8a'


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the ratios of all races, with the middle half of their rounds."""
    save(figure(results), path)


def figure(results: Mapping[str, Any]) -> Figure:
    """Return the picture: a group of bars for each race, in the order of the results."""
    drawn = Figure(figsize=(9, 1 + 0.27 * _lines(results)), layout='constrained')
    axes = drawn.subplots()
    place, labels = 0.0, {}
    for name, first in results.items():
        for race in (first, *first['more']):
            _bar(axes, place, race)
            labels[place] = f'{name}: {race["title"]}'
            place += 1
        place += 0.6  # between one race and the next
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
    axes.tick_params(axis='y', length=0)
    axes.set_ylim(place - 1, -0.9)  # the first one on top
    axes.axvline(1, color='black', linewidth=0.8)
    axes.spines[['top', 'right']].set_visible(False)
    longest = max(
        race['spread'][1] for first in results.values() for race in (first, *first['more'])
    )
    axes.set_xlim(0, 1.1 * max(longest, 1.0))
    axes.set_xlabel('theirs / ours (above 1: ours is faster, or takes less memory or disk)')
    return drawn


def _lines(results: Mapping[str, Any]) -> int:
    return sum(2 + len(first['more']) for first in results.values())


def _bar(axes: Any, place: float, race: Mapping[str, Any]) -> None:
    ratio, (low, high) = race['ratio'], race['spread']
    axes.barh(place, ratio, color=_BETTER if ratio >= 1 else _WORSE, height=0.7)
    if low < high:
        axes.hlines(place, low, high, color=_GREY, linewidth=2)
    axes.text(0.04, place, f'{ratio:.2f}', va='center', fontsize=8, color='white')


if __name__ == '__main__':
    picture = STORED.with_suffix('.png')
    draw(json.loads(STORED.read_text()), picture)
    print(f'wrote {picture}')
