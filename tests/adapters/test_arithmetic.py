"""Sums, averages and negation of adapters: exact where they can be, refused where senseless."""

import re

import adapters
import hypothesis.extra.numpy as numpy_strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small_bert as small
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import params
from adapters_jax.adapters import arithmetic
from adapters_jax.adapters.adalora import AdaLoRA
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.compacter import Compacter
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.method import At
from adapters_jax.adapters.mtl_lora import MTLLoRA
from adapters_jax.adapters.union import Union
from adapters_jax.adapters.vera import VeRA
from adapters_jax.sites import Linear, Stream, SubLayer

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SHAPES = {'layer_0/attention/query/a': (3, 2), 'layer_0/attention/query/b': (2, 4)}


def trees(elements, dtype=np.float32):
    leaves = {p: numpy_strategies.arrays(dtype, s, elements=elements) for p, s in SHAPES.items()}
    return st.fixed_dictionaries(leaves).map(params.unflatten)


ANY = trees(st.floats(width=32, allow_nan=False, allow_infinity=False))
PLAIN = trees(st.floats(-8, 8, width=32))
WEIGHTS = st.floats(-3, 3)


def random_tree(seed, shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return params.unflatten({p: rng.standard_normal(s).astype(dtype) for p, s in shapes.items()})


def assert_close(a, b, atol=1e-5):
    a, b = params.flatten(a), params.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], rtol=1e-5, atol=atol, err_msg=path)


def assert_same_bits(a, b):
    a, b = params.flatten(a), params.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert type(a[path]) is type(b[path]) and a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(
            np.asarray(a[path]).view(np.uint8), np.asarray(b[path]).view(np.uint8), err_msg=path
        )


@QUICK
@given(ANY, st.lists(st.floats(0.01, 100), min_size=1, max_size=7), st.booleans())
def test_the_average_of_equal_adapters_is_that_adapter_bit_for_bit(tree, weights, weighted):
    copies = [tree] * len(weights)
    assert_same_bits(arithmetic.average(copies, weights if weighted else None), tree)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('count', [2, 3, 7])
def test_the_average_keeps_type_and_kind_of_the_leaves(dtype, count):
    tree = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_tree(0))
    assert_same_bits(arithmetic.average([tree] * count), tree)


