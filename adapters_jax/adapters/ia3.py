"""(IA)³: trained vectors that scale the inputs or outputs of the backbone's projections.

Liu et al. (2022) scale keys, values and what the feed-forward network has between its projections.
Libraries differ in the last of these: the paper and `peft` scale the input of the second
projection, `adapters` the output of the first, before the activation.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import functional, params
from adapters_jax.adapters import parts
from adapters_jax.adapters.bottleneck import gate
from adapters_jax.adapters.low_rank import Place, widen
from adapters_jax.adapters.method import At, Method, adapted_layers
from adapters_jax.params import Tree
from adapters_jax.sites import Dimensions, Linear

_Names = tuple[Literal['query', 'key', 'value', 'output', 'up', 'down'], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, sec. 3.3).

    The names are those of projections, 'output' that of attention. The defaults are the paper's;
    `adapters` has scale_outputs=('key', 'value', 'up') and scale_inputs=(), `peft` finds
    scale_inputs=('output', 'down') in a BERT.
    """

    architecture: ClassVar[str] = 'ia3'

    scale_outputs: _Names = ('key', 'value')
    scale_inputs: _Names = ('down',)
    self_attention: bool = True
    cross_attention: bool = True  # where the backbone has it
    use_gating: bool = False  # multiply the scales by a learned gate in (0, 1), one per example
    leave_out: tuple[int, ...] = ()
    init_weights_seed: int | None = None  # of the gates; the scales are 1

    def __post_init__(self) -> None:
        """Refuse a method that scales nothing."""
        super().__post_init__()
        self.require(
            bool(self.scale_outputs or self.scale_inputs),
            "scale_outputs and scale_inputs are both empty; name a projection, such as 'key'",
        )

    def places(self, dimensions: Dimensions) -> list[Place]:
        """Return the projections whose input or output is scaled, in order.

        Raises:
            ValueError: the backbone has none of them.
        """
        present = {
            'attention': self.self_attention,
            'cross_attention': self.cross_attention,
            'feed_forward': True,
        }
        chosen = {*self.scale_outputs, *self.scale_inputs}
        found = [
            Place(layer, sub_layer, name)
            for layer in adapted_layers(self.leave_out, dimensions)
            for sub_layer, names in dimensions.projections(layer).items()
            for name in names
            if present[sub_layer] and name in chosen
        ]
        absent = sorted(chosen - {place.name for place in found})
        self.require(
            not absent,
            f'{", ".join(absent)} of self_attention={self.self_attention}, cross_attention='
            f'{self.cross_attention}: the backbone has no such projection; set self_attention=True '
            'or take the name out of scale_outputs and scale_inputs',
        )
        return found

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return scales of 1."""
        if self.init_weights_seed is not None:
            key = jax.random.key(self.init_weights_seed)
        leaves = {}
        for place in self.places(dimensions):
            inputs, outputs = place.sizes(dimensions)
            tree: Tree = {}
            if place.name in self.scale_outputs:
                tree['scale'] = jnp.ones(outputs)
            if place.name in self.scale_inputs:
                tree['input_scale'] = jnp.ones(inputs)
            if self.use_gating:
                tree['gate'] = parts.dense(place.key(key), parts.normal(0.02), inputs, 1)
            leaves |= params.flatten(tree, place.path + '/')
        return params.unflatten(leaves)

    def linear(self, params: Tree, end: Linear, at: At) -> Float[Array, 'B T O']:
        """Scale the input or the output of a projection, or both."""
        opened = gate(params['gate'], end.inputs, end.mask) if self.use_gating else 1
        y = end.output
        if 'input_scale' in params:
            x = end.inputs * _row(params['input_scale'], y.dtype) * opened
            y = functional.dense(x, end.kernel, end.bias)
        return y * _row(params['scale'], y.dtype) * opened if 'scale' in params else y

    def merge_linear(self, params, kernel, bias, at):
        """Scale the rows or the columns of the kernel, and with these the bias, in float64.

        Raises:
            ValueError: the method is gated.
        """
        self.require(
            not self.use_gating,
            'it has use_gating=True and cannot be merged into the backbone: a gate depends on the '
            'text; keep the adapter beside the backbone',
        )
        params, kernel, bias = widen(params), widen(kernel), None if bias is None else widen(bias)
        if 'input_scale' in params:
            kernel = kernel * params['input_scale'].reshape(-1, 1)
        if 'scale' in params:
            kernel = kernel * params['scale'].reshape(1, -1)
            bias = None if bias is None else bias * params['scale']
        return kernel, bias


def _row(scale: Float[Array, 'D'], dtype: Any) -> Float[Array, '1 1 D']:
    return scale.astype(dtype).reshape(1, 1, -1)
