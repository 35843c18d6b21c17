"""The task: its settings, its loss over packed rows, and what it makes of outputs."""

import functools
import json
import math

import datasets
import jax
import numpy as np
import pytest

from adapters_jax import tasks
from adapters_jax.config import base
from adapters_jax.data import batches
from adapters_jax.data.encoded import Encoded
from adapters_jax.tasks.question_answering import candidates

TASK = tasks.create('question_answering', n_best=3)
WITH_NONE = tasks.create('question_answering', n_best=3, threshold=0.5)
CONTEXT = 'one two six ten'
WORDS = np.array([(0, 3), (4, 7), (8, 11), (12, 15)], np.int32)


def split_of(*questions):
    """Return rows and windows, [CLS] q [SEP] four words [SEP], of (answers, place of the first)."""
    count = len(questions)
    rows = {
        'id': [f'id{i}' for i in range(count)],
        'question': ['?'] * count,
        'context': [CONTEXT] * count,
        'answers': [own for own, _ in questions],
    }
    one = np.concatenate([np.zeros((3, 2), np.int32), WORDS, np.zeros((1, 2), np.int32)])
    encoded = Encoded(
        tokens={'input_ids': np.ones(8 * count, np.int32)},
        offsets=np.arange(count + 1) * 8,
        examples={
            'first': np.full(count, 3, np.int32),
            'last': np.full(count, 6, np.int32),
            'start': np.array([place for _, place in questions], np.int32),
            'end': np.array([place for _, place in questions], np.int32),
        },
        aside={'characters': np.tile(one, (count, 1))},
        rows=np.arange(count),
    )
    features = {name: datasets.Value('string') for name in ('id', 'question', 'context')}
    features['answers'] = datasets.List(datasets.Value('string'))
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features)), encoded


def outputs_of(*questions):
    """Return logits: of each question the token that its answer is, and both of [CLS]'s."""
    logits = np.full((8 * len(questions), 2), -5.0, np.float32)
    for number, (place, value, none) in enumerate(questions):
        logits[8 * number + place] = value
        logits[8 * number] = none
    return logits


def test_settings_come_from_the_config_and_the_training_questions():
    given = base().task
    answered, _ = split_of((['two'], 4), (['six'], 5))
    some, _ = split_of((['two'], 4), ([], 0))
    kind = tasks.kind('question_answering')
    plain = tasks.create(kind.name, **kind.settings(given, answered))
    assert (plain.threshold, plain.metric_names, plain.primary) == ('none', ('f1', 'exact'), 'f1')
    assert (plain.stride, plain.question_length, plain.answer_length, plain.n_best) == (
        *(128, 64, 30, 20),
    )
    both = tasks.create(kind.name, **kind.settings(given, some))
    assert both.threshold == 'tuned' and both.metric_names[2] == 'HasAns_f1'
    assert kind.settings(given, None)['threshold'] == 'none'
    given.threshold, given.stride = '-1.5', 7
    chosen = kind.settings(given, answered)
    assert (chosen['threshold'], chosen['stride']) == (-1.5, 7)
    assert 'best_f1' in chosen['metric_names']
    given.threshold, given.metrics = 'tuned', ('exact',)
    assert 'metric_names' not in kind.settings(given, answered)
    given.threshold = 'high'
    with pytest.raises(ValueError, match=r"task.threshold is 'high'; expected a number, 'auto'"):
        kind.settings(given, answered)


@pytest.mark.parametrize('task', [TASK, WITH_NONE], ids=str)
def test_json_brings_the_task_back(task):
    assert tasks.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert task.head(tasks.task.HeadConfig()).per_token and task.num_outputs == 2


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'stride': -1}, r'task.stride is -1; expected a whole number from 0'),
        ({'token_types': 1}, 'token_types is 1; expected True or False'),
        ({'n_best': 0}, r'task.n_best is 0; expected a whole number from 1'),
        ({'answer_length': 2.5}, r'task.answer_length is 2.5'),
        ({'threshold': 'auto'}, r"the threshold is 'auto'; expected a number, 'none' or 'tuned'"),
        ({'threshold': math.inf}, 'the threshold is inf'),
    ],
)
def test_wrong_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.create('question_answering', **fields)


