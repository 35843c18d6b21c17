"""Questions with candidates: laid out in batches, scored against one another, learned, served."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest
import tiny
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax import sweep, tasks
from adapters_jax.data import batches
from adapters_jax.data.encoded import PART, Encoded
from adapters_jax.data.policies import Buckets, Packed
from adapters_jax.evaluate import evaluate
from adapters_jax.params import partition
from adapters_jax.predict import predict
from adapters_jax.tasks.multiple_choice import LEAST
from adapters_jax.train import train
from adapters_jax.training import ahead, experiment
from adapters_jax.training.step import jit_outputs

TASK = tasks.MultipleChoice()
POLICIES = [Packed(row_length=48, rows=2, max_segments=4), Buckets(lengths=(40, 60), batch_size=3)]


def make_split(counts, seed=0):
    """Questions with these numbers of candidates, of random tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 10, sum(counts))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    first = np.concatenate([[0], np.cumsum(counts)])
    number = np.concatenate([np.arange(count) for count in counts])
    tokens = {
        'input_ids': random.integers(1, tiny.CONFIG.vocabulary, ends[-1]).astype(np.int32),
        'token_type_ids': random.integers(0, 2, ends[-1]).astype(np.int32),
        PART: np.repeat(number, lengths).astype(np.int32),
    }
    labels = {'label': random.integers(0, counts).astype(np.int32)}
    return Encoded(tokens, ends[first].astype(np.int64), labels), ends


def each_alone(model, trees, split, ends):
    """The score of every candidate, computed from itself alone."""
    forward, scores = jit_outputs(model), []
    for begin, end in itertools.pairwise(ends):
        columns = ('input_ids', 'token_type_ids')
        batch = {
            n: np.pad(split.tokens[n][begin:end], (0, 10 - end + begin))[None] for n in columns
        }
        batch['positions'] = np.arange(10, dtype=np.int32)[None]
        batch['segments'] = (np.arange(10) < end - begin).astype(np.int32)[None]
        scores.append(
            float(forward(*trees, batch | {'starts': np.zeros((1, 1), np.int32)})[0, 0, 0])
        )
    return np.array(scores)


@pytest.fixture(scope='module', params=['mean', 'cls'])
def scored(request):
    """A split, a model, and the scores of its candidates."""
    model = tiny.model(head=tiny.HeadConfig(pooling=request.param), outputs=1)
    trees = partition(tiny.params(model), model.rules)
    split, ends = make_split([2, 5, 3, 2, 4, 2, 5, 3])
    return model, trees, split, each_alone(model, trees, split, ends)


@pytest.mark.parametrize('policy', POLICIES, ids=['packed', 'buckets'])
def test_candidates_that_share_a_row_do_not_meet(scored, policy):
    model, trees, split, alone = scored
    forward, first = jit_outputs(model, TASK), split.texts[1]
    plan, seen = batches.plan_epoch(split.lengths, policy, 1, 0, shuffle=True), []
    for index in range(len(plan)):
        batch = batches.assemble(split, plan, index, 0)
        found = np.asarray(forward(*trees, batch))
        assert found.shape == (plan.rows, plan.segments, 5)
        assert (found[~batch['example_mask']] == LEAST).all()
        for row, slot in np.argwhere(batch['example_mask']):
            example = batch['example_id'][row, slot]
            own = alone[first[example] : first[example + 1]]
            np.testing.assert_allclose(found[row, slot, : len(own)], own, atol=2e-5)
            assert (found[row, slot, len(own) :] == LEAST).all()
            seen.append(example)
    assert sorted(seen) == list(range(8))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, 4), min_size=1, max_size=12), st.integers(0, 99))
