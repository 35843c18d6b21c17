"""What every method must hold, method by method: the conformance suite.

It covers what the test suites of `adapters` and `peft` check of each method, and what neither does:
merging with non-zero weights and biases, exact unmerging, equality of configs field by field,
per-row adapters, number of compilations, any number of devices; and in `test_handed_on.py` size on
disk and other backbones refused.
`pytest tests/conformance --conformance=FILE` writes what the table of docs/methods.md is made of.
"""

import dataclasses
import json
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import METHODS, NAME

from adapters_jax import params as trees
from adapters_jax.adapters import merging, registry

each = pytest.mark.parametrize('preset', METHODS)
one_of_each_kind = pytest.mark.parametrize('preset', cases.quick())
one_of_each_site = pytest.mark.parametrize('preset', cases.quick(families=cases.SITES))


# ---- the value


@pytest.mark.shows('config')
@each
def test_config_round_trip(preset):
    for method in (registry.create(preset), cases.method(preset)):
        written = json.loads(json.dumps(method.to_json()))
        again = registry.from_json(written)
        assert again == method and hash(again) == hash(method)
        for one, two in zip(parts(again), parts(method), strict=True):
            for field in dataclasses.fields(two):
                assert getattr(one, field.name) == getattr(two, field.name), field.name
        assert again.to_json() == written


def parts(method):
    return getattr(method, 'members', (method,))


@pytest.mark.shows('config')
@each
def test_unknown_options_are_refused(preset):
    with pytest.raises(ValueError, match='nonsense'):
        registry.create(f'{preset}[nonsense=1]')


COUNTS = {  # of the libraries, by running them, at BERT-base; of the papers where they are wrong
    'pfeiffer': 894_528,
    'double_seq_bn': 1_789_056,
    'par_bn': 7_091_712,
    'scaled_par_bn': 7_091_724,
    'seq_bn_inv': 1_190_592,
    'double_seq_bn_inv': 2_085_120,
    'compacter': 57_088,
    'compacter++': 28_576,
    'prefix_tuning': 9_872_384,
    'prefix_tuning_flat': 552_960,
    'prompt_tuning': 7_680,
    'lora': 294_912,
    'ia3': 55_296,
    'dora': 313_344,
    'vera': 18_624,
    'mtl_lora': 295_128,
    'loreft': 36_888,
    'noreft': 36_888,
    'direft': 36_888,
    'mam_adapters': 22_493_984,
    'unipelt': 11_083_376,
}


@pytest.mark.shows('count')
@pytest.mark.parametrize('preset', sorted(COUNTS))
def test_parameter_count_at_bert_base(preset):
    assert trees.count(cases.shapes_at_bert_base(registry.create(preset))) == COUNTS[preset]


# ---- initialisation


@pytest.mark.shows('deterministic')
@one_of_each_kind
def test_a_seed_gives_the_same_weights(preset):
    method, backbone = cases.method(preset), tiny.backbone()
    keys = [jax.random.key(seed) for seed in (3, 3, 4)]
    one, same, other = (method.init(key, tiny.CONFIG.dimensions, backbone) for key in keys)
    assert cases.bits(one) == cases.bits(same)
    same_for_all = preset in cases.NOTHING_DRAWN
    assert same_for_all == (cases.bits(one) == cases.bits(other))


@pytest.mark.shows('starts as backbone')
@pytest.mark.parametrize('preset', sorted(cases.FROM_ZERO))
def test_starts_as_the_plain_backbone(preset):
    plain = cases.fresh('head') | {'heads': cases.fresh(preset)['heads']}
    expected = cases.logits('head', plain, cases.packed())
    np.testing.assert_array_equal(cases.logits(preset, cases.fresh(preset)), expected)


@pytest.mark.shows('starts as backbone')
@pytest.mark.parametrize('preset', sorted(cases.NEARLY_FROM_ZERO))
def test_starts_as_the_plain_backbone_up_to_rounding(preset):
    plain = cases.fresh('head') | {'heads': cases.fresh(preset)['heads']}
    expected = cases.logits('head', plain, cases.packed())
    np.testing.assert_allclose(cases.logits(preset, cases.fresh(preset)), expected, atol=1e-5)


