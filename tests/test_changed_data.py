"""`evaluate` scores a run on the data beside which it was trained, or tells that they changed."""

from pathlib import Path

import pytest
import toy

from adapters_jax.evaluate import evaluate
from adapters_jax.train import train
from adapters_jax.training import experiment

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
