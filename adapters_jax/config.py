"""Every key of a run's configuration, with its default and its meaning, in one place.

A config file is a function of an argument (`--config=configs/glue.py:task=mrpc,method=houlsby`)
that starts from `base()` and overrides. The result is locked: a key that is not here is refused,
and each key that is here is read by something.
"""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from adapters_jax.params import flatten

Config = ConfigDict

# Keys that may differ between a run and its continuation: they change no number.
NEUTRAL_KEYS = ('training.log_every', 'training.checkpoint_every', 'mesh.data', 'data.cache_dir')


def base() -> Config:
    """Return a fresh, locked config with every key at its default."""
    config = ConfigDict()
    # All randomness of a run follows from this number: order, dropout, initialisation.
    config.seed = 0
    # A short name ('minilm'), a Hugging Face id, or a directory with config.json and weights.
    config.backbone = 'minilm'
    # A method with options, or several joined by '|': 'houlsby', 'pfeiffer[reduction_factor=8]',
    # 'lora[r=16]|houlsby[size=8]', 'full'. Names: adapters_jax/adapters/presets.py; options: the
    # fields of the class that the name stands for.
    config.method = 'houlsby'
    config.task = _task()
    config.data = _data()
    config.head = _head()
    config.optimizer = _optimizer()
    config.training = _training()
    config.mesh = ConfigDict(
        {
            # Devices that the rows of a batch are spread over; -1 takes all there are.
            'data': -1,
        }
    )
    config.lock()
    return config


def _task() -> Config:
    return ConfigDict(
        {
            # 'classification' or 'regression'.
            'name': 'classification',
            # Class names in their order; empty: the sorted labels of the training data.
            'labels': (),
            # What is reported; empty: the task's own list.
            'metrics': (),
            # The metric that picks the best step and stops training early; empty: the task's own.
            'primary': '',
            # The class that 'precision', 'recall' and 'f1' are about; empty: with two classes the
            # second one.
            'positive': '',
        }
    )


def _data() -> Config:
    return ConfigDict(
        {
            # A built-in data set ('trec', 'trec_fine', 'movie_sentiment', 'sms_spam') or a hub id.
            'name': '',
            # The hub data set's configuration, where it has several.
            'config_name': '',
            # A folder: of train/validation/test files, or of GLUE task folders when `glue` is set.
            'dir': '',
            # A GLUE task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli.
            'glue': '',
            # Explicit files instead of a folder: CSV, TSV, JSONL, JSON, Parquet or text, also .gz.
            'train': '',
            'validation': '',
            'test': '',
            # Column names, or numbers from 0 in files without a header; empty: detected.
            'columns': ConfigDict({'text_a': '', 'text_b': '', 'label': ''}),
            # Whether a file's first line names its columns: 'true', 'false' or 'auto'.
            'header': 'auto',
            # The files' encoding; a byte-order mark is dropped by 'utf-8-sig'.
            'encoding': 'utf-8-sig',
            # The character between columns; empty: by the file's ending.
            'delimiter': '',
            # 'csv': quotes delimit fields; 'none': quotes are text; 'auto': 'csv' for .csv files,
            # 'none' for others.
            'quoting': 'auto',
            # Shares of the training file that become validation and test where those are missing.
            'split_fractions': (0.1, 0.1),
            'split_seed': 0,
            # Use only so many examples of each split; 0: all of them.
            'limit': 0,
            # Tokens of an example, special ones included; longer texts are cut.
            'max_length': 128,
            # 'packed': several short texts to a row, about `training.batch_size` examples a step.
            # 'buckets': one text a row, a few fixed lengths, exactly that many examples a step.
            'batching': 'packed',
            # Where token ids are kept between runs; empty: the project's cache; 'none': nowhere.
            'cache_dir': '',
        }
    )


def _head() -> Config:
    return ConfigDict(
        {
            # 'mean', 'cls' or 'pooler': how an example's tokens become one vector.
            'pooling': 'mean',
            # Dense layers; all but the last keep the hidden size and end in `activation`.
            'layers': 1,
            'activation': 'tanh',
            'dropout': 0.1,
        }
    )


def _optimizer() -> Config:
    return ConfigDict(
        {
            'learning_rate': 1e-3,
            # After warm-up: 'linear' to zero, 'cosine' to zero, or 'constant'.
            'schedule': 'linear',
            # Share of all steps in which the learning rate rises from zero.
            'warmup': 0.1,
            'weight_decay': 0.01,
            # Leaves without weight decay: regular expressions over '/'-joined paths.
            'decay_exclude': (
                r'(.*/)?bias',
                r'(.*/)?[a-z_]*norm[a-z0-9_]*/.*',
                r'(.*/)?(scale|scaling|magnitude)',
            ),
            # Largest global norm of the gradient; 0: no clipping.
            'clip_norm': 1.0,
            'b1': 0.9,
            'b2': 0.999,
            'epsilon': 1e-8,
            # False reproduces the AdamWeightDecay of the original BERT code.
            'bias_correction': True,
        }
    )