@QUICK
@given(st.lists(st.tuples(PLAIN, st.floats(0.1, 3)), min_size=2, max_size=4), st.randoms())
def test_the_average_does_not_depend_on_the_order(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert_close(*(arithmetic.average(*zip(*x, strict=True)) for x in (pairs, shuffled)))


@QUICK
@given(PLAIN, PLAIN, PLAIN, PLAIN, st.floats(0, 1))
def test_the_average_is_linear(a, b, c, d, weight):
    def average(x, y):
        return arithmetic.average([x, y], [weight, 1 - weight])

    def plus(x, y):
        return jax.tree.map(lambda p, q: p + q, x, y)

    assert_close(average(plus(a, c), plus(b, d)), plus(average(a, b), average(c, d)))
    assert_close(average(a, b), arithmetic.add([a, b], [weight, 1 - weight]))


@QUICK
@given(PLAIN, PLAIN, WEIGHTS, WEIGHTS)
def test_sums_take_any_weights(a, b, v, w):
    expected = jax.tree.map(lambda x, y: v * x + w * y, a, b)
    assert_close(arithmetic.add([a, b], [v, w]), expected)
    assert_close(arithmetic.average([a, b], [v, w], normalise=False), expected)
    start = jax.tree.map(np.ones_like, a)
    expected = jax.tree.map(lambda x, y: 1 + v * (x - 1) + w * (y - 1), a, b)
    assert_close(arithmetic.add([a, b], [v, w], origin=start), expected)


def test_negative_weights_are_normalised_too():
    a, b = random_tree(0), random_tree(1)
    expected = jax.tree.map(lambda x, y: (3 * x - y) / 2, a, b)
    assert_close(arithmetic.average([a, b], [3, -1]), expected)


def test_sums_are_accumulated_wider_than_the_leaves():
    tiny = {'b': jnp.full(3, 1.0, jnp.bfloat16)}
    big = {'b': jnp.full(3, 256.0, jnp.bfloat16)}
    total = arithmetic.add([big, tiny, tiny], [1.0, 1.0, 1.0])['b']
    np.testing.assert_array_equal(total, jnp.full(3, 258.0, jnp.bfloat16))  # 256 + 1 is 256 there


def test_linear_averages_of_the_library():
    """`average_adapter` of `adapters`, linear and with only b negated, gives what we give."""
    model = reference.torch_model(num_hidden_layers=2)
    for name in ('x', 'y'):
        model.add_adapter(name, config=adapters.LoRAConfig(r=2, alpha=4))
    reference.randomise(model, 1)
    weights = [0.7, -0.4]
    options = {'weights': weights, 'normalize_weights': False}
    model.average_adapter('sum', ['x', 'y'], combine_strategy='linear', **options)
    strategy = 'lora_linear_only_negate_b'
    model.average_adapter('negated', ['x', 'y'], combine_strategy=strategy, **options)
    x, y, total, negated = (lora_of(model, name) for name in ('x', 'y', 'sum', 'negated'))
    method = LoRA(r=2, alpha=4)
    assert_close(arithmetic.add([x, y], weights), total, atol=1e-7)
    turned = arithmetic.add([x, arithmetic.negate(method, y)], [0.7, 0.4])
    assert_close(turned, negated, atol=1e-7)


def lora_of(model, adapter):
    found = {}
    for name, tensor in model.named_parameters():
        pattern = rf'encoder\.layer\.(\d+)\.attention\.self\.(\w+)\.loras\.{adapter}\.lora_(A|B)'
        if match := re.fullmatch(pattern, name):
            path = f'layer_{match[1]}/attention/{match[2]}/{match[3].lower()}'
            found[path] = reference.to_array(tensor, flip=True)
    return params.unflatten(found)


def change_of_projection(method, tree):
    """Return what an adapter adds to the output of one projection."""
    rng = np.random.default_rng(5)
    x, kernel, bias = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, 24), (24, 24), 24)
    )
    output = x @ kernel + bias.reshape(1, 1, -1)
    at = At(layer=1, name='attention/value', shared={}, key=None, constants=tree.get('constants'))
    node = tree['layer_1']['attention']['value']
    end = Linear(inputs=x, kernel=kernel, bias=bias, output=output, mask=None)
    return method.linear(node, end, at) - output


@pytest.mark.parametrize(
    'method',
    [
        LoRA(r=3, alpha=5),
        LoRA(r=2, use_gating=True),
        AdaLoRA(r=3, target_r=2),
        MTLLoRA(r=2, n_up_projection=2),
        VeRA(r=4),
        IA3(),
    ],
    ids=lambda method: method.architecture,
)
def test_negation_turns_the_change_of_a_projection_around(method):
    tree = small.perturb(method.init(jax.random.key(0), small.DIMENSIONS, {}), 1, 0.3)
    change = change_of_projection(method, tree)
    assert np.abs(change).max() > 0.01
    turned = arithmetic.negate(method, tree)
    np.testing.assert_allclose(change_of_projection(method, turned), -change, rtol=1e-5, atol=2e-5)
    assert_close(arithmetic.negate(method, turned), tree, atol=2e-7)


BOTTLENECK = {'mh_adapter': False, 'output_adapter': True, 'non_linearity': 'tanh'}


