"""A backbone as a Hugging Face directory: how merged weights leave this project.

Whatever reads the checkpoint that an adapter was trained on reads the result: the config is that
checkpoint's own, the tensors have its names, and the tokenizer's files come along.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as to_bytes

from adapters_jax import files, params
from adapters_jax.interop import decoder_heads, hf_heads, hub, language_heads, modules
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
    'spiece.model',
    'source.spm',
    'target.spm',
    'normalizer.json',
    'preprocessor_config.json',
    'generation_config.json',
)
_CLASSES = {
    'bert': 'Bert',
    'roberta': 'Roberta',
    'xlm-roberta': 'XLMRoberta',
    'camembert': 'Camembert',
    'distilbert': 'DistilBert',
    'electra': 'Electra',
    'vit': 'ViT',
    'deit': 'DeiT',
    'bart': 'Bart',
    'mbart': 'MBart',
    'marian': 'Marian',
    't5': 'T5',
    'mt5': 'MT5',
    'whisper': 'Whisper',
    'encoder-decoder': 'EncoderDecoder',
}
_WORDS = 'masked_lm'  # the task whose head scores all words
# What the config of another model with a head says of that head.
_OF_A_HEAD = ('id2label', 'label2id', 'num_labels', 'problem_type', 'finetuning_task')


def save(
    backbone: Tree,
    loaded: LoadedBackbone,
    directory: Path | str,
    head: tuple[Mapping[str, Any], Tree] | None = None,
    task: Mapping[str, Any] | None = None,
) -> Path:
    """Write a backbone's parameters as config.json, model.safetensors and the tokenizer's files.

    Args:
        backbone: the tree below 'backbone', with the leaves of `loaded.params`.
        loaded: the checkpoint that it comes from.
        directory: written under a temporary name, then renamed.
        head: description (JSON values) and parameters of the head that comes with it, as a model
            for classification, for missing words or, of a decoder, for generation; one that no such
            model has is left out with a warning.
        task: description of what it is for, with `name` and, of classes, `labels`; None for a
            regression.

    Raises:
        ValueError: leaves that are not those of the checkpoint, or as many labels as the head has
            no outputs.
    """
    directory = Path(directory)
    task = task or {'name': 'regression'}
    tensors_of_head = _head(head, task, loaded, directory)
    config = json.loads((loaded.directory / hub.CONFIG).read_text('utf-8'))
    described = _config(config, tensors_of_head, task, loaded.config)
    tensors = _tensors(backbone, loaded.config, tensors_of_head, task['name'])
    return _write(directory, described, tensors, loaded.directory)


def _write(
    directory: Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray], source: Path
) -> Path:
    """Write a model's files, with those of its tokenizers out of another folder."""
    with files.atomic(directory) as temporary:
        temporary.mkdir()
        (temporary / hub.CONFIG).write_text(json.dumps(config, indent=2) + '\n', 'utf-8')
        (temporary / SAFETENSORS).write_bytes(to_bytes(tensors, {'format': 'pt'}))
        for name in _TOKENIZER_FILES:
            for place in (Path(name), Path(hub.WRITER) / name):
                if (source / place).is_file():
                    (temporary / place).parent.mkdir(exist_ok=True)
                    shutil.copyfile(source / place, temporary / place)
    return directory


def _head(
    head: tuple[Mapping[str, Any], Tree] | None,
    task: Mapping[str, Any],
    loaded: LoadedBackbone,
    directory: Path,
) -> dict[str, np.ndarray] | None:
    """Return the tensors of a head; of words it is the checkpoint's, unless it was trained."""
    config = loaded.config
    if head is None:
        return None
    if config.decoder is not None:
        return decoder_heads.write(head[1] or decoder_heads.read(loaded), config)
    if task['name'] == _WORDS:
        return language_heads.write(head[1] or language_heads.read(loaded), config.family) or None
    known = (*hf_heads.PROBLEMS, *hf_heads.OF_TOKENS, _WORDS)
    if task['name'] not in known:
        _LOG.warning(
            'a head of %s is not written in this format: %s is the backbone alone; expected a task '
            'of %s',
            *(task['name'], directory, ', '.join(known)),
        )
        return None
    classifier = hf_heads.write(*head, config, task['name'])
    if classifier is None:
        _LOG.warning(
            'no Hugging Face model has this head: %s is written without it; expected %s',
            directory,
            hf_heads.equivalent(config.family, task['name']),
        )
    return classifier


