"""Every method over every family of backbones: it runs, trains, and comes back from its folder."""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch_families
from torch_families import CASES

from adapters_jax import params as trees
from adapters_jax.adapters import registry
from adapters_jax.adapters.bank import Bank
from adapters_jax.interop import adapter_folder
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadBank, HeadConfig
from adapters_jax.training.experiment import check_model

FAMILIES = [name for name in CASES if name not in ('electra-even', 'vit-unbiased')]
# Over T5, which has two stacks, one of each kind of site: the others repeat its path.
QUICK = {'attention_side', 'ia3', 'loreft', 'prefix_tuning_flat', 'prompt_tuning'}
NOTHING = {('t5', 'bitfit'), ('t5-gated', 'bitfit')}  # T5 has no biases
OPTIONS = {'compacter': 'reduction_factor=4', 'compacter++': 'reduction_factor=4'}


def pairs():
    return [
        pytest.param(
            family,
            preset,
            marks=[] if family == 't5' and preset in QUICK else pytest.mark.slow,
        )
        for family in FAMILIES
        for preset in cases.METHODS
        if (family, preset) not in NOTHING
    ]


@functools.cache
def backbone(family):
    return torch_families.models(family, headed=CASES[family].headed is not None)[1:]


@functools.cache
def batch_of(family):
    """Return four inputs with their targets or classes."""
    kind, pad = CASES[family].kind, backbone(family)[0].config.pad_id
    found = {'starts': np.zeros((4, 1), np.int32), 'classes': np.array([0, 1, 2, 0])}
    if kind == 'images':
        return found | {'pixels': torch_families.inputs(family, 4).transpose(0, 2, 3, 1)}
    if kind == 'sound':
        found |= {'sound': torch_families.inputs(family, 4)}
    else:
        ids, real = torch_families.texts(4, 13, pad, 0)
        found |= {'input_ids': ids, 'segments': real.astype(np.int32)}
    if kind == 'text':
        return found
    ids, real = torch_families.texts(4, 9, pad, 1)
    return found | {
        'target_ids': ids,
        'target_segments': real.astype(np.int32),
        'target_positions': np.broadcast_to(np.arange(9, dtype=np.int32), ids.shape),
    }


def model_of(family, preset):
    """Return the model; a method that asks for tags gets none."""
    text = f'{preset}[{OPTIONS[preset]}]' if preset in OPTIONS else cases.text_of(preset)
    config = backbone(family)[0].config
    pooling = 'cls' if config.decoder is None else 'vocabulary'
    outputs = 3 if config.decoder is None else config.vocabulary
    head = HeadConfig(pooling=pooling, dropout=0.0)
    return Model(config, registry.create(text), head, outputs, name='mine')


def loss(trainable, frozen, model, batch):
    """Return the mean cross-entropy of the classes, or of each next word, and the outputs."""
    outputs = model.apply(trees.merge(trainable, frozen), batch)
    classes, weight = batch['classes'][:, None], jnp.ones((4, 1))
    if model.config.decoder is not None:
        outputs, classes = outputs[:, :-1], batch['target_ids'][:, 1:]
        weight = batch['target_segments'][:, 1:]
    costs = optax.softmax_cross_entropy_with_integer_labels(outputs, classes)
    return (costs * weight).sum() / weight.sum(), outputs


@pytest.mark.shows_family('runs')
@pytest.mark.shows_family('trains')
@pytest.mark.shows_family('saves')
@pytest.mark.parametrize(('family', 'preset'), pairs())
def test_it_runs_trains_and_comes_back(family, preset, tmp_path):
    model, batch = model_of(family, preset), batch_of(family)
    loaded, head = backbone(family)
    params = model.init(jax.random.key(0), loaded.params)
    if model.config.decoder is not None:
        params = params | {'heads': {'mine': head}}
    trainable, frozen = trees.partition(params, model.rules)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (first, outputs), gradient = step(trainable, frozen, model, batch)
    assert np.isfinite(outputs).all()
    adapter = gradient.get('adapters', {}).get('mine', gradient.get('backbone'))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(adapter))
    optimizer = optax.adam(3e-3)
    state = optimizer.init(trainable)
    for _ in range(5):
        updates, state = optimizer.update(gradient, state)
        trainable = optax.apply_updates(trainable, updates)
        (last, outputs), gradient = step(trainable, frozen, model, batch)
    assert last < first
    path = adapter_folder.save(written(model, trainable, loaded), tmp_path / 'a')
    folder = adapter_folder.load(path)
    constants = model.method.constants(model.config.dimensions)
    again = folder.overlay(loaded.params, constants)
    found = step(*trees.partition(again, model.rules), model, batch)[0][1]
    np.testing.assert_array_equal(found, outputs)


