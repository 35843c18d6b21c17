"""VeRA computes what `peft` computes, trains vectors only, and redraws its matrices anywhere."""

import dataclasses
import hashlib
import itertools
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
from adapters_jax.adapters import vera
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.vera import DVoRA, VeRA

EVERY = {'attn_matrices': ['q', 'k', 'v', 'o'], 'intermediate_lora': True, 'output_lora': True}
IDS = small_bert.texts([9])[0][None]

IN_PEFT = [
    ({}, {}),
    (
        {'target_modules': ['query', 'key', 'value', 'intermediate.dense', 'output.dense']},
        EVERY,
    ),
    (
        {'target_modules': ['intermediate.dense']},
        {'selfattn_lora': False} | {'intermediate_lora': True},
    ),
    ({'layers_to_transform': [1], 'vera_dropout': 0.5}, {'leave_out': [0], 'dropout': 0.5}),
]


@pytest.mark.parametrize(('theirs', 'options'), IN_PEFT, ids=str)
def test_options_of_peft(theirs, options):
    config = {'target_modules': ['query', 'value'], 'r': 6} | theirs
    model = live.peft_model(peft.VeraConfig(**config))
    tree = live.tree_of(model)
    # The matrices are one pair, which every module lists under a name of its own.
    projections = {name[-14:]: tensor.numpy().T for name, tensor in model.named_buffers()}
    tree['constants'] = {leaf: projections[f'vera_{leaf.upper()}.default'] for leaf in 'ab'}
    method = VeRA(r=6, save_projection=True, **options)
    assert live.difference(method, tree, model) <= 2e-5


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('magnitudes', [False, True])
def test_the_full_matrices_of_adapters_are_a_lora(gated, magnitudes):
    config = {'r': 4, 'alpha': 4 if gated else 6, 'attn_matrices': ['q', 'k'], 'use_gating': gated}
    model = live.adapters_model(adapters.VeraConfig(use_dora=magnitudes, **config))
    shared = model.base_model.shared_parameters['a']
    a, b = (shared[name].detach().numpy() for name in ('lora_A', 'lora_B'))
    leaves = live.leaves_of(model)
    for path in [path for path in leaves if path.endswith('/vera_d')]:
        place = path.removesuffix('vera_d')
        full = vera.as_lora(a, b, leaves.pop(path), leaves.pop(place + 'vera_b'))
        leaves |= params.flatten(full, place)
    options = {'scale_bias': True, 'scale_norm': False} if magnitudes else {}
    method = (DoRA if magnitudes else LoRA)(**config, **options)
    assert live.difference(method, params.unflatten(leaves), model, padded=not gated) <= 2e-5


@pytest.mark.parametrize(
    ('method', 'expected'),
    [
        (VeRA(), 18_624),
        (DVoRA(), 18_624 + 24 * 768),
        (VeRA(r=256), 24 * (256 + 768)),
        (VeRA(**EVERY), 12 * (6 * 8 + 5 * 768 + 3072)),
    ],
    ids=['vera', 'dvora', 'rank', 'sites'],
)
def test_parameters_at_bert_base(method, expected):
    assert live.base_count(method) == expected


def fresh(method, seed=0, sigma=0.0):
    """Return parameters of the method on the small BERT; noise spares the constants."""
    tree = method.init(jax.random.key(seed), small_bert.DIMENSIONS, small_bert.backbone())
    constants = tree.pop('constants')
    return (small_bert.perturb(tree, seed, sigma) if sigma else tree) | {'constants': constants}


@pytest.mark.parametrize('method', [VeRA(**EVERY), VeRA(use_gating=True)], ids=['every', 'gated'])
def test_fresh_vera_is_the_plain_model(method):
    plain = small_bert.run(VeRA(), {}, small_bert.backbone(), IDS)
    found = small_bert.run(method, fresh(method), small_bert.backbone(), IDS)
    np.testing.assert_array_equal(found, plain)


def test_fresh_dvora_is_the_plain_model_to_rounding():
    plain = small_bert.run(VeRA(), {}, small_bert.backbone(), IDS)
    found = small_bert.run(DVoRA(), fresh(DVoRA()), small_bert.backbone(), IDS)
    np.testing.assert_allclose(found, plain, atol=2e-6)


def test_initial_vectors():
    tree = params.flatten(fresh(VeRA(d_initial=0.3, b_initial=-0.5)))
    for path, leaf in tree.items():
        if not path.startswith('constants/'):
            assert (leaf == jnp.float32({'d': 0.3, 'b': -0.5}[path[-1]])).all()


