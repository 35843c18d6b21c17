"""AdapterHub's folders of one adapter and of a whole composition, as one kind of folder to others.

A composition becomes one adapter of ours whose method is `Composed`, with the head that the library
would use; written, it is a setup with its adapters and fusions beside it. A fusion that was saved
alone is a composition too, once the folders of its adapters are found or given.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from adapters_jax import params as trees
from adapters_jax.adapters import composition, registry
from adapters_jax.adapters.composed import Composed
from adapters_jax.adapters.composition import Fuse
from adapters_jax.interop import hub
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.adapterhub import folder, fusion, heads, setup, store
from adapters_jax.interop.adapterhub.fusion import Fusion
from adapters_jax.interop.adapterhub.heads import Head
from adapters_jax.interop.adapterhub.setup import Setup
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.params import Tree

_LOG = logging.getLogger(__name__)
_NAME = 'composed'  # what a composition is called here: the library gives it no name


def is_folder(directory: Path | str) -> bool:
    """Tell whether a folder is an AdapterHub's adapter or composition."""
    return is_composition(directory) or folder.is_folder(directory)


def is_composition(directory: Path | str) -> bool:
    """Tell whether a folder holds a setup, or a fusion alone."""
    return setup.is_setup(directory) or is_lone_fusion(directory)


def is_lone_fusion(directory: Path | str) -> bool:
    """Tell whether a folder holds a fusion, whose adapters lie elsewhere, and nothing else."""
    others = (setup.CONFIG, store.ADAPTER.config)
    return fusion.is_fusion(directory) and not any((Path(directory) / x).exists() for x in others)


def backbone_name(directory: Path | str) -> str:
    """Return the name of the backbone that the folder gives; a composition's adapters give it."""
    if is_lone_fusion(directory):
        return hub.short_name(store.model_name(Path(directory) / store.FUSION.config))
    if not setup.is_setup(directory):
        return folder.backbone_name(directory)
    parts = sorted(path.parent for path in Path(directory).glob(f'*/{store.ADAPTER.config}'))
    return next((name for part in parts if (name := folder.backbone_name(part))), '')


def load(
    directory: Path | str,
    loaded: LoadedBackbone,
    members: Mapping[str, str | Path] | None = None,
    name: str | None = None,
) -> AdapterFolder:
    """Return what is in a folder, a composition as one adapter.

    `members` are the folders of a lone fusion's adapters by name; they may be left out where these
    lie in the fusion's folder or beside it, under their names. `name` is what the adapter is called
    from now on.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a damaged part, or a composition that is not supported.
    """
    if not is_composition(directory):
        return folder.load(directory, loaded, name)
    lone = is_lone_fusion(directory)
    held = _of_fusion(Path(directory), loaded, members) if lone else setup.load(directory, loaded)
    try:
        method, tree = setup.as_method(held)
    except ValueError as error:
        raise ValueError(f'{directory}: {error}') from error
    head = _head(held)
    return AdapterFolder(
        name=_NAME if name is None else name,
        method=method.to_json(),
        head=head.head,
        task=head.task,
        backbone=loaded.describe(),
        max_length=loaded.config.positions - method.reserved_positions,
        pair=None,
        adapter_params=tree,
        head_params=head.params,
    )


def _of_fusion(
    directory: Path, loaded: LoadedBackbone, members: Mapping[str, str | Path] | None
) -> Setup:
    """Return a fusion with its adapters; the head is the fusion's own, or else the last one's."""
    part = fusion.load(directory, loaded)
    places = _members(directory, part, members)
    block = Fuse(*part.adapters)
    return Setup(
        composition=block,
        adapters={name: folder.load(place, loaded, name) for name, place in places.items()},
        fusions={block.fusion: dataclasses.replace(part, name=block.fusion)},
        head_setup=part.name if part.head.head else None,
        heads={part.name: part.head} if part.head.head else {},
    )


def _members(
    directory: Path, part: Fusion, given: Mapping[str, str | Path] | None
) -> dict[str, Path]:
    """Return where each adapter of a fusion lies."""
    strange = sorted(set(given or ()) - set(part.adapters))
    if strange:
        raise ValueError(
            f'{directory} does not mix {strange}; its adapters are {", ".join(part.adapters)}'
        )
    found = {name: Path(place) for name, place in (given or {}).items()}
    for name in part.adapters:
        near = (setup.part(where, name) for where in (directory, directory.parent))
        there = [place for place in near if folder.is_folder(place)]
        if name not in found and not there:
            raise FileNotFoundError(
                f'{directory} is a fusion of {", ".join(part.adapters)}, and the adapter {name!r} '
                f'lies neither in it nor beside it; put it at {directory.parent / name}, or let '
                f'`convert` join them with --members={name}=DIR'
            )
        found.setdefault(name, *there[:1])
    return {name: found[name] for name in part.adapters}


def _head(held: Setup) -> Head:
    """Return the one head that a composition is used with: the named one, or the last adapter's."""
    name = held.head_setup or composition.last(held.composition)
    if not isinstance(name, str):
        _LOG.warning('%s has several heads, so they are left out', held.composition)
        return heads.NONE
    found = held.heads.get(name, heads.NONE)
    if not found.head and name in held.adapters:
        own = held.adapters[name]
        found = Head(own.head, own.task, own.head_params)
    return found


def save(adapter: AdapterFolder, directory: Path | str, loaded: LoadedBackbone) -> Path:
    """Write an adapter, or a composition with everything that it needs, and return the folder.

    Raises:
        ValueError: an adapter that the format has no place for; what is in the way is named.
    """
    method = registry.from_json(adapter.method)
    if not isinstance(method, Composed):
        return folder.save(adapter, directory, loaded)
    return setup.save(_setup(adapter, method, loaded), directory, loaded)


def _setup(adapter: AdapterFolder, method: Composed, loaded: LoadedBackbone) -> Setup:
    if adapter.name in method.members:
        raise ValueError(
            f'the composition and one of its adapters are both named {adapter.name!r}; give '
            'the composition another name with `convert --name=NAME`'
        )
    members = {
        name: AdapterFolder(
            name=name,
            method=member.to_json(),
            head={},
            task={},
            backbone=adapter.backbone,
            max_length=loaded.config.positions - member.reserved_positions,
            pair=None,
            adapter_params=adapter.adapter_params.get(name, {}),
            head_params={},
        )
        for name, member in method.members.items()
    }
    fused = adapter.adapter_params.get('fusion', {})
    head = {adapter.name: Head(adapter.head, adapter.task, adapter.head_params)}
    return Setup(
        composition=method.tree,
        adapters=members,
        fusions={name: _fusion(name, method, tree) for name, tree in fused.items()},
        head_setup=adapter.name if adapter.head else None,
        heads=head if adapter.head else {},
    )


def _fusion(name: str, method: Composed, tree: Mapping[str, Tree]) -> Fusion:
    """Return a fusion as the library has it, whose temperature is no parameter."""
    leaves = {
        path: x for path, x in trees.flatten(tree).items() if not path.endswith('/temperature')
    }
    if len(leaves) < len(trees.flatten(tree)):
        _LOG.warning(
            'the fusion %r is written without its temperature: `adapters` begins at 50 again', name
        )
    return Fusion(name, tuple(name.split(',')), method.fusion, trees.unflatten(leaves))
