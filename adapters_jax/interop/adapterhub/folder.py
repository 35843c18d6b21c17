"""AdapterHub's form of a finished adapter: a folder with a config, tensors and perhaps a head.

What is read is accounted for to the last tensor, and translated to a description and parameters of
ours; what is written is what `model.load_adapter(directory, use_safetensors=True)` of `adapters`
reads without a missing or unexpected tensor.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapters_jax import files
from adapters_jax import params as trees
from adapters_jax.adapters import registry
from adapters_jax.adapters.compacter import Compacter
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.reft import ReFT
from adapters_jax.adapters.union import Union
from adapters_jax.adapters.vera import VeRA
from adapters_jax.interop import hub
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.adapterhub import (
    configs,
    entry,
    heads,
    legacy,
    low_rank,
    places,
    special,
    store,
    tensors,
)
from adapters_jax.interop.adapterhub.configs import Part
from adapters_jax.interop.adapterhub.entry import Shape
from adapters_jax.interop.adapterhub.heads import Head
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.params import Tree


def is_folder(directory: Path | str) -> bool:
    """Tell whether a folder is an AdapterHub's adapter; PEFT's and ours have a config as well."""
    path = Path(directory) / store.ADAPTER.config
    try:
        config = json.loads(path.read_text('utf-8'))
    except (OSError, ValueError, RecursionError):
        return False
    foreign = ('peft_type', 'format')
    return isinstance(config, dict) and 'config' in config and not any(k in config for k in foreign)


def backbone_name(directory: Path | str) -> str:
    """Return the name of the backbone that the folder gives; it may give none.

    Where the checkpoint has a short name here, it is that.
    """
    return hub.short_name(store.model_name(Path(directory) / store.ADAPTER.config))


def load(
    directory: Path | str,
    loaded: LoadedBackbone,
    name: str | None = None,
    config: Mapping[str, Any] | str | None = None,
) -> AdapterFolder:
    """Return the adapter in a folder, and its head where it has one that we know.

    Args:
        directory: of a file format of `adapters` or `adapter-transformers`.
        loaded: the backbone that it is for.
        name: what the adapter is called from now on; its own name unless given.
        config: replaces the folder's own, a name such as 'pfeiffer' or its fields.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a damaged or inconsistent folder, an adapter of another backbone, or one of an
            architecture that is unknown.
    """
    directory = Path(directory)
    path = directory / store.ADAPTER.config
    values = store.read_json(path)
    store.check_model(values, path, loaded)
    own = store.field(values, 'name', str, path)
    found = _standard_names(store.read_tensors(directory, store.ADAPTER), loaded, directory)
    try:
        parts = configs.read(legacy.config(values, path, config))
        parts = [Part(c, places.meant(method, loaded.config)) for c, method in parts]
        parts = legacy.without_unused(parts, values, found)
        _check_sizes(parts, found)
        method, tree = _translate(parts, found, own, loaded, directory)
    except ValueError as error:
        raise ValueError(f'{directory}: {error}') from error
    head = heads.read(directory, loaded)
    return AdapterFolder(
        name=own if name is None else name,
        method=method.to_json(),
        head=head.head,
        task=head.task,
        backbone=loaded.describe(),
        max_length=loaded.config.positions - method.reserved_positions,
        pair=None,
        adapter_params=tree,
        head_params=head.params,
    )


def _standard_names(
    found: Mapping[str, np.ndarray], loaded: LoadedBackbone, directory: Path
) -> dict[str, np.ndarray]:
    """Return the tensors by the names that they have inside of the backbone today."""
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in found.items():
        standard = store.inside(legacy.tensor_name(name), loaded)
        if standard in tensors:
            raise ValueError(f'{directory} has two tensors for {standard}: {name} is the second')
        tensors[standard] = tensor
    return tensors


def _check_sizes(parts: Sequence[Part], found: Mapping[str, np.ndarray]) -> None:
    """Refuse sizes beyond all that the file holds, before anything of such a size is made."""
    total = sum(math.prod(tensor.shape) for tensor in found.values())
    for config, method in parts:
        needed = {
            field: getattr(config, field, 0) for field in ('r', 'prefix_length', 'prompt_length')
        }
        if isinstance(method, Compacter):
            needed['phm_dim'] = method.phm_dim ** (2 if method.factorized_phm_rule else 3)
        for field, least in needed.items():
            if least > total:
                raise ValueError(
                    f'the config has {field}={getattr(config, field)}, but the file holds {total} '
                    'numbers'
                )


def _translate(
    parts: Sequence[Part],
    found: Mapping[str, np.ndarray],
    name: str,
    loaded: LoadedBackbone,
    directory: Path,
) -> tuple[Method, Tree]:
    """Return the method and its parameters, having accounted for every tensor."""
    tables, expected = [], {}
    for _, method in parts:
        shapes = _leaf_shapes(method, loaded)
        tables.append(tensors.table(method, shapes, name, loaded.config))
        expected |= entry.shapes(tables[-1], shapes)
    kept = entry.drop_copies([line for table in tables for line in table], found)
    store.check_tensors(kept, expected, directory)
    members = []
    for (config, method), table in zip(parts, tables, strict=True):
        leaves = {path: store.copied(x) for path, x in entry.leaves(table, kept).items()}
        tree = trees.unflatten(leaves)
        low = isinstance(method, low_rank.METHODS)
        members.append(low_rank.finish(config, method, tree) if low else (method, tree))
    if len(members) == 1:
        return members[0]
    union = Union(members=tuple(method for method, _ in members))
    _leaf_shapes(union, loaded)  # which refuses members that collide
    return union, dict(zip(union.named(), (tree for _, tree in members), strict=True))


def _leaf_shapes(method: Method, loaded: LoadedBackbone) -> dict[str, Shape]:
    """Return the shape of each leaf, VeRA's vectors being the matrices that the library has."""
    fresh = jax.eval_shape(
        lambda: method.init(jax.random.key(0), loaded.config.dimensions, loaded.params)
    )
    shapes = {path: leaf.shape for path, leaf in trees.flatten(fresh).items()}
    return low_rank.vera_shapes(shapes) if isinstance(method, VeRA) else shapes


