"""Compacter: bottleneck adapters whose projections are sums of Kronecker products.

A PHM layer (Zhang et al. 2021) writes a kernel as the sum over n of a small square matrix, the
rule, times a block n times smaller than the kernel; Compacter (Mahabadi et al. 2021) shares the
rules between all layers and factorises the blocks. The options have the names and the defaults
they have in the `adapters` library.
"""

import dataclasses
import statistics
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.method import At, adapted_layers
from adapters_jax.params import Tree
from adapters_jax.sites import SUB_LAYERS, Dimensions

_PARTS = ('down', 'up')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compacter(Bottleneck):
    """A bottleneck adapter with PHM layers (Mahabadi et al. 2021, section 3.2, eq. 5).

    A rule that is shared lies under `shared/rule`, any other beside its weights. Rules that are not
    learned are drawn from `init_weights_seed` (or 0) and lie under `constants`.
    """

    architecture: ClassVar[str] = 'compacter'

    phm_dim: int = 4  # N, the number of Kronecker products; must divide D and R
    factorized_phm_W: bool = True  # noqa: N815 - blocks of rank phm_rank, not full ones
    shared_W_phm: bool = False  # noqa: N815 - one pair of kernels for all layers and sites
    shared_phm_rule: bool = True  # one set of rules for all layers, sites and projections
    factorized_phm_rule: bool = False  # rules of rank 1
    phm_c_init: Literal['normal', 'uniform'] = 'normal'  # of the rules
    phm_init_range: float = 1e-4  # the sigma of 'normal'
    learn_phm: bool = True  # train the rules
    hypercomplex_nonlinearity: Literal['glorot-normal', 'glorot-uniform', 'normal', 'phm'] = (
        'glorot-uniform'  # how blocks are drawn; the library draws 'glorot-normal' whatever it says
    )
    phm_rank: int = 1
    phm_bias: bool = True

    def __post_init__(self) -> None:
        """Refuse what has no meaning for PHM layers."""
        super().__post_init__()
        for name in ('phm_dim', 'phm_rank'):
            self.require(getattr(self, name) >= 1, f'{name}={getattr(self, name)} is not above 0')
        self.require(
            self.phm_init_range > 0, f'phm_init_range={self.phm_init_range} is not above 0'
        )
        self.require(
            self.init_weights in ('bert', 'zero'),
            f'init_weights={self.init_weights!r} is for dense kernels; expected "bert" (the start '
            'that hypercomplex_nonlinearity names) or "zero"',
        )
        self.require(
            self._has_leaves,
            'shared_W_phm=True, phm_bias=False and no rule of its own leave an adapted place '
            'without a parameter; set phm_bias=True',
        )

    @property
    def _has_leaves(self) -> bool:
        """Whether a place has parameters of its own, by which it is known to be adapted."""
        rule = self.learn_phm and not self.shared_phm_rule
        rest = self.ln_before or self.ln_after or self.use_gating or isinstance(self.scaling, str)
        return not self.shared_W_phm or self.phm_bias or rule or rest

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters, what all layers share among them.

        Raises:
            ValueError: D or R is no multiple of `phm_dim`, or shared weights of several widths.
        """
        if self.init_weights_seed is not None:
            key = jax.random.key(self.init_weights_seed)
        tree = super().init(key, dimensions, backbone) | self.constants(dimensions)
        # The layers fold their numbers into the key; the next one is free.
        shared = self._init_shared(functional.fold(key, dimensions.layers), dimensions)
        return tree | ({'shared': shared} if shared else {})

    def _init_shared(self, key: PRNGKeyArray, dimensions: Dimensions) -> Tree:
        keys, shared = jax.random.split(key, 3), {}
        if self.shared_W_phm:
            layers = adapted_layers(self.leave_out, dimensions)
            widths = sorted({self.width(i, dimensions.hidden) for i in layers})
            self.require(
                len(widths) == 1,
                f'shared_W_phm=True, but the layers have the widths {widths}; give '
                'reduction_factor as one number',
            )
            shared['down'] = self._init_blocks(keys[0], 'down', dimensions.hidden, widths[0])
            shared['up'] = self._init_blocks(keys[1], 'up', widths[0], dimensions.hidden)
        if self.shared_phm_rule and self.learn_phm:
            shared['rule'] = self._init_rule(keys[2])
        return shared

    def init_projection(self, key: PRNGKeyArray, part: str, inputs: int, outputs: int) -> Tree:
        """Return what a PHM layer does not share with others."""
        for size in (inputs, outputs):
            self.require(
                size % self.phm_dim == 0,
                f'phm_dim={self.phm_dim} divides a projection from {inputs} to {outputs} into '
                f'blocks, but {size} is not a multiple of it; change phm_dim, size or '
                'reduction_factor',
            )
        block_key, rule_key = jax.random.split(key)
        params = {} if self.shared_W_phm else self._init_blocks(block_key, part, inputs, outputs)
        if self.learn_phm and not self.shared_phm_rule:
            params['rule'] = self._init_rule(rule_key)
        return params | ({'bias': jnp.zeros(outputs)} if self.phm_bias else {})

    def _init_blocks(self, key: PRNGKeyArray, part: str, inputs: int, outputs: int) -> Tree:
        n, rank = self.phm_dim, self.phm_rank
        shapes = {'weight': (n, inputs // n, outputs // n)}
        if self.factorized_phm_W:
            shapes = {'left': (n, inputs // n, rank), 'right': (n, rank, outputs // n)}
        keys = jax.random.split(key, len(shapes))
        blocks = {name: self._draw(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}
        if part == 'up' and self.init_weights == 'zero':
            last = 'right' if self.factorized_phm_W else 'weight'
            blocks[last] = jnp.zeros_like(blocks[last])
        return blocks

    def _draw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, 'N I O']:
        """Draw blocks, each by its own sizes (Glorot and Bengio 2010, eq. 16)."""
        if self.hypercomplex_nonlinearity == 'normal':
            return self.phm_init_range * jax.random.normal(key, shape)
        sigma = (2 / (shape[1] + shape[2])) ** 0.5
        if self.hypercomplex_nonlinearity == 'glorot-uniform':
            bound = 3**0.5 * sigma
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        return sigma * jax.random.normal(key, shape)

    @property
    def _rule_shapes(self) -> dict[str, tuple[int, ...]]:
        n = self.phm_dim
        return (
            {'left': (n, n, 1), 'right': (n, 1, n)} if self.factorized_phm_rule else {'': (n,) * 3}
        )

    def _init_rule(self, key: PRNGKeyArray) -> Any:
        keys = jax.random.split(key, 2)
        shapes = zip(self._rule_shapes.items(), keys, strict=False)
        if self.phm_c_init == 'uniform':
            drawn = {p: jax.random.uniform(k, shape, minval=-1.0) for (p, shape), k in shapes}
        else:
            drawn = {p: self.phm_init_range * jax.random.normal(k, s) for (p, s), k in shapes}
        return drawn.get('', drawn)

    def constants(self, dimensions: Dimensions) -> Tree:
        """Return the rules if they are not learned, those of each projection where not shared."""
        if self.learn_phm:
            return {}
        if self.shared_phm_rule:
            return {'constants': {'rule': self._fixed_rule(0)}}
        return {
            'constants': {
                f'layer_{layer}': {
                    site: {
                        part: {'rule': self._fixed_rule(layer, SUB_LAYERS.index(site), i)}
                        for i, part in enumerate(_PARTS)
                    }
                    for site in self.sites(dimensions, layer)
                }
                for layer in adapted_layers(self.leave_out, dimensions)
            }
        }

    def _fixed_rule(self, *place: int) -> Any:
        """Draw a rule that is the same on every machine and with every version of JAX."""
        bits = np.random.Philox([(self.init_weights_seed or 0) % 2**32, *place])

        def draw(shape: tuple[int, ...]) -> Float[Array, '...']:
            quantiles = ((bits.random_raw(int(np.prod(shape))) >> 11) + 0.5) * 2.0**-53
            if self.phm_c_init == 'uniform':
                values = 2 * quantiles - 1
            else:
                normal = statistics.NormalDist(0, self.phm_init_range)
                values = np.array([normal.inv_cdf(float(q)) for q in quantiles])
            return jnp.asarray(values.reshape(shape), jnp.float32)

        drawn = {part: draw(shape) for part, shape in self._rule_shapes.items()}
        return drawn.get('', drawn)

    def project(
        self, params: Tree, part: str, x: Float[Array, 'B T I'], at: At
    ) -> Float[Array, 'B T O']:
        """Apply a PHM layer (Zhang et al. 2021, eq. 3)."""
        own = params.get(part, {})
        blocks = at.shared[part] if self.shared_W_phm else own
        kernel = kronecker_sum(_product(self._rule(own, part, at)), _product(blocks))
        return functional.trained_dense(x, kernel, own.get('bias'))

    def _rule(self, own: Tree, part: str, at: At) -> Any:
        if self.learn_phm:
            return (at.shared if self.shared_phm_rule else own)['rule']
        if self.shared_phm_rule:
            return at.constants['rule']
        return at.constants[f'layer_{at.layer}'][at.name][part]['rule']


def kronecker_sum(
    rules: Float[Array, 'N M M'], blocks: Float[Array, 'N P Q']
) -> Float[Array, 'M*P M*Q']:
    """Return the sum over n of the Kronecker products of `rules[n]` and `blocks[n]`."""
    kernel = jnp.einsum('nij,npq->ipjq', rules, blocks)
    return kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)


def _product(matrices: Any) -> Float[Array, 'N I O']:
    """Return matrices from their factors, where they have any."""
    if not isinstance(matrices, dict):
        return matrices
    if 'left' not in matrices:
        return matrices['weight']
    return jnp.einsum('nik,nko->nio', matrices['left'], matrices['right'])
