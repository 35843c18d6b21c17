"""Heads of PEFT's folders: parts that are named one by one, and outputs for each token."""

import functools
import json
import logging

import jax
import numpy as np
import peft
import peft_reference as theirs
import pytest
import reference
import torch
import torch_families
import transformers
from safetensors.numpy import load_file, save_file
from torch_families import CASES

from adapters_jax import tasks
from adapters_jax.adapters import registry
from adapters_jax.interop import formats
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.interop.peft import folder as ours
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig

pytestmark = [pytest.mark.filterwarnings(f'ignore:{m}') for m in theirs.OF_THE_LIBRARY]
CLASSES, TAGS, ANSWERS = 'SequenceClassification', 'TokenClassification', 'QuestionAnswering'
TARGETS = {'distilbert': ['q_lin', 'v_lin']}
TOLERANCE = 5e-5


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    transformers.logging.set_verbosity_error()  # a new head is what is wanted

    def make(family):
        case = CASES[family]
        model = case.bare(case.config(**case.options))
        torch_families.randomise(model, 0)
        model.save_pretrained(root / family)
        return root / family

    return functools.cache(make)


def fresh(directory, kind, labels=3):
    labels = 2 if kind == ANSWERS else labels
    model = getattr(transformers, f'AutoModelFor{kind}').from_pretrained(
        directory, num_labels=labels
    )
    heads = ('classifier', 'pre_classifier', 'qa_outputs')
    for name, module in model.named_children():
        if name in heads:
            reference.randomise(module, 5)
    return model.eval()


def saved(base, family, kind, directory, **options):
    """Return a model of PEFT with a LoRA, having saved it."""
    options = {'r': 2, 'lora_alpha': 3, 'target_modules': TARGETS.get(family)} | options
    model = theirs.adapt(fresh(base, kind), peft.LoraConfig(**options))
    model.save_pretrained(directory)
    return model


def texts(model):
    ids, mask = reference.texts(model, 0, 3, 9)
    return ids, mask


def torch_outputs(model, tokens):
    """Return the logits [B, 1, C] or, of tokens, [B, T, C]."""
    ids, mask = texts(model)
    with torch.no_grad():
        found = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    if hasattr(found, 'start_logits'):
        return np.stack([found.start_logits.numpy(), found.end_logits.numpy()], -1)
    return found.logits.numpy() if tokens else found.logits.numpy()[:, None]


def our_outputs(folder, loaded, model):
    ids, mask = texts(model)
    own = Model(
        config=loaded.config,
        method=registry.from_json(folder.method),
        head_config=HeadConfig.from_json(folder.head),
        outputs=tasks.from_json(folder.task).num_outputs,
        name=folder.name,
    )
    tree = folder.overlay(loaded.params, own.method.constants(loaded.config.dimensions))
    batch = {
        'input_ids': ids.astype(np.int32),
        'token_type_ids': np.zeros_like(ids, np.int32),
        'positions': np.where(mask, np.arange(ids.shape[1]), 0).astype(np.int32),
        'segments': mask.astype(np.int32),
        'starts': np.zeros((len(ids), 1), np.int32),
    }
    return np.asarray(jax.jit(own.apply)(tree, batch))


def check(folder, loaded, model, tokens=False):
    """Ours and theirs compute the same at what is no padding."""
    counts = texts(model)[1][..., None] if tokens else True
    difference = (our_outputs(folder, loaded, model) - torch_outputs(model, tokens)) * counts
    assert np.abs(difference).max() <= TOLERANCE


PARTS = {
    'distilbert': ['pre_classifier', 'classifier'],
    'roberta': ['classifier.dense', 'classifier.out_proj'],
    'electra': ['classifier.dense', 'classifier.out_proj'],
}


@pytest.mark.parametrize(
    ('family', 'task_type'),
    # With SEQ_CLS PEFT wraps RoBERTa's classifier around its wrapped parts, and cannot read that.
    [('distilbert', 'SEQ_CLS'), ('distilbert', None), ('roberta', None), ('electra', None)],
)
def test_the_parts_of_a_classifier(base, tmp_path, family, task_type):
    directory = base(family)
    options = {'task_type': task_type, 'modules_to_save': list(PARTS[family])}
    model = saved(directory, family, CLASSES, tmp_path / 'a', **options)
    loaded = load_backbone(str(directory))
    folder = ours.load(tmp_path / 'a', loaded)
    assert folder.task['labels'] == ['LABEL_0', 'LABEL_1', 'LABEL_2']
    check(folder, loaded, model)
    ours.save(folder, tmp_path / 'b', loaded)
    again = peft.PeftModel.from_pretrained(fresh(directory, CLASSES), tmp_path / 'b').eval()
    check(folder, loaded, again)


