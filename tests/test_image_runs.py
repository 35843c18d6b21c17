"""Whole runs of images: learned, resumed, evaluated, served by row, exported, and refused."""

import json
import re
import signal

import command
import jax
import numpy as np
import pytest
import torch
import toy
import toy_images
import transformers
import untrained
from safetensors.numpy import load_file

from adapters_jax.config import add_task
from adapters_jax.convert import convert
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import ahead, experiment, loop

STEPS, EVERY = 40, 7
LEARNED = {'training__epochs': 12.0, 'optimizer__learning_rate': 2e-3, 'training__patience': 0}

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a ViT, a DeiT and a BERT, a set of images, and one with shuffled labels."""
    folder = tmp_path_factory.mktemp('images')
    toy_images.write_vit(folder / 'vit')
    toy_images.write_vit(folder / 'deit', family='deit', layers=1)
    toy.write_backbone(folder / 'bert')
    toy_images.write_set(folder / 'set', 240, 60)
    toy_images.write_set(folder / 'shuffled', 240, 60, shuffled=True)
    return folder


def config(toys, method='pfeiffer[reduction_factor=2]', **changes):
    backbone, images = changes.pop('backbone', 'vit'), changes.pop('images', 'set')
    made = toy_images.config(str(toys / backbone), str(toys / images), method)
    return toy.change(made, **changes)


@pytest.fixture(scope='module')
def runs(toys):
    """A finished run of a tuned backbone, and two adapters that nobody trained: by name."""
    train(config(toys, 'full', **LEARNED), toys / 'full')
    methods = {'small': 'lora[r=4]', 'bottleneck': 'pfeiffer[reduction_factor=2]'}
    for seed, (name, method) in enumerate(methods.items()):
        untrained.run(config(toys, method, head__pooling='mean'), toys / name, seed)
    return {name: toys / name for name in ('full', *methods)}


def pictures(toys, count=9):
    return [{'image': str(p)} for p in sorted((toys / 'set' / 'test').rglob('*.png'))[:count]]


def test_colours_are_learned(runs):
    found = evaluate(runs['full'], 'test')
    assert found['metrics']['accuracy'] > 0.9 and found['examples'] == 60
    assert np.trace(found['confusion']) == round(60 * found['metrics']['accuracy'])
    summary = json.loads((runs['full'] / 'summary.json').read_text())
    assert summary['compilations'] == 1 and summary['padding'] < 0.07
    rows = toy.read_lines(runs['full'] / 'predictions_test.jsonl')
    right = [row['gold'] == row['prediction'] for row in rows]
    assert np.mean(right) == found['metrics']['accuracy']
    assert all(row['image'].split('/')[-2] == row['gold'] for row in rows)


@pytest.mark.slow
def test_shuffled_colours_are_not_learned(toys):
    train(config(toys, 'full', images='shuffled', **LEARNED), toys / 'by_lot')
    assert evaluate(toys / 'by_lot', 'test')['metrics']['accuracy'] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize('pooling', ['pooler', 'cls', 'mean'])
def test_both_families_and_all_poolings_train(toys, tmp_path, pooling):
    for backbone in ('vit', 'deit'):
        made = config(toys, 'houlsby[size=4]', backbone=backbone, head__pooling=pooling)
        trainer = loop.Trainer(experiment.build(made), tmp_path / backbone)
        before = toy.bits(trainer.trainable)
        losses = [float(trainer.take_step()['loss']) for _ in range(2)]
        assert np.isfinite(losses).all()
        assert all(bits != before[path] for path, bits in toy.bits(trainer.trainable).items())


def test_the_set_in_a_tar_file_gives_the_same_examples(toys, tmp_path):
    files = sorted(path for path in (toys / 'set').rglob('*.png'))
    contents = {str(path.relative_to(toys / 'set')): path.read_bytes() for path in files}
    tar = toy_images.write_tar(tmp_path / 'set.tar', contents)
    cache = {'data__cache_dir': str(tmp_path / 'cache')}
    built = [
        experiment.build(config(toys, **changes, **cache)) for changes in ({}, {'data__dir': tar})
    ]
    named = [{name: split.fingerprint() for name, split in one.splits.items()} for one in built]
    assert named[0] == named[1] and set(named[0]) == {'train', 'validation', 'test'}
    assert len(set(named[0].values())) == 3
    # The bytes are the same, so both read what one has decoded.
    assert len(list((tmp_path / 'cache').glob('pixels-*'))) == 3


def arguments(toys, workdir, *more):
    return [
        f'--config=configs/images.py:method=lora[r=4,dropout=0.1],backbone={toys / "vit"}',
        f'--config.data.dir={toys / "set"}',
        '--config.data.cache_dir=none',
        '--config.mesh.data=1',
        f'--config.training.steps={STEPS}',
        f'--config.training.checkpoint_every={EVERY}',
        '--config.training.evaluate_every=15',
        '--config.training.patience=0',
        f'--workdir={workdir}',
        *more,
    ]


def at_step(metrics, step):
    return lambda: metrics.exists() and f'"step": {step}' in metrics.read_text()


@pytest.mark.slow
def test_killed_and_gone_on_the_bits_are_the_same(toys, tmp_path):
    """Every batch is recorded, its pixels too: they are drawn anew in each epoch."""

    def start(name, number):
        given = arguments(toys, tmp_path / name)
        record = str(tmp_path / f'batches{number}')
        return command.Command('train', given, tmp_path / f'out{number}', recorded=record)

    def batches(number):
        return (tmp_path / f'batches{number}').read_text().splitlines()

    done = start('whole', 'whole').finish()
    assert done.status == 0, done.err
    whole = batches('whole')
    assert len(whole) == STEPS and len(set(whole)) == STEPS  # no view of an epoch comes again
    for number, step in enumerate((9, 25)):
        process = start('killed', number)
        assert process.wait_for(at_step(tmp_path / 'killed' / 'metrics.jsonl', step))
        process.signal(signal.SIGKILL)
        assert process.finish().status == -signal.SIGKILL
    done = start('killed', 'last').finish()
    assert done.status == 0, done.err
    resumed = int(re.search(r'continuing from the checkpoint of step (\d+)', done.err)[1])
    assert EVERY <= resumed < STEPS and batches('last') == whole[resumed:]
    for name in ('metrics.jsonl', 'adapter/adapter.safetensors', 'adapter/head.safetensors'):
        ours, theirs = ((tmp_path / w / name).read_bytes() for w in ('killed', 'whole'))
        assert ours == theirs, name


def test_two_adapters_serve_their_own_rows(runs, toys):
    rows = [
        row | {'adapter': ('small', 'bottleneck')[i % 2]} for i, row in enumerate(pictures(toys))
    ]
    folders = {name: runs[name] / 'adapter' for name in ('small', 'bottleneck')}
    found = predict(folders, rows)
    logits = np.array([row['logits'] for row in found])
    for name, folder in folders.items():
        alone = np.array([row['logits'] for row in predict(folder, pictures(toys))])
        mine = [i for i, row in enumerate(rows) if row['adapter'] == name]
        np.testing.assert_allclose(logits[mine], alone[mine], atol=2e-5)
        others = [i for i, row in enumerate(rows) if row['adapter'] != name]
        assert np.abs(logits[others] - alone[others]).max(1).min() > 1e-2
    assert [row['image'] for row in found] == [row['image'] for row in rows]
    assert all(row['prediction'] == row['label'] in toy_images.COLOURS for row in found)


def test_adapters_that_prepare_images_otherwise_share_no_batch(runs, toys, tmp_path):
    """Each image is prepared as its own adapter's task says."""
    other = tmp_path / 'darker'
    folder = adapter_folder.load(runs['small'] / 'adapter')
    folder.task['mean'] = [0.1, 0.1, 0.1]
    adapter_folder.save(folder, other)
    folders = {'small': runs['small'] / 'adapter', 'darker': other}
    rows = [row | {'adapter': name} for row in pictures(toys, 3) for name in folders]
    together = np.array([row['logits'] for row in predict(folders, rows)])
    for i, name in enumerate(folders):
        alone = np.array([row['logits'] for row in predict(folders[name], pictures(toys, 3))])
        np.testing.assert_allclose(together[i::2], alone, atol=2e-5)
    assert np.abs(together[::2] - together[1::2]).max() > 1e-2


