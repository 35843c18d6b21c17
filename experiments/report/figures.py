"""The pictures of a report: scores, scores against size, and the course of training."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adapters_jax.tuning.plots import save
from experiments.report.runs import Group, Run

_POINTS = 200  # of a curve


def scores(groups: Sequence[Group], metric: str, path: Path) -> None:
    """Draw each group's mean and deviation, and each seed as a point."""
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(groups)), layout='constrained')
    axes = figure.subplots()
    for row, group in enumerate(groups):
        values = group.values(metric)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(statistics.mean(values), row, xerr=spread, fmt='o', capsize=4, color='C0')
        axes.plot(values, [row] * len(values), '|', color='C7', ms=11, zorder=1)
    axes.set_yticks(range(len(groups)), [_label(group) for group in groups], fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)  # the first on top
    axes.set(xlabel=f'{metric} (mean ± s.d.; a tick for each seed)')
    axes.grid(alpha=0.3, axis='x')
    save(figure, path)


def sizes(groups: Sequence[Group], metric: str, path: Path) -> None:
    """Draw the mean score against the trained parameters."""
    figure = Figure(figsize=(8, 4.2), layout='constrained')
    axes = figure.subplots()
    for group in groups:
        values = group.values(metric)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        trained = group.runs[0].summary['trainable_parameters']
        axes.errorbar(trained, statistics.mean(values), spread, marker='o', capsize=3, ls='none')
        axes.annotate(
            _label(group),
            (trained, statistics.mean(values)),
            (6, 4),
            textcoords='offset points',
            fontsize=7,
        )
    axes.set(xscale='log', xlabel='trained parameters', ylabel=f'{metric} (mean ± s.d.)')
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    save(figure, path)


def courses(groups: Sequence[Group], primary: str, path: Path) -> bool:
    """Draw loss and validation score over training, the mean of the seeds with their range.

    Nothing is drawn, and False returned, where no run has told its course.
    """
    figure = Figure(figsize=(10, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    drawn = [_course(left, group, 'loss') for group in groups]
    drawn += [_course(right, group, primary, validation=True) for group in groups]
    if not any(drawn):
        return False
    left.set(xlabel='step', ylabel='training loss', yscale='log')
    right.set(xlabel='step', ylabel=f'validation {primary}')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(fontsize=7)
    save(figure, path)
    return True


def _label(group: Group) -> str:
    """Return a group's name as it stands: what is between two $ would be set as a formula."""
    return group.name.replace('$', r'\$')


def _course(axes: Axes, group: Group, name: str, validation: bool = False) -> bool:
    curves = [own for run in group.runs if (own := _smooth(run, name, validation)) is not None]
    if not curves:
        return False
    last = min(steps[-1] for steps, _ in curves)
    first = max(steps[0] for steps, _ in curves)
    at = np.linspace(first, last, _POINTS)
    values = np.stack([np.interp(at, steps, own) for steps, own in curves])
    (line,) = axes.plot(at, values.mean(0), lw=1.4, label=_label(group))
    axes.fill_between(at, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0)
    return True


def _smooth(run: Run, name: str, validation: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the curve, long ones as the means of neighbours."""
    points = np.array(run.curve(name, validation), float)
    if not len(points):
        return None
    window = max(1, len(points) // _POINTS * 4)
    whole = len(points) // window * window
    steps, values = points[:whole].reshape(-1, window, 2).mean(1).T
    return steps, values
