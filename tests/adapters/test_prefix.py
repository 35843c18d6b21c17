"""Prefix tuning computes what `adapters` and `peft` compute, and what its papers say."""

import dataclasses
import functools

import adapters
import jax
import jax.numpy as jnp
import live_models
import numpy as np
import peft
import pytest
import reference
import small_bert
import tiny

from adapters_jax import attention, params
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.method import At
from adapters_jax.adapters.prefix import PrefixTuning, flat_from_reparametrised
from adapters_jax.model import attention_mask
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.block import Block, BlockConfig, Memory, causal
from adapters_jax.models.text import RELATIVE, TextStem
from adapters_jax.sites import IDENTITY, Dimensions, KeyValue, Stream

TOLERANCE = 2e-5
SMALL = {'prefix_length': 5, 'bottleneck_size': 7}
BERT_BASE = Dimensions(
    layers=12, hidden=768, feed_forward=3072, heads=12, word=768, vocabulary=30522, positions=512
)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SINGLY = [
    {},
    {'flat': True},
    {'leave_out': [0]},
    {'use_gating': True},
    {'use_gating': True, 'shared_gating': False, 'flat': True, 'leave_out': [1]},
]
REPEATED = [  # their path, with other sizes
    {'prefix_length': 1},
    {'prefix_length': 12, 'bottleneck_size': 40},
    {'non_linearity': 'relu'},
    {'non_linearity': 'leakyrelu'},
    {'flat': True, 'leave_out': [0, 2]},
    {'use_gating': True, 'shared_gating': False},
    {'dropout': 0.5, 'encoder_prefix': False, 'cross_prefix': False},
]


@pytest.mark.parametrize(
    'options', [*SINGLY, *(pytest.param(x, marks=pytest.mark.slow) for x in REPEATED)], ids=str
)
def test_each_option_as_in_adapters(options):
    assert difference(options, 'bert') <= TOLERANCE


@pytest.mark.parametrize('flat', [True, False])
def test_roberta_as_in_adapters(flat):
    assert difference({'flat': flat}, 'roberta') <= TOLERANCE


def difference(options, family):
    options = SMALL | options
    theirs = adapters.PrefixTuningConfig(**options)
    model = live_models.adapters_model(theirs, family, num_hidden_layers=3)
    # The library's gate looks at padding, too.
    ids, mask = reference.texts(model, padded=not options.get('use_gating', False))
    tree = live_models.prefix_tree(model)
    method = PrefixTuning(**options)
    found = live_models.our_hidden(method, tree, model, ids, mask)
    expected = reference.torch_hidden(model, ids, mask)
    model.set_active_adapters(None)
    assert np.abs(reference.torch_hidden(model, ids, mask)[-1] - expected[-1]).max() > 0.01
    return live_models.difference(found, expected)


@pytest.mark.parametrize('family', ['bert', 'roberta'])
@pytest.mark.parametrize('projection', [False, True])
def test_as_in_peft(family, projection):
    config = peft.PrefixTuningConfig(
        task_type='FEATURE_EXTRACTION',
        num_virtual_tokens=5,
        prefix_projection=projection,
        encoder_hidden_size=7,
    )
    model = live_models.peft_model(config, family)
    ids, mask = reference.texts(model)
    expected = reference.torch_hidden(model, ids, mask)

    saved = reference.to_array(model.get_prompt_embedding_to_save('default'))
    flat = live_models.prefix_from_tensors({'control_trans': saved}, range(2), 32)
    method = PrefixTuning(**SMALL, flat=True, shift_positions=True)
    found = live_models.our_hidden(method, flat, model, ids, mask)
    assert live_models.difference(found, expected, mask) <= TOLERANCE
    unshifted = dataclasses.replace(method, shift_positions=False)
    found = live_models.our_hidden(unshifted, flat, model, ids, mask)
    assert live_models.difference(found, expected, mask) > 0.1
    if projection:
        tensors = _as_in_adapters(model.prompt_encoder['default'].state_dict())
        tree = live_models.prefix_from_tensors(tensors, range(2), 32)
        method = PrefixTuning(**SMALL, shift_positions=True)
        found = live_models.our_hidden(method, tree, model, ids, mask)
        assert live_models.difference(found, expected, mask) <= TOLERANCE
        ejected = flat_from_reparametrised(method, tree)[1]
        assert jax.tree.structure(ejected) == jax.tree.structure(flat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ejected, flat)


