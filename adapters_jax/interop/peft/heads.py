"""The head and the task that a PEFT folder implies.

A folder holds the classifier's tensors and no labels. Whether there is a classifier, and of what,
follows from the type of task, or from the modules that were stored whole.
"""

from collections.abc import Mapping
from typing import Any

from adapters_jax.interop import hf_heads
from adapters_jax.interop.peft import names
from adapters_jax.interop.peft.tensors import Contents, listed
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

CLASSIFICATION, FEATURES, TEXTS = 'SEQ_CLS', 'FEATURE_EXTRACTION', 'SEQ_2_SEQ_LM'
OF_TOKENS = {'TOKEN_CLS': 'tagging', 'QUESTION_ANS': 'question_answering'}  # our tasks
_MODULES = ('classifier', 'score')  # what PEFT stores whole for a classification, there or not


def is_part(module: str) -> bool:
    """Tell whether a module that is stored whole is a classifier, or in one."""
    return module in _MODULES or hf_heads.is_head(f'{module}.')


def stored(task_type: str | None) -> tuple[str, ...]:
    """Return the modules that PEFT stores whole for a type of task."""
    return (hf_heads.ANSWERS,) if task_type == 'QUESTION_ANS' else _MODULES


def has_pooler(task_type: str | None, prefix: str, config: BackboneConfig) -> bool:
    """Tell whether the adapted model had a pooler: some with a head, so a `prefix`, have none."""
    absent = hf_heads.without_pooler(config.family) or task_type in OF_TOKENS
    return not (absent and prefix)


def check_type(settings: Mapping[str, Any], config: BackboneConfig) -> None:
    """Refuse a type of task that this project has no head for.

    Raises:
        ValueError: naming those that it has.
    """
    task_type = settings['task_type']
    kinds = (TEXTS, FEATURES) if config.decoder is not None else (CLASSIFICATION, FEATURES)
    if config.decoder is None and config.reads != 'pixels':
        kinds += tuple(OF_TOKENS)
    if task_type not in (None, *kinds):
        raise ValueError(
            f'task_type is {task_type!r}, whose head is not supported for {config.family}; '
            f'expected {" or ".join(kinds)}, or none'
        )


def read(
    settings: Mapping[str, Any], contents: Contents, config: BackboneConfig
) -> tuple[dict[str, Any], dict[str, Any], Tree]:
    """Return the head's and the task's descriptions and the head's parameters; empty without one.

    Raises:
        ValueError: a classifier that is missing or that belongs to another kind of model.
    """
    task_type = settings['task_type']
    saved = any(hf_heads.is_head(f'{module}.') for module in names.saved_modules(settings))
    if task_type not in (CLASSIFICATION, *OF_TOKENS) and not saved:
        if contents.classifier:
            raise ValueError(
                f'{listed(list(contents.classifier))} is unexpected: the config has no classifier'
            )
        return {}, {}, {}
    name = OF_TOKENS.get(task_type)
    if config.decoder is None:  # else there is no classifier of ours, which `hf_heads` says
        _check_model(settings, config, name)
    head, tree, outputs = hf_heads.read(contents.classifier, config, name)
    return head.to_json(), _task(name, outputs, config), tree


def _task(name: str | None, outputs: int, config: BackboneConfig) -> dict[str, Any]:
    """Return the task of a classifier; `name` is that of outputs for each token."""
    if name == 'question_answering':
        if outputs != 2:
            raise ValueError(
                f'{hf_heads.ANSWERS} has {outputs} outputs; expected 2, a start and an end'
            )
        # PEFT takes the token types of questions and contexts, and hands them to no model.
        return {'name': name, **({'token_types': False} if hf_heads.tells_types(config) else {})}
    if name is None and config.reads != 'pixels' and outputs == 1:
        return {'name': 'regression'}
    name = name or ('image_classification' if config.reads == 'pixels' else 'classification')
    if outputs == 1:
        raise ValueError(f'the classifier has one output; {name} is supported from two classes on')
    return {'name': name, 'labels': numbered(outputs)}


def numbered(outputs: int) -> list[str]:
    """Return the labels of a folder that names none."""
    return [f'LABEL_{i}' for i in range(outputs)]


def _check_model(settings: Mapping[str, Any], config: BackboneConfig, task: str | None) -> None:
    """Refuse the classifier of a model that classifies something else than the type of task."""
    mapping = settings['auto_mapping']
    name = mapping.get('base_model_class') if isinstance(mapping, Mapping) else None
    if isinstance(name, str) and not hf_heads.is_class(name, config.family, task):
        raise ValueError(
            f'the classifier is that of a {name}; expected one of a model '
            f'{hf_heads.model_class(config.family, task)}'
        )
