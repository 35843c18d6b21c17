"""AdapterDrop: the dropped layers are gone from tree, program and gradient, and nothing else is."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adapters_jax import params as trees
from adapters_jax.adapters import registry
from adapters_jax.adapters.dropping import (
    check_droppable,
    describe,
    draw,
    drop_layers,
    layers_of,
    parse,
)

LAYERS = tiny.CONFIG.layers
NAMES = [
    'pfeiffer[reduction_factor=4]',
    'lora[r=2,init_weights=bert]',
    'prefix_tuning_flat[prefix_length=3]',
    'pfeiffer[reduction_factor=4]|lora[r=2]',
]


def slow_but(*quick):
    """Return all names as a test's parameters; those that others repeat are for the slow tests."""
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in NAMES]


def build(name, **options):
    return tiny.model(registry.create(name), **options)


def noisy(model, seed=0):
    """Return parameters with nothing left at zero: a fresh adapter may be the identity."""
    params = tiny.params(model)
    rng = np.random.default_rng(seed)
    moved = jax.tree.map(
        lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), params['adapters']
    )
    return params | {'adapters': moved}


@pytest.fixture(scope='module')
def packed():
    return tiny.batch([[3, 5], [7]], 8)


# ---- the tree


def test_only_layers_below_the_first_kept_one_and_the_embeddings_go():
    layer = {'attention': {'down': 1}, 'block': {'up': 2}}
    rest = {'shared': {'layer_0': 3}, 'constants': {'layer_0': {'a': 4}}, 'output': {'w': 5}}
    rest |= {'backbone': {'layer_0': {'norm': 7}, 'embeddings': {'norm': 8}}}  # a bank's
    tree = {f'layer_{i}': layer for i in (0, 1, 2, 10)} | rest | {'embeddings': {'prompt': 6}}
    assert drop_layers(tree, 0) == tree
    assert drop_layers(tree, 1) == {f'layer_{i}': layer for i in (1, 2, 10)} | rest
    assert drop_layers(tree, 3) == {'layer_10': layer} | rest
    assert drop_layers(tree, 11) == rest
    kept = {f'layer_{i}': layer for i in (0, 10)} | rest | {'embeddings': {'prompt': 6}}
    assert drop_layers(tree, range(1, 3)) == kept
    assert set(tree) == {'layer_0', 'layer_1', 'layer_2', 'layer_10', *rest, 'embeddings'}


def test_members_lose_the_same_layers_however_deep_they_lie():
    leaf = np.ones((4, 2))
    member = {'layer_0': {'attention': leaf}, 'layer_1': {'attention': leaf}, 'shared': {'x': leaf}}
    kept = {'layer_1': {'attention': leaf}, 'shared': {'x': leaf}}
    tree = {'a': member, 'b': {'invertible': {'embeddings': {'w': leaf}}, 'bottleneck': member}}
    assert drop_layers(tree, 1) == {'a': kept, 'b': {'invertible': {}, 'bottleneck': kept}}


@pytest.mark.parametrize('name', slow_but(*NAMES[0::2], NAMES[-1]))
def test_to_drop_layers_is_to_have_left_them_out(packed, name):
    model, params = build(name, dropped=1), noisy(build(name))
    methods = [method.replace(']', ',leave_out=[0]]') for method in name.split('|')]
    without = build('|'.join(methods))
    own = drop_layers(params['adapters']['default'], 1)
    assert set(trees.flatten(own)) == set(
        trees.flatten(tiny.params(without)['adapters']['default'])
    )
    left_out = params | {'adapters': {'default': own}}
    np.testing.assert_array_equal(
        jax.jit(model.apply)(params, packed), jax.jit(without.apply)(left_out, packed)
    )


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('head', 'head.*no parameters of its own in the layers.*nothing to drop'),
        ('bitfit', 'bitfit.*nothing to drop'),
        ('prompt_tuning[prompt_length=2]', 'nothing to drop'),
        ('prompt_tuning[prompt_length=2]|lora[r=2]', 'inserts into the text belong to all layers'),
    ],
)
def test_what_has_no_layers_to_drop_is_refused(name, message):
    model = build(name)
    with pytest.raises(ValueError, match=message):
        check_droppable(model.method, tiny.params(model)['adapters']['default'], 'none')


@pytest.mark.parametrize('name', NAMES)
def test_what_has_layers_is_not(name):
    model = build(name)
    check_droppable(model.method, tiny.params(model)['adapters']['default'], 'none')


