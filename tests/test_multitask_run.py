"""Whole runs of several tasks: learned together, kept apart, killed and continued."""

import json
import re
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
from adapters_jax.training import loop

STEPS = 60
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


@pytest.mark.slow
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


def arguments(toys, workdir):
    """Return a command line with everything random in it: dropout, order, initialisation."""
    return [
        '--config=configs/multitask.py:tasks=topic+stars,mixing=annealed,'
        'method=pfeiffer[reduction_factor=2,dropout=0.1]',
        f'--config.backbone={toys / "bert"}',
        f'--config.tasks.topic.data.train={toys / "texts.csv"}',
        f'--config.tasks.stars.data.train={toys / "ratings.csv"}',
        '--config.tasks.stars.task.name=regression',
        '--config.data.cache_dir=none',
        '--config.mesh.data=1',
        '--config.mixing.best=each',
        f'--config.training.steps={STEPS}',
        '--config.training.evaluate_every=24',
        '--config.training.checkpoint_every=5',
        '--config.training.patience=0',
        f'--workdir={workdir}',
    ]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(toys, tmp_path):
    """Killed once a checkpoint is there, with dropout, in the annealed mixture."""
    done = command.run('train', *arguments(toys, tmp_path / 'whole'), folder=tmp_path / 'out')
    assert done.status == 0, done.err
    workdir = tmp_path / 'run'
    process = command.Command('train', arguments(toys, workdir), tmp_path / 'out1')
    assert process.wait_for(lambda: 0 < last_checkpoint(workdir) < steps(workdir))
    process.signal(signal.SIGKILL)
    assert process.finish().status == -signal.SIGKILL
    done = command.run('train', *arguments(toys, workdir), folder=tmp_path / 'out2')
    assert done.status == 0, done.err
    told = re.search(r'continuing from the checkpoint of step (\d+)', done.err)
    assert 0 < int(told[1]) < STEPS
    files = [f'adapter/{name}/{file}' for name in ('topic', 'stars') for file in ADAPTER_FILES]
    for file in ('metrics.jsonl', *files):
        assert (workdir / file).read_bytes() == (tmp_path / 'whole' / file).read_bytes(), file
    ours, theirs = (
        json.loads((w / 'summary.json').read_text()) for w in (workdir, tmp_path / 'whole')
    )
    for key in ('metrics', 'best_step', 'best_steps', 'steps', 'finished', 'padding'):
        assert ours[key] == theirs[key], key


def steps(workdir):
    """Return how many steps metrics.jsonl has; while the run writes, its last line may be cut."""
    path = workdir / 'metrics.jsonl'
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


def last_checkpoint(workdir):
    """Return the step of the last finished checkpoint; 0 where there is none."""
    names = (path.name for path in (workdir / 'checkpoints').glob('*'))
    return max((int(name) for name in names if name.isdigit()), default=0)


def test_the_loss_of_each_task_is_noted_where_a_batch_has_the_task(learned):
    workdir, _ = learned
    lines = toy.read_lines(workdir / 'metrics.jsonl')
    values = [line['values'] for line in lines if line['split'] == 'train']
    for name in ('topic', 'stars'):
        own = [x[f'loss/{name}'] for x in values if f'loss/{name}' in x]
        assert len(own) > 10 and np.mean(own[-3:]) < 0.5 * np.mean(own[:3])
    for x in values:
        parts = [x[key] for key in ('loss/topic', 'loss/stars') if key in x]
        assert min(parts) * (1 - 1e-5) <= x['loss'] <= max(parts) * (1 + 1e-5)


def test_a_step_without_one_of_the_tasks_notes_the_other_ones(toys, tmp_path):
    given = config(toys, method='head', training__steps=3, training__batch_size=1)
    train(given, tmp_path / 'w')
    lines = toy.read_lines(tmp_path / 'w' / 'metrics.jsonl')
    names = [sorted(x['values']) for x in lines if x['split'] == 'train']
    common = ['examples', 'gradient_norm', 'learning_rate', 'loss']
    assert len(names) == 3
    for found in names:
        (own,) = set(found) - set(common)
        assert own in ('loss/topic', 'loss/stars')


def test_the_trunk_may_be_stored_for_several_tasks(toys, tmp_path, caplog):
    """The texts of one task are longer than those of a task may be by default."""
    toy.write_backbone(tmp_path / 'bert', layers=2)
    toy.write_texts(tmp_path / 'long.csv', 90, mean=30)
    changes = {'backbone': str(tmp_path / 'bert'), 'method': 'pfeiffer[leave_out=[0]]'}
    changes |= {'training__steps': 5, 'training__evaluate_every': 3, 'training__dropout': False}
    changes |= {'data__max_length': 16, 'tasks__topic__data__max_length': 100}
    changes |= {'tasks__topic__data__train': str(tmp_path / 'long.csv')}
    changes |= {'data__cache_dir': str(tmp_path / 'cache')}
    plain = train(toy.change(config(toys), **changes), tmp_path / 'plain')
    cached = config(toys, training__trunk_cache='float32')
    with caplog.at_level('INFO'):
        found = train(toy.change(cached, **changes), tmp_path / 'cached')
    assert "the trunk's end (layer 1, " in caplog.text and (tmp_path / 'cache' / 'trunk').is_dir()
    losses = [np.array(toy.losses(tmp_path / name)) for name in ('cached', 'plain')]
    np.testing.assert_allclose(*losses, rtol=2e-5)
    assert found['metrics'].keys() == plain['metrics'].keys()
    for split, metrics in plain['metrics'].items():
        for name, value in metrics.items():
            assert found['metrics'][split][name] == pytest.approx(value, abs=1e-4)


@pytest.mark.slow
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
        ({'tasks__stars__data__max_length': 500}, 'max_length is 500, but the model'),
        (
            {'mixing__schedule': 'shares', 'tasks__stars__share': 1e-9},
            "have no example of the task 'stars', and its adapter would stay untrained; raise",
        ),
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


def test_smoothing_that_no_task_could_use_is_refused(toys, tmp_path):
    made = config(toys, training__label_smoothing=0.1)
    loop.check(made)
    made.tasks.topic.task.name = 'regression'
    with pytest.raises(ValueError, match=r'label_smoothing is 0.1, but regression has no classes'):
        loop.check(made)


@pytest.mark.parametrize('name', ['a.b', '1a', 'a/b', '', 'items', 'topic'])
def test_names_that_could_be_no_key_or_folder_are_refused(toys, name):
    with pytest.raises(ValueError, match=f"a task is named '{name}'; expected letters"):
        add_task(config(toys), name)
