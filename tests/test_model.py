import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adapters_jax import functional
from adapters_jax import params as trees
from adapters_jax.adapters import registry
from adapters_jax.adapters.baselines import HeadOnly
from adapters_jax.adapters.method import Change
from adapters_jax.model import attention_mask
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.heads import HeadConfig
from adapters_jax.sites import Place

ROWS = [[3, 5, 2], [7], [1, 1]]
WIDTH = 12


@dataclasses.dataclass(frozen=True)
class Nudge(tiny.Shift):
    """Moreover adds a trained tensor to the embedded input, so that its gradient can be read."""

    architecture = 'nudge'

    def init(self, key, dimensions, backbone):
        return super().init(key, dimensions, backbone) | {'nudge': jnp.zeros((3, WIDTH, 16))}

    def embeddings(self, params, stream, at):
        return stream.replace(hidden=stream.hidden + params['nudge'])


@pytest.fixture(scope='module')
def packed():
    return tiny.batch(ROWS, WIDTH)


@pytest.fixture(scope='module')
def setup():
    """Return a model, its parameters and its compiled outputs."""
    model = tiny.model()
    return model, tiny.params(model), jax.jit(model.apply)


def texts():
    return [(row, place) for row, lengths in enumerate(ROWS) for place in range(len(lengths))]


