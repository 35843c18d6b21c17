"""The head and the task that a PEFT folder implies.

A folder holds the classifier's tensors and no labels. Whether there is a classifier follows from
the type of task, or from the modules that were stored whole.
"""

from collections.abc import Mapping
from typing import Any

from adapters_jax import tasks
from adapters_jax.interop import hf_heads
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.peft import names
from adapters_jax.interop.peft.tensors import Contents, listed
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

CLASSIFICATION, FEATURES = 'SEQ_CLS', 'FEATURE_EXTRACTION'
MODULES = ('classifier', 'score')  # what PEFT stores whole for a classification


def read(
    settings: Mapping[str, Any], contents: Contents, loaded: LoadedBackbone
) -> tuple[dict[str, Any], dict[str, Any], Tree]:
    """Return the head's and the task's descriptions and the head's parameters; empty without one.

    Raises:
        ValueError: a type of task that is not supported, or a classifier that is missing or that
            belongs to another kind of model.
    """
    config, task_type = loaded.config, settings['task_type']
    if task_type not in (None, CLASSIFICATION, FEATURES):
        raise ValueError(
            f'task_type is {task_type!r}, which is not supported; expected {CLASSIFICATION}, '
            f'{FEATURES} or none'
        )
    saved = hf_heads.CLASSIFIER in names.saved_modules(settings)
    if task_type != CLASSIFICATION and not saved:
        if contents.classifier:
            raise ValueError(
                f'{listed(list(contents.classifier))} is unexpected: the config has no classifier'
            )
        return {}, {}, {}
    images = config.stem.reads == 'pixels'
    _check_model(settings, 'ForImageClassification' if images else 'ForSequenceClassification')
    head, tree, outputs = hf_heads.read(contents.classifier, config)
    labels = tuple(f'LABEL_{i}' for i in range(outputs))
    return head.to_json(), _task(labels, loaded).to_json(), tree


def task_type(config: BackboneConfig, classifies: bool) -> str | None:
    """Return the type of task that PEFT calls it; for images it has none."""
    if not classifies:
        return FEATURES
    return None if config.stem.reads == 'pixels' else CLASSIFICATION


def _task(labels: tuple[str, ...], loaded: LoadedBackbone) -> tasks.Task:
    if loaded.config.stem.reads == 'pixels':
        task = tasks.ImageClassification(labels=labels)
        return task.fitted(loaded.config, loaded.directory)
    return tasks.Regression() if len(labels) == 1 else tasks.Classification(labels=labels)


def _check_model(settings: Mapping[str, Any], expected: str) -> None:
    """Refuse the classifier of a model that classifies something else than whole examples."""
    mapping = settings['auto_mapping']
    name = mapping.get('base_model_class') if isinstance(mapping, Mapping) else None
    if isinstance(name, str) and not name.endswith(expected):
        raise ValueError(f'the classifier is that of a {name}; expected one of a model {expected}')
