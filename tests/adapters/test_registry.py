"""Every method survives JSON, and text names it; what does not fit is refused by name."""

import dataclasses
import json
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax import grammar
from adapters_jax.adapters import fields, registry
from adapters_jax.adapters.adalora import AdaLoRA
from adapters_jax.adapters.attention import AttentionAdapter, SideAttentionAdapter
from adapters_jax.adapters.baselines import FullFineTuning, HeadOnly, TopLayers
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.compacter import Compacter
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.invertible import Invertible
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.mtl_lora import MTLLoRA
from adapters_jax.adapters.prefix import PrefixTuning
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.reft import ReFT
from adapters_jax.adapters.tuning import BitFit, LayerNormTuning
from adapters_jax.adapters.vera import DVoRA, VeRA

FLAGS, RATES = st.booleans(), st.floats(0, 0.99)
LAYERS = st.lists(st.integers(0, 30), max_size=4)
SEEDS = st.none() | st.integers(0, 2**31)
FACTORS = st.one_of(st.floats(0.1, 100), st.integers(1, 100))
SIZES = st.one_of(
    st.fixed_dictionaries({'size': st.integers(1, 512), 'reduction_factor': st.none()}),
    st.fixed_dictionaries(
        {
            'size': st.none(),
            'reduction_factor': FACTORS
            | st.dictionaries(st.integers(0, 30).map(str) | st.just('default'), FACTORS),
        }
    ),
)
BOTTLENECK = {
    'mh_adapter': st.just(True),
    'output_adapter': FLAGS,
    'cross_adapter': FLAGS,
    'non_linearity': st.sampled_from(['relu', 'gelu', 'gelu_new', 'swish']),
    'original_ln_before': st.just(True),
    'original_ln_after': FLAGS,
    'ln_before': FLAGS,
    'ln_after': FLAGS,
    'init_weights': st.sampled_from(['bert', 'mam_adapter', 'houlsby', 'zero']),
    'init_sigma': st.floats(1e-7, 1.0),
    'init_weights_seed': SEEDS,
    'is_parallel': FLAGS,
    'scaling': st.floats(-9, 9) | st.integers(-9, 9) | st.sampled_from(['learned', 'channel']),
    'use_gating': FLAGS,
    'residual_before_ln': FLAGS | st.just('post_add'),
    'adapter_residual_before_ln': FLAGS,
    'leave_out': LAYERS,
    'dropout': RATES,
    'stochastic_depth': RATES,
    'train_norms': FLAGS,
}
ATTENTION = {
    'size': st.sampled_from([8, 16, 64]),
    'heads': st.sampled_from([1, 2, 4]),
    'expansion': st.integers(1, 8),
    'non_linearity': st.sampled_from(['relu', 'gelu']),
    'dropout': RATES,
    'init_scale': st.floats(0, 1),
    'init_weights_seed': SEEDS,
    'leave_out': LAYERS,
    'tags': st.integers(0, 50),
}
LOW_RANK = {
    'gate_lora': FLAGS,
    'r': st.integers(1, 64),
    'attn_matrices': st.lists(st.sampled_from('qkvo'), min_size=1, max_size=4),
    'selfattn_lora': st.just(True),
    'crossattn_lora': FLAGS,
    'intermediate_lora': FLAGS,
    'output_lora': FLAGS,
    'dropout': RATES,
    'use_gating': FLAGS,
    'leave_out': LAYERS,
    'init_weights_seed': SEEDS,
}
PLACES = st.sampled_from(['query', 'attention/value', 'down']) | st.integers(0, 30).map(str)
ALPHAS = st.floats(0.1, 64) | st.integers(1, 64)
LORA = LOW_RANK | {
    'alpha': ALPHAS,
    'rank_stabilised': FLAGS,
    'rank_pattern': st.dictionaries(PLACES, st.integers(0, 64), max_size=3),
    'alpha_pattern': st.dictionaries(PLACES, ALPHAS, max_size=3),
    'init_weights': st.sampled_from(['lora', 'bert']),
}
VERA = LOW_RANK | {
    'd_initial': st.floats(-1, 1),
    'b_initial': st.floats(-1, 1),
    'projection_seed': st.integers(0, 2**31),
    'save_projection': FLAGS,
}
DECOMPOSED = {'scale_bias': FLAGS, 'detach_norm': FLAGS}
BETAS, STEPS = st.floats(0.01, 0.99), st.integers(0, 9999)
ADALORA = LOW_RANK | {
    'r': st.just(12),
    'target_r': st.integers(1, 12),
    'alpha': ALPHAS,
    'tinit': STEPS,
    'tfinal': STEPS,
    'delta_t': st.integers(1, 99),
    'beta1': BETAS,
    'beta2': BETAS,
    'orth_reg': st.floats(0, 1),
    'rank_pattern': st.dictionaries(PLACES, st.integers(0, 12), max_size=0),
}
MTL_LORA = LOW_RANK | {
    'alpha': ALPHAS,
    'n_up_projection': st.integers(1, 4),
    'task_specific_matrix_type': st.sampled_from(['singular_values', 'linear']),
    'weights_sharpness': st.floats(0.01, 9),
    'init_weights': st.sampled_from(['lora', 'bert']),
}
_NAMES = ('query', 'key', 'value', 'output', 'up', 'down')
IA3_OPTIONS = {
    'scale_outputs': st.lists(st.sampled_from(_NAMES), min_size=1, max_size=3, unique=True),
    'scale_inputs': st.lists(st.sampled_from(_NAMES), max_size=3, unique=True),
    'self_attention': st.just(True),
    'cross_attention': FLAGS,
    'use_gating': FLAGS,
    'leave_out': LAYERS,
    'init_weights_seed': SEEDS,
}
PREFIX = {
    'count_keys': FLAGS,
    'encoder_prefix': FLAGS,
    'cross_prefix': FLAGS,
    'flat': FLAGS,
    'prefix_length': st.integers(1, 99),
    'bottleneck_size': st.integers(1, 999),
    'non_linearity': st.sampled_from(['tanh', 'relu']),
    'dropout': RATES,
    'use_gating': FLAGS,
    'shared_gating': FLAGS,
    'leave_out': LAYERS,
    'init_weights_seed': SEEDS,
    'shift_positions': FLAGS,
}
PROMPT = {
    'prompt_length': st.integers(1, 99),
    'prompt_init': st.sampled_from(['random_uniform', 'vocabulary']),
    'prompt_init_text': st.none(),
    'prompt_init_ids': st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=3),
    'random_uniform_scale': st.floats(0.01, 9),
    'combine': st.sampled_from(['prefix', 'prefix_after_bos']),
    'site': st.just('embeddings'),
    'init_weights_seed': SEEDS,
}
PHM = BOTTLENECK | {
    'init_weights': st.sampled_from(['bert', 'zero']),
    'size': st.just(8),
    'reduction_factor': st.none(),
    'phm_dim': st.sampled_from([2, 4]),
    'factorized_phm_W': FLAGS,
    'shared_W_phm': st.just(False),
    'shared_phm_rule': FLAGS,
    'factorized_phm_rule': FLAGS,
    'phm_c_init': st.sampled_from(['normal', 'uniform']),
    'phm_init_range': st.floats(1e-6, 1),
    'learn_phm': FLAGS,
    'hypercomplex_nonlinearity': st.sampled_from(['glorot-normal', 'normal', 'phm']),
    'phm_rank': st.integers(1, 2),
    'phm_bias': FLAGS,
}
INVERTIBLE = {
    'non_linearity': st.sampled_from(['relu', 'swish']),
    'block_type': st.sampled_from(['nice', 'glow']),
    'reduction_factor': FACTORS,
    'init_weights': st.sampled_from(['bert', 'zero']),
    'init_weights_seed': SEEDS,
}
REFT = {
    'layers': st.just('all') | st.lists(st.integers(0, 30), min_size=1, max_size=4),
    'prefix_positions': st.integers(1, 9),
    'suffix_positions': st.integers(0, 9),
    'r': st.integers(1, 9),
    'orthogonality': FLAGS,
    'subtract_projection': FLAGS,
    'tied_weights': FLAGS,
    'dropout': RATES,
    'non_linearity': st.none() | st.sampled_from(['relu', 'gelu']),
    'leave_out': LAYERS,
    'init_weights_seed': SEEDS,
}
TUNING = {'leave_out': LAYERS, 'embedding_norm': FLAGS}
OPTIONS = {
    LoRA: LORA,
    DoRA: LORA | DECOMPOSED | {'scale_norm': FLAGS},
    VeRA: VERA,
    DVoRA: VERA | DECOMPOSED,
    AdaLoRA: ADALORA,
    MTLLoRA: MTL_LORA,
    IA3: IA3_OPTIONS,
    PrefixTuning: PREFIX,
    PromptTuning: PROMPT,
    Compacter: PHM,
    Invertible: INVERTIBLE,
    ReFT: REFT,
    BitFit: TUNING | {'biases': st.sampled_from(['all', 'partial'])},
    LayerNormTuning: TUNING,
    AttentionAdapter: ATTENTION | {'mh_adapter': FLAGS, 'output_adapter': st.just(True)},
    SideAttentionAdapter: ATTENTION,
    TopLayers: {'layers': st.integers(1, 48)},
    FullFineTuning: {},
    HeadOnly: {},
}
CHOICES = {
    Bottleneck: st.tuples(st.fixed_dictionaries(BOTTLENECK), SIZES).map(lambda t: t[0] | t[1]),
} | {cls: st.fixed_dictionaries(options) for cls, options in OPTIONS.items()}
METHODS = st.one_of(
    *(choice.map(lambda options, cls=cls: (cls, options)) for cls, choice in CHOICES.items())
)


