"""Where a low-rank method sits, as PEFT's names and as our options.

PEFT may adapt any set of projections and give each a rank and an alpha of its own. Our methods take
the same projections in each adapted layer; LoRA has patterns for the rest, in which a projection
that is left out has rank 0.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from adapters_jax import params
from adapters_jax.adapters.lora import LoRA
from adapters_jax.adapters.low_rank import Place
from adapters_jax.adapters.method import Method
from adapters_jax.interop import modules
from adapters_jax.interop.peft import names
from adapters_jax.interop.peft.tensors import Tensors
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree
from adapters_jax.sites import Dimensions

_LETTERS = {'query': 'q', 'key': 'k', 'value': 'v', 'output': 'o'}


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What a folder adapts: the settings, and the tensors of each projection."""

    settings: Mapping[str, Any]
    prefix: str
    modules: Mapping[str, Tensors]  # by torch name without prefix
    whole: Tensors
    config: BackboneConfig

    def places(self) -> dict[Place, str]:
        """Return the torch name of each adapted projection of the blocks, in their order."""
        found = modules.projections(self.config)
        chosen = {Place(*names.place(found[m])): m for m in self.modules if m != names.POOLER}
        return dict(sorted(chosen.items()))

    def sizes(self, module: str) -> tuple[int, int]:
        """Return the widths of a projection's input and output."""
        if module == names.POOLER:
            return self.config.block.hidden, self.config.block.hidden
        path = modules.projections(self.config)[module]
        return Place(*names.place(path)).sizes(self.config.dimensions)

    def rank(self, module: str) -> int:
        """Return the rank that the settings give a projection."""
        pattern = self.settings['rank_pattern']
        return names.of_pattern(pattern, self.prefix + module, self.settings['r'])

    def alpha(self, module: str) -> float:
        """Return the alpha that the settings give a projection."""
        pattern = self.settings['alpha_pattern']
        return names.of_pattern(pattern, self.prefix + module, self.settings['lora_alpha'])


@dataclasses.dataclass(frozen=True)
class Where:
    """The options of a low-rank method that choose projections, and the ones that they choose."""

    options: dict[str, Any]
    places: list[Place]


def regular(places: Iterable[Place], dimensions: Dimensions) -> Where:
    """Return the smallest choice of the options that has these projections in it."""
    chosen = {place.name for place in places}
    kinds = {place.sub_layer for place in places}
    options = {
        'attn_matrices': tuple(letter for name, letter in _LETTERS.items() if name in chosen),
        'selfattn_lora': 'attention' in kinds,
        'crossattn_lora': 'cross_attention' in kinds or dimensions.decoder_layers == 0,
        'intermediate_lora': 'up' in chosen,
        'output_lora': 'down' in chosen,
        'gate_lora': 'gate' in chosen,
        'leave_out': left_out(places, dimensions),
    }
    return Where(options, LoRA(**options).places(dimensions))


def exactly(places: Iterable[Place], dimensions: Dimensions, kind: str) -> Where:
    """Return the choice that has these projections and no others.

    Raises:
        ValueError: there is none.
    """
    where = regular(places, dimensions)
    check_regular(where.places, places, kind)
    return where


def check_regular(found: Iterable[Place], wanted: Iterable[Place], kind: str) -> None:
    """Refuse a choice that has more than the wanted projections.

    Raises:
        ValueError: the first that is too much.
    """
    missing = sorted(set(found) - set(wanted))
    if missing:
        raise ValueError(
            f'the folder adapts other projections in other layers ({missing[0].path} is not '
            f'adapted); with {kind} this project takes the same ones in each adapted layer'
        )


def left_out(places: Iterable[Place], dimensions: Dimensions) -> tuple[int, ...]:
    """Return the layers without any of the projections."""
    return tuple(sorted(set(range(dimensions.layers)) - {place.layer for place in places}))


def pattern(values: Mapping[Place, float], default: float) -> dict[str, float]:
    """Return the shortest pattern that gives each projection its value."""
    found: dict[str, float] = {}
    for name in sorted({place.name for place in values}):
        own = {place: value for place, value in values.items() if place.name == name}
        if set(own.values()) == {default}:
            continue
        if len(set(own.values())) == 1:
            found[name] = next(iter(own.values()))
            continue
        several = len({place.sub_layer for place in own}) > 1
        for place, value in own.items():
            where = f'{place.sub_layer}/{name}' if several else name
            found |= {f'{place.layer}/{where}': value} if value != default else {}
    return found


def tree_of(leaves: Mapping[Place, Tree]) -> Tree:
    """Return the tree with the leaves of each place."""
    return params.unflatten(
        {path: x for place, tree in leaves.items() for path, x in _flat(place, tree)}
    )


def _flat(place: Place, tree: Tree) -> Iterable[tuple[str, Any]]:
    return params.flatten(tree, f'{place.path}/').items()


def turned(tensor: Any) -> np.ndarray:
    """Return the transpose: torch keeps matrices as [out, in]."""
    return np.ascontiguousarray(np.asarray(tensor).T)


def adapted_places(tree: Tree) -> dict[Place, Tree]:
    """Return the parameters of each adapted projection."""
    return {
        Place(int(layer.removeprefix('layer_')), sub_layer, name): leaves
        for layer, sub_layers in sorted(tree.items())
        if layer.startswith('layer_')
        for sub_layer, projections in sub_layers.items()
        for name, leaves in projections.items()
    }


def refuse_gates(method: Method) -> None:
    """Refuse a gated method."""
    if getattr(method, 'use_gating', False):
        raise ValueError(
            f'{method.architecture} has use_gating=True, which PEFT does not have; write it with '
            '--format=adapterhub'
        )
