"""Frozen weights in 16 and 8 bits: what they cost in quality.

    python -m experiments.frozen_dtype_scores --output=DIR [--method=houlsby] [--seeds=1]
        [--epochs=6]

Trains the quickstart (TREC) with the frozen backbone in each number format and scores it on the
held-out questions, computed in the same format. Then the adapter trained over float32 predicts for
them over each of the backbones: how far do logits move when nothing else does? Runs that are
finished are not run again. Writes DIR/FORMAT_SEED/ (workdirs), DIR/frozen_dtype_scores.json and
.md.
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from adapters_jax import entry, files
from adapters_jax.evaluate import evaluate
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.params import size_bytes
from adapters_jax.predict import predict, read_lines
from adapters_jax.train import train
from adapters_jax.training.dtypes import FROZEN_DTYPES
from adapters_jax.training.placement import Placement
from adapters_jax.training.provenance import describe
from configs import quickstart
from experiments.output import write

EXACT = 'float32'


def score(method: str, stored: str, seed: int, epochs: float, workdir: Path) -> dict[str, float]:
    """Return test accuracy and training seconds of one run with frozen weights `stored` so."""
    config = quickstart.get_config(f'method={method}')
    config.training.frozen_dtype, config.training.epochs, config.seed = stored, epochs, seed
    seconds = train(config, workdir)['seconds']
    return {'accuracy': evaluate(workdir)['metrics']['accuracy'], 'seconds': seconds}


def deviations(workdir: Path) -> dict[str, dict[str, float]]:
    """Return how far the logits of a run's adapter move, by the format of the frozen weights.

    `largest` and `mean` are of the absolute differences; `agreement` is the share of equal
    predictions.
    """
    rows = read_lines(workdir / 'predictions_test.jsonl').values()
    texts = [{'text': row['text_a']} for row in rows]
    logits = {}
    for stored in FROZEN_DTYPES:
        rows = predict(workdir / 'adapter', texts, frozen_dtype=stored)
        logits[stored] = np.array([row['logits'] for row in rows])
    exact = logits[EXACT]
    return {
        stored: {
            'largest': float(np.abs(found - exact).max()),
            'mean': float(np.abs(found - exact).mean()),
            'agreement': float((found.argmax(1) == exact.argmax(1)).mean()),
        }
        for stored, found in logits.items()
    }


def backbone_bytes() -> dict[str, int]:
    """Return the bytes of the quickstart's backbone by the format of its weights."""
    config = quickstart.get_config()
    tree = {'backbone': load_backbone(config.backbone).params}
    config.mesh.data = 1
    placement = Placement.of(config)
    return {
        name: size_bytes(placement.frozen(tree, stored)) for name, stored in FROZEN_DTYPES.items()
    }


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    lines = [
        '| frozen weights | MB of the backbone | test accuracy | a logit moves by, at most (mean) '
        '| equal predictions |',
        '|---|---|---|---|---|',
    ]
    for name, size in result['bytes'].items():
        accuracy = statistics.mean(run['accuracy'] for run in result['runs'][name])
        moved = result['deviations'][name]
        cells = (
            f'`{name}`',
            f'{size / 1e6:.1f}',
            f'{accuracy:.3f}',
            '-' if name == EXACT else f'{moved["largest"]:.3f} ({moved["mean"]:.4f})',
            '-' if name == EXACT else f'{100 * moved["agreement"]:.1f} %',
        )
        lines.append(f'| {" | ".join(cells)} |')
    count = len(result['seeds'])
    note = (
        f'TREC, `{result["method"]}` over `minilm`, {result["epochs"]:g} epochs, '
        f'{f"mean of {count} seeds" if count > 1 else "one seed"}; trained and scored with the '
        'backbone in the format of the row. The last two columns are of one adapter, trained over '
        'float32, over each of the backbones. Made by `python -m experiments.frozen_dtype_scores`.'
    )
    return '\n'.join([*lines, '', note])


def main(output: str, method: str, seeds: int, epochs: float) -> None:
    """Train, evaluate, write and print."""
    directory = files.make_directory(output)
    runs = {
        name: [
            score(method, name, seed, epochs, directory / f'{name}_{seed}') for seed in range(seeds)
        ]
        for name in FROZEN_DTYPES
    }
    result = {
        'method': method,
        'seeds': list(range(seeds)),
        'epochs': epochs,
        'bytes': backbone_bytes(),
        'runs': runs,
        'deviations': deviations(directory / f'{EXACT}_0'),
        **describe(),
    }
    write(directory, 'frozen_dtype_scores', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of workdirs and results.'),
        'method': flags.DEFINE_string('method', 'houlsby', 'Which method.'),
        'seeds': flags.DEFINE_integer('seeds', 1, 'How many seeds, from 0.', lower_bound=1),
        'epochs': flags.DEFINE_float('epochs', 6.0, 'Passes over the questions.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