def test_the_settings_of_the_checkpoint_are_followed_and_kept(toys, tmp_path):
    settings = transformers.ViTImageProcessor(
        size={'height': 16, 'width': 16}, image_mean=[0.4, 0.3, 0.2], resample=3
    )
    backbone = toy_images.write_vit(tmp_path / 'vit', layers=1)
    settings.save_pretrained(backbone)
    untrained.run(toy_images.config(backbone, str(toys / 'set')), tmp_path / 'run')
    task = experiment.task_of(adapter_folder.load(tmp_path / 'run' / 'adapter'))
    assert task.mean == (0.4, 0.3, 0.2) and task.resample == 3 and task.size == (16, 16)
    assert task == type(task).from_fields(
        **{k: v for k, v in json.loads(json.dumps(task.to_json())).items() if k != 'name'}
    )
    convert(tmp_path / 'run' / 'adapter', tmp_path / 'again', 'adapters_jax')
    rows = pictures(toys, 2)
    first, again = (predict(tmp_path / d, rows) for d in ('run/adapter', 'again'))
    assert first == again


# The other family differs in nothing that is merged.
@pytest.mark.parametrize('family', [pytest.param('vit', marks=pytest.mark.slow), 'deit'])
def test_merged_it_is_a_model_of_transformers(toys, tmp_path, family):
    made = config(toys, 'lora[r=4]', backbone=family, training__steps=8)
    made.optimizer.learning_rate = 1e-2
    train(made, tmp_path / 'run')
    convert(tmp_path / 'run' / 'adapter', tmp_path / 'merged', 'merged')
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'merged')
    processor = transformers.ViTImageProcessor(size={'height': 16, 'width': 16})
    rows = pictures(toys, 5)
    read = [transformers.image_utils.load_image(row['image']) for row in rows]
    with torch.no_grad():
        expected = model.eval()(**processor(read, return_tensors='pt')).logits.numpy()
    found = predict(tmp_path / 'run' / 'adapter', rows)
    np.testing.assert_allclose([row['logits'] for row in found], expected, atol=2e-5)
    assert [model.config.id2label[i] for i in expected.argmax(-1)] == [r['label'] for r in found]
    named = load_file(tmp_path / 'merged' / 'model.safetensors')
    assert not [name for name in named if 'pooler' in name]


