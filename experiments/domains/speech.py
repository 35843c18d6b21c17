"""Speech: Whisper on spoken digits, of which it makes little, and what adapters make of them.

    python -m experiments.domains.speech --output=DIR --data=RECORDINGS [--seeds=1] [--epochs=1]
        [--held_out=SPEAKER,...] [--methods=pfeiffer,lora,ia3,full] [--whole_window=False]

RECORDINGS is a folder of files DIGIT_SPEAKER_TAKE.wav, as of the Free Spoken Digit Dataset
(github.com/Jakobovski/free-spoken-digit-dataset: six speakers). Each speaker of `--held_out`, or
else each that there is, is in turn the one who is heard at the end alone; the one before in the
alphabet is looked at while training, and the others are trained on. Whisper reads a second of each
recording in place of its half minute, so that all of it runs on a CPU; what it writes for a held
out speaker before any training is scored with both windows. Runs that are finished are not run
again. Writes DIR/speech.json and .md, and in DIR/SPEAKER/ tables, METHOD_SEED/ (workdirs) and
untrained_WINDOW.json.
"""

import itertools
import json
import statistics
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
from experiments.output import where, write

WORDS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
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


def divide(recordings: Path, held_out: str) -> dict[str, tuple[str, ...]]:
    """Return the speakers of each split: of `held_out` the test, of the one before validation."""
    known = speakers(recordings)
    place = known.index(held_out)
    others = tuple(known[place + 1 :] + known[:place])
    return {'train': others[:-1], 'validation': others[-1:], 'test': (held_out,)}


def speakers(recordings: Path) -> list[str]:
    """Return who speaks, in the order of the alphabet.

    Raises:
        FileNotFoundError: fewer than three, of whom one could be held out.
    """
    known = sorted({_speaker(path) for path in _found(recordings)})
    if len(known) < 3:
        raise FileNotFoundError(
            f'{recordings} has recordings DIGIT_SPEAKER_TAKE.wav of {len(known)} speakers; '
            'expected three or more, to train on, to look at and to hold out'
        )
    return known


def write_tables(recordings: Path, held_out: str, folder: Path) -> dict[str, int]:
    """Write train.tsv, validation.tsv and test.tsv, of their own speakers; return the sizes."""
    sizes = {}
    for split, own in divide(recordings, held_out).items():
        rows = [path for path in _found(recordings) if _speaker(path) in own]
        lines = [f'{path.resolve()}\t{WORDS[int(path.name[0])]}\n' for path in rows]
        files.write_text(folder / f'{split}.tsv', ''.join(['audio\ttext\n', *lines]))
        sizes[split] = len(rows)
    return sizes


def _found(recordings: Path) -> list[Path]:
    return sorted(recordings.glob('[0-9]_*_*.wav'))


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


def untrained(config: Config, path: Path) -> dict[str, Any]:
    """Return the scores of the checkpoint as it is, and the seconds that one recording takes.

    They are written to the file `path`, or read where it is there.
    """
    if path.exists():
        return json.loads(path.read_text())
    run = experiment.build(config)
    placement = Placement.of(config)
    trainable, frozen = params.partition(run.init_params(), run.model.rules)
    encoded = run.splits['test']
    policy = batching.choose(config, run.model, encoded.sizes, placement.row_parts, training=False)
    placed = placement.trainable(trainable), placement.frozen(frozen, np.float32)
    outputs = evaluation.outputs(
        jit_outputs(run.model, run.task),
        *placed,
        encoded,
        policy,
        run.backbone.config.pad_id,
        placement.mesh,
        transform=run.task.transform,
    )
    result = {
        'test': run.task.score(outputs, encoded, run.texts['test']),
        'total_parameters': sum(leaf.size for leaf in jax.tree.leaves(run.backbone.params)),
    }
    files.write_json(path, result)
    return result


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    heads = ('training', 'trained parameters', 'WER, %', 'highest', 'CER, %', 'seconds')
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    for window, runs in sorted(result['untrained'].items(), key=lambda item: float(item[0])):
        title = f'none, window of {float(window):g} s'
        lines.append(_line(title, '0', list(runs.values()), ''))
    for name, runs in result['runs'].items():
        count, total = runs[0]['trainable_parameters'], runs[0]['total_parameters']
        trained = f'{count:,} ({100 * count / total:.3g} %)'
        seconds = statistics.mean(run['seconds'] for run in runs)
        lines.append(_line(f'`{name}`', trained, runs, f'{seconds:.0f}'))
    return '\n'.join([*lines, '', _note(result)])


