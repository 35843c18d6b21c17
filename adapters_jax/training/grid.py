"""What a sweep consists of: its members, and which of them can train as one population.

A grid is a list of axes, each written 'KEY=VALUE,VALUE,...'; its members are all combinations.
Members that differ in nothing but what a population's members may differ in train together.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from adapters_jax import config as configs
from adapters_jax import grammar
from adapters_jax.adapters import bank
from adapters_jax.adapters.method import Method
from adapters_jax.config import Config
from adapters_jax.training.members import load as load_members

GRID = 'sweep.grid'
# What members of one population may differ in, beside sizes that can be padded.
FREE = ('seed', 'optimizer.learning_rate', 'optimizer.weight_decay')
_METHOD = 'method.'
_LONGEST_NAME = 150


@dataclasses.dataclass(frozen=True)
class Axis:
    """A key of the config, or an option of the method, and the texts of its values."""

    key: str
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One run of a sweep: its name, what it has on each axis, and its own whole config."""

    name: str
    settings: dict[str, Any]
    config: Config


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` jobs that share a sweep: it trains every count-th population from `index` on.

    Raises:
        ValueError: there is no such part.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f'--shard={self.index}/{self.count}: parts are numbered from 0; expected a number '
                'below their count'
            )

    @classmethod
    def parse(cls, text: str) -> 'Shard':
        """Parse 'INDEX/COUNT'.

        Raises:
            ValueError: it is not written so, or there is no such part.
        """
        found = re.fullmatch(r'(\d+)/(\d+)', text)
        if not found:
            raise ValueError(f'--shard is {text!r}; expected INDEX/COUNT, such as 0/4')
        return cls(int(found[1]), int(found[2]))

    def numbers(self, populations: int) -> range:
        """Return which of so many populations are this part's."""
        return range(self.index, populations, self.count)


def parse_axis(text: str, where: str = GRID) -> Axis:
    """Parse 'KEY=VALUE,VALUE,...'; commas inside brackets or quotes do not separate.

    `where` is the key of the config that the text comes from.

    Raises:
        ValueError: no key, no value, a key of the sweep itself, or a value that comes twice.
    """
    key, equals, rest = (part.strip() for part in text.partition('='))
    values = configs.split_outside_brackets(rest)
    if not equals or not key or not values:
        raise ValueError(
            f'{where} holds {text!r}; expected KEY=VALUE,VALUE,... such as '
            "'optimizer.learning_rate=3e-4,3e-3' or 'method.size=8,64'"
        )
    if key.split('.')[0] == 'sweep':
        raise ValueError(f'{where} holds {text!r}; a key of the sweep itself cannot be swept')
    texts = [configs.text_of(value) for value in values]
    twice = [value for i, value in enumerate(values) if texts[i] in texts[:i]]
    if twice:
        raise ValueError(f'{where} holds {text!r}, which has the value {twice[0]!r} twice')
    return Axis(key, tuple(values))


def expand(config: Config) -> list[Member]:
    """Return the members of a config's grid; the last axis changes fastest.

    Where the seed is swept and data.seed is not, all members get the same data.seed: the config's
    own seed. So they see the same batches, as a run with one member's config alone does.

    Raises:
        ValueError: no grid, a key or a value that comes twice, an unknown key or option, or a value
            of another type than the key's.
    """
    axes = [parse_axis(text) for text in config.sweep.grid]
    keys = [axis.key for axis in axes]
    if not axes:
        raise ValueError(
            "sweep.grid is empty; expected at least one text such as 'seed=0,1,2' in it, or a "
            'sweep.space to search'
        )
    check_keys(keys)
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    names = _names(keys, combinations)
    members = [
        make_member(config, name, dict(zip(keys, values, strict=True)))
        for name, values in zip(names, combinations, strict=True)
    ]
    check_differ(members)
    return members


def check_differ(members: Sequence[Member], where: str = GRID) -> None:
    """Refuse members that are one run: they would be counted as if they were seeds.

    Raises:
        ValueError: naming two of them, and the config's key `where` that they come from.
    """
    known: dict[str, str] = {}
    for member in members:
        said = json.dumps(configs.decisive(member.config), sort_keys=True)
        other = known.setdefault(said, member.name)
        if other != member.name:
            raise ValueError(
                f'{where} has members whose numbers would be equal, {other} and {member.name}: '
                'write each value once'
            )


def check_keys(keys: Sequence[str], where: str = GRID) -> None:
    """Refuse keys that cannot be swept together; `where` is the config's key that has them.

    Raises:
        ValueError: a key that comes twice, or a method beside its own options.
    """
    twice = [key for i, key in enumerate(keys) if key in keys[:i]]
    if twice:
        raise ValueError(f'{where} has the key {twice[0]!r} twice; give it all of its values')
    if 'method' in keys and any(key.startswith(_METHOD) for key in keys):
        raise ValueError(
            f"{where} has both 'method' and one of its options; write the options into the "
            'methods, such as method=pfeiffer[size=8],pfeiffer[size=64]'
        )


def make_member(base: Config, name: str, texts: Mapping[str, str]) -> Member:
    """Return the run that differs from `base` in these keys, whose values are texts.

    Raises:
        ValueError: an unknown key or option, or a value of another type than the key's.
    """
    config = configs.from_json(configs.to_json(base))
    config.sweep = configs.base().sweep
    if 'seed' in texts and 'data.seed' not in texts and config.data.seed < 0:
        config.data.seed = base.seed
    settings = {key: _assign(config, key, text) for key, text in texts.items()}
    return Member(name, settings, config)


def _assign(config: Config, key: str, text: str) -> Any:
    """Set a key of the config or an option of its method, and return the value."""
    if not key.startswith(_METHOD):
        return configs.assign(config, key, text)
    value = grammar.parse_value(text)
    config.method = with_option(config.method, key.removeprefix(_METHOD).split('.'), value)
    return value


def with_option(method: str, path: Sequence[str], value: Any) -> str:
    """Return a method's text with one option changed.

    `path` is the option's name, after the name of the member where the text joins several, or where
    it is a preset of several.

    Raises:
        ValueError: several methods, and none of them named; an option of what has none.
    """
    parts = grammar.parse(method)
    names = [name for name, _ in parts]
    index, keys = (names.index(path[0]), path[1:]) if path[0] in names else (0, path)
    if not keys or (len(parts) > 1 and keys is path):
        raise ValueError(
            f"the sweep has the key 'method.{'.'.join(path)}', but the method is {method!r}; "
            f'expected method.NAME.OPTION with one of the names {", ".join(names)}'
        )
    *parents, option = keys
    node = parts[index][1]
    for name in parents:
        node = node.setdefault(name, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ValueError(
            f"the sweep has the key 'method.{'.'.join(path)}', but in {method!r} "
            f'{".".join(parents)} is no dictionary of options; leave {option!r} out of the key'
        )
    node[option] = value
    return '|'.join(_render(name, options) for name, options in parts)


def _render(name: str, options: Mapping[str, Any]) -> str:
    inside = ','.join(f'{key}={_render_value(value)}' for key, value in options.items())
    return f'{name}[{inside}]' if inside else name


def _render_value(value: Any) -> str:
    if isinstance(value, Mapping):
        entries = (f'{_render_value(key)}: {_render_value(x)}' for key, x in value.items())
        return f'{{{", ".join(entries)}}}'
    if isinstance(value, list):
        return f'[{",".join(map(_render_value, value))}]'
    return repr(value)


def _names(keys: Sequence[str], combinations: Sequence[Sequence[str]]) -> list[str]:
    """Return a readable name for each combination that can be a folder's, each another one."""
    last = [key.rpartition('.')[2] for key in keys]
    short = [
        own if last.count(own) == 1 else key.replace('.', '-')
        for key, own in zip(keys, last, strict=True)
    ]
    names: list[str] = []
    taken: set[str] = set()
    for values in combinations:
        pairs = zip(short, values, strict=True)
        name = '_'.join(f'{key}-{_clean(text)}' for key, text in pairs)
        if len(name) > _LONGEST_NAME or name.casefold() in taken:
            digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=4).hexdigest()
            name = f'{name[:_LONGEST_NAME]}_{digest}'
        taken.add(name.casefold())
        names.append(name)
    return names


def _clean(text: str) -> str:
    """Return the text without what a folder's name, or an option that names one, cannot hold."""
    return re.sub(r'[^A-Za-z0-9.+-]+', '-', text).strip('-') or 'x'


def populations(members: Sequence[Member], size: int) -> list[list[Member]]:
    """Return the members in groups that can train as one, of at most `size` (0: any number).

    The order of the members is kept, within groups and by their first members.
    """
    groups: list[_Group] = []
    for member in members:
        method = load_members(member.config).method
        key = shared(member.config)
        fits = (g for g in groups if g.key == key and g.takes(method, size))
        group = next(fits, None)
        if group is None:
            group = _Group(key, [], [])
            groups.append(group)
        group.members.append(member)
        if method not in group.methods:
            group.methods.append(method)
    return [group.members for group in groups]


def shared(config: Config) -> str:
    """Return what all members of a population have in common, as a text to compare."""
    values = {k: v for k, v in configs.decisive(config).items() if k not in (*FREE, 'method')}
    # With no seed of its own, the order of the data follows the run's.
    values['data.seed'] = config.seed if config.data.seed < 0 else config.data.seed
    return json.dumps(values, sort_keys=True)


@dataclasses.dataclass
class _Group:
    key: str
    methods: list[Method]
    members: list[Member]

    def takes(self, method: Method, size: int) -> bool:
        """Whether a member with this method can join, of at most `size` members (0: any number)."""
        if size and len(self.members) >= size:
            return False
        return method in self.methods or can_join((*self.methods, method))


@functools.cache
def can_join(methods: tuple[Method, ...]) -> bool:
    """Tell whether methods differ in nothing but sizes that can be padded."""
    try:
        bank.widest(methods)
    except ValueError:
        return False
    return True
