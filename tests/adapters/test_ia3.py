"""(IA)³ computes what `adapters` and `peft` compute, wherever they put the scales."""

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

from adapters_jax import params
from adapters_jax.adapters.composed import Composed
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.lora import LoRA

IDS = small_bert.texts([9])[0][None]

# Options of `adapters` and what they are as ours; its alpha goes into the scales.
OF_ADAPTERS = [
    ({}, {'scale_outputs': ['key', 'value', 'up']}),
    ({'intermediate_lora': False, 'alpha': 3}, {}),
    ({'attn_matrices': ['q']}, {'scale_outputs': ['query', 'up']}),
    ({'output_lora': True, 'leave_out': [0]}, {'scale_outputs': ['key', 'value', 'up', 'down']}),
    ({'selfattn_lora': False}, {'scale_outputs': ['up']}),
    ({'use_gating': True, 'alpha': 3}, {'scale_outputs': ['key', 'value', 'up']}),
    ({'init_weights': 'bert'}, {'scale_outputs': ['key', 'value', 'up']}),
]


@pytest.mark.parametrize(('theirs', 'options'), OF_ADAPTERS, ids=str)
def test_options_of_adapters(theirs, options):
    model = live.adapters_model(adapters.IA3Config(**theirs))
    gated = theirs.get('use_gating', False)
    alpha = 1 if gated else theirs.get('alpha', 1)
    leaves = {
        path.removesuffix('b') + 'scale' if path.endswith('/b') else path: (
            alpha * leaf.reshape(-1) if path.endswith('/b') else leaf
        )
        for path, leaf in live.leaves_of(model).items()
    }
    method = IA3(
        scale_inputs=[],
        use_gating=gated,
        leave_out=theirs.get('leave_out', []),
        **{'scale_outputs': ['key', 'value']} | options,
    )
    assert live.difference(method, params.unflatten(leaves), model, padded=not gated) <= 2e-5


OF_PEFT = [
    (
        {
            'target_modules': ['key', 'value', 'output.dense'],
            'feedforward_modules': ['output.dense'],
        },
        {'scale_inputs': ['output', 'down']},
    ),
    (
        {
            'target_modules': r'.*(key|value|\d\.output\.dense)',
            'feedforward_modules': r'.*\d\.output\.dense',
        },
        {},
    ),
    (
        {'target_modules': ['query', 'intermediate.dense'], 'feedforward_modules': ['query']},
        {'scale_outputs': ['up'], 'scale_inputs': ['query']},
    ),
    (
        {'target_modules': ['output.dense'], 'feedforward_modules': []},
        {'scale_outputs': ['output', 'down'], 'scale_inputs': []},
    ),
]


@pytest.mark.parametrize(('theirs', 'options'), OF_PEFT, ids=str)
def test_options_of_peft(theirs, options):
    model = live.peft_model(peft.IA3Config(**theirs))
    leaves = {}
    for path, leaf in live.leaves_of(model).items():
        name = 'scale' if leaf.shape[1] == 1 else 'input_scale'
        leaves[path.removesuffix('ia3_l') + name] = leaf.reshape(-1)
    assert live.difference(IA3(**options), params.unflatten(leaves), model) <= 2e-5


@pytest.mark.parametrize(
    ('method', 'expected'),
    [
        (IA3(), 55_296),
        (IA3(scale_outputs=['key', 'value', 'up'], scale_inputs=[]), 55_296),
        (IA3(scale_inputs=['output', 'down']), 55_296 + 12 * 768),
        (IA3(use_gating=True), 55_296 + 12 * (2 * 769 + 3073)),
    ],
    ids=['paper', 'adapters', 'peft', 'gated'],
)
def test_parameters_at_bert_base(method, expected):
    assert live.base_count(method) == expected


BOTH = IA3(scale_outputs=['query', 'key', 'down'], scale_inputs=['output', 'up', 'down'])


@pytest.mark.parametrize('method', [IA3(), BOTH], ids=['paper', 'both'])
def test_fresh_scales_are_the_plain_model(method):
    plain = small_bert.run(method, {}, small_bert.backbone(), IDS)
    found = small_bert.run(method, small_bert.fresh(method), small_bert.backbone(), IDS)
    np.testing.assert_array_equal(found, plain)


def test_a_projection_may_be_scaled_at_both_ends():
    tree = small_bert.fresh(BOTH)
    assert set(tree['layer_0']['feed_forward']['down']) == {'scale', 'input_scale'}
    assert set(tree['layer_0']['attention']) == {'query', 'key', 'output'}
    assert tree['layer_0']['feed_forward']['down']['scale'].shape == (24,)
    assert tree['layer_0']['feed_forward']['down']['input_scale'].shape == (52,)
    assert tree['layer_0']['feed_forward']['up']['input_scale'].shape == (24,)


