"""Draws how much of each fused adapter AdapterFusion uses, by layer: a heat map as an SVG file.

    python -m experiments.fusion_heatmap --adapter=DIR --input=in.jsonl --output=map.svg

Pfeiffer et al. (2021, figure 5): the mean attention weight of each adapter (columns) at each place
where the fusion acts (rows), over all tokens of the texts. DIR and the texts are those of
`adapters_jax.predict`.
"""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import jax
import numpy as np
from absl import flags
from jaxtyping import Float

from adapters_jax import config as configs
from adapters_jax import entry, files
from adapters_jax import predict as prediction
from adapters_jax.adapters import pruning
from adapters_jax.adapters.composed import Composed, blocks_of
from adapters_jax.adapters.composition import Fuse
from adapters_jax.data import pipeline, tokenize
from adapters_jax.interop import formats
from adapters_jax.model import Model
from adapters_jax.training import batching, experiment

_CELL, _LEFT, _TOP = 44, 150, 70  # pixels
_COLUMNS = ('input_ids', 'token_type_ids', 'positions', 'segments', 'starts')


def fused(model: Model) -> Fuse:
    """Return the one fusion of a model.

    Raises:
        ValueError: a model with none or with several.
    """
    method = model.method
    blocks = blocks_of(method.tree) if isinstance(method, Composed) else []
    found = [block for block in blocks if isinstance(block, Fuse)]
    if len(found) != 1 or method.replicas > 1:
        raise ValueError(
            f'the adapter has {len(found)} fusions; a heat map shows an adapter with one and no '
            'parallel block'
        )
    return found[0]


def mean_weights(
    adapter: str | Path, rows: Sequence[dict], backbone: str = ''
) -> tuple[list[str], dict[str, Float[np.ndarray, 'N']]]:
    """Return the names of the N fused adapters, and their mean weights over all tokens, by place.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a row without text, or an adapter without a fusion.
    """
    folder, loaded = formats.load(Path(adapter), backbone)
    model = experiment.bind(folder, loaded)
    block = fused(model)
    texts = prediction.read_texts(list(rows), folder.pair, range(1, len(rows) + 1))
    encoded = tokenize.encode(
        texts,
        tokenize.load_tokenizer(loaded.directory),
        folder.max_length,
        positions=model.text_positions,
        cache_dir=None,
    )
    params = folder.overlay(loaded.params, model.method.constants(loaded.config.dimensions))
    policy = batching.choose(configs.base(), model, encoded.lengths, 1, training=False)

    @jax.jit
    def weigh(params, batch):
        record: dict[str, jax.Array] = {}
        model.apply(params, batch, record=record)
        return record

    total, tokens = {}, 0
    for batch in pipeline.eval_batches(encoded, policy, loaded.config.pad_id):
        real = batch['segments'] > 0
        found = weigh(params, {name: batch[name] for name in _COLUMNS})
        for place, mean in pruning.importance(found, real).items():
            total[place] = total.get(place, 0.0) + mean * real.sum()
        tokens += real.sum()
    return block.fusion.split(','), {place: x / tokens for place, x in total.items()}


def render(names: Sequence[str], weights: dict[str, Float[np.ndarray, 'N']]) -> str:
    """Return the heat map as SVG; the darker a cell, the larger its weight."""
    places = sorted(weights, key=lambda place: (int(place.split('/')[0][6:]), place))
    width, height = _LEFT + _CELL * len(names) + 70, _TOP + _CELL * len(places) + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for j, name in enumerate(names):
        x = _LEFT + _CELL * j + _CELL // 2
        lines.append(
            f'<text x="{x}" y="{_TOP - 8}" transform="rotate(-35 {x} {_TOP - 8})">'
            f'{escape(name)}</text>'
        )
    for i, place in enumerate(places):
        middle = _TOP + _CELL * i + _CELL // 2 + 4
        label = place.replace('layer_', '').replace('/', ' ').replace('_', '-')
        lines.append(f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{label}</text>')
        lines += [_cell(i, j, float(value)) for j, value in enumerate(weights[place])]
    return '\n'.join([*lines, '</svg>', ''])


def _cell(i: int, j: int, value: float) -> str:
    red, green, blue = (round(255 + (dark - 255) * value) for dark in (8, 48, 107))
    x, y = _LEFT + _CELL * j, _TOP + _CELL * i
    ink = 'white' if value > 0.5 else 'black'
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" stroke="white" '
        f'fill="rgb({red},{green},{blue})"/><text x="{x + _CELL // 2}" y="{y + _CELL // 2 + 4}" '
        f'text-anchor="middle" fill="{ink}">{value:.2f}</text>'
    )


def main(adapter: str, input: str, output: str, backbone: str) -> None:
    """Draw the heat map, and say what was written."""
    names, weights = mean_weights(adapter, prediction.read_lines(Path(input)), backbone)
    files.write_text(Path(output), render(names, weights))
    print(f'wrote {output}: {len(weights)} places, {len(names)} adapters')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'adapter': flags.DEFINE_string('adapter', None, 'A finished adapter with a fusion.'),
        'input': flags.DEFINE_string('input', None, 'JSONL file of texts.'),
        'output': flags.DEFINE_string('output', None, 'SVG file to write.'),
        'backbone': flags.DEFINE_string('backbone', '', 'The backbone, if not where it was.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
