"""A small ViT, pretrained on one set of images and adapted to others: what is won, and forgotten.

    python -m experiments.domains.images --output=DIR --images=IMAGES [--seeds=1,2]
        [--pretrain_epochs=40] [--epochs=12] [--targets=classes,digits] [--methods=...]

IMAGES is CIFAR-10 or a part of it, as a folder or a tar file with train/CLASS and test/CLASS. The
ViT is pretrained here, from scratch, on the classes but the last three in the alphabet. It is
adapted to these three (`classes`) and to handwritten digits (`digits`, which come with
scikit-learn, drawn as large as the images), by adapters, by tuning all of it and by a head alone,
and beside that it is trained on them from scratch. Then each is looked at with the first set and
the head of the pretraining again: with an adapter that is simply off, or with what tuning has left
of the weights.

Everything goes through the training command's own function; the fresh weights are a checkpoint
folder like any other. Runs that are finished are not run again. Writes DIR/images.json and .md.
"""

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from adapters_jax import config as configs
from adapters_jax import entry, files
from adapters_jax.adapters import registry
from adapters_jax.config import Config
from adapters_jax.convert import convert
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder, hf_export
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone, describe_backbone, load_backbone
from adapters_jax.models.backbone import Backbone
from adapters_jax.tasks.task import Encoding
from adapters_jax.train import train
from adapters_jax.training import experiment, inference
from adapters_jax.training.provenance import describe
from configs import images as shipped
from experiments.domains import image_sets
from experiments.output import where, write

VIT = {
    'model_type': 'vit',
    'hidden_size': 96,
    'num_hidden_layers': 4,
    'num_attention_heads': 4,
    'intermediate_size': 192,
    'image_size': image_sets.SIDE,
    'patch_size': 4,
    'num_channels': 3,
    'hidden_act': 'gelu',
    'layer_norm_eps': 1e-6,
    'hidden_dropout_prob': 0.0,
    'attention_probs_dropout_prob': 0.0,
}
SCRATCH = 'scratch'
# Learning rates, of adapters and of what is no adapter. Those of adapters and of `full` are the
# better ones of two (3e-3, 1e-2; 3e-4, 1e-3) by the validation images of digits after five epochs.
RATE, RATES = 1e-2, {'full': 1e-3, 'head': 1e-2, SCRATCH: 1e-3}
_NO_LETTER = re.compile(r'\W+')
METHODS = (
    'pfeiffer[reduction_factor=4]',
    'lora[r=8,attn_matrices=[q,k,v]]',
    'adapter_plus[reduction_factor=8]',
    'full',
    'head',
    SCRATCH,
)
# Mirrored, a digit is none.
AUGMENT = {'first': 'crop_flip', 'classes': 'crop_flip', 'digits': 'crop'}
DEFAULTS = {'pretrain_epochs': 40.0, 'epochs': 12.0}  # some 25 minutes of two quiet cores


def write_fresh(directory: Path, seed: int) -> str:
    """Write a ViT with fresh weights as a checkpoint folder, unless there; return its name."""
    if directory.is_dir():
        return str(directory)
    described = directory.with_name(f'{directory.name}-config')
    described.mkdir(parents=True, exist_ok=True)
    files.write_json(described / 'config.json', VIT)
    loaded = describe_backbone(str(described))
    config, key = loaded.config, jax.random.key(seed)
    drawn = Backbone(config).init(key, config.stem.example(), method='initialise')['params']
    hf_export.save(drawn, loaded, directory)
    return str(directory)


def make_config(
    method: str, backbone: str, target: Path, epochs: float, seed: int, rate: float
) -> Config:
    """Return the config of one run."""
    config = shipped.get_config(f'augment={AUGMENT[target.name]}')
    config.method, config.backbone, config.data.dir = method, backbone, str(target)
    config.task.primary = 'accuracy'
    config.data.batching = 'buckets'
    config.training.epochs, config.training.patience, config.seed = epochs, 0, seed
    config.optimizer.learning_rate, config.optimizer.schedule = rate, 'cosine'
    config.optimizer.weight_decay = 0.05
    return config


