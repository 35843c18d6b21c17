"""Heads: from the backbone's hidden states to a task's outputs, one vector per example.

A row may hold several short texts, so a head pools each of a row's S examples by itself; a row
with one text is the case S = 1.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adapters_jax import functional
from adapters_jax.models.block import Dense

POOLINGS = ('mean', 'cls', 'pooler')
Pooler = Callable[[Float[Array, 'B S D']], Float[Array, 'B S D']]


def mean_pool(
    hidden: Float[Array, 'B T D'], segments: Int[Array, 'B T'], examples: int
) -> Float[Array, 'B S D']:
    """Average each example's hidden states, in float32; an empty place gives zeros."""
    member = segments[:, :, None] == jnp.arange(1, examples + 1).reshape(1, 1, -1)
    member = member.astype(jnp.float32)
    totals = jnp.einsum('BTS,BTD->BSD', member, hidden.astype(jnp.float32))
    return totals / jnp.maximum(member.sum(1), 1)[:, :, None]


def first_token(hidden: Float[Array, 'B T D'], starts: Int[Array, 'B S']) -> Float[Array, 'B S D']:
    """Take each example's first hidden state ([CLS] of BERT, <s> of RoBERTa)."""
    return jnp.take_along_axis(hidden, starts[:, :, None], axis=1)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """How an example's tokens become outputs.

    `pooling` is 'mean' over the example's tokens, 'cls' (its first token) or 'pooler' (the
    checkpoint's own dense layer and tanh on the first token). `layers` counts dense layers; all but
    the last keep the hidden size and are followed by `activation`. Dropout precedes each.
    """

    pooling: str = 'mean'
    layers: int = 1
    activation: str = 'tanh'
    dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what no head can be built from."""
        if self.pooling not in POOLINGS:
            raise ValueError(f'head.pooling is {self.pooling!r}; expected one of {POOLINGS}')
        if self.layers < 1:
            raise ValueError(f'head.layers is {self.layers}; expected 1 or more')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'head.dropout is {self.dropout}; expected a number in [0, 1)')
        functional.activation(self.activation)

    def to_json(self) -> dict[str, Any]:
        """Return every field as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> 'HeadConfig':
        """Build the config from `to_json`'s result.

        Raises:
            ValueError: an unknown field, or a value of another type than the default's.
        """
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, value in values.items():
            kind = type(known.get(name))
            if name not in known or not (isinstance(value, kind) or (kind, value) == (float, 0)):
                raise ValueError(
                    f'the head has {name}={value!r}; expected {", ".join(known)} with values like '
                    f'{", ".join(map(repr, known.values()))}'
                )
        return cls(**values)


class PooledHead(nn.Module):
    """Pooling and dense layers: classification and regression of whole texts."""

    config: HeadConfig
    outputs: int

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, 'B T D'],
        segments: Int[Array, 'B T'],
        starts: Int[Array, 'B S'],
        pooler: Pooler,
        deterministic: bool,
    ) -> Float[Array, 'B S C']:
        """Return one vector of outputs for each example of each row, in float32."""
        c = self.config
        if c.pooling == 'mean':
            x = mean_pool(hidden, segments, starts.shape[1])
        else:
            x = first_token(hidden, starts)
            x = pooler(x) if c.pooling == 'pooler' else x
        x = x.astype(jnp.float32)
        for i in range(c.layers):
            x = functional.dropout(
                x, c.dropout, None if deterministic else self.make_rng('dropout')
            )
            last = i == c.layers - 1
            x = Dense(self.outputs if last else x.shape[-1], name=f'dense_{i}')(x)
            x = x if last else functional.activation(c.activation)(x)
        return x


def init_head(head: PooledHead, key: jax.Array, hidden: int) -> dict[str, Any]:
    """Return fresh head parameters for hidden states of the given width."""
    ones = jnp.ones((1, 1), jnp.int32)
    variables = head.init(key, jnp.zeros((1, 1, hidden)), ones, ones - 1, lambda x: x, True)
    return variables['params']
