"""AdapterDrop: what leaving out layers costs in quality, with and without robust training.

    python -m experiments.adapter_drop_scores --output=DIR [--method=houlsby] [--seeds=2]

Trains the quickstart (TREC) as it is and with `training.adapter_drop='robust'`, then evaluates both
on the held-out questions with 0 to all layers dropped (Rücklé et al. 2021, section 3.1, figure 2).
Runs that are finished are not run again. Writes DIR/TRAINING_SEED/ (workdirs),
DIR/adapter_drop_scores.json and .md.
"""

import statistics
from pathlib import Path
from typing import Any

from absl import flags

from adapters_jax import entry, files
from adapters_jax.evaluate import evaluate
from adapters_jax.train import train
from adapters_jax.training.provenance import describe
from configs import quickstart
from experiments.output import write

TRAININGS = {'none': 'plain', 'robust': 'robust'}
LAYERS = 6  # of the quickstart's backbone


def scores(method: str, training: str, seed: int, output: Path) -> list[float]:
    """Return the test accuracy of one run with 0, 1, ... all layers dropped."""
    config = quickstart.get_config(f'method={method}')
    config.training.adapter_drop = training
    config.seed = seed
    workdir = output / f'{TRAININGS[training]}_{seed}'
    train(config, workdir)
    dropped = range(LAYERS + 1)
    return [evaluate(workdir, drop_layers=n)['metrics']['accuracy'] for n in dropped]


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    full = statistics.mean(run[0] for run in result['accuracy']['none'])
    lines = [
        '| layers dropped | trained plainly | robust | robust, of the full score |',
        '|---|---|---|---|',
    ]
    for dropped in range(LAYERS + 1):
        plain, robust = (
            statistics.mean(run[dropped] for run in result['accuracy'][name]) for name in TRAININGS
        )
        cells = (str(dropped), f'{plain:.3f}', f'{robust:.3f}', f'{100 * robust / full:.1f} %')
        lines.append(f'| {" | ".join(cells)} |')
    note = (
        f'Test accuracy on TREC, `{result["method"]}` over `minilm` ({LAYERS} layers), mean of '
        f'{len(result["seeds"])} seeds; the full score is that of plain training with nothing '
        'dropped. Made by `python -m experiments.adapter_drop_scores`.'
    )
    return '\n'.join([*lines, '', note])


def main(output: str, method: str, seeds: int) -> None:
    """Train, evaluate, write and print."""
    directory = files.make_directory(output)
    found = {
        name: [scores(method, name, seed, directory) for seed in range(seeds)] for name in TRAININGS
    }
    result = {'method': method, 'seeds': list(range(seeds)), 'accuracy': found, **describe()}
    write(directory, 'adapter_drop_scores', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of workdirs and results.'),
        'method': flags.DEFINE_string('method', 'houlsby', 'Which method.'),
        'seeds': flags.DEFINE_integer('seeds', 2, 'How many seeds, from 0.', lower_bound=1),
    }


if __name__ == '__main__':
    entry.run(_define, main)
