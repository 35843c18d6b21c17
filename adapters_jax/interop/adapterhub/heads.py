"""Heads of AdapterHub folders as ours, and the reverse.

The library has exchangeable heads, whose config says what they are, and the fixed ones of Hugging
Face models. Those that classify a whole text or image, or give a text a number, are ours too, and
exchangeable ones that tag words or answer questions; of any other kind the adapter is read without
its head.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapters_jax import params as trees
from adapters_jax.interop import hf_heads
from adapters_jax.interop.adapterhub import store, word_heads
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.models.heads import TOKENS, HeadConfig
from adapters_jax.params import Tree

_LOG = logging.getLogger(__name__)
# Kinds of exchangeable heads.
_CLASSES, _TAGS, _QUESTIONS = 'classification', 'tagging', 'question_answering'
_IMAGES, _SEVERAL = 'image_classification', 'multilabel_classification'
# The tasks of those that classify a whole input.
_TASKS = {_CLASSES: 'classification', _IMAGES: 'image_classification', _SEVERAL: 'multi_label'}


class Head(NamedTuple):
    """A head as `AdapterFolder` has it; without one, all three are empty."""

    head: dict[str, Any]
    task: dict[str, Any]
    params: Tree


NONE = Head({}, {}, {})


def read(directory: Path, loaded: LoadedBackbone) -> Head:
    """Return the folder's head, or none where it has none that we know; this is logged.

    Raises:
        FileNotFoundError: a config without tensors, or the reverse.
        ValueError: a head that is not what its config says, or of another backbone.
    """
    path = directory / store.HEAD.config
    if not path.is_file() and not store.has_tensors(directory, store.HEAD):
        return NONE
    values = store.read_json(path)
    store.check_model(values, path, loaded)
    tensors = store.read_tensors(directory, store.HEAD)
    config = store.field(values, 'config', dict, path, default={})
    kind = config.get('head_type') if config else values.get('model_class')
    if kind == word_heads.KIND and loaded.config.decoder is not None:
        described, own = word_heads.read(values, config, tensors, loaded, directory)
        return Head(described, {}, own)
    if not _known(kind, bool(config), loaded) or config.get('multilabel'):
        _LOG.warning('%s: a head of kind %r is not supported, so it is left out', directory, kind)
        return NONE
    _check_sizes(config or values, tensors, path)
    head = _described(config, path, loaded) if config else _fixed(loaded)
    if head.pooling == 'pooler' and not loaded.config.pooler:
        _LOG.warning(
            '%s: its head needs a pooler, which %r lacks, so it is left out', directory, loaded.name
        )
        return NONE
    own_kind = _IMAGES if loaded.config.reads == 'pixels' else _CLASSES
    outputs, task = _task(config or values, config.get('head_type', own_kind), path)
    if outputs == 1 and task['name'] != 'regression':
        _LOG.warning(
            '%s: a head of kind %r with one output is not supported, so it is left out',
            directory,
            kind,
        )
        return NONE
    names = _exchangeable_names(values, config, head, path) if config else _fixed_names(loaded)
    return Head(head.to_json(), task, _params(tensors, names, head, outputs, loaded, directory))


def _known(kind: Any, exchangeable: bool, loaded: LoadedBackbone) -> bool:
    """Tell whether a kind of head is one of ours over this backbone."""
    if loaded.config.decoder is not None:
        return False
    if exchangeable:
        return kind in (*_TASKS, _TAGS, _QUESTIONS)
    return hf_heads.is_class(kind, loaded.config.family)


def _check_sizes(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuse sizes beyond all that the file holds, before anything of such a size is made."""
    total = sum(tensor.size for tensor in tensors.values())
    for key in ('layers', 'num_labels'):
        if store.field(config, key, int, path, default=0) > total:
            raise ValueError(
                f'{path} has {key}={config[key]}, but the tensors beside it hold {total} numbers'
            )


def _described(config: Mapping[str, Any], path: Path, loaded: LoadedBackbone) -> HeadConfig:
    """Return the head of an exchangeable head's config."""
    dropout = config.get('dropout_prob')
    dropout = loaded.config.block.dropout if dropout is None else dropout
    activation = config.get('activation_function')
    if type(dropout) not in (int, float) or not isinstance(activation, str | None):
        raise ValueError(
            f'{path} has dropout_prob={dropout!r} and activation_function={activation!r}; expected '
            'a number and text'
        )
    pooling = 'pooler' if store.field(config, 'use_pooler', bool, path, False) else 'cls'
    return HeadConfig(
        pooling=TOKENS if config['head_type'] in (_TAGS, _QUESTIONS) else pooling,
        layers=store.field(config, 'layers', int, path),
        activation=activation.lower() if activation else 'linear',
        dropout=dropout,
    )


def _fixed(loaded: LoadedBackbone) -> HeadConfig:
    """Return the head that a model of `transformers` for classification has."""
    return hf_heads.head_config(loaded.config)


def _fixed_names(loaded: LoadedBackbone) -> dict[str, str]:
    return {path: name for name, (path, _) in hf_heads.tensor_names(loaded.config.family).items()}


