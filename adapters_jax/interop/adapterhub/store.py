"""The files of an AdapterHub folder: JSON descriptions and tensors, read strictly, written whole.

A folder comes from a stranger, so nothing of it is believed: JSON must be an object, tensors must
be the expected ones, of the expected shapes, and finite.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as to_bytes

from adapters_jax.interop import hub, torch_pickle
from adapters_jax.interop.adapterhub.places import MODELS, Model
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.tensors import SafetensorsFile, check_is_weights, contents

VERSION = 'adapters.1.3.0'
_LOG = logging.getLogger(__name__)


class Part(NamedTuple):
    """The names of the files that one part of a folder lies in."""

    config: str
    torch: str
    safetensors: str


ADAPTER = Part('adapter_config.json', 'pytorch_adapter.bin', 'adapter.safetensors')
HEAD = Part('head_config.json', 'pytorch_model_head.bin', 'model_head.safetensors')
FUSION = Part(
    'adapter_fusion_config.json',
    'pytorch_model_adapter_fusion.bin',
    'model_adapter_fusion.safetensors',
)

_LAYER = re.compile(r'(?:^|\.)(?:layer|layers|block)\.(\d+)\.')


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: no such file; what the folder holds is listed.
        ValueError: text that is not JSON, or not an object.
    """
    if not path.is_file():
        there = contents(path.parent) if path.parent.is_dir() else 'nothing'
        raise FileNotFoundError(f'{path.parent} has no {path.name}; it holds {there}')
    try:
        value = json.loads(path.read_text('utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON ({error}); restore it from its source') from error
    if not isinstance(value, dict):
        raise ValueError(f'{path} holds a {type(value).__name__}, expected a JSON object')
    return value


def field(values: Mapping[str, Any], key: str, kind: type, path: Path, default: Any = None) -> Any:
    """Return an entry of a JSON object, `default` where it is missing or null.

    Raises:
        ValueError: a value of another type, or a missing one that has no default.
    """
    value = values.get(key)
    value = default if value is None else value
    if type(value) is not kind:
        raise ValueError(
            f'{path} has {key}={value!r}; expected {_KINDS[kind]}: restore it from its source'
        )
    return value


_KINDS = {
    str: 'text',
    int: 'a whole number',
    bool: 'true or false',
    dict: 'an object',
    list: 'a list',
}


def model_name(path: Path) -> str:
    """Return the name of the backbone in a config; '' where it has none.

    Raises:
        FileNotFoundError, ValueError: no such file, or one that is damaged.
    """
    return field(read_json(path), 'model_name', str, path, default='')


def has_tensors(directory: Path, part: Part) -> bool:
    """Tell whether the folder holds the part's tensors."""
    return (directory / part.safetensors).is_file() or (directory / part.torch).is_file()


def read_tensors(directory: Path, part: Part) -> dict[str, np.ndarray]:
    """Return a part's tensors by name, which two files may hold, but not differently.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: a file that is damaged, or holds anything but tensors, or two that differ.
    """
    path = directory / part.torch
    if (directory / part.safetensors).is_file():
        found = dict(SafetensorsFile(directory / part.safetensors))
        if path.is_file():
            _check_alike(found, directory / part.safetensors, path)
        return found
    if not path.is_file():
        raise FileNotFoundError(
            f'{directory} has neither {part.safetensors} nor {part.torch}; it holds '
            f'{contents(directory)}'
        )
    check_is_weights(path)
    return torch_pickle.load(path)


def _check_alike(found: Mapping[str, np.ndarray], path: Path, pickled: Path) -> None:
    """Refuse a pickle with other tensors than those of the file beside it.

    `adapters` writes one of the two and leaves the other as it was.

    Raises:
        ValueError: naming both, and the later one.
    """
    try:
        check_is_weights(pickled)
        others = torch_pickle.load(pickled)
    except ValueError as error:
        _LOG.warning('%s is read, and %s beside it is not: %s', path, pickled.name, error)
        return
    same = found.keys() == others.keys() and all(
        np.array_equal(tensor, others[name]) for name, tensor in found.items()
    )
    if not same:
        later = max(path, pickled, key=lambda file: file.stat().st_mtime)
        raise ValueError(
            f'{path.parent} holds {path.name} and {pickled.name} with different tensors, and '
            f'`adapters` leaves the one as it was when it writes the other; remove the stale one '
            f'(by their dates, {later.name} is the later)'
        )


def check_tensors(
    found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], directory: Path
) -> None:
    """Account for every tensor.

    Raises:
        ValueError: tensors that are missing, unexpected, of another shape, not floating-point or
            not finite.
    """
    problems = [f'{name} is missing' for name in expected if name not in found]
    problems += [f'{name} is unexpected' for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        tensor = found[name]
        if tensor.shape != expected[name]:
            problems.append(f'{name} has shape {tensor.shape}, expected {expected[name]}')
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f'{name} holds {tensor.dtype}, expected floating-point numbers')
        elif not np.isfinite(tensor.astype(np.float32)).all():
            problems.append(f'{name} holds numbers that are not finite')
    if problems:
        more = f' and {len(problems) - 5} more' if len(problems) > 5 else ''
        raise ValueError(
            f'the tensors in {directory} are not those of its config and this backbone'
            f'{_depths(found, expected)}: {"; ".join(problems[:5])}{more}'
        )


