"""LoRA and DoRA: trained low-rank changes of the backbone's projections.

LoRA (Hu et al. 2022) adds `(alpha / r) · x a b` to `x W`; DoRA (Liu et al. 2024) does so to the
direction of `W` only and trains its magnitudes apart. The options have the names and the defaults
they have in the `adapters` library; those of `peft` that go beyond them (a rank and an alpha for
each projection, `alpha / sqrt(r)`) are here as well, so that the files of both fit exactly.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
from jaxtyping import PRNGKeyArray

from adapters_jax.adapters import parts
from adapters_jax.adapters.low_rank import Factors, LowRank, Place, WeightDecomposed
from adapters_jax.adapters.method import At, Method
from adapters_jax.params import Tree
from adapters_jax.sites import PROJECTIONS, Dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """Low-rank adaptation (Hu et al. 2022, eq. 3).

    The keys of `rank_pattern` and `alpha_pattern` name a layer, a projection or both, and the first
    of them that is there counts: '3/attention/query', '3/query', '3', 'attention/query', 'query';
    `r` and `alpha` hold for the rest. A rank of 0 leaves a projection as it is. A gate multiplies
    the change after `alpha / r`.
    """

    architecture: ClassVar[str] = 'lora'

    alpha: float = 8.0
    rank_stabilised: bool = False  # alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    init_weights: Literal['lora', 'bert'] = 'lora'  # of a and b: see _FACTORS

    def __post_init__(self) -> None:
        """Refuse values out of range and pattern keys that are none."""
        super().__post_init__()
        self.require(self.alpha > 0, f'alpha={self.alpha} is not above 0')
        for key, rank in self.rank_pattern.items():
            self.require(rank >= 0, f'rank_pattern has {key!r}: {rank}; expected 0 or more')
        for key, alpha in self.alpha_pattern.items():
            self.require(
                alpha > 0, f'alpha_pattern has {key!r}: {alpha}; expected a number above 0'
            )
        for option in ('rank_pattern', 'alpha_pattern'):
            for key in getattr(self, option):
                self.require(
                    _is_key(key),
                    f"{option} has the key {key!r}; expected a layer's number, a projection "
                    "('query') or both ('3/query', 'attention/query', '3/attention/query')",
                )

    def places(self, dimensions: Dimensions) -> list[Place]:
        """Return the projections that the options choose.

        Raises:
            ValueError: the backbone has none of them, a pattern names others, or all have rank 0.
        """
        chosen = super().places(dimensions)
        named = {key for p in chosen for key in _keys(p.layer, f'{p.sub_layer}/{p.name}')}
        for option in ('rank_pattern', 'alpha_pattern'):
            for key in getattr(self, option):
                self.require(
                    key in named,
                    f'{option} names {key!r}, but no adapted projection is called so; adapt it or '
                    'remove the key',
                )
        self.require(
            any(self.rank(p.layer, f'{p.sub_layer}/{p.name}') for p in chosen),
            f'rank_pattern={dict(self.rank_pattern)} gives every adapted projection the rank 0, '
            'which adapts nothing; give one of them a higher rank',
        )
        return chosen

    def rank(self, layer: int, place: str) -> int:
        """Return R at `place`, a path like 'attention/query'; 0 where there is no adapter."""
        return _find(self.rank_pattern, layer, place, self.r)

    def scaling(self, layer: int, place: str) -> float:
        """Return what the product of the factors is multiplied by, `alpha / r`."""
        rank = self.rank(layer, place)
        alpha = _find(self.alpha_pattern, layer, place, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def fits(self, other: Method) -> bool:
        """Tell whether the two differ in rank and scale only, and this has no higher rank."""
        if type(self) is not type(other):
            return False
        alike = dataclasses.replace(
            self, r=other.r, alpha=other.alpha, init_weights_seed=other.init_weights_seed
        )
        scaled = getattr(self, 'scale_norm', True) or self == other
        return alike == other and self.r <= other.r and scaled

    def padding(self, path: str, shape: tuple[int, ...], other: Method) -> dict[int, int]:
        """Return the higher rank, at the axis that has it."""
        axes = {'/a': 1, '/b': 0}
        axis = next((axes[end] for end in axes if path.endswith(end)), None)
        layer, place = _place_of(path)
        return {} if axis is None else {axis: other.rank(layer, place)}

    def rescale(self, path: str, other: Method) -> float:
        """Return the ratio of the scales, for the second factor."""
        layer, place = _place_of(path)
        return (
            self.scaling(layer, place) / other.scaling(layer, place) if path[-2:] == '/b' else 1.0
        )

    def draw(self, key: PRNGKeyArray, inputs: int, outputs: int, rank: int) -> Tree:
        """Return fresh factors."""
        a, b = _FACTORS[self.init_weights]
        keys = jax.random.split(key)
        return {'a': a(keys[0], (inputs, rank)), 'b': b(keys[1], (rank, outputs))}

    def factors(self, params: Tree, inputs: int, at: At) -> Factors:
        """Return both factors, the second one scaled: R x O numbers instead of B x T x O."""
        return params['a'], params['b'] * self.scaling(at.layer, at.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(WeightDecomposed, LoRA):
    """LoRA on the direction of each kernel, and its magnitudes trained (Liu et al. 2024, eq. 5).

    The defaults are the paper's, and `peft`'s. `adapters` multiplies the bias by the ratio too
    (`scale_bias`), takes the norm without `alpha / r` (not `scale_norm`) and differentiates through
    it (not `detach_norm`).
    """

    architecture: ClassVar[str] = 'dora'

    scale_norm: bool = True  # the norm is that of W + (alpha / r) a b, or of W + a b

    def norm_factors(self, params: Tree, inputs: int, at: At) -> Factors:
        """Return the factors of the change whose norm is taken."""
        return self.factors(params, inputs, at) if self.scale_norm else (params['a'], params['b'])


# What init_weights names: the initialisers of a and of b. 'lora' is that of the authors' code, not
# the paper's N(0, sigma²) for a; both libraries have it so.
_FACTORS: dict[str, tuple[parts.KernelInit, parts.KernelInit]] = {
    'lora': (parts.uniform_by_inputs, parts.zeros),
    'bert': (parts.normal(0.02), parts.normal(0.02)),
}


def _place_of(path: str) -> tuple[int, str]:
    layer, sub_layer, name, *_ = path.split('/')
    return int(layer.removeprefix('layer_')), f'{sub_layer}/{name}'


def _keys(layer: int, place: str) -> tuple[str, ...]:
    """Return the pattern keys that cover a projection, the most specific one first."""
    name = place.rpartition('/')[-1]
    return f'{layer}/{place}', f'{layer}/{name}', f'{layer}', place, name


def _find(pattern: Mapping[str, float], layer: int, place: str, default: float) -> float:
    return next((pattern[key] for key in _keys(layer, place) if key in pattern), default)


def _is_key(key: str) -> bool:
    """Tell whether a pattern key is of the form [layer/][[sub_layer/]projection]."""
    layer, _, rest = key.partition('/') if re.match(r'[0-9]', key) else ('0', '', key)
    places = {f'{sub}/{name}' for sub, names in PROJECTIONS.items() for name in names}
    known = places | {name for names in PROJECTIONS.values() for name in names}
    return re.fullmatch(r'0|[1-9][0-9]*', layer) is not None and (rest in known or key == layer)
