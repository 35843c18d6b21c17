"""Combining adapters of the LoRA family by their deltas: against `peft`, `adapters` and algebra."""

import dataclasses
import functools
import re
from unittest import mock

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import reference
import small_bert as small
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import params
from adapters_jax.adapters import deltas, merging, registry, sparsify
from adapters_jax.adapters.adalora import AdaLoRA
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.mtl_lora import MTLLoRA
from adapters_jax.adapters.vera import VeRA

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
KEY = jax.random.key(3)


def random_lora(seed, inputs=6, outputs=5, **options):
    """Return a LoRA and a random tree of it, at two projections of one layer."""
    method = LoRA(leave_out=(0,), **options)
    rng = np.random.default_rng(seed)
    node = {
        name: {
            'a': rng.standard_normal((inputs, method.r)).astype(np.float32),
            'b': rng.standard_normal((method.r, outputs)).astype(np.float32),
        }
        for name in ('query', 'value')
    }
    return method, {'layer_1': {'attention': node}}


def assert_deltas(found, expected, tolerance=2e-5):
    found = deltas.deltas(*found)
    assert found.keys() == expected.keys()
    for place, delta in expected.items():
        np.testing.assert_allclose(found[place], delta, rtol=0, atol=tolerance, err_msg=place)


def weighted(members, weights):
    found = [deltas.deltas(*member) for member in members]
    return {p: sum(w * x[p] for w, x in zip(weights, found, strict=True)) for p in found[0]}


LORAS = st.builds(
    random_lora,
    st.integers(0, 10_000),
    r=st.integers(1, 4),
    alpha=st.floats(0.5, 8),
    rank_stabilised=st.booleans(),
)
MEMBERS = st.lists(st.tuples(LORAS, st.floats(-2, 2)), min_size=1, max_size=3)


@QUICK
@given(MEMBERS)
def test_the_delta_of_a_concatenation_is_the_sum_of_the_deltas(pairs):
    members, weights = zip(*pairs, strict=True)
    methods, trees = zip(*members, strict=True)
    joined = deltas.concatenate(methods, trees, weights)
    assert_deltas(joined, weighted(members, weights))
    assert joined[0].r == sum(method.r for method in methods)


@QUICK
@given(MEMBERS, st.integers(0, 9))
def test_a_decomposition_of_full_rank_is_exact_whatever_the_rank(pairs, more):
    """The effective scale stays, although the rank is not that of any of the adapters."""
    members, weights = zip(*pairs, strict=True)
    methods, trees = zip(*members, strict=True)
    rank = sum(method.r for method in methods) + more
    combined = deltas.combine_deltas(methods, trees, weights, rank)
    assert_deltas(combined, weighted(members, weights))
    leaves = params.flatten(combined[1])
    assert all(x.dtype == np.float32 for x in leaves.values())
    assert leaves['layer_1/attention/query/a'].shape == (6, rank)


@QUICK
@given(LORAS, st.integers(1, 4))
def test_a_decomposition_of_lower_rank_is_the_nearest(member, rank):
    method, tree = member
    found = deltas.deltas(*deltas.combine_deltas([method], [tree], [1.0], rank))
    for place, delta in deltas.deltas(method, tree).items():
        values = np.linalg.svd(delta, compute_uv=False)
        distance = np.linalg.norm(found[place] - delta)
        np.testing.assert_allclose(distance, np.linalg.norm(values[rank:]), atol=1e-4)


def test_the_singular_values_are_split_evenly():
    method, tree = random_lora(0, r=4)
    _, combined = deltas.combine_deltas([method], [tree], [1.0], 3)
    for node in combined['layer_1']['attention'].values():
        sizes = [np.linalg.norm(node['a'], axis=0), np.linalg.norm(node['b'], axis=1)]
        np.testing.assert_allclose(*sizes, rtol=1e-5)
        assert np.all(np.diff(sizes[0]) < 0)


