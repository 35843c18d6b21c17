"""The two pictures of a sweep: how a search went, and what each method is worth and costs.

Imported where a picture is drawn, and not before: matplotlib takes a second to load.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from matplotlib.transforms import Bbox

from adapters_jax import files
from adapters_jax.tuning.choose import Candidate

_DPI = 160
_BLUE, _GREY, _RED = '#1f4e79', '#8a8a8a', '#b3261e'
# Where a label may stand beside its point, in points; the first that is free is taken.
_PLACES = [(9, 0), (-9, 0), (0, 10), (0, -10), (7, 10), (7, -10), (-7, 10), (-7, -10), (0, 20)]
_PLACES += [(0, -20), (12, 20), (12, -20), (-12, 20), (-12, -20), (0, 31), (0, -31)]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG; what says when and by what it was made is left out of it."""
    FigureCanvasAgg(figure)
    with files.atomic(path) as temporary:
        figure.savefig(temporary, format='png', dpi=_DPI, metadata={'Software': None})


def search(
    scores: Sequence[tuple[int, float, bool]],
    so_far: Sequence[float],
    importance: Mapping[str, float],
    primary: str,
) -> Figure:
    """Draw a search: each trial's score, the best so far, and the importance of each key.

    `scores` are of the trials that have one: number, score, and whether it was trained to its end;
    `so_far` is the best after each of these that was.
    """
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for ended, colour, label in (
        (True, _BLUE, 'trained to the end'),
        (False, _GREY, 'ended early'),
    ):
        mine = [(number, score) for number, score, whole in scores if whole == ended]
        if mine:
            face = colour if ended else 'none'
            left.scatter(*zip(*mine, strict=True), s=26, fc=face, ec=colour, label=label)
    numbers = [number for number, _, ended in scores if ended]
    left.step(numbers, so_far, where='post', color=_RED, lw=1.4, label='best so far')
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel='trial', ylabel=f'{primary} on validation')
    left.legend(frameon=False, fontsize=8)
    _bars(right, importance)
    for axes in (left, right):
        _plain(axes)
    return figure


def _bars(axes: Axes, importance: Mapping[str, float]) -> None:
    keys = list(importance)[::-1]
    bars = axes.barh(keys, [importance[key] for key in keys], color=_BLUE, height=0.6)
    axes.bar_label(bars, fmt='%.2f', padding=3, fontsize=8)
    axes.tick_params(axis='y', labelsize=8)
    axes.set(xlabel='share of the variance (fANOVA)', xlim=(0, 1.12))
    if not keys:
        axes.set_yticks([])
        axes.text(0.5, 0.5, 'too few trials', ha='center', transform=axes.transAxes, color=_GREY)


def pareto(
    candidates: Sequence[Candidate],
    frontier: Sequence[Candidate],
    chosen: Candidate,
    primary: str,
) -> Figure:
    """Draw each method's score against its trained parameters, coloured by its inference FLOPs.

    Those that were ended at a rung are hollow: their scores are those of fewer steps.
    """
    figure = Figure(figsize=(8.4, 5.2), layout='constrained')
    axes = figure.subplots()
    scored = [c for c in candidates if c.score is not None]
    most = max(c.flops for c in scored)
    colours = ScalarMappable(Normalize(1.0, max(most, 1.01)), 'viridis_r')
    axes.set_xscale('log')
    if len(frontier) > 1:  # of a single method, which is better than all others, there is no line
        points = ([c.parameters for c in frontier], [c.score for c in frontier])
        line = {'where': 'post', 'color': _GREY, 'lw': 1.2, 'zorder': 1}
        axes.step(*points, label='Pareto frontier', **line)
    for c in scored:
        colour = colours.to_rgba(c.flops)
        face = colour if c.ended else 'white'
        axes.scatter(c.parameters, c.score, s=64, fc=face, ec=colour, lw=1.6, zorder=3)
    ring = {'s': 230, 'fc': 'none', 'ec': _RED, 'lw': 1.6, 'zorder': 2}
    axes.scatter(chosen.parameters, chosen.score, label='recommended', **ring)
    if any(not c.ended for c in scored):
        hollow = {'s': 64, 'fc': 'white', 'ec': _GREY, 'lw': 1.6}
        axes.scatter([], [], label='ended at a rung, after fewer steps', **hollow)
    bar = figure.colorbar(colours, ax=axes, pad=0.01, aspect=32)
    bar.set_label("inference FLOPs, the bare backbone's = 1", fontsize=9)
    axes.set(xlabel='trained parameters, the head included', ylabel=f'{primary} on validation')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ''))
    axes.margins(0.12)
    axes.legend(frameon=False, fontsize=8, loc='best')
    _plain(axes)
    _label(figure, axes, scored, chosen)
    return figure


def _count(value: float) -> str:
    for unit, name in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if value >= unit:
            return f'{value / unit:g}{name}'
    return f'{value:g}'


def _plain(axes: Axes) -> None:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)


def _label(figure: Figure, axes: Axes, points: Sequence[Candidate], chosen: Candidate) -> None:
    """Write each method beside its point, where no point and no other label is."""
    FigureCanvasAgg(figure).draw()
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    centres = [axes.transData.transform((c.parameters, c.score)) for c in points]
    taken = [
        Bbox.from_bounds(x - 5 * scale, y - 5 * scale, 10 * scale, 10 * scale) for x, y in centres
    ]
    taken.append(axes.get_legend().get_window_extent(renderer))
    inside = axes.get_window_extent(renderer)
    # The recommended one and the best first: they have the first choice of a place.
    for c in sorted(points, key=lambda c: (c is not chosen, not c.ended)):
        text = axes.annotate(
            c.method,
            (c.parameters, c.score),
            (0, 0),
            textcoords='offset points',
            fontsize=8,
            color=_RED if c is chosen else 'black' if c.ended else _GREY,
            weight='bold' if c is chosen else 'normal',
            path_effects=[withStroke(linewidth=2.5, foreground='white')],
            arrowprops={'arrowstyle': '-', 'color': _GREY, 'lw': 0.5, 'shrinkA': 0, 'shrinkB': 4},
        )
        costs = []
        for number, place in enumerate(_PLACES):
            box = _move(text, place, renderer)
            outside = sum(max(0.0, gap) for gap in _gaps(box, inside))
            costs.append((sum(_overlap(box, other) for other in taken) + 50 * outside, number))
        taken.append(_move(text, _PLACES[min(costs)[1]], renderer))


def _move(text: Annotation, place: tuple[int, int], renderer: RendererAgg) -> Bbox:
    x, y = place
    text.set_position(place)
    text.set_horizontalalignment('left' if x > 0 else 'right' if x < 0 else 'center')
    text.set_verticalalignment('bottom' if y > 0 else 'top' if y < 0 else 'center')
    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)  # of the words, without the line to the point


def _gaps(box: Bbox, inside: Bbox) -> tuple[float, ...]:
    return inside.x0 - box.x0, box.x1 - inside.x1, inside.y0 - box.y0, box.y1 - inside.y1


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