@pytest.mark.parametrize(
    ('family', 'kind'),
    [('bert', TAGS), ('bert', ANSWERS), ('distilbert', ANSWERS), ('electra', TAGS)],
)
def test_outputs_for_each_token_there_and_back(base, tmp_path, family, kind):
    directory = base(family)
    task_type = {TAGS: 'TOKEN_CLS', ANSWERS: 'QUESTION_ANS'}[kind]
    model = saved(directory, family, kind, tmp_path / 'a', task_type=task_type, bias='all')
    loaded = load_backbone(str(directory))
    folder = ours.load(tmp_path / 'a', loaded)
    assert folder.task['name'] == {TAGS: 'tagging', ANSWERS: 'question_answering'}[kind]
    check(folder, loaded, model, tokens=True)
    ours.save(folder, tmp_path / 'b', loaded)
    before, after = (
        json.loads((tmp_path / x / 'adapter_config.json').read_text()) for x in ('a', 'b')
    )
    for key in ('task_type', 'modules_to_save', 'bias'):
        assert after[key] == before[key]
    again = peft.PeftModel.from_pretrained(fresh(directory, kind), tmp_path / 'b').eval()
    check(folder, loaded, again, tokens=True)


def test_a_head_of_two_layers_for_each_token_is_left_out(base, tmp_path, caplog):
    directory = base('bert')
    saved(directory, 'bert', TAGS, tmp_path / 'a', task_type='TOKEN_CLS')
    loaded = load_backbone(str(directory))
    folder = ours.load(tmp_path / 'a', loaded)
    folder.head['layers'] = 2
    ours.save(folder, tmp_path / 'b', loaded)
    assert 'expected head.layers=1' in caplog.text


def test_answers_have_two_outputs(base, tmp_path):
    directory = base('bert')
    saved(directory, 'bert', TAGS, tmp_path / 'a', task_type='TOKEN_CLS')
    theirs.edit_config(tmp_path / 'a', task_type='QUESTION_ANS')
    with pytest.raises(ValueError, match=r'QuestionAnswering: qa_outputs\.weight is missing'):
        ours.load(tmp_path / 'a', load_backbone(str(directory)))


def test_tags_and_kinds_of_images_are_several(base, tmp_path):
    model = theirs.adapt(
        fresh(base('bert'), TAGS, labels=1), peft.LoraConfig(task_type='TOKEN_CLS')
    )
    model.save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match='has one output; tagging is supported from two classes'):
        ours.load(tmp_path / 'a', load_backbone(str(base('bert'))))


@pytest.mark.parametrize(('family', 'task_type'), [('bert', 'CAUSAL_LM'), ('vit', 'TOKEN_CLS')])
def test_other_types_of_task_are_named_before_the_tensors_are_read(
    base, tmp_path, family, task_type
):
    directory = tmp_path / 'a'
    directory.mkdir()
    values = {'peft_type': 'LORA', 'task_type': task_type, 'target_modules': ['query']}
    (directory / 'adapter_config.json').write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"task_type is '{task_type}', whose head is not support"):
        ours.load(directory, load_backbone(str(base(family))))


@pytest.mark.parametrize('family', ['bert', 'vit'])
def test_all_linear_by_name_leaves_tables_alone(base, tmp_path, family):
    """PEFT writes the modules that it found; a config by hand may say it in a word."""
    directory = base(family)
    case = CASES[family]
    model = case.bare.from_pretrained(directory)
    adapted = theirs.adapt(model, peft.LoraConfig(r=2, target_modules='all-linear'))
    adapted.save_pretrained(tmp_path / 'a')
    loaded = load_backbone(str(directory))
    expected = ours.load(tmp_path / 'a', loaded)
    theirs.edit_config(tmp_path / 'a', target_modules='all-linear')
    found = ours.load(tmp_path / 'a', loaded)
    assert found.method == expected.method
    assert theirs.bits(found.adapter_params) == theirs.bits(expected.adapter_params)


