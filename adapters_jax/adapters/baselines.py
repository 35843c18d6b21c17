"""What adapters are measured against: methods that add nothing and train parts of the backbone."""

import dataclasses
from typing import ClassVar

from adapters_jax.adapters.method import Method
from adapters_jax.params import Rule, train
from adapters_jax.sites import Dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Train every parameter of the backbone, embeddings and pooler included."""

    architecture: ClassVar[str] = 'full'

    def rules(self, dimensions: Dimensions) -> tuple[Rule, ...]:
        """Return the rule that covers the whole backbone."""
        return (train(r'backbone/.*'),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Train the task's head and nothing of the backbone; the whole backbone is trunk."""

    architecture: ClassVar[str] = 'head'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopLayers(Method):
    """Train the `layers` highest layers and the pooler ('variable fine-tuning', Houlsby 2019)."""

    architecture: ClassVar[str] = 'top_layers'

    layers: int

    def __post_init__(self) -> None:
        """Refuse to train no layer."""
        super().__post_init__()
        self.require(self.layers >= 1, f'layers={self.layers} is not at least 1')

    def rules(self, dimensions: Dimensions) -> tuple[Rule, ...]:
        """Return the rule for the highest layers and the one for the pooler.

        Raises:
            ValueError: more layers than the backbone has.
        """
        self.require(
            self.layers <= dimensions.layers,
            f'layers={self.layers}, but the backbone has {dimensions.layers}',
        )
        top = '|'.join(str(i) for i in range(dimensions.layers - self.layers, dimensions.layers))
        return train(rf'backbone/layer_({top})/.*'), train(r'backbone/pooler/.*')
