"""Configs: how they are made, changed by texts, compared and stored; `defaults.py` has the keys.

A config file is a function of an argument (`--config=configs/glue.py:task=mrpc,method=houlsby`)
that starts from `base()` and overrides. The result is locked: an unknown key is refused.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from adapters_jax import defaults, grammar
from adapters_jax.defaults import Config, base
from adapters_jax.params import flatten, unflatten

# Keys that may differ between a run and its continuation: they change no number.
NEUTRAL_KEYS = (
    'training.log_every',
    'training.checkpoint_every',
    'mesh.data',
    'mesh.members',
    'mesh.fsdp',
    'mesh.tensor',
    'mesh.frozen',
    'mesh.rules',
    'data.cache_dir',
    'sweep.chunk',
)
# Keys that say where backbone and data lie; what they are, their fingerprints say.
_PLACE = re.compile(r'(^|\.)(backbone|data\.(name|dir|train|validation|test))$')

# A quoted value, and what stands before one.
_QUOTED = re.compile(r"""((?:^|[,;=:(\[{])\s*)('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")""")
# Keys of `data` that all tasks of a run have in common.
_SHARED_DATA = ('seed', 'batching', 'cache_dir')


def add_task(config: Config, name: str) -> Config:
    """Give the run one more task, with every key at its default, and return its section.

    Raises:
        ValueError: a name that is taken, or that could not be a key and a folder.
    """
    if not re.fullmatch(r'[A-Za-z]\w*', name) or hasattr(ConfigDict, name) or name in config.tasks:
        raise ValueError(
            f'a task is named {name!r}; expected letters, digits and _, beginning with a letter, '
            'and neither a word of the config library nor the name of another task '
            f'({", ".join(config.tasks) or "none yet"})'
        )
    section = ConfigDict(
        {
            # The keys of `task`.
            'task': defaults.task(),
            # The keys of `data` that say where examples come from and how long they are. One that
            # is left at its default is taken from `data`.
            'data': ConfigDict({k: v for k, v in defaults.data().items() if k not in _SHARED_DATA}),
            # The factor of the task's loss.
            'weight': 1.0,
            # The relative number of the task's examples where mixing.schedule is 'shares'.
            'share': 1.0,
        }
    )
    with config.unlocked():
        config.tasks[name] = section
    return config.tasks[name]


def of_task(config: Config, name: str) -> Config:
    """Return the config of a run of one of the tasks by itself."""
    values, section = to_json(config), to_json(config.tasks[name])
    default, own = flatten(to_json(defaults.data())), flatten(section['data'])
    given = {path: value for path, value in own.items() if value != default[path]}
    data = unflatten(flatten(values['data']) | given)
    return from_json(values | {'tasks': {}, 'task': section['task'], 'data': data})


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


def named_items(text: str, key: str) -> dict[str, str]:
    """Parse 'name=value,name=value'; commas inside brackets do not separate.

    Raises:
        ValueError: an item without a name or a value, or a name that comes twice.
    """
    items: dict[str, str] = {}
    for item in split_outside_brackets(text):
        name, _, value = (part.strip() for part in item.partition('='))
        if not name or not value or name in items:
            raise ValueError(
                f'{key} has the item {item!r}; expected name=value with a name of its own, as in '
                "'a=DIR,b=DIR'"
            )
        items[name] = text_of(value)
    return items


def split_outside_brackets(text: str, separator: str = ',') -> list[str]:
    """Split at separators that are not inside (), [], {} or quotes; blank parts are dropped.

    Quotes are such where a value begins with them, and letters elsewhere (`don't`).

    Raises:
        ValueError: brackets that do not match.
    """
    bare = _QUOTED.sub(lambda quoted: quoted[1] + '_' * len(quoted[2]), text)
    if any(bare.count(left) != bare.count(right) for left, right in ('()', '[]', '{}')):
        raise ValueError(f'the brackets in {text!r} do not match')
    parts, depth = [''], 0
    for letter, plain in zip(text, bare, strict=True):
        depth += (plain in '([{') - (plain in ')]}')
        if plain == separator and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def text_of(value: str) -> str:
    """Return a text as it is meant: in quotes it may end with a blank, and hold separators.

    Raises:
        ValueError: it begins with a quote and does not end with it.
    """
    return grammar.parse_value(value) if value[:1] in ('"', "'") else value


def _convert(key: str, value: str, default: Any, what: str = 'config argument') -> Any:
    if isinstance(default, str):
        return text_of(value)
    try:
        literal = ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f'{what} {key} is {value!r}; expected {type(default).__name__}, such as {default!r}'
        ) from error
    return _as_type_of(default, literal, f'{what} {key}')


def assign(config: Config, key: str, text: str) -> Any:
    """Set a key, written with dots between levels, to the value that a text writes; return it.

    Raises:
        ValueError: an unknown key (those known at that level are listed), or a value of another
            type than the key's default.
    """
    node: Any = config
    *parents, name = key.split('.')
    for level, part in enumerate([*parents, name]):
        if not isinstance(node, ConfigDict) or part not in node:
            known = ', '.join(sorted(node)) if isinstance(node, ConfigDict) else 'nothing below it'
            raise ValueError(f'unknown config key {key}: no {part!r} here; known: {known}')
        node = node[part] if level < len(parents) else node
    if isinstance(node[name], ConfigDict):
        raise ValueError(f'config key {key} is a group of keys; known: {", ".join(node[name])}')
    value = _convert(key, text, node[name], 'config key')
    node[name] = value
    return value


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
    if isinstance(value, tuple):
        _check_items(default, value, name)
    return value


def _check_items(default: tuple[Any, ...], value: tuple[Any, ...], name: str) -> None:
    kind = type(default[0]) if default else str  # what is empty by default holds texts
    kinds = (float, int) if kind is float else (kind,)
    wrong = [item for item in value if type(item) not in kinds]
    if wrong:
        raise ValueError(
            f'{name} has the item {wrong[0]!r} ({type(wrong[0]).__name__}); each is '
            f'expected to be {kind.__name__}, as in {default or ("a", "b")!r}'
        )


def to_json(config: Config) -> dict[str, Any]:
    """Return the config as nested dicts of JSON values."""
    return json.loads(json.dumps(config.to_dict()))


def decisive(config: Config) -> dict[str, Any]:
    """Return the keys that a run's numbers depend on, with dots between levels."""
    leaves = {path.replace('/', '.'): v for path, v in flatten(to_json(config)).items()}
    return {key: value for key, value in leaves.items() if key not in NEUTRAL_KEYS}


def defaults_of(keys: Iterable[str]) -> dict[str, Any]:
    """Return the decisive keys of a run, also those of the tasks in `keys`, at their defaults."""
    config = base()
    for name in dict.fromkeys(re.findall(r'^tasks\.(\w+)\.', '\n'.join(keys), re.MULTILINE)):
        add_task(config, name)
    return decisive(config)


def is_place(key: str) -> bool:
    """Tell whether a key says where the backbone or data of a run lie."""
    return _PLACE.search(key) is not None


def differences(old: Config, new: Config, anywhere: bool = False) -> list[str]:
    """Return a phrase for each decisive key whose value changed.

    With `anywhere`, backbone and data may lie elsewhere than before.
    """
    before, now = decisive(old), decisive(new)
    return [
        f'{key} was {before.get(key)!r}, now {now.get(key)!r}'
        for key in sorted(before | now)
        if before.get(key) != now.get(key) and not (anywhere and is_place(key))
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
        if not prefix and key == 'tasks' and isinstance(value, Mapping):
            for name in value:
                add_task(config, name)
        if isinstance(config[key], ConfigDict):
            _update(config[key], value, f'{prefix}{key}.')
        else:
            config[key] = _as_type_of(config[key], value, f'config key {prefix}{key}')
