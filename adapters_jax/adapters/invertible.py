"""Invertible adapters: a change of the embedded input that the output embeddings can undo.

MAD-X (Pfeiffer et al. 2020, section 3.3) puts one after the embedding layer, so that a language
adapter can fit the vocabulary too, and its inverse before the output embeddings. It is a coupling
block: each half of a vector is changed by a function of the other half, which needs no inverse.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters import parts
from adapters_jax.adapters.method import At, Method
from adapters_jax.params import Tree
from adapters_jax.sites import Dimensions, Stream

# The network that changes the first half, then the one that changes the second.
_NETWORKS = {'nice': ('f', 'g'), 'glow': ('s2', 's1')}
_CLAMP = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invertible(Method):
    """One coupling block on the embedded input; MAD-X is the union with a bottleneck.

    'nice' adds (Dinh et al. 2015, eq. 6 and 7), 'glow' scales and adds (Kingma and Dhariwal 2018,
    table 1). The 'glow' of `adapters` 1.3.0 cannot run: it joins the halves along the tokens, and
    passes the second half through no network. Ours has the tensors of its files, and computes what
    its inverse inverts.
    """

    architecture: ClassVar[str] = 'invertible'
    claims: ClassVar[tuple[str, ...]] = ('the embedded input',)

    non_linearity: str
    block_type: Literal['nice', 'glow'] = 'nice'
    reduction_factor: float = 2  # the width of each network is that of what it reads over this
    init_weights: Literal['bert', 'zero'] = 'bert'  # 'zero' starts as the identity
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown activation and a factor that is not positive."""
        super().__post_init__()
        functional.activation(self.non_linearity.lower())
        factor = self.reduction_factor
        self.require(factor > 0, f'reduction_factor={factor} is not above 0')

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters; equal seeds give equal ones whatever the key.

        Raises:
            ValueError: `reduction_factor` leaves a network without a width.
        """
        if self.init_weights_seed is not None:
            key = jax.random.key(self.init_weights_seed)
        first = dimensions.word // 2
        second = dimensions.word - first
        outputs = 2 if self.block_type == 'glow' else 1  # scale and shift, or the shift alone
        sizes = ((second, outputs * first), (first, outputs * second))
        named = zip(_NETWORKS[self.block_type], sizes, jax.random.split(key), strict=True)
        return {'embeddings': {name: self._init_one(k, *size) for name, size, k in named}}

    def _init_one(self, key: PRNGKeyArray, inputs: int, outputs: int) -> Tree:
        width = int(inputs // self.reduction_factor)
        self.require(
            width >= 1,
            f'reduction_factor={self.reduction_factor} leaves no width to a network that reads '
            f'{inputs} features; expected at most {inputs}',
        )
        down_key, up_key = jax.random.split(key)
        up = parts.zeros if self.init_weights == 'zero' else parts.normal(0.02)
        return {
            'down': parts.dense(down_key, parts.normal(0.02), inputs, width),
            'up': parts.dense(up_key, up, width, outputs),
        }

    def embeddings(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Change the embedded input (Pfeiffer et al. 2020, eq. 3)."""
        if 'embeddings' not in params:  # dropped with the lowest layer
            return stream
        first, second = _halves(stream.hidden)
        (a, b), networks = _NETWORKS[self.block_type], params['embeddings']
        first = self._couple(first, self._network(networks[a], second))
        second = self._couple(second, self._network(networks[b], first))
        return stream.replace(hidden=jnp.concatenate([first, second], axis=-1))

    def inverse(self, params: Tree, x: Float[Array, '... D']) -> Float[Array, '... D']:
        """Undo `embeddings`: what output embeddings tied to the input's read (ibid., eq. 4)."""
        if 'embeddings' not in params:
            return x
        first, second = _halves(x)
        (a, b), networks = _NETWORKS[self.block_type], params['embeddings']
        second = self._uncouple(second, self._network(networks[b], first))
        first = self._uncouple(first, self._network(networks[a], second))
        return jnp.concatenate([first, second], axis=-1)

    def _network(self, params: Tree, x: Float[Array, '... I']) -> Float[Array, '... O']:
        x = functional.activation(self.non_linearity.lower())(parts.apply_dense(params['down'], x))
        return parts.apply_dense(params['up'], x)

    def _couple(self, x: Float[Array, '... I'], given: Float[Array, '... O']) -> Array:
        if self.block_type == 'nice':
            return x + given
        scale, shift = jnp.split(given, 2, axis=-1)
        return x * _amplification(scale) + shift

    def _uncouple(self, x: Float[Array, '... I'], given: Float[Array, '... O']) -> Array:
        if self.block_type == 'nice':
            return x - given
        scale, shift = jnp.split(given, 2, axis=-1)
        return (x - shift) / _amplification(scale)


def _halves(x: Float[Array, '... D']) -> tuple[Array, Array]:
    """Return the two halves; of an odd size the second is the larger."""
    return x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]


def _amplification(x: Float[Array, '... I']) -> Float[Array, '... I']:
    """Return exp(x), bent so that it stays between exp(-5) and exp(5).

    The factor is 2/pi as `adapters` rounds it, for its files' sake.
    """
    return jnp.exp(_CLAMP * 0.636 * jnp.arctan(x / _CLAMP))
