"""`--drop_layers`: finished adapters used without their lowest layers."""

import dataclasses
import json

import command
import jax
import numpy as np
import pytest
import toy
import untrained

from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.predict import predict

pytestmark = pytest.mark.usefixtures('compiled_once')

ROWS = [{'text': text} for text in ('the cat', 'bread and soup and rice', 'snow')]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Adapters that nobody trained, of two layers: bottlenecks of two sizes, and biases."""
    folder = tmp_path_factory.mktemp('drop')
    backbone = toy.write_backbone(folder / 'bert', layers=2)
    texts = toy.write_texts(folder / 'texts.csv', 60)
    for name in ('pfeiffer', 'pfeiffer[reduction_factor=8]', 'bitfit'):
        untrained.run(toy.config(backbone, texts, method=name), folder / name[:12])
    return folder


def logits(rows):
    return np.array([row['logits'] for row in rows])


def test_a_layer_dropped_is_a_layer_whose_adapter_adds_nothing(runs, tmp_path):
    own = runs / 'pfeiffer' / 'adapter'
    folder = adapter_folder.load(own)
    tree = folder.adapter_params
    silent = tree | {'layer_0': jax.tree.map(np.zeros_like, tree['layer_0'])}
    adapter_folder.save(dataclasses.replace(folder, adapter_params=silent), tmp_path / 'silent')
    dropped = logits(predict(own, ROWS, drop_layers=1))
    np.testing.assert_allclose(dropped, logits(predict(tmp_path / 'silent', ROWS)), atol=1e-5)
    whole = logits(predict(own, ROWS))
    assert np.abs(dropped - whole).max() > 1e-2
    none_left = logits(predict(own, ROWS, drop_layers=2))
    assert np.abs(none_left - dropped).max() > 1e-2


def test_evaluate_says_what_predict_says_and_keeps_the_undropped_files(runs, tmp_path):
    run = runs / 'pfeiffer'
    whole = evaluate(run)
    result = evaluate(run, drop_layers=1)
    assert (whole['drop_layers'], result['drop_layers']) == (0, 1)
    for name, told in (('evaluation_test', whole), ('evaluation_test_drop1', result)):
        read = json.loads((run / f'{name}.json').read_text())
        assert {key: read[key] for key in told} == told
    written = toy.read_lines(run / 'predictions_test_drop1.jsonl')
    found = predict(run / 'adapter', [{'text': row['text_a']} for row in written], drop_layers=1)
    np.testing.assert_allclose(logits(found), logits(written), atol=1e-5)
    right = [row['label'] == row['gold'] for row in written]
    assert result['metrics']['accuracy'] == pytest.approx(np.mean(right))


def test_adapters_of_one_batch_lose_the_same_layers(runs):
    folders = {'a': runs / 'pfeiffer' / 'adapter', 'b': runs / 'pfeiffer[red' / 'adapter'}
    rows = [row | {'adapter': name} for row in ROWS for name in folders]
    together = predict(folders, rows, drop_layers=1)
    for name, folder in folders.items():
        alone = predict(folder, ROWS, drop_layers=1)
        own = [row for row in together if row['adapter'] == name]
        np.testing.assert_allclose(logits(own), logits(alone), atol=1e-5)


@pytest.mark.parametrize(
    ('name', 'dropped', 'message'),
    [
        ('pfeiffer', 3, r'--drop_layers=3: expected 0 to 2'),
        ('pfeiffer', -1, r'--drop_layers=-1: expected 0 to 2'),
        ('pfeiffer', range(1, 3), r'--drop_layers=1-2: expected layers of 0 to 1'),
        ('pfeiffer', range(3), r'--drop_layers=0-2: expected layers of 0 to 1'),
        ('bitfit', 1, r'no parameters of its own in the layers.*set --drop_layers=0'),
    ],
)
def test_what_cannot_be_dropped_is_refused(runs, name, dropped, message):
    with pytest.raises(ValueError, match=message):
        predict(runs / name / 'adapter', ROWS, drop_layers=dropped)
    with pytest.raises(ValueError, match=message):
        evaluate(runs / name, drop_layers=dropped)


def test_the_command_names_the_files(runs, tmp_path):
    done = command.run(
        'evaluate', f'--workdir={runs / "pfeiffer"}', '--drop_layers=2', folder=tmp_path
    )
    assert done.status == 0, done.err
    for name in ('evaluation_test_drop2.json', 'predictions_test_drop2.jsonl'):
        assert str(runs / 'pfeiffer' / name) in done.out and (runs / 'pfeiffer' / name).exists()


def test_layers_in_the_middle_can_be_dropped_too(runs):
    own = runs / 'pfeiffer' / 'adapter'
    upper = logits(predict(own, ROWS, drop_layers=range(1, 2)))
    for other in (0, 1, 2):
        assert np.abs(upper - logits(predict(own, ROWS, drop_layers=other))).max() > 1e-2
    result = evaluate(runs / 'pfeiffer', drop_layers=range(1, 2))
    written = json.loads((runs / 'pfeiffer' / 'evaluation_test_drop1-1.json').read_text())
    assert written['drop_layers'] == result['drop_layers'] == '1-1'