def pretrain(directory: Path, first: Path, epochs: float, seed: int) -> tuple[Path, Path]:
    """Train a fresh ViT on the first set; return its checkpoint folder and its workdir."""
    workdir, checkpoint = directory / f'first_{seed}', directory / f'pretrained_{seed}'
    fresh = write_fresh(directory / f'fresh_{seed}', seed)
    train(make_config('full', fresh, first, epochs, seed, RATES[SCRATCH]), workdir)
    if not checkpoint.is_dir():
        convert(workdir / 'adapter', checkpoint, 'merged')
    return checkpoint, workdir


class First:
    """The first set's test images, and the head of the pretraining."""

    def __init__(self, folder: AdapterFolder, loaded: LoadedBackbone, first: Path) -> None:
        """Encode the images; `folder` is what the pretraining has left."""
        self._config, self._loaded = configs.base(), loaded
        self._config.data.dir = str(first)
        head = registry.create('head').to_json()
        changed = {'method': head, 'backbone': loaded.describe(), 'backbone_params': {}}
        self._folder = dataclasses.replace(folder, **changed)
        self._task = experiment.task_of(folder)
        self._rows = self._task.read(self._config.data)['test']
        self._encoded = self._task.encode(self._rows, Encoding(None, 1))

    def accuracy(self, adapter: AdapterFolder | None = None) -> float:
        """Return it with the adapter off: with the weights as its training has left them."""
        whole = self._loaded.params
        if adapter is not None:
            whole = adapter.overlay(whole, {})['backbone']
        loaded = dataclasses.replace(self._loaded, params=whole)
        given = self._folder, loaded, self._encoded, self._config, self._task
        return self._task.score(inference.outputs(*given), self._encoded, self._rows)['accuracy']


def adapt(
    method: str, target: Path, pretrained: str, fresh: str, workdir: Path, epochs: float, seed: int
) -> dict[str, float]:
    """Train on the second set and evaluate there; return what the table needs."""
    alone = method == SCRATCH
    config = make_config(
        'full' if alone else method,
        fresh if alone else pretrained,
        target,
        epochs,
        seed,
        RATES.get(method, RATE),
    )
    summary = train(config, workdir)
    path = workdir / 'evaluation_test.json'
    found = json.loads(path.read_text()) if path.exists() else evaluate(workdir)
    return {
        'accuracy': found['metrics']['accuracy'],
        'examples': found['examples'],
        'trainable_parameters': summary['trainable_parameters'],
        'total_parameters': summary['total_parameters'],
        'seconds': summary['seconds'],
    }


