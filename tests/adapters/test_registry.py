"""Every method survives JSON, and text names it; what does not fit is refused by name."""

import dataclasses
import json
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax.adapters import fields, grammar, registry
from adapters_jax.adapters.attention import AttentionAdapter, SideAttentionAdapter
from adapters_jax.adapters.baselines import FullFineTuning, HeadOnly, TopLayers
from adapters_jax.adapters.bottleneck import Bottleneck

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
CHOICES = {
    Bottleneck: st.tuples(st.fixed_dictionaries(BOTTLENECK), SIZES).map(lambda t: t[0] | t[1]),
    AttentionAdapter: st.fixed_dictionaries(
        ATTENTION | {'mh_adapter': FLAGS, 'output_adapter': st.just(True)}
    ),
    SideAttentionAdapter: st.fixed_dictionaries(ATTENTION),
    FullFineTuning: st.just({}),
    HeadOnly: st.just({}),
    TopLayers: st.fixed_dictionaries({'layers': st.integers(1, 48)}),
}
METHODS = st.one_of(
    *(choice.map(lambda options, cls=cls: (cls, options)) for cls, choice in CHOICES.items())
)


def test_every_architecture_is_tried_with_every_field():
    assert set(CHOICES) == set(registry.ARCHITECTURES.values())
    assert {f.name for f in dataclasses.fields(Bottleneck)} == {
        *BOTTLENECK,
        'size',
        'reduction_factor',
    }


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
        ('holsby', "unknown method 'holsby'; known: adapter_plus, attention,"),
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
        ('seq_bn[leave_out=[1,,2]]', "'' is not a value"),
        ('', "'' is not a method"),
        ('houlsby[reduction_factor=16]', 'give one of the two'),
    ],
)
def test_text_that_is_refused(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        registry.create(text)


@pytest.mark.parametrize(
    ('values', 'sentence'),
    [
        ({'architecture': 'x'}, "unknown architecture 'x'; known: attention, attention_side,"),
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
