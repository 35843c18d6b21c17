"""Leaves of the backbone itself that a PEFT folder holds, and which it should hold.

They are modules stored whole (the pooler, LayerNorms), biases trained beside the adapter, and the
LayerNorms of LN_TUNING.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adapters_jax import params
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.tuning import BitFit, LayerNormTuning
from adapters_jax.interop import modules
from adapters_jax.interop.peft import heads, names
from adapters_jax.interop.peft.tensors import Contents, Tensors, listed
from adapters_jax.models import families
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

POOLER = 'pooler'
_LOG = logging.getLogger(__name__)
_POSITIONS = 'relative_attention_bias.weight'  # a table of T5's


def read(
    settings: Mapping[str, Any], contents: Contents, config: BackboneConfig, backbone: Tree
) -> dict[str, np.ndarray]:
    """Return the tuned leaves by our path, having accounted for every tensor.

    Raises:
        ValueError: leaves that the settings do not ask for, or that are missing or of another
            shape, and modules that this project cannot train.
    """
    tensors = _without_positions(settings, contents.leaves, config, backbone)
    wanted = _wanted(settings, contents, config)
    if settings['peft_type'] == 'LN_TUNING':
        for module, own in contents.modules.items():
            tensors |= {f'{module}.{name.rpartition(".")[2]}': x for name, x in own.items()}
    problems = [f'{name} is missing' for name in wanted if name not in tensors]
    problems += [f'{name} is unexpected' for name in tensors if name not in wanted]
    if problems:
        raise ValueError(f'the tensors are not those of the config: {listed(problems)}')
    leaves, table, own = {}, families.tensor_names(config), params.flatten(backbone)
    for name, tensor in tensors.items():
        path, transpose = table[name]
        leaf = np.ascontiguousarray(tensor.T) if transpose else tensor
        if leaf.shape != own[path].shape:
            raise ValueError(f'{name} has shape {leaf.shape}, expected {own[path].shape}')
        leaves[path] = leaf
    return leaves


def _without_positions(
    settings: Mapping[str, Any], found: Tensors, config: BackboneConfig, backbone: Tree
) -> Tensors:
    """Drop T5's biases of positions, which older PEFT stored with bias='all', where untrained.

    Raises:
        ValueError: they are not the backbone's.
    """
    stored = [name for name in found if name.endswith(_POSITIONS)]
    if settings.get('bias') != 'all' or not stored:
        return dict(found)
    table, own = families.tensor_names(config), params.flatten(backbone)
    for name in stored:
        path, transpose = table[name]
        tensor = found[name].T if transpose else found[name]
        if not np.array_equal(tensor, np.asarray(own[path], np.float32)):
            raise ValueError(
                f"bias='all' of an older PEFT trained {name} too, which this project does not "
                'train beside an adapter; merge the adapter with PEFT, and load the result as a '
                'backbone'
            )
    return {name: tensor for name, tensor in found.items() if name not in stored}


def _wanted(settings: Mapping[str, Any], contents: Contents, config: BackboneConfig) -> set[str]:
    """Return the tensors of the backbone that the settings ask for."""
    everything = _everything(settings['task_type'], contents.prefix, config)
    found = set()
    for entry in names.saved_modules(settings):
        if heads.is_part(entry):
            continue
        chosen = [n for n in everything if _is_inside(contents.prefix + n, entry)]
        others = [n for n in chosen if not (is_norm(n, config) or n.startswith(f'{POOLER}.'))]
        if others or not chosen:
            raise ValueError(
                f'modules_to_save has {entry!r}, which this project does not train beside an '
                f'adapter; expected the classifier, {POOLER!r} or one of {_norm_names(config)}'
            )
        found |= set(chosen)
    bias = settings.get('bias', 'none')
    if bias == 'all':
        found |= {n for n in everything if n.endswith('.bias')}
    elif bias.endswith('_only'):
        found |= _biases(contents, everything)
    elif bias != 'none':
        raise ValueError(f"bias is {bias!r}; expected 'none', 'all' or '*_only'")
    if settings['peft_type'] == 'LN_TUNING':
        found |= _norms(settings, contents, everything, config)
    return found


def _biases(contents: Contents, everything: Iterable[str]) -> set[str]:
    """Return the biases of the adapted modules; none where an older PEFT saved none of them."""
    own = {f'{module}.bias' for module in contents.modules} & set(everything)
    if own and not own & set(contents.leaves):
        _LOG.warning(
            'the biases of the adapted modules were trained, but the version of PEFT that wrote '
            "the folder did not save them; like PEFT, the backbone's own are used"
        )
        return set()
    return own


def _norms(
    settings: Mapping[str, Any],
    contents: Contents,
    everything: Iterable[str],
    config: BackboneConfig,
) -> set[str]:
    """Return the tensors of the LayerNorms that LN_TUNING tunes."""
    owners = sorted({name.rpartition('.')[0] for name in everything})
    chosen = names.targets(settings, owners, contents.prefix)
    others = [module for module in chosen if module not in modules.norms(config)]
    if others or not chosen:
        raise ValueError(
            f'LN_TUNING of {listed(others) or "nothing"}: expected target modules that are '
            'LayerNorms'
        )
    return {n for n in everything if n.rpartition('.')[0] in chosen}


def _everything(task_type: str | None, prefix: str, config: BackboneConfig) -> list[str]:
    """Return the backbone's tensors that the adapted model had."""
    pooler = heads.has_pooler(task_type, prefix, config)
    return [n for n in families.tensor_names(config) if pooler or not n.startswith(POOLER)]


