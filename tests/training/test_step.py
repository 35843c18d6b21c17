import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adapters_jax import params as trees
from adapters_jax import sharding, tasks
from adapters_jax.adapters.baselines import FullFineTuning, HeadOnly
from adapters_jax.models.heads import HeadConfig
from adapters_jax.training import step as steps

TASK = tasks.Classification(labels=('a', 'b', 'c'))
# Eight rows of unequal numbers of texts, one of them empty.
ROWS = [[3, 4], [8], [2, 2], [5], [1, 6], [], [4, 3], [7]]
METHOD = tiny.Shift(lowest=1)


@functools.cache
def batch():
    return tiny.batch(ROWS, 8)


def start(optimizer, model, devices=1):
    """Return a mesh and, placed on it, the state at the beginning and the frozen leaves."""
    mesh = sharding.make_mesh(devices)
    trainable, frozen = sharding.put_replicated(
        trees.partition(tiny.params(model), model.rules), mesh
    )
    everywhere = sharding.replicated(mesh)
    return mesh, trainable, jax.jit(optimizer.init, out_shardings=everywhere)(trainable), frozen


def run(optimizer, count=1, devices=1, model=None, rows=None, **options):
    """Take steps; return the trainable leaves, the metrics of each step, and the function."""
    model = model or tiny.model(METHOD)
    mesh, trainable, state, frozen = start(optimizer, model, devices)
    step = steps.jit_train_step(
        trainable, state, model=model, task=TASK, optimizer=optimizer, **options
    )
    placed = sharding.put_batch(rows or batch(), mesh)
    key, metrics = sharding.put_replicated(jax.random.key(0), mesh), []
    for number in range(count):
        trainable, state, m = step(trainable, state, frozen, placed, key, np.int32(number))
        metrics.append(jax.device_get(m))
    return jax.device_get(trainable), metrics, step


@functools.cache
def plain():
    """Return the result of two steps on one device, without dropout."""
    return run(optax.sgd(0.5, momentum=0.9), 2, dropout=False)


def assert_same(one, two, tolerance=1e-6):
    for path, leaf in trees.flatten(one[0]).items():
        np.testing.assert_allclose(trees.flatten(two[0])[path], leaf, atol=tolerance, err_msg=path)
    for first, second in zip(one[1], two[1], strict=True):
        for name in ('loss', 'gradient_norm', 'examples'):
            np.testing.assert_allclose(first[name], second[name], rtol=tolerance, err_msg=name)


def test_a_step_is_the_optimisers_on_the_gradient_of_the_mean_loss():
    model = tiny.model(METHOD)
    params = tiny.params(model)
    trainable, _ = trees.partition(params, model.rules)

    def mean_loss(params):
        rows, places = np.nonzero(batch()['example_mask'])
        logits = model.apply(params, batch())[rows, places]
        labels = batch()['label'][rows, places]
        return -jax.nn.log_softmax(logits)[np.arange(11), labels].sum() / 11

    # The gradient with respect to everything, of which the step must have taken a part.
    loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(params)
    gradient = trees.flatten(gradient)
    own = {path: gradient[path] for path in trees.flatten(trainable)}
    _, metrics, _ = plain()
    np.testing.assert_allclose(metrics[0]['loss'], loss, rtol=1e-5)
    assert metrics[0]['examples'] == 11
    np.testing.assert_allclose(metrics[0]['gradient_norm'], optax.tree.norm(own), rtol=1e-5)
    once = run(optax.sgd(0.5), dropout=False)[0]
    for path, leaf in trees.flatten(trainable).items():
        expected = leaf - 0.5 * own[path]
        np.testing.assert_allclose(trees.flatten(once)[path], expected, atol=1e-6)
        assert np.abs(own[path]).max() > 1e-3
    assert metrics[1]['loss'] < metrics[0]['loss']


