"""LoRA and DoRA compute what `adapters` and `peft` compute, and keep what they promise."""

import dataclasses
import json

import adapters
import jax
import jax.numpy as jnp
import low_rank_models as live
import numpy as np
import peft
import pytest
import small_bert
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import params
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.method import At
from adapters_jax.sites import Dimensions, Linear

BASE = {'r': 4, 'alpha': 6}
EVERY = {'attn_matrices': ['q', 'k', 'v', 'o'], 'intermediate_lora': True, 'output_lora': True}
# What a DoRA of `adapters` is as ours.
DORA_OF_ADAPTERS = {'scale_bias': True, 'scale_norm': False, 'detach_norm': False}

SINGLY = [
    {},
    {'attn_matrices': ['q', 'k', 'v']},
    {'selfattn_lora': False, 'intermediate_lora': True},
    {'intermediate_lora': True},
    {'output_lora': True},
    {'leave_out': [0]},
    {'use_gating': True},
    {'use_dora': True},
    {'use_dora': True, 'use_gating': True},
    {'use_dora': True, 'intermediate_lora': True, 'output_lora': True},
]
# Which are in the random combinations, or in those above.
REPEATED = [
    {'r': 1},
    {'r': 8, 'alpha': 8},
    {'alpha': 1},
    *({'attn_matrices': [letter]} for letter in 'qkv'),
    {'dropout': 0.5},
    {'init_weights': 'bert', 'init_weights_seed': 3},
    {'use_dora': True, 'alpha': 4},
]


def ours(options):
    """Return our method for options of `adapters`, whose gates make it forget alpha / r."""
    options = dict(options)
    if options.get('use_gating'):
        options['alpha'] = options['r']
    if options.pop('use_dora', False):
        return DoRA(**options | DORA_OF_ADAPTERS)
    return LoRA(**options)


def difference_to_adapters(options, seed=0):
    model = live.adapters_model(adapters.LoRAConfig(**options), seed)
    padded = not options.get('use_gating', False)  # the library's gate looks at padding
    return live.difference(ours(options), live.tree_of(model), model, padded)


@pytest.mark.parametrize(
    'options', [*SINGLY, *(pytest.param(x, marks=pytest.mark.slow) for x in REPEATED)], ids=str
)
def test_each_option_of_adapters(options):
    assert difference_to_adapters(BASE | options) <= 2e-5


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            'r': st.sampled_from([2, 4]),
            'alpha': st.sampled_from([2, 5]),
            'attn_matrices': st.sampled_from([['q'], ['q', 'v'], ['k', 'v'], ['q', 'k', 'v']]),
            'intermediate_lora': st.booleans(),
            'output_lora': st.booleans(),
            'leave_out': st.sampled_from([[], [0], [1]]),
            'dropout': st.sampled_from([0.0, 0.5]),
            'use_gating': st.booleans(),
            'use_dora': st.booleans(),
        }
    ),
    st.integers(0, 1000),
)
def test_random_combinations_of_adapters(options, seed):
    assert difference_to_adapters(options, seed) <= 2e-5


ALL_MODULES = ['query', 'key', 'value', 'attention.output.dense', 'intermediate.dense']
IN_PEFT = [
    ({}, {}),
    ({'use_rslora': True}, {'rank_stabilised': True}),
    ({'target_modules': [*ALL_MODULES, 'output.dense']}, EVERY),
    (
        {'target_modules': ALL_MODULES, 'exclude_modules': r'.*layer\.0\..*query'},
        EVERY | {'output_lora': False, 'rank_pattern': {'0/query': 0}},
    ),
    ({'layers_to_transform': [1]}, {'leave_out': [0]}),
    (
        {'rank_pattern': {'query': 2, r'layer\.1\.attention\.self\.value': 6}},
        {'rank_pattern': {'query': 2, '1/value': 6}},
    ),
    (
        {'alpha_pattern': {'query': 2, r'layer\.1\..*value': 9}, 'rank_pattern': {'query': 3}},
        {'alpha_pattern': {'query': 2, '1/attention/value': 9}, 'rank_pattern': {'query': 3}},
    ),
    ({'lora_dropout': 0.5}, {'dropout': 0.5}),
]


@pytest.mark.parametrize('dora', [False, True], ids=['lora', 'dora'])
@pytest.mark.parametrize(('theirs', 'options'), IN_PEFT, ids=str)
def test_options_of_peft(theirs, options, dora):
    targets = {'target_modules': ['query', 'value'], 'r': 4, 'lora_alpha': 6, 'use_dora': dora}
    model = live.peft_model(peft.LoraConfig(**targets | theirs))
    method = (DoRA if dora else LoRA)(**BASE | options)
    assert live.difference(method, live.tree_of(model), model) <= 2e-5


