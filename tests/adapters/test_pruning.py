"""A pruned fusion computes what the fusion does when the others' scores are minus infinity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adapters_jax.adapters import fusion, pruning, registry
from adapters_jax.adapters.composed import Composed


@pytest.fixture(scope='module')
def fused():
    """A fusion of three adapters above a fourth one, its parameters, and a batch."""
    members = {name: registry.create('pfeiffer[size=4]') for name in 'abcd'}
    method = Composed(expression='stack(d, fuse(a, b, c))', members=members, frozen_members='abc')
    model = tiny.model(method)
    params = tiny.params(model)
    rng = np.random.default_rng(0)
    own = jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), params['adapters']
    )
    return model, params | {'adapters': own}, tiny.batch([[9], [12], [5, 6]], 12)


def flops(model, params, batch):
    return jax.jit(model.apply).lower(params, batch).compile().cost_analysis()['flops']


def test_the_weights_say_which_adapters_matter(fused):
    model, params, batch = fused
    record = {}
    plain = model.apply(params, batch)
    np.testing.assert_array_equal(model.apply(params, batch, record=record), plain)
    means = pruning.importance(record, batch['segments'] > 0)
    (found,) = pruning.by_fusion(means).values()
    assert record.keys() == {f'a,b,c/{place}' for place in found}
    assert found.keys() == {'layer_0/feed_forward', 'layer_1/feed_forward'}
    for weights in found.values():
        np.testing.assert_allclose(weights.sum(), 1, atol=1e-5)
        assert weights.shape == (3,)
    two = pruning.strongest(found, 'abc', 2)
    total = np.sum(list(found.values()), axis=0)
    assert set(two) == {'abc'[i] for i in np.argsort(-total)[:2]}
    with pytest.raises(ValueError, match='4 of 3 adapters cannot be kept'):
        pruning.strongest(found, 'abc', 4)


def test_pruned_and_masked_are_the_same(fused, monkeypatch):
    model, params, batch = fused
    method, tree = pruning.prune(model.method, params['adapters']['default'], 'ac')
    assert method.expression == 'stack(d, fuse(a, c))' and method.frozen_members == ('a', 'c')
    smaller = tiny.model(method)
    own = params | {'adapters': {'default': tree}}
    found = smaller.apply(own, batch)
    assert flops(smaller, own, batch) < flops(model, params, batch)
    softmax = jax.nn.softmax
    hide = jnp.array([0.0, -jnp.inf, 0.0]).reshape(1, 1, 3)
    monkeypatch.setattr(fusion.jax.nn, 'softmax', lambda x, axis: softmax(
        x + hide if x.shape[-1] == 3 and x.ndim == 3 else x, axis=axis))  # fmt: skip
    np.testing.assert_allclose(found, model.apply(params, batch), atol=1e-5)


def test_what_cannot_be_pruned(fused):
    model, params, _ = fused
    with pytest.raises(ValueError, match=r"\['d'\] are not fused; fused are a, b, c"):
        pruning.prune(model.method, params['adapters']['default'], 'ad')
    with pytest.raises(ValueError, match=r'fuse\(a, b, c\) is left with no adapters'):
        pruning.prune(model.method, params['adapters']['default'], '')


def test_fusions_that_would_become_one_are_not_pruned():
    members = dict.fromkeys('abc', registry.create('pfeiffer[size=4]'))
    method = Composed(expression='stack(fuse(a, b), fuse(a, c))', members=members)
    tree = method.init(jax.random.key(0), tiny.CONFIG.dimensions, {})
    with pytest.raises(ValueError, match=r"several fusions would mix \['a'\] and no more"):
        pruning.prune(method, tree, 'a')
    kept, _ = pruning.prune(method, tree, 'bc')
    assert kept.expression == 'stack(fuse(b), fuse(c))'
