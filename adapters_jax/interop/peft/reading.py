"""A PEFT folder as one of ours.

The folder's own description decides what must be in it; every tensor it should hold has to be there
in its shape, and every tensor that is there has to be explained, so that a folder is read whole or
not at all.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from adapters_jax import params
from adapters_jax.adapters.lora import LoRA
from adapters_jax.adapters.method import At, Method
from adapters_jax.adapters.union import Union
from adapters_jax.interop import modules
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.peft import (
    adalora,
    configs,
    heads,
    lora,
    names,
    prompts,
    tensors,
    tuned,
    vectors,
)
from adapters_jax.interop.peft.places import Adapted
from adapters_jax.interop.peft.tensors import Contents, listed
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.families import tensor_names
from adapters_jax.models.heads import TOKENS
from adapters_jax.params import Tree

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Projections:
    """How a type that adapts projections is read: all of them, and one alone."""

    read: Callable[[Adapted], tuple[Method, Tree]]
    read_one: Callable[[Adapted, str], Tree]


_PROJECTIONS = {
    'LORA': _Projections(lora.read_lora, lora.lora_leaves),
    'ADALORA': _Projections(adalora.read_adalora, adalora.adalora_leaves),
    'VERA': _Projections(vectors.read_vera, vectors.vera_leaves),
    'IA3': _Projections(vectors.read_ia3, vectors.ia3_leaves),
}
_PROMPTS = {
    'PREFIX_TUNING': prompts.read_prefix,
    'PROMPT_TUNING': prompts.read_prompt,
    'P_TUNING': prompts.read_prompt,
}


def load(directory: Path | str, loaded: LoadedBackbone, name: str = 'default') -> AdapterFolder:
    """Read a PEFT folder as an adapter of `loaded`, under `name`.

    Labels are not in the folder: the classes are called LABEL_0, LABEL_1, and so on. A folder
    without a classifier gives an adapter without head and task.

    Raises:
        FileNotFoundError: no folder, config or tensor file.
        ValueError: a type or a setting that is not supported, a damaged file, or tensors that are
            not those of the config and the backbone.
    """
    directory = Path(directory)
    settings = configs.read(directory)
    kind = settings['peft_type']
    try:
        heads.check_type(settings, loaded.config)
    except ValueError as error:
        raise ValueError(f'{directory / configs.CONFIG}: {error}') from error
    _warn_of_revision(directory, settings)
    contents = tensors.read(directory, kind, loaded.config)
    try:
        settings = names.resolved(settings, loaded.config)
        return _translate(settings, contents, loaded, name)
    except ValueError as error:
        raise ValueError(f'{directory} cannot be read as a {kind} adapter: {error}') from error


def _warn_of_revision(directory: Path, settings: Mapping[str, Any]) -> None:
    if settings['revision'] not in (None, '', 'main'):
        _LOG.warning(
            '%s was made for the revision %r of %s; whatever revision the backbone is of, it is '
            'used: give a copy of that one as --backbone',
            directory,
            settings['revision'],
            settings['base_model_name_or_path'],
        )


def _translate(
    settings: Mapping[str, Any], contents: Contents, loaded: LoadedBackbone, name: str
) -> AdapterFolder:
    config = loaded.config
    head, task, head_params = heads.read(settings, contents, config)
    leaves = tuned.read(settings, contents, config, loaded.params)
    main, tree = _read_method(settings, contents, loaded, leaves)
    pooler = {p.removeprefix('pooler/'): leaves.pop(p) for p in list(leaves) if _is_pooler(p)}
    if 'kernel' in pooler:
        head, head_params = _with_pooler(head, head_params, pooler)
    elif pooler:
        leaves['pooler/bias'] = pooler['bias']
    members, leaves = tuned.methods(leaves, config, loaded.params)
    members = [*([main] if main else []), *members]
    if not members:
        raise ValueError('it adapts nothing')
    method = Union(members=tuple(members)) if len(members) > 1 else members[0]
    if main and len(members) > 1:
        tree = {main.architecture: tree}
    _check_shapes(method, tree, loaded)
    return AdapterFolder(
        name=name,
        method=method.to_json(),
        head=head,
        task=task,
        backbone=loaded.describe(),
        max_length=config.positions - method.reserved_positions,
        pair=None,
        adapter_params=tree,
        head_params=head_params,
        backbone_params=params.unflatten(leaves),
    )


def _read_method(
    settings: Mapping[str, Any],
    contents: Contents,
    loaded: LoadedBackbone,
    leaves: dict[str, np.ndarray],
) -> tuple[Method | None, Tree]:
    """Return the method and its parameters; a pooler that it adapts is merged into `leaves`."""
    kind, config = settings['peft_type'], loaded.config
    if kind == 'LN_TUNING':
        return None, {}
    if kind in _PROMPTS:
        return _PROMPTS[kind](settings, contents.whole, config)
    _check_targets(settings, contents, config)
    adapted = Adapted(settings, contents.prefix, contents.modules, contents.whole, config)
    method, tree = _PROJECTIONS[kind].read(adapted)
    if names.POOLER in contents.modules:
        leaves |= _merged_pooler(method, tree, adapted, params.flatten(loaded.params) | leaves)
    return method, tree


def _check_targets(settings: Mapping[str, Any], contents: Contents, config: BackboneConfig) -> None:
    """Refuse modules that are not those which the settings choose.

    Raises:
        ValueError: the modules that are missing, unexpected or of a kind that cannot be adapted.
    """
    projections = list(modules.projections(config))
    tables = [n.removesuffix('.weight') for n in tensor_names(config) if '_embeddings' in n]
    # All dense layers are chosen by what they are: no table is one.
    among = projections if names.chooses_all(settings) else [*projections, *tables]
    chosen = names.targets(settings, among, contents.prefix)
    others = [m for m in (*chosen, *contents.modules) if m not in projections]
    if others:
        raise ValueError(
            f'it adapts {listed(sorted(set(others)))}; this project adapts the projections of the '
            'blocks, and the pooler'
        )
    there = heads.has_pooler(settings['task_type'], contents.prefix, config)
    optional = set() if there else {names.POOLER}
    missing = [m for m in chosen if m not in contents.modules and m not in optional]
    unexpected = [m for m in contents.modules if m not in chosen]
    problems = [f'{m} is missing' for m in missing] + [f'{m} is unexpected' for m in unexpected]
    if problems or not chosen:
        raise ValueError(
            'the adapted modules are not those of the config: '
            f'{listed(problems) or "it chooses none"}'
        )


def _merged_pooler(
    method: Method, tree: Tree, adapted: Adapted, leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the pooler with what the method does to it, since no site is there."""
    if isinstance(method, LoRA):
        rank, alpha = adapted.rank(names.POOLER), adapted.alpha(names.POOLER)
        changes = {'r': rank, 'alpha': alpha, 'rank_pattern': {}, 'alpha_pattern': {}}
        method = dataclasses.replace(method, **changes)
    own = _PROJECTIONS[adapted.settings['peft_type']].read_one(adapted, names.POOLER)
    constants = tree.get('constants', {})
    at = At(layer=0, name='pooler', shared={}, key=None, constants=constants)
    kernel, bias = method.merge_linear(own, leaves['pooler/kernel'], leaves['pooler/bias'], at)
    return {
        'pooler/kernel': np.asarray(kernel, np.float32),
        'pooler/bias': np.asarray(bias, np.float32),
    }


def _is_pooler(path: str) -> bool:
    return path.startswith('pooler/')


def _with_pooler(
    head: dict[str, Any], head_params: Tree, pooler: Tree
) -> tuple[dict[str, Any], Tree]:
    """Return the head with a trained pooler as its first layer: it is one dense layer and tanh."""
    if not head or head['pooling'] == TOKENS:
        _LOG.warning('the trained pooler is left out: without a classifier nothing reads it')
        return head, head_params
    head = head | {'pooling': 'cls', 'layers': 2}
    return head, {'dense_0': pooler, 'dense_1': head_params['dense_0']}


def _check_shapes(method: Method, tree: Tree, loaded: LoadedBackbone) -> None:
    """Refuse parameters that are not those of the method."""
    wanted = jax.eval_shape(
        lambda: method.init(jax.random.key(0), loaded.config.dimensions, loaded.params)
    )
    expected = {path: leaf.shape for path, leaf in params.flatten(wanted).items()}
    found = {path: leaf.shape for path, leaf in params.flatten(tree).items()}
    if found != expected:
        differing = sorted({path for path, _ in expected.items() ^ found.items()})
        raise ValueError(f'its tensors do not fit its config: {listed(differing)}')
