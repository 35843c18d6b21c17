"""`evaluate` scores a run on the data beside which it was trained, or tells that they changed."""

import json
import shutil
from pathlib import Path

import pytest
import toy

from adapters_jax.config import add_task
from adapters_jax.evaluate import evaluate
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep, sweep_shard
from adapters_jax.train import train
from adapters_jax.training import experiment, grid

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture
def run(tmp_path):
    """The workdir of a run whose held-out texts were cut off its file, and that file."""
    texts = Path(toy.write_texts(tmp_path / 'texts.csv', 60))
    backbone = toy.write_backbone(tmp_path / 'bert')
    own = toy.config(backbone, str(texts), method='pfeiffer[size=4]', training__steps=1)
    train(own, tmp_path / 'run')
    return tmp_path / 'run', texts


def test_a_split_that_may_hold_what_was_trained_on_is_not_scored(run):
    workdir, texts = run
    before = evaluate(workdir, 'test')['metrics']
    lines = texts.read_text().splitlines(keepends=True)
    texts.write_text(''.join([*lines, *(line.replace(',', ' more,') for line in lines[1:6])]))
    with pytest.raises(
        ValueError, match="'train' and 'test' both, so that 'test' may hold what was"
    ):
        evaluate(workdir, 'test')
    texts.write_text(''.join(lines))
    assert evaluate(workdir, 'test')['metrics'] == before


@pytest.mark.parametrize('moved', ['texts.csv', 'bert'])
def test_what_has_moved_can_be_entered_in_its_new_place(run, tmp_path, moved):
    workdir, _ = run
    before = evaluate(workdir, 'test')['metrics']
    (tmp_path / moved).rename(tmp_path / f'my-{moved}')
    with pytest.raises(FileNotFoundError, match=r'config\.json: if they have moved since training'):
        evaluate(workdir, 'test')
    config = workdir / 'config.json'
    config.write_text(config.read_text().replace(moved, f'my-{moved}'))
    assert evaluate(workdir, 'test')['metrics'] == before


def test_a_split_that_is_cut_off_only_now_is_not_scored(tmp_path):
    for seed, name in enumerate(('train', 'dev')):
        toy.write_texts(tmp_path / f'{name}.csv', 40, seed)
    own = toy.config(toy.write_backbone(tmp_path / 'bert'), '', method='pfeiffer[size=4]')
    own.data.dir, own.training.steps = str(tmp_path), 1
    train(own, tmp_path / 'run')
    (tmp_path / 'run' / 'summary.json').unlink()  # as of a run that was stopped
    (tmp_path / 'dev.csv').unlink()
    with pytest.raises(ValueError, match="'train' and 'test' both"):
        evaluate(tmp_path / 'run', 'test')


def test_of_several_tasks_each_has_data_of_its_own(tmp_path):
    files = {
        name: {
            split: toy.write_texts(tmp_path / f'{name}-{split}.csv', 30, seed)
            for seed, split in enumerate(('train', 'validation', 'test'))
        }
        for name in 'ab'
    }
    own = toy.config(toy.write_backbone(tmp_path / 'bert'), '', method='pfeiffer[size=4]')
    for name, splits in files.items():
        add_task(own, name).data.update(splits)
    own.training.steps = 1
    train(own, tmp_path / 'run')
    toy.write_texts(Path(files['a']['train']), 35, seed=7)
    toy.write_texts(Path(files['b']['test']), 33, seed=8)
    assert evaluate(tmp_path / 'run', 'test')['examples'] == 63
    toy.write_texts(Path(files['a']['test']), 33, seed=9)
    with pytest.raises(ValueError, match="'a/train' and 'a/test' both"):
        evaluate(tmp_path / 'run', 'test')


def test_members_of_a_sweep_know_their_data(tmp_path):
    texts = toy.write_texts(tmp_path / 'texts.csv', 60)
    own = toy.config(toy.write_backbone(tmp_path / 'bert'), texts, method='pfeiffer[size=4]')
    own.training.steps, own.sweep.grid = 1, ('seed=0,1',)
    sweep(own, tmp_path / 'sweep')
    member = tmp_path / 'sweep' / 'members' / 'seed-0'
    evaluate(member, 'test')
    toy.write_texts(Path(texts), 70)
    with pytest.raises(ValueError, match="'train' and 'test' both"):
        evaluate(member, 'test')


