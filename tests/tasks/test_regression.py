"""Regression against values worked out by hand and SciPy."""

import json
import re

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax import tasks

TASK = tasks.Regression(metric_names=('pearson', 'spearman', 'mse', 'mae'))


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_metrics_worked_out_by_hand():
    got = TASK.metrics(column(1, 2, 3, 10), np.array([1, 3, 2, 4], np.float32))
    # Deviations from the means: (-3, -2, -1, 6) and (-1.5, 0.5, -0.5, 1.5).
    assert got['pearson'] == pytest.approx(13 / (50 * 5) ** 0.5)
    assert got['spearman'] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert got['mse'] == pytest.approx((0 + 1 + 1 + 36) / 4)
    assert got['mae'] == pytest.approx((0 + 1 + 1 + 6) / 4)
    assert all(type(value) is float for value in got.values())


@given(st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_correlations_equal_scipys(N, seed):
    random = np.random.default_rng(seed)
    labels = random.normal(3, 1, N).astype(np.float32)
    predicted = random.normal(0, 9, (N, 1)).astype(np.float32)
    got = TASK.metrics(predicted, labels)
    wide = predicted[:, 0].astype(float)
    assert got['pearson'] == pytest.approx(np.corrcoef(labels.astype(float), wide)[0, 1], abs=1e-9)
    ranks = scipy.stats.rankdata(labels), scipy.stats.rankdata(wide)
    assert got['spearman'] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


@pytest.mark.parametrize('constant', [0.0, 2.7, -1e30])
def test_constant_sides_correlate_with_nothing(constant):
    flat, varied = np.full(5, constant, np.float32), np.arange(5, dtype=np.float32)
    for predicted, labels in ((flat, varied), (varied, flat), (flat, flat)):
        got = TASK.metrics(predicted[:, None], labels)
        assert (got['pearson'], got['spearman']) == (0.0, 0.0)
        assert np.isfinite(got['mse'])


def test_constant_but_for_rounding_counts_as_constant():
    noise = (0.1 + 1e-16 * np.arange(5))[:, None]
    assert TASK.metrics(noise, np.arange(5))['pearson'] == 0.0


def test_float32_neighbours_are_not_constant():
    predicted = np.float32(3) + np.spacing(np.float32(3)) * np.arange(5, dtype=np.float32)
    assert TASK.metrics(predicted[:, None], np.arange(5))['pearson'] == pytest.approx(1)


def test_a_single_example_has_an_error_and_no_correlation():
    got = TASK.metrics(column(1.5), np.array([1.0], np.float32))
    assert got == {'pearson': 0.0, 'spearman': 0.0, 'mse': 0.25, 'mae': 0.5}


def test_label_column_reads_numbers_and_their_spelling():
    got = TASK.label_column([1, 2.5, '3.75', ' 4e-1 '])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array([1, 2.5, 3.75, 0.4], np.float32))
    assert TASK.label_column([]).shape == (0,)


@pytest.mark.parametrize('wrong', ['much', '', None, float('nan'), 'inf', -1e39])
def test_labels_that_are_no_finite_numbers_are_named(wrong):
    message = re.escape(f'example 1 must be a finite number, not {wrong!r}')
    with pytest.raises(ValueError, match=message):
        TASK.label_column([0.5, wrong])


def test_loss_is_the_sum_of_squared_errors():
    outputs = np.array([[[1.0], [2.0]], [[3.0], [4.0]]], np.float32)
    labels = np.array([[0.5, 2.0], [1.0, 100.0]], np.float32)
    mask = np.array([[True, True], [True, False]])
    total, count = jax.jit(TASK.loss)(outputs, {'label': labels, 'example_mask': mask})
    assert (float(total), float(count)) == (0.25 + 0 + 4, 3)


def test_label_smoothing_is_refused():
    batch = {'label': np.zeros((1, 1), np.float32), 'example_mask': np.ones((1, 1), bool)}
    with pytest.raises(ValueError, match=r'a regression takes 0, not 0\.1'):
        TASK.loss(np.zeros((1, 1, 1), np.float32), batch, 0.1)


def test_predictions_are_raw_numbers():
    got = json.loads(json.dumps(TASK.predictions(column(7.25, -3.5))))
    assert got == [{'prediction': 7.25}, {'prediction': -3.5}]
