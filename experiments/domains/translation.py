"""Translation: a model for one domain, adapters for another, and what each forgets.

    python -m experiments.domains.translation --output=DIR --data=MULTI30K [--epochs=8]
        [--methods=full,houlsby,pfeiffer,lora,prefix] [--tuning_epochs=30] [--trial_epochs=12]

The base model has the encoder of MiniLM and a fresh decoder of three layers, and is trained in full
on English image captions and their German translations (Multi30k: train.en.gz, train.de.gz, ...).
Adapters then learn what a web framework says to its users (Django's .po files, fetched from the
package index), in both stacks and between them, against full fine-tuning and no tuning.
A method's learning rate is the one of two that has the lower cross-entropy on the validation
strings after `--trial_epochs`. Both domains are scored with what was trained, and the first one
also with the adapter off. Adapters of another language, French, are trained on the captions too,
unless --language_epochs=0.

Runs that are finished are not run again. Writes DIR/base/ (a folder for `config.backbone`),
DIR/trials/, DIR/runs/, DIR/translation.json and .md. On two quiet cores the base model takes most
of an hour.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from adapters_jax import entry, files
from adapters_jax.config import Config
from adapters_jax.data import parallel
from adapters_jax.interop import formats
from adapters_jax.predict import predict
from adapters_jax.tasks.text_metrics import TEXT_METRICS
from adapters_jax.train import train
from adapters_jax.training.provenance import describe
from configs import seq2seq
from experiments import edges
from experiments.domains import base_model, interface_texts
from experiments.output import where, write

LAYERS, WORDS, BEAMS = 3, 8000, 5
CAPTIONS, STRINGS, FRENCH = 'captions', 'strings', 'captions in French'
OFF = 'captions, adapter off'
LORA = 'lora[r=8,alpha=8,attn_matrices=[q,k,v,o],intermediate_lora=True,output_lora=True]'


class Way(NamedTuple):
    """A way to learn another domain, and the learning rates that are tried for it."""

    title: str
    method: str
    rates: tuple[float, float]


METHODS = {
    'full': Way('full fine-tuning', 'full', (2e-4, 5e-4)),
    'houlsby': Way('Houlsby adapters', 'houlsby[reduction_factor=8]', (2e-3, 1e-2)),
    'pfeiffer': Way('Pfeiffer adapters', 'pfeiffer[reduction_factor=8]', (2e-3, 1e-2)),
    'lora': Way('LoRA, all products', LORA, (3e-3, 1e-2)),
    'prefix': Way('prefix tuning', 'prefix_tuning_flat', (2e-3, 1e-2)),
}


class Lesson(NamedTuple):
    """What is learned over the base model: a folder of texts, their language ('' for strings)."""

    data: str
    language: str
    epochs: float
    seed: int


def make_base(output: Path, data: str, epochs: float, seed: int) -> dict[str, Any]:
    """Train the base model, unless that is done; return what its run says."""
    start, workdir = output / 'fresh', output / 'runs' / 'base'
    if not (start / 'model.safetensors').exists():
        splits = {
            own: parallel.load({'dir': data, 'languages': f'en,{own}'}) for own in ('de', 'fr')
        }
        texts = [text for own in splits.values() for text in own['train']['target'][:]]
        base_model.write(start, 'minilm', texts, LAYERS, WORDS, seed)
    config = _config(str(start), 'full', data, 'de', seed)
    config.optimizer.learning_rate, config.training.epochs = 5e-4, epochs
    config.training.batch_size, config.training.label_smoothing = 64, 0.1
    summary = train(config, workdir)
    if not (output / 'base').exists():
        folder, loaded = formats.load(workdir / 'adapter', str(start))
        formats.save(folder, output / 'base', loaded, formats.MERGED)
    return summary


def _config(backbone: str, method: str, data: str, language: str, seed: int) -> Config:
    """Return a run's config: the best step has the lowest cross-entropy, and no text is written."""
    config = seq2seq.get_config(f'backbone={backbone},method={method}')
    config.data.dir, config.data.max_length = data, 64
    config.data.languages = f'en,{language}' if language else ''
    config.data.quoting = 'none'
    config.task.target_length, config.task.beams = 64, BEAMS
    config.task.metrics, config.task.primary = ('nll', 'token_accuracy'), 'nll'
    config.seed = seed
    return config