def test_a_module_by_its_full_name_is_in_every_layer_to_transform(base, tmp_path):
    directory = base('bert')
    full = 'bert.encoder.layer.0.attention.self.key'
    options = {'target_modules': ['query', full], 'layers_to_transform': [1]}
    model = saved(directory, 'bert', CLASSES, tmp_path / 'a', task_type='SEQ_CLS', **options)
    loaded = load_backbone(str(directory))
    folder = ours.load(tmp_path / 'a', loaded)
    assert set(folder.adapter_params['layer_0']['attention']) == {'key'}
    check(folder, loaded, model)


def test_biases_that_an_older_peft_did_not_save(base, tmp_path, caplog):
    directory = base('bert')
    options = {'task_type': 'SEQ_CLS', 'bias': 'lora_only'}
    saved(directory, 'bert', CLASSES, tmp_path / 'a', **options)
    loaded, path = load_backbone(str(directory)), tmp_path / 'a' / 'adapter_model.safetensors'
    tensors = load_file(path)
    biases = [name for name in tensors if name.endswith('base_layer.bias')]
    assert len(biases) == 6
    some = {name: x for name, x in tensors.items() if name != biases[0]}
    save_file(some, path)
    with pytest.raises(ValueError, match='bias is missing'):
        ours.load(tmp_path / 'a', loaded)
    save_file({name: x for name, x in tensors.items() if name not in biases}, path)
    with caplog.at_level(logging.WARNING):
        folder = ours.load(tmp_path / 'a', loaded)
    assert 'did not save them' in caplog.text
    assert not folder.backbone_params
    model = peft.PeftModel.from_pretrained(fresh(directory, CLASSES), tmp_path / 'a').eval()
    check(folder, loaded, model)


@pytest.mark.parametrize('initialisation', ['mica', 'MiCA', 'Gaussian'])
def test_initialisations_that_leave_the_backbone_alone(base, tmp_path, initialisation):
    directory = base('bert')
    options = {'task_type': 'SEQ_CLS', 'init_lora_weights': initialisation}
    model = saved(directory, 'bert', CLASSES, tmp_path / 'a', **options)
    loaded = load_backbone(str(directory))
    check(ours.load(tmp_path / 'a', loaded), loaded, model)


def test_a_revision_is_said(base, tmp_path, caplog):
    directory = base('bert')
    saved(directory, 'bert', CLASSES, tmp_path / 'a', task_type='SEQ_CLS')
    loaded = load_backbone(str(directory))
    theirs.edit_config(tmp_path / 'a', revision='main')
    ours.load(tmp_path / 'a', loaded)
    assert 'revision' not in caplog.text
    theirs.edit_config(tmp_path / 'a', revision='v2')
    ours.load(tmp_path / 'a', loaded)
    assert "made for the revision 'v2'" in caplog.text


def test_answers_are_found_without_token_types_as_peft_does(base, tmp_path):
    """It takes the token types of a question and its context, and hands them to no model."""
    directory = base('bert')
    model = saved(directory, 'bert', ANSWERS, tmp_path / 'a', task_type='QUESTION_ANS')
    loaded = load_backbone(str(directory))
    folder = ours.load(tmp_path / 'a', loaded)
    check(folder, loaded, model, tokens=True)
    ids, mask = (torch.tensor(x).long() for x in texts(model))
    given = {'input_ids': ids, 'attention_mask': mask}
    types = mask * (torch.arange(9) >= 4)
    plain, typed = model(**given), model(**given, token_type_ids=types)
    assert torch.equal(plain.start_logits, typed.start_logits)
    inside = model.get_base_model()(**given, token_type_ids=types).start_logits
    assert (inside - plain.start_logits).abs().max() > 0.1
    assert folder.task == {'name': 'question_answering', 'token_types': False}


@pytest.mark.parametrize(
    ('family', 'sentences'),
    [('bert', {True: ('get_base_model()', None), False: (None, 'give 0')}), ('distilbert', {})],
)
def test_token_types_that_the_other_side_does_otherwise_are_told(
    base, tmp_path, caplog, family, sentences
):
    directory = base(family)
    saved(directory, family, ANSWERS, tmp_path / 'a', task_type='QUESTION_ANS')
    loaded = load_backbone(str(directory))
    folder = ours.load(tmp_path / 'a', loaded)
    assert folder.task.get('token_types', True) == (family == 'distilbert')
    for given in (True, False):
        folder.task['token_types'] = given
        expected = sentences.get(given, (None, None))
        for format, sentence in zip(('peft', 'merged'), expected, strict=True):
            caplog.clear()
            formats.save(folder, tmp_path / f'{format} {given}', loaded, format)
            assert ('token types' in caplog.text) == bool(sentence)
            assert sentence is None or sentence in caplog.text