def test_a_batch_says_where_each_text_stands(counts, seed):
    split, ends = make_split(counts, seed)
    assert split.most_texts == max(counts) and split.texts[0].tolist() == ends.tolist()
    plan = batches.plan_epoch(split.lengths, POLICIES[0], seed, 0, shuffle=True)
    for index in range(len(plan)):
        batch = batches.assemble(split, plan, index, 0)
        assert PART not in batch
        for row, slot in np.argwhere(batch['example_mask']):
            first = split.texts[1][batch['example_id'][row, slot]]
            for part in range(counts[batch['example_id'][row, slot]]):
                place = slot * max(counts) + part
                own = np.flatnonzero(batch['segments'][row] == place + 1)
                source = slice(ends[first + part], ends[first + part + 1])
                assert own.tolist() == list(range(own[0], own[0] + source.stop - source.start))
                assert batch['starts'][row, place] == own[0]
                assert batch['positions'][row, own].tolist() == list(range(len(own)))
                ids = split.tokens['input_ids'][source]
                assert batch['input_ids'][row, own].tolist() == ids.tolist()


def batch_of(scores, labels):
    """A batch of one question a row, each text one token long; None is no candidate."""
    there = np.array([[x is not None for x in row] for row in scores])
    outputs = np.array([[np.nan if x is None else x for x in row] for row in scores], np.float32)
    segments = np.where(there, np.arange(1, there.shape[1] + 1), 0)
    mask = there.any(1, keepdims=True)
    labels = np.array(labels, np.int32)[:, None]
    return outputs[..., None], {'segments': segments, 'example_mask': mask, 'label': labels}


@pytest.mark.parametrize('smoothing', [0.0, 0.3])
def test_loss_worked_out_by_hand(smoothing):
    scores = [[1.0, 2.0, None], [0.5, -1.0, 3.0], [None] * 3]
    outputs, batch = batch_of(scores, [1, 0, 0])
    slope = jax.jit(jax.value_and_grad(TASK.loss, has_aux=True))
    (total, count), gradient = slope(outputs, batch, smoothing)
    expected = 0.0
    for row, label in ((scores[0][:2], 1), (scores[1], 0)):
        log_p = [x - math.log(sum(map(math.exp, row))) for x in row]
        expected -= (1 - smoothing) * log_p[label] + smoothing * sum(log_p) / len(row)
    assert float(count) == 2 and float(total) == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[np.isnan(outputs)].any()


def test_predictions_have_a_rows_own_candidates_only():
    rows = tasks.MultipleChoice().rows_of(
        [{'text': 'p', 'choices': ['x', 'y']}, {'text': 'p', 'choices': ['x', 'y', 'z']}],
        [1, 2],
        None,
    )
    split, _ = make_split([2, 3])
    outputs = np.array([[1, 2, LEAST], [4, 3, 5]], np.float32)
    assert TASK.predict(outputs, split, rows) == [
        {'prediction': 'y', 'index': 1, 'scores': [1, 2]},
        {'prediction': 'z', 'index': 2, 'scores': [4, 3, 5]},
    ]
    for labels, accuracy in (([1, 0], 0.5), ([1, 2], 1.0), ([0, 0], 0.0)):
        known = dataclasses.replace(split, examples={'label': np.array(labels, np.int32)})
        assert TASK.score(outputs, known, rows) == {'accuracy': accuracy}
    with pytest.raises(ValueError, match=r'the shape \[2, 3\], not \[2, 2\]'):
        TASK.predict(outputs[:, :2], split, rows)


def test_labels_under_several_names_are_no_matter():
    given = {'context': 'p', 'choices': ['x', 'y'], 'label': 1, 'answer': 'y', 'Gold': None}
    assert TASK.rows_of([given], [1], False).to_list() == [{'text_a': 'p', 'choices': ['x', 'y']}]


