"""An adapter trained here goes to each format and back, and predicts the same from all of them."""

import dataclasses
import json
import shutil

import command
import numpy as np
import pytest
import toy
import transformers
import untrained
from safetensors.numpy import load_file, save_file

from adapters_jax.convert import convert
from adapters_jax.interop import formats
from adapters_jax.predict import predict
from adapters_jax.training import experiment

TEXTS = [{'text': text} for text in ('the cat', 'bread and soup and rice', 'a storm very near .')]
# The head of BertForSequenceClassification, which both libraries can express.
HEAD = {'head__pooling': 'pooler', 'head__layers': 1}


pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Adapters that nobody trained: 'mean' with our own head, the others with a pooler's."""
    folder = tmp_path_factory.mktemp('convert')
    backbone = toy.write_backbone(folder / 'bert')
    data = toy.write_texts(folder / 'texts.csv', 60)
    lora = 'lora[r=2,alpha=5]'
    made = {
        'lora': (lora, HEAD),
        'bitfit': ('bitfit', HEAD),
        'vera': ('vera[r=2,save_projection=True]', HEAD),
        'mean': (lora, {}),
    }
    for name, (method, head) in made.items():
        untrained.run(toy.config(backbone, data, method=method, **head), folder / name)
    return folder


def logits(adapter, backbone=''):
    return np.array([row['logits'] for row in predict(adapter, TEXTS, backbone)])


@pytest.mark.parametrize('format', ['adapters_jax', 'adapterhub', 'peft'])
def test_there_and_back(runs, tmp_path, format):
    source, there, back = runs / 'lora' / 'adapter', tmp_path / 'there', tmp_path / 'back'
    assert convert(source, there, format) == there
    assert formats.kind(there) == format
    backbone = str(runs / 'bert')
    expected = logits(source)
    np.testing.assert_allclose(logits(there, backbone), expected, atol=1e-5)
    convert(there, back, 'adapters_jax', backbone)
    np.testing.assert_allclose(logits(back), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.01


def test_random_matrices_go_along_where_the_file_is_to_hold_them(runs, tmp_path):
    source = runs / 'vera' / 'adapter'
    convert(source, tmp_path / 'peft', 'peft')
    found = logits(tmp_path / 'peft', str(runs / 'bert'))
    np.testing.assert_allclose(found, logits(source), atol=1e-5)


@pytest.mark.parametrize('run', ['lora', 'bitfit', 'vera'])
def test_merged_is_a_model_of_transformers(runs, tmp_path, run):
    source, target = runs / run / 'adapter', tmp_path / 'merged'
    convert(source, target, 'merged')
    model = transformers.AutoModelForSequenceClassification.from_pretrained(target).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    inputs = tokenizer([row['text'] for row in TEXTS], padding=True, return_tensors='pt')
    found = model(**inputs).logits.detach().numpy()
    np.testing.assert_allclose(found, logits(source), atol=2e-5)
    labels = [model.config.id2label[i] for i in range(found.shape[1])]
    assert labels == sorted(toy.TOPICS)


def test_a_head_that_others_cannot_express_is_left_out_and_said(runs, tmp_path, caplog):
    convert(runs / 'mean' / 'adapter', tmp_path / 'hub', 'adapterhub')
    assert 'mean' in caplog.text and 'head' in caplog.text
    with pytest.raises(ValueError, match='has no head'):
        predict(tmp_path / 'hub', TEXTS, str(runs / 'bert'))


@pytest.mark.parametrize('threshold', [0.1, 0.5])
def test_a_threshold_that_others_do_not_know_is_told(runs, tmp_path, caplog, threshold):
    folder, loaded = formats.load(runs / 'lora' / 'adapter')
    task = {'name': 'multi_label', 'labels': folder.task['labels'], 'threshold': threshold}
    formats.save(dataclasses.replace(folder, task=task), tmp_path / 'hub', loaded, 'adapterhub')
    assert ('The threshold of the task, 0.1, has no place' in caplog.text) is (threshold == 0.1)


def test_the_command(runs, tmp_path):
    arguments = {
        'source': runs / 'lora' / 'adapter',
        'target': tmp_path / 'peft',
        'format': 'peft',
    }
    flags = [f'--{name}={value}' for name, value in arguments.items()]
    done = command.run('convert', *flags, folder=tmp_path / 'log')
    assert done.status == 0, done.err
    assert done.out.startswith(f'wrote {tmp_path / "peft"} (peft): adapter_config.json')
    assert json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())['lora_alpha'] == 5
    assert 'exists already' in command.refused('convert', *flags, folder=tmp_path / 'log2')
    flags[-1] = '--format=onnx'
    sentence = command.refused('convert', *flags, folder=tmp_path / 'log3')
    assert 'adapters_jax, adapterhub, peft, merged' in sentence


