"""ReFT computes what `adapters` computes, at the positions of each text, however it is laid out."""

import functools
import re

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small_bert as small
import torch
from adapters.methods.reft import ReftUnit
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import params
from adapters_jax.adapters.binding import Adapted
from adapters_jax.adapters.method import At
from adapters_jax.adapters.reft import ReFT, neighbours, orthonormal, torch_parametrization
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Dimensions, Stream

BERT_BASE = Dimensions(
    layers=12, hidden=768, feed_forward=3072, heads=12, word=768, vocabulary=30522, positions=512
)
KINDS = {
    'loreft': {'orthogonality': True, 'subtract_projection': True},
    'noreft': {'orthogonality': False, 'subtract_projection': True},
    'direft': {'orthogonality': False, 'subtract_projection': False},
}
CONFIGS = {
    'loreft': adapters.LoReftConfig,
    'noreft': adapters.NoReftConfig,
    'direft': adapters.DiReftConfig,
}
_UNIT = re.compile(r'encoder\.layer\.(\d+)\.reft_layer\.refts\.a\.units\.(\d)')


def torch_model(kind, options, family='bert', seed=0):
    """Return a model of `adapters` with random interventions, some of them far from the start."""
    model = reference.torch_model(family, seed, num_hidden_layers=3)
    model.add_adapter('a', config=CONFIGS[kind](**options))
    model.set_active_adapters('a')
    reference.randomise(model, seed + 1)
    for unit in units(model).values():
        if unit.orthogonal:
            restore_signs(unit.projection.parametrizations.weight.original)
    return model.eval()


def restore_signs(original):
    """Set the diagonal to what torch puts there and never trains; a fraction would count as 0."""
    with torch.no_grad():
        original.diagonal().fill_(-1.0)


def units(model):
    """Return the interventions of a model by our path."""
    return {
        f'layer_{match[1]}/block/{("prefix", "suffix")[int(match[2])]}': module
        for name, module in model.named_modules()
        if isinstance(module, ReftUnit) and (match := _UNIT.fullmatch(name))
    }


def reft_tree(model):
    leaves = {}
    for path, unit in units(model).items():
        leaves[f'{path}/projection'] = reference.to_array(unit.projection.weight, flip=True)
        leaves[f'{path}/source/kernel'] = reference.to_array(unit.learned_source.weight, flip=True)
        leaves[f'{path}/source/bias'] = reference.to_array(unit.learned_source.bias)
    return params.unflatten(leaves)


def compare(kind, options, family='bert', seed=0, padded=True, length=9):
    """Assert that all hidden states of all tokens are the library's."""
    model = torch_model(kind, options, family, seed)
    ids, mask = reference.texts(model, seed, length=length, padded=padded)
    expected = reference.torch_hidden(model, ids, mask)
    method, tree = ReFT(**KINDS[kind] | options), reft_tree(model)
    ours = reference.our_config(model)
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), ours.dimensions, {}))
    assert shapes(fresh) == shapes(tree)
    found = Backbone(ours).apply(
        {'params': reference.backbone_tree(model)},
        ids,
        mask=mask[:, None, None, :],
        sites=Adapted(params=tree, key=None, method=method),
        all_hidden=True,
    )
    for a, b in zip(found, expected, strict=True):
        # The library changes padding where a text is shorter than the prefix.
        np.testing.assert_allclose(a[mask], b[mask], atol=2e-5)


def shapes(tree):
    return {path: leaf.shape for path, leaf in params.flatten(tree).items()}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'r': 4},
        {'prefix_positions': 1, 'suffix_positions': 2},
        {'prefix_positions': 0, 'suffix_positions': 2, 'r': 2},
        {'tied_weights': True, 'suffix_positions': 1},
        {'layers': [0, 2], 'non_linearity': 'relu', 'r': 3},
        {'prefix_positions': 30},
    ],
    ids=str,
)
def test_each_option(kind, options):
    compare(kind, options)


