"""AdapterFusion's parameters as AdapterHub keeps them, apart from the adapters that they mix.

A folder holds the names of the adapters in order, the options, and at each adapted sub-layer of
every layer a query, a key and a value projection (Pfeiffer et al. 2021, section 3.2); it may hold
a head too.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax import files
from adapters_jax import params as trees
from adapters_jax.adapters.fusion import PRESETS, FusionConfig
from adapters_jax.interop.adapterhub import entry, heads, places, store
from adapters_jax.interop.adapterhub.entry import Entry
from adapters_jax.interop.adapterhub.heads import Head
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree
from adapters_jax.sites import SUB_LAYERS


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The mixing of adapters: `params` is `layer_{i}/{sub-layer}/{query,key,value}`."""

    name: str
    adapters: tuple[str, ...]
    config: FusionConfig
    params: Tree
    head: Head = heads.NONE


def is_fusion(directory: Path | str) -> bool:
    """Tell whether a folder holds the parameters of a fusion."""
    return (Path(directory) / store.FUSION.config).is_file()


def load(directory: Path | str, loaded: LoadedBackbone, name: str | None = None) -> Fusion:
    """Return the fusion in a folder, called `name` from now on if that is given.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a damaged or inconsistent folder, or a fusion for another backbone.
    """
    directory = Path(directory)
    path = directory / store.FUSION.config
    values = store.read_json(path)
    store.check_model(values, path, loaded)
    own = store.field(values, 'name', str, path)
    mixed = values.get('adapter_names', own)
    mixed = mixed.split(',') if isinstance(mixed, str) else mixed
    if not isinstance(mixed, list) or not mixed or not all(isinstance(x, str) for x in mixed):
        raise ValueError(f'{path} has adapter_names={mixed!r}; expected a list of names')
    config = _config(values, path)
    found = _inside(store.read_tensors(directory, store.FUSION), loaded)
    sites = _sites(found, own, loaded.config)
    if not sites:
        raise ValueError(f'{directory} holds no tensors of the fusion {own!r}')
    table = _table(config, sites, own, loaded.config)
    store.check_tensors(found, _shapes(table, loaded.config.dimensions.hidden), directory)
    leaves = {path: store.copied(x) for path, x in entry.leaves(table, found).items()}
    head = heads.read(directory, loaded)
    return Fusion(
        own if name is None else name, tuple(mixed), config, trees.unflatten(leaves), head
    )


def _config(values: Mapping[str, Any], path: Path) -> FusionConfig:
    given = values.get('config')
    if isinstance(given, str) and given in PRESETS:
        return PRESETS[given]
    if not isinstance(given, dict):
        raise ValueError(
            f'{path} has config={given!r}; expected the options of a fusion, or one of '
            f'{", ".join(PRESETS)}'
        )
    names = {field.name for field in dataclasses.fields(FusionConfig)}
    try:
        return FusionConfig(**{name: _flag(given[name]) for name in names if name in given})
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def _flag(value: Any) -> Any:
    """Return an option; the library asks only whether a switch is true, so 1 and 0 may stand."""
    return bool(value) if type(value) is int and value in (0, 1) else value


def _inside(found: Mapping[str, np.ndarray], loaded: LoadedBackbone) -> dict[str, np.ndarray]:
    return {store.inside(name, loaded): x for name, x in found.items()}


def _sites(found: Iterable[str], name: str, config: BackboneConfig) -> list[str]:
    """Return the sub-layers of which the file has tensors; the rest of it follows from them."""
    theirs = {tensor.partition(f'.adapter_fusion_layer.{name}.')[0] for tensor in found}
    everywhere = _places(SUB_LAYERS, config)
    there = {site for layer, site in everywhere if places.end(layer, site, config) in theirs}
    return [site for site in SUB_LAYERS if site in there]


def _places(sites: Iterable[str], config: BackboneConfig) -> list[tuple[int, str]]:
    """Return these sub-layers of all layers that have them."""
    dimensions = config.dimensions
    return [
        (layer, site)
        for layer in range(dimensions.layers)
        for site in sites
        if site in dimensions.projections(layer)
    ]


def _table(
    config: FusionConfig, sites: Iterable[str], name: str, backbone: BackboneConfig
) -> list[Entry]:
    """Return the entries; the library has a fusion in every layer, adapted or not."""
    return [
        entry.dense(
            f'layer_{i}/{site}/{projection}',
            f'{places.end(i, site, backbone)}.adapter_fusion_layer.{name}.{projection}',
            leaf,
        )
        for i, site in _places(sites, backbone)
        for projection, leaves in config.shape.items()
        for leaf in leaves
    ]


def _shapes(table: Iterable[Entry], hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors' shapes."""
    table = list(table)
    leaves = {}
    for path in (path for line in table for path in line.ours):
        width = 1 if '/dense/' in path else hidden
        leaves[path] = (hidden, width) if path.endswith('kernel') else (width,)
    return entry.shapes(table, leaves)


def save(fusion: Fusion, directory: Path | str, loaded: LoadedBackbone) -> Path:
    """Write what `load_adapter_fusion(directory, use_safetensors=True)` of the library reads.

    Raises:
        ValueError: parameters that are not those which the options ask for.
    """
    directory = Path(directory)
    leaves = trees.flatten(fusion.params)
    there = {path.split('/')[1] for path in leaves}
    sites = [site for site in SUB_LAYERS if site in there]
    described = store.described(loaded, fusion.name)
    table = _table(fusion.config, sites, fusion.name, loaded.config)
    wanted = {path for line in table for path in line.ours}
    if not sites or wanted != set(leaves):
        raise ValueError(
            f'the fusion {fusion.name!r} does not have the parameters of its options in every '
            f'layer; differing: {", ".join(sorted(wanted ^ set(leaves))[:5]) or "all"}'
        )
    described |= {
        'adapter_names': list(fusion.adapters),
        'config': dataclasses.asdict(fusion.config),
    }
    prefix = store.model_class(loaded).prefix
    found = entry.tensors(table, leaves)
    with files.atomic(directory) as temporary:
        temporary.mkdir()
        store.write_json(temporary / store.FUSION.config, described)
        named = {f'{prefix}{name}': tensor for name, tensor in found.items()}
        store.write_tensors(temporary / store.FUSION.safetensors, named)
        heads.write(fusion.head, fusion.name, temporary, loaded)
    return directory
