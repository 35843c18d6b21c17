"""VeRA and (IA)³, which train vectors only, between PEFT's files and ours."""

from typing import Any

import numpy as np

from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.vera import VeRA
from adapters_jax.interop.peft import names
from adapters_jax.interop.peft.places import (
    Adapted,
    adapted_places,
    check_regular,
    exactly,
    left_out,
    tree_of,
    turned,
)
from adapters_jax.interop.peft.tensors import Tensors, expect_shapes
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree


def read_vera(adapted: Adapted) -> tuple[VeRA, Tree]:
    """Return the method and parameters of a VERA folder, its random matrices included.

    Raises:
        ValueError: the folder leaves the matrices to torch's random generator.
    """
    s, places = adapted.settings, adapted.places()
    if not s['save_projection']:
        raise ValueError(
            'the folder has save_projection=False: its random matrices are those that torch draws '
            'from projection_prng_key, which this project cannot; save it with PEFT and '
            'save_projection=True'
        )
    method = VeRA(
        **exactly(places, adapted.config.dimensions, 'VERA').options,
        r=s['r'],
        dropout=s['vera_dropout'],
        d_initial=s['d_initial'],
        projection_seed=s['projection_prng_key'],
        save_projection=True,
    )
    sizes = [adapted.sizes(module) for module in adapted.modules]
    inputs, outputs = (max(widths) for widths in zip(*sizes, strict=True))
    expect_shapes(
        'base_model', adapted.whole, {'vera_A': (s['r'], inputs), 'vera_B': (outputs, s['r'])}
    )
    constants = {'a': turned(adapted.whole['vera_A']), 'b': turned(adapted.whole['vera_B'])}
    tree = tree_of({place: vera_leaves(adapted, module) for place, module in places.items()})
    return method, tree | {'constants': constants}


def vera_leaves(adapted: Adapted, module: str) -> Tree:
    """Return the two vectors of one projection."""
    outputs, found = adapted.sizes(module)[1], adapted.modules[module]
    wanted = {'vera_lambda_d': (adapted.settings['r'],), 'vera_lambda_b': (outputs,)}
    expect_shapes(module, found, wanted)
    return {'d': found['vera_lambda_d'], 'b': found['vera_lambda_b']}


def read_ia3(adapted: Adapted) -> tuple[IA3, Tree]:
    """Return the method and parameters of an IA3 folder.

    Raises:
        ValueError: projections that differ between layers.
    """
    places = adapted.places()
    leaves = {place: ia3_leaves(adapted, module) for place, module in places.items()}
    scaled: dict[str, list[str]] = {'scale': [], 'input_scale': []}
    for place, tree in leaves.items():
        for leaf in tree:
            scaled[leaf] += [place.name] if place.name not in scaled[leaf] else []
    method = IA3(
        scale_outputs=tuple(scaled['scale']),
        scale_inputs=tuple(scaled['input_scale']),
        leave_out=left_out(places, adapted.config.dimensions),
    )
    check_regular(method.places(adapted.config.dimensions), places, 'IA3')
    return method, tree_of(leaves)


def ia3_leaves(adapted: Adapted, module: str) -> Tree:
    """Return the scales of one projection's outputs or, in a feed-forward module, of its inputs."""
    inputs, outputs = adapted.sizes(module)
    at_input = names.is_feed_forward(adapted.settings, adapted.prefix + module)
    wanted = (1, inputs) if at_input else (outputs, 1)
    found = adapted.modules[module]
    expect_shapes(module, found, {'ia3_l': wanted})
    return {'input_scale' if at_input else 'scale': found['ia3_l'].reshape(-1)}


def write_vera(method: VeRA, tree: Tree, config: BackboneConfig) -> tuple[dict[str, Any], Tensors]:
    """Return the settings and tensors of a VeRA, with its random matrices.

    Raises:
        ValueError: matrices that are neither in the tree nor those of the seed.
    """
    places = adapted_places(tree)
    modules = {place: names.module_of(*place, config) for place in places}
    constants = tree.get('constants') or method.constants(config.dimensions).get('constants')
    if not constants:
        raise ValueError('vera: the shared random matrices are missing, and no seed gives them')
    tensors = {
        'vera_A': turned(constants['a']),
        'vera_B': turned(constants['b']),
    }
    for place, leaves in places.items():
        tensors[f'{modules[place]}.vera_lambda_d'] = np.asarray(leaves['d'])
        tensors[f'{modules[place]}.vera_lambda_b'] = np.asarray(leaves['b'])
    settings = {
        'd_initial': method.d_initial,
        'projection_prng_key': method.projection_seed,
        'r': method.r,
        'target_modules': names.shortest(list(modules.values()), config),
        'vera_dropout': method.dropout,
    }
    return settings, tensors


def write_ia3(method: IA3, tree: Tree, config: BackboneConfig) -> tuple[dict[str, Any], Tensors]:
    """Return the settings and tensors of an (IA)³.

    Raises:
        ValueError: a projection scaled on both sides, which PEFT does not have.
    """
    feed_forward, tensors, modules = [], {}, []
    for place, leaves in adapted_places(tree).items():
        module = names.module_of(*place, config)
        modules.append(module)
        if len(leaves) != 1:
            raise ValueError(
                f'ia3: {place.path} is scaled at its input and at its output; PEFT does one of the '
                'two; write it with --format=merged'
            )
        if 'input_scale' in leaves:
            feed_forward.append(module)
            tensors[f'{module}.ia3_l'] = np.asarray(leaves['input_scale']).reshape(1, -1)
        else:
            tensors[f'{module}.ia3_l'] = np.asarray(leaves['scale']).reshape(-1, 1)
    chosen, inputs = names.shortest_pair(modules, feed_forward, config)
    return {'feedforward_modules': inputs, 'target_modules': chosen}, tensors