def choose_rate(output: Path, name: str, lesson: Lesson) -> dict[str, Any]:
    """Train with each rate for a while; return the cross-entropies, and the rate of the lowest."""
    found = {}
    for rate in METHODS[name].rates:
        summary = tune(output, output / 'trials' / f'{name}_{rate:g}', name, rate, lesson)
        found[rate] = summary['metrics']['validation']['nll']
    return {'nll': found, 'rate': min(found, key=found.get)}


def tune(output: Path, workdir: Path, name: str, rate: float, lesson: Lesson) -> dict[str, Any]:
    """Train a method on another domain, over the base model; return what its run says."""
    data, language, epochs, seed = lesson
    config = _config(str(output / 'base'), METHODS[name].method, data, language, seed)
    config.optimizer.learning_rate, config.training.epochs = rate, epochs
    return train(config, workdir)


def score(
    adapter: Path, backbone: Path, rows: Mapping[str, Any], off: bool = False
) -> dict[str, float]:
    """Translate a split's texts, and compare them with its translations."""
    texts = [{'text': text} for text in rows['text_a']]
    found = predict(adapter, texts, str(backbone), off=off)
    written = [row['prediction'] for row in found]
    return {name: TEXT_METRICS[name](written, rows['target'][:]) for name in ('bleu', 'chrf')}


class Tests:
    """The test splits, by domain."""

    def __init__(self, data: str, strings: Path) -> None:
        captions = {own: {'dir': data, 'languages': f'en,{own}'} for own in ('de', 'fr')}
        self.rows = {
            CAPTIONS: parallel.load(captions['de'])['test'],
            STRINGS: parallel.load({'dir': str(strings), 'quoting': 'none'})['test'],
            FRENCH: parallel.load(captions['fr'])['test'],
        }
        self.rows[OFF] = self.rows[CAPTIONS]

    def score(
        self, path: Path, adapter: Path, backbone: Path, domains: Sequence[str]
    ) -> dict[str, Any]:
        """Score an adapter on domains, once: what is in the file `path` is not done again."""
        known = json.loads(path.read_text()) if path.exists() else {}
        for domain in domains:
            if domain not in known:
                known[domain] = score(adapter, backbone, self.rows[domain], domain == OFF)
                files.write_json(path, known)
        return {domain: known[domain] for domain in domains}


def run(
    output: str,
    data: str,
    epochs: float,
    tuning_epochs: float,
    trial_epochs: float,
    language_epochs: float,
    methods: Sequence[str],
    seed: int,
) -> None:
    """Train and score everything that is missing, and report."""
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f'--methods: unknown {sorted(unknown)}; known: {", ".join(METHODS)}')
    folder = files.make_directory(output)
    strings = folder / 'strings'
    sizes = interface_texts.write(strings, 'de')
    summary = make_base(folder, data, epochs, seed)
    tests, base = Tests(data, strings), folder / 'runs' / 'base'
    scored = tests.score(
        base / 'scores.json', base / 'adapter', folder / 'fresh', (CAPTIONS, STRINGS, FRENCH)
    )
    rows = {'none': {'title': 'the base model', 'scores': scored, 'seconds': summary['seconds']}}
    rows['none'] |= {'trained': 0, 'total': summary['total_parameters']}
    french = [name for name in ('houlsby', 'lora') if language_epochs]
    trial = Lesson(str(strings), '', trial_epochs, seed)
    trials = {name: choose_rate(folder, name, trial) for name in dict.fromkeys([*methods, *french])}
    lesson = trial._replace(epochs=tuning_epochs)
    for name in methods:
        rows[name] = _row(folder, tests, name, trials[name]['rate'], lesson)
    lesson = Lesson(data, 'fr', language_epochs, seed)
    for name in french:
        rows[f'{name}_fr'] = _row(folder, tests, name, trials[name]['rate'], lesson)
    result = {
        'rows': rows,
        'trials': trials,
        'trial_epochs': trial_epochs,
        'sizes': sizes,
        'epochs': epochs,
        'tuning_epochs': tuning_epochs,
        'language_epochs': language_epochs,
        'seed': seed,
        'base_seconds': summary['seconds'],
        **describe(),
    }
    write(folder, 'translation', result, render)


