"""AdaLoRA between PEFT's files and ours.

A projection keeps only the triplets that its budget left it: PEFT says which ones by a list of
true and false for each, we by their number.
"""

from typing import Any

import numpy as np

from adapters_jax.adapters.adalora import AdaLoRA
from adapters_jax.adapters.low_rank import Place
from adapters_jax.interop.peft import names
from adapters_jax.interop.peft.places import (
    Adapted,
    adapted_places,
    regular,
    tree_of,
    turned,
)
from adapters_jax.interop.peft.tensors import Tensors, expect_shapes
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

_SCHEDULE = {  # our option by PEFT's setting
    'beta1': 'beta1',
    'beta2': 'beta2',
    'deltaT': 'delta_t',
    'orth_reg_weight': 'orth_reg',
    'tfinal': 'tfinal',
    'tinit': 'tinit',
}


def read_adalora(adapted: Adapted) -> tuple[AdaLoRA, Tree]:
    """Return the method and parameters of an ADALORA folder."""
    s, places = adapted.settings, adapted.places()
    where = regular(places, adapted.config.dimensions)
    ranks = {p: _kept(adapted, places[p]) if p in places else 0 for p in where.places}
    method = AdaLoRA(
        **where.options,
        r=s['init_r'],
        target_r=min(s['target_r'], s['init_r']),
        alpha=s['lora_alpha'],
        dropout=s['lora_dropout'],
        rank_pattern={
            f'{p.layer}/{p.sub_layer}/{p.name}': r for p, r in ranks.items() if r != s['init_r']
        },
        **{ours: s[theirs] for theirs, ours in _SCHEDULE.items()},
    )
    leaves = {place: adalora_leaves(adapted, module) for place, module in places.items()}
    return method, tree_of({place: tree for place, tree in leaves.items() if ranks[place]})


def _kept(adapted: Adapted, module: str) -> int:
    """Return how many triplets a projection has.

    Raises:
        ValueError: an entry of rank_pattern that is no list of true and false.
    """
    name = f'{adapted.prefix}{module}.lora_E'
    for key, kept in (adapted.settings['rank_pattern'] or {}).items():
        if key.removesuffix('.default') == name:
            if not isinstance(kept, tuple):
                raise ValueError(
                    f'rank_pattern has {key}={kept}; expected a list of true and false'
                )
            return sum(kept)
    return adapted.settings['init_r']


def adalora_leaves(adapted: Adapted, module: str) -> Tree:
    """Return the triplets of one projection."""
    (inputs, outputs), rank = adapted.sizes(module), _kept(adapted, module)
    found = adapted.modules[module]
    wanted = {'lora_A': (rank, inputs), 'lora_B': (outputs, rank), 'lora_E': (rank, 1)}
    expect_shapes(module, found, wanted)
    return {
        'a': turned(found['lora_A']),
        'e': found['lora_E'].reshape(-1),
        'b': turned(found['lora_B']),
    }


def write_adalora(
    method: AdaLoRA, tree: Tree, config: BackboneConfig, prefix: str
) -> tuple[dict[str, Any], Tensors]:
    """Return the settings and tensors of an AdaLoRA.

    PEFT wants to know the number of training steps; no file of ours does, so it is told the least
    that fits the schedule.
    """
    own, tensors, kept = adapted_places(tree), {}, {}
    modules = {place: names.module_of(*place, config) for place in method.places(config.dimensions)}
    for place, module in modules.items():
        inputs, outputs = Place(*place).sizes(config.dimensions)
        empty = {'a': np.zeros((inputs, 0)), 'e': np.zeros(0), 'b': np.zeros((0, outputs))}
        leaves = own.get(place, empty)
        rank = len(leaves['e'])
        tensors[f'{module}.lora_A'] = turned(leaves['a'])
        tensors[f'{module}.lora_B'] = turned(leaves['b'])
        tensors[f'{module}.lora_E'] = np.asarray(leaves['e']).reshape(-1, 1)
        if rank != method.r:
            kept[f'{prefix}{module}.lora_E'] = [i < rank for i in range(method.r)]
    settings = {theirs: getattr(method, ours) for theirs, ours in _SCHEDULE.items()}
    settings |= {
        'init_r': method.r,
        'lora_alpha': method.alpha,
        'lora_dropout': method.dropout,
        'rank_pattern': kept or None,
        'target_modules': names.shortest(list(modules.values()), config),
        'target_r': method.target_r,
        'total_step': method.tinit + method.tfinal + 1,
    }
    return settings, tensors