def _config(
    config: dict[str, Any],
    head: Mapping[str, np.ndarray] | None,
    task: Mapping[str, Any],
    backbone: BackboneConfig,
) -> dict[str, Any]:
    """Return the checkpoint's config, changed to say what the directory holds."""
    left_out = (*_OF_A_HEAD, '_name_or_path', 'dtype')
    described = {key: value for key, value in config.items() if key not in left_out}
    described['torch_dtype'] = 'float32'
    described.setdefault('model_type', 'bert')
    name = _CLASSES.get(described['model_type'])
    if name is None:
        raise ValueError(
            f'which class of transformers reads the model type {described["model_type"]!r} is not '
            f'known; expected one of {", ".join(_CLASSES)} (or add it to interop/hf_export.py)'
        )
    if head is None:
        return described | {'architectures': [f'{name}Model']}
    if backbone.decoder is not None:
        return described | {'architectures': [name + decoder_heads.model_class(backbone.family)]}
    if task['name'] == _WORDS:
        # Scores of words are products with the embeddings, whatever the checkpoint's config says.
        return described | {'architectures': [f'{name}ForMaskedLM'], 'tie_word_embeddings': True}
    described['architectures'] = [name + hf_heads.model_class(backbone.family, task['name'])]
    outputs = hf_heads.outputs(head)
    if task['name'] == 'question_answering':
        return described | {'num_labels': outputs}  # the start and the end
    labels = list(task.get('labels') or ['LABEL_0'])
    if len(labels) != outputs:
        raise ValueError(f'the head has {outputs} outputs, but {len(labels)} labels: {labels}')
    return described | {
        'num_labels': outputs,
        'id2label': {str(i): label for i, label in enumerate(labels)},
        'label2id': {label: i for i, label in enumerate(labels)},
        **_problem(task['name']),
    }


def _problem(task: str) -> dict[str, str]:
    return {'problem_type': hf_heads.PROBLEMS[task]} if task in hf_heads.PROBLEMS else {}


def _without_pooler(family: str, task: str) -> bool:
    return task == _WORDS or hf_heads.without_pooler(family, task)


def _tensors(
    backbone: Tree, config: BackboneConfig, head: Mapping[str, np.ndarray] | None, task: str
) -> dict[str, np.ndarray]:
    """Return the tensors of the bare model, or of the model with a head."""
    leaves = params.flatten(backbone)
    names = families.tensor_names(config)
    expected = {path for path, _ in names.values()}
    if differing := sorted(expected ^ set(leaves)):
        raise ValueError(
            f'the parameters are not those of a {config.family} model with {config.depth} '
            f'layers; missing or unexpected: {", ".join(differing[:5])}'
        )
    prefix = '' if head is None else modules.prefix(config)
    tensors = {}
    for name, (path, transpose) in names.items():
        # A head that does not stand on the pooler is built without it.
        unused = head is not None and _without_pooler(config.family, task)
        if unused and name.startswith('pooler.'):
            continue
        leaf = np.asarray(leaves[path], np.float32)
        tensors[prefix + name] = np.ascontiguousarray(leaf.T if transpose else leaf)
    if config.decoder is not None and not config.decoder.tied and config.family != 't5':
        # Without ties `transformers` looks for each stack's own words, but for T5's.
        aliases = families.FAMILIES[config.family].aliases
        tensors |= {prefix + own: tensors[prefix + name].copy() for own, name in aliases.items()}
    for name, tensor in (head or {}).items():
        inside = name.startswith('pooler.')
        tensors[prefix + name if inside else name] = tensor
    return tensors
