"""The transformer block that serves every family of backbones, with the sites adapters use.

What differs between families (where the LayerNorm stands, whether there is cross-attention, which
activation) is an option of this block and not a second block, so an adapter written against the
sites works for all of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from adapters_jax import attention, functional
from adapters_jax.models.layers import PROJECTED, Norm, Projection
from adapters_jax.sites import (
    KEYS,
    START,
    KeyValue,
    LayerNorm,
    Place,
    Sites,
    Stream,
    SubLayer,
    seen_from,
    taken,
)

# What the backward pass finds of a block's forward pass: everything, the outputs of projections, or
# its input alone. The rest is computed again.
REMAT = ('none', 'dots', 'full')


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The options of a transformer block; dropout rates are per entry, sizes in scalars."""

    hidden: int
    feed_forward: int
    heads: int
    activation: str = 'gelu'
    norm_epsilon: float = 1e-12
    pre_norm: bool = False  # LayerNorm before the sub-layer (ViT, Whisper) or after it (BERT)
    cross_attention: bool = False
    causal: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0  # within the feed-forward network
    drops_attended: bool = True  # what attention returns, too (DistilBERT does without)
    head_size: int = 0  # 0: the hidden size over the number of heads
    scaled: bool = True  # scores over the square root of the head size (T5 does without)
    centred: bool = True  # LayerNorm; else RMSNorm (Zhang and Sennrich 2019)
    unbiased: tuple[str, ...] = ()  # projections without a bias
    gated: bool = False  # the feed-forward network has a gate (Shazeer 2020, eq. 6)

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together, and rates that are none."""
        if self.heads < 1 or (not self.head_size and self.hidden % self.heads):
            raise ValueError(
                f'hidden size {self.hidden} is not a multiple of the number of heads {self.heads}'
            )
        for rate in (self.dropout, self.attention_dropout, self.activation_dropout):
            if not 0 <= rate < 1:
                raise ValueError(f'the dropout rate {rate} is not a number in [0, 1)')
        functional.activation(self.activation)

    @property
    def inner(self) -> int:
        """The width of queries, keys and values of all heads together."""
        return self.heads * (self.head_size or self.hidden // self.heads)


@struct.dataclass
class Memory:
    """What cross-attention looks at.

    `mask` tells which of it each token of the text sees, `own` which of it belong together: the
    tokens of one source text.
    """

    hidden: Float[Array, 'B S D']
    mask: Bool[Array, '#B 1 #T S'] | None
    own: Bool[Array, '#B 1 #S S'] | None


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) as a sub-layer.

    `kind` is 'attention' (over the sequence itself) or 'cross_attention' (over `memory`).
    """

    config: BlockConfig
    layer: int
    kind: str

    @nn.compact
    def __call__(
        self,
        stream: Stream,
        memory: Memory | None,
        sites: Sites,
        deterministic: bool,
        known: Float[Array, 'B T D'] | None = None,
        places: Int[Array, 'B N'] | None = None,
    ) -> Stream:
        """Return the stream after attention, residual connection and LayerNorm.

        `known` is the attention's output where that has been computed before. With `places` it is
        the stream of these tokens alone: of the others, at most keys and values are needed.
        """
        c, itself = self.config, memory is None
        norm = _norm(self, sites)
        if known is not None:
            return _finish(self, known, norm, stream, sites, True)
        x = norm(stream.hidden) if c.pre_norm else stream.hidden
        own = stream.mask
        memory = Memory(x, own, own) if itself else memory
        mask = memory.mask
        if places is not None:
            stream, x, mask = stream.of(places), taken(x, places), seen_from(mask, places)
            own = stream.mask

        def project(name: str, inputs: Array, mask: Array | None) -> Array:
            y = _projection(self, c.inner, name)(inputs, mask, sites)
            return y.reshape(*y.shape[:-1], c.heads, c.inner // c.heads)

        def keys_and_values() -> tuple[Array, Array]:
            given = memory.hidden, memory.own
            return project('key', *given), project('value', *given)

        query = project('query', x, own)
        rng = None if deterministic else self.make_rng('dropout')
        scale = query.shape[-1] ** -0.5 if c.scaled else 1.0
        few = places is not None and attention.asks_little(query, memory.hidden)
        if few and not sites.sees_keys(self.layer, self.kind):
            maps = (_projection(self, c.inner, name).weights(c.hidden, sites) for name in KEYS)
            mixed = attention.attend_to_inputs(
                query, memory.hidden, *maps, mask, c.attention_dropout, rng, scale
            )
            return self._ended(mixed, norm, stream, sites, deterministic)
        if stream.at is None:
            key, value = keys_and_values()
        elif itself:
            key, value = self._extended(*keys_and_values(), stream.at, mask.shape[-1])
        else:
            key, value = self._kept(keys_and_values)
        seen = KeyValue(inputs=x, key=key, value=value, mask=mask, text_mask=own)
        seen = sites.key_value(self.layer, self.kind, seen)
        bias = _fitted(stream.bias, seen.key.shape[1]) if itself else None
        mixed = attention.attend(
            query, seen.key, seen.value, seen.mask, c.attention_dropout, rng, bias, scale
        )
        return self._ended(mixed, norm, stream, sites, deterministic)

    def _ended(
        self,
        mixed: Float[Array, 'B T H K'],
        norm: LayerNorm,
        stream: Stream,
        sites: Sites,
        deterministic: bool,
    ) -> Stream:
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        y = _projection(self, self.config.hidden, 'output')(mixed, stream.mask, sites)
        return _finish(self, y, norm, stream, sites, deterministic)

    def _extended(
        self,
        key: Float[Array, 'B T H K'],
        value: Float[Array, 'B T H K'],
        at: Int[Array, ''],
        length: int,
    ) -> tuple[Float[Array, 'B L H K'], Float[Array, 'B L H K']]:
        """Write these tokens' keys and values behind those of the tokens before, and return all.

        They are kept as `attend` multiplies them: turned around once.
        """
        found = []
        for name, axis, new in zip(('keys', 'values'), (3, 2), _turned(key, value), strict=True):
            shape = (*new.shape[:axis], length, *new.shape[axis + 1 :])
            kept = self.variable('cache', name, jnp.zeros, shape, new.dtype)
            kept.value = jax.lax.dynamic_update_slice_in_dim(kept.value, new, at, axis)
            found.append(kept.value)
        return _turned_back(*found)

    def _kept(self, compute: Callable[[], tuple[Array, Array]]) -> tuple[Array, Array]:
        """Return the keys and values of the memory, computed at the first token only."""
        if not self.has_variable('cache', 'keys'):
            # Without the barrier XLA turns them around again in each step.
            turned = jax.lax.optimization_barrier(_turned(*compute()))
            for name, computed in zip(('keys', 'values'), turned, strict=True):
                self.put_variable('cache', name, computed)
        return _turned_back(*(self.get_variable('cache', name) for name in ('keys', 'values')))


def _turned(
    key: Float[Array, 'B S H K'], value: Float[Array, 'B S H K']
) -> tuple[Float[Array, 'B H K S'], Float[Array, 'B H S K']]:
    return key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)


