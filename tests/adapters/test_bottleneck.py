"""The bottleneck family beyond parity: initialisation, randomness, refusals, banks, layouts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bert as small

from adapters_jax import params
from adapters_jax.adapters import registry
from adapters_jax.adapters.binding import Adapted
from adapters_jax.adapters.bottleneck import Bottleneck, gate, skip_examples
from adapters_jax.adapters.method import At
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.block import Block, BlockConfig, Memory
from adapters_jax.sites import IDENTITY, Dimensions, Stream, SubLayer

DISTINCT = ['houlsby', 'pfeiffer', 'scaled_par_bn']
WIDE = Dimensions(
    layers=2, hidden=512, feed_forward=8, heads=8, word=512, vocabulary=9, positions=9
)


def seq_bn(**options):
    fields = {'mh_adapter': True, 'output_adapter': True, 'size': 8, 'non_linearity': 'tanh'}
    return Bottleneck(**fields | options)


def end_of_sub_layer(seed=0, batch=2, length=5, mask=None):
    rng = np.random.default_rng(seed)
    shape = (batch, length, small.DIMENSIONS.hidden)
    output, residual = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    stream = Stream(hidden=residual, mask=mask, word_vectors=residual)
    return SubLayer(output=output, residual=residual, norm=jnp.tanh, stream=stream)


@functools.cache
def plain():
    """Return texts, and the last hidden states of the backbone alone."""
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    run = jax.jit(lambda w: Backbone(small.CONFIG).apply({'params': w}, ids, **inputs))
    return ids, inputs, run(small.backbone())


@pytest.mark.parametrize('name', DISTINCT)
def test_zero_start_is_the_plain_backbone_to_the_bit(name):
    method = registry.create(f'{name}[init_weights=zero]')
    ids, inputs, expected = plain()
    tree = small.fresh(method)
    run = jax.jit(lambda w, t: small.forward(method, t, w, ids, **inputs))
    np.testing.assert_array_equal(run(small.backbone(), tree), expected)
    moved = run(small.backbone(), small.perturb(tree, 1, 0.1))
    assert np.abs(moved - expected).max() > 0.01


def test_left_out_layers_have_no_parameters():
    tree = small.fresh(seq_bn(leave_out=[0, 2]))
    assert set(tree) == {'layer_1'}
    assert seq_bn(leave_out=[0, 2]).first_layer(tree, small.DIMENSIONS) == 1
    assert set(small.fresh(seq_bn(mh_adapter=False))['layer_0']) == {'feed_forward'}


@pytest.mark.parametrize(('leave_out', 'word'), [([3], 'layer 3'), ([0, 1, 2], 'every layer')])
def test_leave_out_that_does_not_fit_the_backbone(leave_out, word):
    with pytest.raises(ValueError, match=word):
        small.fresh(seq_bn(leave_out=leave_out))


def test_width_by_layer():
    method = seq_bn(size=None, reduction_factor={1: 2, 'default': 24})
    tree = small.fresh(method)
    widths = [tree[f'layer_{i}']['attention']['down']['kernel'].shape[1] for i in range(3)]
    assert widths == [1, 12, 1]
    with pytest.raises(ValueError, match=r"no entry for layer 0 and no 'default'"):
        small.fresh(seq_bn(size=None, reduction_factor={'1': 2}))


def init_of(name, **options):
    method = seq_bn(init_weights=name, size=256, use_gating=True, **options)
    return method.init(jax.random.key(0), WIDE, {})['layer_1']['attention']


def test_bert_start():
    one = init_of('bert')
    for part in ('down', 'up'):
        kernel = one[part]['kernel']
        assert abs(kernel.std() - 0.02) < 2e-4 and abs(kernel.mean()) < 2e-4
        assert np.abs(kernel).max() > 0.06  # not truncated
        assert not one[part]['bias'].any()


@pytest.mark.parametrize('sigma', [1e-7, 0.3])
def test_the_sigma_of_the_start_is_an_option(sigma):
    for name in ('houlsby', 'zero'):
        one = init_of(name, init_sigma=sigma)
        np.testing.assert_allclose(
            one['down']['kernel'], init_of(name)['down']['kernel'] * sigma / 0.01, rtol=1e-5
        )
        assert one['up']['kernel'].any() == (name == 'houlsby')


def test_houlsby_start():
    one = init_of('houlsby')
    for part in ('down', 'up'):
        kernel = one[part]['kernel']
        assert 0.0199 < np.abs(kernel).max() <= 0.02
        assert abs(kernel.std() - 0.01 * 0.8796) < 1e-4  # of a normal cut at two sigma
        assert not one[part]['bias'].any()


def test_mam_adapter_and_zero_starts():
    kernel, bound = init_of('mam_adapter')['down']['kernel'], 512**-0.5
    assert 0.999 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() - bound / 3**0.5) < 0.01 * bound
    assert 0.0199 < np.abs(init_of('zero')['down']['kernel']).max() <= 0.02
    for name in ('mam_adapter', 'zero'):
        assert not init_of(name)['up']['kernel'].any()


def test_a_seed_fixes_the_start_and_no_two_places_share_it():
    def leaves(key, **options):
        tree = seq_bn(**options).init(jax.random.key(key), small.DIMENSIONS, {})
        return {path: np.asarray(leaf) for path, leaf in params.flatten(tree).items()}

    first, second = leaves(0, init_weights_seed=5), leaves(1, init_weights_seed=5)
    assert all((first[path] == second[path]).all() for path in first)
    assert any((leaves(0)[path] != leaves(1)[path]).any() for path in first)
    kernels = [leaf.tobytes() for path, leaf in first.items() if path.endswith('kernel')]
    assert len(set(kernels)) == len(kernels)


@pytest.mark.parametrize('name', DISTINCT)
def test_a_bank_is_a_vmap(name):
    method = registry.create(f'{name}[use_gating=True,ln_before=True,ln_after=True]')
    trees = [small.fresh(method, seed, sigma=0.3)['layer_1']['feed_forward'] for seed in range(3)]
    bank = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    end, at = end_of_sub_layer(), At(layer=1, name='feed_forward', shared={}, key=None)
    run = jax.jit(lambda tree: method.sub_layer(tree, end, at))
    together = jax.jit(jax.vmap(run))(bank)
    for tree, found in zip(trees, together, strict=True):
        np.testing.assert_allclose(found, run(tree), atol=2e-6)


def dropped(method, key, layer, name='feed_forward'):
    """Return which entries of a constant change survive at a site."""
    one = small.fresh(method)['layer_0']['feed_forward']
    one['up'] = {'kernel': 0 * one['up']['kernel'], 'bias': 1 + one['up']['bias']}
    sites = Adapted(params={f'layer_{layer}': {name: one}}, key=key, method=method)
    end = end_of_sub_layer()
    zero = jnp.zeros_like(end.output)
    end = SubLayer(output=zero, residual=zero, norm=None, stream=end.stream)
    return np.asarray(sites.sub_layer(layer, name, end))


def test_dropout_needs_a_key_and_differs_at_every_site():
    method, key = seq_bn(dropout=0.5), jax.random.key(0)
    assert (dropped(method, None, 0) == 1).all()
    places = [(layer, name) for layer in range(3) for name in ('attention', 'feed_forward')]
    masks = [dropped(method, key, *place) for place in places]
    assert len({mask.tobytes() for mask in masks}) == len(places)
    assert all(set(np.unique(mask)) == {0, 2} for mask in masks)
    assert all(0.35 < (mask > 0).mean() < 0.65 for mask in masks)
    np.testing.assert_array_equal(dropped(method, key, 0), dropped(method, key, 0))


def test_stochastic_depth_decides_once_an_example():
    x, key = jnp.ones((200, 12, 2)), jax.random.key(0)
    rows = np.asarray(skip_examples(x, 0.25, None, key))
    assert set(np.unique(rows)) == {0, np.float32(1 / 0.75)}
    assert (rows == rows[:, :1, :1]).all()
    assert abs((rows[:, 0, 0] > 0).mean() - 0.75) < 0.1

    segments = np.repeat([1, 2, 3, 0], [3, 5, 2, 2])
    mask = (segments[:, None] == segments) & (segments > 0)
    for shape in ((1, 1, 12, 12), (200, 1, 12, 12)):
        some = np.asarray(skip_examples(x, 0.25, jnp.broadcast_to(mask, shape), key))
        for segment in (1, 2, 3):
            one = some[:, segments == segment]
            assert (one == one[:, :1, :1]).all()
            assert abs((one[:, 0, 0] > 0).mean() - 0.75) < 0.1
        assert (some[:, 0, 0] != some[:, 3, 0]).any()
    assert skip_examples(x, 0.25, None, None) is x


def test_stochastic_depth_skips_the_adapter_alone():
    method = seq_bn(stochastic_depth=0.5, original_ln_after=False)
    tree = small.fresh(method, sigma=0.3)['layer_0']['attention']
    end = end_of_sub_layer(batch=64)
    at = At(layer=0, name='attention', shared={}, key=jax.random.key(0))
    change = method.sub_layer(tree, end, at) - end.output
    skipped = np.abs(change).max((1, 2)) == 0
    assert 0.2 < skipped.mean() < 0.8
    quiet = At(layer=0, name='attention', shared={}, key=None)
    whole = method.sub_layer(tree, end, quiet) - end.output
    np.testing.assert_allclose(change[~skipped], 2 * whole[~skipped], atol=1e-5)


@pytest.mark.parametrize(
    'name',
    [pytest.param(x, marks=[pytest.mark.slow] * (x != 'houlsby')) for x in DISTINCT],
)
def test_bfloat16(name):
    method = registry.create(f'{name}[use_gating=True]')
    weights, tree = small.backbone(), small.fresh(method, sigma=0.1)
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    half = Backbone(small.CONFIG, dtype=jnp.bfloat16)
    found = small.run(method, tree, weights, ids, model=half, **inputs)
    exact = small.run(method, tree, weights, ids, **inputs)
    assert found.dtype == jnp.bfloat16
    assert np.abs(found.astype(jnp.float32) - exact).max() < 0.02 * np.abs(exact).max()


def test_remat_changes_no_gradient():
    method = seq_bn(dropout=0.3, use_gating=True, scaling='channel')
    weights, tree = small.backbone(), small.fresh(method, sigma=0.1)
    tree = {'layer_0': tree['layer_0']}
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    one_layer = dataclasses.replace(small.CONFIG, layers=1)

    def gradient(remat):
        model, key = Backbone(one_layer, remat=remat), jax.random.key(1)

        def loss(t):
            hidden = small.forward(method, t, weights, ids, key=key, model=model, **inputs)
            return jnp.square(hidden[:, 0]).sum()

        return small.gradient(loss, tree)

    plain, again = gradient('none'), gradient('full')
    for path, leaf in plain.items():
        assert np.abs(leaf).max() > 0, path
        np.testing.assert_allclose(again[path], leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'name',
    [pytest.param(x, marks=[pytest.mark.slow] * (x == 'pfeiffer')) for x in DISTINCT],
)
def test_padding_and_packing_change_nothing(name):
    method = registry.create(f'{name}[use_gating=True]')
    tree = small.fresh(method, sigma=0.3)
    items = small.texts([9, 4, 9])
    for alone, in_rows, in_pack in small.hidden_by_layout(method, tree, small.backbone(), items):
        np.testing.assert_allclose(in_rows, alone, atol=2e-5)
        np.testing.assert_allclose(in_pack, alone, atol=2e-5)


@pytest.mark.parametrize('causal', [False, True])
def test_gate_is_the_mean_over_the_text_of_a_position(causal):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3)), jnp.float32)
    layer = {'kernel': jnp.asarray([[1.0], [-1.0], [0.5]]), 'bias': jnp.asarray([0.2])}
    opened = 1 / (1 + np.exp(-(np.asarray(x) @ np.array([1.0, -1.0, 0.5]) + 0.2)))
    np.testing.assert_allclose(gate(layer, x, None)[..., 0], opened.mean(1)[:, None], rtol=1e-6)
    texts = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    mask = np.tril(texts) if causal else texts
    found = gate(layer, x, mask[None, None])[..., 0]
    np.testing.assert_allclose(found, opened @ (texts / texts.sum(1, keepdims=True)).T, rtol=1e-6)
    # Of a row with one text: the padding at its end has no part, and sees what it may.
    padded = np.array([1, 1, 0, 0], bool)[None, None, None]
    padded = np.tril(np.broadcast_to(padded, (1, 1, 4, 4))) if causal else padded
    found = gate(layer, x, padded)[:, :2, 0]
    expected = np.broadcast_to(opened[:, :2].mean(1)[:, None], found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_train_norms_covers_the_layer_norms_and_nothing_else():
    method = registry.create('houlsby')
    rules = (*method.rules(small.DIMENSIONS), params.freeze('.*'))
    tuned, _ = params.partition({'backbone': small.backbone()}, rules)
    found = {path.rsplit('/', 1)[0] for path in params.flatten(tuned)}
    layers = [f'layer_{i}/{part}' for i in range(3) for part in ('attention', 'feed_forward')]
    assert found == {f'backbone/{part}/norm' for part in ('embeddings', *layers)}
    assert method.first_layer(small.fresh(method), small.DIMENSIONS) == 0
    assert registry.create('double_seq_bn').rules(small.DIMENSIONS) == ()


def test_cross_attention():
    config = BlockConfig(hidden=24, feed_forward=52, heads=3, cross_attention=True)
    dimensions = Dimensions(1, 24, 52, 3, 24, 50, 40, decoder_layers=1)
    method = seq_bn(cross_adapter=True, init_weights='zero')
    tree = method.init(jax.random.key(0), dimensions, {})
    assert set(tree['layer_0']) == {'attention', 'cross_attention', 'feed_forward'}
    assert set(small.fresh(method)['layer_0']) == {'attention', 'feed_forward'}

    memory = Memory(jax.random.normal(jax.random.key(1), (2, 7, 24)), None, None)
    x = jax.random.normal(jax.random.key(2), (2, 5, 24))
    stream = Stream(hidden=x, mask=None, word_vectors=x)
    block = Block(config, 0)
    weights = block.init(jax.random.key(3), stream, IDENTITY, True, memory)

    def run(sites):
        return block.apply(weights, stream, sites, True, memory).hidden

    plain = run(IDENTITY)
    np.testing.assert_array_equal(run(Adapted(tree, None, method)), plain)
    tree['layer_0'] = {'cross_attention': small.perturb(tree['layer_0']['cross_attention'], 0, 0.3)}
    assert np.abs(run(Adapted(tree, None, method)) - plain).max() > 0.01


def test_train_norms_covers_those_at_the_ends_of_both_stacks():
    """They belong to the lowest and to the highest layer of their stack."""
    dimensions = dataclasses.replace(WIDE, layers=4, decoder_layers=2)

    def trained(*left_out):
        method = registry.create(f'houlsby[leave_out={list(left_out)}]')
        rules = (*method.rules(dimensions), params.freeze('.*'))
        names = ('embeddings/norm', 'decoder_embeddings/norm', 'final_norm', 'decoder_final_norm')
        tree = params.unflatten({f'backbone/{name}/scale': np.ones(1) for name in names})
        found = params.flatten(params.partition(tree, rules)[0])
        return {path.split('/')[1] for path in found}

    ends = {'embeddings', 'decoder_embeddings', 'final_norm', 'decoder_final_norm'}
    assert trained() == ends
    assert trained(0) == ends - {'embeddings'}
    assert trained(1, 2) == {'embeddings', 'decoder_final_norm'}
    assert trained(3) == ends - {'decoder_final_norm'}


def test_a_width_for_a_layer_that_is_not_there_is_refused():
    method = seq_bn(size=None, reduction_factor={'3': 2, 'default': 4})
    with pytest.raises(ValueError, match='names layer 3, but the backbone has layers 0 to 2'):
        small.fresh(method)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'residual_before_ln': 'post_add'}, 'needs original_ln_before=True'),
        ({'size': 8, 'reduction_factor': 2}, 'give one of the two'),
        ({'size': None}, 'give one of the two'),
        ({'size': 0}, 'size=0 is not at least 1'),
        ({'size': 4.5}, 'size=4.5 is not valid; expected a whole number'),
        ({'size': None, 'reduction_factor': 0}, 'not above 0'),
        ({'size': None, 'reduction_factor': {'x': 1}}, "the key 'x'"),
        ({'size': None, 'reduction_factor': {'1': 'a'}}, "reduction_factor={'1': 'a'}"),
        ({'mh_adapter': False, 'output_adapter': False}, 'are all False'),
        ({'non_linearity': 'rellu'}, "unknown activation 'rellu'"),
        ({'init_sigma': 0.0}, 'init_sigma=0.0 is not above 0'),
        ({'init_weights': 'xavier'}, "expected 'bert' or 'mam_adapter'"),
        ({'scaling': 'big'}, "a number or 'learned' or 'channel'"),
        ({'scaling': True}, "a number or 'learned' or 'channel'"),
        ({'scaling': float('nan')}, 'scaling=nan'),
        ({'dropout': 1.0}, r'dropout=1.0 is not in [0, 1)'),
        ({'stochastic_depth': -0.1}, r'stochastic_depth=-0.1 is not in [0, 1)'),
        ({'use_gating': 1}, 'use_gating=1 is not valid; expected True or False'),
        ({'leave_out': 3}, 'leave_out=3 is not valid; expected a list'),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        seq_bn(**options)


def test_cross_adapter_alone_needs_cross_attention():
    method = seq_bn(mh_adapter=False, output_adapter=False, cross_adapter=True)
    with pytest.raises(ValueError, match='has no cross-attention'):
        small.fresh(method)
    dimensions = dataclasses.replace(WIDE, layers=4, decoder_layers=2)
    method = dataclasses.replace(method, leave_out=[2, 3])
    with pytest.raises(ValueError, match=r'leave_out=\[2, 3\] keeps no layer that has cross-att'):
        method.init(jax.random.key(0), dimensions, {})
