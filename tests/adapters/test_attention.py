"""The attention adapter against a plain NumPy reading of it, in both its forms."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bert as small

from adapters_jax.adapters.attention import AttentionAdapter, SideAttentionAdapter
from adapters_jax.adapters.binding import Adapted
from adapters_jax.adapters.method import At
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Stream, SubLayer

FORMS = [AttentionAdapter, SideAttentionAdapter]
# Where `tests/conformance` asks the side form the same.
INSIDE = [AttentionAdapter, pytest.param(SideAttentionAdapter, marks=pytest.mark.slow)]
SMALL = {'size': 8, 'heads': 2}
ONE_LAYER = dataclasses.replace(small.CONFIG, layers=1)
CARRY = ('attention_adapter/words', 'attention_adapter/state')


def batch(lengths=(9, 4), length=12):
    return small.padded(small.texts(lengths), length)


# The four parts in NumPy, one position and one head at a time.


def dense(layer, x):
    return x @ np.asarray(layer['kernel']) + np.asarray(layer['bias'])


def norm(layer, x):
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return normal * np.asarray(layer['scale']) + np.asarray(layer['bias'])


def embedding_layer(tree, vectors, tags=None):
    x = dense(tree['projection'], vectors)
    if tags is not None:
        x = x + np.asarray(tree['tags']['embedding'])[tags]
    return norm(tree['norm'], x)


def self_attention(tree, x, words, mask, heads):
    query = dense(tree['query'], x)
    keys, values = dense(tree['key'], words), dense(tree['value'], words)
    width = query.shape[-1] // heads
    mixed = np.zeros_like(query)
    for b, t, h in np.ndindex(*query.shape[:2], heads):
        head = slice(h * width, (h + 1) * width)
        seen = np.flatnonzero(mask[b, t])
        scores = keys[b, seen, head] @ query[b, t, head] / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        mixed[b, t, head] = weights / weights.sum() @ values[b, seen, head]
    return dense(tree['output'], mixed)


def feed_forward(tree, x):
    return dense(tree['down'], np.tanh(dense(tree['up'], x)))


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some_mask(seed=3):
    mask = np.random.default_rng(seed).random((2, 5, 5)) < 0.6
    return mask | np.eye(5, dtype=bool)


def method_and_tree(form, **options):
    method = form(non_linearity='tanh', init_scale=0.3, **SMALL | options)
    return method, small.fresh(method, sigma=0.2)


@pytest.mark.parametrize('tags', [0, 4])
def test_embedding_layer(tags):
    method, tree = method_and_tree(AttentionAdapter, tags=tags)
    given = np.array([[0, 1, 2, 3, 0], [3, 3, 1, 1, 2]])
    vectors = drawn(0, 2, 5, 24)
    stream = Stream(hidden=jnp.asarray(vectors), mask=None, word_vectors=jnp.asarray(vectors))
    stream = stream.replace(tags=jnp.asarray(given))
    found = Adapted(params=tree, key=None, method=method).embeddings(stream).carry[''][CARRY[0]]
    expected = embedding_layer(tree['shared']['embedding'], vectors, given if tags else None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_inside_form():
    method, tree = method_and_tree(AttentionAdapter)
    one = tree['layer_1']['feed_forward']
    output, residual, words = drawn(0, 2, 5, 24), drawn(1, 2, 5, 24), drawn(2, 2, 5, 8)
    mask = some_mask()
    stream = Stream(
        hidden=jnp.asarray(residual),
        mask=jnp.asarray(mask[:, None]),
        word_vectors=jnp.asarray(output),
        carry={CARRY[0]: jnp.asarray(words)},
    )
    end = SubLayer(jnp.asarray(output), jnp.asarray(residual), jnp.tanh, stream)
    found = method.sub_layer(one, end, At(layer=1, name='feed_forward', shared={}, key=None))
    mixed = self_attention(one['attention'], np.tanh(output + residual), words, mask, 2)
    refined = mixed + feed_forward(one['feed_forward'], mixed)
    expected = np.tanh(output + dense(one['output'], refined) + residual)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_side_form():
    method, tree = method_and_tree(SideAttentionAdapter)
    sites = Adapted(params=tree, key=None, method=method)
    mask, vectors = some_mask(), drawn(0, 2, 5, 24)
    hidden = [drawn(i, 2, 5, 24) for i in range(4)]
    stream = Stream(jnp.asarray(hidden[0]), jnp.asarray(mask[:, None]), jnp.asarray(vectors))
    stream = sites.embeddings(stream)
    words = state = embedding_layer(tree['shared']['embedding'], vectors)
    for i in range(3):
        stream = sites.block(i, stream.replace(hidden=jnp.asarray(hidden[i + 1])))
        np.testing.assert_array_equal(stream.hidden, hidden[i + 1])
        one = tree[f'layer_{i}']['block']
        state = state + dense(one['read'], hidden[i + 1])
        query = norm(one['attention']['norm'], state)
        state = state + self_attention(one['attention'], query, words, mask, 2)
        state = state + feed_forward(one['feed_forward'], norm(one['feed_forward']['norm'], state))
        np.testing.assert_allclose(stream.carry[''][CARRY[1]], state, atol=1e-4)
    expected = hidden[3] + dense(tree['output'], norm(tree['output']['norm'], state))
    np.testing.assert_allclose(sites.output(stream).hidden, expected, atol=1e-4)


@pytest.mark.parametrize('form', FORMS)
def test_zero_scale_is_the_plain_backbone_to_the_bit(form):
    method = form(init_scale=0, **SMALL)
    ids, inputs = batch()
    weights, tree = small.backbone(), small.fresh(method)
    expected = jax.jit(lambda w: Backbone(small.CONFIG).apply({'params': w}, ids, **inputs))(
        weights
    )
    run = jax.jit(lambda w, t: small.forward(method, t, w, ids, **inputs))
    np.testing.assert_array_equal(run(weights, tree), expected)
    near = small.fresh(dataclasses.replace(method, init_scale=1e-3))
    change = np.abs(run(weights, near) - expected).max()
    assert 0 < change < 0.05


def loss_of(method, ids, inputs):
    def loss(tree):
        return jnp.square(small.forward(method, tree, small.backbone(), ids, **inputs)).sum()

    return loss


@pytest.mark.parametrize('form', INSIDE)
def test_every_leaf_learns(form):
    method = form(init_scale=0.1, tags=3, **SMALL)
    tree = small.fresh(method, sigma=0.1)
    ids, inputs = batch()
    loss = loss_of(method, ids, inputs | {'tags': ids % 3})
    for path, leaf in small.gradient(loss, tree).items():
        # A constant added to all scores of a softmax changes nothing.
        assert ('key/bias' in path) == (np.abs(leaf).max() < 1e-3), path


def equations(jaxpr):
    """Yield every equation of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from equations(inner)