def test_alone_padded_and_packed_texts_agree():
    method = dataclasses.replace(BOTH, use_gating=True)
    tree = small_bert.fresh(method, sigma=0.3)
    items = small_bert.texts([5, 9])
    for alone, row, packed in small_bert.hidden_by_layout(
        method, tree, small_bert.backbone(), items
    ):
        np.testing.assert_allclose(row, alone, atol=2e-5)
        np.testing.assert_allclose(packed, alone, atol=2e-5)


def test_a_stack_of_adapters_equals_one_at_a_time():
    trees = [small_bert.fresh(BOTH, seed, 0.3) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    run = jax.vmap(lambda tree: small_bert.forward(BOTH, tree, small_bert.backbone(), IDS))
    for one, tree in zip(jax.jit(run)(stack), trees, strict=True):
        alone = small_bert.run(BOTH, tree, small_bert.backbone(), IDS)
        np.testing.assert_allclose(one, alone, atol=1e-5)


def test_behind_another_adapter_it_may_not_undo_what_that_one_did():
    """Where it scales what a projection reads, the projection is computed anew."""
    both = {'a': IA3(scale_inputs=('down',), scale_outputs=()), 'b': LoRA(r=2, output_lora=True)}
    for other in (both['b'], both['a']):
        composed = Composed(expression='stack(b, a)', members=both | {'b': other})
        with pytest.raises(ValueError, match='a scales what layer_0/feed_forward/down reads'):
            small_bert.fresh(composed)
    # Side by side they undo nothing: each computes from the same input.
    beside = Composed(expression='stack(average(b, a), c)', members=both | {'c': LoRA(r=2)})
    assert set(small_bert.fresh(beside)) == {'a', 'b', 'c'}
    composed = Composed(expression='stack(a, b)', members=both)
    tree = small_bert.fresh(composed, sigma=0.3)
    one = small_bert.run(both['a'], tree['a'], small_bert.backbone(), IDS)
    found = small_bert.run(composed, tree, small_bert.backbone(), IDS)
    assert np.abs(found - one).max() > 1e-2


def test_computes_in_the_type_of_its_input():
    model = dataclasses.replace(small_bert.Backbone(small_bert.CONFIG), dtype=jnp.bfloat16)
    method = dataclasses.replace(BOTH, use_gating=True)
    tree = small_bert.fresh(method, sigma=0.1)
    narrow = small_bert.run(method, tree, small_bert.backbone(), IDS, model=model)
    wide = small_bert.run(method, tree, small_bert.backbone(), IDS)
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(wide - narrow.astype(jnp.float32)).mean() < 0.05


def test_gates_are_drawn_from_the_key():
    def bits(seed, **options):
        tree = params.flatten(small_bert.fresh(IA3(use_gating=True, **options), seed))
        return {p: x.tobytes() for p, x in tree.items()}

    assert bits(1) == bits(1) != bits(2)
    assert bits(1, init_weights_seed=7) == bits(2, init_weights_seed=7) != bits(1)


def test_leave_out_and_sites():
    cross = dataclasses.replace(small_bert.DIMENSIONS, decoder_layers=3)

    def places(dimensions, **options):
        tree = IA3(leave_out=[0, 2], **options).init(jax.random.key(0), dimensions, {})
        assert set(tree) == {'layer_1'}
        return sorted(path.rpartition('/')[0] for path in params.flatten(tree['layer_1']))

    own, other = (
        [f'{sub_layer}/{name}' for name in ('key', 'value')]
        for sub_layer in ('attention', 'cross_attention')
    )
    assert places(cross) == [*own, *other, 'feed_forward/down']
    assert places(cross, cross_attention=False) == [*own, 'feed_forward/down']
    assert places(cross, self_attention=False) == [*other, 'feed_forward/down']
    assert places(small_bert.DIMENSIONS) == [*own, 'feed_forward/down']
    with pytest.raises(
        ValueError, match='ia3: key, value of self_attention=False, cross_attention'
    ):
        places(small_bert.DIMENSIONS, self_attention=False)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (
            {'scale_outputs': [], 'scale_inputs': []},
            'scale_outputs and scale_inputs are both empty',
        ),
        ({'scale_outputs': ['k']}, "each item 'query' or 'key'"),
    ],
)
def test_mistakes_in_the_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        IA3(**options)


def test_json_round_trip():
    values = json.loads(json.dumps(BOTH.to_json()))
    assert values.pop('architecture') == 'ia3'
    assert IA3.from_fields(values) == BOTH
