"""A backbone as a Hugging Face directory: how merged weights leave this project.

Whatever reads the checkpoint that an adapter was trained on reads the result: the config is that
checkpoint's own, the tensors have its names, and the tokenizer's files come along.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_bytes

from adapters_jax import files, params
from adapters_jax.interop import hf_heads, hub
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.tensors import SAFETENSORS
from adapters_jax.models import families
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

_LOG = logging.getLogger(__name__)
_TOKENIZER_FILES = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'vocab.txt',
    'vocab.json',
    'merges.txt',
    'sentencepiece.bpe.model',
    'preprocessor_config.json',
)
_CLASSES = {'bert': 'Bert', 'roberta': 'Roberta', 'xlm-roberta': 'XLMRoberta'}
_CLASSES |= {'camembert': 'Camembert', 'vit': 'ViT', 'deit': 'DeiT'}
_OF_IMAGES = ('vit', 'deit')
# Whose model with a classifier is built without the pooler.
_WITHOUT_POOLER = ('roberta', *_OF_IMAGES)
# What the config of another model with a head says of that head.
_OF_A_HEAD = ('id2label', 'label2id', 'num_labels', 'problem_type', 'finetuning_task')


def save(
    backbone: Tree,
    loaded: LoadedBackbone,
    directory: Path | str,
    head: tuple[Mapping[str, Any], Tree] | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write a backbone's parameters as config.json, model.safetensors and the tokenizer's files.

    Args:
        backbone: the tree below 'backbone', with the leaves of `loaded.params`.
        loaded: the checkpoint that it comes from.
        directory: written under a temporary name, then renamed.
        head: description (JSON values) and parameters of the head that comes with it, as a model
            for classification; one that no such model has is left out with a warning.
        labels: names of the classes; None for a regression.

    Raises:
        ValueError: leaves that are not those of the checkpoint, or as many labels as the head has
            no outputs.
    """
    directory = Path(directory)
    classifier = None
    if head is not None:
        classifier = hf_heads.write(*head, loaded.config)
        if classifier is None:
            _LOG.warning(
                'no Hugging Face model has this head: %s is written without it; expected %s',
                directory,
                hf_heads.equivalent(loaded.config.family),
            )
    config = json.loads((loaded.directory / hub.CONFIG).read_text('utf-8'))
    described = _config(config, classifier, labels)
    tensors = _tensors(backbone, loaded.config, classifier)
    with files.atomic(directory) as temporary:
        temporary.mkdir()
        (temporary / hub.CONFIG).write_text(json.dumps(described, indent=2) + '\n', 'utf-8')
        (temporary / SAFETENSORS).write_bytes(to_bytes(tensors, {'format': 'pt'}))
        for name in _TOKENIZER_FILES:
            if (loaded.directory / name).is_file():
                shutil.copyfile(loaded.directory / name, temporary / name)
    return directory


def _config(
    config: dict[str, Any],
    classifier: Mapping[str, np.ndarray] | None,
    labels: Sequence[str] | None,
) -> dict[str, Any]:
    """Return the checkpoint's config, changed to say what the directory holds."""
    left_out = (*_OF_A_HEAD, '_name_or_path', 'dtype')
    described = {key: value for key, value in config.items() if key not in left_out}
    described['torch_dtype'] = 'float32'
    described.setdefault('model_type', 'bert')
    name = _CLASSES[described['model_type']]
    if classifier is None:
        return described | {'architectures': [f'{name}Model']}
    outputs = hf_heads.outputs(classifier)
    regression = labels is None
    labels = ['LABEL_0'] if labels is None else list(labels)
    if len(labels) != outputs:
        raise ValueError(f'the head has {outputs} outputs, but {len(labels)} labels: {labels}')
    kind = 'Image' if described['model_type'] in _OF_IMAGES else 'Sequence'
    return described | {
        'architectures': [f'{name}For{kind}Classification'],
        'num_labels': outputs,
        'id2label': {str(i): label for i, label in enumerate(labels)},
        'label2id': {label: i for i, label in enumerate(labels)},
        'problem_type': 'regression' if regression else 'single_label_classification',
    }


def _tensors(
    backbone: Tree, config: BackboneConfig, classifier: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Return the tensors of the bare model, or of the model with a classifier."""
    leaves = params.flatten(backbone)
    names = families.tensor_names(config)
    expected = {path for path, _ in names.values()}
    if differing := sorted(expected ^ set(leaves)):
        raise ValueError(
            f'the parameters are not those of a {config.family} model with {config.depth} '
            f'layers; missing or unexpected: {", ".join(differing[:5])}'
        )
    prefix = '' if classifier is None else f'{config.family}.'
    tensors = {}
    for name, (path, transpose) in names.items():
        headed = classifier is not None and config.family in _WITHOUT_POOLER
        if headed and name.startswith('pooler.'):
            continue
        leaf = np.asarray(leaves[path], np.float32)
        tensors[prefix + name] = np.ascontiguousarray(leaf.T if transpose else leaf)
    for name, tensor in (classifier or {}).items():
        tensors[name if name.startswith(hf_heads.CLASSIFIER) else prefix + name] = tensor
    return tensors
