"""The head and the task that a PEFT folder implies.

A folder holds the classifier's tensors and no labels. Whether there is a classifier follows from
the type of task, or from the modules that were stored whole.
"""

from collections.abc import Mapping
from typing import Any

from adapters_jax.interop import hf_heads
from adapters_jax.interop.peft import names
from adapters_jax.interop.peft.tensors import Contents, listed
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

CLASSIFICATION, FEATURES, TEXTS = 'SEQ_CLS', 'FEATURE_EXTRACTION', 'SEQ_2_SEQ_LM'
MODULES = ('classifier', 'score')  # what PEFT stores whole for a classification


def read(
    settings: Mapping[str, Any], contents: Contents, config: BackboneConfig
) -> tuple[dict[str, Any], dict[str, Any], Tree]:
    """Return the head's and the task's descriptions and the head's parameters; empty without one.

    Raises:
        ValueError: a type of task that is not supported, or a classifier that is missing or that
            belongs to another kind of model.
    """
    task_type = settings['task_type']
    kinds = (CLASSIFICATION, FEATURES) if config.decoder is None else (TEXTS, FEATURES)
    if task_type not in (None, *kinds):
        raise ValueError(
            f'task_type is {task_type!r}, which is not supported for {config.family}; expected '
            f'{" or ".join(kinds)}, or none'
        )
    saved = hf_heads.CLASSIFIER in names.saved_modules(settings)
    if task_type != CLASSIFICATION and not saved:
        if contents.classifier:
            raise ValueError(
                f'{listed(list(contents.classifier))} is unexpected: the config has no classifier'
            )
        return {}, {}, {}
    _check_model(settings, config)
    head, tree, outputs = hf_heads.read(contents.classifier, config)
    labels = [f'LABEL_{i}' for i in range(outputs)]
    if config.reads == 'pixels':
        task = {'name': 'image_classification', 'labels': labels}
    elif outputs == 1:
        task = {'name': 'regression'}
    else:
        task = {'name': 'classification', 'labels': labels}
    return head.to_json(), task, tree


def _check_model(settings: Mapping[str, Any], config: BackboneConfig) -> None:
    """Refuse the classifier of a model that classifies something else than whole inputs."""
    mapping = settings['auto_mapping']
    name = mapping.get('base_model_class') if isinstance(mapping, Mapping) else None
    if isinstance(name, str) and not hf_heads.is_class(name, config.family):
        raise ValueError(
            f'the classifier is that of a {name}; expected one of a model '
            f'{hf_heads.model_class(config.family)}'
        )
