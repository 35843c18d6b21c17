"""A merged backbone computes what backbone and adapter do, and the original stays as it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bert

from adapters_jax import params
from adapters_jax.adapters import merging
from adapters_jax.adapters.baselines import FullFineTuning
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.method import At
from adapters_jax.adapters.union import Union
from adapters_jax.adapters.vera import DVoRA, VeRA
from adapters_jax.models.backbone import Backbone

EVERY = {'attn_matrices': ['q', 'k', 'v', 'o'], 'intermediate_lora': True, 'output_lora': True}
BOTTLENECK = Bottleneck(mh_adapter=False, output_adapter=True, non_linearity='relu', size=4)
IDS = small_bert.texts([9])[0][None]
PLAIN = FullFineTuning()

MERGEABLE = {
    'lora': LoRA(**EVERY, r=3, alpha=5),
    'lora_by_layer': LoRA(rank_pattern={'1': 2, '2/query': 0}, alpha_pattern={'value': 30}),
    'lora_stabilised': LoRA(**EVERY, rank_stabilised=True),
    'dora': DoRA(**EVERY, alpha=20),
    'dora_with_bias': DoRA(**EVERY, alpha=20, scale_bias=True, scale_norm=False),
    'vera': VeRA(**EVERY),
    'dvora': DVoRA(**EVERY, scale_bias=True),
    'ia3': IA3(),
    'ia3_everywhere': IA3(
        scale_outputs=('query', 'value', 'up', 'down'), scale_inputs=('key', 'output', 'down')
    ),
    'union': Union(
        members=(
            LoRA(attn_matrices=['q'], alpha=20),
            IA3(scale_outputs=('value',)),
            FullFineTuning(),
            DoRA(attn_matrices=['o'], scale_bias=True),
            LoRA(attn_matrices=['k'], alpha=3),
        )
    ),
}


def noisy(method, seed=0):
    """Return parameters far from fresh ones."""
    tree = method.init(jax.random.key(seed), small_bert.DIMENSIONS, small_bert.backbone())
    return small_bert.perturb(tree, seed, 0.2)


@functools.partial(jax.jit, static_argnums=0)
def hidden(method, tree, backbone):
    """Return every layer's hidden states."""
    sites = bind(method, tree, None)
    model = Backbone(small_bert.CONFIG)
    return jnp.stack(model.apply({'params': backbone}, IDS, sites=sites, all_hidden=True))


# Whose path others repeat, and `tests/conformance` merges them too.
REPEATED = ('lora_stabilised', 'dora', 'vera', 'ia3')


@pytest.mark.parametrize(
    'method',
    [
        pytest.param(method, id=name, marks=[pytest.mark.slow] * (name in REPEATED))
        for name, method in MERGEABLE.items()
    ],
)
def test_merged_equals_unmerged(method):
    backbone, tree = small_bert.backbone(), noisy(method)
    merged = merging.merge(method, tree, backbone)
    expected = hidden(method, tree, backbone)
    np.testing.assert_allclose(hidden(PLAIN, {}, merged), expected, atol=1e-5)
    assert np.abs(hidden(PLAIN, {}, backbone) - expected).max() > 0.1
    before, after = params.flatten(backbone), params.flatten(merged)
    assert {p: (x.shape, x.dtype) for p, x in before.items()} == {
        p: (x.shape, x.dtype) for p, x in after.items()
    }


def test_the_arguments_keep_every_bit():
    def bits(tree):
        return {path: np.asarray(x).tobytes() for path, x in params.flatten(tree).items()}

    method = MERGEABLE['union']
    # Arrays of numpy could be written into; those of JAX could not.
    backbone, tree = (jax.tree.map(np.array, x) for x in (small_bert.backbone(), noisy(method)))
    before = bits(backbone), bits(tree)
    merged = merging.merge(method, tree, backbone)
    assert (bits(backbone), bits(tree)) == before
    assert bits(merged) != before[0]


def test_only_adapted_leaves_change():
    method = LoRA(leave_out=[0], attn_matrices=['k'])
    backbone = small_bert.backbone()
    before = params.flatten(backbone)
    after = params.flatten(merging.merge(method, noisy(method), backbone))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {f'layer_{i}/attention/key/kernel' for i in (1, 2)}


def test_a_method_without_parameters_leaves_the_backbone_as_it_is():
    backbone = small_bert.backbone()
    merged = merging.merge(FullFineTuning(), {}, backbone)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(backbone), strict=True)
    )


def test_a_narrow_kernel_stays_narrow_and_is_rounded_once():
    method = LoRA(attn_matrices=['q'], alpha=20)
    backbone = params.cast(small_bert.backbone(), jnp.bfloat16)
    tree = noisy(method)
    merged = merging.merge(method, tree, backbone)['layer_0']['attention']['query']['kernel']
    a, b = (np.asarray(tree['layer_0']['attention']['query'][x], np.float64) for x in 'ab')
    kernel = np.asarray(backbone['layer_0']['attention']['query']['kernel']).astype(np.float64)
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged, (kernel + a @ b * 20 / 8).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    'method', [LoRA(), DoRA(scale_bias=True), IA3()], ids=['lora', 'dora', 'ia3']
)
def test_a_projection_without_bias(method):
    method = dataclasses.replace(method, leave_out=(1, 2))
    place = noisy(method)['layer_0']['attention']['value']
    kernel = small_bert.backbone()['layer_0']['attention']['value']['kernel']
    at = At(layer=0, name='attention/value', shared={}, key=None)
    _, bias = method.merge_linear(place, kernel, None, at)
    assert bias is None


@pytest.mark.parametrize(
    ('method', 'sentence'),
    [
        (LoRA(use_gating=True), 'lora: it has use_gating=True and cannot be merged'),
        (DoRA(use_gating=True), 'dora: it has use_gating=True and cannot be merged'),
        (IA3(use_gating=True), 'ia3: it has use_gating=True and cannot be merged'),
        (BOTTLENECK, 'bottleneck cannot be merged into the backbone: what it does with layer_0/'),
        (Union(members=(LoRA(), BOTTLENECK)), 'bottleneck cannot be merged into the backbone'),
    ],
    ids=['lora', 'dora', 'ia3', 'bottleneck', 'union'],
)
def test_refuses_what_no_weights_can_replace(method, sentence):
    with pytest.raises(ValueError, match=sentence):
        merging.merge(method, noisy(method), small_bert.backbone())


def test_refuses_parameters_that_are_not_at_a_projection():
    with pytest.raises(
        ValueError, match=r'lora cannot be merged .* embeddings/prompt is no change'
    ):
        merging.merge(LoRA(), {'embeddings': {'prompt': jnp.ones(3)}}, small_bert.backbone())


def test_refuses_an_adapter_of_another_backbone():
    tree = noisy(LoRA(attn_matrices=['q']))
    tree['layer_7'] = tree.pop('layer_2')
    with pytest.raises(
        ValueError, match='parameters at layer_7/attention/query, which the backbone'
    ):
        merging.merge(LoRA(), tree, small_bert.backbone())
