"""What the low-rank methods share: where they sit, how they change a projection, how they merge.

Each adds `x @ down @ up` to the output of a frozen projection. The methods differ in what the two
factors are made of: trained matrices (LoRA), or frozen ones scaled by trained vectors (VeRA). With
the backbone's kernel split into magnitude and direction (DoRA), any of them changes the direction.
"""

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import functional, params, products
from adapters_jax.adapters import parts
from adapters_jax.adapters.bottleneck import gate
from adapters_jax.adapters.method import At, Method, adapted_layers
from adapters_jax.params import Tree
from adapters_jax.quantize import dequantize
from adapters_jax.sites import PROJECTIONS, SUB_LAYERS, Dimensions, Linear

Factors = tuple[Float[Array, 'I R'], Float[Array, 'R O']]

_ATTENTION = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'output'}


class Place(NamedTuple):
    """A projection of a backbone."""

    layer: int
    sub_layer: str
    name: str

    @property
    def path(self) -> str:
        """Where its parameters are."""
        return f'layer_{self.layer}/{self.sub_layer}/{self.name}'

    def sizes(self, dimensions: Dimensions) -> tuple[int, int]:
        """Return I and O, the widths of its input and its output."""
        d = dimensions
        if self.sub_layer == 'feed_forward':
            inward, outward = (d.hidden, d.feed_forward), (d.feed_forward, d.hidden)
            return outward if self.name == 'down' else inward
        return (d.inner, d.hidden) if self.name == 'output' else (d.hidden, d.inner)

    def key(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """Return the random key that belongs to it."""
        number = PROJECTIONS[self.sub_layer].index(self.name)
        return functional.fold(key, self.layer, SUB_LAYERS.index(self.sub_layer), number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Method, abc.ABC):
    """The base of the low-rank methods; the options have the names of the `adapters` library."""

    r: int = 8
    attn_matrices: tuple[Literal['q', 'k', 'v', 'o'], ...] = ('q', 'v')
    selfattn_lora: bool = True  # `attn_matrices` of self-attention
    crossattn_lora: bool = True  # and of cross-attention, where the backbone has it
    intermediate_lora: bool = False  # the feed-forward network's first projection
    output_lora: bool = False  # and its second
    gate_lora: bool = False  # and its gate, where it has one
    dropout: float = 0.0  # of the input, on the low-rank path only
    use_gating: bool = False  # scale by a learned gate in (0, 1), one per example
    leave_out: tuple[int, ...] = ()
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range and a method that sits nowhere."""
        super().__post_init__()
        self.require(self.r >= 1, f'r={self.r} is not at least 1')
        self.require(0 <= self.dropout < 1, f'dropout={self.dropout} is not in [0, 1)')
        attention = self.attn_matrices and (self.selfattn_lora or self.crossattn_lora)
        self.require(
            bool(attention or self.intermediate_lora or self.output_lora or self.gate_lora),
            'no projection is adapted; name some in attn_matrices with selfattn_lora or '
            'crossattn_lora, or set intermediate_lora, output_lora or gate_lora to True',
        )

    def places(self, dimensions: Dimensions) -> list[Place]:
        """Return the projections that the options choose, in order.

        Raises:
            ValueError: the backbone, or what `leave_out` leaves of it, has none of them.
        """
        attention = tuple(
            name for letter, name in _ATTENTION.items() if letter in self.attn_matrices
        )
        crossing = self.crossattn_lora and dimensions.decoder_layers > 0
        chosen = {
            'attention': attention if self.selfattn_lora else (),
            'cross_attention': attention if crossing else (),
            'feed_forward': ('up',) * self.intermediate_lora
            + ('down',) * self.output_lora
            + ('gate',) * (self.gate_lora and dimensions.gated),
        }
        self.require(
            any(chosen.values()),
            'only cross-attention or a gate is adapted, but the backbone has none; set '
            'selfattn_lora=True',
        )
        found = [
            Place(layer, sub_layer, name)
            for layer in adapted_layers(self.leave_out, dimensions)
            for sub_layer, names in chosen.items()
            if sub_layer in dimensions.projections(layer)
            for name in names
        ]
        self.require(
            bool(found),
            f'leave_out={list(self.leave_out)} keeps no layer that has cross-attention, and no '
            'other place is adapted; keep a layer of the decoder or set selfattn_lora=True',
        )
        return found

    def rank(self, layer: int, place: str) -> int:
        """Return R at `place`, a path like 'attention/query'; 0 where there is no adapter."""
        return self.r

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters; equal seeds give equal ones whatever the key."""
        if self.init_weights_seed is not None:
            key = jax.random.key(self.init_weights_seed)
        leaves = {}
        for place in self.places(dimensions):
            rank = self.rank(place.layer, f'{place.sub_layer}/{place.name}')
            if rank:
                tree = self._init_one(place.key(key), *place.sizes(dimensions), rank)
                leaves |= params.flatten(tree, place.path + '/')
        return params.unflatten(leaves)

    def _init_one(self, key: PRNGKeyArray, inputs: int, outputs: int, rank: int) -> Tree:
        keys = jax.random.split(key)
        tree = self.draw(keys[0], inputs, outputs, rank)
        if self.use_gating:
            tree['gate'] = parts.dense(keys[1], parts.normal(0.02), inputs, 1)
        return tree

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, inputs: int, outputs: int, rank: int) -> Tree:
        """Return what the factors of one fresh projection are made of."""

    @abc.abstractmethod
    def factors(self, params: Tree, inputs: int, at: At) -> Factors:
        """Return the two factors of the change of a kernel `[inputs, O]`, all scales included.

        Only operators are used, so that it computes in the type of the arrays, numpy's float64
        among them.
        """

    def linear(self, params: Tree, end: Linear, at: At) -> Float[Array, 'B T O']:
        """Add the low-rank change to the projection's output."""
        return end.output + self.change(params, end, at)

    def change(self, params: Tree, end: Linear, at: At) -> Float[Array, 'B T O']:
        """Return the input passed through both factors, and the gate."""
        x = functional.dropout(end.inputs, self.dropout, functional.fold(at.key, 0))
        down, up = self.factors(params, x.shape[-1], at)
        low = products.trained_product(x, down.astype(x.dtype))
        change = products.trained_product(low, up.astype(x.dtype))
        return change * gate(params['gate'], end.inputs, end.mask) if self.use_gating else change

    def merge_linear(self, params, kernel, bias, at):
        """Add the product of the factors to the kernel, in float64.

        Raises:
            ValueError: the method is gated.
        """
        self.require(
            not self.use_gating,
            'it has use_gating=True and cannot be merged into the backbone: a gate depends on the '
            'text; keep the adapter beside the backbone',
        )
        params, kernel, at = widen(params), widen(kernel), at.replace(constants=widen(at.constants))
        return self.merge_wide(params, kernel, None if bias is None else widen(bias), at)

    def merge_wide(self, params, kernel, bias, at):
        """Do what `merge_linear` does on arrays in float64."""
        down, up = self.factors(params, len(kernel), at)
        return kernel + down @ up, bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightDecomposed(LowRank):
    """Magnitude and direction of a kernel apart (Liu et al. 2024, eq. 5).

    `W' = magnitude · (W + ΔW) / ‖W + ΔW‖`, the norm over each column, that is for each output. The
    low-rank method that is mixed in gives `ΔW`.
    """

    scale_bias: bool = False  # multiply the backbone's bias by magnitude / norm, too
    detach_norm: bool = True  # no gradient through the norm (section 4.3)

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters; the magnitudes are those of the backbone's kernels."""
        tree = super().init(key, dimensions, backbone)
        kernels = params.flatten(backbone)
        leaves = params.flatten(tree)
        for place in self.places(dimensions):
            if any(path.startswith(place.path + '/') for path in leaves):
                path = f'{place.path}/kernel'
                self.require(
                    path in kernels,
                    f'its magnitudes start from the backbone, whose weights lack {path}; give the '
                    'whole backbone to init',
                )
                leaves[f'{place.path}/magnitude'] = column_norms(widest(kernels[path]))
        return params.unflatten(leaves)

    def norm_factors(self, params: Tree, inputs: int, at: At) -> Factors:
        """Return the factors of the change whose norm is taken."""
        return self.factors(params, inputs, at)

    def linear(self, params: Tree, end: Linear, at: At) -> Float[Array, 'B T O']:
        """Change the direction of the projection and give it the trained magnitudes.

        Written as a sum with the plain output, so that a ratio of 1 leaves it untouched.
        """
        down, up = self.norm_factors(params, end.inputs.shape[-1], at)
        moved = widest(dequantize(end.kernel)) + jnp.matmul(
            widest(down), widest(up), precision='highest'
        )
        norms = column_norms(moved)
        norms = jax.lax.stop_gradient(norms) if self.detach_norm else norms
        ratio = (params['magnitude'] / norms).reshape(1, 1, -1)
        y, change = end.output, self.change(params, end, at)
        plain = y if self.scale_bias or end.bias is None else y - _row(end.bias, y.dtype)
        return y + ((ratio - 1).astype(y.dtype) * plain + ratio.astype(y.dtype) * change)

    def merge_wide(self, params, kernel, bias, at):
        """Return the changed kernel with the trained magnitudes."""
        down, up = self.norm_factors(params, len(kernel), at)
        ratio = params['magnitude'] / column_norms(kernel + down @ up)
        kernel, bias = super().merge_wide(params, kernel, bias, at)
        scaled = bias is not None and self.scale_bias
        return kernel * ratio.reshape(1, -1), bias * ratio if scaled else bias


def column_norms(kernel: Float[Array, 'I O']) -> Float[Array, 'O']:
    """Return the Euclidean norm of each column; a column of zeros has a tiny one, not zero."""
    return ((kernel * kernel).sum(0) + 1e-30) ** 0.5


def widest(x: Float[Array, '...']) -> Float[Array, '...']:
    """Return the array in float32, in which norms are computed."""
    return x.astype(jnp.float32)


def widen(tree: Any) -> Any:
    """Return the arrays in numpy's float64, in which weights are merged."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def _row(bias: Float[Array, 'O'], dtype: Any) -> Float[Array, '1 1 O']:
    return bias.astype(dtype).reshape(1, 1, -1)
