"""Where heads read first tokens, the last layer computes no others: with every method, the same."""

import functools

import cases
import jax
import numpy as np
import pytest
import test_families
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_families import VARIANTS

from adapters_jax import attention
from adapters_jax import params as trees
from adapters_jax.model import Model, attention_mask
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.heads import FIRST_TOKEN, HeadConfig

CLOSE = {'atol': 2e-5, 'rtol': 0}
QUICK = {'attention_side', 'lora', 'prefix_tuning_flat', 'prompt_tuning'}


def model_of(preset, pooling='cls'):
    head = HeadConfig(pooling=pooling, dropout=0.0)
    return tiny.model(cases.method(preset), head, name=cases.NAME)


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def whole(monkeypatch):
    """Let the last layer be computed whole, and its first tokens taken from there."""
    monkeypatch.setattr(Model, '_read', lambda self, batch: None)


def found(model, params, batch):
    """Return outputs and the gradient of each trained leaf, and how many operations it took."""
    trainable, frozen = trees.partition(params, model.rules)
    weights = np.random.default_rng(3).normal(size=(*batch['starts'].shape, 3)).astype(np.float32)
    weights *= batch['example_mask'][:, :, None]

    def loss(trainable):
        outputs = model.apply(trees.merge(trainable, frozen), batch)
        return (outputs * weights).sum(), outputs

    program = jax.jit(jax.grad(loss, has_aux=True)).lower(trainable).compile()
    gradient, outputs = program(trainable)
    real = np.asarray(outputs)[batch['example_mask']]
    return real, trees.flatten(gradient), program.cost_analysis()['flops']


def rows_of(method):
    return cases.ROWS if method.packable else [[row[0]] for row in cases.ROWS]


@pytest.mark.parametrize('few', [True, False])
@pytest.mark.parametrize('preset', cases.quick(families=QUICK))
def test_outputs_and_gradients_are_those_of_a_whole_last_layer(preset, few, monkeypatch):
    """Whether its keys and values are computed (but for methods that see them) or not."""
    monkeypatch.setattr(attention, 'asks_little', lambda *_: few)
    model = model_of(preset)
    batch = tiny.batch(rows_of(model.method), cases.WIDTH)
    params = cases.trained(preset)
    outputs, gradient, operations = found(model, params, batch)
    whole(monkeypatch)
    expected, wanted, all_operations = found(model, params, batch)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(outputs, expected, **CLOSE)
    largest = max(np.abs(leaf).max() for leaf in wanted.values())
    for path, leaf in gradient.items():
        np.testing.assert_allclose(leaf, wanted[path], err_msg=path, rtol=0, atol=2e-5 * largest)
    assert (operations < 0.95 * all_operations) == model.method.stepwise


def test_a_method_that_brings_tokens_together_needs_the_whole_layer(monkeypatch):
    """What `stepwise` is for: computed for first tokens alone, UniPELT's gates see no others."""
    model, params = model_of('unipelt'), cases.trained('unipelt')
    batch = tiny.batch(rows_of(model.method), cases.WIDTH)
    expected = compiled(model)(params, batch)
    monkeypatch.setattr(type(model.method), 'stepwise', True)
    outputs = jax.jit(lambda *given: model.apply(*given))(params, batch)
    assert np.abs(outputs - expected)[batch['example_mask']].max() > 1e-2


@pytest.mark.parametrize(
    'pooling',
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == 'cls'))  # as above
        for name in ('mean', *FIRST_TOKEN)
    ],
)
def test_a_head_that_reads_all_tokens_gets_them(pooling, monkeypatch):
    model, batch = model_of('pfeiffer', pooling), tiny.batch(cases.ROWS, cases.WIDTH)
    params = cases.trained('pfeiffer')
    outputs, _, operations = found(model, params, batch)
    whole(monkeypatch)
    expected, _, all_operations = found(model, params, batch)
    np.testing.assert_allclose(outputs, expected, **CLOSE)
    assert (operations < all_operations) == (pooling in FIRST_TOKEN)


@pytest.mark.parametrize('remat', [pytest.param('dots', marks=pytest.mark.slow), 'full'])
def test_what_is_computed_again_is_the_same(remat):
    batch, params = tiny.batch(cases.ROWS, cases.WIDTH), cases.trained('lora')
    model = model_of('lora')
    outputs, gradient, _ = found(model, params, batch)
    again = tiny.model(model.method, model.head_config, name=cases.NAME, remat=remat)
    others, found_again, _ = found(again, params, batch)
    np.testing.assert_allclose(others, outputs, **CLOSE)
    for path, leaf in gradient.items():
        np.testing.assert_allclose(found_again[path], leaf, err_msg=path, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('leave_out', [(0,), (0, 1)])
def test_what_was_stored_of_a_trunk_goes_on_to_first_tokens(leave_out, monkeypatch):
    """The trunk may end before the last layer, or in it: then nothing is left to leave out."""
    deep = tiny.dataclasses.replace(tiny.CONFIG, layers=3)
    text = f'pfeiffer[leave_out={list(leave_out)}]'
    head = HeadConfig(pooling='cls', dropout=0.0)
    model = tiny.model(cases.registry.create(text), head, config=deep)
    params, batch = tiny.params(model), tiny.batch(cases.ROWS, cases.WIDTH)
    stored = batch | {'trunk': np.asarray(jax.jit(model.trunk_outputs)(params, batch))}
    outputs = np.asarray(jax.jit(model.apply)(params, stored))[batch['example_mask']]
    whole(monkeypatch)
    expected = np.asarray(jax.jit(model.apply)(params, batch))[batch['example_mask']]
    np.testing.assert_allclose(outputs, expected, **CLOSE)


@pytest.mark.parametrize(
    'family',
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS))
        for name in ('bert', 'roberta', 'distilbert', 'electra', 'vit', 'deit')
    ],
)
def test_every_encoder_has_the_same_states_there(family):
    config, params = (getattr(test_families.backbone(family)[0], n) for n in ('config', 'params'))
    batch = test_families.batch_of(family)
    values = batch['pixels'] if 'pixels' in batch else batch['input_ids']
    mask = None if 'pixels' in batch else attention_mask(batch['segments'], 1)
    places = np.random.default_rng(0).integers(0, 4, (4, 3))
    apply = jax.jit(Backbone(config).apply)
    states = apply({'params': params}, values, mask=mask)
    some = apply({'params': params}, values, mask=mask, places=places)
    expected = np.take_along_axis(np.asarray(states), places[:, :, None], axis=1)
    np.testing.assert_allclose(some, expected, **CLOSE)


@settings(max_examples=20, deadline=None)
# Three rows: each other number would be a program of its own.
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=3, max_size=3))
def test_any_packing_has_the_outputs_of_each_text_alone(rows):
    model, params = model_of('lora', 'pooler'), cases.trained('lora')
    packed = tiny.batch(rows, 18)
    apply = compiled(model)
    together = np.asarray(apply(params, packed))
    for row, lengths in enumerate(rows):
        for place in range(len(lengths)):
            alone = apply(params, tiny.alone(packed, row, place, 6))
            np.testing.assert_allclose(together[row, place], alone[0, 0], **CLOSE)
