"""The kinds of adapter folder: ours, AdapterHub's, PEFT's, found out by looking inside.

Every command that takes an adapter takes any of the three.
"""

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from adapters_jax.adapters import merging, registry
from adapters_jax.interop import adapter_folder, decoder_heads, hf_export, hf_heads, hub
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.adapterhub import composed as adapterhub
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.interop.peft import folder as peft

OURS, MERGED = adapter_folder.FORMAT, 'merged'
FOREIGN: dict[str, ModuleType] = {'adapterhub': adapterhub, 'peft': peft}
FORMATS = (OURS, *FOREIGN, MERGED)

_LOG = logging.getLogger(__name__)


def kind(directory: Path) -> str:
    """Return 'adapters_jax', 'adapterhub' or 'peft'.

    Raises:
        FileNotFoundError: no such folder, or none of an adapter.
        ValueError: a config that belongs to none of the three.
    """
    directory = Path(directory)
    path = directory / adapter_folder.CONFIG
    if adapterhub.is_composition(directory):
        return 'adapterhub'
    if not path.exists():
        return OURS  # whose reader knows what to say, and how to recover a half-replaced folder
    try:
        config = json.loads(path.read_text('utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON ({error}); restore it from its source') from error
    if isinstance(config, dict) and config.get('format') == OURS:
        return OURS
    for name, module in FOREIGN.items():
        if module.is_folder(directory):
            return name
    keys = ', '.join(sorted(config)[:8]) if isinstance(config, dict) else type(config).__name__
    raise ValueError(
        f'{path} is of no known kind (it holds: {keys}); expected an adapter of this project '
        '("format"), of AdapterHub ("config") or of PEFT ("peft_type")'
    )


def load(
    directory: Path,
    backbone: str = '',
    members: Mapping[str, str | Path] | None = None,
    name: str = '',
    held: LoadedBackbone | None = None,
) -> tuple[AdapterFolder, LoadedBackbone]:
    """Return an adapter of any kind, and its backbone.

    `backbone` replaces the name that the folder gives, for a copy elsewhere; what others can use of
    the folder's name is kept. `members` are the folders of the adapters that a fusion of AdapterHub
    mixes, where they do not lie beside it. `name` is what the adapter is called from now on. `held`
    is a backbone in memory, which is not read again where it is the adapter's.

    Raises:
        FileNotFoundError: no adapter there, or no backbone.
        ValueError: a damaged folder, one that names no backbone, or another backbone than its own.
    """
    directory = Path(directory).expanduser()
    found = kind(directory)
    if members and not adapterhub.is_lone_fusion(directory):
        raise ValueError(
            f'{directory} is no fusion of AdapterHub that was saved alone, so it takes no members'
        )
    if found == OURS:
        folder = adapter_folder.load(directory)
        own = folder.backbone['name']
        loaded = _load_backbone(backbone, own, held)
        adapter_folder.check_backbone(folder, loaded.describe())
        folder = dataclasses.replace(folder, name=name) if name else folder
        return folder, _under_own_name(loaded, own)
    module = FOREIGN[found]
    own = module.backbone_name(directory)
    if not (own or backbone):
        raise ValueError(
            f'{directory} does not say which backbone it is for; give it as --backbone'
        )
    loaded = _load_backbone(backbone, own, held)
    if own and _same_backbone(own, loaded):
        loaded = _under_own_name(loaded, own)
    elif own:
        _LOG.warning(
            '%s was made for the backbone %r and is used over %r, which by its name and place is '
            "another: unless it is a copy, take the adapter's own",
            directory,
            own,
            backbone,
        )
    options = {'members': members} if members else {}
    options |= {'name': name} if name else {}
    return module.load(directory, loaded, **options), loaded


def _same_backbone(own: str, loaded: LoadedBackbone) -> bool:
    """Tell whether a name is that of a loaded checkpoint, as far as names and folders say."""
    given, end = hub.short_name(loaded.name), own.rpartition('/')[2]
    if own == given:
        return True
    if own in hub.SHORT_NAMES:
        return hub.SHORT_NAMES[own].holds(loaded.directory)
    if Path(own).expanduser().is_dir():
        return Path(own).expanduser().samefile(loaded.directory)
    if f'models--{own.replace("/", "--")}' in loaded.directory.absolute().parts:  # the hub's cache
        return True
    # Two repositories of one name are two checkpoints, unless one has the name alone.
    repositories = '/' in own and '/' in given and not Path(given).is_dir()
    return Path(given).name == end and not repositories


def _under_own_name(loaded: LoadedBackbone, own: str) -> LoadedBackbone:
    """Return a backbone under the name that its adapter gives it, where others may know that."""
    local = own.startswith(('/', '.', '~'))
    if local or not Path(loaded.name).expanduser().is_dir():
        return loaded
    return dataclasses.replace(loaded, name=own)


def load_once(directory: Path, backbone: str) -> AdapterFolder:
    """Return an adapter as `load` does; again without reading, while its files are the same."""
    directory = Path(directory).expanduser()
    files = (path for path in directory.rglob('*') if path.is_file())
    found = ((str(path), path.stat()) for path in sorted(files))
    state = tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found)
    return _load_once(directory, backbone, state)


