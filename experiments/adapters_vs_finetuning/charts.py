"""The two pictures: score against learning rate, and the gradient's norm over training."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adapters_jax.tuning.plots import save
from experiments.adapters_vs_finetuning.runs import ROWS, best_rate

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def scores(rows: Rows, path: Path) -> None:
    """Draw the test scores of each way of training over its learning rates."""
    figure = Figure(figsize=(8, 4.8), layout='constrained')
    axes = figure.subplots()
    for name, found in rows.items():
        well = [run for run in found if 'diverged' not in run]
        rates = sorted({run['learning_rate'] for run in well})
        values = [[run['test'] for run in well if run['learning_rate'] == rate] for rate in rates]
        if rates:
            means = [statistics.mean(own) for own in values]
            spread = [statistics.stdev(own) if len(own) > 1 else 0.0 for own in values]
            axes.errorbar(rates, means, spread, marker='o', capsize=3, label=ROWS[name].title)
    axes.set(xscale='log', xlabel='learning rate', ylabel='test score (mean ± s.d. over seeds)')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, fontsize=8)
    save(figure, path)


def norms(rows: Rows, path: Path) -> None:
    """Draw the gradient's norm at each step of training with the best rate, over all seeds."""
    figure = Figure(figsize=(8, 4.8), layout='constrained')
    axes = figure.subplots()
    for name, found in rows.items():
        rate = best_rate(found)
        curves = [run['norms'] for run in found if run['learning_rate'] == rate]
        if not curves:
            continue
        length = min(map(len, curves))
        middle = np.median([curve[:length] for curve in curves], axis=0)
        window = max(1, length // 60)
        smooth = np.convolve(middle, np.ones(window) / window, mode='valid')
        share = np.linspace(0, 1, len(smooth))
        axes.plot(share, smooth, lw=1.3, label=ROWS[name].title)
    axes.set(yscale='log', xlabel='part of training', ylabel='norm of the gradient')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, fontsize=8)
    save(figure, path)
