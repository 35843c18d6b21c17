"""Classification against values worked out by hand, scikit-learn and optax."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import tasks

KNOWN = sorted(tasks.Classification.known_metrics)


def outputs_for(predicted, num_outputs):
    """Logits whose largest entry is the predicted class."""
    return np.eye(num_outputs, dtype=np.float32)[np.asarray(predicted, int)]


def two_classes(**fields):
    return tasks.Classification(labels=('no', 'yes'), metric_names=KNOWN, **fields)


def test_metrics_worked_out_by_hand():
    # 'yes': 3 right, 1 wrongly said, 2 missed; 'no': 4 right.
    labels = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    predicted = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    got = two_classes().metrics(outputs_for(predicted, 2), np.array(labels))
    precision, recall, f1 = 3 / 4, 3 / 5, 2 / 3
    of_no = {'precision': 4 / 6, 'recall': 4 / 5, 'f1': 8 / 11}
    assert list(got) == KNOWN
    assert got['accuracy'] == pytest.approx(0.7)
    assert (got['precision'], got['recall']) == pytest.approx((precision, recall))
    assert got['f1'] == pytest.approx(f1)
    assert got['precision_macro'] == pytest.approx((precision + of_no['precision']) / 2)
    assert got['recall_macro'] == pytest.approx((recall + of_no['recall']) / 2)
    assert got['f1_macro'] == pytest.approx((f1 + of_no['f1']) / 2)
    assert got['f1_micro'] == pytest.approx(0.7)
    assert got['matthews'] == pytest.approx((3 * 4 - 1 * 2) / (4 * 6 * 5 * 5) ** 0.5)
    turned = two_classes(positive='no').metrics(outputs_for(predicted, 2), np.array(labels))
    for name, value in of_no.items():
        assert turned[name] == pytest.approx(value)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_metrics_equal_scikit_learns(num_outputs, N, seed):
    random = np.random.default_rng(seed)
    names = tuple(f'class {i}' for i in range(num_outputs))
    positive = int(random.integers(num_outputs))
    task = tasks.Classification(labels=names, metric_names=KNOWN, positive=names[positive])
    labels = random.integers(0, num_outputs, N)
    outputs = random.normal(size=(N, num_outputs)).astype(np.float32)
    got = task.metrics(outputs, labels)
    predicted = outputs.argmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert got['accuracy'] == sklearn.metrics.accuracy_score(labels, predicted)
        assert got['matthews'] == sklearn.metrics.matthews_corrcoef(labels, predicted)
        for average in ('macro', 'micro', 'weighted', None):
            chosen = {'labels': [positive]} if average is None else {}
            expected = sklearn.metrics.precision_recall_fscore_support(
                labels, predicted, average=average, zero_division=0, **chosen
            )
            for name, value in zip(('precision', 'recall', 'f1'), expected[:3], strict=True):
                key = name if average is None else f'{name}_{average}'
                assert got[key] == pytest.approx(float(np.squeeze(value)), abs=1e-12), key
    assert all(type(value) is float for value in got.values())


@pytest.mark.parametrize(
    ('label', 'predicted', 'accuracy', 'f1', 'macro'),
    [(0, 0, 1, 0, 1), (1, 1, 1, 1, 1), (0, 1, 0, 0, 0), (1, 0, 0, 0, 0)],
)
@pytest.mark.parametrize('N', [1, 5])
def test_one_class_only_gives_defined_values_without_warnings(
    label, predicted, accuracy, f1, macro, N
):
    got = two_classes().metrics(outputs_for([predicted] * N, 2), np.full(N, label))
    assert (got['accuracy'], got['f1'], got['f1_macro']) == (accuracy, f1, macro)
    assert (got['matthews'], got['f1_micro']) == (0, accuracy)


def test_only_the_chosen_metrics_are_reported_in_their_order():
    task = tasks.create('classification', labels=('a', 'b'), metrics=['matthews', 'accuracy'])
    assert list(task.metrics(outputs_for([0, 1], 2), np.array([0, 1]))) == ['matthews', 'accuracy']
    assert task.primary == 'matthews'


def test_label_column():
    task = tasks.Classification(labels=('ham', 'spam'))
    ids = task.label_column(['spam', 'ham', 'ham'])
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 0, 0]
    assert task.label_column([]).shape == (0,)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (['ham', 'egg', 'spam', 'egg'], r"unseen labels 'egg' \(2 times\); known: 'ham', 'spam'"),
        (['egg', 'Ham', 'egg'], r"'egg' \(2 times\), 'Ham' \(1 times\); known"),
        ([1, 'ham'], r'unseen labels 1 \(1 times\)'),
        ([None], r'unseen labels None \(1 times\)'),
        (list('abcdefg'), r"'e' \(1 times\) and 2 more; known"),
    ],
)
def test_unseen_labels_are_named_and_counted(values, message):
    with pytest.raises(ValueError, match=message):
        tasks.Classification(labels=('ham', 'spam')).label_column(values)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'labels': ('a',)}, r"at least two classes, not 1 \('a'\)"),
        ({'labels': ()}, 'at least two classes, not 0'),
        ({'labels': ('a', 'b', 'a')}, r"named once, but these are repeated: \['a'\]"),
        ({'labels': ('a', 2)}, 'named by texts that are not empty, not by 2'),
        ({'labels': ('a', '')}, "named by texts that are not empty, not by ''"),
        ({'labels': ('a', 'b'), 'positive': 'c'}, "the positive class 'c' is none of 'a', 'b'"),
        (
            {'labels': tuple('abc'), 'metric_names': ('accuracy', 'f1')},
            'f1 of 3 classes needs a positive class: set `positive`, or use f1_macro',
        ),
        ({'labels': ('a', 'b'), 'metric_names': ('f2',)}, "unknown metric 'f2' for classification"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.Classification(**fields)


@pytest.mark.parametrize('wrong', [-1, 2])
def test_labels_that_are_no_ids_are_refused(wrong):
    task, outputs, labels = two_classes(), outputs_for([0, 1], 2), np.array([0, wrong])
    message = rf'from 0 to 1, but 1 of 2 are not \(the first is {wrong}\): is the split unlabelled'
    with pytest.raises(ValueError, match=message):
        task.metrics(outputs, labels)
    with pytest.raises(ValueError, match=message):
        task.confusion(outputs, labels)


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 1.0])
def test_loss_is_optax_cross_entropy_with_smoothed_labels(smoothing):
    task = tasks.Classification(labels=tuple('abcde'))
    random = np.random.default_rng(0)
    logits = random.normal(0, 4, (3, 4, 5)).astype(np.float32)
    labels = random.integers(0, 5, (3, 4)).astype(np.int32)
    batch = {'label': labels, 'example_mask': np.ones((3, 4), bool)}
    total, count = task.loss(logits, batch, smoothing)
    target = optax.smooth_labels(jax.nn.one_hot(labels, 5), smoothing)
    expected = optax.softmax_cross_entropy(logits, target).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert count == 12


def test_label_smoothing_may_be_mapped_over_a_population():
    task = tasks.Classification(labels=tuple('abc'))
    logits = np.random.default_rng(1).normal(size=(2, 2, 3)).astype(np.float32)
    batch = {'label': np.ones((2, 2), np.int32), 'example_mask': np.ones((2, 2), bool)}
    rates = jnp.array([0.0, 0.2])
    totals, _ = jax.vmap(lambda rate: task.loss(logits, batch, rate))(rates)
    singly = [task.loss(logits, batch, rate)[0] for rate in (0.0, 0.2)]
    np.testing.assert_allclose(totals, singly, rtol=1e-6)
    assert abs(totals[0] - totals[1]) > 1e-3


@pytest.mark.parametrize('smoothing', [-0.1, 1.5])
def test_label_smoothing_outside_its_range_is_refused(smoothing):
    batch = {'label': np.zeros((1, 1), np.int32), 'example_mask': np.ones((1, 1), bool)}
    with pytest.raises(ValueError, match='between 0 and 1'):
        two_classes().loss(np.zeros((1, 1, 2), np.float32), batch, smoothing)


def test_predictions_carry_the_class_name_and_the_logits():
    outputs = np.array([[0.1, 2.5], [1.0, -1.0]], np.float32)
    got = json.loads(json.dumps(two_classes().predictions(outputs)))
    assert [(p['prediction'], p['label']) for p in got] == [('yes', 'yes'), ('no', 'no')]
    assert np.array([p['logits'] for p in got], np.float32).tolist() == outputs.tolist()
    assert set(got[0]) == {'prediction', 'label', 'logits'}


def test_confusion_has_true_classes_as_rows():
    task = tasks.Classification(labels=('person', 'place', 'date'))
    labels, predicted = [0, 0, 1, 1, 1], [0, 1, 1, 1, 0]
    counts = task.confusion(outputs_for(predicted, 3), np.array(labels))
    assert counts == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    expected = sklearn.metrics.confusion_matrix(labels, predicted, labels=[0, 1, 2])
    assert counts == expected.tolist()
    assert json.loads(json.dumps(counts)) == counts
    assert task.confusion_text(counts).splitlines() == [
        'true \\ predicted  person  place  date',
        'person                 1      1     0',
        'place                  1      2     0',
        'date                   0      0     0',
    ]


def test_confusion_of_many_classes_lists_the_commonest_errors():
    task = tasks.Classification(labels=tuple(f'c{i:02}' for i in range(21)))
    counts = np.diag(np.full(21, 9))
    counts[3, 4], counts[20, 0], counts[0, 1] = 2, 7, 2
    assert task.confusion_text(counts.tolist()).splitlines() == [
        '11 errors; true -> predicted',
        '     7  c20 -> c00',
        '     2  c00 -> c01',
        '     2  c03 -> c04',
    ]