def run_seed(
    directory: Path, sets: Mapping[str, Path], given: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Return the results of one seed: of the first set, and of each target and method."""
    checkpoint, workdir = pretrain(directory, sets['first'], given['pretrain_epochs'], seed)
    loaded = load_backbone(str(checkpoint))
    first = First(adapter_folder.load(workdir / 'adapter'), loaded, sets['first'])
    summary = json.loads((workdir / 'summary.json').read_text())
    before = first.accuracy()
    found: dict[str, Any] = {'accuracy': before, 'seconds': summary['seconds'], 'targets': {}}
    fresh = write_fresh(directory / f'fresh_{seed}', seed)
    for target in given['targets']:
        rows = found['targets'][target] = {}
        for method in given['methods']:
            own = directory / f'{target}_{_NO_LETTER.sub("-", method).strip("-")}_{seed}'
            places = sets[target], str(checkpoint), fresh, own
            rows[method] = adapt(method, *places, given['epochs'], seed)
            if method != SCRATCH:
                rows[method]['first'] = first.accuracy(adapter_folder.load(own / 'adapter'))
            print(f'{target} {method} seed {seed}: {rows[method]}', flush=True)
    return found


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown tables, and below them how it was measured."""
    seeds = result['seeds']
    titles = {'classes': 'three other classes', 'digits': 'handwritten digits'}
    before = [seed['accuracy'] for seed in seeds]
    lines = []
    for target in result['targets']:
        columns = ('accuracy', 'trained parameters', 'seconds', 'first set', 'forgotten')
        lines += [f'| {titles[target]}: method | {" | ".join(columns)} |', '|---' * 6 + '|']
        for method in result['methods']:
            runs = [seed['targets'][target][method] for seed in seeds]
            lines.append(f'| `{method}` | {" | ".join(_cells(runs, before))} |')
        lines.append('')
    note = (
        f'A ViT of {result["parameters"]:,} parameters, trained from scratch on '
        f'{result["sizes"]["first"][0]:,} images of {result["classes"]["first"]} classes '
        f'({result["pretrain_epochs"]:g} epochs, {_spread([s["seconds"] for s in seeds], 0)} s): '
        f'accuracy {_spread(before)} on their {result["sizes"]["first"][1]:,} test images. Adapted '
        f'for {result["epochs"]:g} epochs; {_sizes(result)}. The best epoch by a tenth of the '
        'training images; test images were looked at once. Learning rates are '
        f'{RATE:g} for adapters, '
        f'{", ".join(f"{rate:g} for `{name}`" for name, rate in RATES.items())}; those of adapters '
        'and of `full` are the better of two by validation images of digits (seed 0), and nothing '
        'was tuned for the three classes. `first set` is the accuracy there '
        'afterwards, with the adapter off. '
        f'{"Mean ± s.d. of " + str(len(seeds)) + " seeds" if len(seeds) > 1 else "One seed"}; '
        f'{where(result)}. Made by '
        '`python -m experiments.domains.images --images=CIFAR --output=DIR`.'
    )
    return '\n'.join([*lines, note])


def _cells(runs: Sequence[Mapping[str, float]], before: Sequence[float]) -> list[str]:
    first = runs[0]
    share = 100 * first['trainable_parameters'] / first['total_parameters']
    kept = [run['first'] for run in runs if 'first' in run]
    lost = [b - after for b, after in zip(before, kept, strict=False)]
    return [
        _spread([run['accuracy'] for run in runs]),
        f'{first["trainable_parameters"]:,} ({share:.1f} %)',
        _spread([run['seconds'] for run in runs], 0),
        _spread(kept) if kept else '–',
        ('0' if not any(lost) else _spread(lost)) if kept else '–',
    ]


def _sizes(result: Mapping[str, Any]) -> str:
    """Say how large the second sets are."""
    return ', '.join(
        f'{target}: {result["classes"][target]} classes, {result["sizes"][target][0]:,} images to '
        f'learn from and {result["sizes"][target][1]:,} to test'
        for target in result['targets']
    )


def _spread(values: Sequence[float], digits: int = 3) -> str:
    deviation = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{deviation}'


def main(
    output: str,
    images: str,
    seeds: Sequence[str],
    pretrain_epochs: float,
    epochs: float,
    targets: Sequence[str],
    methods: Sequence[str],
) -> None:
    """Pretrain, adapt, look back, write and print."""
    unknown = [target for target in targets if target not in ('classes', 'digits')]
    if unknown:
        raise ValueError(f'--targets={unknown[0]}; expected classes, digits or both')
    directory = files.make_directory(output)
    sets = image_sets.write_sets(images, directory / 'sets')
    given = {'pretrain_epochs': pretrain_epochs, 'epochs': epochs}
    given |= {'targets': list(targets), 'methods': list(methods)}
    found = [run_seed(directory, sets, given, seed) for seed in map(int, seeds)]
    counted = {name: image_sets.count(folder) for name, folder in sets.items()}
    summary = json.loads((directory / f'first_{seeds[0]}' / 'summary.json').read_text())
    result = given | {
        'parameters': summary['total_parameters'],
        'sizes': {name: sizes for name, (sizes, _) in counted.items()},
        'classes': {name: classes for name, (_, classes) in counted.items()},
        'vit': VIT,
        'seeds': found,
        **describe(),
    }
    write(directory, 'images', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of workdirs and results.'),
        'images': flags.DEFINE_string('images', None, 'CIFAR-10: a folder or a tar file.'),
        'seeds': flags.DEFINE_list('seeds', '1', 'Seeds; learning rates were chosen with 0.'),
        'pretrain_epochs': flags.DEFINE_float(
            'pretrain_epochs', DEFAULTS['pretrain_epochs'], 'Passes over the first set.'
        ),
        'epochs': flags.DEFINE_float('epochs', DEFAULTS['epochs'], 'Passes over a second set.'),
        'targets': flags.DEFINE_list('targets', 'classes,digits', 'The second sets.'),
        'methods': flags.DEFINE_multi_string('methods', list(METHODS), 'What is compared.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
