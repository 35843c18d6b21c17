"""Whole runs of several tasks: learned together, kept apart, killed and continued."""

import json
import signal

import command
import numpy as np
import pytest
import toy

from adapters_jax import config as configs
from adapters_jax import params
from adapters_jax.config import add_task
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.predict import predict
from adapters_jax.train import train
from adapters_jax.training import multitask, multitask_run
from adapters_jax.training.run import Stopped

ADAPTER_FILES = ('adapter.safetensors', 'head.safetensors', 'adapter_config.json')


pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone and the data of two tasks, one of classes and one of numbers."""
    folder = tmp_path_factory.mktemp('toys')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 300)
    toy.write_ratings(folder / 'ratings.csv', 200)
    return folder


def config(toys, **changes):
    made = toy.config(str(toys / 'bert'), **changes)
    topic, stars = add_task(made, 'topic'), add_task(made, 'stars')
    topic.data.train, stars.data.train = str(toys / 'texts.csv'), str(toys / 'ratings.csv')
    stars.task.name = 'regression'
    return made


LEARNED = {
    'optimizer__learning_rate': 2e-2,
    'training__epochs': 4.0,
    'training__dropout': False,
}


@pytest.fixture(scope='module')
def learned(toys):
    """A finished run of both tasks: its workdir and its summary."""
    summary = train(config(toys, **LEARNED), toys / 'learned')
    return toys / 'learned', summary


def test_both_tasks_are_learned_in_one_run_and_one_program(learned):
    workdir, summary = learned
    metrics = summary['metrics']
    assert metrics['topic/validation']['accuracy'] > 0.9
    assert metrics['stars/validation']['pearson'] > 0.9
    mean = (metrics['topic/validation']['accuracy'] + metrics['stars/validation']['pearson']) / 2
    assert metrics['validation'] == {'mean': pytest.approx(mean)}
    assert summary['primary'] == 'mean' and summary['compilations'] == 1
    lines = toy.read_lines(workdir / 'metrics.jsonl')
    means = {x['step']: x['values']['mean'] for x in lines if x['split'] == 'validation'}
    assert len(means) == 4 and summary['best_step'] == max(means, key=means.get)
    first = {x['split']: x['values'] for x in lines if x['step'] == min(means)}
    for split, name in (('topic/validation', 'accuracy'), ('stars/validation', 'pearson')):
        assert first[split][name] < metrics[split][name]


def test_evaluate_scores_each_adapter_as_training_did_to_the_bit(learned):
    workdir, summary = learned
    found = evaluate(workdir, 'validation')
    for split in ('topic/validation', 'stars/validation'):
        assert found['tasks'][split]['metrics'] == summary['metrics'][split]
    assert found['metrics'] == summary['metrics']['validation']
    assert found['examples'] == sum(part['examples'] for part in found['tasks'].values())
    assert 'confusion' in found['tasks']['topic/validation']
    stored = json.loads((workdir / 'evaluation_validation.json').read_text())
    assert stored['tasks'].keys() == found['tasks'].keys()
    rows = toy.read_lines(workdir / 'predictions_topic_validation.jsonl')
    right = np.mean([row['gold'] == row['prediction'] for row in rows])
    assert right == pytest.approx(summary['metrics']['topic/validation']['accuracy'])
    assert len(toy.read_lines(workdir / 'predictions_stars_validation.jsonl')) == 20
    with pytest.raises(ValueError, match="no split 'tets' in this run; it has test, train, valid"):
        evaluate(workdir, 'tets')


def test_each_adapter_is_an_ordinary_one(learned):
    workdir, _ = learned
    evaluate(workdir, 'test')
    for name, key in (('topic', 'logits'), ('stars', 'prediction')):
        rows = toy.read_lines(workdir / f'predictions_{name}_test.jsonl')[:8]
        said = predict(workdir / 'adapter' / name, [{'text': row['text_a']} for row in rows])
        expected = [row[key] for row in rows]
        np.testing.assert_allclose([row[key] for row in said], expected, atol=1e-4)
    folder = adapter_folder.load(workdir / 'adapter' / 'stars')
    assert folder.name == 'stars' and folder.task['name'] == 'regression'
    assert folder.method == adapter_folder.load(workdir / 'adapter' / 'topic').method


def test_the_command_line_trains_tasks_of_glue(toys, tmp_path):
    for key in ('stsb', 'mnli'):
        toy.write_glue(tmp_path / 'GLUE', key, train=24, held_out=9)
    arguments = [
        '--config=configs/multitask.py:tasks=stsb+mnli,method=lora[r=2],mixing=annealed',
        f'--config.backbone={toys / "bert"}',
        f'--config.data.dir={tmp_path / "GLUE"}',
        '--config.data.cache_dir=none',
        '--config.data.max_length=64',
        '--config.training.steps=4',
        '--config.mixing.best=each',
        '--config.tasks.stsb.weight=2.0',
        '--config.mesh.data=1',
        f'--workdir={tmp_path / "w"}',
    ]
    done = command.run('train', *arguments, folder=tmp_path / 'trained')
    assert done.status == 0, done.err
    for split in ('stsb/validation', 'mnli/validation_mismatched'):
        assert f'best on {split}, at step ' in done.out
    assert {p.name for p in (tmp_path / 'w' / 'adapter').iterdir()} == {'stsb', 'mnli'}
    done = command.run(
        'evaluate', f'--workdir={tmp_path / "w"}', '--split=test', folder=tmp_path / 'evaluated'
    )
    assert done.status == 0, done.err
    assert 'mnli/test_mismatched: 9 examples\n  the split has no labels' in done.out
    assert len(toy.read_lines(tmp_path / 'w' / 'predictions_stsb_test.jsonl')) == 9
    again = command.refused(
        'train', *arguments, '--config.tasks.stsb.weight=1.0', folder=tmp_path / 'refused'
    )
    assert 'tasks.stsb.weight was 2.0, now 1.0' in again


def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(toys, tmp_path):
    """Stopped between two evaluations and inside an epoch of the annealed mixture, with dropout."""
    changes = {'mixing__best': 'each', 'mixing__schedule': 'annealed', 'training__steps': 14}
    changes |= {'training__evaluate_every': 3, 'training__checkpoint_every': 2}
    changes |= {'method': 'pfeiffer[reduction_factor=2,dropout=0.1]'}
    whole = run(config(toys, **changes), tmp_path / 'whole')
    with pytest.raises(Stopped) as left:
        run(config(toys, **changes), tmp_path / 'stopped', stop_after=8)
    assert left.value.code == 128 + signal.SIGTERM
    moved = run(config(toys, **changes), tmp_path / 'stopped')
    for key in ('metrics', 'best_step', 'steps', 'finished', 'padding'):
        assert moved[key] == whole[key]
    assert toy.read_lines(tmp_path / 'whole' / 'metrics.jsonl') == toy.read_lines(
        tmp_path / 'stopped' / 'metrics.jsonl'
    )
    for name in ('topic', 'stars'):
        for file in ADAPTER_FILES:
            parts = [tmp_path / w / 'adapter' / name / file for w in ('whole', 'stopped')]
            assert parts[0].read_bytes() == parts[1].read_bytes()


def run(given, workdir, stop_after=None):
    workdir.mkdir(exist_ok=True)
    trainer = multitask_run.MultitaskRun(multitask.build(given), workdir)
    record = trainer._record

    def stopping(pending):
        record(pending)
        trainer._stop_requested = stop_after is not None and trainer.step >= stop_after

    trainer._record = stopping
    return trainer.run()


def test_each_task_may_keep_its_own_best_step(toys, tmp_path):
    changes = LEARNED | {'mixing__best': 'each', 'training__evaluate_every': 2}
    changes |= {'optimizer__learning_rate': 0.2, 'training__epochs': 2.0}
    summary = train(config(toys, **changes), tmp_path / 'w')
    lines = toy.read_lines(tmp_path / 'w' / 'metrics.jsonl')
    for split, name in (('topic/validation', 'accuracy'), ('stars/validation', 'pearson')):
        scores = {x['step']: x['values'][name] for x in lines if x['split'] == split}
        assert summary['best_steps'][split] == max(scores, key=scores.get)
        assert summary['metrics'][split][name] == max(scores.values())
        found = evaluate(tmp_path / 'w', 'validation')['tasks'][split]['metrics']
        assert found == summary['metrics'][split]


def test_patience_waits_for_the_mean_or_for_the_last_of_the_tasks(toys, tmp_path):
    changes = {'optimizer__learning_rate': 1e-30, 'training__patience': 2, 'training__epochs': 9.0}
    changes |= {'training__evaluate_every': 1}
    for best in ('mean', 'each'):
        given = config(toys, **changes, mixing__best=best)
        summary = train(given, tmp_path / best)
        assert summary['finished'] == 'no improvement in 2 evaluations'
        assert summary['steps'] == 3


def test_no_task_is_evaluated_where_none_has_a_validation_split(toys, tmp_path):
    given = config(toys, training__steps=2, data__split_fractions=(0.0, 0.0))
    summary = train(given, tmp_path / 'w')
    assert summary['metrics'] == {} and summary['best_step'] == 2
    saved = adapter_folder.load(tmp_path / 'w' / 'adapter' / 'stars')
    assert params.count(saved.adapter_params) > 0


def wrong(toys, **changes):
    made = config(toys)
    return toy.change(made, **changes)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'mixing__best': 'first'}, "mixing.best is 'first'; expected one of mean, each"),
        ({'mixing__schedule': 'often'}, "mixing.schedule is 'often'; expected one of prop"),
        ({'tasks__stars__weight': -1.0}, "weight of task 'stars' is -1.0"),
        ({'tasks__stars__data__train': ''}, "task 'stars': data names no source"),
        ({'tasks__topic__task__primary': 'mse'}, "task 'topic': the primary metric 'mse' is not"),
        ({'tasks__topic__data__split_fractions': (0.0, 0.0)}, 'tasks topic have no validation'),
        ({'adapters': 'a=pfeiffer'}, "adapters is 'a=pfeiffer', but a run of several tasks"),
        ({'method': 'full'}, r'stars \(full\) changes whole matrices of the backbone'),
        ({'tasks__stars__data__max_length': 500}, "task 'stars': max_length is 500"),
    ],
)
def test_mistakes_are_named_with_their_task(toys, tmp_path, changes, message):
    given = wrong(toys, **changes)
    if 'split_fractions' in next(iter(changes)):
        given.data.split_fractions = (0.0, 0.0)
        given.tasks.stars.data.split_fractions = (0.2, 0.0)
    with pytest.raises(ValueError, match=message):
        train(given, tmp_path / 'w')
    assert not (tmp_path / 'w' / 'config.json').exists()


def test_the_config_of_a_task_alone_takes_from_data_what_the_task_leaves_open(toys):
    made = config(toys, data__limit=7, data__max_length=32)
    made.tasks.topic.data.max_length = 16
    made.tasks.topic.data.columns.text_a = 'text'
    alone = configs.of_task(made, 'topic')
    assert (alone.data.limit, alone.data.max_length, alone.data.columns.text_a) == (7, 16, 'text')
    assert alone.data.train == str(toys / 'texts.csv') and not alone.tasks
    assert configs.of_task(made, 'stars').task.name == 'regression'
    again = configs.from_json(configs.to_json(made))
    assert configs.to_json(again) == configs.to_json(made)


@pytest.mark.parametrize('name', ['a.b', '1a', 'a/b', '', 'items', 'topic'])
def test_names_that_could_be_no_key_or_folder_are_refused(toys, name):
    with pytest.raises(ValueError, match=f"a task is named '{name}'; expected letters"):
        add_task(config(toys), name)
