"""Invertible adapters can be inverted, and with a bottleneck compute what `adapters` computes."""

import re

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small_bert as small
import torch
from adapters.methods.modeling import GLOWCouplingBlock

from adapters_jax import params
from adapters_jax.adapters.baselines import HeadOnly
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.invertible import Invertible
from adapters_jax.adapters.method import At
from adapters_jax.adapters.union import Union
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Dimensions, Stream

BERT_BASE = Dimensions(
    layers=12, hidden=768, feed_forward=3072, heads=12, word=768, vocabulary=30522, positions=512
)
AT = At(layer=-1, name='embeddings', shared={}, key=None)
_TENSOR = re.compile(r'(?:.*\.)?(F|G|s1|s2)\.(0|2)\.(weight|bias)')


def mad_x(config):
    """Return our union for a config of the library."""
    known = {'mh_adapter', 'output_adapter', 'reduction_factor', 'non_linearity'}
    known |= {'original_ln_before', 'original_ln_after'}
    fields = {key: value for key, value in config.to_dict().items() if key in known}
    invertible = Invertible(
        non_linearity=config.non_linearity,
        block_type=config.inv_adapter,
        reduction_factor=config.inv_adapter_reduction_factor,
    )
    return Union(members=(Bottleneck(**fields), invertible))


def networks(named):
    """Return the networks of a coupling block of the library as our tree."""
    leaves = {}
    for name, tensor in named:
        if match := _TENSOR.fullmatch(name):
            part = {'0': 'down', '2': 'up'}[match[2]]
            leaf = 'kernel' if match[3] == 'weight' else 'bias'
            array = reference.to_array(tensor, flip=leaf == 'kernel')
            leaves[f'embeddings/{match[1].lower()}/{part}/{leaf}'] = array
    return params.unflatten(leaves)


def shapes(tree):
    return {path: leaf.shape for path, leaf in params.flatten(tree).items()}


@pytest.mark.parametrize('family', ['bert', 'roberta'])
@pytest.mark.parametrize(
    'config',
    [
        adapters.SeqBnInvConfig(reduction_factor=4),
        adapters.DoubleSeqBnInvConfig(reduction_factor=4),
        adapters.SeqBnInvConfig(reduction_factor=4, inv_adapter_reduction_factor=5),
    ],
    ids=['seq_bn_inv', 'double_seq_bn_inv', 'narrow'],
)
def test_nice_as_in_adapters(config, family):
    model = reference.torch_model(family, num_hidden_layers=2)
    model.add_adapter('a', config=config)
    model.set_active_adapters('a')
    reference.randomise(model, 1)
    ids, mask = reference.texts(model)
    expected = reference.torch_hidden(model, ids, mask)

    method = mad_x(config)
    tree = {
        'bottleneck': reference.bottleneck_tree(model, 'a'),
        'invertible': networks(model.invertible_adapters['a'].named_parameters()),
    }
    ours = reference.our_config(model)
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), ours.dimensions, {}))
    assert shapes(fresh) == shapes(tree)
    found = Backbone(ours).apply(
        {'params': reference.backbone_tree(model)},
        ids,
        mask=mask[:, None, None, :],
        sites=bind(method, tree, None),
        all_hidden=True,
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)

    with torch.no_grad():
        undone = model.invertible_adapters['a'](torch.tensor(expected[0]), rev=True).numpy()
    back = method.members[1].inverse(tree['invertible'], jnp.asarray(expected[0]))
    np.testing.assert_allclose(back, undone, atol=2e-5)