@pytest.mark.slow
def test_through_the_format_of_peft_it_predicts_the_same(runs, toys, tmp_path):
    made = config(toys, 'lora[r=4]', training__steps=8, optimizer__learning_rate=1e-2)
    train(made, tmp_path / 'run')
    convert(tmp_path / 'run' / 'adapter', tmp_path / 'peft', 'peft')
    rows = pictures(toys, 5)
    ours, theirs = (predict(tmp_path / d, rows) for d in ('run/adapter', 'peft'))
    np.testing.assert_allclose(*([r['logits'] for r in x] for x in (ours, theirs)), atol=1e-6)
    assert {row['label'] for row in theirs} <= {f'LABEL_{i}' for i in range(3)}


# Of the second the trunk is all of the backbone, which is computed once for all members.
@pytest.mark.parametrize(
    'method', [pytest.param('pfeiffer[reduction_factor=2]', marks=pytest.mark.slow), 'head']
)
def test_a_sweep_over_images_is_the_runs_alone(toys, tmp_path, method):
    changes = {'method': method, 'training__steps': 4, 'task__augment': 'crop'}
    swept = config(toys, **changes)
    swept.sweep.grid = ('optimizer.learning_rate=1e-3,1e-2',)
    sweep(swept, tmp_path / 'sweep')
    train(config(toys, **changes, optimizer__learning_rate=1e-2), tmp_path / 'alone')
    members = [
        tmp_path / 'sweep' / 'members' / f'learning_rate-{rate}' for rate in ('1e-3', '1e-2')
    ]
    other, own, alone = (
        np.array([loss for _, loss in toy.losses(run)]) for run in (*members, tmp_path / 'alone')
    )
    assert len(own) == 4 and np.abs(own - alone).max() < 1e-5
    assert np.abs(other - own).max() > 1e-4


def test_a_run_is_described_without_data(toys):
    plan = ahead.plan(config(toys))
    built = experiment.build(config(toys, data__limit=40))
    trainer = loop.Trainer(built, toys / 'described')
    _, batch = next(trainer.iterator)
    shapes = {name: (column.shape, np.dtype(column.dtype)) for name, column in batch.items()}
    planned = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in plan.batch.items()}
    assert planned == shapes
    assert ahead.report(plan)['length'] == 5


def test_other_views_in_each_epoch_and_none_in_evaluation(toys):
    built = experiment.build(config(toys, data__limit=40, training__batch_size=40))
    task, data = built.task, built.splits['train']
    batch = {
        'pixels': data.examples['pixels'][:, None],
        'example_id': np.arange(len(data), dtype=np.int32)[:, None],
        'segments': np.ones((len(data), 1), np.int32),
    }
    plain = task.transform(batch)
    assert set(plain) == {'pixels', 'example_id'} and plain['pixels'].dtype == np.float32
    np.testing.assert_array_equal(plain['pixels'], task.preparation.normalise(batch['pixels']))
    views = [task.transform(batch, 0, epoch)['pixels'] for epoch in (0, 0, 1)]
    assert (views[0] == views[1]).all() and (views[0] != views[2]).any()
    assert (views[0] != plain['pixels']).any()
    assert data.examples['pixels'].dtype == np.uint8