def test_members_that_had_other_data_are_not_compared_with(tmp_path):
    texts = toy.write_texts(tmp_path / 'texts.csv', 60)
    own = toy.config(toy.write_backbone(tmp_path / 'bert'), texts, method='pfeiffer[size=4]')
    own.training.steps, own.sweep.grid = 1, ('method=pfeiffer[size=4],lora[r=2]',)
    sweep_shard(own, tmp_path / 'sweep', grid.Shard(0, 2))
    toy.write_texts(Path(texts), 60, seed=3)
    with pytest.raises(ValueError, match='was trained when the data were others'):
        sweep(own, tmp_path / 'sweep')
    toy.write_texts(Path(texts), 60)
    sweep(own, tmp_path / 'sweep')


def test_weights_are_another_backbone_where_more_is_computed_with_them(tmp_path):
    texts = toy.write_texts(tmp_path / 'texts.csv', 60)
    backbone = Path(toy.write_backbone(tmp_path / 'bert'))
    own = toy.config(str(backbone), texts, method='pfeiffer[size=4]', training__steps=1)
    train(own, tmp_path / 'run')
    (tmp_path / 'run' / 'summary.json').unlink()
    before = load_backbone(str(backbone))
    described = json.loads((backbone / 'config.json').read_text())
    for change, same in (
        ({'attention_probs_dropout_prob': 0.3}, True),
        ({'hidden_act': 'relu'}, False),
    ):
        (backbone / 'config.json').write_text(json.dumps(described | change))
        after = load_backbone(str(backbone))
        assert (after.architecture == before.architecture) is same
        assert after.fingerprint == before.fingerprint
    own.backbone = str(shutil.copytree(backbone, tmp_path / 'relu'))
    train(own, tmp_path / 'other')
    (backbone / 'config.json').write_text(json.dumps(described))
    both = {name: tmp_path / name / 'adapter' for name in ('run', 'other')}
    with pytest.raises(ValueError, match="'run' and 'other' are of different backbones"):
        predict(both, [{'text': 'the cat', 'adapter': name} for name in both])
    own.backbone = str(backbone)
    (backbone / 'config.json').write_text(json.dumps(described | {'hidden_act': 'relu'}))
    with pytest.raises(ValueError, match='made for another backbone: its architecture is'):
        predict(tmp_path / 'run' / 'adapter', [{'text': 'the cat'}])
    with pytest.raises(ValueError, match='belongs to another run: backbone_architecture is'):
        train(own, tmp_path / 'run')


def test_labels_of_other_names_are_not_scored(run):
    workdir, texts = run
    before = texts.read_text()
    first = min(toy.TOPICS)
    texts.write_text(before.replace(f',{first}\n', f',{first}s\n'))
    with pytest.raises(
        ValueError, match=f'classes in the data are {first}s, .*, and those that were'
    ):
        evaluate(workdir, 'test')


def test_a_file_of_its_own_may_change(tmp_path, caplog):
    splits = {
        name: toy.write_texts(tmp_path / f'{name}.csv', 40, seed)
        for seed, name in enumerate(('train', 'validation', 'test'))
    }
    backbone = toy.write_backbone(tmp_path / 'bert')
    own = toy.config(backbone, splits['train'], method='pfeiffer[size=4]', training__steps=1)
    own.data.validation, own.data.test = splits['validation'], splits['test']
    train(own, tmp_path / 'run')
    evaluate(tmp_path / 'run', 'test')
    assert 'has changed' not in caplog.text
    toy.write_texts(Path(splits['test']), 44, seed=5)
    assert evaluate(tmp_path / 'run', 'test')['examples'] == 44
    assert "the split 'test' has changed since training" in caplog.text


def test_classes_are_those_of_all_rows_however_few_are_trained(tmp_path):
    texts = tmp_path / 'texts.csv'
    rows = [f'text number {i},class {i % 20:02}' for i in range(200)]
    texts.write_text('\n'.join(['text,label', *rows, '']))
    own = toy.config(toy.write_backbone(tmp_path / 'bert'), str(texts), method='pfeiffer[size=4]')
    own.data.train_limit = 5
    built = experiment.build(own)
    assert len(built.task.labels) == 20 and len(built.texts['train']) == 5
    assert len(set(built.texts['test']['label'])) > 5
