"""Heads of the families beyond BERT: as `adapters` writes them, and as Hugging Face models."""

import functools
import json
import logging

import adapters
import jax
import library_families as library
import numpy as np
import pytest
import torch
import transformers
from jax.tree_util import tree_map
from torch_families import CASES, VARIANTS, models

from adapters_jax.adapters import registry
from adapters_jax.adapters.baselines import HeadOnly
from adapters_jax.interop import adapterhub, hf_export
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig

TOLERANCE = 5e-5
LABELS = ['no', 'größer', 'yes']
TASK = {'name': 'classification', 'labels': LABELS}
WRITERS = ['bart', 'mbart', 't5', 't5-gated', 'whisper']
CLASSES = {
    'distilbert': transformers.DistilBertForSequenceClassification,
    'electra': transformers.ElectraForSequenceClassification,
    'vit': transformers.ViTForImageClassification,
    'deit': transformers.DeiTForImageClassification,
}
pytestmark = pytest.mark.filterwarnings('ignore:`past_key_value` is deprecated')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp('families')
    return functools.cache(lambda name: library.make(name, root / name))


def batch_of(x):
    """Return the inputs as our batches have them, one text a row."""
    found = {'starts': np.zeros((len(x.values), 1), np.int32)}
    if x.values.ndim == 4:
        return found | {'pixels': x.values.transpose(0, 2, 3, 1)}
    if x.values.ndim == 3:
        found |= {'sound': x.values}
    else:
        found |= {'input_ids': x.values, 'segments': x.mask.astype(np.int32)}
    if x.target is not None:
        count = np.arange(x.target.shape[1], dtype=np.int32)
        found |= {
            'target_ids': x.target,
            'target_segments': x.target_mask.astype(np.int32),
            'target_positions': np.broadcast_to(count, x.target.shape),
        }
    return found


def our_outputs(folder, of, x, outputs):
    method = registry.from_json(folder.method)
    model = Model(of.loaded.config, method, HeadConfig(**folder.head), outputs, folder.name)
    tree = folder.overlay(of.loaded.params, method.constants(of.loaded.config.dimensions))
    return np.asarray(model.apply(tree, batch_of(x)))


@pytest.mark.parametrize('biased', [False, True])
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in (*VARIANTS, 'whisper')))
        for name in WRITERS
    ],
)
def test_scores_of_words(source, tmp_path, name, biased):
    of, x = source(name), library.given(source(name))
    model = of.model()
    model.add_adapter('ad', config=library.METHODS['lora_everywhere'])
    model.add_prediction_head(adapters.Seq2SeqLMHead(model, 'ad', bias=biased))
    library.randomise(of, model)
    tied = of.loaded.config.decoder.tied
    model.tie_weights()
    model.set_active_adapters('ad')
    model.eval()
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    expected = library.outputs(model, of, x).logits.numpy()
    folder = adapterhub.load(tmp_path / 'a', of.loaded)
    own = folder.head_params.get('words', {})
    assert set(own) == ({'bias'} if biased else set()) | (set() if tied else {'kernel'})
    check(our_outputs(folder, of, x, 61), expected, x)
    adapterhub.save(folder, tmp_path / 'b', of.loaded)
    again = library.reloaded(of, tmp_path / 'b')
    check(library.outputs(again, of, x).logits.numpy(), expected, x)
    written, read = (
        json.loads((tmp_path / part / 'head_config.json').read_text())['config'] for part in 'ba'
    )
    assert written == read


def check(found, expected, x):
    assert expected.std() > 0.1
    assert (np.abs(found - expected) * x.target_mask[..., None]).max() <= TOLERANCE


def test_another_matrix_than_the_words_is_refused_where_they_are_one(source, tmp_path):
    of = source('t5')
    model = of.model()
    model.add_adapter('ad', config='lora')
    model.add_seq2seq_lm_head('ad')
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    path = tmp_path / 'a' / 'pytorch_model_head.bin'
    tensors = torch.load(path, weights_only=True)
    torch.save({key: x + 1 for key, x in tensors.items()}, path)
    with pytest.raises(ValueError, match='another matrix than the word vectors'):
        adapterhub.load(tmp_path / 'a', of.loaded)


def test_a_classifier_of_a_decoder_is_left_out(source, tmp_path, caplog):
    of = source('bart')
    model = of.model()
    model.add_adapter('ad', config='lora')
    model.add_classification_head('ad')
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    with caplog.at_level(logging.WARNING):
        assert adapterhub.load(tmp_path / 'a', of.loaded).head == {}
    assert "a head of kind 'classification' is not supported" in caplog.text