def _exchangeable_names(
    values: Mapping[str, Any], config: Mapping[str, Any], head: HeadConfig, path: Path
) -> dict[str, str]:
    """Return the tensor of each leaf; the last layer may be without a bias."""
    names = layer_names(
        store.field(values, 'name', str, path), head.layers, bool(config.get('activation_function'))
    )
    if not store.field(config, 'bias', bool, path, True):
        del names[f'dense_{head.layers - 1}/bias']
    return names


def layer_names(name: str, layers: int, activated: bool) -> dict[str, str]:
    """Return the tensor of each leaf of an exchangeable head.

    A head is a sequence of modules: for each layer a dropout, a dense layer and, between layers, an
    activation where it has one.
    """
    stride = 3 if activated else 2
    return {
        f'dense_{i}/{leaf}': f'heads.{name}.{1 + stride * i}.{tensor}'
        for i in range(layers)
        for leaf, tensor in (('kernel', 'weight'), ('bias', 'bias'))
    }


def _params(
    tensors: Mapping[str, np.ndarray],
    names: Mapping[str, str],
    head: HeadConfig,
    outputs: int,
    loaded: LoadedBackbone,
    directory: Path,
) -> Tree:
    hidden, last = loaded.config.dimensions.hidden, f'dense_{head.layers - 1}/'
    width = {path: outputs if path.startswith(last) else hidden for path in names}
    expected = {
        name: (width[path], hidden) if path.endswith('kernel') else (width[path],)
        for path, name in names.items()
    }
    store.check_tensors(tensors, expected, directory)
    leaves = {path: store.copied(tensors[name].T) for path, name in names.items()}
    leaves.setdefault(f'{last}bias', np.zeros(outputs, np.float32))
    return trees.unflatten(leaves)


def _task(config: Mapping[str, Any], kind: str, path: Path) -> tuple[int, dict[str, Any]]:
    """Return the number of outputs and the task; one output is a number, not a class.

    `kind` is one of exchangeable heads, or the one that a model's fixed head is like.
    """
    ids = store.field(config, 'label2id', dict, path, default={})
    count = store.field(config, 'num_labels', int, path, default=len(ids) or None)
    if kind == _QUESTIONS:
        if count != 2:
            raise ValueError(f'{path} has num_labels={count}; answers have 2, a start and an end')
        return 2, {'name': _QUESTIONS}
    if count == 1 and kind == _CLASSES:
        return 1, {'name': 'regression'}
    numbers = [_whole(i) for i in ids.values()] or list(range(count))
    if count < 1 or sorted(numbers, key=str) != sorted(range(count), key=str) or '' in ids:
        raise ValueError(
            f'{path} has num_labels={count} and label2id={ids!r}; expected a name for each of the '
            f'numbers 0 to {count - 1}'
        )
    labels = dict(zip(numbers, ids or [f'LABEL_{i}' for i in numbers], strict=True))
    return count, {'name': _TASKS.get(kind, kind), 'labels': [labels[i] for i in range(count)]}


def _whole(value: Any) -> Any:
    """Return a number that the file may hold as text."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def write(head: Head, name: str, directory: Path, loaded: LoadedBackbone) -> None:
    """Write the head, unless the library has none like it; this is logged."""
    if not head.head:
        return
    if loaded.config.decoder is not None:
        config, tensors = word_heads.write(head.params, name, loaded)
        _write(config, tensors, name, directory, loaded)
        return
    config = _config(HeadConfig(**head.head), head.task)
    if config is None:
        _LOG.warning(
            'the adapter %r is written without its head: `adapters` has none with pooling %r for '
            "the task %r; train with head.pooling='cls' or 'pooler', for classification, "
            'multi_label, image_classification or regression, to take the head along',
            name,
            head.head['pooling'],
            head.task.get('name'),
        )
        return
    leaves = trees.flatten(head.params)
    names = layer_names(name, head.head['layers'], activated=True)
    tensors = {tensor: np.asarray(leaves[path]).T for path, tensor in names.items()}
    _write(config, tensors, name, directory, loaded)


def _write(
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    name: str,
    directory: Path,
    loaded: LoadedBackbone,
) -> None:
    described = store.described(loaded, name) | {'config': dict(config)}
    store.write_json(directory / store.HEAD.config, described)
    store.write_tensors(directory / store.HEAD.safetensors, tensors)


def _config(head: HeadConfig, task: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of an exchangeable head, or None where the library has none like it."""
    common = {
        'layers': head.layers,
        'activation_function': head.activation,
        'dropout_prob': head.dropout,
    }
    if task.get('name') == _QUESTIONS:
        return {'head_type': _QUESTIONS, 'num_labels': 2, 'label2id': None, **common}
    labels = _labels(task)
    if labels is None or head.pooling not in ('cls', 'pooler', TOKENS):
        return None
    common |= {'num_labels': len(labels), 'label2id': {label: i for i, label in enumerate(labels)}}
    if task['name'] == _TAGS:
        return {'head_type': _TAGS, **common}
    classes = {task: kind for kind, task in _TASKS.items()}.get(task['name'], _CLASSES)
    return {'head_type': classes, 'use_pooler': head.pooling == 'pooler', 'bias': True, **common}


def _labels(task: Mapping[str, Any]) -> list[str] | None:
    """Return the names of an input's or a word's outputs; None for a task of another kind."""
    if task.get('name') == 'regression':
        return ['LABEL_0']
    return list(task['labels']) if task.get('name') in (*_TASKS.values(), _TAGS) else None
