"""The bottleneck family: down-projection, non-linearity, up-projection beside or after a sub-layer.

Houlsby et al. (2019) put two of them into each layer, Pfeiffer et al. (2021) one after the
feed-forward network, He et al. (2022) one in parallel to it. They differ in where residual
connections and LayerNorms stand; the options that say so have the names and the defaults they have
in the `adapters` library, so that its files describe our values and the reverse.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters import fields, parts
from adapters_jax.adapters.method import At, Change, Method, adapted_layers
from adapters_jax.params import Rule, Tree, train
from adapters_jax.sites import SUB_LAYERS, Dimensions, SubLayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A bottleneck adapter and all its variants.

    A parallel adapter reads the sub-layer's residual input and has no residual connection of its
    own; `original_ln_before`, `residual_before_ln` and `adapter_residual_before_ln` are without
    effect on it.
    """

    architecture: ClassVar[str] = 'bottleneck'

    mh_adapter: bool  # after self-attention
    output_adapter: bool  # after the feed-forward network
    non_linearity: str
    reduction_factor: float | Mapping[str, float] | None = None  # by layer: {'0': 8, 'default': 16}
    size: int | None = None  # the width R itself, instead of D // reduction_factor
    cross_adapter: bool = False  # after cross-attention
    original_ln_before: bool = False  # the backbone's residual and LayerNorm before the adapter
    original_ln_after: bool = True  # the same after the adapter
    ln_before: bool = False  # a LayerNorm of the adapter's own before the down-projection
    ln_after: bool = False  # and one after the up-projection
    init_weights: Literal['bert', 'mam_adapter', 'houlsby', 'zero'] = 'bert'
    init_sigma: float = 0.01  # of the kernels that 'houlsby' and 'zero' draw
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | Literal['learned', 'channel'] = 1.0
    use_gating: bool = False  # scale by a learned gate in (0, 1), one per example
    residual_before_ln: bool | Literal['post_add'] = True
    adapter_residual_before_ln: bool = False
    leave_out: tuple[int, ...] = ()
    dropout: float = 0.0
    stochastic_depth: float = 0.0  # probability that an example skips the adapter in training
    train_norms: bool = False  # train the backbone's LayerNorms too (Houlsby et al. 2019, sec. 2.1)

    def __post_init__(self) -> None:
        """Refuse values out of range and combinations that mean nothing."""
        super().__post_init__()
        _check_size(self)
        functional.activation(self.non_linearity.lower())
        for name in ('dropout', 'stochastic_depth'):
            rate = getattr(self, name)
            self.require(0 <= rate < 1, f'{name}={rate} is not in [0, 1)')
        self.require(self.init_sigma > 0, f'init_sigma={self.init_sigma} is not above 0')
        self.require(
            self.mh_adapter or self.output_adapter or self.cross_adapter,
            'mh_adapter, output_adapter and cross_adapter are all False; set at least one to True',
        )
        self.require(
            self.residual_before_ln != 'post_add' or self.original_ln_before or self.is_parallel,
            "residual_before_ln='post_add' needs original_ln_before=True, which adds the residual",
        )

    def sites(self, dimensions: Dimensions, layer: int) -> list[str]:
        """Return the sub-layers that get an adapter in a layer."""
        chosen = {
            'attention': self.mh_adapter,
            'cross_attention': self.cross_adapter and dimensions.decoder_layers > 0,
            'feed_forward': self.output_adapter,
        }
        names = [name for name, wanted in chosen.items() if wanted]
        self.require(bool(names), 'cross_adapter=True, but the backbone has no cross-attention')
        return [name for name in names if name in dimensions.projections(layer)]

    def width(self, layer: int, hidden: int) -> int:
        """Return R, the bottleneck's width, in a layer; at least 1.

        Raises:
            ValueError: `reduction_factor` has neither the layer nor a default.
        """
        if self.size is not None:
            return self.size
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            given = factor
            factor = given.get(str(layer), given.get('default'))
            self.require(
                factor is not None,
                f"reduction_factor={dict(given)} has no entry for layer {layer} and no 'default'",
            )
        return max(int(hidden // factor), 1)

    def fits(self, other: Method) -> bool:
        """Tell whether the two differ in nothing but `size`, and this has not the larger one."""
        sizes = self.size, getattr(other, 'size', None)
        if type(self) is not Bottleneck or type(other) is not Bottleneck or None in sizes:
            return self == other
        alike = dataclasses.replace(
            self,
            size=other.size,
            init_weights=other.init_weights,
            init_sigma=other.init_sigma,
            init_weights_seed=other.init_weights_seed,
        )
        return alike == other and self.size <= other.size

    def padding(self, path: str, shape: tuple[int, ...], other: Method) -> dict[int, int]:
        """Return the wider width, at the axis that has it."""
        axes = {'down/kernel': 1, 'down/bias': 0, 'up/kernel': 0}
        axis = next((axes[end] for end in axes if path.endswith(end)), None)
        return {} if axis is None or other.size is None else {axis: other.size}

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters; equal seeds give equal ones whatever the key.

        Raises:
            ValueError: `reduction_factor` or `leave_out` names a layer that is not there, or no
                layer that is kept gets an adapter.
        """
        _check_layers(self, dimensions)
        if self.init_weights_seed is not None:
            key = jax.random.key(self.init_weights_seed)
        return {
            f'layer_{layer}': {
                name: self._init_one(
                    functional.fold(key, layer, SUB_LAYERS.index(name)), dimensions.hidden, layer
                )
                for name in self.sites(dimensions, layer)
            }
            for layer in adapted_layers(self.leave_out, dimensions)
        }

    def _init_one(self, key: PRNGKeyArray, hidden: int, layer: int) -> Tree:
        width = self.width(layer, hidden)
        keys = jax.random.split(key, 3)
        params = {
            'down': self.init_projection(keys[0], 'down', hidden, width),
            'up': self.init_projection(keys[1], 'up', width, hidden),
        }
        if self.ln_before:
            params['norm_before'] = parts.norm(hidden)
        if self.ln_after:
            params['norm_after'] = parts.norm(hidden)
        if self.use_gating:
            params['gate'] = parts.dense(keys[2], parts.normal(0.02), hidden, 1)
        if isinstance(self.scaling, str):
            params['scaling'] = jnp.ones(1 if self.scaling == 'learned' else hidden)
        return params

    def init_projection(self, key: PRNGKeyArray, part: str, inputs: int, outputs: int) -> Tree:
        """Return fresh parameters of a projection; `part` is 'down' or 'up'."""
        return parts.dense(key, self._kernel(part), inputs, outputs)

    def _kernel(self, part: str) -> parts.KernelInit:
        if part == 'up' and self.init_weights in ('mam_adapter', 'zero'):
            return parts.zeros
        if self.init_weights == 'mam_adapter':
            return parts.uniform_by_inputs
        if self.init_weights == 'bert':
            return parts.normal(0.02)
        return parts.truncated_normal(self.init_sigma)

    def project(
        self, params: Tree, part: str, x: Float[Array, 'B T I'], at: At
    ) -> Float[Array, 'B T O']:
        """Apply a projection; `params` is that of the place, `part` is 'down' or 'up'."""
        return parts.apply_dense(params[part], x)

    def rules(self, dimensions: Dimensions) -> tuple[Rule, ...]:
        """Return the rules for the backbone's LayerNorms, but for those of layers left out.

        Those of the embeddings belong to the lowest layer of their stack, those at its end to the
        highest.
        """
        if not self.train_norms:
            return ()
        kept = adapted_layers(self.leave_out, dimensions)
        top, first = dimensions.layers - 1, dimensions.layers - dimensions.decoder_layers
        inner = [rf'layer_{i}/\w+/norm' for i in kept]
        around = {'embeddings/norm': 0, 'decoder_embeddings/norm': first}
        around |= {'final_norm': first - 1, 'decoder_final_norm': top}
        norms = [*inner, *(name for name, layer in around.items() if layer in kept)]
        return (train(rf'backbone/({"|".join(norms)})/(scale|bias)'),)

    def adapt(self, params: Tree, end: SubLayer, at: At) -> Change:
        """Adapt a sub-layer's output (Houlsby fig. 2; Pfeiffer fig. 3; He fig. 3)."""
        x, residual = self.read(end)
        change = self._change(params, x, end.stream.mask, at)
        if self.adapter_residual_before_ln and not self.is_parallel:
            return Change(_norm_after(params, change + residual), change)
        return Change(_norm_after(params, change) + residual, change)

    @property
    def closes(self) -> bool:
        """Whether the backbone's residual connection and LayerNorm follow."""
        return self.original_ln_after

    def read(self, end: SubLayer) -> tuple[Float[Array, 'B T D'], Float[Array, 'B T D']]:
        """Return what the adapter reads and what its result is added to."""
        if self.is_parallel:
            return end.residual, end.output
        x = end.finish(end.output) if self.original_ln_before else end.output
        if self.residual_before_ln == 'post_add':
            return x, end.output + end.residual
        return x, end.output if self.residual_before_ln else x

    def _change(
        self, params: Tree, x: Float[Array, 'B T D'], mask: Bool[Array, '#B 1 #T T'] | None, at: At
    ) -> Float[Array, 'B T D']:
        """Pass `x` through the bottleneck, with depth dropped, scaled, dropped out and gated."""
        down = parts.apply_norm(params['norm_before'], x) if self.ln_before else x
        down = self.project(params, 'down', down, at)
        down = functional.activation(self.non_linearity.lower())(down)
        change = self.project(params, 'up', down, at)
        change = skip_examples(change, self.stochastic_depth, mask, functional.fold(at.key, 0))
        if isinstance(self.scaling, str):
            change = change * params['scaling'].astype(x.dtype).reshape(1, 1, -1)
        elif self.scaling != 1:
            change = change * self.scaling
        change = functional.dropout(change, self.dropout, functional.fold(at.key, 1))
        return change * gate(params['gate'], x, mask) if self.use_gating else change


def _check_size(method: Bottleneck) -> None:
    factor, size = method.reduction_factor, method.size
    method.require(
        (factor is None) != (size is None),
        f'reduction_factor={fields.thaw(factor)} and size={size}; give one of the two and None for '
        'the other',
    )
    method.require(size is None or size >= 1, f'size={size} is not at least 1')
    if factor is None:
        return
    factors = factor if isinstance(factor, Mapping) else {'default': factor}
    for layer, value in factors.items():
        method.require(value > 0, f'reduction_factor {value} is not above 0')
        method.require(
            layer == 'default' or layer.isdecimal(),
            f"reduction_factor has the key {layer!r}; expected a layer's number or 'default'",
        )


def _check_layers(method: Bottleneck, dimensions: Dimensions) -> None:
    factor, layers = method.reduction_factor, dimensions.layers
    named = [key for key in factor if key != 'default'] if isinstance(factor, Mapping) else []
    absent = [key for key in named if int(key) >= layers]
    method.require(
        not absent,
        f'reduction_factor names layer {absent and absent[0]}, but the backbone has layers 0 to '
        f'{layers - 1}',
    )
    kept = adapted_layers(method.leave_out, dimensions)
    method.require(
        any(method.sites(dimensions, layer) for layer in kept),
        f'cross_adapter=True alone, but leave_out={list(method.leave_out)} keeps no layer that has '
        'cross-attention; keep a layer of the decoder, or set mh_adapter or output_adapter',
    )


def _norm_after(params: Tree, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    return parts.apply_norm(params['norm_after'], x) if 'norm_after' in params else x


def gate(
    params: Tree, x: Float[Array, 'B T D'], mask: Bool[Array, '#B 1 #T T'] | None
) -> Float[Array, 'B #T 1']:
    """Return the gate of each example: the mean of a sigmoid over its tokens (Mao et al. 2022).

    Neither padding nor the other texts of a packed row have a part in the mean. Where attention is
    causal it is over the whole text all the same, as in the authors' code: a gate is one number.
    """
    opened = jax.nn.sigmoid(parts.apply_dense(params, x).astype(jnp.float32))
    if mask is None:
        return opened.mean(1, keepdims=True).astype(x.dtype)
    weights = whole_texts(mask)[:, 0]
    weights = jnp.broadcast_to(weights, (x.shape[0], *weights.shape[1:])).astype(jnp.float32)
    tokens = jnp.maximum(weights.sum(-1, keepdims=True), 1.0)
    return (weights @ opened / tokens).astype(x.dtype)


def whole_texts(mask: Bool[Array, '#B 1 #T S']) -> Bool[Array, '#B 1 #T S']:
    """Return which tokens are of the same text as each position, of who may attend to whom.

    Of two tokens of a text one at least may attend to the other, and each to itself.
    """
    if mask.shape[2] != mask.shape[3]:
        return mask
    itself = jnp.diagonal(mask, axis1=2, axis2=3)[:, :, None, :]
    return (mask | mask.swapaxes(2, 3)) & itself


def skip_examples(
    x: Float[Array, 'B T D'],
    rate: float,
    mask: Bool[Array, '#B 1 #T T'] | None,
    key: PRNGKeyArray | None,
) -> Float[Array, 'B T D']:
    """Zero whole examples with probability `rate` and scale the rest (Huang et al. 2016).

    One draw is made for each position, and all tokens of an example use that of the first token
    they may attend to: one decision a text, however many texts share the row.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape[:2])
    if mask is None:
        keep = keep[:, :1]
    else:
        first = jnp.argmax(mask[:, 0], axis=-1)
        keep = jnp.take_along_axis(keep, jnp.broadcast_to(first, (len(x), first.shape[1])), axis=1)
    return jnp.where(keep[..., None], x / (1 - rate), 0).astype(x.dtype)
