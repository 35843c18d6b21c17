"""Whole runs of tagging: learned, evaluated, written in the format that came in, and served."""

import json

import jax
import numpy as np
import pytest
import toy
import untrained

from adapters_jax import evaluate as evaluation
from adapters_jax.config import add_task
from adapters_jax.data import pipeline
from adapters_jax.data.policies import Buckets
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import ahead, experiment, inference

LEARNED = {'optimizer__learning_rate': 2e-2, 'training__epochs': 5.0, 'training__dropout': False}
LEARNED |= {'training__batch_size': 8}

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with backbones of one layer and two, CoNLL files of spans, and texts."""
    folder = tmp_path_factory.mktemp('tagging')
    toy.write_backbone(folder / 'bert')
    toy.write_backbone(folder / 'deeper', layers=2)
    toy.write_tagged(folder / 'spans')
    toy.write_texts(folder / 'texts.csv', 60)
    return folder


def config(toys, **changes):
    folder = {'data__dir': str(toys / 'spans'), 'task__name': 'tagging'}
    backbone = str(toys / changes.pop('backbone', 'bert'))
    return toy.config(backbone, **folder | changes)


@pytest.fixture(scope='module')
def learned(toys):
    """A finished run: its workdir and its summary."""
    return toys / 'learned', train(config(toys, **LEARNED), toys / 'learned')


def test_spans_are_learned_and_evaluated_as_in_training(learned):
    workdir, summary = learned
    scores = summary['metrics']['validation']
    assert list(scores) == ['f1', 'precision', 'recall', 'accuracy'] and scores['f1'] > 0.9
    assert summary['primary'] == 'f1' and summary['compilations'] == 1
    found = evaluate(workdir, 'validation')
    assert found['metrics'] == scores and found['examples'] == 30
    assert set(found['types']) == set(toy.TOPICS)
    folder = adapter_folder.load(workdir / 'adapter')
    assert folder.head['pooling'] == 'tokens' and folder.task['scheme'] == 'bio'


def test_predictions_are_written_in_the_format_of_the_input(learned, capsys):
    workdir, _ = learned
    evaluation.main(str(workdir), 'test', '0')
    out = capsys.readouterr().out
    assert 'precision  recall' in out and 'animal' in out
    written = [workdir / f'predictions_test.{kind}' for kind in ('jsonl', 'conll')]
    assert out.endswith(f'{written[0]}, {written[1]}\n')
    rows = toy.read_lines(written[0])
    assert [(row['tokens'], row['gold']) for row in rows] == toy.tagged(30, 2)
    lines = [
        ''.join(f'{w}\t{t}\n' for w, t in zip(row['tokens'], row['prediction'], strict=True))
        for row in rows
    ]
    assert written[1].read_text() == '\n'.join(lines)
    right = np.mean(
        [g == p for row in rows for g, p in zip(row['gold'], row['prediction'], strict=True)]
    )
    found = json.loads((workdir / 'evaluation_test.json').read_text())
    assert found['metrics']['accuracy'] == pytest.approx(right)


def test_predict_says_the_same_of_words_alone(learned):
    workdir, _ = learned
    evaluate(workdir, 'test')
    expected = toy.read_lines(workdir / 'predictions_test.jsonl')
    given = [{'tokens': row['tokens'], 'id': i} for i, row in enumerate(expected)]
    found = predict(workdir / 'adapter', [*given[::-1], {'tokens': []}])
    assert found[-1] == {'tokens': [], 'prediction': []}
    assert [row['prediction'] for row in found[-2::-1]] == [row['prediction'] for row in expected]
    assert found[0] == given[-1] | {'prediction': expected[-1]['prediction']}
    alone = predict(workdir / 'adapter', given[:1])
    assert alone[0]['prediction'] == expected[0]['prediction']


def test_no_word_of_a_long_sentence_is_lost(learned):
    workdir, _ = learned
    words = [word for row, _ in toy.tagged(30, 5) for word in row]
    tags = [tag for _, row in toy.tagged(30, 5) for tag in row]
    assert len(words) > 200
    found = predict(workdir / 'adapter', [{'tokens': words}])[0]['prediction']
    assert len(found) == len(words)
    assert np.mean([a == b for a, b in zip(found, tags, strict=True)]) > 0.9


def outputs(run, folder, batching, split, **changes):
    """The outputs of every token of a split, computed in packed rows or one sentence to a row."""
    changed = toy.change(
        run.config.copy_and_resolve_references(), data__batching=batching, **changes
    )
    return inference.outputs(folder, run.backbone, run.splits[split], changed, run.task)


def test_sentences_in_one_row_do_not_meet(toys, learned):
    workdir, _ = learned
    run, folder = experiment.build(config(toys)), adapter_folder.load(workdir / 'adapter')
    expected = outputs(run, folder, 'buckets', 'test', training__batch_size=1)
    assert expected.shape == (run.splits['test'].offsets[-1], 7)
    for found in (
        outputs(run, folder, 'packed', 'test'),
        outputs(run, folder, 'buckets', 'test', mesh__data=4),
        outputs(run, folder, 'packed', 'test', mesh__data=2),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_windows_say_of_words_in_the_middle_what_they_would_say_alone(toys, learned):
    workdir, _ = learned
    run = experiment.build(config(toys, data__max_length=12))
    cut, rows = run.splits['test'], run.texts['test']
    assert len(cut) > len(rows) and cut.lengths.max() <= 12
    score = run.task.score(
        outputs(run, adapter_folder.load(workdir / 'adapter'), 'packed', 'test'), cut, rows
    )
    assert score['f1'] > 0.8
    assert (cut.tokens['label'] >= 0).sum() == sum(map(len, rows['tokens']))


@pytest.mark.parametrize(
    ('method', 'changes'),
    [
        ('prompt_tuning[prompt_length=3]', {}),  # vectors stand before the words
        pytest.param(
            *('pfeiffer[reduction_factor=2,leave_out=[0]]', {'trunk': 'float32'}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_methods_and_paths_train_and_predict(toys, tmp_path, method, changes):
    backbone = 'deeper' if changes else 'bert'
    made = config(toys, method=method, backbone=backbone, training__steps=3, data__limit=16)
    if changes:
        made.training.trunk_cache, made.data.cache_dir = changes['trunk'], str(tmp_path / 'cache')
    summary = train(made, tmp_path / 'w')
    assert evaluate(tmp_path / 'w', 'validation')['metrics'] == summary['metrics']['validation']
    rows = toy.read_lines(tmp_path / 'w' / 'predictions_validation.jsonl')
    found = predict(tmp_path / 'w' / 'adapter', [{'tokens': row['tokens']} for row in rows])
    assert [row['prediction'] for row in found] == [row['prediction'] for row in rows]


def test_an_inserted_prompt_moves_no_label(toys):
    """The outputs are those of the words: for the loss, the first piece is where it was."""
    made = config(toys, method='prompt_tuning[prompt_length=3]', data__batching='buckets')
    run = experiment.build(made)
    tree = run.init_params()
    batch = next(iter(toy_batches(run)))
    apply = jax.jit(run.model.apply)
    with_prompt = np.asarray(apply(tree, batch))
    assert with_prompt.shape == (*batch['input_ids'].shape, 7)
    # The same words further right in the row: each output moves along with its word.
    moved = {name: np.roll(batch[name], 2, 1) for name in ('input_ids', 'token_type_ids')}
    moved |= {name: np.roll(batch[name], 2, 1) for name in ('positions', 'segments')}
    again = np.asarray(apply(tree, batch | moved))
    real = batch['segments'] > 0
    np.testing.assert_allclose(np.roll(again, -2, 1)[real], with_prompt[real], atol=1e-4)


def toy_batches(run):
    return pipeline.eval_batches(run.splits['test'], Buckets((64,), 32), 0)


@pytest.fixture(scope='module')
def both(toys):
    """A finished run of two tagging tasks: of spans, and of tags that are none."""
    with (toys / 'kinds.jsonl').open('w') as file:
        for words, tags in toy.tagged(120, 7):
            kinds = ['NAME' if tag != 'O' else 'WORD' for tag in tags]
            file.write(json.dumps({'tokens': words, 'tags': kinds}) + '\n')
    made = toy.config(str(toys / 'bert'), **LEARNED)
    spans, kinds = add_task(made, 'spans'), add_task(made, 'kinds')
    spans.task.name = kinds.task.name = 'tagging'
    spans.data.dir, kinds.data.train = str(toys / 'spans'), str(toys / 'kinds.jsonl')
    return toys / 'both', train(made, toys / 'both')


def test_two_tagging_tasks_are_learned_in_one_run(both):
    workdir, summary = both
    metrics = summary['metrics']
    assert metrics['spans/validation']['f1'] > 0.9 and summary['compilations'] == 1
    assert metrics['kinds/validation']['accuracy'] > 0.95
    found = evaluate(workdir, 'test')
    assert found['tasks'].keys() == {'spans/test', 'kinds/test'}
    assert (workdir / 'predictions_spans_test.conll').is_file()
    assert not list(workdir.glob('predictions_kinds_test.conll*'))


def test_adapters_of_words_and_of_texts_are_served_together(toys, both):
    workdir, _ = both
    untrained.run(toy.config(str(toys / 'bert'), str(toys / 'texts.csv')), toys / 'texts')
    adapters = {name: workdir / 'adapter' / name for name in ('spans', 'kinds')}
    adapters |= {'texts': toys / 'texts' / 'adapter'}
    given = [
        {'tokens': words, 'adapter': name}
        for words, _ in toy.tagged(4, 9)
        for name in adapters
        if name != 'texts'
    ]
    given.insert(2, {'text': 'the cat', 'adapter': 'texts'})
    found = predict(adapters, given)
    for name, folder in adapters.items():
        alone = predict(folder, [row for row in given if row['adapter'] == name])
        own = [said['prediction'] for said in found if said['adapter'] == name]
        assert own == [said['prediction'] for said in alone]


def test_words_and_texts_are_not_mixed_in_one_run(toys, tmp_path):
    made = toy.config(str(toys / 'bert'))
    spans, topic = add_task(made, 'spans'), add_task(made, 'topic')
    spans.task.name, spans.data.dir = 'tagging', str(toys / 'spans')
    topic.data.train = str(toys / 'texts.csv')
    with pytest.raises(ValueError, match="'spans' has outputs for each token and 'topic' for each"):
        train(made, tmp_path / 'w')


@pytest.mark.slow
def test_a_population_tags_as_its_members_do(toys, tmp_path):
    made = config(toys, training__steps=4)
    made.sweep.grid = ('optimizer.learning_rate=2e-2,1e-3',)
    sweep(made, tmp_path / 'sweep')
    train(config(toys, training__steps=4, optimizer__learning_rate=2e-2), tmp_path / 'w')
    members = [
        tmp_path / 'sweep' / 'members' / f'learning_rate-{rate}' for rate in ('2e-2', '1e-3')
    ]
    own, other, alone = (
        np.array([loss for _, loss in toy.losses(run)]) for run in (*members, tmp_path / 'w')
    )
    assert len(alone) == 4
    np.testing.assert_allclose(own, alone, atol=1e-5)
    assert np.abs(own - other).max() > 1e-3
    own, alone = (
        json.loads((run / 'summary.json').read_text())['metrics']['validation']
        for run in (members[0], tmp_path / 'w')
    )
    assert own == pytest.approx(alone, abs=0.02)


def test_a_run_can_be_compiled_ahead(toys):
    plan = ahead.plan(config(toys), length=16, labels=5)
    assert plan.batch['label'].shape == plan.batch['input_ids'].shape
    assert plan.experiment.model.outputs == 5
    assert 'stablehlo' in ahead.trace_step(plan).lower().as_text()[:4000]


def test_an_unseen_tag_is_told_with_its_line(toys, tmp_path):
    toy.write_tagged(tmp_path / 'data', 12, 6)
    lines = (tmp_path / 'data' / 'dev.conll').read_text().splitlines()
    lines[2] = 'cat\tB-animl'
    (tmp_path / 'data' / 'dev.conll').write_text('\n'.join(lines))
    expected = (
        r"in the split 'validation': unseen tags 'B-animl' \(1 times\), the first in .*/data/"
    )
    expected += 'dev.conll, line 3; known: .* or name all tags in task.labels'
    with pytest.raises(ValueError, match=expected):
        experiment.build(config(toys, data__dir=str(tmp_path / 'data')))


def test_rows_know_where_they_came_from_after_a_split(toys):
    """Every column that writing needs survives the cutting off of a validation split."""
    made = config(toys, data__dir='', data__train=str(toys / 'spans' / 'train.conll'))
    run = experiment.build(made)
    assert list(run.splits) == ['train', 'validation', 'test']
    whole = run.texts['validation']
    gold = [{'prediction': tags} for tags in whole['tags']]
    text = run.task.native_files(whole, gold)['.conll']
    original = (toys / 'spans' / 'train.conll').read_text().strip().split('\n\n')
    assert set(text.strip().split('\n\n')) < set(original)
    assert run.splits['train'].rows.tolist() == list(range(len(run.texts['train'])))
