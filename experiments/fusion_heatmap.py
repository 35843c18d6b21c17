"""Draws how much of each fused adapter AdapterFusion uses, by layer: a heat map, as PNG or SVG.

    python -m experiments.fusion_heatmap --adapter=DIR --input=in.jsonl --output=map.png

Pfeiffer et al. (2021, figure 5): the mean attention weight of each adapter (columns) at each place
where the fusion acts (rows), over all tokens of the texts; several fusions stand side by side. DIR
and the lines are those of `adapters_jax.predict`, and are prepared as there. The means over all
places are printed, the largest first.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from adapters_jax import config as configs
from adapters_jax import entry, files
from adapters_jax import predict as prediction
from adapters_jax.adapters import composition, pruning
from adapters_jax.adapters.composed import Composed, blocks_of
from adapters_jax.adapters.composition import Fuse
from adapters_jax.data import pipeline
from adapters_jax.data.encoded import TAGS
from adapters_jax.interop import formats
from adapters_jax.model import Model
from adapters_jax.tasks.task import Task
from adapters_jax.training import batching, experiment, serving

_KINDS = ('.png', '.svg')
_TITLE = 'Mean attention weight of the fused adapters'
_CELL, _MARGIN = 0.5, 1.9  # inches
_LETTERS = 30  # of an adapter's name; what is longer is shortened
_COLUMNS = ('input_ids', 'token_type_ids', 'positions', 'segments', 'starts', TAGS)

Weights = dict[str, dict[str, Float[np.ndarray, 'N']]]


def fused(model: Model) -> dict[str, tuple[str, ...]]:
    """Return the names of the adapters that each fusion of a model mixes.

    Raises:
        ValueError: a model without a fusion.
    """
    method = model.method
    blocks = blocks_of(method.tree) if isinstance(method, Composed) else []
    found = [block for block in blocks if isinstance(block, Fuse)]
    if not found:
        raise ValueError('the adapter has no fusion; a heat map shows an adapter with fuse(...)')
    return {b.fusion: tuple(composition.last(child) for child in b.children) for b in found}


def mean_weights(
    adapter: str | Path,
    rows: Sequence[dict],
    backbone: str = '',
    lines: Sequence[int] | None = None,
) -> tuple[dict[str, tuple[str, ...]], Weights]:
    """Return the names of the N adapters of each fusion, and their mean weights by place.

    A fusion that acts a second time is called '{fusion}#2'. `lines` are the rows' numbers in their
    file, for messages; else they are counted.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: no rows, one without text, or an adapter that has no fusion or reads no texts.
    """
    folder, loaded = formats.load(Path(adapter), backbone)
    model = experiment.bind(folder, loaded)
    names = fused(model)
    task = experiment.served(folder, loaded).predicting()
    _check_reads_texts(task)
    lines = range(1, len(rows) + 1) if lines is None else lines
    texts = task.rows_of(list(rows), lines, folder.pair)
    encoded = serving.encode(texts, task, folder, loaded)
    params = folder.overlay(loaded.params, model.method.constants(loaded.config.dimensions))
    policy = batching.choose(configs.base(), model, encoded.sizes, 1, training=False)
    total, tokens = {}, 0
    weigh = jax.jit(lambda params, batch: _weights(model, params, batch))
    pad_id = loaded.config.pad_id
    for batch in pipeline.eval_batches(encoded, policy, pad_id, transform=task.transform):
        real = batch['segments'] > 0
        found = weigh(params, {name: batch[name] for name in _COLUMNS if name in batch})
        for place, mean in pruning.importance(found, real).items():
            total[place] = total.get(place, 0.0) + mean * real.sum()
        tokens += real.sum()
    weights = pruning.by_fusion({place: x / tokens for place, x in total.items()})
    ordered = sorted(weights, key=lambda fusion: (list(names).index(_plain(fusion)), fusion))
    return {f: names[_plain(f)] for f in ordered}, {f: weights[f] for f in ordered}


def _check_reads_texts(task: Task) -> None:
    if task.reads != 'input_ids' or task.writes:
        what = 'writes texts' if task.writes else f'reads {task.reads}'
        raise ValueError(
            f'the adapter {what}; a heat map is over the tokens of texts that an encoder reads'
        )


def _plain(fusion: str) -> str:
    return fusion.rsplit('#', 1)[0]


def _weights(model: Model, params: dict, batch: dict) -> dict[str, jax.Array]:
    record: dict[str, jax.Array] = {}
    model.apply(params, batch, record=record)
    return record


def draw(names: Mapping[str, Sequence[str]], weights: Weights) -> Figure:
    """Return the heat map; the darker a cell, the larger its weight."""
    rows = max(map(len, weights.values()))
    columns = sum(len(names[fusion]) for fusion in weights)
    size = (_CELL * 1.4 * columns + _MARGIN * (1 + len(weights)), _CELL * rows + _MARGIN)
    figure = Figure(figsize=size, dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        1, len(weights), squeeze=False, width_ratios=[len(names[fusion]) for fusion in weights]
    )
    for axes, (fusion, places) in zip(grid[0], weights.items(), strict=True):
        image = _draw_one(axes, names[fusion], places)
        if len(weights) > 1:
            axes.set_title(_short(fusion), fontsize=9)
    figure.colorbar(image, ax=list(grid[0]), label='mean weight over all tokens')
    figure.suptitle(_TITLE, fontsize=11)
    return figure


def _draw_one(
    axes: Axes, names: Sequence[str], places: Mapping[str, Float[np.ndarray, 'N']]
) -> AxesImage:
    order = sorted(places, key=lambda place: (int(place.split('/')[0][6:]), place))
    table = np.stack([places[place] for place in order])
    image = axes.imshow(table, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    axes.set_xticks(
        range(len(names)), map(_short, names), rotation=35, ha='right', rotation_mode='anchor'
    )
    labels = [place.replace('_', ' ').replace('/', ', ') for place in order]
    axes.set_yticks(range(len(order)), labels)
    axes.tick_params(length=0, labelsize=9)
    for (i, j), value in np.ndenumerate(table):
        ink = 'white' if value > 0.6 else 'black'
        axes.text(j, i, f'{value:.2f}', ha='center', va='center', color=ink, fontsize=8)
    return image


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else name[: _LETTERS - 1] + '…'


def ranking(names: Mapping[str, Sequence[str]], weights: Weights) -> str:
    """Return a line for each fusion: its adapters' mean weights over all places, largest first."""
    lines = []
    for fusion, places in weights.items():
        means = np.mean(list(places.values()), axis=0)
        ordered = sorted(zip(means, names[fusion], strict=True), reverse=True)
        lines.append(f'{fusion}: ' + ', '.join(f'{name} {mean:.3f}' for mean, name in ordered))
    return '\n'.join(lines)


def main(adapter: str, input: str, output: str, backbone: str) -> None:
    """Draw the heat map, and say what was written."""
    kind = Path(output).suffix
    if kind not in _KINDS:
        raise ValueError(f'--output: {output} ends with {kind!r}; expected {" or ".join(_KINDS)}')
    found = prediction.read_lines(Path(input))
    if not found:
        raise ValueError('the input holds no examples; expected one JSON object a line')
    names, weights = mean_weights(adapter, list(found.values()), backbone, list(found))
    with files.atomic(output) as temporary:
        draw(names, weights).savefig(temporary, format=kind[1:])
    print(ranking(names, weights))
    print(f'wrote {output}: {sum(map(len, weights.values()))} places')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'adapter': flags.DEFINE_string('adapter', None, 'A finished adapter with a fusion.'),
        'input': flags.DEFINE_string('input', None, 'JSONL file of texts.'),
        'output': flags.DEFINE_string('output', None, 'PNG or SVG file to write.'),
        'backbone': flags.DEFINE_string('backbone', '', 'Where the backbone is, if it has moved.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
