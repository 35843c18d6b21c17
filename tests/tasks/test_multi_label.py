"""Sets of classes against values worked out by hand, from their files to their predictions."""

import json
import math

import jax
import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import tasks
from adapters_jax.data import sources
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.mixing import join
from adapters_jax.evaluate import evaluate
from adapters_jax.predict import predict
from adapters_jax.tasks.mixture import Mixture
from adapters_jax.train import train
from adapters_jax.training import ahead

NAMES = ('a', 'b', 'c')
KNOWN = sorted(tasks.MultiLabel.known_metrics)
TASK = tasks.MultiLabel(labels=NAMES, metric_names=KNOWN)
LABELS = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]], bool)
# What is said: {a}, {}, {a, b}, {b}; nobody ever means c.
OUTPUTS = np.array([[3, -1, -2], [-1, -2, -3], [2, 1, -4], [-2, 2, -1]], np.float32)


def test_metrics_worked_out_by_hand():
    got = TASK.metrics(OUTPUTS, LABELS)
    # a: 2 right; b: 1 right, 1 wrongly said, 1 missed; c: nothing.
    assert got['precision_micro'] == pytest.approx(3 / 4)
    assert got['recall_micro'] == pytest.approx(3 / 4)
    assert got['f1_micro'] == pytest.approx(3 / 4)
    assert got['f1_macro'] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert got['subset_accuracy'] == pytest.approx(2 / 4)
    assert got['hamming_loss'] == pytest.approx(2 / 12)
    # a is ranked perfectly; of b the order of the logits is right, wrong, right, wrong.
    assert got['average_precision'] == pytest.approx((1 + (1 / 1 + 2 / 3) / 2) / 2)
    assert all(type(value) is float for value in got.values())


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_metrics_are_numbers_whatever_is_missing(classes, count, seed):
    random = np.random.default_rng(seed)
    names = tuple(f'class {i}' for i in range(classes))
    task = tasks.MultiLabel(labels=names, metric_names=KNOWN)
    labels = random.random((count, classes)) < random.random()
    got = task.metrics(random.normal(size=labels.shape).astype(np.float32), labels)
    assert all(0 <= value <= 1 + 1e-12 for value in got.values())  # sums of floats are rounded


def test_a_threshold_decides_what_is_predicted():
    bold = tasks.MultiLabel(labels=NAMES, threshold=0.2)
    assert bold.predictions(OUTPUTS)[0]['prediction'] == ['a', 'b']
    got = json.loads(json.dumps(TASK.predictions(OUTPUTS)))
    assert [one['prediction'] for one in got] == [['a'], [], ['a', 'b'], ['b']]
    assert got[0]['logits'] == [3, -1, -2]
    assert got[0]['probabilities'] == pytest.approx([1 / (1 + math.exp(-x)) for x in (3, -1, -2)])


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_loss_is_a_sum_over_classes_and_examples(smoothing):
    batch = {'label': LABELS.reshape(2, 2, 3), 'example_mask': np.array([[1, 1], [1, 0]], bool)}
    total, count = jax.jit(TASK.loss)(OUTPUTS.reshape(2, 2, 3), batch, smoothing)
    expected = 0.0
    for logits, labels in zip(OUTPUTS[:3].tolist(), LABELS[:3].tolist(), strict=True):
        for logit, label in zip(logits, labels, strict=True):
            p, target = 1 / (1 + math.exp(-logit)), label * (1 - smoothing) + smoothing / 2
            expected -= target * math.log(p) + (1 - target) * math.log(1 - p)
    assert float(count) == 3
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_empty_places_count_nothing_and_get_no_gradient():
    bad = np.where(np.arange(4)[:, None] < 2, OUTPUTS, np.nan).reshape(1, 4, 3)
    batch = {'label': LABELS.reshape(1, 4, 3), 'example_mask': np.arange(4)[None] < 2}
    (total, _), gradient = jax.jit(jax.value_and_grad(TASK.loss, has_aux=True))(bad, batch)
    assert np.isfinite(total) and np.isfinite(gradient).all() and not gradient[0, 2:].any()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'labels': ('a',)}, 'multi_label needs at least two classes, not 1'),
        ({'labels': ('a', 'a')}, 'each class may be named once'),
        ({'labels': NAMES, 'threshold': 1.0}, 'threshold of multi_label is 1.0; expected a prob'),
        ({'labels': NAMES, 'metric_names': ('f1',)}, "unknown metric 'f1' for multi_label; known"),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.MultiLabel(**fields)


def test_json_brings_the_task_back():
    task = tasks.MultiLabel(labels=NAMES, threshold=0.3, primary='f1_macro')
    again = tasks.from_json(json.loads(json.dumps(task.to_json())))
    assert again == task and hash(again) == hash(task)


def read(tmp_path, name, text, **data):
    path = tmp_path / name
    path.write_text(text)
    return sources.load({'train': str(path)} | data, 'classes')['train']


