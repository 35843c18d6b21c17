"""Prefix tuning (Li and Liang 2021): trained keys and values before those of each attention.

The backbone's own projections stay as they are; every query may look at a few more places, whose
keys and values belong to the adapter. Li and Liang train them through a small network that all
layers share (section 4.3), since training them directly was less stable; once trained, the network
can be dropped and its outputs kept (`flat_from_reparametrised`).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters import bottleneck, parts
from adapters_jax.adapters.method import At, Method, adapted_layers
from adapters_jax.params import Tree
from adapters_jax.sites import SUB_LAYERS, Dimensions, KeyValue, Stream, Words

# What a prefix is called among a site's parameters, and the network that decoders' prefixes share.
_OWN, _DECODERS = 'prefix', 'decoder_prefix'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Prefix tuning, flat or reparametrised, and gated as in UniPELT (Mao et al. 2022).

    There is no identity to start from: a fresh prefix already takes a share of the attention and
    changes every output. The options have the names and defaults of the `adapters` library, but for
    the last two. `peft` hands the prefix over as past keys and values, so that backbones with
    absolute positions count the text's from P instead of 0. In a backbone with relative positions
    `adapters` counts keys from the first of the prefix, and queries from the first of the text.
    """

    architecture: ClassVar[str] = 'prefix_tuning'

    encoder_prefix: bool = True  # in the encoder of a model with a decoder; elsewhere no effect
    cross_prefix: bool = True  # in cross-attention, where there is one
    flat: bool = False  # train keys and values themselves, not through a network
    prefix_length: int = 30  # P
    bottleneck_size: int = 512  # R, the network's width
    non_linearity: str = 'tanh'
    dropout: float = 0.0  # of the prefix's keys and values
    use_gating: bool = False  # scale them by a learned gate in (0, 1), one per example
    shared_gating: bool = True  # one gate for keys and values
    leave_out: tuple[int, ...] = ()
    init_weights_seed: int | None = None
    shift_positions: bool = False  # the text's positions start at P
    count_keys: bool = False  # relative positions of the text's keys start at P

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        for name in ('prefix_length', 'bottleneck_size'):
            value = getattr(self, name)
            self.require(value >= 1, f'{name}={value} is not at least 1')
        self.require(0 <= self.dropout < 1, f'dropout={self.dropout} is not in [0, 1)')
        functional.activation(self.non_linearity.lower())

    @property
    def packable(self) -> bool:
        """Whether texts may share a row: not with gates, which scale the prefix by the text.

        Nor where its keys are counted, to which the second text of a row would be further away.
        """
        return not (self.use_gating or self.count_keys)

    @property
    def reserved_positions(self) -> int:
        """The positions before the text, where it does not start at 0."""
        return self.prefix_length if self.shift_positions else 0

    def sites(self, dimensions: Dimensions, layer: int) -> list[str]:
        """Return the attentions of a layer that get a prefix."""
        if dimensions.decoder_layers and not _in_decoder(dimensions, layer):
            return ['attention'] if self.encoder_prefix else []
        cross = self.cross_prefix and 'cross_attention' in dimensions.projections(layer)
        return ['attention', *(['cross_attention'] if cross else [])]

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters; equal seeds give equal ones whatever the key.

        Raises:
            ValueError: the prefix leaves the text no positions.
        """
        self.require(
            dimensions.reads_words or not self.shift_positions,
            'shift_positions=True moves words, and the backbone reads none; set it to False',
        )
        left = dimensions.positions - self.reserved_positions
        self.require(
            left >= 1,
            f'prefix_length={self.prefix_length} with shift_positions=True leaves no position for '
            f'the text; the backbone has {dimensions.positions}',
        )
        if self.init_weights_seed is not None:
            key = jax.random.key(self.init_weights_seed)
        layers = adapted_layers(self.leave_out, dimensions)

        def at(layer: int, name: str) -> PRNGKeyArray:
            return functional.fold(key, layer + 1, SUB_LAYERS.index(name))

        places = [(i, name) for i in layers for name in self.sites(dimensions, i)]
        self.require(
            bool(places),
            'encoder_prefix=False, and leave_out names every layer of the decoder; keep one',
        )
        params: Tree = {f'layer_{i}': {} for i, _ in places}
        for i, name in places:
            leaf = _DECODERS if _in_decoder(dimensions, i) else _OWN
            params[f'layer_{i}'][name] = {leaf: self._init_one(at(i, name), dimensions)}
        if self.flat:
            return params
        shared = {
            network: self._init_shared(
                functional.fold(at(-1, name), *([1] if network == _DECODERS else [])),
                dimensions.hidden,
            )
            for network, name in {
                _network(name, _in_decoder(dimensions, i)): name for i, name in places
            }.items()
        }
        return {'shared': shared} | params

    def _init_shared(self, key: PRNGKeyArray, hidden: int) -> Tree:
        keys = jax.random.split(key)
        return {
            'embedding': jax.random.normal(keys[0], (self.prefix_length, hidden)),
            'down': parts.dense(keys[1], parts.uniform_by_inputs, hidden, self.bottleneck_size),
        }

    def _init_one(self, key: PRNGKeyArray, dimensions: Dimensions) -> Tree:
        hidden, inner = dimensions.hidden, dimensions.inner
        *keys, gate_key = jax.random.split(key, 3)
        params: Tree = {}
        for name, own in zip(('key', 'value'), keys, strict=True):
            if self.flat:
                params[name] = jax.random.normal(own, (self.prefix_length, inner))
            else:
                width = self.bottleneck_size
                params[name] = parts.dense(own, parts.uniform_by_inputs, width, inner)
        if self.use_gating:
            gates = 1 if self.shared_gating else 2
            params['gate'] = parts.dense(gate_key, parts.normal(0.02), hidden, gates)
        return params

    def first_layer(self, params: Tree, dimensions: Dimensions) -> int:
        """Return 0 where the text is moved, which the lowest layer sees."""
        return 0 if self.shift_positions else super().first_layer(params, dimensions)

    def words(self, params: Tree, words: Words, at: At) -> Words:
        """Move the text to the positions after the prefix where the option says so."""
        return words.replace(positions=words.positions + self.reserved_positions)

    def embeddings(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Let the prefix count among the keys where the option says so."""
        return self._count(params, stream, _OWN)

    def target(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Do the same in a decoder."""
        return self._count(params, stream, _DECODERS)

    def _count(self, params: Tree, stream: Stream, leaf: str) -> Stream:
        layers = (sites for name, sites in params.items() if name.startswith('layer_'))
        there = self.count_keys and any(leaf in sites.get('attention', {}) for sites in layers)
        return stream.replace(before=stream.before + self.prefix_length) if there else stream

    def key_value(self, params: Tree, seen: KeyValue, at: At) -> KeyValue:
        """Put the prefix before the keys and values (Li and Liang 2021, eq. 3).

        Every query may look at it, whatever else the mask hides. A gate scales the keys, so that
        the prefix gets another share of the attention, and the values (Mao et al. 2022, sec. 3.2).
        """
        in_decoder = _DECODERS in params
        own = params[_DECODERS if in_decoder else _OWN]
        key, value = self.vectors(own, at.shared.get(_network(at.name, in_decoder), {}))
        gates = (None, None)
        if self.use_gating:
            opened = bottleneck.gate(own['gate'], seen.inputs, _row(seen.text_mask))
            gates = (opened[..., 0], opened[..., -1])
        mask = seen.mask
        if mask is not None:
            before = ((0, 0), (0, 0), (0, 0), (self.prefix_length, 0))
            mask = jnp.pad(mask, before, constant_values=True)
        return seen.replace(
            key=self._prepend(key, seen.key, gates[0], functional.fold(at.key, 0)),
            value=self._prepend(value, seen.value, gates[1], functional.fold(at.key, 1)),
            mask=mask,
        )

    def vectors(
        self, params: Tree, shared: Tree
    ) -> tuple[Float[Array, 'P D'], Float[Array, 'P D']]:
        """Return a layer's keys and values, for all heads side by side.

        The network runs in its parameters' own type, so that its outputs can take its place.
        """
        if self.flat:
            return params['key'], params['value']
        wide = parts.apply_dense(shared['down'], shared['embedding'])
        wide = functional.activation(self.non_linearity.lower())(wide)
        return parts.apply_dense(params['key'], wide), parts.apply_dense(params['value'], wide)

    def _prepend(
        self,
        prefix: Float[Array, 'P D'],
        x: Float[Array, 'B S H K'],
        gate: Float[Array, 'B 1'] | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, 'B P+S H K']:
        rows, _, heads, size = x.shape
        own = prefix.astype(x.dtype).reshape(1, self.prefix_length, heads, size)
        own = jnp.broadcast_to(own, (rows, *own.shape[1:]))
        own = functional.dropout(own, self.dropout, key)
        if gate is not None:
            own = own * gate.reshape(rows, 1, 1, 1)
        return jnp.concatenate([own, x], axis=1)


def _in_decoder(dimensions: Dimensions, layer: int) -> bool:
    return layer >= dimensions.layers - dimensions.decoder_layers


def _network(name: str, in_decoder: bool) -> str:
    """Return the name of the shared network: encoder and decoder have their own."""
    return _DECODERS if in_decoder and name == 'attention' else name


def _row(mask: Bool[Array, '#B 1 #T T'] | None) -> Bool[Array, '#B 1 1 T'] | None:
    """Return which tokens belong to the one text of each row.

    Where each token has a mask of its own, they are those that may look at the first token and at
    themselves: causal or not, padding may do one of the two at most.
    """
    if mask is None or mask.shape[2] == 1:
        return mask
    own = mask[..., 0] & jnp.diagonal(mask, axis1=2, axis2=3)
    return own[:, :, None, :]


def flat_from_reparametrised(method: PrefixTuning, params: Tree) -> tuple[PrefixTuning, Tree]:
    """Return the method and parameters without the shared network, its outputs in its place.

    They compute the same; what cannot be had back is the network, should training go on. This is
    what `adapters` calls eject, and what `peft` writes. A flat prefix is returned as it is.
    """
    if method.flat:
        return method, params
    flat: Tree = {}
    for layer, names in params.items():
        if layer == 'shared':
            continue
        flat[layer] = {}
        for name, entry in names.items():
            ((leaf, own),) = entry.items()
            network = params['shared'][_network(name, leaf == _DECODERS)]
            key, value = method.vectors(own, network)
            flat[layer][name] = {leaf: own | {'key': key, 'value': value}}
    return dataclasses.replace(method, flat=True), flat