def test_a_packed_text_gets_the_outputs_it_has_alone(setup, packed):
    _, params, outputs = setup
    together = outputs(params, packed)
    assert together.shape == (3, 3, 3)
    singles = [tiny.alone(packed, row, place, 8) for row, place in texts()]
    bucket = {name: np.concatenate([s[name] for s in singles]) for name in singles[0]}
    for (row, place), expected in zip(texts(), outputs(params, bucket)[:, 0], strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(together[row, place], expected, atol=1e-5, rtol=0)


def test_a_packed_text_has_the_hidden_states_it_has_alone(packed):
    run = jax.jit(
        lambda p, ids, types, positions, mask: Backbone(tiny.CONFIG).apply(
            {'params': p}, ids, types, positions, mask, all_hidden=True
        )
    )
    names = ('input_ids', 'token_type_ids', 'positions')
    params = tiny.backbone()
    mask = attention_mask(packed['segments'], 3)
    together = np.stack(run(params, *(packed[name] for name in names), mask))
    singles = [tiny.alone(packed, row, place, 8) for row, place in texts()]
    bucket = {name: np.concatenate([s[name] for s in singles]) for name in singles[0]}
    mask = attention_mask(bucket['segments'], 1)
    apart = np.stack(run(params, *(bucket[name] for name in names), mask))
    for i, (row, place) in enumerate(texts()):
        span = packed['segments'][row] == place + 1
        expected = apart[:, i, : ROWS[row][place]]
        np.testing.assert_allclose(together[:, row, span], expected, atol=1e-5, rtol=0)


def test_what_stands_in_the_padding_changes_nothing(setup, packed):
    _, params, outputs = setup
    padding = packed['segments'] == 0
    assert padding.any()
    other = packed | {
        'input_ids': np.where(padding, 17, packed['input_ids']),
        'token_type_ids': np.where(padding, 1, packed['token_type_ids']),
        'positions': np.where(padding, 9, packed['positions']),
    }
    expected = np.asarray(outputs(params, packed))[packed['example_mask']]
    again = np.asarray(outputs(params, other))[packed['example_mask']]
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize('pooling', ['mean', 'pooler'])
def test_no_gradient_reaches_the_other_texts_of_a_row(packed, pooling):
    model = tiny.model(Nudge(), HeadConfig(pooling))
    params = tiny.params(model)

    @jax.jit
    def gradient(weight):
        gradients = jax.grad(lambda tree: (model.apply(tree, packed) * weight).sum())(params)
        return gradients['adapters']['default']['nudge']

    for row, place in texts():
        weight = np.zeros((3, 3, 1), np.float32)
        weight[row, place] = 1
        reached = np.abs(gradient(weight)).max(-1)
        own = np.zeros((3, WIDTH), bool)
        own[row] = packed['segments'][row] == place + 1
        assert (reached[own] > 0).all()
        np.testing.assert_array_equal(reached[~own], 0)


def test_the_mask_of_single_texts_is_that_of_packed_ones():
    segments = np.array([[1, 1, 0], [1, 1, 1]])
    short, full = attention_mask(segments, 1), attention_mask(segments, 2)
    assert short.shape == (2, 1, 1, 3)
    assert full.shape == (2, 1, 3, 3)
    real = segments > 0
    np.testing.assert_array_equal(
        np.broadcast_to(short, full.shape)[:, 0][real], np.asarray(full)[:, 0][real]
    )


def test_outputs_are_those_of_backbone_adapter_and_head(setup, packed):
    _, params, outputs = setup
    backbone = jax.tree.map(np.copy, params['backbone'])
    # A vector added before the residual connection is a change of the down-projection's bias.
    for i in range(2):
        shift = params['adapters']['default'][f'layer_{i}']['feed_forward']['shift']
        backbone[f'layer_{i}']['feed_forward']['down']['bias'] += shift
    hidden = Backbone(tiny.CONFIG).apply(
        {'params': backbone},
        packed['input_ids'],
        packed['token_type_ids'],
        packed['positions'],
        attention_mask(packed['segments'], 3),
    )
    head = params['heads']['default']['dense_0']
    for row, place in texts():
        mean = hidden[row][packed['segments'][row] == place + 1].mean(0)
        expected = mean @ head['kernel'] + head['bias']
        np.testing.assert_allclose(outputs(params, packed)[row, place], expected, atol=1e-5)


# ---- what is trained


def test_the_adapter_and_its_head_are_trained_and_nothing_else(setup):
    model, params, _ = setup
    others = {
        'adapters': params['adapters'] | {'defaults': params['adapters']['default']},
        'heads': params['heads'] | {'x_default': params['heads']['default']},
    }
    trainable, frozen = trees.partition(params | others, model.rules)
    adapter = {f'adapters/default/layer_{i}/feed_forward/shift' for i in range(2)}
    head = {'heads/default/dense_0/kernel', 'heads/default/dense_0/bias'}
    assert set(trees.flatten(trainable)) == adapter | head
    assert trees.count(frozen) == trees.count(params | others) - trees.count(trainable)


def test_a_method_may_train_leaves_of_the_backbone():
    model = tiny.model(tiny.Shift(lowest=1, tune_norms=True))
    trainable, _ = trees.partition(tiny.params(model), model.rules)
    norms = {f'layer_{i}/feed_forward/norm/{x}' for i in range(2) for x in ('scale', 'bias')}
    assert set(trees.flatten(trainable['backbone'])) == norms
    assert model.trunk(tiny.params(model)) == Place(0)


@pytest.mark.parametrize('name', ['a.b', 'c++', '(x', 'été'])
def test_any_name_will_do(name):
    model = tiny.model(name=name)
    trainable, _ = trees.partition(tiny.params(model), model.rules)
    assert set(trainable) == {'adapters', 'heads'}
    assert set(trainable['adapters']) == set(trainable['heads']) == {name}


def test_with_a_head_alone_everything_is_trunk_and_without_dropout(packed):
    model = tiny.model(HeadOnly(), HeadConfig(dropout=0.0))
    params = tiny.params(model)
    assert model.trunk(params) == Place(2)
    # Trees that went through `merge` have no branch for an adapter without parameters.
    params = trees.merge(*trees.partition(params, model.rules))
    assert 'adapters' not in params
    outputs = jax.jit(model.apply)
    still, random = outputs(params, packed), outputs(params, packed, jax.random.key(0))
    np.testing.assert_allclose(random, still, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Dropping(tiny.Shift):
    """Drops half of what the sub-layer gives."""

    architecture = 'dropping'

    def adapt(self, params, end, at):
        return Change(functional.dropout(end.output, 0.5, at.key))


@pytest.mark.parametrize('source', ['backbone', 'adapter', 'head'])
def test_dropout_of_each_part_needs_a_key_and_follows_it(packed, source):
    rate = 0.3 if source == 'backbone' else 0.0
    block = dataclasses.replace(tiny.CONFIG.block, dropout=rate, attention_dropout=rate)
    model = tiny.model(
        Dropping() if source == 'adapter' else tiny.Shift(),
        HeadConfig(dropout=0.3 if source == 'head' else 0.0),
        config=dataclasses.replace(tiny.CONFIG, block=block),
    )
    params, outputs = tiny.params(model), jax.jit(model.apply)
    one, two, again = (outputs(params, packed, jax.random.key(seed)) for seed in (1, 2, 1))
    still = outputs(params, packed)
    assert np.abs(one - two).max() > 0.1
    assert np.abs(one - still).max() > 0.1
    np.testing.assert_array_equal(one, again)


# ---- number formats


def test_a_frozen_tree_in_bfloat16_is_computed_with_in_float32(setup, packed):
    model, params, outputs = setup
    trainable, frozen = trees.partition(params, model.rules)
    stored = trees.cast(frozen, jnp.bfloat16)
    rounded = trees.cast(stored, jnp.float32)
    low = outputs(trees.merge(trainable, stored), packed)
    np.testing.assert_allclose(low, outputs(trees.merge(trainable, rounded), packed), atol=1e-5)
    assert low.dtype == jnp.float32
    assert np.abs(low - outputs(params, packed)).max() > 0  # the rounding was real


@pytest.mark.parametrize('pooling', ['mean', 'pooler'])
def test_activations_in_bfloat16_give_nearly_the_same_outputs(packed, pooling):
    wide = tiny.model(head=HeadConfig(pooling))
    params = tiny.params(wide)
    narrow = dataclasses.replace(wide, dtype=jnp.bfloat16)
    expected = jax.jit(wide.apply)(params, packed)
    outputs = jax.jit(narrow.apply)(trees.cast(params, jnp.bfloat16), packed)
    assert outputs.dtype == jnp.float32
    error = np.abs(outputs - expected)[packed['example_mask']]
    assert 0 < error.max() < 0.15
    assert error.mean() < 0.03 * np.abs(expected).mean()


# ---- construction


def test_a_pooler_that_is_not_there_is_refused():
    config = dataclasses.replace(tiny.CONFIG, pooler=False)
    with pytest.raises(ValueError, match="the backbone has no pooler; use 'mean' or 'cls'"):
        tiny.model(head=HeadConfig('pooler'), config=config)


def test_fresh_parameters_follow_the_key_and_keep_the_backbone():
    model, backbone = tiny.model(), tiny.backbone()
    one, same, two = (model.init(jax.random.key(seed), backbone) for seed in (1, 1, 2))
    assert one['backbone'] is backbone
    for branch in ('adapters', 'heads'):
        first, again, other = (trees.flatten(t[branch]) for t in (one, same, two))
        for path, leaf in first.items():
            np.testing.assert_array_equal(leaf, again[path])
            assert 'bias' in path or (np.asarray(leaf) != other[path]).any()


def test_a_model_is_a_static_argument():
    assert tiny.model() == tiny.model()
    assert hash(tiny.model()) == hash(tiny.model())
    assert tiny.model() != tiny.model(tiny.Shift(lowest=1))


TRUNKS = {
    'pfeiffer[leave_out=[0]]': 'feed_forward_end',
    'double_seq_bn[leave_out=[0]]': 'attention_end',
    'lora[leave_out=[0]]': 'attention',
    'lora[leave_out=[0],selfattn_lora=False,intermediate_lora=True]': 'attention',
    'prefix_tuning_flat[leave_out=[0]]': 'attention',
    'loreft[leave_out=[0],r=1]': 'block_end',
    'layer_norm[leave_out=[0],embedding_norm=False]': 'attention',
    'lora[leave_out=[0]]|pfeiffer[leave_out=[0]]': 'attention',
    'head': 'attention',
    'attention_side[size=8]': 'attention',
}


# The others end at the same place.
REPEATED = {
    'prefix_tuning_flat[leave_out=[0]]',
    'layer_norm[leave_out=[0],embedding_norm=False]',
    'lora[leave_out=[0]]|pfeiffer[leave_out=[0]]',
}


@pytest.mark.parametrize(
    'name', [pytest.param(t, marks=pytest.mark.slow if t in REPEATED else ()) for t in TRUNKS]
)
def test_a_run_may_begin_where_the_trunk_ends(packed, name):
    model = tiny.model(registry.create(name))
    params = tiny.params(model)
    noise = iter(np.random.default_rng(0).standard_normal((99, 1)) * 0.1)
    adapters = params['adapters']
    params['adapters'] = jax.tree.map(lambda x: x + next(noise).astype(np.float32)[0], adapters)
    place = model.trunk(params)
    assert (place.layer, place.stage) == (2 if name in ('head', 'attention_side[size=8]') else 1,
                                          TRUNKS[name])  # fmt: skip
    known = model.trunk_outputs(params, packed)
    assert known.shape[2] == (2 if name.startswith('attention_side') else place.vectors)
    key = jax.random.key(0)
    blank = {**params, 'backbone': {**params['backbone'], 'layer_0': {}}}
    if place.layer == 2:
        blank['backbone'] |= {'layer_1': {}}
    for drops in (None, key):
        whole = model.apply(params, packed, drops)
        begun = model.apply(blank, {**packed, 'trunk': known}, drops)
        if drops is None or name == 'head':
            np.testing.assert_allclose(begun, whole, atol=2e-5)
    names = ('input_ids', 'positions', 'token_type_ids')
    other = {**packed, 'trunk': known} | {n: np.zeros_like(packed[n]) for n in names}
    if not name.startswith('attention_side'):
        np.testing.assert_array_equal(model.apply(params, other), model.apply(
            params, {**packed, 'trunk': known}))  # fmt: skip


def test_dropout_above_the_trunk_is_the_same_however_the_run_begins(packed):
    model = tiny.model(registry.create('pfeiffer[leave_out=[0],reduction_factor=4]'))
    params, key = tiny.params(model), jax.random.key(3)
    known = model.trunk_outputs(params, packed)
    begun = model.apply(params, {**packed, 'trunk': known}, key)
    np.testing.assert_allclose(begun, model.apply(params, packed, key), atol=2e-5)


def test_there_is_no_trunk_to_store_where_the_lowest_layer_is_adapted(packed):
    model = tiny.model()
    with pytest.raises(ValueError, match='the lowest layer is adapted, so there is no trunk'):
        model.trunk_outputs(tiny.params(model), packed)


@pytest.mark.parametrize(
    'name',
    [
        'prefix_tuning_flat',
        *(pytest.param(m, marks=pytest.mark.slow) for m in ('pfeiffer', 'lora', 'lora|pfeiffer')),
    ],
)
def test_dropped_layers_are_the_plain_ones_and_get_no_gradient(packed, name):
    whole = tiny.model(registry.create(name))
    params = tiny.params(whole)
    lowest = tiny.model(registry.create(name), dropped=1)
    none = tiny.model(registry.create(name), dropped=2)
    assert lowest.trunk(params).layer == 1 and none.trunk(params).layer == 2
    grads = jax.grad(lambda p: jnp.square(lowest.apply(p, packed)).sum())(params)['adapters']
    for path, leaf in trees.flatten(grads).items():
        assert leaf.any() == ('layer_1' in path) or path.endswith(('/a', 'scaling')), path
    flops = [gradient_flops(model, params, packed) for model in (whole, lowest, none)]
    assert flops[0] > flops[1] > flops[2]


@pytest.mark.parametrize('pooling', ['mean', 'cls', 'tokens'])
def test_a_batch_of_nothing_but_tokens(pooling):
    model = tiny.model(
        registry.create('prompt_tuning[prompt_length=3]'), HeadConfig(pooling=pooling, layers=1)
    )
    params = tiny.params(model)
    ids = np.arange(12, dtype=np.int32).reshape(2, 6) + 1
    whole = {'input_ids': ids, 'segments': np.ones_like(ids), 'starts': np.zeros((2, 1), np.int32)}
    found = model.apply(params, {'input_ids': ids})
    assert found.shape[1] == (6 if pooling == 'tokens' else 1)
    np.testing.assert_allclose(found, model.apply(params, whole), atol=1e-6)


@pytest.mark.parametrize(
    ('columns', 'message'),
    [
        (('input_ids', 'attention_mask'), "'attention_mask', but what is padding is read from"),
        (('input_ids', 'segments'), "'segments' but not 'starts'"),
        (('token_type_ids',), 'columns token_type_ids; expected one of input_ids, pixels, sound'),
        ((), r'columns \(none\); expected one of'),
    ],
)
@pytest.mark.parametrize('function', ['apply', 'trunk_outputs'])
def test_a_batch_with_columns_of_other_names_is_refused(function, columns, message):
    model = tiny.model(tiny.Shift(lowest=1))
    batch = dict.fromkeys(columns, np.ones((2, 6), np.int32))
    with pytest.raises(ValueError, match=message):
        getattr(model, function)(tiny.params(model), batch)


def gradient_flops(model, params, packed):
    def loss(adapters):
        return jnp.square(model.apply(params | {'adapters': adapters}, packed)).sum()

    program = jax.jit(jax.grad(loss)).lower(params['adapters']).compile()
    return program.cost_analysis().get('flops', 0)
