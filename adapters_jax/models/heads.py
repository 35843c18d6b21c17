"""Heads: from the backbone's hidden states to a task's outputs, for each example or each token.

A row may hold several short texts, so a head pools each of a row's S examples by itself; a row
with one text is the case S = 1. A head whose pooling is 'tokens' pools nothing, and its S is T.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adapters_jax import functional
from adapters_jax.models.layers import Dense

POOLINGS = ('mean', 'cls', 'pooler')
FIRST_TOKEN = ('cls', 'pooler')  # those that read no other
TOKENS = 'tokens'  # what a task that wants an output for every token has in place of them
VOCABULARY = 'vocabulary'  # and one that wants a score for every word: `language_head`
TRAIN = ('auto', 'all', 'none')
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


def pool(
    pooling: str,
    hidden: Float[Array, 'B T D'],
    segments: Int[Array, 'B T'],
    starts: Int[Array, 'B S'],
    pooler: Pooler,
) -> Float[Array, 'B S D']:
    """Return one vector for each example of each row, or for each token, in float32."""
    if pooling == TOKENS:
        return hidden.astype(jnp.float32)
    if pooling == 'mean':
        return mean_pool(hidden, segments, starts.shape[1])
    x = first_token(hidden, starts)
    return (pooler(x) if pooling == 'pooler' else x).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """How an example's tokens become outputs.

    `pooling` is 'mean' over the example's tokens, 'cls' (its first token), 'pooler' (the
    checkpoint's own dense layer and tanh on the first token), or 'tokens': none. What reads first
    tokens alone spares most of the last layer (`Model.apply`). `layers` counts
    dense layers; all but the last keep the hidden size and are followed by `activation`. Dropout
    precedes each. With 'vocabulary' it is a language head instead. `train` says whether the head is
    trained; 'auto': unless it is a language head that comes with the checkpoint.
    """

    pooling: str = 'mean'
    layers: int = 1
    activation: str = 'tanh'
    dropout: float = 0.1
    train: str = 'auto'

    def __post_init__(self) -> None:
        """Refuse what no head can be built from."""
        if self.train not in TRAIN:
            raise ValueError(f'head.train is {self.train!r}; expected one of {TRAIN}')
        if self.pooling not in (*POOLINGS, TOKENS, VOCABULARY):
            raise ValueError(f'head.pooling is {self.pooling!r}; expected one of {POOLINGS}')
        if type(self.layers) is not int or self.layers < 1:
            raise ValueError(f'head.layers is {self.layers}; expected a whole number, 1 or more')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'head.dropout is {self.dropout}; expected a number in [0, 1)')
        functional.activation(self.activation)

    @property
    def per_token(self) -> bool:
        """Whether each token has outputs of its own, instead of each example."""
        return self.pooling in (TOKENS, VOCABULARY)

    @property
    def scores_words(self) -> bool:
        """Whether it is a language head, which is none of the dense layers described here."""
        return self.pooling == VOCABULARY

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
    """Pooling and dense layers: of whole texts, or of each token."""

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
        """Return one vector of outputs for each example or token of each row, in float32."""
        c = self.config
        x = pool(c.pooling, hidden, segments, starts, pooler)
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


@dataclasses.dataclass(frozen=True)
class HeadBank:
    """Heads by name, of which each row uses one: by number, in order.

    All outputs are as wide as the widest head's; what a row's own head does not have is zero, and
    so is all of a row without a head (number -1).

    Raises:
        ValueError: heads of tokens together with heads of examples, or a language head.
    """

    heads: tuple[tuple[str, HeadConfig, int], ...]

    def __post_init__(self) -> None:
        """Refuse outputs of two shapes."""
        words = [name for name, config, _ in self.heads if config.scores_words]
        if words:
            raise ValueError(
                f'{words[0]!r} is a language model, whose scores of words cannot share a batch '
                'with other outputs; train or predict it by itself'
            )
        kinds = {config.per_token: name for name, config, _ in self.heads}
        if len(kinds) > 1:
            raise ValueError(
                f'{kinds[True]!r} has outputs for each token and {kinds[False]!r} for each text, '
                'so they cannot share a batch; train or predict them by themselves'
            )

    @property
    def per_token(self) -> bool:
        """Whether each token has outputs of its own, instead of each example."""
        return self.heads[0][1].per_token

    @property
    def outputs(self) -> int:
        """The width of the widest head."""
        return max(outputs for _, _, outputs in self.heads)

    def init(self, key: jax.Array, hidden: int) -> dict[str, Any]:
        """Return fresh parameters by name."""
        return {
            name: init_head(PooledHead(config, outputs), jax.random.fold_in(key, i), hidden)
            for i, (name, config, outputs) in enumerate(self.heads)
        }

    def apply(
        self,
        params: Mapping[str, Any],
        hidden: Float[Array, 'B T D'],
        segments: Int[Array, 'B T'],
        starts: Int[Array, 'B S'],
        pooler: Pooler,
        rows: Int[Array, 'B'],
        key: jax.Array | None,
    ) -> Float[Array, 'B S C']:
        """Return the outputs of each row's own head, in float32; no key, no dropout."""
        places = segments.shape if self.per_token else starts.shape
        result = jnp.zeros((*places, self.outputs), jnp.float32)
        for config in dict.fromkeys(config for _, config, _ in self.heads):
            numbers = [i for i, head in enumerate(self.heads) if head[1] == config]
            x = pool(config.pooling, hidden, segments, starts, pooler)
            mine = rows[:, None] == jnp.array(numbers)[None]
            own = [self._padded(params[self.heads[i][0]], config) for i in numbers]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
            chosen = functools.partial(jnp.take, indices=mine.argmax(1), axis=0)
            y = self._dense(jax.tree.map(chosen, stacked), x, config, key)
            result = jnp.where(mine.any(1)[:, None, None], y, result)
        return result

    def _padded(self, params: Mapping[str, Any], config: HeadConfig) -> dict[str, Any]:
        """Return a head's parameters with its last layer as wide as the widest head's."""
        last = f'dense_{config.layers - 1}'
        missing = self.outputs - params[last]['bias'].shape[0]
        wide = {
            'kernel': jnp.pad(params[last]['kernel'], ((0, 0), (0, missing))),
            'bias': jnp.pad(params[last]['bias'], (0, missing)),
        }
        return dict(params) | {last: wide}

    def _dense(
        self, params: Any, x: Float[Array, 'B S D'], config: HeadConfig, key: jax.Array | None
    ) -> Float[Array, 'B S C']:
        """Apply each row's own dense layers."""
        for i in range(config.layers):
            x = functional.dropout(x, config.dropout, functional.fold(key, i))
            layer = params[f'dense_{i}']
            x = jnp.einsum('BSI,BIO->BSO', x, layer['kernel']) + layer['bias'][:, None]
            if i < config.layers - 1:
                x = functional.activation(config.activation)(x)
        return x
