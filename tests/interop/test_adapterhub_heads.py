"""Heads of AdapterHub folders: those that we have, and those that are left out."""

import dataclasses
import json
import re

import adapters
import library_folders as library
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters_jax import tasks
from adapters_jax.interop import adapterhub

SEQ_BN = library.CONFIGS['seq_bn']


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return library.write_source(tmp_path_factory.mktemp('backbones') / 'bert')


@pytest.mark.parametrize(
    'options',
    [
        {'layers': 1},
        {'layers': 1, 'use_pooler': True, 'bias': False},
        {'layers': 2, 'activation_function': 'gelu', 'use_pooler': True},
        {'layers': 2, 'activation_function': None},
        {'layers': 3, 'activation_function': 'leakyrelu', 'bias': False, 'dropout_prob': 0.25},
    ],
    ids=str,
)
def test_classification_heads_both_ways(source, tmp_path, options):
    theirs = library.adapted(source, SEQ_BN, head=options)
    expected = library.library_logits(theirs, source)
    theirs.save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert folder.head['dropout'] == options.get('dropout_prob', 0.1)
    np.testing.assert_allclose(library.our_logits(folder, source), expected, atol=2e-5)
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    again = library.loaded_by_library(source, tmp_path / 'b')
    np.testing.assert_allclose(library.library_logits(again, source), expected, atol=2e-5)
    assert again.get_labels_dict() == library.LABELS


def test_one_output_is_a_regression(source, tmp_path):
    theirs = library.adapted(source, SEQ_BN, head={'num_labels': 1, 'id2label': None})
    theirs.save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert folder.task == {'name': 'regression'}
    expected = library.library_logits(theirs, source)
    np.testing.assert_allclose(library.our_logits(folder, source), expected, atol=2e-5)
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    again = library.loaded_by_library(source, tmp_path / 'b')
    np.testing.assert_allclose(library.library_logits(again, source), expected, atol=2e-5)


@pytest.mark.parametrize('layers', [1, 2])
def test_heads_that_answer_questions_both_ways(source, tmp_path, layers):
    theirs = source.model()
    theirs.add_adapter('ad', config=SEQ_BN)
    theirs.add_qa_head('ad', layers=layers)
    library.randomise(source, theirs, 1)
    theirs.set_active_adapters('ad')
    ids, mask = library.texts(source)

    def answers(model):
        with torch.no_grad():
            found = model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
        return np.stack([found.start_logits.numpy(), found.end_logits.numpy()], -1)[mask]

    theirs.save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert folder.task == {'name': 'question_answering'}
    np.testing.assert_allclose(
        library.our_outputs(folder, source)[mask], answers(theirs), atol=2e-5
    )
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    again = library.loaded_by_library(source, tmp_path / 'b')
    np.testing.assert_allclose(answers(again), answers(theirs), atol=2e-5)


@pytest.mark.parametrize(
    ('labels', 'scheme'), [(['O', 'B-X', 'I-X'], 'bio'), (['NOUN', 'VERB'], 'none')]
)
def test_heads_that_tag_both_ways(source, tmp_path, labels, scheme):
    theirs = source.model()
    theirs.add_adapter('ad', config=SEQ_BN)
    options = {'layers': len(labels) - 1, 'id2label': dict(enumerate(labels))}
    theirs.add_tagging_head('ad', num_labels=len(labels), **options)
    library.randomise(source, theirs, 1)
    theirs.set_active_adapters('ad')
    theirs.eval()
    mask = library.texts(source)[1]
    expected = library.library_logits(theirs, source)[mask]
    theirs.save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert folder.task == {'name': 'tagging', 'labels': labels}
    assert tasks.from_json(folder.task).scheme == scheme
    np.testing.assert_allclose(library.our_outputs(folder, source)[mask], expected, atol=2e-5)
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    again = library.loaded_by_library(source, tmp_path / 'b')
    np.testing.assert_allclose(library.library_logits(again, source)[mask], expected, atol=2e-5)
    assert again.get_labels_dict() == dict(enumerate(labels))


FIXED = {
    'bert': transformers.BertForSequenceClassification,
    'roberta': transformers.RobertaForSequenceClassification,
}


@pytest.mark.parametrize('family', FIXED)
def test_heads_of_plain_models(tmp_path, family):
    """What a model for sequence classification of `transformers` saves with its adapter."""
    pad = {'roberta': {'pad_token_id': 1}}.get(family, {})
    source = library.write_source(tmp_path / family, family, num_labels=3, **pad)
    source.config.id2label = library.LABELS
    source.config.label2id = {label: i for i, label in library.LABELS.items()}
    model = FIXED[family](source.config)
    model.load_state_dict(source.tensors, strict=False)
    adapters.init(model)
    model.add_adapter('ad', config=SEQ_BN)
    library.randomise(source, model, 1)
    model.set_active_adapters('ad')
    model.eval()
    expected = library.library_logits(model, source)
    model.save_adapter(str(tmp_path / 'a'), 'ad', with_head=True)
    path = tmp_path / 'a' / 'head_config.json'
    assert json.loads(path.read_text())['config'] is None
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert folder.task['labels'] == list(library.LABELS.values())
    np.testing.assert_allclose(library.our_logits(folder, source), expected, atol=2e-5)
    library.edit(path, label2id=None)
    nameless = adapterhub.load(tmp_path / 'a', source.loaded)
    assert nameless.task['labels'] == ['LABEL_0', 'LABEL_1', 'LABEL_2']


