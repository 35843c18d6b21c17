import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapters_jax.tasks import Classification, Regression
from adapters_jax.tasks.mixture import Mixture

TOPICS = Classification(labels=('a', 'b', 'c'))
JUDGED = Classification(labels=('no', 'yes'), metric_names=('f1', 'accuracy'))
RATED = Regression(metric_names=('mse', 'pearson'))
MIXTURE = Mixture(
    names=('topics', 'rated', 'judged'), tasks=(TOPICS, RATED, JUDGED), weights=(1.0, 0.5, 3.0)
)


def batch(seed=0, rows=6, slots=4):
    """Return outputs and a batch whose rows hold one task each, in places with labels of others."""
    rng = np.random.default_rng(seed)
    task = np.broadcast_to(rng.integers(0, 3, (rows, 1)), (rows, slots))
    classes = np.where(task == 0, rng.integers(0, 3, task.shape), rng.integers(0, 2, task.shape))
    label = np.where(task == 1, rng.normal(size=task.shape) * 9, classes)
    mask = rng.random(task.shape) < 0.8
    outputs = rng.normal(size=(*task.shape, 3)).astype(np.float32)
    return outputs, {
        'task': task.astype(np.int32),
        'label': label.astype(np.float32),
        'example_mask': mask,
    }


def alone(outputs, columns, number):
    """Return a task's own outputs and batch: its examples, and nothing else, in one row."""
    task = MIXTURE.tasks[number]
    own = columns['example_mask'] & (columns['task'] == number)
    kind = np.int32 if task.label_kind == 'class' else np.float32
    part = {'label': columns['label'][own][None].astype(kind), 'example_mask': own[own][None]}
    return task, outputs[own][None, :, : task.num_outputs], part


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_the_loss_is_the_weighted_sum_of_what_each_task_says_of_its_own_examples(smoothing):
    outputs, columns = batch()
    total, count = MIXTURE.loss(jnp.asarray(outputs), columns, smoothing)
    expected, examples = 0.0, 0
    for number, weight in enumerate(MIXTURE.weights):
        task, own, part = alone(outputs, columns, number)
        loss, n = task.loss(own, part, smoothing if task.label_kind == 'class' else 0.0)
        assert n > 0
        expected, examples = expected + weight * float(loss), examples + float(n)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert count == examples == columns['example_mask'].sum()


def test_the_gradient_of_an_output_is_that_of_its_own_task_and_elsewhere_zero():
    outputs, columns = batch(1)
    grads = np.asarray(jax.jit(jax.grad(lambda x: MIXTURE.loss(x, columns)[0]))(outputs))
    reached = np.zeros_like(grads, bool)
    for number, weight in enumerate(MIXTURE.weights):
        task, own, part = alone(outputs, columns, number)
        expected = jax.jit(jax.grad(lambda x, task=task, part=part: task.loss(x, part)[0]))(own)
        here = columns['example_mask'] & (columns['task'] == number)
        found = grads[here][:, : task.num_outputs]
        np.testing.assert_allclose(found, weight * expected[0], rtol=1e-5, atol=1e-6)
        reached[here, : task.num_outputs] = True
    assert not grads[~reached].any() and reached.any() and not reached.all()


@pytest.mark.parametrize('wrong', [math.nan, math.inf, 1e30])
def test_what_stands_in_empty_places_and_at_other_tasks_reaches_nothing(wrong):
    outputs, columns = batch(2)
    columns['task'] = np.minimum(columns['task'], 1)  # none of `judged`
    real = columns['example_mask']
    slope = jax.jit(jax.value_and_grad(MIXTURE.loss, has_aux=True))
    clean, _ = slope(outputs, columns)
    spoiled = np.where(real[..., None], outputs, wrong).astype(np.float32)
    spoiled[columns['task'] == 1, 1:] = wrong  # beyond the one output of `rated`
    columns['label'] = np.where(real, columns['label'], wrong).astype(np.float32)
    (total, count), grads = slope(spoiled, columns)
    np.testing.assert_array_equal((total, count), clean)
    assert np.isfinite(grads).all() and not np.asarray(grads)[~real].any()


def test_the_outputs_are_as_wide_as_the_widest_task():
    assert MIXTURE.outputs == {'topics': 3, 'rated': 1, 'judged': 2}
    assert MIXTURE.num_outputs == 3


def test_the_mean_takes_errors_with_the_opposite_sign():
    metrics = {
        'topics': {'accuracy': 0.5, 'f1_macro': 0.1},
        'rated': {'mse': 0.2, 'pearson': 0.9},
        'judged': {'f1': 0.75, 'accuracy': 0.3},
    }
    assert MIXTURE.mean(metrics) == pytest.approx((0.5 - 0.2 + 0.75) / 3)
    assert MIXTURE.primary == 'mean' and MIXTURE.higher_is_better
    metrics['rated']['mse'] = math.nan
    assert math.isnan(MIXTURE.mean(metrics))


def test_the_first_mean_and_every_larger_one_is_better_and_nan_never():
    assert MIXTURE.is_better(-3.0, None) and MIXTURE.is_better(0.2, math.nan)
    assert MIXTURE.is_better(0.2, 0.1) and not MIXTURE.is_better(0.1, 0.1)
    assert not MIXTURE.is_better(math.nan, None) and not MIXTURE.is_better(0.05, 0.1)


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'names': (), 'tasks': (), 'weights': ()}, 'expected a name for each'),
        ({'names': ('a', 'b', 'a')}, "'a', 'b', 'a'.*expected a name for each"),
        ({'weights': (1.0, 2.0)}, '3 names, 3 tasks and 2 weights'),
        ({'weights': (1.0, 0.0, 2.0)}, "weight of task 'rated' is 0.0; expected more than 0"),
        ({'weights': (1.0, 1.0, math.inf)}, "'judged' is inf"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, message):
    given = {'names': MIXTURE.names, 'tasks': MIXTURE.tasks, 'weights': MIXTURE.weights}
    with pytest.raises(ValueError, match=message):
        Mixture(**(given | wrong))