@pytest.mark.shows('acts')
@one_of_each_site
def test_changes_the_output_where_it_is_trained(preset):
    params = cases.trained(preset)
    plain = cases.fresh('head') | {'heads': params['heads']}
    expected = cases.logits('head', plain, cases.layout(preset))
    assert np.abs(cases.logits(preset, params) - expected).max() > 1e-2


# ---- training


@pytest.mark.shows('trains')
@one_of_each_site
def test_the_loss_falls_and_only_its_leaves_change(preset):
    (trainable, frozen), (after, still), losses, step, state = cases.run(preset)
    assert losses[-1] < 0.95 * losses[0], losses
    assert cases.bits(frozen) == cases.bits(still)
    changed = [p for p, x in cases.bits(after).items() if x != cases.bits(trainable)[p]]
    untouched = {path for path in trees.flatten(trainable) if path not in changed}
    assert untouched == {path for path in untouched if cases.IDLE.search(path)}, untouched
    assert step._cache_size() == 1
    sizes = {leaf.size for leaf in jax.tree.leaves(trainable)} | {1}
    assert {np.size(leaf) for leaf in jax.tree.leaves(state)} <= sizes | ranks(trainable)


def ranks(trainable):
    """Sizes of what AdaLoRA's schedule keeps of each triplet: sums over a leaf's one axis."""
    return {n for leaf in jax.tree.leaves(trainable) for n in leaf.shape}


@pytest.mark.shows('trains')
@each
def test_another_adapter_and_its_head_stay_frozen(preset):
    params, model = cases.fresh(preset), cases.model(preset)
    other = {'theirs': {'layer_0': {'attention': {'x': np.zeros(1)}}}}
    heads = params['heads'] | {'theirs': params['heads'][NAME]}
    both = params | {'adapters': params['adapters'] | other, 'heads': heads}
    trainable, frozen = trees.partition(both, model.rules)
    assert not any('/theirs/' in path for path in trees.flatten(trainable))
    assert any('heads/theirs/' in path for path in trees.flatten(frozen))


@pytest.mark.shows('devices')
@pytest.mark.parametrize('preset', cases.quick(families={'adalora', 'loreft', 'prompt_tuning'}))
def test_one_device_or_eight(preset):
    one, eight = cases.run(preset), cases.run(preset, devices=8)
    np.testing.assert_allclose(eight[2], one[2], rtol=1e-4)


@pytest.mark.shows('remat')
@pytest.mark.parametrize('preset', cases.quick(families={'loreft', 'prompt_tuning', 'unipelt'}))
def test_recomputing_activations_changes_no_gradient(preset):
    params, batch = cases.trained(preset), cases.layout(preset)

    def gradient(remat):
        model = dataclasses.replace(cases.model(preset), remat=remat)
        trainable, frozen = trees.partition(params, model.rules)

        def loss(tree):
            total, count = cases.TASK.loss(model.apply(trees.merge(tree, frozen), batch), batch, 0)
            return total / count

        return trees.flatten(jax.jit(jax.grad(loss))(trainable))

    plain, again = gradient('none'), gradient('full')
    for path, leaf in plain.items():
        assert np.isfinite(leaf).all(), path
        np.testing.assert_allclose(again[path], leaf, atol=1e-5, err_msg=path)


# ---- the forward pass


@pytest.mark.shows('packing')
@pytest.mark.parametrize('preset', cases.quick(p for p in METHODS if cases.method(p).packable))
def test_texts_that_share_a_row_do_not_meet(preset):
    params = cases.trained(preset)
    alone = cases.logits(preset, params, cases.one_each())
    np.testing.assert_allclose(cases.logits(preset, params), alone, atol=2e-5)