def _row(folder: Path, tests: Tests, name: str, rate: float, lesson: Lesson) -> dict[str, Any]:
    language = lesson.language
    workdir = folder / 'runs' / f'{name}_{language or "strings"}'
    summary = tune(folder, workdir, name, rate, lesson)
    domains = [CAPTIONS, FRENCH if language else STRINGS]
    if name != 'full':  # which has nothing to switch off
        domains.append(OFF)
    scored = tests.score(workdir / 'scores.json', workdir / 'adapter', folder / 'base', domains)
    return {
        'title': METHODS[name].title + (', French' if language else ''),
        'scores': scored,
        'seconds': summary['seconds'],
        'trained': summary['trainable_parameters'],
        'total': summary['total_parameters'],
    }


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    domains = (STRINGS, CAPTIONS, OFF, FRENCH)
    heads = ['tuned', 'trained parameters', 'seconds']
    heads += [f'{domain}: {metric}' for domain in domains for metric in ('BLEU', 'chrF')]
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    for row in result['rows'].values():
        share = 100 * row['trained'] / row['total']
        cells = [row['title'], f'{row["trained"]:,} ({share:.3g} %)' if row['trained'] else '-']
        cells.append(f'{row["seconds"]:,.0f}')
        for domain in domains:
            found = row['scores'].get(domain)
            cells += [f'{found[m]:.1f}' for m in ('bleu', 'chrf')] if found else ['', '']
        lines.append(f'| {" | ".join(cells)} |')
    note = (
        'English to German on image captions (Multi30k, test 2016) and on the strings of a web '
        f'framework (Django, {result["sizes"]["test"]} of which are for testing), {BEAMS} beams, '
        'sacrebleu. The base model: the encoder '
        f'of MiniLM and a fresh decoder, {result["epochs"]:g} epochs of captions in full, '
        f'{result["base_seconds"] / 60:.0f} minutes; then {result["tuning_epochs"]:g} epochs of '
        f'{result["sizes"]["train"]} strings{_of_french(result)}. Learning rates are the better of '
        f'two by the validation strings after {result["trial_epochs"]:g} epochs: '
        f'{_of_rates(result["trials"])}. {_of_edges(result["trials"])} One seed. On '
        f'{where(result)}. Made by `{_of_command(result)}`.'
    )
    return '\n'.join([*lines, '', note])


def _of_french(result: Mapping[str, Any]) -> str:
    epochs = result['language_epochs']
    return f', or {epochs:g} of French captions' if epochs else ''


def _of_rates(trials: Mapping[str, Any]) -> str:
    """Say what was tried: each rate with its cross-entropy, the chosen one first."""
    told = []
    for name, trial in trials.items():
        rates = sorted(trial['nll'].items(), key=lambda item: item[1])
        values = ' or '.join(f'{float(rate):g} ({value:.2f})' for rate, value in rates)
        told.append(f'`{name}` {values}')
    return ', '.join(told)


def _of_edges(trials: Mapping[str, Any]) -> str:
    """Say how often the largest rate was chosen."""
    choices = [(trial['rate'], [float(rate) for rate in trial['nll']]) for trial in trials.values()]
    return edges.told(choices, 'the learning rate')


def _of_command(result: Mapping[str, Any]) -> str:
    methods = ','.join(name for name in METHODS if name in result['rows'])
    names = ('epochs', 'tuning_epochs', 'trial_epochs', 'language_epochs')
    options = ' '.join(f'--{name}={result[name]:g}' for name in names)
    start = 'python -m experiments.domains.translation --data=DATA --output=DIR'
    seed = result.get('seed', 0)
    return f'{start} {options} --methods={methods}' + f' --seed={seed}' * bool(seed)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Folder to write.'),
        'data': flags.DEFINE_string('data', None, 'Multi30k: train.en.gz, train.de.gz, ...'),
        'epochs': flags.DEFINE_float('epochs', 8, 'Epochs of the base model.'),
        'tuning_epochs': flags.DEFINE_float('tuning_epochs', 30, 'Epochs of the interface.'),
        'trial_epochs': flags.DEFINE_float('trial_epochs', 12, 'Epochs with each learning rate.'),
        'language_epochs': flags.DEFINE_float('language_epochs', 1, 'Epochs of French; 0: none.'),
        'methods': flags.DEFINE_list('methods', list(METHODS), 'How strings are learned.'),
        'seed': flags.DEFINE_integer('seed', 0, 'Seed of everything.'),
    }


if __name__ == '__main__':
    entry.run(_define, run)
