"""What a backbone offers and an adapter may use: the only thing that both sides know.

A backbone calls a `Sites` object at the named points of its forward pass and is otherwise plain.
`Sites` itself is the identity at each of them, so a backbone without an adapter compiles to
exactly the plain model. Adapters override what they need (`adapters/method.py`).

The sites are, in the order in which a forward pass meets them:

==================================================  ==============================================
`words`                                             word vectors, before positions and LayerNorm
`embeddings`                                        after the embedding LayerNorm
`linear` at query, key, value, output, up, down     each projection; sees input, weights, output
`key_value`                                         the keys and values of an attention, per head
`sub_layer` at attention, cross_attention,          a sub-layer's output, before and after the
feed_forward                                        residual connection and its LayerNorm
`block`                                             a block's output
`output`                                            the last block's output
==================================================  ==============================================
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int

SUB_LAYERS = ('attention', 'cross_attention', 'feed_forward')
PROJECTIONS = {
    'attention': ('query', 'key', 'value', 'output'),
    'cross_attention': ('query', 'key', 'value', 'output'),
    'feed_forward': ('up', 'down'),
}


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """The sizes of a backbone that an adapter's parameters depend on."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    word: int  # width of the word embeddings; differs from `hidden` where they are factorised
    vocabulary: int
    positions: int
    cross_attention: bool = False


@struct.dataclass
class Words:
    """What the embedding module is about to add up: word vectors and where they stand."""

    vectors: Float[Array, 'B T E']
    token_types: Int[Array, 'B T']
    positions: Int[Array, 'B T']
    mask: Bool[Array, '#B 1 #T T'] | None
    tags: Int[Array, 'B T'] | None = None


@struct.dataclass
class Stream:
    """What flows through the blocks: the hidden states and what every site may look at.

    `carry` belongs to the adapter: what it computed at one site for use at a later one.
    """

    hidden: Float[Array, 'B T D']
    mask: Bool[Array, '#B 1 #T T'] | None
    word_vectors: Float[Array, 'B T E']
    tags: Int[Array, 'B T'] | None = None
    carry: dict[str, Any] = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SubLayer:
    """The end of a sub-layer: its output, its residual input, and the LayerNorm that follows.

    `norm` is None in a pre-LN block, where nothing follows the residual connection.
    """

    output: Float[Array, 'B T D']
    residual: Float[Array, 'B T D']
    norm: Callable[[Float[Array, 'B T D']], Float[Array, 'B T D']] | None
    stream: Stream

    def normalise(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        """Apply the LayerNorm where there is one."""
        return x if self.norm is None else self.norm(x)

    def finish(self, output: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
        """Add the residual and normalise: what the backbone does with `output` by itself."""
        return self.normalise(output + self.residual)


@struct.dataclass
class Linear:
    """A projection that was just computed: `output` is `inputs @ kernel + bias`.

    `mask` tells which of the inputs belong together: the tokens of one text.
    """

    inputs: Float[Array, 'B T I']
    kernel: Float[Array, 'I O']
    bias: Float[Array, 'O'] | None
    output: Float[Array, 'B T O']
    mask: Bool[Array, '#B 1 #T T'] | None


@struct.dataclass
class KeyValue:
    """The keys and values of an attention, what they are computed from, and who may see them.

    `inputs` is what the queries come from, and `text_mask` tells which of them belong together.
    """

    inputs: Float[Array, 'B T D']
    key: Float[Array, 'B S H K']
    value: Float[Array, 'B S H K']
    mask: Bool[Array, '#B 1 #T S'] | None
    text_mask: Bool[Array, '#B 1 #T T'] | None


@struct.dataclass
class Sites:
    """The identity at every site; a pytree, so that it passes through remat like an array."""

    def words(self, words: Words) -> Words:
        """Change or extend the word vectors before they meet positions and LayerNorm."""
        return words

    def embeddings(self, stream: Stream) -> Stream:
        """Change the embedded input, or prepare what later sites of the adapter share."""
        return stream

    def linear(self, layer: int, sub_layer: str, name: str, end: Linear) -> Float[Array, 'B T O']:
        """Change the output of a projection."""
        return end.output

    def key_value(self, layer: int, sub_layer: str, seen: KeyValue) -> KeyValue:
        """Change or extend the keys and values of an attention, and its mask with them."""
        return seen

    def sub_layer(self, layer: int, name: str, end: SubLayer) -> Float[Array, 'B T D']:
        """Return the sub-layer's result after residual connection and LayerNorm."""
        return end.finish(end.output)

    def block(self, layer: int, stream: Stream) -> Stream:
        """Change the output of a block."""
        return stream

    def output(self, stream: Stream) -> Stream:
        """Change the output of the last block."""
        return stream


IDENTITY = Sites()