def test_an_adapter_of_the_full_backbone_computes_the_same_after_either():
    """The new method fits the new tree: it initialises to its shapes, and is merged like them."""
    first = LoRA(r=2, alpha=6, attn_matrices=('q',), output_lora=True, leave_out=(0,))
    second = MTLLoRA(r=3, n_up_projection=2, attn_matrices=('o', 'q'), leave_out=(2,))
    third = AdaLoRA(r=4, target_r=2, alpha=3, selfattn_lora=False, output_lora=True)
    methods = first, second, third
    trees = [small.fresh(method, seed, 0.2) for seed, method in enumerate(methods)]
    weights = [0.5, -1.0, 2.0]
    backbone = small.backbone()
    changes = [
        params.flatten(merging.merge(m, t, backbone)) for m, t in zip(methods, trees, strict=True)
    ]
    plain = params.flatten(backbone)
    expected = {
        path: plain[path]
        + sum(w * (x[path] - plain[path]) for w, x in zip(weights, changes, strict=True))
        for path in plain
    }
    for method, tree in (
        deltas.concatenate(methods, trees, weights),
        deltas.combine_deltas(methods, trees, weights, 9),
    ):
        fresh = method.init(jax.random.key(0), small.DIMENSIONS, {})
        shapes = [params.flatten(jax.tree.map(jnp.shape, x)) for x in (fresh, tree)]
        assert shapes[0] == shapes[1]
        assert method.rank_pattern['2/attention/output'] == 0
        merged = params.flatten(merging.merge(method, tree, backbone))
        for path, leaf in expected.items():
            np.testing.assert_allclose(merged[path], leaf, atol=2e-5, err_msg=path)


def test_ranks_that_differ_between_projections_are_written_as_patterns():
    first, one = random_lora(0, r=2)
    second, two = random_lora(1, r=3)
    del two['layer_1']['attention']['value']
    method, tree = deltas.concatenate([first, second], [one, two], [1.0, 1.0])
    assert (method.r, method.alpha, method.leave_out) == (5, 5.0, (0,))
    assert method.rank_pattern == {'1/attention/value': 2}
    assert method.scaling(1, 'attention/value') == method.scaling(1, 'attention/query') == 1
    expected = weighted([(first, one)], [1.0])
    expected['layer_1/attention/query'] += deltas.deltas(second, two)['layer_1/attention/query']
    assert_deltas((method, tree), expected)


# Against peft: three LoRAs of one model, whose deltas it combines in all its ways.

NAMES = ('x', 'y', 'z')
WEIGHTS = [0.6, 0.9, -0.5]
PEFT_TENSOR = re.compile(
    r'base_model\.model\.encoder\.layer\.(\d+)\.attention\.self\.(\w+)\.lora_([AB])\.(\w+)\.weight'
)


@functools.cache
def peft_model(ranks=(3, 3, 3)):
    """Return a model of `peft` with three random LoRAs of different scales."""
    config = transformers.BertConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=31,
    )
    alphas = dict(zip(NAMES, (2, 5, 3), strict=True))
    configs = {
        name: peft.LoraConfig(r=r, lora_alpha=alphas[name], target_modules=['query', 'value'])
        for name, r in zip(NAMES, ranks, strict=True)
    }
    model = peft.get_peft_model(transformers.BertModel(config), configs['x'], 'x')
    for name in NAMES[1:]:
        model.add_adapter(name, configs[name])
    reference.randomise(model, 0)
    methods = [LoRA(r=configs[name].r, alpha=alphas[name]) for name in NAMES]
    return model, methods, [peft_tree(model, name) for name in NAMES]


def peft_tree(model, adapter):
    leaves = {}
    for name, tensor in model.named_parameters():
        found = PEFT_TENSOR.fullmatch(name)
        if found and found[4] == adapter:
            path = f'layer_{found[1]}/attention/{found[2]}/{found[3].lower()}'
            leaves[path] = reference.to_array(tensor, flip=True)
    return params.unflatten(leaves)


def peft_deltas(model, adapter):
    layers = model.base_model.model.encoder.layer
    return {
        f'layer_{i}/attention/{name}': getattr(layer.attention.self, name)
        .get_delta_weight(adapter)
        .detach()
        .numpy()
        .T
        for i, layer in enumerate(layers)
        for name in ('query', 'value')
    }


def combined_by_peft(model, kind, **options):
    name = f'{kind}_{len(model.peft_config)}'
    model.add_weighted_adapter(list(NAMES), WEIGHTS, name, combination_type=kind, **options)
    return peft_deltas(model, name)


@pytest.mark.parametrize('ranks', [(3, 3, 3), (1, 4, 2)])
@pytest.mark.parametrize('rank', [2, 7, 12])
def test_svd_is_that_of_peft(ranks, rank):
    model, methods, trees = peft_model(ranks)
    expected = combined_by_peft(model, 'svd', svd_rank=rank)
    assert_deltas(deltas.combine_deltas(methods, trees, WEIGHTS, rank), expected)