def refused(toys, tmp_path, *more, file='images', argument=None):
    argument = argument or f'method=head,backbone={toys / "vit"}'
    given = [f'--config=configs/{file}.py:{argument}', '--config.data.cache_dir=none']
    given += [f'--config.data.dir={toys / "set"}', '--config.mesh.data=1', *more]
    workdir = tmp_path / 'workdir'
    said = command.refused('train', *given, f'--workdir={workdir}', folder=tmp_path / 'out')
    assert {path.name for path in workdir.glob('*')} <= {'.lock'}
    return said


def spoilt(toys, tmp_path, name, content):
    """A copy of the set with one more file."""
    folder = tmp_path / 'set'
    for path in (toys / 'set').rglob('*.png'):
        if int(path.stem) < 12:
            copy = folder / path.relative_to(toys / 'set')
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    return f'--config.data.dir={folder}'


IMAGE = toy_images.encoded(np.zeros((16, 16, 3), np.uint8))


@pytest.mark.parametrize(
    ('name', 'content', 'expected'),
    [
        ('train/red/x.png', b'none', r"split 'train': .*red/x.png cannot be read as an image"),
        ('val/red/x.jpg', IMAGE[:40], r"split 'validation': .*val/red/x.jpg cannot be read"),
        ('val/pink/x.png', IMAGE, r"'validation': unseen labels 'pink' \(1 times\); known: 'blue'"),
        ('train/pink/x.txt', b'', r'train/pink holds no images, though a folder is a class'),
    ],
)
def test_a_set_with_a_mistake(toys, tmp_path, name, content, expected):
    assert re.search(expected, refused(toys, tmp_path, spoilt(toys, tmp_path, name, content)))


def test_what_does_not_go_together(toys, tmp_path):
    bert = f'method=head,backbone={toys / "bert"}'
    said = refused(toys, tmp_path, argument=bert)
    assert 'image_classification is about images, but the backbone' in said
    assert '(bert) reads texts; set config.backbone to a ViT or DeiT' in said
    toy.write_texts(tmp_path / 'texts.csv', 30)
    texts = (f'--config.data.train={tmp_path / "texts.csv"}', '--config.data.dir=')
    vit = f'method=head,backbone={toys / "vit"}'
    said = refused(toys, tmp_path, *texts, file='text_classification', argument=vit)
    assert (
        'classification is about texts, but the backbone' in said and '(vit) reads images' in said
    )


@pytest.mark.parametrize(
    ('option', 'expected'),
    [
        ('data.preprocess=lower', 'image_classification has no texts; leave it empty'),
        ('training.trunk_cache=float32', 'belongs to the tokens of texts'),
        ('task.augment=turn', "augment is 'turn'; expected one of none, crop, flip, crop_flip"),
        ('method=prompt_tuning[site=words]', 'is about vectors of words'),
        ('training.batch_size=30', 'choose a multiple of 4'),
    ],
)
def test_options_that_images_do_not_have(toys, tmp_path, option, expected):
    more = ('--config.training.accumulate=4',) if 'batch_size' in option else ()
    assert expected in refused(toys, tmp_path, f'--config.{option}', *more)


def test_tasks_of_images_are_trained_alone(toys, tmp_path):
    made = config(toys)
    for name in ('one', 'two'):
        add_task(made, name)
        made.tasks[name].task.name = 'image_classification'
        made.tasks[name].data.dir = str(toys / 'set')
    with pytest.raises(ValueError, match="task 'one': image_classification cannot share a run"):
        train(made, tmp_path / 'run')


def test_objects_that_name_no_image(runs, toys, tmp_path):
    adapter, rows = runs['small'] / 'adapter', pictures(toys, 1)
    for wrong, message in (
        ({'text': 'a'}, r'line 2 has no path under .image.*this one has: text'),
        ({'image': 3}, 'line 2 has no path under'),
        ({'image': str(tmp_path / 'no.png')}, r'line 2: there is no image .*no.png'),
    ):
        with pytest.raises(ValueError, match=message):
            predict(adapter, [*rows, wrong])
    (tmp_path / 'broken.png').write_bytes(b'none')
    with pytest.raises(ValueError, match=r'broken.png cannot be read as an image'):
        predict(adapter, [*rows, {'image': str(tmp_path / 'broken.png')}])


@pytest.mark.slow
def test_one_device_and_eight_give_the_same(toys, tmp_path):
    losses = []
    for devices in (1, 8):
        made = config(toys, training__dropout=False, mesh__data=devices)
        trainer = loop.Trainer(experiment.build(made), tmp_path / str(devices))
        losses.append([float(trainer.take_step()['loss']) for _ in range(3)])
    assert jax.device_count() == 8
    np.testing.assert_allclose(*losses, atol=1e-6)
