"""Pretrained backbones of others as parameters of ours.

A checkpoint is a `config.json` and named torch tensors. Each family of models says how its config
translates and where each tensor goes; this module does the rest, and accounts for every tensor, so
that a checkpoint that is not what it says it is fails here and not in a table of poor results.
"""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adapters_jax import params as trees
from adapters_jax.interop import hub
from adapters_jax.interop.tensors import WEIGHT_FILES, contents, read_tensors
from adapters_jax.models import families
from adapters_jax.models.backbone import BackboneConfig, shapes

_LOG = logging.getLogger(__name__)

_POOLER = 'pooler.'
# BERT's first checkpoints came out of TensorFlow and kept its names.
_LEGACY_NAMES = {'LayerNorm.gamma': 'LayerNorm.weight', 'LayerNorm.beta': 'LayerNorm.bias'}


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedBackbone:
    """A pretrained model: config, parameters (the tree below 'backbone') and identity."""

    config: BackboneConfig
    params: trees.Tree  # arrays in memory, or parts of mapped files (`load_backbone`)
    directory: Path  # where the tokenizer's files are
    name: str
    fingerprint: str  # of the weights in float32, whatever they are stored or loaded in

    @property
    def architecture(self) -> str:
        """A name of what is computed with the weights, as far as the config is no usual one."""
        return hashlib.sha256(json.dumps(_unusual(self.config)).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return what identifies the checkpoint that an adapter belongs to."""
        sizes = self.config.dimensions
        return {
            'name': self.name,
            'family': self.config.family,
            'layers': sizes.layers,
            'hidden': sizes.hidden,
            'fingerprint': self.fingerprint,
            'architecture': self.architecture,
        }


def load_backbone(name: str, dtype: DTypeLike | None = np.float32) -> LoadedBackbone:
    """Load a pretrained backbone by short name, folder or Hugging Face id.

    Args:
        name: a short name ('minilm', 'whisper-tiny.en'), a folder with config.json and weights, or
            a hub id such as 'org/name'.
        dtype: of the floating-point parameters returned, which are copies in memory. None: as they
            are stored, and of safetensors not in memory either: each leaf is a part of a mapped
            file, whose slices are read when they are placed on a device. For those who place them
            at once, since the file must not be overwritten as long as anything is read.

    Raises:
        FileNotFoundError: no such backbone, or one without config or weights.
        HubError: a hub id that cannot be fetched.
        ValueError: an unsupported model type or setting, a corrupt file, or tensors that are
            missing, unexpected or of the wrong shape; all are listed.
    """
    directory = hub.locate(name)
    family, hf_config = _read_config(directory)
    tensors = _standard_names(read_tensors(directory), family, directory)
    config = families.read_config(hf_config)
    has_pooler = any(tensor.startswith(_POOLER) for tensor in tensors)
    config = dataclasses.replace(config, pooler=config.pooler and has_pooler)
    if config.pooler and hf_config.get('pooler_act', 'tanh') != 'tanh':
        raise ValueError(
            f"{directory}: pooler_act is {hf_config['pooler_act']!r}; only 'tanh' is supported"
        )
    stored = trees.unflatten(_translate(tensors, config, directory))
    params = stored if dtype is None else jax.tree.map(lambda x: _copy(x, dtype), stored)
    return LoadedBackbone(config, params, directory, name, trees.fingerprint(stored))


def _unusual(config: Any) -> Any:
    """Return what differs from the defaults, but for dropout: new options leave it as it is."""
    if not dataclasses.is_dataclass(config):
        return config
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if 'dropout' not in field.name and getattr(config, field.name) != field.default
    }
    return [type(config).__name__, {name: _unusual(value) for name, value in fields.items()}]


def _copy(leaf: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Return a copy: a part of a mapped file would end the process if the file were replaced."""
    exact = np.array(leaf, np.float32, order='C')
    return exact.astype(dtype, copy=False)


def describe_backbone(name: str) -> LoadedBackbone:
    """Return a backbone with the shapes of its parameters in place of them.

    Of a folder only config.json is read, and the weights' names where there are any. Without them
    the backbone has the pooler of its family, and it has no fingerprint.

    Raises:
        FileNotFoundError, HubError, ValueError: as `load_backbone`.
    """
    directory = hub.locate(name)
    family, hf_config = _read_config(directory)
    config = families.read_config(hf_config)
    if any((directory / file).is_file() for file in WEIGHT_FILES):
        names = _standard_names(read_tensors(directory), family, directory)
        has_pooler = any(tensor.startswith(_POOLER) for tensor in names)
        config = dataclasses.replace(config, pooler=config.pooler and has_pooler)
    return LoadedBackbone(config, shapes(config), directory, name, fingerprint='')


def _read_config(directory: Path) -> tuple[families.Family, dict[str, Any]]:
    path = directory / hub.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f'{directory} has no {hub.CONFIG}; it holds {contents(directory)}')
    try:
        config = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} holds a {type(config).__name__}, expected an object')
    try:
        return families.find(config), config
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


def _standard_names(
    tensors: Mapping[str, np.ndarray], family: families.Family, directory: Path
) -> dict[str, Callable[[], np.ndarray]]:
    """Return how to read each of the encoder's tensors, by its name in the bare model."""
    readers: dict[str, Callable[[], np.ndarray]] = {}
    ignored = []
    for name in tensors:
        standard = name.removeprefix(family.prefix)
        for legacy, current in _LEGACY_NAMES.items():
            if standard.endswith(legacy):
                standard = standard.removesuffix(legacy) + current
        if re.fullmatch(family.ignored, standard):
            ignored.append(name)
            continue
        standard = family.aliases.get(standard, standard)
        if standard in readers:
            tied = standard in family.aliases.values()
            if tied and np.array_equal(readers[standard](), tensors[name]):
                continue
            raise ValueError(f'{directory} has two tensors for {standard}: {name} is the second')
        readers[standard] = lambda name=name: tensors[name]
    if ignored:
        _LOG.debug('%s: not part of the encoder, ignored: %s', directory, ', '.join(ignored))
    return readers


def _translate(
    tensors: Mapping[str, Callable[[], np.ndarray]],
    config: BackboneConfig,
    directory: Path,
) -> dict[str, np.ndarray]:
    """Return leaves by path, as parts of what they are read from, having accounted for each."""
    table = families.tensor_names(config)
    expected_shapes = {path: leaf.shape for path, leaf in trees.flatten(shapes(config)).items()}
    problems = [f'{name} is missing' for name in table if name not in tensors]
    problems += [f'{name} is unexpected' for name in tensors if name not in table]
    leaves = {}
    for name, (path, transpose) in table.items():
        if name not in tensors:
            continue
        tensor = tensors[name]()
        expected = expected_shapes[path][::-1] if transpose else expected_shapes[path]
        if tensor.shape != expected:
            problems.append(f'{name} has shape {tensor.shape}, expected {expected}')
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f'{name} holds {tensor.dtype}, expected floating-point numbers')
        else:
            leaves[path] = tensor.T if transpose else tensor
    if problems:
        raise ValueError(
            f'the weights in {directory} do not fit its {hub.CONFIG}: {"; ".join(problems)}'
        )
    return leaves