@pytest.mark.parametrize(('family', 'preset'), sorted(NOTHING))
def test_what_trains_nothing_is_refused(family, preset):
    with pytest.raises(ValueError, match='a t5 backbone has none of the parameters'):
        check_model(model_of(family, preset), backbone(family)[0].params)


def written(model, trainable, loaded):
    """Return the folder of what has been trained."""
    trained = jax.device_get(trainable)
    return AdapterFolder(
        name='mine',
        method=model.method.to_json(),
        head=model.head_config.to_json(),
        task={},
        backbone=loaded.describe(),
        max_length=model.text_positions or 128,
        pair=None,
        adapter_params=trained.get('adapters', {}).get('mine', {}),
        head_params=trained.get('heads', {}).get('mine', {}),
        backbone_params=trained.get('backbone', {}),
    )


GATED = ('lora[r=2,use_gating=True]', 'ia3[use_gating=True]')


@pytest.mark.parametrize('text', [GATED[0], pytest.param(GATED[1], marks=pytest.mark.slow)])
def test_gates_of_cross_attention_see_their_own_source(text):
    """Two pairs of texts in a row are what each is alone, though sources and targets differ."""
    config = backbone('t5')[0].config
    head = HeadConfig(pooling='vocabulary', dropout=0.0)
    model = Model(config, registry.create(text), head, config.vocabulary, name='mine')
    params = model.init(jax.random.key(0), backbone('t5')[0].params)
    rng = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: x + 0.5 * rng.standard_normal(x.shape), params['adapters'])
    params = params | {'heads': {'mine': backbone('t5')[1]}, 'adapters': noisy}
    pairs = [(list(range(5, 9)), [0, 11]), (list(range(12, 14)), [0, 15, 16, 17])]
    apply = jax.jit(model.apply)
    together = apply(params, packed_pairs(pairs, 6, config.pad_id))
    begin = 0
    for pair in pairs:
        alone = apply(params, packed_pairs([pair], 6, config.pad_id))
        length = len(pair[1])
        np.testing.assert_allclose(
            together[0, begin : begin + length], alone[0, :length], atol=1e-4, rtol=0
        )
        begin += length


def packed_pairs(pairs, width, pad):
    """Return a row of pairs of a source and what is written of it."""
    found = {}
    for i, prefix in enumerate(('', 'target_')):
        texts = [pair[i] for pair in pairs]
        rest = width - sum(map(len, texts))
        ids = np.array([*itertools.chain(*texts), *[pad] * rest], np.int32)
        numbers = [np.full(len(text), n + 1, np.int32) for n, text in enumerate(texts)]
        places = [np.arange(len(text), dtype=np.int32) for text in texts]
        tail = np.zeros(rest, np.int32)
        found[f'{prefix}ids' if prefix else 'input_ids'] = ids[None]
        found[f'{prefix}segments'] = np.concatenate([*numbers, tail])[None]
        found[f'{prefix}positions'] = np.concatenate([*places, tail])[None]
    return found | {'starts': np.zeros((1, len(pairs)), np.int32)}


def test_each_image_may_have_a_prompt_of_its_own():
    """Images have no mask, and what a prompt lengthens has none either."""
    loaded, _ = backbone('vit')
    head, batch = HeadConfig(pooling='cls', dropout=0.0), batch_of('vit')
    method = registry.create('prompt_tuning[prompt_length=2]')
    singles = {name: Model(loaded.config, method, head, 3, name=name) for name in 'ab'}
    own = {
        name: model.init(jax.random.key(i), loaded.params)
        for i, (name, model) in enumerate(singles.items())
    }
    bank = Bank(members=dict.fromkeys('ab', method))
    held = HeadBank(tuple((name, head, 3) for name in 'ab'))
    model = Model(loaded.config, bank, head, 1, name='bank', heads=held)
    given = {name: own[name]['adapters'][name] for name in 'ab'}
    params = {
        'backbone': loaded.params,
        'adapters': {'bank': bank.stack(given)},
        'heads': {'bank': {name: own[name]['heads'][name] for name in 'ab'}},
    }
    rows = np.array([0, 1, 1, 0], np.int32)
    found = jax.jit(model.apply)(params, batch | {'adapter': rows})
    alone = [jax.jit(single.apply)(own[name], batch) for name, single in singles.items()]
    for number, expected in enumerate(alone):
        np.testing.assert_allclose(found[rows == number], expected[rows == number], atol=2e-5)
    assert np.abs(found[0] - alone[1][0]).max() > 1e-3
