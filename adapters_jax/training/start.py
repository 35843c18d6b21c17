"""The finished adapter that training begins with, where that is not a fresh one (`config.start`).

Hu et al. (2022, section 5.1) train LoRA for MRPC, RTE and STS-B from the adapter of MNLI; other
uses are more epochs, or more examples, for an adapter that there is.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.adapters import registry
from adapters_jax.config import Config
from adapters_jax.interop import formats
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.model import Model
from adapters_jax.params import Tree, flatten, partition, unflatten
from adapters_jax.tasks.task import Task

_LOG = logging.getLogger(__name__)
_MEANING = ('name', 'labels')  # of a task: what the outputs of a head stand for
_SHOWN = {'token_types': True}  # and what a model is shown of texts: formerly, this
# Options that say nothing of what a trained adapter computes. `init_weights_seed` is none of them:
# leaves that are not trained may be drawn from it.
_OF_TRAINING = {
    'init_weights', 'init_sigma', 'prompt_init', 'prompt_init_text', 'random_uniform_scale',
    'phm_c_init', 'phm_init_range', 'hypercomplex_nonlinearity', 'dropout', 'stochastic_depth',
}  # fmt: skip


def load(config: Config) -> AdapterFolder | None:
    """Read the adapter that `config.start` names, if it names one.

    Raises:
        FileNotFoundError, ValueError: no adapter there, or one of another backbone.
    """
    return formats.load_once(Path(config.start), config.backbone) if config.start else None


def check(folder: AdapterFolder, model: Model) -> None:
    """Refuse an adapter of another method.

    Raises:
        ValueError: the options that differ.
    """
    own, given = (
        _decisive(method.to_json()) for method in (registry.from_json(folder.method), model.method)
    )
    differing = [key for key in own | given if own.get(key) != given.get(key)]
    if differing:
        key = differing[0]
        raise ValueError(
            f'config.start is an adapter with {key}={own.get(key)!r}, but config.method has '
            f'{given.get(key)!r}; give the method with which it was trained'
        )


def check_members(folder: AdapterFolder, members: Mapping[str, AdapterFolder]) -> None:
    """Refuse an expression that was trained over other finished adapters than are given now.

    Raises:
        ValueError: the first one that differs.
    """
    for name, member in members.items():
        held = flatten(folder.adapter_params.get(name, {}))
        for path, leaf in flatten(member.adapter_params).items():
            if path in held and not np.array_equal(held[path], leaf):
                raise ValueError(
                    f'config.start was trained over another adapter {name!r} than config.adapters '
                    f'names ({path} differs), and would put that in its place; name the one that '
                    'it was trained over, or leave config.start out'
                )


def announce(folder: AdapterFolder, model: Model, task: Task) -> None:
    """Say with which adapter training begins, and whether its head is used."""
    fresh = '' if same_head(folder, model, task) else ', under a fresh head'
    _LOG.info('training begins with the adapter %r%s', folder.name, fresh)
    here = task.to_json()
    for key, formerly in _SHOWN.items():
        own = folder.task.get(key, formerly)
        if folder.task.get('name') == here['name'] and own != here.get(key, own):
            _LOG.warning(
                'the adapter that training begins with was trained with task.%s=%r, not %r: set it '
                'so, unless that is meant',
                *(key, own, here[key]),
            )


def _decisive(values: Any) -> Any:
    """Return a method's options, also those of its members, without those for training alone."""
    if isinstance(values, list):
        return [_decisive(value) for value in values]
    if not isinstance(values, Mapping):
        return values
    return {key: _decisive(value) for key, value in values.items() if key not in _OF_TRAINING}


def same_head(folder: AdapterFolder, model: Model, task: Task) -> bool:
    """Tell whether the adapter was trained with the same head for the same task."""
    own, here = (
        {key: value for key, value in values.items() if key in _MEANING}
        for values in (folder.task, task.to_json())
    )
    return own == here and folder.head == model.head_config.to_json()


def overlay(folder: AdapterFolder, tree: Tree, model: Model, task: Task) -> Tree:
    """Return fresh parameters with the adapter's in their place.

    Raises:
        ValueError: the adapter has a leaf that is not trained here, or of another shape.
    """
    trained = flatten(partition(tree, model.rules)[0])
    heads = folder.head_params if same_head(folder, model, task) else {}
    given = flatten(
        {
            'adapters': {model.name: folder.adapter_params},
            'backbone': folder.backbone_params,
            'heads': {model.name: heads},
        }
    )
    leaves = flatten(tree)
    for path, leaf in given.items():
        here = leaves.get(path)
        foreign = path not in trained and not path.startswith('adapters/')
        if here is None or foreign or here.shape != leaf.shape:
            raise ValueError(
                f'config.start: the adapter has {path} of shape {leaf.shape}, but what is trained '
                f'here has {"none" if here is None or foreign else f"one of {here.shape}"}; give '
                'the config.method and the config.backbone that it was trained with'
            )
    return unflatten(leaves | given)