def _turned_back(
    key: Float[Array, 'B H K S'], value: Float[Array, 'B H S K']
) -> tuple[Float[Array, 'B S H K'], Float[Array, 'B S H K']]:
    return key.transpose(0, 3, 1, 2), value.swapaxes(1, 2)


class FeedForward(nn.Module):
    """The position-wise feed-forward network (Vaswani et al. 2017, section 3.3) as a sub-layer."""

    config: BlockConfig
    layer: int
    kind: str = 'feed_forward'

    @nn.compact
    def __call__(
        self,
        stream: Stream,
        sites: Sites,
        deterministic: bool,
        known: Float[Array, 'B T D'] | None = None,
    ) -> Stream:
        """Return the stream after the network, residual connection and LayerNorm.

        `known` is the network's output where that has been computed before.
        """
        c = self.config
        norm = _norm(self, sites)
        if known is not None:
            return _finish(self, known, norm, stream, sites, True)
        x = norm(stream.hidden) if c.pre_norm else stream.hidden
        up = _projection(self, c.feed_forward, 'up')(x, stream.mask, sites)
        if c.gated:
            gate = _projection(self, c.feed_forward, 'gate')(x, stream.mask, sites)
            up = functional.activation(c.activation)(gate) * up
        else:
            up = functional.activation(c.activation)(up)
        if c.activation_dropout and not deterministic:
            up = functional.dropout(up, c.activation_dropout, self.make_rng('dropout'))
        y = _projection(self, c.hidden, 'down')(up, stream.mask, sites)
        return _finish(self, y, norm, stream, sites, deterministic)


def _norm(module: Attention | FeedForward, sites: Sites) -> LayerNorm:
    c, path = module.config, f'layer_{module.layer}/{module.kind}/norm'
    return Norm(c.norm_epsilon, path, c.centred, name='norm')(c.hidden, sites)


def _projection(module: Attention | FeedForward, features: int, name: str) -> Projection:
    biased = name not in module.config.unbiased
    return Projection(features, module.layer, module.kind, biased, name=name)