def ragged(seed=0, count=9):
    """Return windows of different lengths with labels, and logits for all of their tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 12, count)
    first = rng.integers(2, 4, count)
    last = lengths - 2
    start = np.where(rng.random(count) < 0.3, 0, rng.integers(first, last + 1))
    end = np.where(start > 0, rng.integers(start, last + 1), 0)
    places = {'first': first, 'last': last, 'start': start, 'end': end}
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    encoded = Encoded(
        tokens={'input_ids': np.ones(offsets[-1], np.int32)},
        offsets=offsets,
        examples={name: column.astype(np.int32) for name, column in places.items()},
        rows=np.arange(count),
    )
    return encoded, rng.normal(0, 2, (offsets[-1], 2)).astype(np.float32)


def placed(encoded, logits, policy):
    """Yield the batches of a split with their outputs, which are no numbers where no token is."""
    plan = batches.plan_epoch(encoded.lengths, policy, 0, 0, shuffle=False)
    for index in range(len(plan)):
        batch = batches.assemble(encoded, plan, index, 0)
        outputs = np.full((*batch['segments'].shape, 2), np.nan, np.float32)
        for row, slot in zip(*np.nonzero(batch['example_mask']), strict=True):
            example = batch['example_id'][row, slot]
            own = slice(*encoded.offsets[example : example + 2])
            outputs[row, batch['segments'][row] == slot + 1] = logits[own]
        yield batch, outputs


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(task, outputs, batch):
    return jax.value_and_grad(task.loss, has_aux=True)(outputs, batch)


def expected_losses(encoded, logits):
    """Return each example's loss by the definition, in float64."""
    found = []
    for i, begin in enumerate(encoded.offsets[:-1]):
        places = {name: int(column[i]) for name, column in encoded.examples.items()}
        allowed = [0, *range(places['first'], places['last'] + 1)]
        own = logits[begin : encoded.offsets[i + 1]].astype(np.float64)
        terms = [
            np.log(np.exp(own[allowed, end]).sum()) - own[places[name], end]
            for end, name in enumerate(('start', 'end'))
        ]
        found.append(sum(terms) / 2)
    return found


@pytest.mark.parametrize('policy', [batches.Packed(24, 3, 5), batches.Buckets((12,), 4)], ids=str)
def test_loss_is_that_of_each_example_alone_however_rows_are_shared(policy):
    encoded, logits = ragged()
    total = count = 0
    for batch, outputs in placed(encoded, logits, policy):
        (value, number), gradient = loss_and_gradient(TASK, outputs, batch)
        assert value.dtype == np.float32 and np.isfinite(gradient).all()
        allowed = np.asarray(candidates(batch)).any(1)
        assert not np.asarray(gradient)[~allowed].any()
        total, count = total + float(value), count + float(number)
    assert count == len(encoded)
    assert total == pytest.approx(sum(expected_losses(encoded, logits)), rel=1e-5)


def test_masked_examples_count_nothing_whatever_is_in_them():
    encoded, logits = ragged(1)
    ((batch, outputs),) = placed(encoded, logits, batches.Packed(128, 1, 9))
    hidden = np.array(batch['example_mask'])
    hidden[0, 2:] = False
    for bad in (np.nan, np.inf, 1e30):
        spoilt = np.where(batch['segments'][..., None] > 2, bad, outputs)
        labels = {name: np.where(hidden, batch[name], 10**6) for name in TASK.labels_in}
        given = batch | labels | {'example_mask': hidden}
        (value, count), gradient = loss_and_gradient(TASK, spoilt.astype(np.float32), given)
        shown = [expected_losses(encoded, logits)[i] for i in batch['example_id'][hidden]]
        assert (float(value), float(count)) == (pytest.approx(sum(shown), rel=1e-5), 2)
        assert np.isfinite(gradient).all()


def test_label_smoothing_is_refused():
    with pytest.raises(ValueError, match=r'training.label_smoothing is 0.1; question answering'):
        TASK.loss(np.zeros((1, 1, 2)), {}, 0.1)


def test_scores_are_those_of_the_official_script_as_shares():
    rows, encoded = split_of((['two'], 4), (['six ten', 'six'], 5), (['one'], 3))
    outputs = outputs_of((4, 3, 9), (5, 3, 9), (6, 3, 9))
    assert TASK.score(outputs, encoded, rows) == pytest.approx({'f1': 2 / 3, 'exact': 2 / 3})
    details = TASK.details(outputs, encoded, rows)
    assert details['threshold'] == 'none'
    assert details['official']['HasAns_exact'] == pytest.approx(200 / 3)
    text = '  3 questions with an answer: 66.67 % exact, F1 66.67 %'
    assert TASK.details_text(details) == text
    rows, encoded = split_of((['two'], 4), ([], 0), ([], 0))
    outputs = outputs_of((4, 3, 2), (5, 3, 3), (5, 3, 4))
    found = tasks.create(
        'question_answering', threshold=0.5, metrics=('exact', 'best_f1', 'best_f1_thresh')
    ).score(outputs, encoded, rows)
    assert found == pytest.approx({'exact': 2 / 3, 'best_f1': 1, 'best_f1_thresh': -2})