def test_labels_of_a_list_and_of_a_cell(tmp_path):
    lines = [
        {'text': 'x', 'labels': ['b', 'a', 'b']},
        {'text': 'y', 'labels': []},
        {'text': 'z', 'labels': 'c, a'},
        {'text': 'w', 'labels': [3, 4.0]},
    ]
    found = read(tmp_path, 'in.jsonl', '\n'.join(map(json.dumps, lines)))
    assert found['label'][:] == [['b', 'a'], [], ['c', 'a'], ['3', '4']]
    cells = 'text,label\nx,a;b\ny,\nz,c\n'
    found = read(tmp_path, 'in.csv', cells, label_separator=';')
    assert found['label'][:] == [['a', 'b'], [], ['c']]
    tabs = cells.replace(';', '\t')
    found = read(tmp_path, 'in.csv', tabs, label_separator='\\t')  # as a shell has it
    assert found['label'][:] == [['a', 'b'], [], ['c']]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"text": "x", "label": ["a"]}\n{"text": "y", "label": null}', 'line 2: the labels are N'),
        ('{"text": "x", "label": 3}', 'line 1: the labels are 3; give a list, or a text with'),
        ('{"text": "x", "label": [["a"]]}', r"line 1: the label \['a'\] is neither text nor"),
        ('{"text": "x", "label": [""]}', 'line 1: the label is empty'),
    ],
)
def test_labels_that_are_none_are_named_with_their_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, 'in.jsonl', text)


def test_unseen_labels_are_named():
    assert TASK.label_column([['c', 'a'], []]).tolist() == [[True, False, True], [False] * 3]
    with pytest.raises(ValueError, match=r"unseen labels 'd' \(2 times\); known: 'a', 'b', 'c'"):
        TASK.label_column([['d'], ['a', 'd']])


def test_a_mixture_gives_each_task_its_own_width():
    classes = tasks.create('classification', labels=('no', 'yes'))
    mixture = Mixture(names=('one', 'many'), tasks=(classes, TASK), weights=(1.0, 1.0))
    one = Encoded({}, np.zeros(3, np.int64), {'label': np.array([1, 0], np.int32)})
    many = Encoded({}, np.zeros(5, np.int64), {'label': LABELS})
    examples = join([one, many]).examples
    batch = {name: column[:, None] for name, column in examples.items()}
    batch['example_mask'] = np.ones((6, 1), bool)
    outputs = np.concatenate([np.ones((2, 3), np.float32), OUTPUTS])[:, None]
    parts = mixture.parts(outputs, batch)
    assert float(parts['one'][0]) == pytest.approx(2 * math.log(2))
    alone = {'label': LABELS[:, None], 'example_mask': np.ones((4, 1), bool)}
    np.testing.assert_allclose(parts['many'], TASK.loss(OUTPUTS[:, None], alone), rtol=1e-6)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """Texts with the names of all topics of which they have a word, which are none for some."""
    folder = tmp_path_factory.mktemp('sets')
    topics = {word: topic for topic, words in toy.TOPICS.items() for word in words}
    random, lines = np.random.default_rng(0), []
    for _ in range(240):
        words = [*random.choice(list(topics), random.integers(0, 3)), *['the', 'was'] * 2]
        text = ' '.join(map(str, random.permutation(words)))
        found = sorted({topics[word] for word in text.split() if word in topics})
        lines.append(json.dumps({'text': text, 'labels': found}))
    (folder / 'texts.jsonl').write_text('\n'.join(lines))
    made = toy.config(toy.write_backbone(folder / 'bert'), str(folder / 'texts.jsonl'))
    changes = {'task__name': 'multi_label', 'optimizer__learning_rate': 2e-2}
    return toy.change(made, **changes, training__epochs=60.0, training__evaluate_every=100_000)


@pytest.mark.usefixtures('compiled_once')
def test_sets_are_learned_and_predicted(config, tmp_path):
    summary = train(config, tmp_path / 'run')
    assert summary['primary'] == 'f1_micro'
    assert summary['metrics']['validation']['f1_micro'] > 0.9
    assert evaluate(tmp_path / 'run', 'validation')['metrics'] == summary['metrics']['validation']
    lines = toy.read_lines(tmp_path / 'run' / 'predictions_validation.jsonl')
    right = [line['prediction'] == line['gold'] for line in lines]
    assert np.mean(right) == summary['metrics']['validation']['subset_accuracy']
    found = predict(tmp_path / 'run' / 'adapter', [{'text': 'the cat was near snow'}])
    assert found[0]['prediction'] == ['animal', 'weather']


def test_shapes_ahead_are_those_of_a_batch(config):
    batch = ahead.plan(config, texts=4, labels=5).batch
    assert batch['label'].shape == (32, 4, 5) and batch['label'].dtype == bool