@pytest.mark.parametrize(
    ('method', 'expected'),
    [
        (LoRA(), 294_912),
        (DoRA(), 313_344),
        (LoRA(use_gating=True), 294_912 + 24 * 769),
        (LoRA(r=16, attn_matrices=['v'], output_lora=True), 12 * 16 * (2 * 768 + 3072 + 768)),
        (LoRA(rank_pattern={'0': 0, '1/query': 2}), 294_912 - 2 * 8 * 1536 - 6 * 1536),
    ],
    ids=['lora', 'dora', 'gated', 'sites', 'pattern'],
)
def test_parameters_at_bert_base(method, expected):
    assert live.base_count(method) == expected


def fresh(method, seed=0, sigma=0.0):
    """Return parameters of the method on the small BERT, as initialised or with noise."""
    tree = method.init(jax.random.key(seed), small_bert.DIMENSIONS, small_bert.backbone())
    return small_bert.perturb(tree, seed, sigma) if sigma else tree


IDS = small_bert.texts([9])[0][None]


@pytest.mark.parametrize(
    'method',
    [
        pytest.param(LoRA(use_gating=True), id='gated'),
        pytest.param(LoRA(**EVERY), id='every', marks=pytest.mark.slow),
    ],
)
def test_fresh_lora_is_the_plain_model(method):
    plain = small_bert.run(LoRA(), {}, small_bert.backbone(), IDS)
    found = small_bert.run(method, fresh(method), small_bert.backbone(), IDS)
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize('scale_bias', [pytest.param(False, marks=pytest.mark.slow), True])
def test_fresh_dora_is_the_plain_model_to_rounding(scale_bias):
    method = DoRA(**EVERY, scale_bias=scale_bias)
    plain = small_bert.run(LoRA(), {}, small_bert.backbone(), IDS)
    found = small_bert.run(method, fresh(method), small_bert.backbone(), IDS)
    np.testing.assert_allclose(found, plain, atol=2e-6)


def test_initial_factors():
    tree = params.flatten(fresh(LoRA(r=16, **EVERY)))
    a = np.concatenate([x.ravel() for path, x in tree.items() if path.endswith('query/a')])
    assert np.abs(a).max() <= 24**-0.5
    assert a.std() == pytest.approx((3 * 24) ** -0.5, rel=0.05)
    assert not any(x.any() for path, x in tree.items() if path.endswith('/b'))
    tree = params.flatten(fresh(LoRA(r=16, init_weights='bert', **EVERY)))
    for leaf in 'ab':
        drawn = np.concatenate([x.ravel() for path, x in tree.items() if path.endswith('/' + leaf)])
        assert drawn.std() == pytest.approx(0.02, rel=0.05)
    drawn = {x.tobytes() for x in map(np.asarray, tree.values())}
    assert len(drawn) == len(tree)  # no two projections begin alike


def test_magnitudes_are_the_norms_of_the_columns():
    tree, backbone = fresh(DoRA(**EVERY)), small_bert.backbone()
    for path, leaf in params.flatten(tree).items():
        if path.endswith('/magnitude'):
            kernel = params.flatten(backbone)[path.replace('magnitude', 'kernel')]
            np.testing.assert_allclose(leaf, np.linalg.norm(kernel, axis=0), rtol=1e-6)


@pytest.mark.parametrize('cls', [LoRA, DoRA])
def test_equal_seeds_give_equal_weights(cls):
    def bits(seed, **options):
        return {p: x.tobytes() for p, x in params.flatten(fresh(cls(**options), seed)).items()}

    assert bits(1) == bits(1) != bits(2)
    assert bits(1, init_weights_seed=7) == bits(2, init_weights_seed=7) != bits(1)


@pytest.mark.parametrize(
    'method',
    [
        pytest.param(LoRA(alpha=20, use_gating=True, output_lora=True), id='lora'),
        pytest.param(DoRA(), id='dora', marks=pytest.mark.slow),
    ],
)
def test_alone_padded_and_packed_texts_agree(method):
    tree = fresh(method, sigma=0.2)
    items = small_bert.texts([5, 9])
    for alone, row, packed in small_bert.hidden_by_layout(
        method, tree, small_bert.backbone(), items
    ):
        np.testing.assert_allclose(row, alone, atol=2e-5)
        np.testing.assert_allclose(packed, alone, atol=2e-5)


