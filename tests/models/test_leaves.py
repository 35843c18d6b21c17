"""Leaves of modules: read as they are given, drawn where there are none, refused if of a shape."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors

from adapters_jax.models import leaves


class Two(nn.Module):
    features: int

    @nn.compact
    def __call__(self):
        drawn = leaves.leaf(self, 'kernel', leaves.normal, (3, self.features))
        return drawn + leaves.leaf(self, 'bias', leaves.ones, (self.features,))[None]


def plain(features, key):
    class Plain(Two):
        @nn.compact
        def __call__(self):
            self.param('kernel', leaves.normal, (3, self.features))
            self.param('bias', leaves.ones, (self.features,))

    return Plain(features).init(key)


def test_they_are_drawn_as_flax_draws_them():
    key = jax.random.key(0)
    found, expected = Two(4).init(key), plain(4, key)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, expected))


def test_what_is_given_is_read_and_no_initialiser_is_traced():
    given = {'params': {'kernel': jnp.zeros((3, 4)), 'bias': jnp.arange(4.0)}}
    jaxpr = jax.make_jaxpr(Two(4).apply)(given)
    assert [equation.primitive.name for equation in jaxpr.eqns] == ['broadcast_in_dim', 'add']
    assert Two(4).apply(given).tolist() == [[0.0, 1.0, 2.0, 3.0]] * 3


def test_another_shape_and_none_are_refused():
    given = {'params': {'kernel': jnp.zeros((3, 5)), 'bias': jnp.zeros(4)}}
    with pytest.raises(errors.ScopeParamShapeError, match=r'kernel.*\(3, 4\).*\(3, 5\)'):
        Two(4).apply(given)
    del given['params']['kernel']
    with pytest.raises(errors.ScopeParamNotFoundError, match='kernel'):
        Two(4).apply(given)
