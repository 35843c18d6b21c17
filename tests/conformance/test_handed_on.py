"""What is done with what a method has trained: it is averaged, written, read, and refused."""

import dataclasses

import cases
import jax
import numpy as np
import pytest
import tiny
from cases import NAME

from adapters_jax import params as trees
from adapters_jax.adapters import arithmetic, registry
from adapters_jax.interop import adapter_folder

one_of_each_kind = pytest.mark.parametrize('preset', cases.quick())

# ---- trees


def own(preset, seed=0):
    """Return what is trained as one tree: the adapter, or else leaves of the backbone."""
    params = cases.trained(preset, seed)
    trainable, _ = trees.partition(params, cases.model(preset).rules)
    tree = params.get('adapters', {}).get(NAME) or trainable['backbone']
    assert jax.tree.leaves(tree)
    return tree


@pytest.mark.shows('average')
@one_of_each_kind
def test_the_average_of_one_with_itself(preset):
    tree = own(preset)
    assert cases.bits(arithmetic.average([tree, tree])) == cases.bits(tree)


@pytest.mark.shows('average')
@one_of_each_kind
def test_a_weighted_sum_is_the_sum_of_each_leaf(preset):
    weights = (-0.2, 0.9, 0.3)
    each_tree = [trees.flatten(own(preset, seed)) for seed in range(3)]
    found = arithmetic.average([own(preset, seed) for seed in range(3)], weights)
    for path, leaf in trees.flatten(found).items():
        parts = [weight * tree[path] for weight, tree in zip(weights, each_tree, strict=True)]
        np.testing.assert_allclose(leaf, sum(parts), atol=1e-6, err_msg=path)


# ---- files

# One for each form of leaves.
FILES = {'adalora', 'attention_side', 'compacter', 'loreft', 'prompt_tuning', 'unipelt'}


@pytest.mark.shows('saves')
@one_of_each_kind
def test_saved_and_loaded_it_computes_the_same(preset, tmp_path):
    params, model = cases.trained(preset), cases.model(preset)
    trainable, frozen = trees.partition(params, model.rules)
    adapter_folder.save(cases.described(preset, trainable), tmp_path / 'adapter')
    again = adapter_folder.load(tmp_path / 'adapter')
    assert registry.from_json(again.method) == model.method
    adapter_folder.check_leaves(again, trainable, frozen)
    constants = model.method.constants(tiny.CONFIG.dimensions)
    whole = again.overlay(cases.fresh(preset)['backbone'], constants)
    assert cases.bits(whole) == cases.bits(params)


@pytest.mark.shows('size')
@pytest.mark.parametrize('preset', cases.quick(families=FILES))
def test_the_file_is_as_large_as_what_is_trained(preset, tmp_path):
    method = registry.create(preset)
    shapes = cases.shapes_at_bert_base(method)
    trainable = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    folder = cases.described(preset, {**trainable, 'heads': {NAME: {'bias': np.zeros(2)}}})
    path = adapter_folder.save(folder, tmp_path / 'adapter') / 'adapter.safetensors'
    numbers = 4 * trees.count(trainable)
    assert numbers <= path.stat().st_size <= 1.02 * numbers


@pytest.mark.shows('refuses')
@one_of_each_kind
def test_another_backbone_is_refused(preset):
    trainable, _ = trees.partition(cases.trained(preset), cases.model(preset).rules)
    folder = cases.described(preset, trainable)
    adapter_folder.check_backbone(folder, cases.BACKBONE)
    for key, value in (('layers', 3), ('hidden', 24), ('fingerprint', 'beef')):
        with pytest.raises(ValueError, match=f'another backbone: its {key} is'):
            adapter_folder.check_backbone(folder, cases.BACKBONE | {key: value})
    # A folder that does not say, as those of the other libraries: its leaves do not fit.
    changes = {
        'deeper': {'layers': 3},
        'wider': {'block': dataclasses.replace(tiny.CONFIG.block, hidden=24, feed_forward=40)},
    }
    for change in changes.values():
        model = tiny.model(
            cases.method(preset),
            config=dataclasses.replace(tiny.CONFIG, **change),
            name=NAME,
            head=cases.model(preset).head_config,
        )
        shapes = jax.eval_shape(lambda of=model: tiny.params(of))
        if preset in cases.OUTSIDE_LAYERS and 'layers' in change:
            continue
        with pytest.raises(ValueError, match='does not hold what'):
            adapter_folder.check_leaves(folder, *trees.partition(shapes, model.rules))