@pytest.mark.parametrize(
    'method',
    [
        Bottleneck(size=4, **BOTTLENECK),
        Bottleneck(size=4, ln_after=True, scaling='channel', use_gating=True, **BOTTLENECK),
        Compacter(reduction_factor=4, phm_dim=2, phm_rank=1, **BOTTLENECK),
        Compacter(reduction_factor=4, phm_dim=2, shared_W_phm=True, **BOTTLENECK),
    ],
    ids=['plain', 'norm after', 'compacter', 'shared compacter'],
)
def test_negation_turns_the_change_of_a_sub_layer_around(method):
    tree = small.perturb(method.init(jax.random.key(0), small.DIMENSIONS, {}), 1, 0.3)
    rng = np.random.default_rng(5)
    output, residual = (jnp.asarray(rng.standard_normal((2, 3, 24)), jnp.float32) for _ in '12')
    stream = Stream(hidden=output, mask=None, word_vectors=output)
    end = SubLayer(output=output, residual=residual, norm=None, stream=stream)

    def change(tree):
        shared, constants = tree.get('shared', {}), tree.get('constants', {})
        at = At(layer=1, name='feed_forward', shared=shared, key=None, constants=constants)
        return method.sub_layer(tree['layer_1']['feed_forward'], end, at) - end.finish(output)

    assert np.abs(change(tree)).max() > 0.01
    turned = change(arithmetic.negate(method, tree))
    np.testing.assert_allclose(turned, -change(tree), rtol=1e-5, atol=2e-5)


def test_the_members_of_a_union_are_negated_one_by_one():
    members = LoRA(r=2), Bottleneck(size=4, **BOTTLENECK)
    method = Union(members=members)
    tree = small.perturb(method.init(jax.random.key(0), small.DIMENSIONS, {}), 1, 0.3)
    turned = arithmetic.negate(method, tree)
    for name, member in method.named().items():
        assert_same_bits(turned[name], arithmetic.negate(member, tree[name]))


@pytest.mark.parametrize(
    'method',
    [
        DoRA(),
        IA3(use_gating=True),
        Bottleneck(size=4, ln_after=True, adapter_residual_before_ln=True, **BOTTLENECK),
    ],
    ids=lambda method: method.architecture,
)
def test_what_has_no_negation_is_refused(method):
    with pytest.raises(ValueError, match=f'{method.architecture} with these options has no nega'):
        arithmetic.negate(method, {})


def test_constants_are_no_part_of_the_vector():
    method = VeRA(r=4)
    trees = [method.init(jax.random.key(seed), small.DIMENSIONS, {}) for seed in (0, 1)]
    for total in (arithmetic.add(trees, [2.0, 3.0]), arithmetic.negate(method, trees[0])):
        assert_same_bits(total['constants'], trees[0]['constants'])
    query = arithmetic.add(trees, [2.0, 3.0])['layer_0']['attention']['query']
    np.testing.assert_allclose(query['d'], np.full(4, 0.5), rtol=1e-6)
    other = VeRA(r=4, projection_seed=1).init(jax.random.key(0), small.DIMENSIONS, {})
    with pytest.raises(ValueError, match='constants/a differs between adapters 1 and 2'):
        arithmetic.average([trees[0], other])


@pytest.mark.parametrize(
    ('weights', 'sentence'),
    [
        ([1.0, -1.0], r'the weights [1.0, -1.0] sum to zero and cannot be normalised'),
        ([0.1 + 0.2, -0.3], 'sum to zero'),
        ([0.0, 0.0], 'sum to zero'),
        ([1.0], '1 weights for 2 adapters'),
        ([1.0, float('nan')], 'are not all finite'),
    ],
)
def test_weights_that_mean_nothing(weights, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        arithmetic.average([random_tree(0), random_tree(1)], weights)


def test_weights_may_sum_to_zero_where_they_are_not_normalised():
    tree = random_tree(0)
    total = arithmetic.average([tree, tree], [1.0, -1.0], normalise=False)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(total))


def test_adapters_that_differ_are_refused_by_name():
    tree = random_tree(0)
    extra = random_tree(1, SHAPES | {'layer_0/attention/value/a': (3, 2)})
    missing = 'adapter 2 has layer_0/attention/value/a and adapter 1 has not'
    with pytest.raises(ValueError, match=missing):
        arithmetic.average([tree, extra])
    with pytest.raises(ValueError, match=missing.replace('2', '3')):
        arithmetic.add([tree, tree, extra], [1, 1, 1])
    wide = random_tree(1, SHAPES | {'layer_0/attention/query/b': (2, 5)})
    with pytest.raises(ValueError, match=re.escape('query/b has shape (2, 4) in adapter 1 and (2')):
        arithmetic.average([tree, wide])
    with pytest.raises(ValueError, match='there is no adapter to combine'):
        arithmetic.average([])
