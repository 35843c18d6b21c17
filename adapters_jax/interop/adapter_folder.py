"""Our own form of a finished adapter: a folder with a config and one or two tensor files.

`adapter.safetensors` holds every leaf that training changed and nothing else: the adapter's own
under `adapter/`, and the backbone leaves that its method tunes (LayerNorms, biases) under
`backbone/`; leaves that recur in many layers are one tensor (`stacked`). `head.safetensors` holds
the head. Nothing here is ever pickled.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

import adapters_jax
from adapters_jax import files, params
from adapters_jax.adapters import registry
from adapters_jax.interop import stacked
from adapters_jax.models.heads import HeadConfig

CONFIG, ADAPTER, HEAD = 'adapter_config.json', 'adapter.safetensors', 'head.safetensors'
FORMAT = 'adapters_jax'
_DESCRIBED = {
    'name': str,
    'method': dict,
    'head': dict,
    'task': dict,
    'backbone': dict,
    'max_length': int,
    'pair': bool | None,
}
_IDENTITY = {'name': str, 'layers': int, 'hidden': int, 'fingerprint': str}


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """What a folder holds: descriptions as JSON values, parameters as nested dicts.

    `backbone` says which checkpoint the adapter belongs to: its name, fingerprint and sizes. An
    adapter that came without a head has an empty `head` and `task`, and no `head_params`.
    `preprocess` are the steps that texts go through before they are tokenized, as the chain
    describes itself; most adapters have none.
    """

    name: str
    method: dict[str, Any]
    head: dict[str, Any]
    task: dict[str, Any]
    backbone: dict[str, Any]
    max_length: int
    pair: bool | None  # whether an example is two texts; None where its source does not say
    adapter_params: params.Tree
    head_params: params.Tree
    backbone_params: params.Tree = dataclasses.field(default_factory=dict)
    preprocess: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        """Refuse a name that could not be a key of a tree."""
        if not self.name or '/' in self.name:
            raise ValueError(
                f'an adapter cannot be named {self.name!r}; expected a name without "/", which '
                '`convert --name=NAME` gives to it'
            )

    def overlay(self, backbone: params.Tree, constants: params.Tree) -> params.Tree:
        """Return the full parameters over the given backbone, tuned leaves replaced.

        `constants` are those of the method; the folder's own, where it holds any, come first.
        """
        leaves = params.flatten(backbone) | params.flatten(self.backbone_params)
        adapter = params.flatten(constants) | params.flatten(self.adapter_params)
        return {
            'backbone': params.unflatten(leaves),
            'adapters': {self.name: params.unflatten(adapter)},
            'heads': {self.name: self.head_params} if self.head else {},
        }

    def switched_off(self) -> 'AdapterFolder':
        """Return the folder without what it changes: its head over the backbone as that was."""
        method = registry.create('head').to_json()
        return dataclasses.replace(self, method=method, adapter_params={}, backbone_params={})


def save(folder: AdapterFolder, directory: Path) -> Path:
    """Write the folder under a temporary name, then rename it onto `directory`."""
    config = {'format': FORMAT, 'version': adapters_jax.__version__}
    config |= {field: getattr(folder, field) for field in _DESCRIBED}
    if folder.preprocess:
        config['preprocess'] = [dict(step) for step in folder.preprocess]
    leaves = {f'adapter/{p}': x for p, x in params.flatten(folder.adapter_params).items()}
    leaves |= {f'backbone/{p}': x for p, x in params.flatten(folder.backbone_params).items()}
    with files.atomic(directory) as temporary:
        temporary.mkdir()
        _write_tensors(temporary / ADAPTER, stacked.stack(leaves))
        if folder.head:
            _write_tensors(temporary / HEAD, params.flatten(folder.head_params))
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + '\n', 'utf-8')
    return directory


def load(directory: Path) -> AdapterFolder:
    """Read a folder that `save` wrote.

    Raises:
        FileNotFoundError: a missing folder or file.
        ValueError: a config of another format, or a tensor file that cannot be read.
    """
    return files.read_whole(directory, _read)


def _read(directory: Path) -> AdapterFolder:
    config = _read_config(directory)
    leaves = _read_tensors(directory / ADAPTER)
    tree = params.unflatten(leaves)
    return AdapterFolder(
        name=config['name'],
        method=config['method'],
        head=config['head'],
        task=config['task'],
        backbone=config['backbone'],
        max_length=config['max_length'],
        pair=config['pair'],
        adapter_params=tree.get('adapter', {}),
        head_params=params.unflatten(_read_tensors(directory / HEAD) if config['head'] else {}),
        backbone_params=tree.get('backbone', {}),
        preprocess=config.get('preprocess', ()),
    )


def check_backbone(folder: AdapterFolder, found: dict[str, Any]) -> None:
    """Refuse a backbone that is not the one the adapter was trained on.

    Raises:
        ValueError: sizes or fingerprints that differ, with both values.
    """
    for key, value in folder.backbone.items():
        if key != 'name' and found.get(key) != value:
            raise ValueError(
                f'the adapter was made for another backbone: its {key} is {value}, that of '
                f'{found["name"]!r} is {found.get(key)}; expected {folder.backbone["name"]!r} as '
                'it was when the adapter was trained'
            )


def check_leaves(folder: AdapterFolder, trainable: params.Tree, frozen: params.Tree) -> None:
    """Refuse parameters that are not those which the folder's own description asks for.

    `trainable` and `frozen` are the trees of the described model, of arrays or shapes. The frozen
    leaves of the adapter are its constants, which a folder may hold or leave out.

    Raises:
        ValueError: leaves that are missing, unexpected or of another shape.
    """
    wanted = {path: leaf.shape for path, leaf in params.flatten(trainable).items()}
    constants = params.flatten({'adapters': frozen.get('adapters', {})})
    allowed = wanted | {path: leaf.shape for path, leaf in constants.items()}
    parts = {
        'backbone': folder.backbone_params,
        'adapters': {folder.name: folder.adapter_params},
        'heads': {folder.name: folder.head_params} if folder.head else {},
    }
    found = {path: leaf.shape for path, leaf in params.flatten(parts).items()}
    problems = [f'{path} is missing' for path in wanted if path not in found]
    problems += [f'{path} is unexpected' for path in found if path not in allowed]
    problems += [
        f'{path} has shape {found[path]}, expected {shape}'
        for path, shape in allowed.items()
        if path in found and found[path] != shape
    ]
    if problems:
        more = f' and {len(problems) - 5} more' if len(problems) > 5 else ''
        raise ValueError(
            f'the adapter does not hold what its {CONFIG} describes: '
            f'{"; ".join(problems[:5])}{more}; restore its folder from its source'
        )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.exists():
        present = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
        raise FileNotFoundError(
            f'{directory} is not an adapter: it has no {CONFIG} (found: '
            f'{", ".join(present) or "nothing"}); a run writes its adapter to WORKDIR/adapter, and '
            'a merged model is for transformers'
        )
    try:
        config = json.loads(path.read_text('utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON ({error}); restore it from its source') from error
    found = config.get('format') if isinstance(config, dict) else None
    if found != FORMAT:
        raise ValueError(
            f'{path} is not of this project: its "format" is {found!r}, expected {FORMAT!r}'
        )
    missing = [name for name in _DESCRIBED if name not in config]
    if missing:
        raise ValueError(f'{path} lacks {", ".join(missing)}; restore it from its source')
    for name, kind in _DESCRIBED.items():
        if not isinstance(config[name], kind):
            raise ValueError(
                f'{path}: {name!r} is {config[name]!r}; expected {getattr(kind, "__name__", kind)}'
            )
    steps = config.get('preprocess', [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path}: 'preprocess' is {steps!r}; expected a list of objects")
    for key, kind in _IDENTITY.items():
        if not isinstance(config['backbone'].get(key), kind):
            raise ValueError(
                f'{path} does not say which backbone it is for: {key!r} is '
                f'{config["backbone"].get(key)!r}; restore it from its source'
            )
    try:
        registry.from_json(config['method'])
        if config['head']:
            HeadConfig.from_json(config['head'])
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return config


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f'{path} is missing: the adapter folder is incomplete')
    try:
        leaves = stacked.unstack(load_file(path))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f'{path} is damaged ({error}); restore it from its source') from error
    for name, leaf in leaves.items():
        if not np.isfinite(leaf.astype(np.float32)).all():
            raise ValueError(f'{path}: {name} holds NaN or infinity; restore it from its source')
    return leaves


def _write_tensors(path: Path, leaves: dict[str, Any]) -> None:
    # Not safetensors' own save_file: it makes files that nobody else may read.
    path.write_bytes(to_bytes({name: np.ascontiguousarray(leaf) for name, leaf in leaves.items()}))