def test_every_architecture_is_tried_with_every_field():
    assert set(CHOICES) == set(registry.ARCHITECTURES.values())
    known = OPTIONS | {Bottleneck: {*BOTTLENECK, 'size', 'reduction_factor'}}
    for cls, options in known.items():
        assert {f.name for f in dataclasses.fields(cls)} == set(options), cls.architecture


@given(METHODS)
def test_json_brings_back_every_field(drawn):
    cls, options = drawn
    method = cls(**options)
    values = method.to_json()
    assert {key: values[key] for key in options} == options
    assert set(values) == {f.name for f in dataclasses.fields(cls)} | {'architecture'}
    text = json.dumps(values)
    again = registry.from_json(json.loads(text))
    assert again == method and hash(again) == hash(method) and type(again) is cls
    assert json.dumps(again.to_json()) == text


def written(value, key=False):
    """Write a value as the notation has it."""
    if isinstance(value, dict):
        return '{' + ', '.join(f'{name}: {written(item)}' for name, item in value.items()) + '}'
    if isinstance(value, list):
        return '[' + ','.join(written(item) for item in value) + ']'
    return str(value)


@given(METHODS)
def test_text_says_what_json_says(drawn):
    cls, options = drawn
    preset = next(name for name, method in registry.PRESETS.items() if type(method) is cls)
    inside = ', '.join(f'{name}={written(value)}' for name, value in options.items())
    assert registry.create(f' {preset} [{inside}] ') == cls(**options)