OTHERS = {
    'multiple_choice': lambda model: model.add_multiple_choice_head('ad'),
    'masked_lm': lambda model: model.add_masked_lm_head('ad'),
    # Of one class, which is none to tell from others.
    'tagging': lambda model: model.add_tagging_head('ad', num_labels=1),
    'multilabel_classification': lambda model: model.add_classification_head(
        'ad', num_labels=1, multilabel=True
    ),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_other_heads_are_left_out_and_said(source, tmp_path, caplog, kind):
    model = source.model()
    model.add_adapter('ad', config=SEQ_BN)
    OTHERS[kind](model)
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert (folder.head, folder.task, folder.head_params) == ({}, {}, {})
    assert re.search(f'a head of kind {kind!r} (with .*)?is not supported, so it', caplog.text)
    assert folder.adapter_params


def test_a_head_on_a_missing_pooler_is_left_out(source, tmp_path, caplog):
    theirs = library.adapted(source, SEQ_BN, head={'use_pooler': True})
    theirs.save_adapter(str(tmp_path / 'a'), 'ad')
    config = dataclasses.replace(source.loaded.config, pooler=False)
    without = dataclasses.replace(source.loaded, config=config)
    assert adapterhub.load(tmp_path / 'a', without).head == {}
    assert 'needs a pooler' in caplog.text


@pytest.fixture(scope='module')
def saved(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp('saved') / 'a'
    library.adapted(source, SEQ_BN).save_adapter(str(directory), 'ad', use_safetensors=True)
    return directory


def head_config(**changes):
    def change(directory):
        path = directory / 'head_config.json'
        config = json.loads(path.read_text())['config'] | changes
        library.edit(path, config={k: v for k, v in config.items() if v != 'absent'})

    return change


def head_tensors(change):
    def rewrite(directory):
        path = directory / 'model_head.safetensors'
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


MISTAKES = {
    'num_labels': (head_config(num_labels=4), 'num_labels=4'),
    'labels without bound': (
        head_config(num_labels=10**12, label2id=None),
        'num_labels=1000000000000, but the tensors beside it hold',
    ),
    'layers without bound': (head_config(layers=10**12), 'layers=1000000000000, but'),
    'no layers': (head_config(layers='absent'), 'layers=None'),
    'layers of text': (head_config(layers='two'), "layers='two'"),
    'no layer': (head_config(layers=0), 'layers is 0'),
    'three layers': (head_config(layers=3), 'heads.ad.7.weight is missing'),
    'one layer': (head_config(layers=1), 'is unexpected'),
    'activation': (head_config(activation_function='step'), "unknown activation 'step'"),
    'activation of numbers': (head_config(activation_function=3), 'activation_function=3'),
    'dropout': (head_config(dropout_prob=1.5), 'dropout is 1.5'),
    'dropout of text': (head_config(dropout_prob='a'), "dropout_prob='a'"),
    'three ends of an answer': (
        head_config(head_type='question_answering', use_pooler='absent', bias='absent'),
        'num_labels=3; answers have 2, a start and an end',
    ),
    'labels': (head_config(label2id={'a': 0, 'b': 1, 'c': 1}), 'label2id'),
    'labels in lists': (head_config(label2id={'a': [0], 'b': 1, 'c': 2}), 'label2id'),
    'labels of text': (head_config(label2id={'a': 'x', 'b': 1, 'c': 2}), 'label2id'),
    'empty label': (head_config(label2id={'': 0, 'b': 1, 'c': 2}), 'label2id'),
    'labels of a list': (head_config(label2id=['a', 'b', 'c']), 'label2id'),
    'shape': (
        head_tensors(lambda t: t.update({'heads.ad.4.bias': torch.ones(5)})),
        r'heads\.ad\.4\.bias has shape \(5,\), expected \(3,\)',
    ),
    'not finite': (
        head_tensors(lambda t: t.update({'heads.ad.4.bias': torch.full((3,), torch.nan)})),
        'not finite',
    ),
    'integers': (
        head_tensors(lambda t: t.update({'heads.ad.4.bias': torch.ones(3, dtype=torch.int32)})),
        'holds int32',
    ),
    'missing': (head_tensors(lambda t: t.pop('heads.ad.4.bias')), 'heads.ad.4.bias is missing'),
    'another hidden size': (
        lambda d: library.edit(d / 'head_config.json', hidden_size=64),
        'its hidden_size is 64',
    ),
    'not JSON': (lambda d: (d / 'head_config.json').write_text('{'), 'is not JSON'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_head_that_is_not_what_it_says_is_refused(source, saved, tmp_path, mistake):
    change, expected = MISTAKES[mistake]
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path)
    with pytest.raises(ValueError, match=expected):
        adapterhub.load(tmp_path, source.loaded)


@pytest.mark.parametrize('name', ['head_config.json', 'model_head.safetensors'])
def test_half_a_head_is_refused(source, saved, tmp_path, name):
    for path in saved.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=name.split('.')[0]):
        adapterhub.load(tmp_path, source.loaded)
