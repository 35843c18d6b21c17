"""A composition of adapters with all its parts, as AdapterHub keeps it in one folder.

`adapter_setup.json` says how adapters act together; each lies in a folder of its own beside it, and
so does each fusion, under the names of its adapters joined by commas.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax import files
from adapters_jax.adapters import registry
from adapters_jax.adapters.composed import Composed
from adapters_jax.adapters.composition import (
    Average,
    BatchSplit,
    Composition,
    Fuse,
    Parallel,
    Split,
    Stack,
)
from adapters_jax.adapters.fusion import FusionConfig
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.adapterhub import acting, folder, fusion, heads, store
from adapters_jax.interop.adapterhub.fusion import Fusion
from adapters_jax.interop.adapterhub.heads import Head
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.params import Tree

_LOG = logging.getLogger(__name__)
CONFIG = 'adapter_setup.json'
_BLOCKS = {cls.__name__: cls for cls in (Stack, Fuse, Split, BatchSplit, Parallel, Average)}
HeadSetup = Composition | tuple[str, ...] | str | None


@dataclasses.dataclass(frozen=True)
class Setup:
    """How adapters act together, and everything that they need for it.

    `head_setup` says which heads are used: one name, several, or a block over names; each is the
    head of an adapter or one of `heads`.
    """

    composition: Composition
    adapters: dict[str, AdapterFolder]
    fusions: dict[str, Fusion] = dataclasses.field(default_factory=dict)
    head_setup: HeadSetup = None
    heads: dict[str, Head] = dataclasses.field(default_factory=dict)


def is_setup(directory: Path | str) -> bool:
    """Tell whether a folder holds a composition."""
    return (Path(directory) / CONFIG).is_file()


def load(directory: Path | str, loaded: LoadedBackbone) -> Setup:
    """Return the composition in a folder with its adapters, fusions and heads.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a composition that is not supported, or a part that is damaged.
    """
    directory = Path(directory)
    path = directory / CONFIG
    values = store.read_json(path)
    try:
        node = from_json(values.get('adapter_setup'))
        head_setup = _head_setup(values.get('head_setup'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path}: {error}') from error
    block = node if isinstance(node, Composition) else Stack(node)
    adapters = {name: folder.load(part(directory, name), loaded) for name in block.names}
    fusions = {name: fusion.load(part(directory, name), loaded) for name in _fusions(block)}
    others = {
        name: heads.read(part(directory, name), loaded)
        for name in _head_names(head_setup)
        if name not in adapters
    }
    return Setup(block, adapters, fusions, head_setup, others)


def part(directory: Path, name: str) -> Path:
    """Return the folder of a part of a composition.

    Raises:
        ValueError: a name that would lead elsewhere.
    """
    if not name or name in ('.', '..') or Path(name).name != name or '\\' in name:
        raise ValueError(f'{directory} names the part {name!r}, which is no name of a folder in it')
    return directory / name


def _fusions(block: Composition) -> list[str]:
    """Return the names of the fusions of a tree."""
    own = [block.fusion] if isinstance(block, Fuse) else []
    children = [child for child in block.children if isinstance(child, Composition)]
    return own + [name for child in children for name in _fusions(child)]


def _head_setup(value: Any) -> HeadSetup:
    if isinstance(value, dict):
        node = from_json(value)
        return node if isinstance(node, Composition) else (node,)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    if value is True:
        _LOG.warning('the head of a model that has one only is not among the parts of a setup')
    if value is None or isinstance(value, bool | str):
        return None if isinstance(value, bool) else value
    raise ValueError(
        f'head_setup is {value!r}; expected a name, a list of names, a block over names or null'
    )


def _head_names(head_setup: HeadSetup) -> tuple[str, ...]:
    if isinstance(head_setup, Composition):
        return head_setup.names
    return (head_setup,) if isinstance(head_setup, str) else head_setup or ()


def from_json(value: Any) -> Composition | str:
    """Return the tree that a `adapter_setup` or `head_setup` entry describes.

    Raises:
        ValueError: an unknown block, or one that may not stand where it does.
    """
    kind = value.get('type') if isinstance(value, Mapping) else None
    children = value.get('children') if isinstance(value, Mapping) else None
    if not isinstance(children, list) or not children:
        raise ValueError(f'{value!r} is no block; expected an object with type and children')
    if kind == 'single':
        return children[0]
    options = value.get('kwargs') or {}
    if kind not in _BLOCKS:
        raise ValueError(
            f'the block {kind!r} is not supported; expected one of {", ".join(_BLOCKS)}'
        )
    known = {field.name for field in dataclasses.fields(_BLOCKS[kind])} - {'children'}
    required = known - {'weights'}
    if not isinstance(options, dict) or not required <= set(options) <= known:
        raise ValueError(f'{kind} has kwargs={options!r}; expected {", ".join(known) or "none"}')
    return _BLOCKS[kind](*(from_json(child) for child in children), **options)


def to_json(node: Composition | str) -> dict[str, Any]:
    """Return the entry that `from_json` reads."""
    if isinstance(node, str):
        return {'type': 'single', 'children': [node]}
    value = {'type': type(node).__name__, 'children': [to_json(child) for child in node.children]}
    return value | ({'kwargs': node.options()} if node.options() else {})


def save(setup: Setup, directory: Path | str, loaded: LoadedBackbone) -> Path:
    """Write what `load_adapter_setup(directory, use_safetensors=True)` of the library reads.

    Raises:
        ValueError: a part that is missing, or that the library has no place for, or a composition
            that has other outputs there.
    """
    directory = Path(directory)
    _check_complete(setup)
    acting.check(
        setup.composition,
        {name: registry.from_json(adapter.method) for name, adapter in setup.adapters.items()},
        {name: adapter.adapter_params for name, adapter in setup.adapters.items()},
    )
    with files.atomic(directory) as temporary:
        temporary.mkdir()
        described = {
            'adapter_setup': to_json(setup.composition),
            'head_setup': _head_setup_to_json(setup.head_setup),
            'version': store.VERSION,
        }
        store.write_json(temporary / CONFIG, described)
        for name, adapter in setup.adapters.items():
            renamed = dataclasses.replace(adapter, name=name)
            folder.save(renamed, part(temporary, name), loaded)
        for name, fused in setup.fusions.items():
            fusion.save(fused, part(temporary, name), loaded)
        for name, head in setup.heads.items():
            place = part(temporary, name)
            place.mkdir()
            heads.write(head, name, place, loaded)
    return directory


def _head_setup_to_json(head_setup: HeadSetup) -> Any:
    if isinstance(head_setup, Composition):
        return to_json(head_setup)
    return list(head_setup) if isinstance(head_setup, tuple) else head_setup


def _check_complete(setup: Setup) -> None:
    wanted = {
        'adapter': (setup.composition.names, setup.adapters),
        'fusion': (_fusions(setup.composition), setup.fusions),
        'head': (_head_names(setup.head_setup), setup.adapters | setup.heads),
    }
    for kind, (names, there) in wanted.items():
        missing = [name for name in names if name not in there]
        if missing:
            raise ValueError(
                f'{setup.composition} needs the {kind} '
                f'{missing[0]!r}, which the setup does not hold'
            )


def as_method(setup: Setup) -> tuple[Composed, Tree]:
    """Return a composition as a method whose members are frozen, and its parameters.

    Raises:
        ValueError: fusions with different options, a block that an adapter's method does not
            support, or a composition that has other outputs in the library.
    """
    configs = {fused.config for fused in setup.fusions.values()}
    if len(configs) > 1:
        raise ValueError(f'{setup.composition} holds fusions with different options; load one')
    config = next(iter(configs), FusionConfig())
    members = {name: registry.from_json(a.method) for name, a in setup.adapters.items()}
    names = setup.composition.names
    trees = {name: adapter.adapter_params for name, adapter in setup.adapters.items()}
    acting.check(setup.composition, members, trees)
    method = Composed(
        expression=str(setup.composition),
        members={name: members[name] for name in names},
        frozen_members=names,
        fusion=config,
    )
    tree = {name: setup.adapters[name].adapter_params for name in names}
    fused = {name: _with_temperature(own) for name, own in setup.fusions.items()}
    return method, tree | ({'fusion': fused} if fused else {})


def _with_temperature(fused: Fusion) -> Tree:
    """Return a fusion's parameters, its temperature that of a finished training: 1."""
    if not fused.config.temperature:
        return fused.params
    return {
        layer: {name: place | {'temperature': np.ones((), np.float32)} for name, place in x.items()}
        for layer, x in fused.params.items()
    }
