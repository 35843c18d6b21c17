"""The kinds of figure that papers on adapters have: scores over a setting, and heat maps."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from adapters_jax.tuning.plots import save
from experiments.papers.study import Paper, Results, spread

Points = Sequence[tuple[float, float, float]]  # where, mean, deviation


def lines(
    series: Mapping[str, Points],
    x: str,
    y: str,
    path: Path,
    level: Mapping[str, float] | None = None,
    scale: str = 'log',
) -> Path:
    """Draw scores over a setting; `level` are scores that have none."""
    names = len(series) + len(level or {})
    figure = Figure(figsize=(8, 4.2 + 0.2 * -(-names // 2)), layout='constrained')
    axes = figure.subplots()
    for name, points in series.items():
        where, mean, deviation = zip(*sorted(points), strict=True)
        axes.errorbar(where, mean, deviation, marker='o', capsize=3, label=name)
    for number, (name, score) in enumerate((level or {}).items()):
        axes.axhline(score, ls='--', lw=1.2, color=f'C{7 + number}', label=name)
    axes.set(xscale=scale, xlabel=x, ylabel=y)
    settings = {tuple(sorted(where for where, *_ in points)) for points in series.values()}
    if len(settings) == 1:  # and not measured along with the score
        (values,) = settings
        axes.set_xticks(values, [f'{value:g}' for value in values])
        axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, fontsize=7.5)  # where it hides no score
    save(figure, path)
    return path


def sizes(paper: Paper, results: Results, ways: Sequence[str], directory: Path) -> Iterator[Path]:
    """Draw the scores of some ways over their trained parameters, a picture for each task."""
    for task in results.tasks(ways[0]):
        series = {
            paper.titles[way]: [
                (row.trained, 100 * row.mean, 100 * spread(row.scores))
                for row in results.of(way, task)
            ]
            for way in ways
        }
        level = {paper.titles['full']: 100 * results.best('full', task).mean}
        path = directory / f'sizes_{task}.png'
        yield lines(series, 'trained parameters', f'{task}, %', path, level)


def over(results: Results, way: str, key: str) -> dict[str, Points]:
    """Return, for each task, a way's scores over a setting by which its rows are told apart."""
    return {
        task: [
            (row.settings[key], 100 * row.mean, 100 * spread(row.scores))
            for row in results.of(way, task)
        ]
        for task in results.tasks(way)
    }


def heat(
    maps: Mapping[str, Sequence[Sequence[float | None]]], x: str, y: str, label: str, path: Path
) -> Path:
    """Draw a heat map for each task, side by side; None is left white."""
    figure = Figure(figsize=(0.6 + 4.2 * len(maps), 3.9), layout='constrained')
    tables = {name: np.array(table, float) for name, table in maps.items()}
    low = min(np.nanmin(table) for table in tables.values())
    grid = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        image = axes.imshow(table, cmap='Greens', vmin=low, vmax=max(0.0, low + 1e-9))
        for (i, j), value in np.ndenumerate(table):
            if not np.isnan(value):
                ink = 'black' if value < low / 3 else 'white'
                axes.text(j, i, f'{value:.1f}', ha='center', va='center', color=ink, fontsize=8)
        axes.set(xlabel=x, ylabel=y, title=name)
        axes.set_xticks(range(table.shape[1]))
        axes.set_yticks(range(table.shape[0]))
        axes.tick_params(length=0)
    figure.colorbar(image, ax=figure.axes, label=label)
    save(figure, path)
    return path