@pytest.mark.parametrize(
    ('given', 'pair', 'message'),
    [
        ({'text': 'p'}, None, 'the input has the fields text; expected "choices"'),
        ({'text': 'p', 'choices': ['x']}, None, r"input line 7: the candidates are \['x'\]"),
        ({'text': 'p', 'choices': ['x', 'y']}, True, 'was trained with a question beside the text'),
        ({'context': 'p', 'question': 'q', 'choices': ['x', 'y']}, False, 'trained without a ques'),
    ],
)
def test_input_that_does_not_fit_is_refused(given, pair, message):
    with pytest.raises(ValueError, match=message):
        TASK.rows_of([given], [7], pair)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """Toy questions, and a backbone of two layers."""
    folder = tmp_path_factory.mktemp('choices')
    data = toy.write_choices(folder / 'train.jsonl')
    made = toy.config(toy.write_backbone(folder / 'bert', layers=2), data)
    changes = {'task__name': 'multiple_choice', 'optimizer__learning_rate': 3e-2}
    changes |= {'training__steps': 80, 'training__batch_size': 16, 'data__max_length': 24}
    return toy.change(made, **changes, training__evaluate_every=40, training__dropout=False)


INPUT = [
    {'context': 'the 3', 'choices': ['that was', 'very good']},
    {'context': 'a', 'choices': ['so great', 'is near', 'but this', 'with that', 'the a']},
]


@pytest.mark.usefixtures('compiled_once')
def test_choices_are_learned_and_served(config, tmp_path):
    summary = train(config, tmp_path / 'run')
    assert summary['metrics']['validation']['accuracy'] > 0.9
    assert summary['compilations'] == 1
    assert evaluate(tmp_path / 'run', 'validation')['metrics'] == summary['metrics']['validation']
    lines = toy.read_lines(tmp_path / 'run' / 'predictions_validation.jsonl')
    right = [line['prediction'] == line['gold'] for line in lines]
    assert np.mean(right) == summary['metrics']['validation']['accuracy']
    adapter = tmp_path / 'run' / 'adapter'
    found = predict(adapter, INPUT)
    assert [one['prediction'] for one in found] == ['very good', 'so great']
    assert [len(one['scores']) for one in found] == [2, 5]
    # Beside another adapter, each in its own rows.
    both = [INPUT[0] | {'adapter': 'a'}, INPUT[1] | {'adapter': 'b'}]
    routed = predict({'a': adapter, 'b': adapter}, both)
    for one, other in zip(found, routed, strict=True):
        np.testing.assert_allclose(one['scores'], other['scores'], atol=2e-5)


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_once')
def test_a_cached_trunk_changes_nothing(config, tmp_path):
    changed = toy.change(
        config.copy_and_resolve_references(),
        method='pfeiffer[reduction_factor=2,leave_out=[0]]',
        training__steps=4,
        training__evaluate_every=4,
        training__log_every=1,
        data__cache_dir=str(tmp_path / 'cache'),
    )
    train(changed, tmp_path / 'plain')
    train(toy.change(changed, training__trunk_cache='float32'), tmp_path / 'cached')
    assert list((tmp_path / 'cache' / 'trunk').iterdir())
    plain, cached = toy.losses(tmp_path / 'plain'), toy.losses(tmp_path / 'cached')
    assert len(plain) == 4
    np.testing.assert_allclose(plain, cached, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_once')
def test_a_population_scores_as_its_members_alone(config, tmp_path):
    changed = config.copy_and_resolve_references()
    toy.change(changed, training__steps=4, training__evaluate_every=4, data__seed=0)
    alone = train(changed, tmp_path / 'alone')
    changed.sweep.grid = ('seed=0,1',)
    sweep.sweep(changed, tmp_path / 'sweep')
    members = [
        json.loads(p.read_text()) for p in (tmp_path / 'sweep').glob('members/*/summary.json')
    ]
    assert len(members) == 2 and all(member['population'] == 2 for member in members)
    found = next(m for m in members if m['seed'] == 0)
    assert found['metrics'] == alone['metrics']


def test_methods_that_insert_vectors_are_refused(config):
    changed = config.copy_and_resolve_references()
    changed.method = 'prompt_tuning[prompt_length=3]'
    with pytest.raises(ValueError, match='prompt_tuning inserts would be common to all of them'):
        experiment.build(changed)


def test_shapes_ahead_are_those_of_a_batch(config):
    batch = ahead.plan(config, texts=4).batch
    assert batch['starts'].shape == (16, 8) and batch['label'].shape == (16, 4)