def test_the_threshold_is_tuned_where_it_is_open():
    rows, encoded = split_of((['two'], 4), (['six'], 5), ([], 0))
    outputs = outputs_of((4, 3, 2), (5, 3, 3.5), (5, 3, 4))  # odds -2, 1 and 2
    open_ = tasks.create('question_answering', threshold='tuned', metrics=('f1', 'NoAns_exact'))
    tuned = open_.tuned(outputs, encoded, rows)
    assert tuned.threshold == 1
    assert open_.score(outputs, encoded, rows) == tuned.score(outputs, encoded, rows)
    assert tuned.score(outputs, encoded, rows) == {'f1': 1, 'NoAns_exact': 1}
    assert WITH_NONE.tuned(outputs, encoded, rows) is WITH_NONE
    shown = tuned.details_text(tuned.details(outputs, encoded, rows))
    assert '1 questions without: 100.00 % exact' in shown
    assert shown.endswith('\n  no answer where its odds exceed 1')
    # Nobody tuned it, as without a validation split: the better score wins.
    assert [one['prediction'] for one in open_.predict(outputs, encoded, rows)] == ['two', '', '']


def test_predictions_say_where_the_answer_is_and_how_sure_it_is():
    rows, encoded = split_of((['two'], 4))
    (told,) = TASK.predict(outputs_of((4, 3, 9)), encoded, rows)
    assert (told['prediction'], told['start'], told['end']) == ('two', 4, 7)
    assert 'null_odds' not in told and len(told['n_best']) == 3
    assert told['n_best'][0]['text'] == 'two' and told['n_best'][0]['score'] == told['score']
    (said,) = WITH_NONE.predict(outputs_of((4, 3, 3.2)), encoded, rows)
    assert said['prediction'] == 'two' and said['null_odds'] == pytest.approx(0.4)
    assert [one['text'] for one in said['n_best'][:2]] == ['', 'two']
    (silent,) = WITH_NONE.predict(outputs_of((4, 3, 4)), encoded, rows)
    assert (silent['prediction'], silent['start'], silent['end']) == ('', None, None)
    assert silent['score'] == silent['n_best'][0]['score'] > 0.8
    # By its threshold an adapter may say what is none of the best.
    bold = tasks.create('question_answering', n_best=1, threshold=9.0)
    (said,) = bold.predict(outputs_of((4, 3, 4)), encoded, rows)
    assert (said['prediction'], [one['text'] for one in said['n_best']]) == ('two', ['two'])
    shown = TASK.shown(rows[0])
    assert shown == {'id': 'id0', 'question': '?', 'context': CONTEXT, 'gold': ['two']}


def test_files_for_the_official_script():
    rows, encoded = split_of((['two'], 4), ([], 0))
    told = WITH_NONE.predict(outputs_of((4, 3, 2), (4, 3, 4)), encoded, rows)
    files = {end: json.loads(t) for end, t in WITH_NONE.native_files(rows, told).items()}
    assert files['.json'] == {'id0': 'two', 'id1': ''}
    assert files['.null_odds.json'] == {'id0': -2, 'id1': 2}
    best = files['.nbest.json']['id1'][0]
    assert best.keys() == {'text', 'probability', 'start_logit', 'end_logit'}
    assert '.null_odds.json' not in TASK.native_files(rows, told)


def test_objects_to_predict_for():
    objects = [{'question': 'Who?', 'context': CONTEXT, 'id': 3}] * 2
    rows = TASK.rows_of(objects, [1, 4], None)
    assert rows['id'][:] == ['1', '4'] and rows.column_names == ['id', 'question', 'context']
    with pytest.raises(
        ValueError, match=r"line 4 has no text under 'context'; expected \"question"
    ):
        TASK.rows_of([objects[0], {'question': 'Who?'}], [1, 4], None)
    with pytest.raises(ValueError, match=r'input line 1: the context holds .* half of a character'):
        TASK.rows_of([{'question': 'Who?', 'context': 'a \ud83d'}], [1], None)