def _depths(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Say how deep the two are where they differ, which explains a hundred missing tensors."""
    theirs, ours = (
        max((int(m[1]) for name in names if (m := _LAYER.search(name))), default=-1)
        for names in (found, expected)
    )
    if theirs == ours:
        return ''
    return f' (its highest layer is {theirs}, expected {ours})'


def copied(tensor: np.ndarray) -> np.ndarray:
    """Return the tensor in float32 and in memory of its own, whatever happens to the file."""
    return np.array(tensor, np.float32, order='C')


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write a safetensors file as torch's readers want it."""
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    path.write_bytes(to_bytes(arrays, metadata={'format': 'pt'}))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object as the library does."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + '\n', 'utf-8')


def model_type(loaded: LoadedBackbone) -> str:
    """Return the checkpoint's own model type, which tells xlm-roberta from roberta."""
    config = read_json(loaded.directory / hub.CONFIG)
    return field(config, 'model_type', str, loaded.directory / hub.CONFIG, 'bert')


def model_class(loaded: LoadedBackbone) -> Model:
    """Return the library's class for a backbone.

    Raises:
        ValueError: a model type that the library does not have.
    """
    found = model_type(loaded)
    if found not in MODELS:
        raise ValueError(
            f'`adapters` has no model for the model type {found!r} of {loaded.name!r}; expected '
            f'one of {", ".join(MODELS)}'
        )
    return MODELS[found]


def described(loaded: LoadedBackbone, name: str) -> dict[str, Any]:
    """Return what every config of a folder says of the model and the version of its format."""
    return {
        'hidden_size': loaded.config.dimensions.hidden,
        'model_class': model_class(loaded).name,
        'model_name': hub.published_name(loaded.name),
        'model_type': model_type(loaded),
        'name': name,
        'version': VERSION,
    }


def check_model(config: Mapping[str, Any], path: Path, loaded: LoadedBackbone) -> None:
    """Refuse a config of another kind of model or another hidden size; either may be unsaid.

    Raises:
        ValueError: what differs, with both values.
    """
    wanted = {'model_type': model_type(loaded), 'hidden_size': loaded.config.dimensions.hidden}
    for key, value in wanted.items():
        found = config.get(key)
        if found is not None and found != value:
            raise ValueError(
                f'{path} was made for another backbone: its {key} is {found!r}, that of '
                f'{loaded.name!r} is {value!r}'
            )


def inside(name: str, loaded: LoadedBackbone) -> str:
    """Return a tensor's name inside of the backbone: without what a model with heads puts before.

    Raises:
        ValueError: a model type that the library does not have.
    """
    return name.removeprefix(model_class(loaded).prefix)