@pytest.mark.parametrize('name', registry.PRESETS)
def test_presets_are_values(name):
    method = registry.create(name)
    assert method == registry.PRESETS[name]
    assert registry.from_json(method.to_json()) == method
    jax.jit(lambda x, m: x, static_argnums=1)(1.0, method)


def test_options_replace_the_presets():
    method = registry.create("houlsby[size=8, non_linearity='relu', leave_out=[0, 1]]")
    expected = dataclasses.replace(
        registry.PRESETS['houlsby'], size=8, non_linearity='relu', leave_out=[0, 1]
    )
    assert method == expected and method.leave_out == (0, 1)
    method = registry.create('seq_bn[reduction_factor={0: 8, "default": 16.5}]')
    assert method.to_json()['reduction_factor'] == {'0': 8, 'default': 16.5}


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('holsby', "unknown method 'holsby'; known: adalora, adapter_plus,"),
        ('seq_bn[rf=8]', "bottleneck has no option 'rf'; known: adapter_residual_before_ln,"),
        ('full[layers=2]', "full has no option 'layers'; known: none"),
        ('seq_bn[architecture=full]', "bottleneck has no option 'architecture'"),
        ('seq_bn[scaling]', "'scaling' in 'seq_bn[scaling]' is not an option"),
        ('seq_bn[scaling=]', "'' is not a value"),
        ('seq_bn[scaling=1,scaling=2]', "gives the option 'scaling' twice"),
        ('seq_bn[scaling=1', "ends where ']' is expected"),
        ('seq_bn]', "has a ']' without its partner"),
        ('seq_bn[leave_out=[1}]', "has a '}' without its partner"),
        ("seq_bn[scaling='a]", 'ends where "\'" is expected'),
        ('seq_bn[reduction_factor={1}]', "'1' is not an entry of a dict"),
        ('seq_bn[reduction_factor={1: 8, "1": 2}]', "gives the key '1' twice"),
        ('seq_bn[leave_out=[1,,2]]', "'' is not a value"),
        ('', "'' is not a method"),
    ],
)
def test_text_that_is_refused(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        registry.create(text)


@pytest.mark.parametrize(
    ('values', 'sentence'),
    [
        ({'architecture': 'x'}, "unknown architecture 'x'; known: adalora, attention,"),
        ({}, 'unknown architecture None'),
        ({'architecture': ['full']}, "unknown architecture ['full']"),
        ({'architecture': 'bottleneck', 'size': 2}, "needs the option 'mh_adapter', 'output_"),
        ({'architecture': 'top_layers', 'layers': 0}, 'layers=0 is not at least 1'),
        ({'architecture': 'top_layers', 'layers': '2'}, "layers='2' is not valid"),
    ],
)
def test_json_that_is_refused(values, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        registry.from_json(values)


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1', 1),
        ('-1', -1),
        ('1.0', 1.0),
        ('3e-4', 3e-4),
        ('.5', 0.5),
        ('True', True),
        ('false', False),
        ('None', None),
        ('null', None),
        ('gelu_new', 'gelu_new'),
        ('/runs/a-b', '/runs/a-b'),
        ('./b.c', './b.c'),
        ('../b', '../b'),
        ("'a, b|c] \\' d'", "a, b|c] ' d"),
        ('"1"', '1'),
        ('[]', []),
        ('{}', {}),
        ('[1, [a, 2.5], {b: none}]', [1, ['a', 2.5], {'b': None}]),
    ],
)
def test_values(text, value):
    found = grammar.parse_value(text)
    assert found == value and type(found) is type(value)


