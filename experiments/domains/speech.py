"""Speech: Whisper on spoken digits, of which it makes little, and what adapters make of them.

    python -m experiments.domains.speech --output=DIR --data=RECORDINGS [--seeds=1] [--epochs=1]
        [--methods=pfeiffer,lora,ia3,full] [--whole_window=False]

RECORDINGS is a folder of files DIGIT_SPEAKER_TAKE.wav, as of the Free Spoken Digit Dataset
(github.com/Jakobovski/free-spoken-digit-dataset). Speakers are divided: four to train on, one to
look at while training, and one who is heard at the end alone. Whisper reads a second of each
recording in place of its half minute, so that all of it runs on a CPU; what it writes for the last
speaker before any training is scored with both windows. Runs that are finished are not run again.
Writes DIR/METHOD_SEED/ (workdirs), DIR/speech.json and .md.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from adapters_jax import entry, files, params
from adapters_jax.config import Config
from adapters_jax.evaluate import evaluate
from adapters_jax.train import train
from adapters_jax.training import batching, evaluation, experiment
from adapters_jax.training.placement import Placement
from adapters_jax.training.provenance import describe
from adapters_jax.training.step import jit_outputs
from configs import speech
from experiments.output import write

WORDS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
SPEAKERS = {
    'train': ('george', 'jackson', 'lucas', 'nicolas'),
    'validation': ('theo',),
    'test': ('yweweler',),
}
# One learning rate each, as is usual for its kind; none was chosen by its scores here.
RATES = {
    'houlsby': 1e-3,
    'pfeiffer': 1e-3,
    'lora': 1e-3,
    'ia3': 1e-2,
    'prefix_tuning': 1e-3,
    'full': 2e-5,
}
WINDOW = 1.0  # seconds
METRICS = ('wer', 'cer')


def write_tables(recordings: Path, folder: Path) -> dict[str, int]:
    """Write train.tsv, validation.tsv and test.tsv, each of its own speakers; return their sizes.

    Raises:
        FileNotFoundError: no recordings of a speaker.
    """
    found = sorted(recordings.glob('[0-9]_*_*.wav'))
    sizes = {}
    for split, speakers in SPEAKERS.items():
        rows = [(path, WORDS[int(path.name[0])]) for path in found if _speaker(path) in speakers]
        if {_speaker(path) for path, _ in rows} != set(speakers):
            raise FileNotFoundError(
                f'{recordings} has no recordings DIGIT_SPEAKER_TAKE.wav of each of '
                f'{", ".join(speakers)}'
            )
        lines = [f'{path.resolve()}\t{word}\n' for path, word in rows]
        files.write_text(folder / f'{split}.tsv', ''.join(['audio\ttext\n', *lines]))
        sizes[split] = len(rows)
    return sizes


def _speaker(path: Path) -> str:
    return path.stem.split('_')[1]


def make_config(tables: Path, method: str, window: float, epochs: float, seed: int) -> Config:
    """Return the config of one run."""
    config = speech.get_config(f'method={method}')
    config.data.dir, config.task.window = str(tables), window
    config.task.metrics, config.task.target_length = METRICS, 16
    config.training.epochs, config.seed = epochs, seed
    config.optimizer.learning_rate = RATES[method]
    return config


def trained(config: Config, workdir: Path) -> dict[str, Any]:
    """Train and evaluate a run, unless that is done; return what the table needs."""
    summary = train(config, workdir)
    path = workdir / 'evaluation_test.json'
    found = json.loads(path.read_text()) if path.exists() else evaluate(workdir, 'test')
    names = ('trainable_parameters', 'total_parameters', 'seconds', 'steps')
    return {
        'validation': summary['metrics']['validation'],
        'test': found['metrics'],
        **{name: summary[name] for name in names},
    }


def untrained(config: Config) -> dict[str, Any]:
    """Return the scores of the checkpoint as it is, and the seconds that one recording takes."""
    run = experiment.build(config)
    placement = Placement.of(config)
    trainable, frozen = params.partition(run.init_params(), run.model.rules)
    encoded = run.splits['test']
    policy = batching.choose(config, run.model, encoded.sizes, placement.row_parts, training=False)
    placed = placement.trainable(trainable), placement.frozen(frozen, np.float32)
    started = time.monotonic()
    outputs = evaluation.outputs(
        jit_outputs(run.model, run.task),
        *placed,
        encoded,
        policy,
        run.backbone.config.pad_id,
        placement.mesh,
        transform=run.task.transform,
    )
    return {
        'test': run.task.score(outputs, encoded, run.texts['test']),
        'total_parameters': sum(leaf.size for leaf in jax.tree.leaves(run.backbone.params)),
        'seconds_each': (time.monotonic() - started) / len(encoded),
    }


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    heads = ('training', 'trained parameters', 'WER, %', 'CER, %', 'seconds')
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    for window, found in sorted(result['untrained'].items(), key=lambda item: float(item[0])):
        scores = (f'{100 * found["test"][name]:.1f}' for name in METRICS)
        lines.append(f'| none, window of {float(window):g} s | 0 | {" | ".join(scores)} | |')
    for name, runs in result['runs'].items():
        share = 100 * runs[0]['trainable_parameters'] / runs[0]['total_parameters']
        cells = (
            f'`{name}`',
            f'{runs[0]["trainable_parameters"]:,} ({share:.3g} %)',
            *(_spread([100 * run['test'][metric] for run in runs]) for metric in METRICS),
            f'{statistics.mean(run["seconds"] for run in runs):.0f}',
        )
        lines.append(f'| {" | ".join(cells)} |')
    count, sizes = len(result['seeds']), result['sizes']
    note = (
        f'`whisper-tiny.en` on spoken digits: {sizes["train"]:,} recordings of '
        f'{len(SPEAKERS["train"])} speakers to train on, {sizes["test"]:,} of one whom no run has '
        f"heard to test; words after Whisper's normaliser, greedy search. {result['epochs']:g} "
        f'epoch{"s" if result["epochs"] != 1 else ""} of a window of {WINDOW:g} s, '
        f'{f"mean ± s.d. of {count} seeds" if count > 1 else "one seed"}, one learning rate each; '
        f'seconds are of training, with compiling, on {result["hardware"]}. '
        'Made by `python -m experiments.domains.speech`.'
    )
    return '\n'.join([*lines, '', note])


def _spread(values: Sequence[float]) -> str:
    deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{deviation}'


def main(
    output: str, data: str, methods: Sequence[str], seeds: int, epochs: float, whole_window: bool
) -> None:
    """Score the checkpoint, train what is not trained; write and print after each method."""
    for name in methods:
        if name not in RATES:
            raise ValueError(f'--methods: {name!r} is none of {", ".join(RATES)}')
    directory = files.make_directory(output)
    tables = files.make_directory(directory / 'tables')
    result: dict[str, Any] = {
        'seeds': list(range(seeds)),
        'epochs': epochs,
        'sizes': write_tables(Path(data), tables),
        'untrained': {},
        'runs': {},
    }
    result['untrained'][WINDOW] = untrained(make_config(tables, 'lora', WINDOW, epochs, 0))
    for name in methods:
        result['runs'][name] = [
            trained(make_config(tables, name, WINDOW, epochs, seed), directory / f'{name}_{seed}')
            for seed in range(seeds)
        ]
        write(directory, 'speech', result | describe(), render)
    if whole_window:
        config = make_config(tables, 'lora', 0.0, epochs, 0)
        config.training.batch_size = 2  # scores of attention are 54 MB for each recording and layer
        result['untrained'][30.0] = untrained(config)
        write(directory, 'speech', result | describe(), render)


def _define() -> dict[str, flags.FlagHolder]:
    holders = {
        'output': flags.DEFINE_string('output', None, 'Directory of workdirs and results.'),
        'data': flags.DEFINE_string('data', None, 'Folder of DIGIT_SPEAKER_TAKE.wav files.'),
        'methods': flags.DEFINE_list('methods', ['pfeiffer', 'lora', 'ia3', 'full'], 'Methods.'),
        'seeds': flags.DEFINE_integer('seeds', 1, 'How many seeds, from 0.', lower_bound=1),
        'epochs': flags.DEFINE_float('epochs', 1.0, 'Passes over the recordings.'),
        'whole_window': flags.DEFINE_bool(
            'whole_window', False, 'Score the checkpoint with its own half minute, too.'
        ),
    }
    flags.mark_flags_as_required(['output', 'data'])
    return holders


if __name__ == '__main__':
    entry.run(_define, main)