def save(folder: AdapterFolder, directory: Path | str, loaded: LoadedBackbone) -> Path:
    """Write the adapter, and its head where the library has one like it, and return the folder.

    Raises:
        ValueError: an adapter that the format has no place for; what is in the way is named.
    """
    directory = Path(directory)
    if '.' in folder.name:
        raise ValueError(
            f'`adapters` takes no dot in a name, and the adapter is named {folder.name!r}; give '
            'it another with `convert --name=NAME`'
        )
    if folder.backbone_params:
        raise ValueError(
            f'the adapter holds leaves of the backbone ({", ".join(folder.backbone_params)}), '
            'which the format of `adapters` has no place for; keep it in the format of this project'
        )
    prefix = store.model_class(loaded).prefix  # which refuses a model that the library lacks
    config, found = _written(folder, loaded)
    with files.atomic(directory) as temporary:
        temporary.mkdir()
        described = store.described(loaded, folder.name) | {'config': config}
        store.write_json(temporary / store.ADAPTER.config, described)
        named = {f'{prefix}{name}': tensor for name, tensor in found.items()}
        store.write_tensors(temporary / store.ADAPTER.safetensors, named)
        head = Head(folder.head, folder.task, folder.head_params)
        heads.write(head, folder.name, temporary, loaded)
    return directory


def _written(
    folder: AdapterFolder, loaded: LoadedBackbone
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the configuration of an adapter and its tensors, by their names in the backbone."""
    dimensions = loaded.config.dimensions
    parts, found = [], {}
    for method, tree in _members(folder, loaded):
        if isinstance(method, low_rank.METHODS):
            config, tree = low_rank.start(method, tree, dimensions)
        else:
            if isinstance(method, ReFT):
                method, tree = special.with_subtraction(method, tree)
            config = configs.write(method, dimensions)
        parts.append(config)
        leaves = trees.flatten(tree)
        table = tensors.table(method, leaves, folder.name, loaded.config)
        found |= entry.tensors(table, leaves)
    return configs.join(parts, dimensions), found


def _members(folder: AdapterFolder, loaded: LoadedBackbone) -> list[tuple[Method, Tree]]:
    """Return the methods with their parameters, constants among them."""
    method = registry.from_json(folder.method)
    constants = method.constants(loaded.config.dimensions)
    leaves = trees.flatten(constants) | trees.flatten(folder.adapter_params)
    tree = trees.unflatten(leaves)
    if not isinstance(method, Union):
        return [(method, tree)]
    return [(member, tree.get(name, {})) for name, member in method.named().items()]