def test_the_matrices_are_the_same_bits_everywhere():
    constants = VeRA(**EVERY).constants(small_bert.DIMENSIONS)['constants']
    assert {name: x.shape for name, x in constants.items()} == {'a': (52, 8), 'b': (8, 52)}
    digest = hashlib.sha256(b''.join(np.asarray(constants[x]).tobytes() for x in 'ab')).hexdigest()
    assert digest == '30dfa8a7d436e421b4e5c62db48c79e9590129f0671cb664e0bd9682942c4592'


def test_the_matrices_are_kaiming_uniform():
    constants = VeRA(r=64).constants(live.BERT_BASE)['constants']
    for name, inputs in (('a', 768), ('b', 64)):
        drawn, bound = np.asarray(constants[name]), (6 / inputs) ** 0.5
        assert 0.999 * bound < np.abs(drawn).max() < bound
        assert drawn.mean() == pytest.approx(0, abs=0.01 * bound)
        assert drawn.std() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert len(np.unique(drawn)) > 0.99 * drawn.size
    assert not np.intersect1d(constants['a'] * 2, constants['b']).size > 100


def test_constants_belong_to_the_seed_not_to_the_key():
    def bits(method, key=0):
        tree = params.flatten(fresh(method, key))
        return {p: x.tobytes() for p, x in tree.items() if p.startswith('constants/')}

    assert bits(VeRA(), 1) == bits(VeRA(), 2) != bits(VeRA(projection_seed=1), 1)
    dimensions = small_bert.DIMENSIONS
    redrawn = params.flatten(VeRA().constants(dimensions))
    assert {p: x.tobytes() for p, x in redrawn.items()} == bits(VeRA())
    assert VeRA(save_projection=True).constants(dimensions) == {}
    assert bits(VeRA(save_projection=True)) == bits(VeRA())
    jitted = jax.jit(lambda: VeRA().init(jax.random.key(0), dimensions, {})['constants'])()
    assert {f'constants/{p}': x.tobytes() for p, x in jitted.items()} == bits(VeRA())


def test_gates_are_drawn_from_the_key():
    def bits(seed, **options):
        tree = params.flatten(fresh(VeRA(use_gating=True, **options), seed))
        return {p: x.tobytes() for p, x in tree.items()}

    assert bits(1) == bits(1) != bits(2)
    assert bits(1, init_weights_seed=7) == bits(2, init_weights_seed=7) != bits(1)


@pytest.mark.parametrize(
    'method',
    [
        pytest.param(VeRA(**EVERY), id='vera'),
        pytest.param(DVoRA(), id='dvora', marks=pytest.mark.slow),
    ],
)
def test_a_stack_of_adapters_equals_one_at_a_time(method):
    trees = [fresh(method, seed, 0.3) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    run = jax.vmap(lambda tree: small_bert.forward(method, tree, small_bert.backbone(), IDS))
    found = jax.jit(run)(stack)
    for one, tree in zip(found, trees, strict=True):
        alone = small_bert.run(method, tree, small_bert.backbone(), IDS)
        np.testing.assert_allclose(one, alone, atol=1e-5)
    assert all(np.abs(a - b).max() > 1e-2 for a, b in itertools.combinations(found, 2))


def test_alone_padded_and_packed_texts_agree():
    method = VeRA(use_gating=True)
    tree = fresh(method, sigma=0.3)
    items = small_bert.texts([5, 9])
    for alone, row, packed in small_bert.hidden_by_layout(
        method, tree, small_bert.backbone(), items
    ):
        np.testing.assert_allclose(row, alone, atol=2e-5)
        np.testing.assert_allclose(packed, alone, atol=2e-5)


def test_leave_out():
    assert set(fresh(VeRA(leave_out=[0, 2]))) == {'layer_1', 'constants'}


def test_stored_matrices_must_be_there():
    method = VeRA(save_projection=True)
    tree = fresh(method)
    del tree['constants']
    with pytest.raises(ValueError, match='the shared matrices are missing; with save_projection='):
        small_bert.forward(method, tree, small_bert.backbone(), IDS)


def test_refuses_a_negative_seed():
    with pytest.raises(ValueError, match='vera: projection_seed=-1 is not at least 0'):
        VeRA(projection_seed=-1)


def test_json_round_trip():
    method = dataclasses.replace(DVoRA(), save_projection=True, d_initial=0.5, scale_bias=True)
    values = json.loads(json.dumps(method.to_json()))
    assert values.pop('architecture') == 'dvora'
    assert DVoRA.from_fields(values) == method