def _as_in_adapters(tensors):
    names = {'embedding.': 'wte.', 'transform.': 'control_trans.'}
    renamed = {}
    for name, tensor in tensors.items():
        start = next(start for start in names if name.startswith(start))
        renamed[name.replace(start, names[start])] = reference.to_array(tensor)
    return renamed


@pytest.mark.parametrize(('flat', 'expected'), [(False, 9_872_384), (True, 552_960)])
def test_counts_at_bert_base(flat, expected):
    method = PrefixTuning(flat=flat)
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), BERT_BASE, {}))
    assert params.count(fresh) == expected


@pytest.mark.parametrize('options', [{'shift_positions': True}, {'flat': True, 'leave_out': [1]}])
def test_a_packed_text_has_the_states_it_has_alone(options):
    method = PrefixTuning(**SMALL, **options)
    assert method.packable
    tree = small_bert.fresh(method, sigma=0.3)
    items = small_bert.texts([5, 9])
    for one, padded, packed in small_bert.hidden_by_layout(
        method, tree, small_bert.backbone(), items
    ):
        np.testing.assert_allclose(padded, one, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(packed, one, atol=TOLERANCE, rtol=0)


def test_a_text_is_as_far_from_a_counted_prefix_wherever_it_stands():
    """A packed row of T5 has relative positions of its own, which a second text would not."""
    stem = TextStem(40, RELATIVE, buckets=8, distance=20)
    config = dataclasses.replace(small_bert.CONFIG, layers=1, pooler=False, stem=stem)
    weights = Backbone(config).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))['params']
    weights = small_bert.perturb(weights, 0, 0.3)
    text, other = np.arange(5, 12)[None], np.arange(20, 26)[None]
    positions = np.r_[: text.shape[1], : other.shape[1]][None]
    segments = np.repeat([1, 2], (text.shape[1], other.shape[1]))
    mask = (segments[:, None] == segments)[None, None]
    for counted in (False, True):
        method = PrefixTuning(**SMALL, count_keys=counted)
        sites = bind(method, method.init(jax.random.key(1), config.dimensions, weights), None)
        run = functools.partial(Backbone(config).apply, {'params': weights}, sites=sites)
        row = run(np.concatenate([text, other], 1), positions=positions, mask=mask)
        same = np.allclose(row[:, text.shape[1] :], run(other), atol=TOLERANCE)
        assert same == method.packable == (not counted)


def test_a_gate_sees_the_text_and_no_padding():
    method = PrefixTuning(**SMALL, use_gating=True, shared_gating=False)
    assert not method.packable
    tree, weights = small_bert.fresh(method, sigma=0.5), small_bert.backbone()
    (text,) = small_bert.texts([6])
    alone = small_bert.run(method, tree, weights, text[None])[0]
    ids, inputs = small_bert.padded([text], 32)
    row = small_bert.run(method, tree, weights, ids, **inputs)
    np.testing.assert_allclose(row[0, :6], alone, atol=TOLERANCE, rtol=0)
    # The same row with a mask for every token: one in which padding looks at padding.
    segments = (ids > 0).astype(np.int32)
    square = attention_mask(segments, examples=2)
    assert square[0, 0, 20, 20]
    row = small_bert.run(method, tree, weights, ids, mask=square)
    np.testing.assert_allclose(row[0, :6], alone, atol=TOLERANCE, rtol=0)