@pytest.mark.parametrize('size', [16, 17])
def test_glow_with_the_networks_of_adapters(size):
    """The library's own forward pass of GLOW fails, so its equations are written out here."""
    block = GLOWCouplingBlock([[size]], non_linearity='relu', reduction_factor=2)
    reference.randomise(block, 0)
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = x[..., : size // 2], x[..., size // 2 :]
        scale, shift = block.s2(second).split(size // 2, -1)
        first = block.e(scale) * first + shift
        scale, shift = block.s1(first).split(size - size // 2, -1)
        expected = torch.cat([first, block.e(scale) * second + shift], -1).numpy()

    method, tree = (
        Invertible(non_linearity='relu', block_type='glow'),
        networks(block.named_parameters()),
    )
    fresh = method.init(jax.random.key(0), Dimensions(1, size, 8, 1, size, 9, 9), {})
    assert shapes(fresh) == shapes(tree)
    found = apply(method, tree, jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def apply(method, tree, x):
    return method.embeddings(tree, Stream(hidden=x, mask=None, word_vectors=x), AT).hidden


@pytest.mark.parametrize(
    ('hidden', 'block_type'),
    [
        *((24, 'nice'), (25, 'glow')),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((24, 'glow'), (25, 'nice'))),
    ],
)
def test_the_inverse_inverts(block_type, hidden):
    method = Invertible(non_linearity='swish', block_type=block_type)
    sizes = Dimensions(1, hidden, 8, 1, hidden, 9, 9)
    tree = small.perturb(method.init(jax.random.key(0), sizes, {}), 1, 0.3)
    x = jax.random.normal(jax.random.key(1), (2, 5, hidden))
    forth = jax.jit(lambda x: apply(method, tree, x))
    back = jax.jit(lambda x: method.inverse(tree, x))
    changed = forth(x)
    assert np.abs(changed - x).max() > 0.1
    np.testing.assert_allclose(back(changed), x, atol=1e-5)
    np.testing.assert_allclose(forth(back(x)), x, atol=1e-5)


def test_glow_scales_within_its_bounds():
    method = Invertible(non_linearity='linear', block_type='glow')
    tree = small.perturb(method.init(jax.random.key(0), small.DIMENSIONS, {}), 1, 100.0)
    x = jax.random.normal(jax.random.key(1), (2, 5, 24))
    for network in tree['embeddings'].values():
        half = network['up']['bias'].shape[0] // 2
        network['up'] = {
            'kernel': network['up']['kernel'].at[:, half:].set(0),
            'bias': network['up']['bias'].at[half:].set(0),
        }
    ratio = np.abs(apply(method, tree, x) / x)
    assert np.exp(-5) < ratio.min() < 0.01 and 100 < ratio.max() < np.exp(5)


@pytest.mark.parametrize(
    ('config', 'expected'),
    [(adapters.SeqBnInvConfig(), 1_190_592), (adapters.DoubleSeqBnInvConfig(), 2_085_120)],
    ids=['seq_bn_inv', 'double_seq_bn_inv'],
)
def test_counts_at_bert_base(config, expected):
    method = mad_x(config)
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), BERT_BASE, {}))
    assert params.count(fresh) == expected
    assert params.count(fresh['invertible']) == 296_064


@pytest.mark.parametrize('block_type', ['nice', 'glow'])
def test_zero_start_is_the_plain_backbone(block_type):
    method = Invertible(non_linearity='relu', block_type=block_type, init_weights='zero')
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    plain = small.run(HeadOnly(), {}, small.backbone(), ids, **inputs)
    found = small.run(method, small.fresh(method), small.backbone(), ids, **inputs)
    np.testing.assert_array_equal(found, plain)


def test_padding_and_packing_change_nothing():
    method = Invertible(non_linearity='relu', block_type='glow')
    tree, items = small.fresh(method, sigma=0.3), small.texts([9, 4, 9])
    assert method.packable
    for alone, in_rows, in_pack in small.hidden_by_layout(method, tree, small.backbone(), items):
        np.testing.assert_allclose(in_rows, alone, atol=2e-5)
        np.testing.assert_allclose(in_pack, alone, atol=2e-5)


@pytest.mark.parametrize('block_type', ['nice', 'glow'])
def test_every_leaf_has_a_finite_gradient(block_type):
    method = Invertible(non_linearity='tanh', block_type=block_type)
    tree = small.fresh(method, sigma=0.3)
    x = jax.random.normal(jax.random.key(1), (2, 5, 24))
    leaves = small.gradient(lambda t: jnp.square(apply(method, t, x)).sum(), tree)
    for path, leaf in leaves.items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_start_and_seed():
    def leaves(key, **options):
        tree = Invertible(non_linearity='relu', **options).init(jax.random.key(key), BERT_BASE, {})
        return {path: np.asarray(leaf) for path, leaf in params.flatten(tree).items()}

    first, second = leaves(0, init_weights_seed=5), leaves(1, init_weights_seed=5)
    assert all((first[path] == second[path]).all() for path in first)
    assert any((leaves(0)[path] != leaves(1)[path]).any() for path in first)
    kernels = [leaf for path, leaf in first.items() if path.endswith('kernel')]
    assert len({leaf.tobytes() for leaf in kernels}) == 4
    assert all(abs(leaf.std() - 0.02) < 2e-4 for leaf in kernels)
    assert not any(leaf.any() for path, leaf in first.items() if path.endswith('bias'))


def test_the_whole_backbone_is_above_it():
    method = Invertible(non_linearity='relu')
    assert method.first_layer(small.fresh(method), small.DIMENSIONS) == 0
    fields = {key: value for key, value in method.to_json().items() if key != 'architecture'}
    assert Invertible.from_fields(fields) == method


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'block_type': 'nvp'}, "expected 'nice' or 'glow'"),
        ({'reduction_factor': 0}, 'reduction_factor=0 is not above 0'),
        ({'non_linearity': 'rellu'}, "unknown activation 'rellu'"),
        ({'init_weights': 'houlsby'}, "expected 'bert' or 'zero'"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Invertible(**{'non_linearity': 'relu'} | options)


def test_a_network_without_a_width():
    method = Invertible(non_linearity='relu', reduction_factor=13)
    with pytest.raises(ValueError, match='reads 12 features; expected at most 12'):
        small.fresh(method)
