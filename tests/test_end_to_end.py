"""Whole runs on toy data: learned, compiled once, padded little, the same on any devices."""

import json

import command
import jax
import numpy as np
import pytest
import toy

from adapters_jax import config as configs
from adapters_jax import params, sharding
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.predict import predict
from adapters_jax.train import train
from adapters_jax.training import experiment, loop

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone and data files."""
    folder = tmp_path_factory.mktemp('toys')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 600)
    toy.write_texts(folder / 'long.csv', 1600, mean=9.0)
    toy.write_ratings(folder / 'ratings.csv', 600)
    toy.write_pairs(folder / 'pairs.tsv', 600)
    return folder


def config(toys, data='texts.csv', **changes):
    return toy.config(str(toys / 'bert'), str(toys / data), **changes)


LEARNED = {
    'optimizer__learning_rate': 2e-2,
    'training__epochs': 8.0,
    'training__dropout': False,
    'method': 'pfeiffer[reduction_factor=2]',
}


@pytest.fixture(scope='module')
def learned(toys):
    """A run that learned its task, was ended by patience, and kept its parts for questions."""
    given = config(toys, **LEARNED, training__patience=2)
    given.training.epochs = 40.0
    built = experiment.build(given)
    workdir = toys / 'learned'
    workdir.mkdir()
    trainer = loop.Trainer(built, workdir)
    at_best = {}
    evaluate = trainer._evaluate

    def remembering():
        evaluate()
        if trainer.progress.best_step == trainer.step:
            at_best.update(toy.bits(trainer.trainable))

    trainer._evaluate = remembering
    summary = trainer.run()
    configs_path = workdir / 'config.json'
    configs_path.write_text(json.dumps(configs.to_json(given)))
    return trainer, summary, at_best


def test_classes_are_learned_and_patience_ends_the_run(learned):
    trainer, summary, _ = learned
    assert summary['metrics']['validation']['accuracy'] > 0.9
    assert summary['finished'] == 'no improvement in 2 evaluations'
    assert summary['steps'] == summary['best_step'] + 2 * trainer.evaluate_every
    assert summary['steps'] < trainer.total_steps
    said = f'stopped at step {summary["steps"]} of {trainer.total_steps}: no improvement in 2 eval'
    assert said in (trainer.workdir / 'log.txt').read_text()
    assert evaluate(trainer.workdir, 'test')['metrics']['accuracy'] > 0.9
    losses = [loss for _, loss in toy.losses(trainer.workdir)]
    assert len(losses) == summary['steps'] and np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])


def test_the_adapter_is_that_of_the_best_step_and_not_of_the_last(learned):
    trainer, _, at_best = learned
    saved = adapter_folder.load(trainer.workdir / 'adapter')
    leaves = {f'adapters/default/{p}': x for p, x in params.flatten(saved.adapter_params).items()}
    leaves |= {f'heads/default/{p}': x for p, x in params.flatten(saved.head_params).items()}
    assert {path: leaf.tobytes() for path, leaf in leaves.items()} == at_best
    last = toy.bits(trainer.trainable)
    assert all(last[path] != at_best[path] for path in last)


def test_evaluate_gives_the_validation_metrics_of_training_exactly(learned):
    trainer, summary, _ = learned
    found = evaluate(trainer.workdir, 'validation')
    assert found['metrics'] == summary['metrics']['validation']
    lines = toy.read_lines(trainer.workdir / 'metrics.jsonl')
    best = [x for x in lines if x['split'] == 'validation' and x['step'] == summary['best_step']]
    assert [line['values'] for line in best] == [found['metrics']]
    assert found['examples'] == sum(map(sum, found['confusion'])) == 61
    written = toy.read_lines(trainer.workdir / 'predictions_validation.jsonl')
    right = sum(row['gold'] == row['prediction'] for row in written)
    assert right / 61 == found['metrics']['accuracy']


def test_unseen_texts_are_understood(learned):
    trainer, _, _ = learned
    rows = [{'text': f'so very near the {word}'} for words in toy.TOPICS.values() for word in words]
    said = [row['label'] for row in predict(trainer.workdir / 'adapter', rows)]
    expected = [topic for topic, words in toy.TOPICS.items() for _ in words]
    assert np.mean([a == b for a, b in zip(said, expected, strict=True)]) > 0.9


def test_numbers_are_learned(toys, tmp_path):
    given = config(toys, 'ratings.csv', **LEARNED, task__name='regression')
    summary = train(given, tmp_path / 'w')
    assert summary['metrics']['validation']['pearson'] > 0.9
    assert summary['primary'] == 'pearson' and summary['metrics']['validation']['mse'] < 0.1


@pytest.mark.slow
def test_pairs_are_learned(toys, tmp_path):
    summary = train(config(toys, 'pairs.tsv', **LEARNED), tmp_path / 'w')
    assert summary['metrics']['validation']['accuracy'] > 0.9


def test_the_lower_of_an_error_is_the_better(toys, tmp_path):
    changes = {'task__name': 'regression', 'task__metrics': ('mse',), 'training__epochs': 3.0}
    summary = train(config(toys, 'ratings.csv', **(LEARNED | changes)), tmp_path / 'w')
    lines = toy.read_lines(tmp_path / 'w' / 'metrics.jsonl')
    errors = {x['step']: x['values']['mse'] for x in lines if x['split'] == 'validation'}
    assert len(errors) == 3
    assert summary['best_step'] == min(errors, key=errors.get)


def fed(monkeypatch):
    """Record each batch that is put on devices for training."""
    batches = []
    put = sharding.put_batch

    def recording(batch, mesh):
        batches.append(batch)
        return put(batch, mesh)

    monkeypatch.setattr(loop.sharding, 'put_batch', recording)
    return batches


@pytest.mark.parametrize(
    ('batching', 'programs', 'padding'), [('packed', 1, 0.05), ('buckets', 6, 0.20)]
)
def test_programs_are_few_and_padding_is_little(
    toys, tmp_path, monkeypatch, batching, programs, padding
):
    batches = fed(monkeypatch)
    given = config(toys, 'long.csv', method='head', data__batching=batching)
    given.training.epochs = 2.0
    trainer = loop.Trainer(experiment.build(given), tmp_path)
    lengths = trainer.data.lengths
    assert len(np.unique(lengths)) > 20 and lengths.max() > 3 * np.median(lengths)
    summary = trainer.run()
    shapes = {(batch['input_ids'].shape, batch['starts'].shape) for batch in batches}
    assert len(shapes) == summary['compilations'] == trainer.train_step._cache_size()
    assert 1 <= len(shapes) <= programs
    # Each split may have rows of its own length.
    assert trainer.forward._cache_size() <= programs
    computed = sum(batch['segments'].size for batch in batches)
    real = sum(int((batch['segments'] > 0).sum()) for batch in batches)
    assert real == 2 * lengths.sum()
    assert 1 - real / computed < padding and trainer.plan.padding < padding
    assert summary['padding'] == pytest.approx(1 - real / computed, abs=0.005)
    # Each epoch has every example once, about as many in each batch as were asked for.
    seen = np.concatenate([batch['example_id'][batch['example_mask']] for batch in batches])
    assert np.bincount(seen).tolist() == [2] * len(trainer.data)
    assert len(seen) / len(batches) == pytest.approx(given.training.batch_size, rel=0.15)


def trained_on(devices, toys, folder, **changes):
    given = config(toys, method='pfeiffer[reduction_factor=2]', training__steps=12, **changes)
    given.mesh.data = devices
    given.training.dropout = False
    train(given, folder)
    return toy.losses(folder)


SMALL = {'training__batch_size': 24, 'data__limit': 300}


# Buckets over two devices are below, with accumulation.
@pytest.mark.parametrize(
    ('batching', 'devices'),
    [('packed', 8), pytest.param('buckets', 2, marks=pytest.mark.slow)],
    ids=str,
)
def test_one_device_and_several_give_the_same_losses(toys, tmp_path, batching, devices):
    length = 16 if batching == 'packed' else 8
    changes = SMALL | {'data__batching': batching, 'data__max_length': length}
    one = trained_on(1, toys, tmp_path / 'one', **changes)
    assert len(one) == 12 and one[-1] != one[0]
    other = trained_on(devices, toys, tmp_path / 'several', **changes)
    assert [step for step, _ in other] == [step for step, _ in one]
    np.testing.assert_allclose([x for _, x in other], [x for _, x in one], atol=1e-5)
    paths = [tmp_path / name / 'summary.json' for name in ('one', 'several')]
    summaries = [json.loads(path.read_text()) for path in paths]
    assert all(x['compilations'] <= (1 if batching == 'packed' else 6) for x in summaries)
    # A number of rows that does not divide is filled up with empty ones.
    padding = [summary['padding'] for summary in summaries]
    assert (padding[1] > padding[0]) == (devices == 8)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(toys, tmp_path):
    """The batches, and the place among them, do not depend on the devices."""
    changes = SMALL | {'training__checkpoint_every': 4}
    whole = trained_on(1, toys, tmp_path / 'whole', **changes)
    record = loop.Trainer._record

    def stopping(self, pending):
        record(self, pending)
        if self.step >= 6:
            self._stop.make()

    loop.Trainer._record = stopping
    try:
        with pytest.raises(SystemExit):
            trained_on(1, toys, tmp_path / 'moved', **changes)
    finally:
        loop.Trainer._record = record
    moved = trained_on(4, toys, tmp_path / 'moved', **changes)
    assert [step for step, _ in moved] == list(range(1, 13))
    np.testing.assert_allclose([x for _, x in moved], [x for _, x in whole], atol=1e-5)


def test_accumulation_and_remat_change_no_number(toys, tmp_path):
    changes = SMALL | {'data__batching': 'buckets', 'data__max_length': 8}
    plain = trained_on(1, toys, tmp_path / 'plain', **changes)
    parts = {'training__accumulate': 3, 'training__remat': 'full'}
    other = trained_on(2, toys, tmp_path / 'parts', **changes, **parts)
    np.testing.assert_allclose([x for _, x in other], [x for _, x in plain], atol=1e-5)


@pytest.mark.slow
def test_half_precision_learns_too(toys, tmp_path):
    changes = {'training__dtype': 'bfloat16', 'training__frozen_dtype': 'bfloat16'}
    summary = train(config(toys, **LEARNED, **changes), tmp_path / 'w')
    assert summary['metrics']['validation']['accuracy'] > 0.9
    found = evaluate(tmp_path / 'w', 'validation')
    assert found['metrics'] == summary['metrics']['validation']
    leaves = jax.tree.leaves(adapter_folder.load(tmp_path / 'w' / 'adapter').adapter_params)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ('key', 'splits'),
    [
        pytest.param('rte', ['test'], marks=pytest.mark.slow),
        ('mnli', ['test_matched', 'test_mismatched']),
        ('stsb', ['test']),
    ],
)
def test_the_unlabelled_tests_of_glue_get_predictions_only(toys, tmp_path, key, splits):
    given = config(toys, method='head')
    given.data.train = ''
    given.data.dir, given.data.glue = toy.write_glue(tmp_path / 'GLUE', key), key
    given.task.name = 'regression' if key == 'stsb' else 'classification'
    train(given, tmp_path / 'w')
    for split in splits:
        found = evaluate(tmp_path / 'w', split)
        assert (found['metrics'], found['examples'], 'confusion' in found) == ({}, 18, False)
        rows = toy.read_lines(tmp_path / 'w' / f'predictions_{split}.jsonl')
        assert len(rows) == 18
        assert all('gold' not in row and 'prediction' in row and row['text_b'] for row in rows)


def test_the_commands_print_what_they_found_and_wrote(toys, tmp_path):
    arguments = [
        '--config=configs/text_classification.py:method=head',
        f'--config.backbone={toys / "bert"}',
        f'--config.data.train={toys / "texts.csv"}',
        '--config.data.cache_dir=none',
        '--config.training.epochs=2',
        '--config.mesh.data=1',
        f'--workdir={tmp_path / "w"}',
    ]
    trained = command.run('train', *arguments, folder=tmp_path)
    assert (trained.status, 'Traceback' in trained.err) == (0, False), trained.err
    assert trained.out.startswith('best on validation, at step ')
    assert trained.out.endswith(
        f'wrote {tmp_path}/w: adapter/, summary.json, metrics.jsonl, config.json, log.txt\n'
    )
    expected = {
        'config.json',
        'data.json',
        'metrics.jsonl',
        'log.txt',
        'tensorboard',
        'checkpoints',
        'adapter',
    }
    expected |= {'summary.json', '.lock'}
    assert {path.name for path in (tmp_path / 'w').iterdir()} == expected
    evaluated = command.run('evaluate', f'--workdir={tmp_path / "w"}', folder=tmp_path)
    assert evaluated.status == 0 and 'true \\ predicted' in evaluated.out
    assert '\nwrote ' in evaluated.out
    found = json.loads((tmp_path / 'w' / 'evaluation_test.json').read_text())
    assert f'accuracy  {found["metrics"]["accuracy"]:.4f}' in evaluated.out
    assert 'versions' in found and 'hardware' in found
