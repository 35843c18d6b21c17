"""What all kinds of tasks share: construction, JSON, the choice of the best checkpoint."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import tasks

CLASSES = tasks.create('classification', labels=('no', 'yes'), metrics=['accuracy', 'f1'])
NUMBER = tasks.create('regression')
texts = st.text(min_size=1, max_size=8)


@st.composite
def any_task(draw):
    if draw(st.booleans()):
        kind, fields = tasks.Regression, {}
    else:
        labels = tuple(draw(st.lists(texts, min_size=2, max_size=6, unique=True)))
        kind = tasks.Classification
        fields = {'labels': labels, 'positive': draw(st.sampled_from(labels))}
    known = sorted(kind.known_metrics)
    names = draw(st.lists(st.sampled_from(known), min_size=1, unique=True))
    primary = draw(st.sampled_from(names))
    return kind(metric_names=tuple(names), primary=primary, **fields)


@given(any_task())
def test_json_round_trip_keeps_every_field(task):
    again = tasks.from_json(json.loads(json.dumps(task.to_json())))
    assert again == task
    assert type(again) is type(task)
    assert hash(again) == hash(task)


def test_json_names_the_kind_and_every_setting():
    assert CLASSES.to_json() == {
        'name': 'classification',
        'metric_names': ['accuracy', 'f1'],
        'primary': 'accuracy',
        'labels': ['no', 'yes'],
        'positive': 'yes',
    }


def test_create_is_the_constructor_by_name():
    assert tasks.create('regression', metrics=['mse'], primary='mse') == tasks.Regression(
        metric_names=('mse',)
    )
    assert tasks.Classification(labels=['no', 'yes'], metric_names=['accuracy', 'f1']) == CLASSES


def test_a_kind_is_known_before_its_labels_are():
    assert tasks.kind('classification') is tasks.Classification
    assert tasks.kind('regression').label_kind == 'number'


def test_defaults():
    assert NUMBER.metric_names == ('pearson', 'spearman', 'mse')
    assert (NUMBER.primary, NUMBER.num_outputs, NUMBER.label_kind) == ('pearson', 1, 'number')
    task = tasks.create('classification', labels=('a', 'b', 'c'))
    assert task.metric_names == ('accuracy', 'f1_macro')
    assert (task.primary, task.num_outputs, task.label_kind) == ('accuracy', 3, 'class')
    assert task.positive == ''


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'name': 'clasification'}, "unknown task 'clasification'; known: classification, "),
        ({}, "unknown task ''; known: classification, "),
        (
            {'name': 'regression', 'labels': ['a']},
            "regression has no setting 'labels'; known: metr",
        ),
        ({'name': 'classification'}, "classification needs the setting 'labels'"),
        (
            {'name': 'regression', 'metric_names': ['accuracy']},
            "unknown metric 'accuracy' for regression; known: mae, mse, pearson, spearman",
        ),
        ({'name': 'regression', 'metric_names': ['mse', 'mse']}, 'each metric may be named once'),
        (
            {'name': 'regression', 'metric_names': ['mse'], 'primary': 'mae'},
            r"the primary metric 'mae' is not among those reported \(mse\): add it",
        ),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.from_json(fields)


def test_the_better_checkpoint():
    assert CLASSES.higher_is_better and NUMBER.higher_is_better
    assert CLASSES.is_better(0.5, None) and CLASSES.is_better(0.6, 0.5)
    assert not CLASSES.is_better(0.5, 0.5)
    error = tasks.create('regression', metrics=['mse', 'pearson'])
    assert not error.higher_is_better
    assert error.is_better(0.4, 0.5) and not error.is_better(0.6, 0.5)


def test_nan_is_never_the_better_checkpoint():
    for task in (CLASSES, tasks.create('regression', metrics=['mse'])):
        assert not task.is_better(math.nan, None)
        assert not task.is_better(math.nan, 0.1)
        assert task.is_better(0.1, math.nan)


def test_metrics_of_a_diverged_model_are_nan():
    outputs = np.array([[0.0, 1.0], [np.nan, 0.0]], np.float32)
    values = CLASSES.metrics(outputs, np.array([0, 1]))
    assert list(values) == ['accuracy', 'f1'] and all(map(math.isnan, values.values()))


@pytest.mark.parametrize('task', [CLASSES, NUMBER], ids=lambda task: task.name)
def test_outputs_and_labels_must_fit(task):
    width = task.num_outputs
    with pytest.raises(ValueError, match='at least one labelled example'):
        task.metrics(np.zeros((0, width)), np.zeros(0, int))
    with pytest.raises(ValueError, match=r'3 outputs need as many labels, not \(2,\)'):
        task.metrics(np.zeros((3, width)), np.zeros(2, int))
    with pytest.raises(ValueError, match=rf'the shape \[N, {width}\], not \[3, 7\]'):
        task.predictions(np.zeros((3, 7)))
    with pytest.raises(ValueError, match=r'not finite for 1 of 3 examples \(the first is number 2'):
        task.predictions(np.concatenate([np.zeros((2, width)), np.full((1, width), np.inf)]))
    assert task.predictions(np.zeros((0, width))) == []


@functools.partial(jax.jit, static_argnums=0)
def loss(task, outputs, batch):
    return task.loss(outputs, batch)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(task, outputs, batch):
    return jax.value_and_grad(task.loss, has_aux=True)(outputs, batch)


@st.composite
def masked_batch(draw):
    """Two batches with the same real examples: garbage in the masked places, and no such place."""
    task = draw(st.sampled_from([CLASSES, NUMBER]))
    B, S = 2, 3
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = np.array(draw(st.lists(st.booleans(), min_size=B * S, max_size=B * S))).reshape(B, S)
    outputs = random.normal(0, 3, (B, S, task.num_outputs)).astype(np.float32)
    if task is CLASSES:
        labels, garbage = random.integers(0, 2, (B, S)).astype(np.int32), 10**6
    else:
        labels, garbage = random.normal(0, 1, (B, S)).astype(np.float32), np.nan
    bad = np.where(mask[..., None], outputs, draw(st.sampled_from([np.nan, np.inf, 1e30])))
    masked = (bad, {'label': np.where(mask, labels, garbage), 'example_mask': mask})
    real = {'label': labels[mask][None], 'example_mask': np.ones((1, mask.sum()), bool)}
    return task, masked, (outputs[mask][None], real), mask


@settings(deadline=None, max_examples=60)
@given(masked_batch())
def test_masked_examples_count_nothing_and_get_no_gradient(case):
    task, masked, real, mask = case
    expected, count = loss(task, *real)
    (got, got_count), gradient = loss_and_gradient(task, *masked)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert got_count == count == mask.sum()
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~mask].any()


@pytest.mark.parametrize('task', [CLASSES, NUMBER], ids=lambda task: task.name)
def test_loss_is_float32_and_jits_with_the_task_as_a_static_argument(task):
    outputs = jnp.ones((2, 3, task.num_outputs), jnp.bfloat16)
    label = np.zeros((2, 3), np.int32 if task.label_kind == 'class' else np.float32)
    batch = {'label': label, 'example_mask': np.array([[1, 1, 0], [1, 0, 0]], bool)}
    total, count = loss(task, outputs, batch)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, 3 * (math.log(2) if task is CLASSES else 1), rtol=1e-6)
    assert count == 3
