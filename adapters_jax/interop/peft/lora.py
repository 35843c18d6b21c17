"""LoRA and DoRA between PEFT's files and ours."""

import dataclasses
import math
from typing import Any

import numpy as np

from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.low_rank import Place
from adapters_jax.interop.peft import names
from adapters_jax.interop.peft.places import (
    Adapted,
    adapted_places,
    pattern,
    regular,
    tree_of,
    turned,
)
from adapters_jax.interop.peft.tensors import Tensors, expect_shapes
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree


def read_lora(adapted: Adapted) -> tuple[LoRA, Tree]:
    """Return the method and parameters of a LORA folder."""
    s, places = adapted.settings, adapted.places()
    ranks = {place: adapted.rank(module) for place, module in places.items()}
    alphas = {place: adapted.alpha(module) for place, module in places.items()}
    where = regular(places, adapted.config.dimensions)
    absent = {p: 0 for p in where.places if p not in places}
    method = (DoRA if s['use_dora'] else LoRA)(
        **where.options,
        r=s['r'],
        alpha=s['lora_alpha'],
        dropout=s['lora_dropout'],
        rank_stabilised=s['use_rslora'],
        rank_pattern=pattern(ranks | absent, s['r']),
        alpha_pattern=pattern(alphas | dict.fromkeys(absent, s['lora_alpha']), s['lora_alpha']),
    )
    leaves = {place: lora_leaves(adapted, module) for place, module in places.items()}
    return method, tree_of(leaves)


def lora_leaves(adapted: Adapted, module: str) -> Tree:
    """Return the factors of one projection, and DoRA's magnitude.

    Raises:
        ValueError: tensors that the settings do not describe.
    """
    (inputs, outputs), rank = adapted.sizes(module), adapted.rank(module)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f'the rank of {module} is {rank!r}; expected a whole number from 1')
    wanted = {'lora_A.weight': (rank, inputs), 'lora_B.weight': (outputs, rank)}
    if adapted.settings['use_dora']:
        wanted['lora_magnitude_vector'] = (outputs,)
    found = adapted.modules[module]
    expect_shapes(module, found, wanted)
    leaves = {'a': turned(found['lora_A.weight']), 'b': turned(found['lora_B.weight'])}
    if adapted.settings['use_dora']:
        leaves['magnitude'] = found['lora_magnitude_vector']
    return leaves


def write_lora(method: LoRA, tree: Tree, config: BackboneConfig) -> tuple[dict[str, Any], Tensors]:
    """Return the settings and tensors of a LoRA or DoRA.

    Raises:
        ValueError: an option that PEFT does not have.
    """
    dora = isinstance(method, DoRA)
    if dora and (method.scale_bias or not method.scale_norm):
        raise ValueError(
            f'dora: PEFT leaves the bias as it is and takes the norm with alpha / r; this adapter '
            f'has scale_bias={method.scale_bias}, scale_norm={method.scale_norm}; write it with '
            '--format=merged or --format=adapterhub'
        )
    places = adapted_places(tree)
    modules = {place: names.module_of(*place, config) for place in places}
    ranks = {modules[p]: method.rank(p.layer, f'{p.sub_layer}/{p.name}') for p in places}
    alphas = {modules[p]: _alpha(method, p) for p in places}
    tensors = {}
    for place, leaves in places.items():
        tensors[f'{modules[place]}.lora_A.weight'] = turned(leaves['a'])
        tensors[f'{modules[place]}.lora_B.weight'] = turned(leaves['b'])
        if dora:
            tensors[f'{modules[place]}.lora_magnitude_vector'] = np.asarray(leaves['magnitude'])
    settings = {
        'alpha_pattern': {m: alpha for m, alpha in alphas.items() if alpha != method.alpha},
        'lora_alpha': method.alpha,
        'lora_dropout': method.dropout,
        'r': method.r,
        'rank_pattern': {m: rank for m, rank in ranks.items() if rank != method.r},
        'target_modules': names.shortest(list(modules.values()), config),
        'use_dora': dora,
        'use_rslora': method.rank_stabilised,
    }
    return settings, tensors


def _alpha(method: LoRA, place: Place) -> float:
    where = (place.layer, f'{place.sub_layer}/{place.name}')
    plain = dataclasses.replace(method, rank_stabilised=False)
    alpha = plain.scaling(*where) * method.rank(*where)
    return method.alpha if math.isclose(alpha, method.alpha) else alpha