@pytest.mark.parametrize('tied', [False, True])
def test_where_prefix_and_suffix_overlap(tied):
    options = {'prefix_positions': 4, 'suffix_positions': 3, 'tied_weights': tied, 'r': 2}
    compare('loreft', options, padded=False, length=5)
    compare('noreft', options | {'prefix_positions': 8}, padded=False, length=4)


def test_roberta():
    compare('loreft', {'suffix_positions': 2, 'r': 2}, 'roberta')


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(KINDS)),
    st.fixed_dictionaries(
        {
            'r': st.integers(1, 5),
            'prefix_positions': st.integers(1, 6),
            'suffix_positions': st.integers(0, 2),
            'tied_weights': st.booleans(),
            'non_linearity': st.sampled_from([None, 'gelu', 'tanh']),
            'dropout': st.sampled_from([0.0, 0.5]),
            'layers': st.sampled_from(['all', [1], [0, 2]]),
        }
    ),
    st.integers(0, 1000),
)
def test_random_combinations(kind, options, seed):
    compare(kind, options, seed=seed)


@pytest.mark.parametrize('kind', KINDS)
def test_counts_and_defaults_are_the_library_s(kind):
    method = ReFT(**KINDS[kind])
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), BERT_BASE, {}))
    assert params.count(fresh) == 36_888
    config = CONFIGS[kind]()
    known = {key: value for key, value in method.to_json().items() if hasattr(config, key)}
    assert {'architecture', 'subtract_projection', 'dropout', 'layers'} <= set(known)
    assert known == {key: getattr(config, key) for key in known}


def test_neighbours():
    segments = np.array([[1, 1, 1, 2, 2, 0], [0, 1, 1, 1, 1, 0]])
    mask = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None]
    before, after = neighbours(jnp.asarray(mask[:, None]), 6)
    inside = (before >= 0) & (after >= 0)
    np.testing.assert_array_equal(inside, segments > 0)
    np.testing.assert_array_equal(
        np.where(inside, before, 0), [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]
    )
    np.testing.assert_array_equal(
        np.where(inside, after, 0), [[2, 1, 0, 1, 0, 0], [0, 3, 2, 1, 0, 0]]
    )
    rows = jnp.asarray(segments[:, None, None, :] == 1)
    before, after = neighbours(rows, 6)
    np.testing.assert_array_equal((before >= 0) & (after >= 0), segments == 1)
    before, after = neighbours(None, 3)
    np.testing.assert_array_equal(np.concatenate([before, after]), [[0, 1, 2], [2, 1, 0]])


def test_padding_and_packing_change_nothing():
    """Texts of one and two tokens are shorter than prefix and suffix."""
    method = ReFT(**KINDS['loreft'], prefix_positions=3, suffix_positions=2, r=2)
    tree, items = small.fresh(method, sigma=0.3), small.texts([9, 2, 1])
    assert method.packable
    for alone, in_rows, in_pack in small.hidden_by_layout(method, tree, small.backbone(), items):
        np.testing.assert_allclose(in_rows, alone, atol=2e-5)
        np.testing.assert_allclose(in_pack, alone, atol=2e-5)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('rank', [1, 4, 16])