def test_a_gate_sees_the_whole_text_where_the_attention_is_causal():
    method = PrefixTuning(prefix_length=4, flat=True, use_gating=True)
    tree = small_bert.fresh(method, sigma=0.5)['layer_0']['attention']
    row = (np.arange(5) < 3)[None, None, None, :]
    heads = draw(0, 1, 5, 3, 8)
    seen = KeyValue(inputs=draw(1, 1, 5, 24), key=heads, value=heads, mask=row, text_mask=row)
    at = At(layer=0, name='attention', shared={}, key=None)
    expected = method.key_value(tree, seen, at).key
    found = method.key_value(tree, seen.replace(text_mask=causal(row, 5)), at).key
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('masked', [True, False])
def test_it_mixes_two_attentions(masked):
    """He et al. 2022, eq. 7: a head with a prefix is a weighted sum of two heads."""
    method = PrefixTuning(prefix_length=4, flat=True)
    own = {'prefix': {'key': jnp.asarray(draw(0, 4, 6)), 'value': jnp.asarray(draw(1, 4, 6))}}
    query, key, value = (draw(i, 2, 5, 3, 2) for i in (2, 3, 4))
    mask = np.arange(5)[None, :] < np.array([[3], [5]]) if masked else None
    mask = None if mask is None else mask[:, None, None, :]
    seen = KeyValue(inputs=draw(5, 2, 5, 6), key=key, value=value, mask=mask, text_mask=mask)
    at = At(layer=0, name='attention', shared={}, key=None)
    full = method.key_value(own, seen, at)
    found = attention.attend(query, full.key, full.value, full.mask)

    one, other = (own['prefix'][name].reshape(1, 4, 3, 2) for name in ('key', 'value'))
    there = jnp.einsum('BTHK,BPHK->BTHP', query, jnp.broadcast_to(one, (2, 4, 3, 2))) / 2**0.5
    text = jnp.einsum('BTHK,BSHK->BTHS', query, key) / 2**0.5
    text = text if mask is None else jnp.where(mask, text, -jnp.inf)
    mass = [jnp.exp(x).sum(-1, keepdims=True) for x in (there, text)]
    share = mass[0] / (mass[0] + mass[1])
    assert 0.05 < float(share.mean()) < 0.95
    prefix = attention.attend(
        query, *(jnp.broadcast_to(x, (2, 4, 3, 2)) for x in (one, other)), None
    )
    plain = attention.attend(query, key, value, mask)
    np.testing.assert_allclose(found, (1 - share) * plain + share * prefix, atol=1e-6, rtol=0)


def test_cross_attention_has_a_prefix_of_its_own():
    config = BlockConfig(hidden=24, feed_forward=32, heads=3, cross_attention=True)
    block = Block(config, 0)
    stream = Stream(hidden=draw(0, 2, 5, 24), mask=None, word_vectors=draw(1, 2, 5, 24))
    memory, mask = draw(2, 2, 7, 24), np.arange(7)[None] < np.array([[7], [4]])
    given = Memory(memory, mask[:, None, None, :], mask[:, None, None, :])
    weights = jax.jit(lambda: block.init(jax.random.key(0), stream, IDENTITY, True, given))()
    dimensions = dataclasses.replace(small_bert.DIMENSIONS, decoder_layers=1, layers=1)

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, tree):
        return block.apply(weights, stream, sites(method, tree), True, given).hidden

    method = PrefixTuning(**SMALL)
    tree = method.init(jax.random.key(1), dimensions, {})
    assert set(tree['layer_0']) == {'attention', 'cross_attention'}
    assert set(tree['shared']) == {'decoder_prefix', 'cross_attention'}
    without = PrefixTuning(**SMALL, cross_prefix=False)
    alone = without.init(jax.random.key(1), dimensions, {})
    assert set(alone['layer_0']) == {'attention'}
    assert set(alone['shared']) == {'decoder_prefix'}
    assert np.abs(run(method, tree) - run(without, alone)).max() > 1e-3
    gradients = jax.jit(jax.grad(lambda tree: jnp.square(run(method, tree)).sum()))(tree)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def sites(method, tree):
    return small_bert.Adapted(params=tree, key=None, method=method)


@pytest.mark.parametrize('gated', [True, False])
def test_without_its_network_it_computes_the_same(gated):
    method = PrefixTuning(**SMALL, use_gating=gated, leave_out=(0,), init_weights_seed=2)
    tree = small_bert.fresh(method, sigma=0.3)
    flat_method, flat = flat_from_reparametrised(method, tree)
    assert flat_method == dataclasses.replace(method, flat=True)
    expected = jax.eval_shape(lambda: small_bert.fresh(flat_method))
    assert jax.tree.map(jnp.shape, flat) == jax.tree.map(jnp.shape, expected)
    ids, inputs = small_bert.padded(small_bert.texts([4, 8]), 8)
    runs = [
        small_bert.run(one, own, small_bert.backbone(), ids, **inputs)
        for one, own in ((method, tree), (flat_method, flat))
    ]
    np.testing.assert_allclose(*runs, atol=1e-6, rtol=0)
    again = flat_from_reparametrised(flat_method, flat)
    assert again[0] is flat_method
    assert again[1] is flat