@pytest.mark.parametrize(
    ('name', 'task'),
    [
        ('distilbert', 'classification'),
        ('electra', 'classification'),
        ('electra', 'multi_label'),
        ('vit', 'image_classification'),
    ],
)
def test_exchangeable_classifiers(source, tmp_path, name, task):
    of, x = source(name), library.given(source(name))
    model = of.model()
    model.add_adapter('ad', config=library.METHODS['seq_bn'])
    options = {'multilabel': True} if task == 'multi_label' else {}
    add = model.add_image_classification_head if name == 'vit' else model.add_classification_head
    add('ad', num_labels=3, id2label=dict(enumerate(LABELS)), **options)
    library.randomise(of, model)
    model.set_active_adapters('ad')
    model.eval().save_adapter(str(tmp_path / 'a'), 'ad')
    expected = logits(model, of, x)
    folder = adapterhub.load(tmp_path / 'a', of.loaded)
    assert folder.task == {'name': task, 'labels': LABELS}
    found = our_outputs(folder, of, x, 3)[:, 0]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    adapterhub.save(folder, tmp_path / 'b', of.loaded)
    again = library.reloaded(of, tmp_path / 'b')
    np.testing.assert_allclose(logits(again, of, x), expected, atol=TOLERANCE, rtol=0)
    written, read = (
        json.loads((tmp_path / part / 'head_config.json').read_text())['config'] for part in 'ba'
    )
    assert written['head_type'] == read['head_type']


def test_the_head_of_a_plain_image_model(source, tmp_path):
    of, x = source('vit'), library.given(source('vit'))
    model = CLASSES['vit'].from_pretrained(of.loaded.directory, num_labels=3)
    adapters.init(model)
    model.add_adapter('ad', config='lora')
    model.set_active_adapters('ad')
    model.eval().save_adapter(str(tmp_path / 'a'), 'ad', with_head=True)
    folder = adapterhub.load(tmp_path / 'a', of.loaded)
    assert folder.task == {
        'name': 'image_classification',
        'labels': ['LABEL_0', 'LABEL_1', 'LABEL_2'],
    }
    found = our_outputs(folder, of, x, 3)[:, 0]
    np.testing.assert_allclose(found, logits(model, of, x), atol=TOLERANCE, rtol=0)


def test_an_image_head_of_several_classes_at_once_is_left_out(source, tmp_path, caplog):
    of = source('vit')
    model = of.model()
    model.add_adapter('ad', config='lora')
    model.add_image_classification_head('ad', num_labels=3, multilabel=True)
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    with caplog.at_level(logging.WARNING):
        assert adapterhub.load(tmp_path / 'a', of.loaded).head == {}
    assert 'is not supported' in caplog.text


def logits(model, of, x):
    return library.outputs(model, of, x)[0].numpy()


@pytest.mark.parametrize(
    'name', [pytest.param(x, marks=[pytest.mark.slow] * (x in VARIANTS)) for x in CLASSES]
)
def test_classifiers_as_hugging_face_models(source, tmp_path, name):
    loaded = models(name)[1] if name == 'deit' else source(name).loaded
    loaded = rewritten(name, tmp_path) if name == 'deit' else loaded
    activation = {'distilbert': 'relu', 'electra': 'gelu'}.get(name, 'tanh')
    head = HeadConfig('cls', 1 if name in ('vit', 'deit') else 2, activation)
    model = Model(loaded.config, HeadOnly(), head, 3)
    tree = model.init(jax.random.key(0), tree_map(lambda x: 0.9 * x, loaded.params))
    told = head.to_json(), tree['heads']['default']
    out = hf_export.save(tree['backbone'], loaded, tmp_path / 'out', told, TASK)
    found = from_pretrained(CLASSES[name], out)
    assert found.config.id2label == dict(enumerate(LABELS))
    of = library.Source(name, found.config, {}, loaded)
    x = library.given(of)
    mine = np.asarray(model.apply(tree, batch_of(x)))[:, 0]
    np.testing.assert_allclose(logits(found, of, x), mine, atol=TOLERANCE, rtol=0)


def rewritten(name, tmp_path):
    models(name)[0].save_pretrained(tmp_path / 'base')
    return load_backbone(str(tmp_path / 'base'))


def from_pretrained(cls, directory):
    transformers.logging.set_verbosity_error()
    model, report = cls.from_pretrained(
        directory, output_loading_info=True, attn_implementation='eager'
    )
    # Marian's positions are computed, and need not be in a file.
    missing = [key for key in report['missing_keys'] if 'embed_positions' not in key]
    assert not any([missing, *(report[key] for key in report if key != 'missing_keys')]), report
    return model.eval()


@pytest.mark.parametrize(
    ('name', 'headed'),
    [
        pytest.param(
            name,
            headed,
            marks=[pytest.mark.slow] * (name in VARIANTS or (headed and name != 't5')),
        )
        for name in ('bart', 'mbart', 'marian', 't5', 't5-gated', 'whisper')
        for headed in (False, True)
    ],
)
def test_writers_as_hugging_face_models(tmp_path, name, headed):
    theirs, _, head = models(name, headed=True)
    theirs.save_pretrained(tmp_path / 'base')
    loaded = load_backbone(str(tmp_path / 'base'))
    changed = tree_map(lambda x: 0.9 * x, loaded.params)
    told = (HeadConfig(pooling='vocabulary').to_json(), head) if headed else None
    out = hf_export.save(changed, loaded, tmp_path / 'out', told)
    cls = CASES[name].headed if headed else CASES[name].bare
    found = from_pretrained(cls, out)
    again = load_backbone(str(out))
    assert jax.tree.all(tree_map(np.array_equal, again.params, tree_map(np.asarray, changed)))
    assert found.config.architectures == [cls.__name__]
