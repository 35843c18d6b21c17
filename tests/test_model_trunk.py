"""Where the trunk of a model ends: below all that is trained."""

import dataclasses

import numpy as np
import pytest
import tiny

from adapters_jax import params as trees
from adapters_jax.adapters.baselines import HeadOnly
from adapters_jax.sites import Place


@pytest.mark.parametrize(
    ('method', 'trunk'),
    [(tiny.Shift(), Place(0)), (tiny.Shift(lowest=1), Place.of(1, 'feed_forward_end'))],
)
def test_the_trunk_ends_at_the_first_adapted_layer(method, trunk):
    model = tiny.model(method)
    assert model.trunk(tiny.params(model)) == trunk


@dataclasses.dataclass(frozen=True)
class Chosen(HeadOnly):
    """Trains the leaves of the backbone whose paths match."""

    architecture = 'chosen'
    pattern: str

    def rules(self, dimensions):
        return (trees.train(f'backbone/({self.pattern})/kernel'),)


@pytest.mark.parametrize(
    ('pattern', 'layer'),
    [('embeddings/own|layer_1/.*', 0), ('layer_0/.*/own|layer_1/.*', 0), ('layer_1/.*', 1)],
)
def test_the_trunk_ends_below_each_leaf_that_is_trained(pattern, layer):
    model = tiny.model(Chosen(pattern=pattern))
    params = tiny.params(model)
    for branch in ('embeddings', 'layer_0/attention'):
        params = trees.merge(params, trees.unflatten({f'backbone/{branch}/own/kernel': np.ones(2)}))
    assert model.trunk(params) == Place(layer)
