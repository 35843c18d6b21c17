"""What an adapter method is: a value (its hyper-parameters) and pure functions at the sites.

A method holds no arrays. Its parameters are a plain nested dict, laid out so that the tree itself
says where the adapter sits: `layer_{i}/{site}/...` for what belongs to one site of one layer,
`shared/...` for what all layers use, and `constants/...` for arrays that are drawn from a seed and
never trained. A layer without an entry is not adapted.

Because each site function is pure in its own parameters, a bank of adapters is a stack of such
trees and per-row routing is a `vmap` over it; nothing here has to know.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

from adapters_jax.adapters import fields
from adapters_jax.params import Rule, Tree
from adapters_jax.sites import (
    PROJECTIONS,
    SUB_LAYERS,
    Dimensions,
    KeyValue,
    Linear,
    Place,
    Stream,
    SubLayer,
    Words,
)


@struct.dataclass
class At:
    """Where and with what a site function is called, beside its own parameters."""

    layer: int = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)
    shared: Tree
    key: PRNGKeyArray | None  # None: no dropout, no other randomness
    constants: Tree = struct.field(default_factory=dict)


class Change(NamedTuple):
    """What a method makes of a sub-layer's output, before residual connection and LayerNorm.

    `up` is what a fusion mixes: what the adapter itself adds. A method that can be fused gives it,
    and has `read(end)`, which returns what it reads and what its result is added to.
    """

    output: Float[Array, 'B T D']
    up: Float[Array, 'B T D'] | None = None


class Inserted(NamedTuple):
    """Vectors that a method puts among those of the text: how many, and before which token."""

    count: int = 0
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Method:
    """The base of all methods: the identity at every site, no parameters, no rules.

    A subclass is a frozen dataclass whose fields are JSON values (lists become tuples, dicts become
    hashable ones), checked on construction, and overrides `init` and the site functions it uses.
    """

    architecture: ClassVar[str]  # the name under which files and configs know the class
    claims: ClassVar[tuple[str, ...]] = ()  # what only one member of a union may use
    reads_trunk: ClassVar[bool] = False  # whether it looks at the output of blocks of the trunk

    def __post_init__(self) -> None:
        """Freeze every field and check its type against its annotation."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, fields.freeze(getattr(self, field.name)))
        fields.check(self.architecture, self)

    def require(self, condition: bool, sentence: str) -> None:
        """Raise a ValueError that begins with the architecture unless the condition holds."""
        if not condition:
            raise ValueError(f'{self.architecture}: {sentence}')

    @property
    def packable(self) -> bool:
        """Whether several texts may share a row."""
        return True

    @property
    def stepwise(self) -> bool:
        """Whether it leaves it to the backbone's attention to bring tokens together: what it does
        to a token's vector hangs on no other vector of the same place. A decoder's tokens may then
        be computed one by one, and of an encoder's last layer only those that are read."""
        return not getattr(self, 'use_gating', False)

    @property
    def known_tags(self) -> int:
        """How many tags a word may have (none is one, 0); 0 where the method looks at no tags."""
        return 0

    @property
    def inserted(self) -> Inserted:
        """The vectors that the method adds to each row; only for methods that are not packable."""
        return Inserted()

    @property
    def replicas(self) -> int:
        """How many copies of the batch it makes; each is evaluated by itself."""
        return 1

    @property
    def divides(self) -> bool:
        """Whether it divides the sequence or the batch, or copies the batch, by numbers."""
        return False

    @property
    def stores_constants(self) -> bool:
        """Whether its constants are in its file, because its options do not bring them back."""
        return False

    @property
    def reserved_positions(self) -> int:
        """How many of the backbone's positions the method takes from the text."""
        return 0

    def prepare(self, encode: Callable[[str], list[int]]) -> Self:
        """Return the method with the texts among its options turned into token ids."""
        return self

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters; `backbone` is there for methods that start from its weights."""
        return {}

    def constants(self, dimensions: Dimensions) -> Tree:
        """Return the part of `init` that is never trained: drawn from a seed in the options, it
        need not be stored."""
        return {}

    def rules(self, dimensions: Dimensions) -> tuple[Rule, ...]:
        """Return the rules for leaves of the backbone that the method trains (paths start with
        'backbone/'); its own parameters and the head are always trained."""
        return ()

    def penalty(self, params: Tree) -> Float[Array, ''] | None:
        """Return what is added to the mean loss in training, or None for nothing."""
        return None

    def optimizer(
        self, inner: optax.GradientTransformation, total_steps: int
    ) -> optax.GradientTransformation:
        """Return the optimiser that trains the method: `inner`, or one around it."""
        return inner

    @property
    def frozen(self) -> tuple[str, ...]:
        """The method's own leaves that are never trained: patterns of paths in its own tree."""
        return ('(.*/)?constants/.*',)

    def fits(self, other: 'Method') -> bool:
        """Tell whether `other` computes what this does, once parameters are padded with zeros."""
        return self == other

    def padding(self, path: str, shape: tuple[int, ...], other: 'Method') -> dict[int, int]:
        """Return the sizes that axes of a leaf have in a wider method."""
        return {}

    def rescale(self, path: str, other: 'Method') -> float:
        """Return what a leaf is multiplied by to mean the same in a wider method."""
        return 1.0

    def lengthen(self, segments: Int[Array, 'B T'], index: Any = None) -> Int[Array, 'B P+T']:
        """Return the segments of the last hidden states, of which inserted ones have none.

        Each row's text starts where it did: a head that takes the first token's state takes that of
        the first vector in the row, inserted or not, as `adapters` and `peft` do.
        """
        count, index = self.inserted
        none = jnp.zeros((len(segments), count), segments.dtype)
        return jnp.concatenate([segments[:, :index], none, segments[:, index:]], axis=1)

    def words(self, params: Tree, words: Words, at: At) -> Words:
        """Site `words`; `params` is the whole tree of the adapter."""
        return words

    def embeddings(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Site `embeddings`; `params` is the whole tree of the adapter."""
        return stream

    def target(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Site `target`; `params` is the whole tree of the adapter."""
        return stream

    def linear(self, params: Tree, end: Linear, at: At) -> Float[Array, 'B T O']:
        """Site `linear`; `params` is `layer_{i}/{sub_layer}/{name}`, where that is a tree."""
        return end.output

    def key_value(self, params: Tree, seen: KeyValue, at: At) -> KeyValue:
        """Site `key_value`; `params` is `layer_{i}/{sub_layer}`."""
        return seen

    def adapt(self, params: Tree, end: SubLayer, at: At) -> Change:
        """Site `attention`, `cross_attention` or `feed_forward`; `params` is `layer_{i}/{name}`.

        What is returned takes the place of the sub-layer's output, so methods can be stacked.
        """
        return Change(end.output)

    @property
    def closes(self) -> bool:
        """Whether the backbone's residual connection and LayerNorm follow on `adapt`."""
        return True

    def close(self, end: SubLayer, output: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        """End the sub-layer with what `adapt` returned."""
        return end.finish(output) if self.closes else output

    def sub_layer(self, params: Tree, end: SubLayer, at: At) -> Float[Array, 'B T D']:
        """Adapt a sub-layer's output and end it: what a method does that acts there alone."""
        return self.close(end, self.adapt(params, end, at).output)

    def block(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Site `block`; `params` is `layer_{i}/block`."""
        return stream

    def output(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Site `output`; `params` is `output`."""
        return stream

    def inverse(self, params: Tree, x: Float[Array, '... D']) -> Float[Array, '... D']:
        """Site `undo`; `params` is the whole tree of the adapter."""
        return x

    def merge_linear(
        self, params: Tree, kernel: Float[Array, 'I O'], bias: Float[Array, 'O'] | None, at: At
    ) -> tuple[Float[Array, 'I O'], Float[Array, 'O'] | None]:
        """Return the weights of a plain projection that computes what site `linear` does.

        Raises:
            ValueError: no weights do.
        """
        raise ValueError(f'{self.architecture} cannot be merged into the backbone')

    def first_layer(self, params: Tree, dimensions: Dimensions) -> int:
        """Return the lowest layer whose output the trained leaves can change.

        Layers below it are the trunk: they get neither a gradient nor dropout. A branch of the
        parameters that no layer has in its name (`embeddings`) counts as layer 0; `shared` and
        `constants` act through the layers, and `output` after the last of them.
        """
        elsewhere = ('shared', 'constants', 'output')
        lowest = [_layer_of(name) for name in params if name not in elsewhere]
        tuned = _first_tuned_layer(self.rules(dimensions), dimensions)
        return min([*lowest, tuned])

    def first_place(self, params: Tree, dimensions: Dimensions) -> Place:
        """Return where the trunk ends: the first place that trained leaves can change.

        That is inside of the first adapted layer; where this is the lowest one there is no trunk,
        so that a method of all layers trains with all of the backbone's dropout.
        """
        layer = self.first_layer(params, dimensions)
        sites = params.get(f'layer_{layer}')
        tuned = _first_tuned_layer(self.rules(dimensions), dimensions)
        if layer == 0 or sites is None or tuned == layer:
            return Place(layer)
        return min((_place_of(type(self), layer, name) for name in sites), default=Place(layer))

    def to_json(self) -> dict[str, Any]:
        """Return every field and the architecture as JSON values."""
        values = {f.name: fields.thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {'architecture': self.architecture} | values

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Self:
        """Build the method from JSON fields: the inverse of `to_json` (without architecture).

        Raises:
            ValueError: a field the class does not have, or lacks; the known ones are listed.
        """
        missing = dataclasses.MISSING
        known = {
            f.name: f.default is missing and f.default_factory is missing
            for f in dataclasses.fields(cls)
        }
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f'{cls.architecture} has no option {", ".join(map(repr, unknown))}; '
                f'known: {", ".join(sorted(known)) or "none"}'
            )
        absent = [name for name, required in known.items() if required and name not in values]
        if absent:
            raise ValueError(f'{cls.architecture} needs the option {", ".join(map(repr, absent))}')
        return cls(**values)


def adapted_layers(leave_out: Iterable[int], dimensions: Dimensions) -> list[int]:
    """Return the layers that are not left out.

    Raises:
        ValueError: a layer that the backbone does not have, or no layer that remains.
    """
    left_out = set(leave_out)
    absent = sorted(i for i in left_out if not 0 <= i < dimensions.layers)
    if absent:
        raise ValueError(
            f'leave_out names layer {absent[0]}, but the backbone has layers 0 to '
            f'{dimensions.layers - 1}'
        )
    kept = [i for i in range(dimensions.layers) if i not in left_out]
    if not kept:
        raise ValueError('leave_out names every layer of the backbone; keep at least one')
    return kept


def acts(method: type[Method], function: str) -> bool:
    """Tell whether a method does anything at a site."""
    return getattr(method, function) is not getattr(Method, function)


def _place_of(method: type[Method], layer: int, name: str) -> Place:
    """Return the first place in a layer at which parameters under `name` have an effect."""
    if name == 'block':
        return Place.of(layer, 'block_end')
    ends_only = not (acts(method, 'linear') or acts(method, 'key_value'))
    return Place.of(layer, f'{name}_end' if name in SUB_LAYERS and ends_only else 'attention')


def _layer_of(name: str) -> int:
    found = re.fullmatch(r'layer_(\d+)', name)
    return int(found[1]) if found else 0


def _first_tuned_layer(rules: tuple[Rule, ...], dimensions: Dimensions) -> int:
    """Return the lowest layer with a leaf that the rules train; embeddings count as layer 0.

    So does a leaf that is none of `_probes`: a family may have any, and they are mostly embeddings.
    """
    if not rules:
        return dimensions.layers
    probes = _probes(dimensions)
    tuned = [
        layer
        for path, layer in probes
        if (rule := next((r for r in rules if r.matches(path)), None)) and rule.train
    ]
    ours = [r for r in rules if r.train and not r.pattern.startswith(('adapters/', 'heads/'))]
    unknown = any(not any(rule.matches(path) for path, _ in probes) for rule in ours)
    return min([*tuned, *([0] if unknown else [])], default=dimensions.layers)


def _probes(dimensions: Dimensions) -> list[tuple[str, int]]:
    """Return paths of leaves that most families have, with the layers that they count as."""
    tables = [f'{name}/embedding' for name in ('word', 'position', 'token_type')]
    around, ends = (*tables, 'norm/scale', 'norm/bias'), ('scale', 'bias')
    first = dimensions.layers - dimensions.decoder_layers
    # An encoder's last LayerNorm is the end of its last layer where another stack follows.
    final = first - 1 if dimensions.decoder_layers else dimensions.layers
    found = [(f'embeddings/{x}', 0) for x in around]
    found += [(f'decoder_embeddings/{x}', first) for x in around]
    found += [(f'final_norm/{x}', final) for x in ends]
    found += [(f'decoder_final_norm/{x}', dimensions.layers) for x in ends]
    found += [(f'pooler/{x}', dimensions.layers) for x in ('kernel', 'bias')]
    for i in range(dimensions.layers):
        for sub_layer, projections in PROJECTIONS.items():
            leaves = [f'{p}/{leaf}' for p in projections for leaf in ('kernel', 'bias')]
            found += [
                (f'layer_{i}/{sub_layer}/{x}', i) for x in (*leaves, *(f'norm/{e}' for e in ends))
            ]
    return [(f'backbone/{path}', layer) for path, layer in found]
