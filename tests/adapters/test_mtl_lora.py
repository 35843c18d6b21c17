"""MTL-LoRA of one task computes what the `adapters` library computes."""

import re

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from adapters_jax import params
from adapters_jax.adapters import merging
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.mtl_lora import MTLLoRA
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Dimensions

TENSOR = re.compile(
    r'encoder\.layer\.(?P<layer>\d+)\.(?P<place>[\w.]+)\.loras\.a\.(?P<leaf>[\w.]+)'
)
PLACES = {
    'attention.self.query': 'attention/query',
    'attention.self.key': 'attention/key',
    'attention.self.value': 'attention/value',
    'intermediate.dense': 'feed_forward/up',
    'output.dense': 'feed_forward/down',
}
LEAVES = {
    'lora_A': 'a',
    'lora_B': 'b',
    'weights': 'weights',
    'task_specific.values': 'task/values',
    'gate.weight': 'gate/kernel',
    'gate.bias': 'gate/bias',
}
EVERYWHERE = {
    'attn_matrices': ['q', 'k', 'v'],
    'intermediate_lora': True,
    'output_lora': True,
}
BERT_BASE = Dimensions(
    layers=12,
    hidden=768,
    feed_forward=3072,
    heads=12,
    word=768,
    vocabulary=30522,
    positions=512,
)


def live(options, weights=True):
    """Return a model of `adapters` with a random MTL-LoRA, and that as our tree."""
    model = reference.torch_model(num_hidden_layers=2)
    model.add_adapter('a', config=adapters.MTLLoRAConfig(**options))
    model.set_active_adapters('a')
    if weights:
        reference.randomise(model, 1)
    leaves = {}
    for name, tensor in model.named_parameters():
        if found := TENSOR.fullmatch(name):
            path = f'layer_{found["layer"]}/{PLACES[found["place"]]}/{LEAVES[found["leaf"]]}'
            array = reference.to_array(tensor)
            leaves[path] = array.swapaxes(-1, -2) if array.ndim > 1 else array
    return model.eval(), params.unflatten(leaves)


def difference(model, method, tree, backbone=None, padded=True):
    """Return the largest difference of any hidden state between the library and ours."""
    ids, mask = reference.texts(model, padded=padded)
    expected = reference.torch_hidden(model, ids, mask)
    found = Backbone(reference.our_config(model)).apply(
        {'params': backbone or reference.backbone_tree(model)},
        ids,
        mask=mask[:, None, None, :],
        sites=bind(method, tree, None),
        all_hidden=True,
    )
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'n_up_projection': 3, 'weights_sharpness': 0.4, 'r': 3, 'alpha': 7},
        {'n_up_projection': 2, 'dropout': 0.3, 'leave_out': [0], **EVERYWHERE},
    ],
    ids=str,
)
def test_the_forward_pass_is_that_of_the_library(options):
    model, tree = live(options)
    method = MTLLoRA(**options)
    dimensions = reference.our_config(model).dimensions
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), dimensions, {}))
    shapes = [params.flatten(jax.tree.map(jnp.shape, x)) for x in (fresh, tree)]
    assert shapes[0] == shapes[1]
    assert difference(model, method, tree) <= 2e-5
    merged = merging.merge(method, tree, reference.backbone_tree(model))
    assert difference(model, method, {}, merged) <= 2e-5


def test_a_gate_is_that_of_the_library_where_alpha_is_r():
    options = {'use_gating': True, 'n_up_projection': 2}
    model, tree = live(options)
    method = MTLLoRA(**options)
    assert difference(model, method, tree, padded=False) <= 2e-5
    with pytest.raises(ValueError, match='mtl_lora: it has use_gating=True and cannot be merged'):
        merging.merge(method, tree, reference.backbone_tree(model))


def test_a_matrix_for_the_task_does_what_a_diagonal_one_does():
    """The library cannot make its 'linear' matrix: the module sets values before it exists."""
    options = {'n_up_projection': 2, 'r': 3}
    model, tree = live(options)
    leaves = params.flatten(tree)
    linear = {
        path.replace('task/values', 'task/matrix'): jnp.diag(x) if 'task' in path else x
        for path, x in leaves.items()
    }
    method = MTLLoRA(**options, task_specific_matrix_type='linear')
    assert difference(model, method, params.unflatten(linear)) <= 2e-5
    dimensions = reference.our_config(model).dimensions
    fresh = params.flatten(method.init(jax.random.key(0), dimensions, {}))
    assert fresh.keys() == linear.keys()
    np.testing.assert_array_equal(fresh['layer_0/attention/query/task/matrix'], np.eye(3))
    with pytest.raises(AttributeError, match=r'before Module.__init__'):
        live({'task_specific_matrix_type': 'linear'})


def test_a_matrix_that_is_not_symmetric_stands_between_a_and_b():
    rng = np.random.default_rng(0)
    a, matrix, b = (rng.standard_normal(s) for s in ((5, 2), (2, 2), (1, 2, 4)))
    node = {'a': a, 'b': b, 'weights': np.ones(1), 'task': {'matrix': matrix}}
    method = MTLLoRA(r=2, alpha=6, task_specific_matrix_type='linear')
    first, second = method.factors(node, 5, None)
    np.testing.assert_allclose(first @ second, 3 * a @ matrix @ b[0], rtol=1e-12)


def test_a_fresh_adapter_is_the_identity():
    model, _ = live({})
    model.set_active_adapters(None)
    dimensions = reference.our_config(model).dimensions
    for kind in ('singular_values', 'linear'):
        method = MTLLoRA(n_up_projection=2, task_specific_matrix_type=kind)
        tree = method.init(jax.random.key(0), dimensions, {})
        assert difference(model, method, tree) <= 2e-6


def test_fresh_parameters_are_drawn_as_the_library_draws_them():
    _, theirs = live({'n_up_projection': 2, 'init_weights': 'lora'}, weights=False)
    ours = MTLLoRA(n_up_projection=2).init(jax.random.key(0), BERT_BASE, {})
    theirs = theirs['layer_0']['attention']['query']
    ours = ours['layer_0']['attention']['query']
    for path, leaf in params.flatten(theirs).items():
        if path == 'weights':  # equal there, and so they would stay
            assert 0 < np.ptp(params.flatten(ours)[path]) < 0.2
        elif path != 'a':
            np.testing.assert_array_equal(np.unique(params.flatten(ours)[path]), np.unique(leaf))
    for a in (theirs['a'], ours['a']):
        bound = len(a) ** -0.5
        assert 0.9 * bound < np.abs(a).max() <= bound


def test_the_count_at_bert_base():
    fresh = jax.eval_shape(lambda: MTLLoRA().init(jax.random.key(0), BERT_BASE, {}))
    assert params.count(fresh) == 295_128


def test_the_defaults_are_those_of_the_library():
    theirs, ours = adapters.MTLLoRAConfig().to_dict(), MTLLoRA().to_json()
    shared = {name: value for name, value in theirs.items() if name in ours}
    assert len(shared) == 15 and shared == {name: ours[name] for name in shared}
    assert MTLLoRA.from_fields({k: v for k, v in ours.items() if k != 'architecture'}) == MTLLoRA()


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'n_up_projection': 0}, 'n_up_projection=0 is not at least 1'),
        ({'weights_sharpness': 0.0}, 'weights_sharpness=0.0 is not above 0'),
        ({'alpha': -1}, 'alpha=-1 is not above 0'),
        ({'task_specific_matrix_type': 'full'}, "'singular_values' or 'linear'"),
    ],
)
def test_values_out_of_range(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        MTLLoRA(**options)
