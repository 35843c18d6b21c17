"""Compacter computes what `adapters` computes, option by option, and starts as it says."""

import functools
import re

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small_bert as small
import torch
from adapters.methods.modeling import PHMLayer
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import params
from adapters_jax.adapters.baselines import HeadOnly
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.compacter import Compacter, kronecker_sum
from adapters_jax.model import Model
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.heads import HeadConfig
from adapters_jax.sites import Dimensions

BERT_BASE = Dimensions(
    layers=12, hidden=768, feed_forward=3072, heads=12, word=768, vocabulary=30522, positions=512
)
BASE = {'mh_adapter': True, 'output_adapter': True, 'non_linearity': 'gelu', 'reduction_factor': 4}
_LEAF = {'W_left': 'left', 'W_right': 'right', 'W': 'weight', 'b': 'bias', 'phm_rule': 'rule'}
_LEAF |= {'phm_rule_left': 'rule/left', 'phm_rule_right': 'rule/right'}
_TENSOR = re.compile(
    r'encoder\.layer\.(\d+)\.(attention\.output|output)\.adapters\.a\.(adapter_\w+[.\d]*)\.(\w+)'
)


def torch_model(options, family='bert', seed=0):
    """Return a model of `adapters` with a Compacter, its weights large enough to tell."""
    options = dict(options)
    full = options.get('shared_W_phm') and not options.get('factorized_phm_W', True)
    if full:  # the library cannot create it, but can compute it
        options['factorized_phm_W'] = True
    model = reference.torch_model(family, seed, num_hidden_layers=2)
    model.add_adapter('a', config=adapters.BnConfig(phm_layer=True, **options))
    model.set_active_adapters('a')
    if full:
        unfactorise(model)
    reference.randomise(model, seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r'\.W(_\w+)?$|phm_rule', name):
                parameter *= 3
    return model.eval()


def unfactorise(model):
    for layer in model.modules():
        if isinstance(layer, PHMLayer):
            layer.factorized_phm_W = False
    shared = model.shared_parameters['a']
    for part in ('down', 'up'):
        left, right = (shared.pop(f'W_{part}_{side}') for side in ('left', 'right'))
        shared[f'W_{part}'] = torch.nn.Parameter(torch.bmm(left, right).detach())


def compacter_tree(model, method):
    """Return the Compacter of a torch model as our tree."""
    plain = reference.bottleneck_tree(model, 'a')
    leaves = {
        path: leaf
        for path, leaf in params.flatten(plain).items()
        if not re.search('/(down|up)/', path)
    }
    for name, tensor in model.named_parameters():
        leaf = name.rpartition('.')[2]
        match = _TENSOR.fullmatch(name)
        if match and match[3].startswith(('adapter_down', 'adapter_up')):
            site = reference._SITES[match[2]]
            place = f'layer_{match[1]}/{site}/{match[3].split(".")[0].removeprefix("adapter_")}'
            path = f'{place}/{_LEAF[leaf]}'
        elif name.startswith('shared_parameters.a.W_'):
            part, _, side = leaf.removeprefix('W_').partition('_')
            path = f'shared/{part}/{side or "weight"}'
        elif name.startswith('shared_parameters.a.'):
            path = f'shared/{_LEAF[leaf]}'
        else:
            continue
        if '/rule' in path and not method.learn_phm:
            path = f'constants/{path.removeprefix("shared/")}'
        leaves[path] = reference.to_array(tensor)
    return params.unflatten(leaves)


def hidden(method, tree, model, ids, mask):
    """Return our hidden states with the torch model's backbone."""
    config = reference.our_config(model)
    return Backbone(config).apply(
        {'params': reference.backbone_tree(model)},
        ids,
        mask=mask[:, None, None, :],
        sites=bind(method, tree, None),
        all_hidden=True,
    )


