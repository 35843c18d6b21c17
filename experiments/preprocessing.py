"""What stop words and parts of speech do to a score.

    python -m experiments.preprocessing --output=DIR --data=DATA [--seeds=3] [--epochs=6]
        [--spacy=PIPELINE | --tagger=ADAPTER]

Questions by type (TREC) with the attention adapter, on the texts as they are, without their stop
words and, where somebody is given who tags, with parts of speech, of the whole sentence, in the
adapter's embedding layer. DATA holds TREC.train.all and TREC.test.all. Runs that are finished are
not run again. Writes DIR/ROW_SEED/ (workdirs), DIR/preprocessing.json and .md.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from adapters_jax import entry, files
from adapters_jax.config import Config
from adapters_jax.data.preprocess import chain
from adapters_jax.data.preprocess.chain import Chain
from adapters_jax.evaluate import evaluate
from adapters_jax.train import train
from adapters_jax.training import preprocessing
from adapters_jax.training.provenance import describe
from configs import text_sets
from experiments.output import write

STOP_WORDS = 'stop_words[language=en]'


def variants(tagger: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of the table: which steps, where `tagger` is the one that tags, if any is."""
    rows: dict[str, tuple[str, ...]] = {'plain': (), 'stop_words': (STOP_WORDS,)}
    if tagger:
        # First the tags: what a word is, its sentence says.
        rows |= {'tags': (tagger,), 'tags_stop_words': (tagger, STOP_WORDS)}
    return rows


def make_config(data: str, steps: Chain, seed: int, epochs: float) -> Config:
    """Return the config of one run; the method reads tags where the steps give any."""
    config = text_sets.get_config(f'task=trec,method=attention[tags={steps.num_tags}]')
    config.data.dir = data
    config.data.preprocess = steps.names
    config.training.epochs, config.seed = epochs, seed
    return config


def score(config: Config, workdir: Path) -> dict[str, float]:
    """Train and evaluate a run, unless that is done; return what the table needs."""
    summary = train(config, workdir)
    path = workdir / 'evaluation_test.json'
    found = json.loads(path.read_text()) if path.exists() else evaluate(workdir)
    names = ('accuracy', 'f1_macro')
    return {name: found['metrics'][name] for name in names} | {
        'examples': found['examples'],
        'trainable_parameters': summary['trainable_parameters'],
        'seconds': summary['seconds'],
    }


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    lines = ['| steps | trained parameters | accuracy | macro F1 |', '|---|---|---|---|']
    for name, runs in result['runs'].items():
        steps = ', '.join(f'`{step}`' for step in result['steps'][name])
        scores = [_spread([run[key] for run in runs]) for key in ('accuracy', 'f1_macro')]
        cells = (steps or 'none', f'{runs[0]["trainable_parameters"]:,}', *scores)
        lines.append(f'| {" | ".join(cells)} |')
    count = len(result['seeds'])
    tagger = f' Tags by {result["tagger"]}.' if result['tagger'] else ''
    first = next(iter(result['runs'].values()))[0]
    note = (
        f'TREC, {first["examples"]:,} test questions, `attention` over `minilm`, '
        f'{result["epochs"]:g} epochs, '
        f'{f"mean ± s.d. of {count} seeds" if count > 1 else "one seed"}; stop words are those of '
        f'the English list of `stop-words`.{tagger} Made by `python -m experiments.preprocessing`.'
    )
    return '\n'.join([*lines, '', note])


def _spread(values: Sequence[float]) -> str:
    deviation = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{deviation}'


def main(output: str, data: str, spacy: str, tagger: str, seeds: int, epochs: float) -> None:
    """Train, evaluate, write and print."""
    if spacy and tagger:
        raise ValueError(f'--spacy={spacy} and --tagger={tagger} name two taggers; give one')
    step = f'tags[spacy={spacy}]' if spacy else f'tags[adapter={tagger}]' if tagger else ''
    rows = variants(step)
    load = preprocessing.load_adapter_tagger
    chains = {name: chain.create(steps, load) for name, steps in rows.items()}
    directory = files.make_directory(output)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    for seed in range(seeds):
        for name, steps in chains.items():
            config = make_config(data, steps, seed, epochs)
            runs[name].append(score(config, directory / f'{name}_{seed}'))
    result = {
        'seeds': list(range(seeds)),
        'epochs': epochs,
        # Without their options, which name places on this machine.
        'steps': {n: [step.partition('[')[0] for step in steps] for n, steps in rows.items()},
        'tagger': next((taken.source for _, taken in chains.get('tags', ())), ''),
        'runs': runs,
        **describe(),
    }
    write(directory, 'preprocessing', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of workdirs and results.'),
        'data': flags.DEFINE_string('data', None, 'Folder with TREC.train.all and TREC.test.all.'),
        'spacy': flags.DEFINE_string('spacy', '', 'A spaCy pipeline that tags.'),
        'tagger': flags.DEFINE_string('tagger', '', 'A tagging adapter that tags.'),
        'seeds': flags.DEFINE_integer('seeds', 3, 'How many seeds, from 0.', lower_bound=1),
        'epochs': flags.DEFINE_float('epochs', 6.0, 'Passes over the questions.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