@pytest.mark.parametrize('accumulate', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_changes_no_number(accumulate):
    optimizer = optax.sgd(0.5, momentum=0.9)
    assert_same(run(optimizer, 2, dropout=False, accumulate=accumulate), plain())


def test_accumulated_parts_draw_their_own_dropout():
    # Equal rows for both parts: only dropout can make them differ.
    one = {name: column[:4] for name, column in batch().items()}
    both = {name: np.repeat(column, 2, axis=0) for name, column in one.items()}
    model = tiny.model(HeadOnly(), HeadConfig(dropout=0.5))
    trainable, frozen = trees.partition(tiny.params(model), model.rules)
    gradients = jax.jit(
        functools.partial(steps.gradients, model=model, task=TASK, label_smoothing=0.0),
        static_argnums=4,
    )
    key = jax.random.key(0)
    grads, total, count, _ = gradients(trainable, frozen, both, key, 2)
    first, second = (
        gradients(trainable, frozen, one, jax.random.fold_in(key, i), 1) for i in range(2)
    )
    assert abs(first[1] - second[1]) > 1e-2
    np.testing.assert_allclose(total, first[1] + second[1], rtol=1e-6)
    assert count == first[2] + second[2]
    for path, leaf in trees.flatten(grads).items():
        expected = trees.flatten(first[0])[path] + trees.flatten(second[0])[path]
        np.testing.assert_allclose(leaf, expected, atol=1e-5)


@pytest.mark.parametrize('devices', [pytest.param(2, marks=pytest.mark.slow), 8])
def test_the_number_of_devices_changes_no_number(devices):
    optimizer = optax.sgd(0.5, momentum=0.9)
    assert_same(run(optimizer, 2, devices, dropout=False), plain())


def test_many_steps_compile_once_and_draw_new_dropout_that_no_device_changes():
    # No update, so that only dropout can change the loss.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda _: 0.0))
    one = run(optimizer, 4, accumulate=2)
    four = run(optimizer, 4, devices=4, accumulate=2)
    assert_same(one, four)
    assert len({float(metrics['loss']) for metrics in one[1]}) == 4
    assert one[2]._cache_size() == four[2]._cache_size() == 1


def test_the_state_is_donated_and_the_frozen_tree_is_not():
    optimizer, model = optax.adamw(0.1), tiny.model(METHOD)
    mesh, trainable, state, frozen = start(optimizer, model, 2)
    kept = jax.device_get(frozen)
    shardings = jax.tree.map(lambda x: x.sharding, (trainable, state))
    step = steps.jit_train_step(
        trainable, state, model=model, task=TASK, optimizer=optimizer, dropout=False
    )
    placed = sharding.put_batch(batch(), mesh)
    arguments = (frozen, placed, jax.random.key(0), np.int32(0))
    new_trainable, new_state, _ = step(trainable, state, *arguments)
    for leaf in jax.tree.leaves((trainable, state)):
        assert leaf.is_deleted()
    for path, leaf in trees.flatten(frozen).items():
        np.testing.assert_array_equal(leaf, trees.flatten(kept)[path])
    assert not any(column.is_deleted() for column in placed.values())
    assert jax.tree.map(lambda x: x.sharding, (new_trainable, new_state)) == shardings


@pytest.mark.parametrize('method', [METHOD, HeadOnly(), tiny.Shift(tune_norms=True)])
def test_gradients_and_moments_exist_for_trainable_leaves_only(method):
    model = tiny.model(method)
    trainable, frozen = trees.partition(tiny.params(model), model.rules)
    grads, *_ = jax.eval_shape(
        lambda *a: steps.gradients(*a, model=model, task=TASK, label_smoothing=0.0, accumulate=1),
        trainable, frozen, batch(), jax.random.key(0),
    )  # fmt: skip
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    moments = jax.tree.leaves(jax.eval_shape(optax.adam(0.1).init, trainable))
    assert sum(leaf.size for leaf in moments) == 2 * trees.count(trainable) + 1


def matrix_products(method):
    """Return how many matrix products the forward pass, and the gradient, consist of."""
    model = tiny.model(method, HeadConfig(dropout=0.0))
    trainable, frozen = trees.partition(tiny.params(model), model.rules)

    def loss(trainable):
        return steps.loss_sum(trainable, frozen, batch(), None, model, TASK, 0.0)[0]

    jaxprs = [jax.make_jaxpr(f)(trainable) for f in (loss, jax.grad(loss))]
    return [str(jaxpr).count('dot_general') for jaxpr in jaxprs]


def test_the_trunk_is_never_differentiated():
    # A block has eight matrix products: six projections, whose gradient takes one more for the
    # input and one for the kernel, and scores and mixing, which take two each.
    forward, head = matrix_products(HeadOnly())
    assert head - forward == 1  # of the head's kernel
    # From the last feed-forward network's end on: pooling, the head's input, the head's kernel.
    _, top = matrix_products(tiny.Shift(lowest=1))
    assert top - forward == 3
    # One whole block more: no kernel of it, but all its inputs.
    _, both = matrix_products(tiny.Shift())
    assert both - top == 6 + 2 * 2
    # Moreover all twelve kernels, and the inputs of the first block.
    _, full = matrix_products(FullFineTuning())
    assert full - both == 12 + 6 + 2 * 2


def test_rows_that_do_not_divide_into_parts_are_refused():
    with pytest.raises(ValueError, match=r'8 rows does not divide into 3 parts.*accumulate'):
        run(optax.sgd(0.1), accumulate=3)


def test_a_batch_without_examples_moves_nothing():
    empty = batch() | {'example_mask': np.zeros_like(batch()['example_mask'])}
    model = tiny.model(METHOD)
    before, _ = trees.partition(tiny.params(model), model.rules)
    after, metrics, _ = run(optax.sgd(0.5), rows=empty, dropout=False)
    assert {name: float(value) for name, value in metrics[0].items()} == {
        'loss': 0.0,
        'gradient_norm': 0.0,
        'examples': 0.0,
    }
    for path, leaf in trees.flatten(before).items():
        np.testing.assert_array_equal(trees.flatten(after)[path], leaf)


def test_label_smoothing_reaches_the_loss():
    _, (metrics,), _ = run(optax.sgd(0.5), dropout=False, label_smoothing=0.3)
    assert abs(metrics['loss'] - plain()[1][0]['loss']) > 1e-2


def test_training_in_bfloat16_moves_float32_leaves_by_nearly_the_same():
    optimizer = optax.sgd(0.5)
    narrow = tiny.model(METHOD, dtype=jnp.bfloat16, remat='full')
    after, _, _ = run(optimizer, model=narrow, dropout=False)
    expected, _, _ = run(optimizer, dropout=False)
    before, _ = trees.partition(tiny.params(narrow), narrow.rules)
    for path, leaf in trees.flatten(before).items():
        assert trees.flatten(after)[path].dtype == np.float32
        moved, wanted = trees.flatten(after)[path] - leaf, trees.flatten(expected)[path] - leaf
        assert np.abs(moved - wanted).max() < 0.05 * np.abs(wanted).max()


def test_outputs_are_the_models_without_dropout():
    model = tiny.model(METHOD)
    params = tiny.params(model)
    outputs = steps.jit_outputs(model)(*trees.partition(params, model.rules), batch())
    # Compiled with other options, products are summed in another order.
    np.testing.assert_allclose(outputs, jax.jit(model.apply)(params, batch()), atol=3e-6)