def difference(options, family='bert', seed=0):
    """Return the largest difference of any hidden state between the library and ours."""
    model = torch_model(options, family, seed)
    ids, mask = reference.texts(model, seed, padded=not options.get('use_gating', False))
    expected = reference.torch_hidden(model, ids, mask)

    method = Compacter(**options)
    tree = compacter_tree(model, method)
    dimensions = reference.our_config(model).dimensions
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), dimensions, {}))
    shapes = {path: leaf.shape for path, leaf in params.flatten(fresh).items()}
    assert shapes == {path: leaf.shape for path, leaf in params.flatten(tree).items()}

    found = hidden(method, tree, model, ids, mask)
    halved = {
        path: leaf / 2 if '/rule' in path else leaf for path, leaf in params.flatten(tree).items()
    }
    without = hidden(method, params.unflatten(halved), model, ids, mask)
    assert np.abs(without[-1] - found[-1]).max() > 0.004  # the kernels count
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))


SINGLY = [
    {},
    {'phm_dim': 2},
    {'factorized_phm_W': False},
    {'shared_W_phm': True},
    {'shared_W_phm': True, 'factorized_phm_W': False},
    {'shared_phm_rule': False},
    {'factorized_phm_rule': True},
    {'learn_phm': False},
    {'ln_before': True, 'ln_after': True, 'scaling': 'channel', 'use_gating': True},
]
# Which the random combinations hold as well.
REPEATED = [
    {'mh_adapter': False},
    {'phm_dim': 1},
    {'phm_dim': 8},
    {'phm_rank': 2},
    {'shared_phm_rule': False, 'factorized_phm_rule': True},
    {'learn_phm': False, 'shared_phm_rule': False, 'factorized_phm_rule': True},
    {'phm_bias': False},
    {'reduction_factor': {'0': 2, 'default': 4}},
    {'phm_c_init': 'uniform', 'hypercomplex_nonlinearity': 'glorot-normal'},
    {'is_parallel': True},
]


@pytest.mark.parametrize(
    'options', [*SINGLY, *(pytest.param(x, marks=pytest.mark.slow) for x in REPEATED)], ids=str
)
def test_each_option(options):
    # The weights of seed 0 multiply every rounding by fifty where phm_rank is 2.
    assert difference(BASE | options, seed=1) <= 2e-5


@st.composite
def combinations(draw):
    booleans = ('factorized_phm_W', 'shared_W_phm', 'shared_phm_rule', 'factorized_phm_rule')
    booleans += ('learn_phm', 'phm_bias', 'original_ln_before', 'ln_before', 'is_parallel')
    booleans += ('mh_adapter',)
    options = draw(
        st.fixed_dictionaries(
            dict.fromkeys(booleans, st.booleans())
            | {
                'phm_dim': st.sampled_from([1, 2, 4, 8]),
                'phm_rank': st.sampled_from([1, 3]),
                'phm_c_init': st.sampled_from(['normal', 'uniform']),
                'non_linearity': st.sampled_from(['relu', 'gelu', 'swish']),
                'leave_out': st.sampled_from([[], [0]]),
            }
        )
    )
    options['phm_bias'] |= options['shared_W_phm']
    if not options['shared_W_phm']:  # which asks for one width
        options['reduction_factor'] = draw(st.sampled_from([4, {'0': 2, 'default': 4}]))
    return options


@settings(max_examples=8, deadline=None, derandomize=True)
@given(combinations(), st.sampled_from(['bert', 'roberta']), st.integers(0, 1000))
def test_random_combinations(options, family, seed):
    assert difference(BASE | options, family, seed) <= 2e-5


@pytest.mark.parametrize(('theirs', 'expected'), [('compacter', 57_088), ('compacter++', 28_576)])
def test_counts_at_bert_base(theirs, expected):
    options = adapters.AdapterConfig.load(theirs).to_dict()
    known = set(Compacter(**BASE).to_json()) - {'architecture'}
    method = Compacter(**{key: value for key, value in options.items() if key in known})
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), BERT_BASE, {}))
    assert params.count(fresh) == expected


def compacter(**options):
    return Compacter(**BASE | {'reduction_factor': 3} | options)  # D = 24, R = 8


