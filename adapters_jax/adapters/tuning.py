"""Methods that add nothing and train few of the backbone's own leaves: biases or LayerNorms.

They are rules and no tree; an adapter's folder carries its own copies of the leaves they name.
"""

import dataclasses
from typing import ClassVar, Literal

from adapters_jax.adapters.method import Method, adapted_layers
from adapters_jax.params import Rule, train
from adapters_jax.sites import Dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tuning(Method):
    """Layers that are left out, and whether what lies outside of the layers is trained."""

    leave_out: tuple[int, ...] = ()
    embedding_norm: bool = True  # the embeddings' too; without it a trunk can be left out

    def layers(self, dimensions: Dimensions) -> str:
        """Return a pattern for the layers that are not left out."""
        numbers = '|'.join(map(str, adapted_layers(self.leave_out, dimensions)))
        return f'layer_({numbers})'


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(_Tuning):
    """Train the biases alone (Ben Zaken et al. 2022, section 3).

    'all' are those of every projection, LayerNorm and the pooler. 'partial' are those of the
    queries and of the feed-forward up-projections (ibid., section 4, "fewer bias parameters").
    """

    architecture: ClassVar[str] = 'bitfit'

    biases: Literal['all', 'partial'] = 'all'

    def rules(self, dimensions: Dimensions) -> tuple[Rule, ...]:
        """Return the rules for the biases.

        Raises:
            ValueError: `leave_out` names a layer that the backbone does not have, or all of them.
        """
        layers = self.layers(dimensions)
        if self.biases == 'partial':
            return (train(rf'backbone/{layers}/(\w+/query|feed_forward/up)/bias'),)
        around = (train(r'backbone/(decoder_)?embeddings/\w+/bias'),) if self.embedding_norm else ()
        ends = (train(r'backbone/(decoder_)?final_norm/bias'), train(r'backbone/pooler/bias'))
        return (*around, train(rf'backbone/{layers}/.*/bias'), *ends)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormTuning(_Tuning):
    """Train the scale and bias of every LayerNorm (Zhao et al. 2024; LN_TUNING in `peft`)."""

    architecture: ClassVar[str] = 'layer_norm'

    def rules(self, dimensions: Dimensions) -> tuple[Rule, ...]:
        """Return the rules for the LayerNorms.

        Raises:
            ValueError: `leave_out` names a layer that the backbone does not have, or all of them.
        """
        norms = rf'{self.layers(dimensions)}/\w+/norm', r'(decoder_)?final_norm'
        around = (r'(decoder_)?embeddings/norm',) if self.embedding_norm else ()
        return tuple(train(rf'backbone/{norm}/(scale|bias)') for norm in (*around, *norms))