@pytest.mark.parametrize('preset', ['prompt_tuning', 'loreft', 'direft'])
def test_one_row_one_adapter(preset):
    """Mapped over stacked parameters, as `test_bank.py` shows of every method in a bank."""
    batch = {name: x[:3] for name, x in cases.layout(preset).items()}
    bank = [cases.trained(preset, seed) for seed in range(2)]
    shared = bank[0]['backbone']
    own = [tree['adapters'] for tree in bank]
    choice = np.array([1, 0, 1])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves)[choice], *own)

    def one(adapter, row):
        params = {'backbone': shared, 'adapters': adapter, 'heads': bank[0]['heads']}
        single = {name: column[None] for name, column in row.items()}
        return cases.model(preset).apply(params, single)[0]

    found = jax.jit(jax.vmap(one))(stacked, batch)
    for row, which in enumerate(choice):
        params = bank[0] | {'adapters': own[which]}
        expected = cases.outputs(preset)(params, cases.layout(preset))[row]
        np.testing.assert_allclose(found[row], expected, atol=2e-5)


@pytest.mark.shows('bfloat16')
@one_of_each_site
def test_bfloat16_stays_close(preset):
    params, batch = cases.trained(preset), cases.layout(preset)
    model = dataclasses.replace(cases.model(preset), dtype=jnp.bfloat16)
    found = np.asarray(jax.jit(model.apply)(params, batch))[batch['example_mask']]
    expected = np.asarray(cases.outputs(preset)(params, batch))[batch['example_mask']]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).mean() < 0.05 * np.abs(expected).mean() + 0.02


@pytest.mark.shows('leave_out')
@pytest.mark.parametrize(
    'preset',
    cases.quick(p for p in METHODS if all(hasattr(m, 'leave_out') for m in parts(cases.method(p)))),
)
def test_layers_left_out_have_no_weights(preset):
    members = [dataclasses.replace(m, leave_out=(0,)) for m in parts(cases.method(preset))]
    method = members[0] if len(members) == 1 else registry.Union(members=tuple(members))
    model = dataclasses.replace(cases.model(preset), method=method)
    params = tiny.params(model)
    trainable, _ = trees.partition(params, model.rules)
    layers = {
        int(found[1])
        for path in trees.flatten(trainable)
        if (found := re.search(r'layer_(\d+)/', path))
    }
    assert layers == {1}
    assert np.isfinite(jax.jit(model.apply)(params, cases.layout(preset))).all()


# ---- trees


@pytest.mark.shows('merges')
@pytest.mark.parametrize('preset', sorted(cases.MERGEABLE))
def test_merged_is_the_same_and_the_original_comes_back(preset):
    """From the plain backbone and what a folder holds, as the adapter is handed on."""
    params, method = cases.trained(preset), cases.method(preset)
    trainable, _ = trees.partition(params, cases.model(preset).rules)
    plain, constants = cases.fresh(preset)['backbone'], method.constants(tiny.CONFIG.dimensions)
    whole = cases.described(preset, trainable).overlay(plain, constants)
    before, as_before = cases.bits(plain), cases.bits(whole['backbone'])
    adapter = whole.get('adapters', {}).get(NAME, {})
    merged = merging.merge(method, adapter, whole['backbone'])
    assert (cases.bits(plain), cases.bits(whole['backbone'])) == (before, as_before)
    found, unchanged = (
        cases.logits('head', {'backbone': tree, 'heads': params['heads']}, cases.packed())
        for tree in (merged, plain)
    )
    np.testing.assert_allclose(found, cases.logits(preset, params), atol=2e-5)
    assert np.abs(found - unchanged).max() > 1e-2


@pytest.mark.parametrize('preset', sorted(set(METHODS) - cases.MERGEABLE))
def test_what_no_weights_compute_is_not_merged(preset):
    params = cases.trained(preset)
    with pytest.raises(ValueError, match='cannot be merged'):
        merging.merge(cases.method(preset), params['adapters'][NAME], params['backbone'])
