"""Pretrained backbones of others as parameters of ours.

A checkpoint is a `config.json` and named torch tensors. Each family of models says how its config
translates and where each tensor goes; this module does the rest, and accounts for every tensor, so
that a checkpoint that is not what it says it is fails here and not in a table of poor results.
"""

import dataclasses
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
from adapters_jax.models import bert

_LOG = logging.getLogger(__name__)

# What comes with a checkpoint and is no part of the encoder: constants, and the heads of whatever
# it was trained for.
_IGNORED = re.compile(
    r'embeddings\.(position_ids|token_type_ids)|(cls|lm_head|classifier|qa_outputs)\..*'
)
_POOLER = 'pooler.'
# BERT's first checkpoints came out of TensorFlow and kept its names.
_LEGACY_NAMES = {'LayerNorm.gamma': 'LayerNorm.weight', 'LayerNorm.beta': 'LayerNorm.bias'}


@dataclasses.dataclass(frozen=True)
class Family:
    """What this module needs to know about a family of models."""

    model_type: str  # the family's own; another model type of the same architecture uses it too
    prefix: str  # precedes the encoder's names in a checkpoint of a model with a head
    read_config: Callable[[Mapping[str, Any]], bert.BertConfig]
    tensor_names: Callable[[bert.BertConfig], dict[str, tuple[str, bool]]]
    shapes: Callable[[bert.BertConfig], dict[str, tuple[int, ...]]]


def _bert_shapes(config: bert.BertConfig) -> dict[str, tuple[int, ...]]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    model = bert.Bert(config)
    variables = jax.eval_shape(
        lambda ids: model.init(jax.random.key(0), ids, method='initialise'), ids
    )
    return {path: leaf.shape for path, leaf in trees.flatten(variables['params']).items()}


def _bert_family(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        prefix=f'{model_type}.',
        read_config=bert.BertConfig.from_hf,
        tensor_names=bert.tensor_names,
        shapes=_bert_shapes,
    )


# XLM-RoBERTa and CamemBERT are RoBERTa with another vocabulary.
FAMILIES = {
    'bert': _bert_family('bert'),
    'roberta': _bert_family('roberta'),
    'xlm-roberta': _bert_family('roberta'),
    'camembert': _bert_family('roberta'),
}


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedBackbone:
    """A pretrained model: config, parameters (the tree below 'backbone') and identity."""

    config: bert.BertConfig
    params: trees.Tree  # arrays in memory, or parts of mapped files (`load_backbone`)
    directory: Path  # where the tokenizer's files are
    name: str
    fingerprint: str  # of the weights in float32, whatever they are stored or loaded in

    def describe(self) -> dict[str, Any]:
        """Return what identifies the checkpoint that an adapter belongs to."""
        sizes = self.config.dimensions
        return {
            'name': self.name,
            'family': self.config.family,
            'layers': sizes.layers,
            'hidden': sizes.hidden,
            'fingerprint': self.fingerprint,
        }


def load_backbone(name: str, dtype: DTypeLike | None = np.float32) -> LoadedBackbone:
    """Load a pretrained backbone by short name, folder or Hugging Face id.

    Args:
        name: 'minilm', a folder with config.json and weights, or a hub id such as 'org/name'.
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
    tensors = _standard_names(read_tensors(directory), family.prefix, directory)
    config = family.read_config({**hf_config, 'model_type': family.model_type})
    if not any(tensor.startswith(_POOLER) for tensor in tensors):
        config = dataclasses.replace(config, pooler=False)
    stored = trees.unflatten(_translate(tensors, family, config, directory))
    params = stored if dtype is None else jax.tree.map(lambda x: _copy(x, dtype), stored)
    return LoadedBackbone(config, params, directory, name, trees.fingerprint(stored))


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
    config = family.read_config({**hf_config, 'model_type': family.model_type})
    if any((directory / file).is_file() for file in WEIGHT_FILES):
        names = _standard_names(read_tensors(directory), family.prefix, directory)
        has_pooler = any(tensor.startswith(_POOLER) for tensor in names)
        config = dataclasses.replace(config, pooler=has_pooler)
    shapes = {
        path: jax.ShapeDtypeStruct(shape, np.float32)
        for path, shape in family.shapes(config).items()
    }
    return LoadedBackbone(config, trees.unflatten(shapes), directory, name, fingerprint='')


def _read_config(directory: Path) -> tuple[Family, dict[str, Any]]:
    path = directory / hub.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f'{directory} has no {hub.CONFIG}; it holds {contents(directory)}')
    try:
        config = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not JSON: {error}') from error
    if not isinstance(config, dict):
        raise ValueError(f'{path} holds a {type(config).__name__}, expected an object')
    model_type = config.get('model_type', 'bert')  # the first BERT configs do not say
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f'{path} has model_type {model_type!r}, which is not supported; expected one of '
            f'{", ".join(FAMILIES)}'
        )
    return FAMILIES[model_type], config


def _standard_names(
    tensors: Mapping[str, np.ndarray], prefix: str, directory: Path
) -> dict[str, Callable[[], np.ndarray]]:
    """Return how to read each of the encoder's tensors, by its name in the bare model."""
    readers: dict[str, Callable[[], np.ndarray]] = {}
    ignored = []
    for name in tensors:
        standard = name.removeprefix(prefix)
        for legacy, current in _LEGACY_NAMES.items():
            if standard.endswith(legacy):
                standard = standard.removesuffix(legacy) + current
        if _IGNORED.fullmatch(standard):
            ignored.append(name)
            continue
        if standard in readers:
            raise ValueError(f'{directory} has two tensors for {standard}: {name} is the second')
        readers[standard] = lambda name=name: tensors[name]
    if ignored:
        _LOG.debug('%s: not part of the encoder, ignored: %s', directory, ', '.join(ignored))
    return readers


def _translate(
    tensors: Mapping[str, Callable[[], np.ndarray]],
    family: Family,
    config: bert.BertConfig,
    directory: Path,
) -> dict[str, np.ndarray]:
    """Return leaves by path, as parts of what they are read from, having accounted for each."""
    table, shapes = family.tensor_names(config), family.shapes(config)
    problems = [f'{name} is missing' for name in table if name not in tensors]
    problems += [f'{name} is unexpected' for name in tensors if name not in table]
    leaves = {}
    for name, (path, transpose) in table.items():
        if name not in tensors:
            continue
        tensor = tensors[name]()
        expected = shapes[path][::-1] if transpose else shapes[path]
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