def test_unions_are_parsed():
    found = grammar.parse('a[x=[1,2]] | b | c[y="|"]')
    assert found == [('a', {'x': [1, 2]}), ('b', {}), ('c', {'y': '|'})]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSON)
def test_freezing_is_undone_and_hashes(value):
    frozen = fields.freeze(value)
    hash(frozen)
    assert fields.thaw(frozen) == value


def test_methods_are_values_and_share_nothing():
    """Two that differ are unequal, and making or changing one leaves the other as it was."""
    names = sorted(set(registry.PRESETS) - {'seq_bn'})
    described = {name: json.dumps(registry.create(name).to_json()) for name in names}
    assert len(set(map(registry.create, names))) == len(set(described.values())) == len(names)
    plain = registry.create('seq_bn[non_linearity=gelu]')
    other = registry.create('compacter++[reduction_factor=16]')
    assert plain != other and type(plain) is Bottleneck and type(other) is Compacter
    changed = dataclasses.replace(plain, leave_out=(1,))
    assert plain.leave_out == () and changed != plain
    assert {name: json.dumps(registry.create(name).to_json()) for name in names} == described


def test_one_of_two_options_that_exclude_each_other_replaces_the_other():
    assert registry.create('pfeiffer[size=64]').reduction_factor is None
    assert registry.create('houlsby[reduction_factor=16]').size is None
    assert registry.create('mam_adapters[bottleneck={size: 64}]').members[1].size == 64
    with pytest.raises(ValueError, match='give one of the two'):
        registry.create('pfeiffer[size=64,reduction_factor=2]')


@pytest.mark.parametrize('members', [None, 3, [1], ['lora'], {}])
def test_members_that_are_none(members):
    with pytest.raises(ValueError, match='expected a list of methods'):
        registry.from_json({'architecture': 'union', 'members': members})
