"""The picture of all races: a bar for each, as long as theirs takes times ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from adapters_jax.tuning.plots import save


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the ratios of all races, with the middle half of their rounds."""
    rows = [
        (f'{name}: {race["title"]}', race)
        for name, first in results.items()
        for race in (first, *first['more'])
    ][::-1]
    figure = Figure(figsize=(9, 1 + 0.34 * len(rows)), layout='constrained')
    axes = figure.subplots()
    ratios = [race['ratio'] for _, race in rows]
    errors = [
        [race['ratio'] - race['spread'][0] for _, race in rows],
        [race['spread'][1] - race['ratio'] for _, race in rows],
    ]
    colours = ['tab:green' if ratio >= 1 else 'tab:red' for ratio in ratios]
    axes.barh(range(len(rows)), ratios, xerr=errors, color=colours, height=0.62, alpha=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    for place, ratio in enumerate(ratios):
        axes.text(0.04, place, f'{ratio:.2f}', va='center', fontsize=8, color='white')
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set_xlim(0, 1.1 * max([*ratios, 1.0]))
    axes.set_xlabel('theirs / ours (above 1: ours is faster, or takes less memory)')
    save(figure, path)