def test_kronecker_sum():
    rng = np.random.default_rng(0)
    rules, blocks = rng.standard_normal((3, 2, 2)), rng.standard_normal((3, 4, 5))
    expected = sum(np.kron(a, b) for a, b in zip(rules, blocks, strict=True))
    found = kronecker_sum(jnp.asarray(rules, jnp.float32), jnp.asarray(blocks, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_zero_start_is_the_plain_backbone():
    method = compacter(init_weights='zero')
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    plain = small.run(HeadOnly(), {}, small.backbone(), ids, **inputs)
    tree = small.fresh(method)
    np.testing.assert_array_equal(small.run(method, tree, small.backbone(), ids, **inputs), plain)
    full = compacter(init_weights='zero', factorized_phm_W=False, shared_W_phm=True)
    assert not small.fresh(full)['shared']['up']['weight'].any()
    moved = small.run(method, small.perturb(tree, 1, 0.3), small.backbone(), ids, **inputs)
    assert np.abs(moved - plain).max() > 0.01


@pytest.mark.parametrize(
    ('name', 'sigma', 'bound'),
    [
        ('glorot-normal', (2 / 264) ** 0.5, None),
        ('phm', (2 / 264) ** 0.5, None),
        ('glorot-uniform', (2 / 264) ** 0.5, (6 / 264) ** 0.5),
        ('normal', 0.01, None),
    ],
)
def test_the_start_of_the_blocks_is_the_one_asked_for(name, sigma, bound):
    wide = Dimensions(1, 1024, 8, 8, 1024, 9, 9)
    method = compacter(
        reduction_factor=32,
        phm_init_range=0.01,
        hypercomplex_nonlinearity=name,
        factorized_phm_W=False,
    )
    weight = method.init(jax.random.key(0), wide, {})['layer_0']['attention']['down']['weight']
    assert weight.shape == (4, 256, 8)
    assert abs(weight.std() / sigma - 1) < 0.03
    largest = np.abs(weight).max()
    assert 0.99 * bound < largest <= bound if bound else largest > 3 * sigma


@pytest.mark.parametrize('learned', [True, False])
def test_the_start_of_the_rules(learned):
    options = {'phm_dim': 8, 'learn_phm': learned, 'phm_init_range': 0.01}
    branch = 'shared' if learned else 'constants'
    rule = small.fresh(compacter(**options))[branch]['rule']
    assert rule.shape == (8, 8, 8) and abs(rule.std() - 0.01) < 1e-3
    uniform = small.fresh(compacter(phm_c_init='uniform', **options))[branch]['rule']
    assert abs(uniform.std() - 3**-0.5) < 0.03 and 0.98 < np.abs(uniform).max() <= 1


def test_a_seed_fixes_the_start():
    def leaves(key, **options):
        tree = compacter(shared_phm_rule=False, **options).init(
            jax.random.key(key), small.DIMENSIONS, {}
        )
        return {path: np.asarray(leaf) for path, leaf in params.flatten(tree).items()}

    first, second = leaves(0, init_weights_seed=5), leaves(1, init_weights_seed=5)
    assert all((first[path] == second[path]).all() for path in first)
    assert any((leaves(0)[path] != leaves(1)[path]).any() for path in first)
    drawn = [leaf.tobytes() for path, leaf in first.items() if not path.endswith('bias')]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize('shared', [True, False])
@pytest.mark.parametrize('c_init', ['normal', 'uniform'])
def test_rules_that_are_not_learned_come_from_the_seed_alone(shared, c_init):
    options = {'learn_phm': False, 'shared_phm_rule': shared, 'phm_c_init': c_init}
    method = compacter(**options)
    tree = params.flatten(method.init(jax.random.key(3), small.DIMENSIONS, {}))
    constants = params.flatten(method.constants(small.DIMENSIONS))
    assert len(constants) == (1 if shared else 12)
    for path, leaf in constants.items():
        np.testing.assert_array_equal(tree[path], leaf)
    again = params.flatten(compacter(init_weights_seed=7, **options).constants(small.DIMENSIONS))
    everything = [np.asarray(leaf).tobytes() for leaf in (*constants.values(), *again.values())]
    assert len(set(everything)) == len(everything)
    assert compacter().constants(small.DIMENSIONS) == {}


# Of the rule for the seed 0.
FIRST_NORMAL = (-0.00021954118, -6.502442e-05, -7.1335476e-06, -0.00013320634)
FIRST_UNIFORM = (-0.97186595, -0.4844655, -0.05686924, -0.81716067)


def test_a_fixed_rule_never_changes():
    """The numbers that a folder leaves out must be the same for ever."""
    rule = compacter(learn_phm=False).constants(small.DIMENSIONS)['constants']['rule']
    np.testing.assert_array_equal(rule.reshape(-1)[:4], np.float32(FIRST_NORMAL))
    method = compacter(learn_phm=False, phm_c_init='uniform')
    rule = method.constants(small.DIMENSIONS)['constants']['rule']
    np.testing.assert_array_equal(rule.reshape(-1)[:4], np.float32(FIRST_UNIFORM))


def test_only_what_is_learned_is_trained():
    model = Model(small.CONFIG, compacter(learn_phm=False), HeadConfig(), outputs=2)
    everything = model.init(jax.random.key(0), small.backbone())
    tuned, frozen = params.partition(everything, model.rules)
    assert list(params.flatten(frozen['adapters'])) == ['default/constants/rule']
    assert not any('rule' in path for path in params.flatten(tuned))


@functools.cache
def gradients():
    method = compacter(shared_phm_rule=False, factorized_phm_rule=True)
    tree = small.fresh(method, sigma=0.3, layers=1)
    ids, inputs = small.padded(small.texts([9, 4]), 12)

    def loss(t):
        hidden = small.forward(method, t, small.backbone(), ids, model=small.SHALLOW[1], **inputs)
        return jnp.square(hidden[:, 0]).mean()

    return small.gradient(loss, tree)


def test_every_leaf_has_a_finite_gradient():
    for path, leaf in gradients().items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_padding_and_packing_change_nothing():
    method = compacter(use_gating=True)
    tree, items = small.fresh(method, sigma=0.3), small.texts([9, 4, 9])
    for alone, in_rows, in_pack in small.hidden_by_layout(method, tree, small.backbone(), items):
        np.testing.assert_allclose(in_rows, alone, atol=2e-5)
        np.testing.assert_allclose(in_pack, alone, atol=2e-5)


def test_left_out_layers():
    method = compacter(leave_out=[0, 2], learn_phm=False, shared_phm_rule=False)
    tree = small.fresh(method)
    assert set(tree) == {'layer_1', 'constants'} and set(tree['constants']) == {'layer_1'}
    assert method.first_layer(tree, small.DIMENSIONS) == 1


def test_bfloat16():
    method = compacter()
    tree, (ids, inputs) = small.fresh(method, sigma=0.3), small.padded(small.texts([9, 4]), 12)
    half = Backbone(small.CONFIG, dtype=jnp.bfloat16)
    found = small.run(method, tree, small.backbone(), ids, model=half, **inputs)
    exact = small.run(method, tree, small.backbone(), ids, **inputs)
    assert found.dtype == jnp.bfloat16
    assert np.abs(found.astype(jnp.float32) - exact).max() < 0.03 * np.abs(exact).max()


def test_json_round_trip():
    method = compacter(phm_dim=2, learn_phm=False, leave_out=[1])
    fields = {key: value for key, value in method.to_json().items() if key != 'architecture'}
    assert Compacter.from_fields(fields) == method


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'phm_dim': 0}, 'phm_dim=0 is not above 0'),
        ({'phm_rank': 0}, 'phm_rank=0 is not above 0'),
        ({'phm_init_range': 0.0}, 'phm_init_range=0.0 is not above 0'),
        ({'phm_c_init': 'zeros'}, "expected 'normal' or 'uniform'"),
        ({'hypercomplex_nonlinearity': 'relu'}, "'glorot-normal' or 'glorot-uniform'"),
        ({'init_weights': 'houlsby'}, 'is for dense kernels'),
        ({'shared_W_phm': True, 'phm_bias': False}, 'without a parameter; set phm_bias=True'),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compacter(**options)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'phm_dim': 5}, '24 is not a multiple of it; change phm_dim'),
        ({'reduction_factor': 4}, '6 is not a multiple of it'),
        (
            {'shared_W_phm': True, 'reduction_factor': {'0': 6, 'default': 3}},
            'the layers have the widths [4, 8]',
        ),
    ],
)
def test_sizes_that_do_not_divide(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        small.fresh(compacter(**options))