@functools.lru_cache(maxsize=64)
def _load_once(directory: Path, backbone: str, state: tuple[tuple, ...]) -> AdapterFolder:
    folder, _ = load(directory, backbone)
    return folder


def _load_backbone(given: str, own: str, held: LoadedBackbone | None) -> LoadedBackbone:
    name = given or own
    try:
        if held is not None and hub.locate(name).samefile(held.directory):
            return dataclasses.replace(held, name=name)
        return load_backbone(name)
    except (FileNotFoundError, hub.HubError) as error:
        if given:
            raise
        raise FileNotFoundError(
            f'the backbone of the adapter is not where it was: {error}; give its present place '
            'as --backbone'
        ) from error


def check_format(format: str) -> None:
    """Refuse a format that cannot be written.

    Raises:
        ValueError: listing those that can.
    """
    if format not in FORMATS:
        raise ValueError(f'the format {format!r} is unknown; expected one of {", ".join(FORMATS)}')


def save(folder: AdapterFolder, directory: Path, loaded: LoadedBackbone, format: str) -> Path:
    """Write an adapter in one of `FORMATS` and return the folder.

    Raises:
        ValueError: an unknown format, or an adapter that it has no place for.
    """
    check_format(format)
    if format == OURS:
        return adapter_folder.save(folder, directory)
    if format == MERGED:
        written = _save_merged(folder, directory, loaded)
    else:
        written = FOREIGN[format].save(folder, directory, loaded)
    _tell_lost(folder, loaded, format)
    return written


def _tell_lost(folder: AdapterFolder, loaded: LoadedBackbone, format: str) -> None:
    """Tell of what predictions depend on and another format has no place for."""
    if folder.preprocess:
        _LOG.warning(
            'The adapter was trained on texts after the steps %s, which %s has no place for: who '
            'uses it there must do the same to them first.',
            *(', '.join(str(step['step']) for step in folder.preprocess), format),
        )
    threshold = folder.task.get('threshold', 'none')
    if folder.head and threshold not in ('none', 0.5):  # with which it is read back
        _LOG.warning(
            'The threshold of the task, %s, has no place in %s: who uses the adapter there must '
            'compare with it, or gets other predictions.',
            *(threshold, format),
        )
    _tell_types(folder, loaded, format)
    if loaded.config.reads == 'input_ids' and folder.max_length < loaded.config.positions:
        _LOG.info(
            'texts of more than %d tokens were cut in training; %s says nothing of that',
            *(folder.max_length, format),
        )


def _tell_types(folder: AdapterFolder, loaded: LoadedBackbone, format: str) -> None:
    """Tell of token types of a question and its context that another format gives, or does not."""
    given = folder.task.get('token_types', True)
    if folder.task.get('name') != 'question_answering' or not hf_heads.tells_types(loaded.config):
        return
    if format == 'peft' and given:
        _LOG.warning(
            'PEFT hands no token types to a model that answers questions, and this adapter was '
            'trained with them: call get_base_model() of the PeftModel, which takes them, or '
            'answers differ.'
        )
    elif format != 'peft' and not given:
        _LOG.warning(
            'The adapter was trained without token types, of which %s says nothing: who uses it '
            'there must give 0 for all of them, or answers differ.',
            format,
        )


def _save_merged(folder: AdapterFolder, directory: Path, loaded: LoadedBackbone) -> Path:
    method = registry.from_json(folder.method)
    whole = folder.overlay(loaded.params, method.constants(loaded.config.dimensions))
    adapter = whole['adapters'].get(folder.name, {})
    merged = merging.merge(method, adapter, whole['backbone'])
    head = (folder.head, folder.head_params) if folder.head else None
    if head is None and loaded.config.decoder is not None:
        # Adapters of others come without the scores of words that they were trained under.
        words = decoder_heads.optional(loaded)
        head = None if words is None else ({}, words)
    return hf_export.save(merged, loaded, directory, head, folder.task)