def _fitted(bias: Float[Array, '1 H T S'] | None, keys: int) -> Float[Array, '1 H T K'] | None:
    """Return the bias of the scores of all K keys.

    What a site put before the sequence's has none, unless it is counted (`Stream.before`); the
    columns are then those of the first keys, with and without it.
    """
    if bias is None or bias.shape[-1] == keys:
        return bias
    if bias.shape[-1] > keys:
        return bias[..., :keys]
    return jnp.pad(bias, ((0, 0), (0, 0), (0, 0), (keys - bias.shape[-1], 0)))


def _finish(
    module: Attention | FeedForward,
    y: Float[Array, 'B T D'],
    norm: LayerNorm,
    stream: Stream,
    sites: Sites,
    deterministic: bool,
) -> Stream:
    """End a sub-layer: dropout, then the site, which adds the residual and normalises."""
    c = module.config
    rng = None if deterministic else module.make_rng('dropout')
    inner = module.kind != 'feed_forward' and not c.drops_attended
    end = SubLayer(
        output=functional.dropout(y, 0.0 if inner else c.dropout, rng),
        residual=stream.hidden,
        norm=None if c.pre_norm else norm,
        stream=stream,
    )
    # Where it is looked for when the trunk's output is stored; else nothing.
    module.sow('trunk', 'end', jnp.stack([end.output, end.residual], axis=2))
    return stream.replace(hidden=sites.sub_layer(module.layer, module.kind, end))


class Block(nn.Module):
    """Self-attention, cross-attention where the family has it, and a feed-forward network."""

    config: BlockConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        stream: Stream,
        sites: Sites,
        deterministic: bool,
        memory: Memory | None = None,
        trunk: Place = START,
        known: Float[Array, 'B T N D'] | None = None,
        places: Int[Array, 'B N'] | None = None,
    ) -> Stream:
        """Return the stream after the whole block.

        There is no dropout before `trunk`. `known` is what was stored of that place: the block
        begins there instead of at its beginning. With `places`, which do not go together with
        `known`, only these tokens come out, and are computed.

        Raises:
            ValueError: cross-attention without a memory, or a memory without cross-attention.
        """
        c = self.config
        if c.cross_attention != (memory is not None):
            raise ValueError(
                f'the block has cross_attention={c.cross_attention}, but its memory is '
                f'{"missing" if memory is None else "given"}'
            )
        if c.causal and stream.at is None:
            # In the stream, so that an adapter that looks along the sequence looks back only, too.
            stream = stream.replace(mask=causal(stream.mask, stream.hidden.shape[1]))
        if known is not None and trunk.stage == 'block_end':
            return sites.block(self.layer, stream.replace(hidden=known[:, :, 0]))

        def run(name: str, module: Callable[..., Stream], stream: Stream, *inputs: Any) -> Stream:
            end = Place.of(self.layer, f'{name}_end')
            if known is None or trunk < Place.of(self.layer, name):
                return module(stream, *inputs, sites, deterministic or end <= trunk)
            if end < trunk:
                return stream
            if end == trunk:
                stream = stream.replace(hidden=known[:, :, 1])
                return module(stream, *inputs, sites, True, known[:, :, 0])
            stream = stream.replace(hidden=known[:, :, 0])
            return module(stream, *inputs, sites, deterministic)

        attention = Attention(c, self.layer, 'attention', name='attention')
        attention = functools.partial(attention, places=places)
        stream = run('attention', attention, stream, None)
        if c.cross_attention:
            cross = Attention(c, self.layer, 'cross_attention', name='cross_attention')
            stream = run('cross_attention', cross, stream, memory)
        stream = run('feed_forward', FeedForward(c, self.layer, name='feed_forward'), stream)
        self.sow('trunk', 'block', stream.hidden[:, :, None])
        return sites.block(self.layer, stream)


def rematerialised(policy: str) -> type[Block]:
    """Return the block whose backward pass computes again what `policy` of `REMAT` says.

    A name and not the kind of operation says what is kept: a product with a matrix in another
    number format is one operation of its own (`quantize.product`), into which no policy looks.

    Raises:
        ValueError: an unknown policy.
    """
    if policy not in REMAT:
        raise ValueError(f'remat is {policy!r}; expected one of {", ".join(REMAT)}')
    if policy == 'none':
        return Block
    keep = jax.checkpoint_policies.save_only_these_names(PROJECTED) if policy == 'dots' else None
    return nn.remat(Block, static_argnums=(3, 5), policy=keep)


def causal(mask: Bool[Array, '#B 1 #T T'] | None, length: int) -> Bool[Array, '#B 1 T T']:
    """Return the mask that moreover hides what comes after each position."""
    triangle = jnp.tril(jnp.ones((1, 1, length, length), bool))
    return triangle if mask is None else mask & triangle