def test_another_name(runs, tmp_path):
    """An adapter that a format cannot hold as it is called, or that came so, is given another."""
    source, backbone = runs / 'lora' / 'adapter', str(runs / 'bert')
    convert(source, tmp_path / 'dotted', 'adapters_jax', name='v1.5')
    with pytest.raises(ValueError, match=r"named 'v1\.5'; give it another with `convert --name"):
        convert(tmp_path / 'dotted', tmp_path / 'hub', 'adapterhub')
    flags = [f'--source={tmp_path / "dotted"}', f'--target={tmp_path / "hub"}']
    flags += ['--format=adapterhub', '--name=v1']
    assert command.run('convert', *flags, folder=tmp_path / 'log').status == 0
    config = json.loads((tmp_path / 'hub' / 'adapter_config.json').read_text())
    assert config['name'] == 'v1'
    for name in ('adapter.safetensors', 'model_head.safetensors'):
        path = tmp_path / 'hub' / name
        renamed = {key.replace('.v1.', '.a/b.'): x for key, x in load_file(path).items()}
        save_file(renamed, path)
    for name in ('adapter_config.json', 'head_config.json'):
        path = tmp_path / 'hub' / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {'name': 'a/b'}))
    with pytest.raises(ValueError, match=r"cannot be named 'a/b'.*`convert --name=NAME`"):
        predict(tmp_path / 'hub', TEXTS, backbone)
    convert(tmp_path / 'hub', tmp_path / 'back', 'adapters_jax', backbone, name='b')
    np.testing.assert_allclose(logits(tmp_path / 'back'), logits(source), atol=1e-5)


def test_an_adapter_of_words_without_a_task_is_told_from_one_without_a_head(runs):
    folder, _ = formats.load(runs / 'lora' / 'adapter')
    headless = dataclasses.replace(folder, head={}, task={}, head_params={})
    with pytest.raises(ValueError, match='has no head and no task'):
        experiment.task_of(headless)
    words = dataclasses.replace(headless, head={'pooling': 'vocabulary'})
    with pytest.raises(ValueError, match='has a head that scores words, but does not say'):
        experiment.task_of(words)


def test_a_foreign_folder_needs_its_backbone(runs, tmp_path):
    convert(runs / 'lora' / 'adapter', tmp_path / 'hub', 'adapterhub')
    config = json.loads((tmp_path / 'hub' / 'adapter_config.json').read_text())
    config['model_name'] = ''
    (tmp_path / 'hub' / 'adapter_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='give it as --backbone'):
        predict(tmp_path / 'hub', TEXTS)
    other = toy.write_backbone(tmp_path / 'other', hidden=16)
    with pytest.raises(ValueError, match='hidden'):
        predict(tmp_path / 'hub', TEXTS, other)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('[]', r'is of no known kind \(it holds: list\)'),
        ('{}', r'is of no known kind \(it holds: \)'),
        ('3', r'is of no known kind \(it holds: int\)'),
        ('{"config": 3}', 'has name=None; expected text'),
        ('{"peft_type": 7}', 'has the peft_type 7, which is not supported; expected one of ADA'),
        ('{', 'is not JSON .Expecting property name'),
    ],
)
def test_a_config_of_no_kind_is_refused(runs, tmp_path, text, message):
    (tmp_path / 'adapter_config.json').write_text(text)
    with pytest.raises(ValueError, match=message):
        predict(tmp_path, TEXTS, str(runs / 'bert'))


@pytest.mark.parametrize('format', ['adapters_jax', 'adapterhub'])
@pytest.mark.parametrize('file', ['adapter', 'head'])
def test_an_adapter_that_lacks_a_leaf_is_not_written_without_it(runs, tmp_path, file, format):
    source = shutil.copytree(runs / 'lora' / 'adapter', tmp_path / 'source')
    path = source / f'{file}.safetensors'
    leaves = load_file(path)
    lost = sorted(leaves)[0]
    save_file({name: leaf for name, leaf in leaves.items() if name != lost}, path)
    with pytest.raises(ValueError, match=r'does not hold what .* is missing; restore its folder'):
        convert(source, tmp_path / 'target', format)
    assert not (tmp_path / 'target').exists()