def _training() -> Config:
    return ConfigDict(
        {
            # Examples of one update, over all devices and accumulation steps.
            'batch_size': 32,
            # Passes over the training data; `steps`, when above 0, replaces it.
            'epochs': 3.0,
            'steps': 0,
            # Steps between evaluations on the validation split; 0: once per epoch.
            'evaluate_every': 0,
            # Evaluations without improvement after which training stops; 0: never.
            'patience': 0,
            # Steps between checkpoints (there is one at every evaluation, too); 0: only those.
            'checkpoint_every': 200,
            # Steps between lines in the log and in metrics.jsonl.
            'log_every': 20,
            # Parts that a batch is cut into, to save memory; the update is the same.
            'accumulate': 1,
            'label_smoothing': 0.0,
            # Whether the backbone's and the adapter's dropout run in training.
            'dropout': True,
            # What activations are computed in: 'float32' or 'bfloat16'.
            'dtype': 'float32',
            # What frozen weights are stored in: 'float32' or 'bfloat16'.
            'frozen_dtype': 'float32',
            # Recompute activations in the backward pass instead of keeping them.
            'remat': False,
        }
    )


def parse_arg(argument: str | None, **defaults: Any) -> Config:
    """Parse the `key=value,key=value` after a config file's colon.

    Values are converted to the type of the key's default; commas inside brackets do not separate.

    Raises:
        ValueError: an unknown key (the known ones are listed) or a value of another type.
    """
    parsed = ConfigDict(defaults)
    for item in split_outside_brackets(argument or ''):
        key, separator, value = item.partition('=')
        if key not in defaults or not separator:
            known = ', '.join(f'{name}={default!r}' for name, default in defaults.items())
            raise ValueError(
                f'config argument {item!r} is not understood; expected key=value with {known}'
            )
        parsed[key] = _convert(key, value, defaults[key])
    return parsed


def split_outside_brackets(text: str, separator: str = ',') -> list[str]:
    """Split at separators that are not inside (), [] or {}; blank parts are dropped.

    Raises:
        ValueError: brackets that do not match.
    """
    if any(text.count(left) != text.count(right) for left, right in ('()', '[]', '{}')):
        raise ValueError(f'the brackets in {text!r} do not match')
    parts, depth = [''], 0
    for letter in text:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == separator and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _convert(key: str, value: str, default: Any) -> Any:
    if isinstance(default, str):
        return value
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f'config argument {key} is {value!r}; '
            f'expected {type(default).__name__}, such as {default!r}'
        ) from error
    return _as_type_of(default, literal, f'config argument {key}')


def _as_type_of(default: Any, value: Any, name: str) -> Any:
    """Return the value as a config holds it: whole numbers may stand for floats, and JSON's and
    Python's lists for tuples, but nothing else for anything else."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(
            f'{name} is {value!r} ({type(value).__name__}); '
            f'expected {type(default).__name__}, such as {default!r}'
        )
    return value


def to_json(config: Config) -> dict[str, Any]:
    """Return the config as nested dicts of JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def decisive(config: Config) -> dict[str, Any]:
    """Return the keys that a run's numbers depend on, with dots between levels."""
    leaves = {path.replace('/', '.'): v for path, v in flatten(to_json(config)).items()}
    return {key: value for key, value in leaves.items() if key not in NEUTRAL_KEYS}


def differences(old: Config, new: Config) -> list[str]:
    """Return a phrase for each decisive key whose value changed."""
    before, now = decisive(old), decisive(new)
    return [
        f'{key} was {before[key]!r}, now {now[key]!r}' for key in now if before[key] != now[key]
    ]


def from_json(values: Mapping[str, Any]) -> Config:
    """Rebuild a config from `to_json`'s result; keys this version does not know are refused.

    Raises:
        ValueError: unknown keys, listed by path, or a value of another type than the default's.
    """
    config = base()
    _update(config, values, '')
    return config


def read(path: Path) -> Config:
    """Read the config.json of a workdir.

    Raises:
        FileNotFoundError: no such file: the directory is not a workdir.
        ValueError: a file that is not JSON, or not of a config.
    """
    if not path.exists():
        raise FileNotFoundError(
            f'{path} does not exist: {path.parent} is not the workdir of a run; '
            'expected the directory given to adapters_jax.train as --workdir'
        )
    try:
        values = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    return from_json(values)


def _update(config: Config, values: Any, prefix: str) -> None:
    if not isinstance(values, Mapping):
        where = f'config key {prefix[:-1]}' if prefix else 'the config'
        raise ValueError(
            f'{where} is {values!r}; expected an object with {", ".join(sorted(config))}'
        )
    unknown = [prefix + key for key in values if key not in config]
    if unknown:
        raise ValueError(
            f'unknown config keys {", ".join(unknown)}; known here: {", ".join(sorted(config))}'
        )
    for key, value in values.items():
        if isinstance(config[key], ConfigDict):
            _update(config[key], value, f'{prefix}{key}.')
        else:
            config[key] = _as_type_of(config[key], value, f'config key {prefix}{key}')