def test_orthonormal(rank):
    matrix = draw(0, 16, rank)
    q = orthonormal(matrix)
    np.testing.assert_allclose(q.T @ q, np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(orthonormal(q), q, atol=1e-6)
    np.testing.assert_allclose(orthonormal(-q), -q, atol=1e-6)
    np.testing.assert_allclose(q @ (q.T @ matrix), matrix, atol=1e-5)  # the same span


@pytest.mark.parametrize('rank', [1, 4])
def test_the_gradient_through_orthonormal_is_the_numerical_one(rank):
    matrix, target, direction = draw(0, 16, rank), draw(1, 16, rank), draw(2, 16, rank)

    def loss(x):
        return (orthonormal(x) * target).sum()

    slope = (jax.grad(loss)(matrix) * direction).sum()
    numerical = (loss(matrix + 1e-2 * direction) - loss(matrix - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(slope, numerical, rtol=1e-2)
    # A longer matrix is the same projection, so there is no pull along the matrix itself.
    assert abs((jax.grad(loss)(matrix) * matrix).sum()) < 1e-4


def test_the_basis_stays_orthonormal_and_learns():
    """Gradient descent finds the direction in which the states are to be moved."""
    method = ReFT(**KINDS['loreft'], prefix_positions=4, r=2, dropout=0.0)
    tree = small.fresh(method)['layer_0']['block']['prefix']
    x, goal = draw(0, 4, 8, 24), draw(1, 4, 8, 24)
    wanted = orthonormal(draw(2, 24, 2))
    goal = x + (goal - x) @ wanted @ wanted.T

    @jax.jit
    def step(t):
        def loss(t):
            return jnp.square(method.intervene(t, x, None) - goal).mean()

        value, slope = jax.value_and_grad(loss)(t)
        return value, jax.tree.map(lambda a, b: a - 0.5 * b, t, slope)

    losses = []
    for _ in range(200):
        value, tree = step(tree)
        losses.append(float(value))
    assert np.isfinite(losses).all() and losses[-1] < 0.95 * losses[0]
    q = orthonormal(tree['projection'])
    np.testing.assert_allclose(q.T @ q, np.eye(2), atol=1e-6)


@functools.cache
def gradients(orthogonality):
    kind = KINDS['loreft' if orthogonality else 'noreft']
    method = ReFT(**kind, suffix_positions=2, r=3)
    tree = small.fresh(method, sigma=0.1, layers=1)
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    inputs |= {'key': jax.random.key(0), 'model': small.SHALLOW[1]}

    def loss(t):
        out = small.forward(method, t, small.backbone(), ids, **inputs)
        return jnp.square(out[:, 0]).sum() + jnp.square(out[0, 8, ::2]).sum()

    return small.gradient(loss, tree)


@pytest.mark.parametrize('orthogonality', [True, False])
def test_every_leaf_has_a_finite_gradient(orthogonality):
    for path, leaf in gradients(orthogonality).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


@pytest.mark.parametrize('rank', [1, 3, 12])
def test_torch_makes_the_projection_of_what_is_exported(rank):
    weight = np.asarray(orthonormal(draw(0, 12, rank))).T
    original, base = torch_parametrization(weight)
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(12, rank, bias=False))
    state = layer.state_dict()
    names = [f'parametrizations.weight.{name}' for name in ('original', '0.base')]
    assert [tuple(state[name].shape) for name in names] == [original.shape, base.shape]
    values = zip(names, map(torch.tensor, (original, base)), strict=True)
    layer.load_state_dict(dict(values))
    np.testing.assert_array_equal(layer.weight.detach().numpy(), weight)
    np.testing.assert_allclose(base.T @ base, np.eye(12), atol=1e-6)
    assert original.dtype == base.dtype == np.float32


def test_it_changes_nothing_where_the_source_is_the_projection():
    """LoReFT does not start as the identity; what it promises is this fixed point."""
    method = ReFT(**KINDS['loreft'], r=3, dropout=0.0)
    fresh = small.fresh(method)['layer_0']['block']['prefix']
    x = draw(0, 2, 5, 24)
    assert np.abs(method.intervene(fresh, x, None) - x).max() > 0.1
    same = {'kernel': fresh['projection'], 'bias': jnp.zeros(3)}
    np.testing.assert_allclose(method.intervene(fresh | {'source': same}, x, None), x, atol=1e-5)


def test_the_change_stays_in_the_subspace():
    method = ReFT(**KINDS['loreft'], r=3, dropout=0.0)
    unit = small.perturb(small.fresh(method), 0, 0.3)['layer_0']['block']['prefix']
    x, q = draw(0, 2, 5, 24), orthonormal(unit['projection'])
    change = method.intervene(unit, x, None) - x
    np.testing.assert_allclose(change @ q @ q.T, change, atol=1e-5)
    source = x @ unit['source']['kernel'] + unit['source']['bias'].reshape(1, 1, -1)
    np.testing.assert_allclose(method.intervene(unit, x, None) @ q, source, atol=1e-5)


def test_dropout_needs_a_key_and_is_at_the_positions_alone():
    method = ReFT(**KINDS['direft'], prefix_positions=2, suffix_positions=1, dropout=0.5)
    tree = small.fresh(method)['layer_0']['block']
    x = draw(0, 20, 8, 24)
    stream = Stream(hidden=x, mask=None, word_vectors=x)

    def run(key):
        return np.asarray(method.block(tree, stream, At(0, 'block', {}, key)).hidden)

    dropped = run(jax.random.key(0)) == 0
    assert not (run(None) == 0).any() and not dropped[:, 2:7].any()
    assert all(0.4 < dropped[:, i].mean() < 0.6 for i in (0, 1, 7))
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
    assert (run(jax.random.key(0)) != run(jax.random.key(1))).any()


def test_start_and_seed():
    def leaves(key, kind='loreft', **options):
        method = ReFT(**KINDS[kind], r=2, **options)
        tree = method.init(jax.random.key(key), small.DIMENSIONS, {})
        return {path: np.asarray(leaf) for path, leaf in params.flatten(tree).items()}

    first, second = leaves(0, init_weights_seed=5), leaves(1, init_weights_seed=5)
    assert all((first[path] == second[path]).all() for path in first)
    assert any((leaves(0)[path] != leaves(1)[path]).any() for path in first)
    assert len({leaf.tobytes() for leaf in first.values()}) == len(first)
    q = first['layer_0/block/prefix/projection']
    np.testing.assert_allclose(q.T @ q, np.eye(2), atol=1e-6)
    wide = np.concatenate([leaf.ravel() for leaf in leaves(0, 'noreft').values()])
    assert 0.95 * 24**-0.5 < np.abs(wide).max() <= 24**-0.5


def test_layers_and_leave_out():
    tree = small.fresh(ReFT(**KINDS['loreft'], layers=[1, 2], leave_out=[2]))
    assert set(tree) == {'layer_1'} and set(tree['layer_1']) == {'block'}
    assert ReFT(**KINDS['loreft']).first_layer(tree, small.DIMENSIONS) == 1
    tied = small.fresh(ReFT(**KINDS['loreft'], tied_weights=True))
    assert set(tied['layer_0']['block']) == {'prefix'}


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'layers': [3]}, 'layers names layer 3, but the backbone has layers 0 to 2'),
        ({'layers': [1], 'leave_out': [1]}, 'leaves no layer to adapt'),
        ({'leave_out': [0, 1, 2]}, 'every layer'),
        ({'r': 25}, 'r=25 exceeds the hidden size 24'),
    ],
)
def test_options_that_do_not_fit_the_backbone(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        small.fresh(ReFT(**KINDS['loreft'], **options))


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'r': 0}, 'r=0 is not at least 1'),
        ({'prefix_positions': -1}, 'prefix_positions=-1 is below 0'),
        ({'prefix_positions': 0}, 'both 0; set at least one above 0'),
        ({'dropout': 1.0}, 'dropout=1.0 is not in [0, 1)'),
        ({'layers': 'some'}, "layers='some' is not valid"),
        ({'non_linearity': 'rellu'}, "unknown activation 'rellu'"),
        ({'orthogonality': 'yes'}, 'expected True or False'),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ReFT(**KINDS['loreft'] | options)


def test_bfloat16_and_json():
    method = ReFT(**KINDS['loreft'], r=2, suffix_positions=1, layers=[0, 2])
    tree = small.fresh(method, sigma=0.1)
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    half = Backbone(small.CONFIG, dtype=jnp.bfloat16)
    found = small.run(method, tree, small.backbone(), ids, model=half, **inputs)
    exact = small.run(method, tree, small.backbone(), ids, **inputs)
    assert found.dtype == jnp.bfloat16
    assert np.abs(found.astype(jnp.float32) - exact).max() < 0.03 * np.abs(exact).max()
    fields = {key: value for key, value in method.to_json().items() if key != 'architecture'}
    assert ReFT.from_fields(fields) == method