def _line(title: str, trained: str, runs: Sequence[Mapping[str, Any]], seconds: str) -> str:
    wer, cer = ([100 * run['test'][metric] for run in runs] for metric in METRICS)
    cells = title, trained, _spread(wer), f'{max(wer):.1f}', _spread(cer), seconds
    return f'| {" | ".join(cells)} |'


def _note(result: Mapping[str, Any]) -> str:
    sizes = result['sizes'].values()
    trained = sorted({size['train'] for size in sizes})
    tested = sum(size['test'] for size in sizes)
    over, seeds = f'{len(sizes)} speaker{"s" if len(sizes) > 1 else ""}', len(result['seeds'])
    over += f' and {seeds} seeds' if seeds > 1 else ', one seed'
    spread = 'mean ± s.d., and the highest, over ' if len(sizes) * seeds > 1 else ''
    epochs = f'{result["epochs"]:g} epoch{"s" if result["epochs"] != 1 else ""}'
    return (
        f'`whisper-tiny.en` on spoken digits: {" to ".join(f"{n:,}" for n in trained)} recordings '
        f'to train on, and {tested:,} to test, of {", ".join(result["sizes"])}: each of them is '
        'heard by no run that is tested with it, neither to train on nor to look at. Words after '
        f"Whisper's normaliser, greedy search. {epochs} of a window of {WINDOW:g} s; "
        f'{spread}{over}; one learning rate each. Seconds are of training, with compiling, on '
        f'{where(result)}. '
        'Made by `python -m experiments.domains.speech --data=DATA --output=DIR'
        f'{" --whole_window" * (len(result["untrained"]) > 1)}`.'
    )


def _spread(values: Sequence[float]) -> str:
    deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1f}{deviation}'


def main(
    output: str,
    data: str,
    held_out: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    epochs: float,
    whole_window: bool,
) -> None:
    """Score the checkpoint, train what is not trained; write and print after each speaker."""
    known = speakers(Path(data))
    for flag, asked, names in (('held_out', held_out, known), ('methods', methods, RATES)):
        for name in asked:
            if name not in names:
                raise ValueError(f'--{flag}: {name!r} is none of {", ".join(names)}')
    result: dict[str, Any] = {
        'seeds': list(range(seeds)),
        'epochs': epochs,
        'sizes': {},
        'untrained': {},
        'runs': {},
    }
    for speaker in held_out or known:
        folder = files.make_directory(Path(output) / speaker)
        tables = files.make_directory(folder / 'tables')
        result['sizes'][speaker] = write_tables(Path(data), speaker, tables)
        for name, seed in itertools.product(methods, range(seeds)):
            config = make_config(tables, name, WINDOW, epochs, seed)
            run = trained(config, folder / f'{name}_{seed}')
            result['runs'].setdefault(name, []).append(run | {'held_out': speaker, 'seed': seed})
        for window in (WINDOW, 30.0) if whole_window else (WINDOW,):
            config = make_config(tables, 'lora', window, epochs, 0)
            if window != WINDOW:
                config.task.window = 0.0  # the checkpoint's own
                config.training.batch_size = 2  # attention's scores: 54 MB a recording and layer
            found = untrained(config, folder / f'untrained_{window:g}s.json')
            result['untrained'].setdefault(window, {})[speaker] = found
        write(output, 'speech', result | describe(), render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of workdirs and results.'),
        'data': flags.DEFINE_string('data', None, 'Folder of DIGIT_SPEAKER_TAKE.wav files.'),
        'held_out': flags.DEFINE_list('held_out', [], 'Speakers to test; none: each in turn.'),
        'methods': flags.DEFINE_list('methods', ['pfeiffer', 'lora', 'ia3', 'full'], 'Methods.'),
        'seeds': flags.DEFINE_integer('seeds', 1, 'How many seeds, from 0.', lower_bound=1),
        'epochs': flags.DEFINE_float('epochs', 1.0, 'Passes over the recordings.'),
        'whole_window': flags.DEFINE_bool(
            'whole_window', False, 'Score the checkpoint with its own half minute, too.'
        ),
    }


if __name__ == '__main__':
    entry.run(_define, main)
