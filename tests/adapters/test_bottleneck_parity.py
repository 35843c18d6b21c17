"""The bottleneck family computes what the `adapters` library computes, option by option."""

import adapters
import jax
import numpy as np
import pytest
import reference
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import params
from adapters_jax.adapters import registry
from adapters_jax.adapters.binding import Adapted
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Dimensions

BASE = {'mh_adapter': True, 'output_adapter': True, 'reduction_factor': 4, 'non_linearity': 'relu'}
BERT_BASE = Dimensions(
    layers=12,
    hidden=768,
    feed_forward=3072,
    heads=12,
    word=768,
    vocabulary=30522,
    positions=512,
)

SINGLY = [
    {},
    *({'reduction_factor': factor} for factor in (5, 2.5, 1000, {'1': 2, 'default': 8})),
    *({'non_linearity': name} for name in ('gelu_new', 'leakyrelu')),
    {'init_weights': 'mam_adapter', 'init_weights_seed': 3},
]
# Which the random combinations hold as well.
REPEATED = [
    {'mh_adapter': False},
    {'output_adapter': False},
    {'reduction_factor': 0.5},
    *({'non_linearity': name} for name in ('gelu', 'swish', 'tanh')),
    {'original_ln_before': True},
    {'original_ln_after': False},
    {'original_ln_before': True, 'original_ln_after': False},
    {'ln_before': True},
    {'ln_after': True},
    {'is_parallel': True},
    {'is_parallel': True, 'original_ln_after': False},
    {'is_parallel': True, 'ln_before': True, 'ln_after': True},
    {'is_parallel': True, 'original_ln_before': True, 'residual_before_ln': False},
    {'scaling': 4.0},
    {'scaling': 'learned'},
    {'scaling': 'channel'},
    {'use_gating': True},
    {'use_gating': True, 'ln_before': True, 'scaling': 0.5},
    {'residual_before_ln': False},
    {'residual_before_ln': False, 'original_ln_before': True},
    {'residual_before_ln': 'post_add', 'original_ln_before': True},
    {'adapter_residual_before_ln': True},
    {'adapter_residual_before_ln': True, 'ln_after': True},
    {'leave_out': [0, 2]},
    {'dropout': 0.5},
]


def difference(options, family='bert', seed=0):
    """Return the largest difference of any hidden state between the library and ours."""
    model = reference.torch_model(family, seed)
    reference.add_bottleneck(model, 'a', seed + 1, **options)
    padded = not options.get('use_gating', False)  # the library's gate looks at padding
    ids, mask = reference.texts(model, seed, padded=padded)
    expected = reference.torch_hidden(model, ids, mask)

    method = Bottleneck(**options)
    ours = reference.bottleneck_tree(model, 'a')
    config = reference.our_config(model)
    check_shapes(method, config.dimensions, ours)
    found = Backbone(config).apply(
        {'params': reference.backbone_tree(model)},
        ids,
        mask=mask[:, None, None, :],
        sites=Adapted(params=ours, key=None, method=method),
        all_hidden=True,
    )
    assert len(found) == len(expected) == config.layers + 1
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))


def check_shapes(method, dimensions, theirs):
    """Our fresh tree has exactly the library's leaves and shapes."""
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), dimensions, {}))
    shapes = {path: leaf.shape for path, leaf in params.flatten(fresh).items()}
    assert shapes == {path: leaf.shape for path, leaf in params.flatten(theirs).items()}


@pytest.mark.parametrize(
    'options', [*SINGLY, *(pytest.param(x, marks=pytest.mark.slow) for x in REPEATED)], ids=str
)
def test_each_option(options):
    assert difference(BASE | options) <= 2e-5


@pytest.mark.parametrize('name', ['double_seq_bn', 'seq_bn', 'par_bn', 'scaled_par_bn'])
@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_presets_in_both_families(name, family):
    theirs = dict(adapters.AdapterConfig.load(name.removeprefix('scaled_')).to_dict())
    if name == 'scaled_par_bn':
        theirs['scaling'] = 'learned'
    ours = registry.create(name).to_json()
    shared = {key: value for key, value in theirs.items() if key in ours and key != 'architecture'}
    assert shared == {key: ours[key] for key in shared}
    assert difference(shared, family) <= 2e-5


def test_adapter_plus_without_its_stochastic_depth():
    theirs = adapters.AdapterPlusConfig().to_dict()
    ours = registry.create('adapter_plus').to_json()
    shared = {key: value for key, value in theirs.items() if key in ours and key != 'architecture'}
    assert shared == {key: ours[key] for key in shared}
    assert difference(shared | {'stochastic_depth': 0.0, 'reduction_factor': 6}) <= 2e-5


@st.composite
def combinations(draw):
    options = draw(
        st.fixed_dictionaries(
            {
                'mh_adapter': st.booleans(),
                'output_adapter': st.booleans(),
                'reduction_factor': st.sampled_from([2, 4.5, 0.5, {'0': 2, 'default': 8}]),
                'non_linearity': st.sampled_from(['relu', 'gelu', 'swish', 'tanh']),
                'original_ln_before': st.booleans(),
                'original_ln_after': st.booleans(),
                'ln_before': st.booleans(),
                'ln_after': st.booleans(),
                'is_parallel': st.booleans(),
                'scaling': st.sampled_from([1.0, 0.3, 4.0, 'learned', 'channel']),
                'use_gating': st.booleans(),
                'residual_before_ln': st.sampled_from([True, False, 'post_add']),
                'adapter_residual_before_ln': st.booleans(),
                'leave_out': st.sampled_from([[], [0], [1, 2]]),
                'dropout': st.sampled_from([0.0, 0.5]),
            }
        )
    )
    options['output_adapter'] |= not options['mh_adapter']
    if options['residual_before_ln'] == 'post_add' and not options['is_parallel']:
        options['original_ln_before'] = True
    return options


@settings(max_examples=15, deadline=None, derandomize=True)
@given(combinations(), st.sampled_from(['bert', 'roberta']), st.integers(0, 1000))
def test_random_combinations(options, family, seed):
    assert difference(options, family, seed) <= 2e-5


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('seq_bn', 894_528),
        ('pfeiffer', 894_528),
        ('double_seq_bn', 1_789_056),
        ('par_bn', 7_091_712),
        ('scaled_par_bn', 7_091_724),
    ],
)
def test_counts_at_bert_base(name, expected):
    method = registry.create(name)
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), BERT_BASE, {}))
    assert params.count(fresh) == expected


@pytest.mark.parametrize(
    'options', [{}, {'use_gating': True, 'scaling': 'channel', 'ln_before': True, 'ln_after': True}]
)
def test_counts_equal_the_library(options):
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertModel(config)
    adapters.init(model)
    model.add_adapter('a', config=adapters.BnConfig(**BASE | options))
    model.train_adapter('a')
    theirs = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dimensions = reference.our_config(model).dimensions
    method = Bottleneck(**BASE | options)
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), dimensions, {}))
    assert params.count(fresh) == theirs