def backbone_products(function, tree):
    """Count matrix products with the backbone's feed-forward width, which no adapter has."""
    width = small.DIMENSIONS.feed_forward
    return sum(
        equation.primitive.name == 'dot_general'
        and any(width in variable.aval.shape for variable in equation.invars)
        for equation in equations(jax.make_jaxpr(function)(tree).jaxpr)
    )


def flops(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()['flops']


@pytest.mark.parametrize('form', FORMS)
def test_only_the_inside_form_goes_back_through_the_backbone(form):
    method = form(**SMALL)
    tree = small.fresh(method)
    loss = loss_of(method, *batch())
    forward = 2 * small.DIMENSIONS.layers  # up and down, once a layer
    assert backbone_products(loss, tree) == forward
    backward = backbone_products(jax.grad(loss), tree) - forward
    assert backward == (0 if form is SideAttentionAdapter else forward - 2)


def test_side_form_sends_no_gradient_into_what_it_reads():
    method, tree = method_and_tree(SideAttentionAdapter)
    sites = Adapted(params=tree, key=None, method=method)

    def state(hidden):
        stream = sites.embeddings(Stream(hidden=hidden, mask=None, word_vectors=hidden))
        return jnp.square(sites.block(0, stream).carry[''][CARRY[1]]).sum()

    assert not jax.grad(state)(jnp.asarray(drawn(0, 2, 5, 24))).any()


def test_side_form_trains_at_the_price_of_its_own_backward_pass():
    ids, inputs = batch((30, 20), 32)
    method = SideAttentionAdapter(**SMALL)
    tree, weights = small.fresh(method), small.backbone()

    def loss(t, w):
        return small.forward(method, t, w, ids, **inputs).sum()

    def backbone(w):
        return Backbone(small.CONFIG).apply({'params': w}, ids, **inputs).sum()

    alone, forward = flops(backbone, weights), flops(loss, tree, weights)
    step = flops(jax.value_and_grad(loss), tree, weights)
    assert forward - alone < 0.4 * alone
    # A backward pass costs twice its forward pass; the backbone's would be `alone` or more.
    assert step - forward < 2.5 * (forward - alone) < alone


def test_where_the_two_forms_sit():
    inside, side = (form(leave_out=[0, 2], **SMALL) for form in FORMS)
    tree = small.fresh(inside)
    assert set(tree) == {'shared', 'layer_1'} and set(tree['layer_1']) == {'feed_forward'}
    assert inside.first_layer(tree, small.DIMENSIONS) == 1
    both = small.fresh(AttentionAdapter(mh_adapter=True, **SMALL))
    assert set(both['layer_0']) == {'attention', 'feed_forward'}
    tree = small.fresh(side)
    assert set(tree) == {'shared', 'layer_1', 'output'} and set(tree['layer_1']) == {'block'}
    assert side.first_layer(tree, small.DIMENSIONS) == small.DIMENSIONS.layers


@pytest.mark.parametrize('form', INSIDE)
def test_padding_and_packing_change_nothing(form):
    method, tree = method_and_tree(form)
    items = small.texts([9, 4, 9])
    for alone, in_rows, in_pack in small.hidden_by_layout(method, tree, small.backbone(), items):
        np.testing.assert_allclose(in_rows, alone, atol=2e-5)
        np.testing.assert_allclose(in_pack, alone, atol=2e-5)


@pytest.mark.parametrize('form', INSIDE)
def test_a_bank_is_a_vmap(form):
    method = form(init_scale=0.3, **SMALL)
    ids, inputs = batch()
    trees = [small.fresh(method, seed, sigma=0.1) for seed in range(2)]
    bank = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    together = jax.jit(
        jax.vmap(lambda t: small.forward(method, t, small.backbone(), ids, **inputs))
    )(bank)
    for tree, found in zip(trees, together, strict=True):
        expected = small.run(method, tree, small.backbone(), ids, **inputs)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_dropout_needs_a_key(form):
    method, tree = method_and_tree(form, dropout=0.4)
    ids, inputs = batch()

    def run(key, method=method):
        found = small.run(
            method, tree, small.backbone(), ids, key=key, model=Backbone(ONE_LAYER), **inputs
        )
        return np.asarray(found)

    quiet = run(None, dataclasses.replace(method, dropout=0.0))
    np.testing.assert_array_equal(run(None), quiet)
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert np.abs(first - second).max() > 1e-3 and np.abs(first - quiet).max() > 1e-3
    np.testing.assert_array_equal(first, run(jax.random.key(0)))


@pytest.mark.parametrize('form', INSIDE)
def test_bfloat16(form):
    method, tree = method_and_tree(form)
    ids, inputs = batch()
    exact = small.run(method, tree, small.backbone(), ids, **inputs)
    half = Backbone(small.CONFIG, dtype=jnp.bfloat16)
    found = small.run(method, tree, small.backbone(), ids, model=half, **inputs)
    assert found.dtype == jnp.bfloat16
    assert np.abs(found.astype(jnp.float32) - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize('form', FORMS)
def test_remat_changes_no_gradient(form):
    method, tree = method_and_tree(form)
    ids, inputs = batch()

    def gradient(remat):
        model = Backbone(ONE_LAYER, remat=remat)
        return small.gradient(
            lambda t: small.forward(method, t, small.backbone(), ids, model=model, **inputs)[
                :, 0, 0
            ].sum(),
            tree,
        )

    gradients = [gradient(remat) for remat in ('none', 'full')]
    for path, leaf in gradients[0].items():
        np.testing.assert_allclose(gradients[1][path], leaf, rtol=1e-3, atol=1e-5, err_msg=path)


def test_output_starts_at_the_chosen_scale():
    wide = AttentionAdapter(size=128, init_scale=0.01)
    tree = small.fresh(wide)
    kernel = tree['layer_0']['feed_forward']['output']['kernel']
    assert abs(kernel.std() - 0.01) < 1e-3
    query = tree['layer_0']['feed_forward']['attention']['query']['kernel']
    assert abs(query.std() - 24**-0.5) < 0.01


def test_tags_that_are_missing():
    method = AttentionAdapter(tags=3, **SMALL)
    with pytest.raises(ValueError, match='the batch has no tags'):
        small.run(method, small.fresh(method), small.backbone(), *batch()[:1])


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'size': 10, 'heads': 4}, 'size=10 is not a multiple of heads=4'),
        ({'heads': 0}, 'heads=0 is not at least 1'),
        ({'expansion': 0}, 'expansion=0 is not at least 1'),
        ({'tags': -1}, 'tags=-1 is not at least 0'),
        ({'dropout': 1}, 'dropout=1 is not in [0, 1)'),
        ({'init_scale': -1.0}, 'init_scale=-1.0 is negative'),
        ({'non_linearity': 'x'}, "unknown activation 'x'"),
    ],
)
@pytest.mark.parametrize('form', FORMS)
def test_refusals(form, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        form(**options)


def test_an_adapter_that_is_nowhere():
    with pytest.raises(ValueError, match='both False'):
        AttentionAdapter(output_adapter=False)