def _is_inside(name: str, entry: str) -> bool:
    """Tell whether a tensor is in a module whose name ends so, as PEFT finds modules to store."""
    owners = name.split('.')[:-1]
    return any('.'.join(owners[: i + 1]).endswith(entry) for i in range(len(owners)))


def is_norm(name: str, config: BackboneConfig) -> bool:
    """Tell whether a tensor is that of a LayerNorm."""
    return name.rpartition('.')[0] in modules.norms(config)


def _norm_names(config: BackboneConfig) -> list[str]:
    """Return what a family's LayerNorms are called in what holds them."""
    return sorted({name.rpartition('.')[2] for name in modules.norms(config)})


def methods(
    leaves: Mapping[str, np.ndarray], config: BackboneConfig, backbone: Tree
) -> tuple[list[Method], dict[str, np.ndarray]]:
    """Return the methods that train these leaves, and all leaves that they train.

    What the methods train beyond the given leaves is the backbone's own.
    """
    norms = {path for path in leaves if path.split('/')[-2].endswith('norm')}
    if not any(path.endswith('/scale') for path in norms):
        norms = set()
    members: list[Method] = []
    if norms:
        members.append(LayerNormTuning(**_around(norms, config)))
    if biases := set(leaves) - norms:
        members.append(BitFit(**_around(biases, config)))
    rules = [rule for member in members for rule in member.rules(config.dimensions)]
    trained = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in params.flatten(backbone).items()
        if any(rule.matches(f'backbone/{path}') for rule in rules)
    }
    return members, trained | dict(leaves)


def _around(paths: Iterable[str], config: BackboneConfig) -> dict[str, Any]:
    """Return the options of a tuning method that cover these leaves; it cannot leave out all."""
    parts = {path.partition('/')[0] for path in paths}
    left_out = [i for i in range(config.depth) if f'layer_{i}' not in parts]
    if len(left_out) == config.depth:
        left_out = []
    around = bool(parts & {'embeddings', 'decoder_embeddings'})
    return {'leave_out': tuple(left_out), 'embedding_norm': around}


def write(
    kind: str,
    leaves: Mapping[str, Any],
    backbone: Tree,
    config: BackboneConfig,
    prefix: str,
    task_type: str | None,
) -> tuple[dict[str, Any], list[str], Tensors]:
    """Return how PEFT stores tuned leaves: settings, modules to store whole, and tensors.

    PEFT stores all biases or all LayerNorms; those that were not tuned are the backbone's own.

    Raises:
        ValueError: leaves that PEFT does not train beside an adapter of this type.
    """
    theirs = {path: name for name, (path, _) in families.tensor_names(config).items()}
    everything = _everything(task_type, prefix, config)
    left = {theirs[path] for path in leaves} & set(everything)
    current = params.flatten(backbone) | dict(leaves)
    if kind == 'LN_TUNING':
        return _write_norms(left, current, config)
    whole, names_ = [], set()
    for module in (POOLER, *_norm_names(config)):
        if any(_is_inside(n, module) and not n.endswith('.bias') for n in left):
            whole.append(module)
            names_ |= {n for n in everything if _is_inside(n, module)}
    left -= names_
    settings = {}
    if left and all(n.endswith('.bias') for n in left) and kind in ('LORA', 'ADALORA', 'VERA'):
        settings = {'bias': 'all'}
        names_ |= {n for n in everything if n.endswith('.bias')}
    elif left:
        raise ValueError(
            f'the adapter trains leaves of the backbone that PEFT does not train with {kind}: '
            f'{listed(sorted(left))}; write it with --format=merged'
        )
    return settings, whole, _tensors(names_, current, config)


def _write_norms(
    left: set[str], current: Mapping[str, Any], config: BackboneConfig
) -> tuple[dict[str, Any], list[str], Tensors]:
    others = sorted(n for n in left if not is_norm(n, config))
    if others:
        raise ValueError(
            f'the adapter trains more of the backbone than LayerNorms: {listed(others)}; write it '
            'with --format=merged'
        )
    chosen = sorted({name.rpartition('.')[0] for name in left})
    ends = sorted({module.rpartition('.')[2] for module in chosen})
    covered = [m for m in modules.norms(config) if m.rpartition('.')[2] in ends]
    own = {n for n in families.tensor_names(config) if n.rpartition('.')[0] in chosen}
    tensors = _tensors(own, current, config)
    settings = {'target_modules': ends if sorted(covered) == chosen else chosen}
    named = (name.rpartition('.') for name in tensors)
    found = {f'{m}.ln_tuning_layers.{x}': tensors[f'{m}.{x}'] for m, _, x in named}
    return settings, [], found


def _tensors(chosen: Iterable[str], current: Mapping[str, Any], config: BackboneConfig) -> Tensors:
    table = families.tensor_names(config)
    found = {}
    for name in sorted(chosen):
        path, transpose = table[name]
        leaf = np.asarray(current[path], np.float32)
        found[name] = leaf.T if transpose else leaf
    return found