@pytest.mark.parametrize('name', slow_but(NAMES[-1]))
def test_to_drop_layers_in_the_middle_is_to_have_left_them_out(packed, name):
    last = range(LAYERS - 1, LAYERS)
    model, params = build(name, dropped=last), noisy(build(name))
    methods = [method.replace(']', f',leave_out=[{LAYERS - 1}]]') for method in name.split('|')]
    left_out = {'adapters': {'default': drop_layers(params['adapters']['default'], last)}}
    np.testing.assert_array_equal(
        jax.jit(model.apply)(params, packed),
        jax.jit(build('|'.join(methods)).apply)(params | left_out, packed),
    )


def test_what_is_invertible_at_the_embeddings_goes_with_the_lowest_layer(packed):
    name = 'seq_bn_inv[bottleneck={reduction_factor: 4}]'
    model, params = build(name, dropped=1), noisy(build(name))
    below = {'layer_0': None, 'embeddings': None}
    own = {
        member: {site: leaves for site, leaves in tree.items() if site not in below}
        for member, tree in params['adapters']['default'].items()
    }
    plain = build('pfeiffer[reduction_factor=4,leave_out=[0]]')
    alone = params | {'adapters': {'default': own['bottleneck']}}
    np.testing.assert_array_equal(
        jax.jit(model.apply)(params, packed), jax.jit(plain.apply)(alone, packed)
    )
    # Nor is anything undone before the words are scored.
    sites, _ = model.sites(params, packed)
    hidden = np.ones((1, 2, tiny.CONFIG.block.hidden), np.float32)
    np.testing.assert_array_equal(sites.undo(hidden), hidden)


@pytest.mark.parametrize(
    ('text', 'layers', 'told'),
    [('0', [], 0), ('3', [0, 1, 2], 3), ('0-2', [0, 1, 2], 3), ('2-4', [2, 3, 4], '2-4')],
)
def test_layers_are_read_and_told(text, layers, told):
    assert list(layers_of(parse(text))) == layers
    assert describe(parse(text)) == told


@pytest.mark.parametrize('text', ['', '-1', '4-2', '1,2', 'all'])
def test_what_names_no_layers_is_refused(text):
    with pytest.raises(ValueError, match=f'--drop_layers={text}: expected a number N.*or A-B'):
        parse(text)


# ---- the program


def flops(function, *inputs):
    return jax.jit(function).lower(*inputs).compile().cost_analysis()['flops']


def gradient(model, packed):
    """Return the function that is differentiated in a step: of the trained leaves alone."""

    def loss(trainable, frozen):
        return jnp.square(model.apply(trees.merge(trainable, frozen), packed)).sum()

    return jax.grad(loss)


@pytest.mark.parametrize('name', [NAMES[0], pytest.param(NAMES[-1], marks=pytest.mark.slow)])
def test_each_dropped_layer_makes_the_program_shorter_and_leaves_no_gradient(packed, name):
    params = noisy(build(name))
    forward, backward = [], []
    for dropped in range(LAYERS + 1):
        model = build(name, dropped=dropped)
        forward.append(flops(model.apply, params, packed))
        halves = trees.partition(params, model.rules)
        program = jax.jit(gradient(model, packed)).lower(*halves).compile()
        backward.append(program.cost_analysis()['flops'])
        for path, leaf in trees.flatten(program(*halves)['adapters']).items():
            layer = int(path.partition('layer_')[2][0])
            assert (np.asarray(leaf) != 0).any() == (layer >= dropped), path
    assert forward == sorted(set(forward), reverse=True)
    assert backward == sorted(set(backward), reverse=True)
    plain = build('head')
    assert forward[-1] == flops(plain.apply, params, packed)


def test_without_any_layer_left_the_backbone_is_the_plain_one(packed):
    params = noisy(build(NAMES[0]))
    plain = build('head')
    dropped = build(NAMES[0], dropped=LAYERS)
    np.testing.assert_array_equal(
        jax.jit(dropped.apply)(params, packed), jax.jit(plain.apply)(params, packed)
    )


# ---- the draw


def test_the_draw_is_uniform_from_none_to_all_layers_but_one():
    counts = collections.Counter(draw(0, step, 12) for step in range(6000))
    assert sorted(counts) == list(range(12))
    deviations = [(count - 500) / np.sqrt(500 * 11 / 12) for count in counts.values()]
    assert np.abs(deviations).max() < 4


def test_the_draw_depends_on_seed_and_step_alone():
    first = [draw(3, step, 6) for step in range(40)]
    assert [draw(3, step, 6) for step in reversed(range(40))] == first[::-1]
    assert [draw(4, step, 6) for step in range(40)] != first
    assert len(set(first)) > 1
    assert draw(3, 0, 1) == 0
