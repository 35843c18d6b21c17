"""The smallest modules: what blocks, embeddings and poolers are made of."""

from collections.abc import Callable

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from adapters_jax import attention, functional
from adapters_jax.models import leaves
from adapters_jax.sites import LayerNorm, Linear, Sites

PROJECTED = 'projected'  # what projections return, for rematerialisation to keep


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


class Projection(nn.Module):
    """A dense layer that offers its input, kernel and output at the `linear` site."""

    features: int
    layer: int
    sub_layer: str
    biased: bool = True

    @nn.compact
    def weights(self, inputs: int, sites: Sites) -> attention.Affine:
        """Return the kernel and the bias, if it has one, for so many inputs."""
        kernel = leaves.leaf(self, 'kernel', leaves.normal, (inputs, self.features))
        if not self.biased:
            return kernel, None
        bias = leaves.leaf(self, 'bias', leaves.zeros, (self.features,))
        path = f'layer_{self.layer}/{self.sub_layer}/{self.name}/bias'
        return kernel, sites.vector(path, bias)

    def __call__(
        self, x: Float[Array, 'B T I'], mask: Bool[Array, '#B 1 #T T'] | None, sites: Sites
    ) -> Float[Array, 'B T O']:
        """Return what the `linear` site makes of `x @ kernel + bias`."""
        kernel, bias = self.weights(x.shape[-1], sites)
        y = checkpoint_name(functional.dense(x, kernel, bias), PROJECTED)
        end = Linear(inputs=x, kernel=kernel, bias=bias, output=y, mask=mask)
        return sites.linear(self.layer, self.sub_layer, self.name, end)


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
