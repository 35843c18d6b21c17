"""Questions from files to answers: training, evaluation and prediction by the commands."""

import json
import re
import shutil

import command
import numpy as np
import pytest
import toy
import untrained
from transformers.data.metrics import squad_metrics

from adapters_jax.config import add_task
from adapters_jax.evaluate import evaluate
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import experiment

pytestmark = pytest.mark.usefixtures('compiled_once')

# Windows of 40 tokens: every fourth context needs more than one.
SHAPE = {'data__max_length': 40, 'task__stride': 8, 'task__question_length': 10}
FLAGS = [f'--config.{key.replace("__", ".")}={value}' for key, value in SHAPE.items()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('questions')
    toy.write_backbone(folder / 'bert')
    toy.write_questions(folder / 'train.json', 120, seed=1)
    toy.write_questions(folder / 'dev.json', 30, seed=2)
    toy.write_questions(folder / 'test.json', 30, seed=3)
    return folder


@pytest.fixture(scope='module')
def run(folder):
    """A finished run, by the command and its config file."""
    files = {'train': 'train', 'validation': 'dev', 'test': 'test'}
    given = [f'--config.data.{split}={folder / name}.json' for split, name in files.items()]
    done = command.run(
        'train',
        '--config=configs/question_answering.py:method=pfeiffer[reduction_factor=2]',
        f'--config.backbone={folder / "bert"}',
        f'--workdir={folder / "run"}',
        *('--config.data.cache_dir=none', '--config.mesh.data=1', '--config.training.epochs=4'),
        *('--config.optimizer.learning_rate=1e-2', *given, *FLAGS),
        folder=folder,
    )
    assert done.status == 0, done.err
    return folder / 'run'


def test_a_run_learns_and_its_adapter_keeps_the_tuned_threshold(run):
    summary = json.loads((run / 'summary.json').read_text())
    task = json.loads((run / 'adapter' / 'adapter_config.json').read_text())['task']
    assert summary['primary'] == 'f1' and summary['metrics']['validation']['f1'] > 0.95
    assert isinstance(task['threshold'], float)
    assert (task['stride'], task['question_length']) == (8, 10)
    found = evaluate(run, 'validation')
    assert found['metrics'] == summary['metrics']['validation']
    assert found['threshold'] == task['threshold'] == found['official']['best_f1_thresh']


class Example:
    """A question as `squad_evaluate` takes it."""

    def __init__(self, line):
        self.qas_id, self.answers = line['id'], [{'text': text} for text in line['gold']]


def test_the_files_score_in_the_official_script_as_evaluate_says(run):
    done = command.run('evaluate', f'--workdir={run}', '--split=test', folder=run.parent)
    assert done.status == 0, done.err
    assert 'questions with an answer: ' in done.out and 'no answer where its odds' in done.out
    official = json.loads((run / 'evaluation_test.json').read_text())['official']
    lines = toy.read_lines(run / 'predictions_test.jsonl')
    answers = json.loads((run / 'predictions_test.json').read_text())
    assert list(answers) == [line['id'] for line in lines] and len(lines) == 60
    expected = squad_metrics.squad_evaluate([Example(line) for line in lines], answers)
    for key in ('exact', 'f1', 'HasAns_f1', 'NoAns_exact', 'NoAns_total'):
        assert official[key] == pytest.approx(expected[key]), key
    best = json.loads((run / 'predictions_test.nbest.json').read_text())
    odds = json.loads((run / 'predictions_test.null_odds.json').read_text())
    for line in lines:
        answer = line['context'][line['start'] or 0 : line['end'] or 0]
        assert line['prediction'] == answers[line['id']] == answer
        assert line['prediction'] in [one['text'] for one in best[line['id']]]
        assert odds[line['id']] == line['null_odds']


@pytest.mark.slow
def test_predict_answers_as_evaluate_does_packed_or_alone(run, folder):
    evaluate(run, 'test')
    lines = toy.read_lines(run / 'predictions_test.jsonl')
    rows = [{key: line[key] for key in ('id', 'question', 'context')} for line in lines]
    rows += [{'question': 'this ?', 'context': '  the\r\n cat \u2028 😀 ' + 'and ' * 60 + 'fox'}]
    packed = predict(run / 'adapter', rows)
    alone = predict(run / 'adapter', rows, batch_size=1)
    for one, other in zip(packed, alone, strict=True):
        assert (one['prediction'], one['start'], one['end']) == (
            *(other['prediction'], other['start'], other['end']),
        )
        np.testing.assert_allclose(one['null_odds'], other['null_odds'], atol=1e-4)
    assert [one['prediction'] for one in packed[:-1]] == [line['prediction'] for line in lines]
    assert packed[-1]['prediction'] in ('cat', 'fox')
    source = folder / 'in.jsonl'
    source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    out = folder / 'out.jsonl'
    given = (f'--adapter={run / "adapter"}', f'--input={source}', f'--output={out}')
    assert command.run('predict', *given, folder=folder).status == 0
    assert [line['prediction'] for line in toy.read_lines(out)] == [
        one['prediction'] for one in packed
    ]


def test_lines_of_questions_and_of_texts_to_predict_for_together(run, folder):
    texts = toy.write_texts(folder / 'texts.csv', 40)
    untrained.run(toy.config(str(folder / 'bert'), texts), folder / 'texts')
    adapters = {'asked': run / 'adapter', 'topic': folder / 'texts' / 'adapter'}
    rows = [
        {'question': 'this ?', 'context': 'the cat', 'adapter': 'asked'},
        {'text': 'the cat', 'adapter': 'topic'},
        {'question': 'that ?', 'context': 'a storm', 'adapter': 'asked'},
    ]
    found = predict(adapters, rows)
    assert [row['prediction'] for row in found if row['adapter'] == 'asked'] == ['cat', '']
    assert found[1]['label'] in toy.TOPICS


@pytest.mark.parametrize(('types', 'noted'), [(True, True), (False, True), (False, False)])
def test_token_types_may_be_left_out_and_a_start_with_others_is_told(
    run, folder, types, noted, caplog, tmp_path
):
    adapter = shutil.copytree(run / 'adapter', tmp_path / 'adapter')
    if not noted:  # as in adapters that were trained before the key was there
        path = adapter / 'adapter_config.json'
        values = json.loads(path.read_text())
        del values['task']['token_types']
        path.write_text(json.dumps(values))
    config = toy.config(
        *(str(folder / 'bert'), str(folder / 'train.json')),
        task__name='question_answering',
        method='pfeiffer[reduction_factor=2]',
        start=str(adapter),
        task__token_types=types,
        data__split_fractions=(0.2, 0.0),
        **SHAPE,
    )
    built = experiment.build(config)
    assert built.splits['train'].tokens['token_type_ids'].any() == types
    assert built.task.to_json()['token_types'] is types
    assert ('was trained with task.token_types=True, not False' in caplog.text) == (not types)


def test_a_population_over_a_stored_trunk(folder):
    config = toy.config(
        *(str(folder / 'bert'), str(folder / 'train.json')),
        task__name='question_answering',
        method='head',
        sweep__grid=('optimizer.learning_rate=1e-2,3e-2',),
        training__trunk_cache='float32',
        training__epochs=2.0,
        data__split_fractions=(0.2, 0.0),
        **SHAPE,
    )
    config.data.cache_dir = str(folder / 'cache')
    sweep(config, folder / 'sweep')
    members = sorted((folder / 'sweep' / 'members').iterdir())
    assert len(members) == 2
    for member in members:
        summary = json.loads((member / 'summary.json').read_text())
        found = evaluate(member, 'validation')
        for key, value in summary['metrics']['validation'].items():
            assert found['metrics'][key] == pytest.approx(value, abs=1e-5), key


@pytest.mark.slow
def test_two_tasks_of_questions_in_one_run(folder):
    config = toy.config(str(folder / 'bert'), training__steps=12, optimizer__learning_rate=1e-2)
    config.data.max_length = 40
    for name, seed in (('first', 1), ('second', 5)):
        section = add_task(config, name)
        section.task.name = 'question_answering'
        section.task.stride, section.task.question_length = 8, 10
        section.data.train = toy.write_questions(folder / f'{name}.json', 60, seed, 4 * (seed > 1))
        section.data.max_length = 40
    train(config, folder / 'both')
    found = evaluate(folder / 'both', 'validation')
    assert found['tasks'].keys() == {'first/validation', 'second/validation'}
    assert found['metrics']['mean'] > 0.3
    tasks = [
        json.loads((folder / 'both' / 'adapter' / name / 'adapter_config.json').read_text())['task']
        for name in ('first', 'second')
    ]
    assert tasks[0]['threshold'] == 'none' and isinstance(tasks[1]['threshold'], float)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (['--config.task.stride=40'], r'data.max_length is 40, .* task.stride = 40: raise the fi'),
        (['--config.data.max_length=200'], 'max_length is 200, but the model has 128 positions'),
        (['--config.task.threshold=low'], "task.threshold is 'low'; expected a number"),
        pytest.param(
            *(['--config.training.label_smoothing=0.1'], 'question_answering has no classes or'),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(['--config.data.validation=texts.csv'], 'there is no file'), marks=pytest.mark.slow
        ),
    ],
)
def test_mistakes_are_one_sentence(folder, changes, message, tmp_path):
    given = ['--config=configs/question_answering.py:method=head', *FLAGS, *changes]
    given += [f'--config.backbone={folder / "bert"}', f'--config.data.train={folder}/train.json']
    given += [f'--workdir={tmp_path / "w"}', '--config.data.cache_dir=none']
    sentence = command.refused('train', *given, folder=tmp_path)
    assert re.search(message, sentence), sentence