def key_values(method, tree, key, rows=64):
    heads = np.zeros((rows, 2, 3, 8), np.float32)
    inputs = np.zeros((rows, 2, 24), np.float32)
    seen = KeyValue(inputs=inputs, key=heads, value=heads, mask=None, text_mask=None)
    at = At(layer=0, name='attention', shared=tree.get('shared', {}), key=key)
    found = method.key_value(tree['layer_0']['attention'], seen, at)
    return found.key[:, : method.prefix_length], found.value[:, : method.prefix_length]


def test_dropout_acts_in_training_only_and_on_every_row_apart():
    method = PrefixTuning(**SMALL, flat=True, dropout=0.5)
    tree = small_bert.fresh(method)
    still = key_values(method, tree, None)
    for kept, dropped in zip(still, key_values(method, tree, jax.random.key(0)), strict=True):
        zero = np.asarray(dropped == 0)
        assert 0.45 < zero.mean() < 0.55
        assert (zero[0] != zero[1]).any()
        np.testing.assert_allclose(dropped[~zero], 2 * kept[~zero], rtol=1e-6)
    one, other = key_values(method, tree, jax.random.key(0))
    assert ((one == 0) != (other == 0)).any()


def test_it_computes_in_the_type_of_the_activations():
    method = PrefixTuning(**SMALL, use_gating=True)
    tree, weights = small_bert.fresh(method, sigma=0.2), small_bert.backbone()
    (text,) = small_bert.texts([6])
    model = Backbone(small_bert.CONFIG, jnp.bfloat16)
    found = small_bert.run(method, tree, weights, text[None], model=model)
    assert found.dtype == jnp.bfloat16
    wide = small_bert.run(method, tree, weights, text[None])
    assert np.abs(found.astype(jnp.float32) - wide).mean() < 0.05


def test_fresh_weights():
    flat = PrefixTuning(prefix_length=200, flat=True, init_weights_seed=7)
    values = small_bert.fresh(flat)['layer_1']['attention']['prefix']['value']
    assert abs(float(values.std()) - 1) < 0.05
    method = PrefixTuning(**SMALL, init_weights_seed=7)
    one, other = (small_bert.fresh(method, seed) for seed in (0, 1))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))
    unseeded = PrefixTuning(**SMALL)
    one, other = (params.flatten(small_bert.fresh(unseeded, seed)) for seed in (0, 1))
    assert not any(np.array_equal(one[p], other[p]) for p in one if not p.endswith('bias'))
    leaves = [np.asarray(leaf).tobytes() for path, leaf in one.items() if 'kernel' in path]
    assert len(set(leaves)) == len(leaves)


def test_the_layers_below_the_first_prefix_are_trunk():
    method = PrefixTuning(**SMALL, leave_out=(0, 1))
    tree = small_bert.fresh(method)
    assert set(tree) == {'shared', 'layer_2'}
    assert method.first_layer(tree, small_bert.DIMENSIONS) == 2
    # Text that stands elsewhere is other text for the lowest layer, too.
    moved = PrefixTuning(**SMALL, leave_out=(0, 1), shift_positions=True)
    assert moved.first_layer(tree, small_bert.DIMENSIONS) == 0


def test_text_gets_the_positions_that_are_left():
    assert tiny.model(PrefixTuning(prefix_length=6)).text_positions == 32
    assert tiny.model(PrefixTuning(prefix_length=6, shift_positions=True)).text_positions == 26
    for length in (32, 40):
        with pytest.raises(ValueError, match='leaves no position for the text; the backbone has'):
            tiny.params(tiny.model(PrefixTuning(prefix_length=length, shift_positions=True)))
    tiny.params(tiny.model(PrefixTuning(prefix_length=40, bottleneck_size=2)))
    images = dataclasses.replace(small_bert.DIMENSIONS, reads_words=False)
    with pytest.raises(ValueError, match='moves words, and the backbone reads none'):
        PrefixTuning(**SMALL, shift_positions=True).init(jax.random.key(0), images, {})


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'prefix_length': 0}, 'prefix_length=0 is not at least 1'),
        ({'bottleneck_size': 0}, 'bottleneck_size=0 is not at least 1'),
        ({'dropout': 1.0}, r'dropout=1.0 is not in \[0, 1\)'),
        ({'non_linearity': 'step'}, "unknown activation 'step'"),
        ({'flat': 1}, 'flat=1 is not valid; expected True or False'),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PrefixTuning(**options)
