"""The smallest modules: what poolers, embeddings and blocks are made of beside projections."""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from adapters_jax import functional
from adapters_jax.models import leaves
from adapters_jax.sites import LayerNorm, Sites


class Norm(nn.Module):
    """A LayerNorm handed out as a function, since a site may apply it twice or not at all."""

    epsilon: float
    where: str  # its path, below 'backbone'
    centred: bool = True

    @nn.compact
    def __call__(self, features: int, sites: Sites) -> LayerNorm:
        """Return the LayerNorm of vectors of that many features."""
        scale = leaves.leaf(self, 'scale', leaves.ones, (features,))
        scale, bias = sites.vector(f'{self.where}/scale', scale), None
        if self.centred:
            bias = leaves.leaf(self, 'bias', leaves.zeros, (features,))
            bias = sites.vector(f'{self.where}/bias', bias)
        return LayerNorm(scale, bias, self.epsilon)


class Dense(nn.Module):
    """A dense layer without sites: for poolers and heads, where no adapter reaches."""

    features: int

    @nn.compact
    def __call__(
        self, x: Float[Array, '... I'], vector: Callable[[Array], Array] = lambda bias: bias
    ) -> Float[Array, '... O']:
        """Return `x @ kernel + bias`; `vector` may replace the bias."""
        shape = (x.shape[-1], self.features)
        kernel = leaves.leaf(self, 'kernel', leaves.normal, shape)
        bias = vector(leaves.leaf(self, 'bias', leaves.zeros, (self.features,)))
        return functional.dense(x, kernel, bias)