@pytest.mark.parametrize('ranks', [(3, 3, 3), (1, 4, 2)])
def test_concatenation_is_that_of_peft(ranks):
    model, methods, trees = peft_model(ranks)
    expected = combined_by_peft(model, 'cat')
    found = deltas.concatenate(methods, trees, WEIGHTS)
    assert_deltas(found, expected)
    assert isinstance(jax.tree.leaves(found[1])[0], jax.Array)


FACTORS = {
    'linear': deltas.add,
    'magnitude_prune': functools.partial(sparsify.magnitude_prune, density=0.4),
    'ties': functools.partial(sparsify.ties, density=0.4),
    'ties by frequency': functools.partial(sparsify.ties, density=0.7, elect='frequency'),
}


def options_of(combine):
    """Return the options of `peft` that a way of combining stands for."""
    given = getattr(combine, 'keywords', {})
    names = {'density': 'density', 'elect': 'majority_sign_method'}
    return {names[key]: value for key, value in given.items() if key in names}


@pytest.mark.parametrize('kind', FACTORS)
def test_factors_are_combined_as_peft_combines_them(kind):
    model, methods, trees = peft_model()
    combine = FACTORS[kind]
    expected = combined_by_peft(model, kind.split()[0], **options_of(combine))
    assert_deltas(deltas.combine_factors(methods, trees, WEIGHTS, combine), expected)


@pytest.mark.parametrize('kind', [kind for kind in FACTORS if kind != 'linear'])
def test_sparse_deltas_are_combined_as_peft_combines_them(kind):
    model, methods, trees = peft_model((1, 4, 2))
    combine = FACTORS[kind]
    options = options_of(combine) | {'svd_rank': 5}
    expected = combined_by_peft(model, f'{kind.split()[0]}_svd', **options)
    assert_deltas(deltas.combine_deltas(methods, trees, WEIGHTS, 5, combine), expected)