@pytest.mark.parametrize(
    'method',
    [
        pytest.param(LoRA(use_gating=True, output_lora=True), id='lora'),
        pytest.param(DoRA(**EVERY, scale_bias=True), id='dora', marks=pytest.mark.slow),
    ],
)
def test_a_stack_of_adapters_equals_one_at_a_time(method):
    trees = [fresh(method, seed, 0.3) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    given = {'weights': small_bert.backbone(), 'ids': IDS, 'model': small_bert.SHALLOW[1]}
    run = jax.vmap(lambda tree: small_bert.forward(method, tree, **given))
    for one, tree in zip(jax.jit(run)(stack), trees, strict=True):
        alone = small_bert.run(method, tree, **given)
        np.testing.assert_allclose(one, alone, atol=1e-5)


def test_the_gate_multiplies_the_scaled_change():
    small, large = (LoRA(r=2, alpha=alpha, use_gating=True) for alpha in (2, 4))
    tree = fresh(small, sigma=0.3)
    doubled = params.map_with_path(lambda p, x: 2 * x if p.endswith('/b') else x, tree)
    expected = small_bert.run(small, doubled, small_bert.backbone(), IDS)
    found = small_bert.run(large, tree, small_bert.backbone(), IDS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_dropout_needs_a_key_and_leaves_the_plain_path_alone():
    method = LoRA(dropout=0.5)
    zero, noisy = fresh(method), fresh(method, sigma=0.3)
    key = jax.random.key(0)
    run = jax.jit(
        lambda tree, key: small_bert.forward(method, tree, small_bert.backbone(), IDS, key=key)
    )
    np.testing.assert_array_equal(run(zero, key), run(zero, None))
    assert np.abs(run(noisy, key) - run(noisy, None)).max() > 1e-2
    np.testing.assert_array_equal(run(noisy, key), run(noisy, key))


def projection(kernel):
    """Return the end of a projection of random inputs, and where it is."""
    x = jax.random.normal(jax.random.key(1), (2, 5, 24))
    end = Linear(inputs=x, kernel=kernel, bias=None, output=x @ kernel, mask=None)
    return end, At(layer=0, name='attention/query', shared={}, key=None)


def test_the_gate_reads_what_dropout_has_not_touched():
    gated = LoRA(dropout=0.5, use_gating=True)
    place = fresh(gated, sigma=0.3)['layer_0']['attention']['query']
    end, at = projection(small_bert.backbone()['layer_0']['attention']['query']['kernel'])
    at = at.replace(key=jax.random.key(2))
    plain = LoRA(dropout=0.5).change(place, end, at)
    opened = end.inputs @ place['gate']['kernel'] + place['gate']['bias'].reshape(1, 1, 1)
    expected = plain * jax.nn.sigmoid(opened).mean(1, keepdims=True)
    np.testing.assert_allclose(gated.change(place, end, at), expected, atol=1e-6)


def test_the_norm_is_a_constant_to_the_gradient_unless_asked():
    place = fresh(DoRA(), sigma=0.3)['layer_0']['attention']['query']
    end, at = projection(small_bert.backbone()['layer_0']['attention']['query']['kernel'])
    weights = jax.random.normal(jax.random.key(3), (2, 5, 24))
    direction = place['b']  # along which the norms grow

    def loss(method, b):
        return (method.linear(place | {'b': b}, end, at) * weights).sum()

    def along(**options):
        """Return the derivative of the loss along a direction of b, from its gradient."""
        return float((jax.grad(loss, 1)(DoRA(**options), place['b']) * direction).sum())

    ends = [loss(DoRA(), place['b'] + step * direction) for step in (0.01, -0.01)]
    measured = float(ends[0] - ends[1]) / 0.02
    assert along(detach_norm=False) == pytest.approx(measured, rel=0.01)
    assert along() != pytest.approx(measured, rel=0.1)


def test_a_column_of_zeros_has_finite_gradients():
    end, at = projection(jnp.ones((24, 24)).at[:, 3].set(0))
    place = {'a': jnp.ones((24, 8)), 'b': jnp.zeros((8, 24)), 'magnitude': jnp.zeros(24)}
    for detach in (True, False):
        method = DoRA(detach_norm=detach)
        found = jax.grad(lambda place, m=method: m.linear(place, end, at).sum())(place)
        assert all(np.isfinite(x).all() for x in found.values())


def test_computes_in_the_type_of_its_input():
    for method in (LoRA(use_gating=True), DoRA()):
        tree = fresh(method, sigma=0.1)
        model = dataclasses.replace(small_bert.Backbone(small_bert.CONFIG), dtype=jnp.bfloat16)
        wide = small_bert.run(method, tree, small_bert.backbone(), IDS)
        narrow = small_bert.run(method, tree, small_bert.backbone(), IDS, model=model)
        assert narrow.dtype == jnp.bfloat16
        assert np.abs(wide - narrow.astype(jnp.float32)).mean() < 0.05


def test_patterns_name_the_most_specific_place_first():
    method = LoRA(
        r=1,
        attn_matrices=['q', 'k', 'v', 'o'],
        rank_pattern={'0/attention/query': 2, '0/query': 3, '0': 4, 'query': 5, 'attention/key': 6},
        alpha_pattern={'1': 7.5},
    )
    ranks = {
        path: leaf.shape[1]
        for path, leaf in params.flatten(fresh(method)).items()
        if path.endswith('/a')
    }
    names = ('query', 'key', 'value', 'output')
    expected = {0: (2, 4, 4, 4), 1: (5, 6, 1, 1), 2: (5, 6, 1, 1)}
    assert ranks == {
        f'layer_{i}/attention/{name}/a': rank
        for i, row in expected.items()
        for name, rank in zip(names, row, strict=True)
    }
    assert method.scaling(1, 'attention/query') == 7.5 / 5
    assert method.scaling(0, 'attention/query') == 8 / 2
    stable = dataclasses.replace(method, rank_stabilised=True)
    assert stable.scaling(0, 'attention/key') == 8 / 4**0.5


def test_leave_out_and_sites():
    cross = dataclasses.replace(live.BERT_BASE, layers=2, decoder_layers=2)

    def places(dimensions: Dimensions, **options):
        method = LoRA(attn_matrices=['v', 'q'], **options)
        tree = jax.eval_shape(lambda: method.init(jax.random.key(0), dimensions, {}))
        return sorted(path[:-2] for path in params.flatten(tree) if path.endswith('/a'))

    of = 'layer_1/{}/{}'.format
    both = [of('attention', 'query'), of('attention', 'value')]
    crossing = [of('cross_attention', 'query'), of('cross_attention', 'value')]
    assert places(cross, leave_out=[0]) == both + crossing
    assert places(cross, leave_out=[0], crossattn_lora=False) == both
    assert places(cross, leave_out=[0], selfattn_lora=False) == crossing
    plain = dataclasses.replace(cross, decoder_layers=0)
    assert places(plain, leave_out=[0]) == both
    with pytest.raises(ValueError, match='the backbone has none; set selfattn_lora=True'):
        places(plain, selfattn_lora=False)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'r': 0}, 'r=0 is not at least 1'),
        ({'alpha': 0}, 'alpha=0 is not above 0'),
        ({'dropout': 1.0}, r'dropout=1.0 is not in \[0, 1\)'),
        ({'attn_matrices': ['x']}, "each item 'q' or 'k' or 'v' or 'o'"),
        ({'attn_matrices': []}, 'no projection is adapted; name some in attn_matrices'),
        ({'rank_pattern': {'query': -1}}, "rank_pattern has 'query': -1; expected 0 or more"),
        ({'rank_pattern': {'query': 1.5}}, 'each value a whole number'),
        ({'alpha_pattern': {'query': 0}}, "alpha_pattern has 'query': 0; expected a number above"),
        *(
            ({'rank_pattern': {key: 2}}, f"rank_pattern has the key '{key}'; expected a layer's")
            for key in ('default', 'attention', '01', '1/', '/query', 'attention/up', '1/query/x')
        ),
    ],
    ids=str,
)
def test_mistakes_in_the_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoRA(**options)


@pytest.mark.parametrize('key', ['3', '0/key', 'up', '1/cross_attention/query', '2'])
def test_a_pattern_must_name_what_is_adapted(key):
    method = LoRA(alpha_pattern={key: 2}, leave_out=[2])
    with pytest.raises(ValueError, match=f"alpha_pattern names '{key}', but no adapted projection"):
        fresh(method)


def test_dora_wants_the_backbone():
    with pytest.raises(ValueError, match='weights lack layer_0/attention/query/kernel'):
        DoRA().init(jax.random.key(0), small_bert.DIMENSIONS, {})


def test_json_round_trip():
    method = DoRA(rank_pattern={'1/query': 3}, alpha_pattern={'value': 0.5}, leave_out=[2])
    values = json.loads(json.dumps(method.to_json()))
    assert values.pop('architecture') == 'dora'
    assert DoRA.from_fields(values) == method
    assert hash(DoRA.from_fields(values)) == hash(method)
