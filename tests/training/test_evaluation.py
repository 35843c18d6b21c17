"""Evaluation is exact: against one example at a time, on any number of devices, in any batches."""

from collections import Counter

import jax
import numpy as np
import pytest
import tiny

from adapters_jax import sharding
from adapters_jax.data import pipeline
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.policies import Buckets, Packed
from adapters_jax.params import partition
from adapters_jax.tasks.classification import Classification
from adapters_jax.tasks.regression import Regression
from adapters_jax.training import evaluation
from adapters_jax.training.step import jit_outputs

LABELS = ('one', 'two', 'three')
POLICIES = [
    Packed(row_length=32, rows=8, max_segments=5),
    Packed(row_length=24, rows=8, max_segments=24),
    Packed(row_length=24, rows=64, max_segments=3),
    Buckets(lengths=(8, 16, 24), batch_size=8),
    Buckets(lengths=(24,), batch_size=56),
]


def make_split(count=53, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 25, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = {
        'input_ids': rng.integers(1, tiny.CONFIG.vocabulary, offsets[-1]).astype(np.int32),
        'token_type_ids': rng.integers(0, 2, offsets[-1]).astype(np.int32),
    }
    labels = rng.integers(0, 3, count).astype(np.int32)
    return Encoded(tokens, offsets.astype(np.int64), {'label': labels})


@pytest.fixture(scope='module')
def split():
    return make_split()


@pytest.fixture(scope='module')
def model():
    return tiny.model()


@pytest.fixture(scope='module')
def trees(model):
    return partition(tiny.params(model), model.rules)


@pytest.fixture(scope='module')
def by_hand(model, trees, split):
    """The outputs of every example, computed from itself alone and padded to one width."""
    forward, width, rows = jit_outputs(model), 24, []
    for i in range(len(split)):
        part = slice(split.offsets[i], split.offsets[i + 1])
        length = part.stop - part.start
        batch = {
            name: np.pad(column[part], (0, width - length))[None]
            for name, column in split.tokens.items()
        }
        batch['positions'] = np.minimum(np.arange(width), length - 1)[None]
        batch['segments'] = (np.arange(width) < length).astype(np.int32)[None]
        batch |= {'starts': np.zeros((1, 1), np.int32)}
        rows.append(np.asarray(forward(*trees, batch))[0, 0])
    return np.stack(rows)


def outputs(model, trees, split, policy, devices):
    mesh = sharding.make_mesh(devices)
    placed = [sharding.put_replicated(tree, mesh) for tree in trees]
    return evaluation.outputs(jit_outputs(model), *placed, split, policy, 0, mesh)


@pytest.mark.parametrize(
    'policy',
    [
        pytest.param(policy, marks=pytest.mark.slow if i in (2, 4) else ())
        for i, policy in enumerate(POLICIES)
    ],
    ids=str,
)
def test_outputs_and_metrics_are_those_of_each_example_alone(model, trees, split, by_hand, policy):
    found = outputs(model, trees, split, policy, 1)
    assert found.shape == (53, 3) and np.ptp(found) > 1
    np.testing.assert_allclose(found, by_hand, atol=2e-5)
    labels = split.examples['label']
    task = Classification(labels=LABELS, metric_names=('accuracy', 'f1_macro', 'recall_macro'))
    assert task.metrics(found, labels) == pytest.approx(scores(by_hand, labels), abs=1e-12)


def scores(logits, labels):
    """Accuracy, macro F1 and macro recall, counted one example after the other."""
    right, said, there, correct = Counter(), Counter(), Counter(), 0
    for row, label in zip(logits, labels.tolist(), strict=True):
        guess = max(range(3), key=row.__getitem__)
        said[guess] += 1
        there[label] += 1
        right[label] += guess == label
        correct += guess == label
    f1 = [2 * right[c] / (said[c] + there[c]) for c in range(3)]
    recall = [right[c] / there[c] for c in range(3)]
    return {'accuracy': correct / 53, 'f1_macro': sum(f1) / 3, 'recall_macro': sum(recall) / 3}


@pytest.mark.parametrize('devices', [pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize('policy', [POLICIES[0], POLICIES[3]], ids=str)
def test_any_number_of_devices_gives_the_same(model, trees, split, by_hand, policy, devices):
    found = outputs(model, trees, split, policy, devices)
    np.testing.assert_allclose(found, by_hand, atol=2e-5)
    task = Classification(labels=LABELS)
    labels = split.examples['label']
    assert task.metrics(found, labels) == task.metrics(by_hand, labels)


def test_numbers_are_exact_too(split):
    model = tiny.model(outputs=1)
    trees = partition(tiny.params(model), model.rules)
    numbers = np.random.default_rng(1).normal(size=len(split)).astype(np.float32)
    found = [outputs(model, trees, split, policy, 1)[:, 0] for policy in POLICIES[::3]]
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)
    x, y = found[0].astype(np.float64), numbers.astype(np.float64)
    expected = {
        'mse': sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / 53,
        'mae': sum(abs(a - b) for a, b in zip(x, y, strict=True)) / 53,
        'pearson': np.corrcoef(x, y)[0, 1],
    }
    task = Regression(metric_names=tuple(expected))
    assert task.metrics(found[0][:, None], numbers) == pytest.approx(expected, rel=1e-9)


def test_a_split_without_labels_has_outputs_all_the_same(model, trees, split, by_hand):
    unlabelled = Encoded(split.tokens, split.offsets, {})
    found = outputs(model, trees, unlabelled, POLICIES[0], 1)
    np.testing.assert_allclose(found, by_hand, atol=2e-5)


def test_one_example_and_as_many_as_fill_a_batch(model, trees, split, by_hand):
    for count in (1, 8, 16):
        part = split.select(np.arange(count))
        found = outputs(model, trees, part, Buckets(lengths=(24,), batch_size=8), 1)
        np.testing.assert_allclose(found, by_hand[:count], atol=2e-5)


@pytest.mark.parametrize(
    ('spoil', 'expected'),
    [
        (lambda batches: batches[:-1], r'\d+ of 53 examples were evaluated'),
        (lambda batches: [*batches, batches[0]], r'example \d+ was evaluated twice'),
    ],
    ids=['lost', 'twice'],
)
def test_an_example_lost_or_counted_twice_is_an_error(
    model, trees, split, monkeypatch, spoil, expected
):
    real = pipeline.eval_batches
    monkeypatch.setattr(
        pipeline, 'eval_batches', lambda *given, **own: spoil(list(real(*given, **own)))
    )
    with pytest.raises(RuntimeError, match=expected):
        outputs(model, trees, split, POLICIES[0], 1)


def test_few_programs_serve_a_split(model, trees, split):
    forward, mesh = jit_outputs(model), sharding.make_mesh(1)
    for policy, most in ((POLICIES[0], 1), (POLICIES[3], 3)):
        before = forward._cache_size()
        for _ in range(2):
            evaluation.outputs(forward, *trees, split, policy, 0, mesh)
        assert 1 <= forward._cache_size() - before <= most
    assert jax.device_count() == 8