def peft_masks(shapes, density):
    """Return the masks that `dare_*` draws, leaf by leaf and adapter by adapter, as `peft` asks."""
    ones = params.unflatten({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
    kept = [
        params.flatten(sparsify.drop(ones, density, jax.random.fold_in(KEY, i))) for i in range(3)
    ]
    return [
        torch.tensor((member[path] != 0).astype(np.float32).T) for path in shapes for member in kept
    ]


PLACES = [f'layer_{i}/attention/{name}' for i in (0, 1) for name in ('query', 'value')]


@pytest.mark.parametrize('kind', ['dare_linear', 'dare_ties'])
def test_deltas_with_entries_dropped_are_those_of_peft(kind):
    model, methods, trees = peft_model((1, 4, 2))
    combine = functools.partial(getattr(sparsify, kind), density=0.6, key=KEY)
    masks = peft_masks(dict.fromkeys(PLACES, (12, 12)), 0.6)
    with mock.patch('torch.bernoulli', side_effect=masks):
        expected = combined_by_peft(model, f'{kind}_svd', density=0.6, svd_rank=12)
    assert_deltas(deltas.combine_deltas(methods, trees, WEIGHTS, 12, combine), expected)


@pytest.mark.parametrize('kind', ['dare_linear', 'dare_ties'])
def test_factors_with_entries_dropped_are_those_of_peft(kind):
    model, methods, trees = peft_model()
    combine = functools.partial(getattr(sparsify, kind), density=0.6, key=KEY)
    shapes = {'a': (12, 3), 'b': (3, 12)}
    masks = peft_masks({f'{place}/{x}': shapes[x] for place in PLACES for x in 'ab'}, 0.6)
    with mock.patch('torch.bernoulli', side_effect=masks):
        expected = combined_by_peft(model, kind, density=0.6)
    assert_deltas(deltas.combine_factors(methods, trees, WEIGHTS, combine), expected)


@pytest.mark.parametrize('rank', [2, 3, 6])
def test_the_library_changes_the_strength_with_the_rank_and_we_do_not(rank):
    """`adapters` divides alpha by the new rank; only where that is the old one is it right."""
    model = reference.torch_model(num_hidden_layers=1)
    for name in ('x', 'y'):
        model.add_adapter(name, config=adapters.LoRAConfig(r=3, alpha=8))
    reference.randomise(model, 1)
    options = {'combine_strategy': 'lora_delta_w_svd', 'svd_rank': rank}
    model.average_adapter('mean', ['x', 'y'], weights=[0.3, 0.7], **options)
    layer = model.encoder.layer[0].attention.self
    trees = [{'layer_0': {'attention': adapters_nodes(layer, name)}} for name in ('x', 'y')]
    method = LoRA(r=3, alpha=8)
    found = deltas.deltas(*deltas.combine_deltas([method] * 2, trees, [0.3, 0.7], rank))
    for place in ('query', 'value'):
        lora = getattr(layer, place).loras['mean']
        theirs = (lora.delta_w * lora.scaling).detach().numpy().T
        path = f'layer_0/attention/{place}'
        np.testing.assert_allclose(found[path], theirs * rank / 3, atol=2e-5)


def adapters_nodes(layer, adapter):
    """Return the query's and the value's LoRA in a layer of a model of `adapters`."""
    loras = {place: getattr(layer, place).loras[adapter] for place in ('query', 'value')}
    return {
        place: {
            'a': reference.to_array(lora.lora_A, flip=True),
            'b': reference.to_array(lora.lora_B, flip=True),
        }
        for place, lora in loras.items()
    }


@pytest.mark.parametrize(
    'method', [DoRA(r=2), VeRA(r=2), LoRA(r=2, use_gating=True)], ids=lambda m: m.architecture
)
def test_methods_whose_change_is_no_product_are_refused(method):
    tree = method.init(jax.random.key(0), small.DIMENSIONS, small.backbone())
    sentence = f'{method.architecture} cannot be combined by deltas'
    with pytest.raises(ValueError, match=sentence):
        deltas.combine_deltas([method], [tree], [1.0], 2)
    with pytest.raises(ValueError, match=sentence):
        deltas.concatenate([method], [tree], [1.0])
    with pytest.raises(ValueError, match=f'the factors of {method.architecture} cannot be'):
        deltas.combine_factors([method], [tree], [1.0])


def test_other_mistakes():
    method, tree = random_lora(0)
    with pytest.raises(ValueError, match='rank=0 is not at least 1'):
        deltas.combine_deltas([method], [tree], [1.0], 0)
    with pytest.raises(ValueError, match='1 methods for 2 adapters'):
        deltas.concatenate([method], [tree, tree], [1.0, 1.0])
    with pytest.raises(ValueError, match='2 weights for 1 adapters'):
        deltas.concatenate([method], [tree], [1.0, 1.0])
    scaled = LoRA(leave_out=(0,), alpha_pattern={'query': 2})
    with pytest.raises(
        ValueError, match=re.escape('not the same for all projections, but [0.25, ')
    ):
        deltas.combine_factors([scaled], [tree], [1.0])
    other, different = random_lora(0, r=3)
    with pytest.raises(ValueError, match=re.escape('has shape (6, 8) in adapter 1 and (6, 3) in')):
        deltas.combine_factors([method, other], [tree, different], [1.0, 1.0])


def test_layers_without_a_rank_are_described_as_such():
    methods = [registry.create('lora[r=4,rank_pattern={0: 0}]')] * 2
    trees = [methods[0].init(jax.random.key(i), small.DIMENSIONS, {}) for i in range(2)]
    method, tree = deltas.combine_deltas(methods, trees, [1.0, 0.5], rank=2)
    fresh = method.init(jax.random.key(0), small.DIMENSIONS, {})
    assert set(params.flatten(fresh)) == set(params.flatten(tree))


def test_the_gate_of_a_feed_forward_network_is_kept():
    method = registry.create('lora[r=2,gate_lora=True,attn_matrices=[]]')
    gated = dataclasses.replace(small.DIMENSIONS, gated=True)
    trees = [method.init(jax.random.key(i), gated, {}) for i in range(2)]
    combined, tree = deltas.combine_deltas([method] * 2, trees, [1.0, 0.5], rank=2)
    fresh = combined.init(jax.random.key(0), gated, {})
    assert set(params.flatten(fresh)) == set(params.flatten(tree))
    assert 'layer_0/feed_forward/gate/a' in params.flatten(tree)


def test_an_adapter_that_lost_all_its_triplets_adds_nothing():
    gone = AdaLoRA(rank_pattern={'1/attention/query': 0, '1/attention/value': 0})
    own = random_lora(0, r=2)
    for combine in (functools.partial(deltas.combine_deltas, rank=2), deltas.concatenate):
        assert_deltas(combine([gone, own[0]], [{}, own[1]], [1, 1]), deltas.deltas(*own))
        with pytest.raises(ValueError, match='every rank is 0'):
            combine([gone], [{}], [1])
