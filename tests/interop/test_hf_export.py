"""Backbones as Hugging Face directories: transformers and this project read them whole."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft_reference as theirs
import pytest
import torch
import transformers
from jax.tree_util import tree_map

from adapters_jax import params
from adapters_jax.adapters.baselines import HeadOnly
from adapters_jax.interop import hf_export, language_heads
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import TOKENS, HeadConfig

HEADS = {
    'bert': [HeadConfig(pooling='pooler', layers=1), HeadConfig(pooling='cls', layers=2)],
    'roberta': [HeadConfig(pooling='cls', layers=2)],
}
LABELS = ['no', 'größer', 'yes']
TASK = {'name': 'classification', 'labels': LABELS}


@pytest.fixture(scope='module', params=['bert', 'roberta'])
def loaded(request, tmp_path_factory):
    base = theirs.make_base(tmp_path_factory.mktemp('base') / request.param, request.param)
    (base / 'vocab.txt').write_text('[PAD]\n')
    (base / 'training_args.bin').write_text('not to be copied')
    return load_backbone(str(base))


def changed(backbone, seed=0):
    """Return a tree as after a merge: every leaf another one."""
    rng = np.random.default_rng(seed)
    return tree_map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), backbone)


def bound(loaded, head, outputs=3):
    """Return a model without adapter, and random parameters of it over a changed backbone."""
    model = Model(config=loaded.config, method=HeadOnly(), head_config=head, outputs=outputs)
    tree = model.init(jax.random.key(0), changed(loaded.params))
    heads = tree_map(lambda x: x + 0.3 * jnp.ones_like(x).cumsum(0) % 0.7, tree['heads'])
    return model, tree | {'heads': heads}


def load_with_transformers(cls, directory):
    transformers.logging.set_verbosity_error()
    model, report = cls.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


def applied(model, tree, ids, mask, types):
    batch = {
        'input_ids': ids.astype(np.int32),
        'token_type_ids': types.astype(np.int32),
        'positions': np.where(mask, np.arange(ids.shape[1]), 0).astype(np.int32),
        'segments': mask.astype(np.int32),
        'starts': np.zeros((len(ids), 1), np.int32),
    }
    return np.asarray(jax.jit(model.apply)(tree, batch))


def compare(model, tree, found):
    ids, mask, types = theirs.texts(found)
    expected = applied(model, tree, ids, mask, types)[:, 0]
    assert np.abs(expected - theirs.torch_outputs(found, ids, mask, types)).max() <= 2e-5


def test_a_bare_backbone(loaded, tmp_path):
    tree = changed(loaded.params)
    assert hf_export.save(tree, loaded, tmp_path / 'out') == tmp_path / 'out'
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    assert names == {'config.json', 'model.safetensors', 'vocab.txt'}
    again = load_backbone(str(tmp_path / 'out'))
    assert again.config == loaded.config
    assert theirs.bits(again.params) == theirs.bits(tree)
    model = load_with_transformers(transformers.AutoModel, tmp_path / 'out')
    assert type(model).__name__ in ('BertModel', 'RobertaModel')
    found = model.state_dict()['encoder.layer.1.output.dense.weight'].numpy()
    np.testing.assert_array_equal(found.T, tree['layer_1']['feed_forward']['down']['kernel'])


def test_classifiers(loaded, tmp_path):
    for head in HEADS[loaded.config.family]:
        model, tree = bound(loaded, head)
        told = (head.to_json(), tree['heads']['default'])
        directory = hf_export.save(tree['backbone'], loaded, tmp_path / head.pooling, told, TASK)
        auto = transformers.AutoModelForSequenceClassification
        found = load_with_transformers(auto, directory)
        assert found.config.id2label == dict(enumerate(LABELS))
        assert found.config.problem_type == 'single_label_classification'
        compare(model, tree, found)
        again = theirs.bits(load_backbone(str(directory)).params)
        own = theirs.bits(tree['backbone'])
        # A head of two layers takes the place of BERT's pooler; RoBERTa's models have none.
        differing = {path for path in own if again.get(path) != own[path]}
        assert differing == ({'pooler/kernel', 'pooler/bias'} if head.pooling == 'cls' else set())


def test_several_classes_at_once(loaded, tmp_path):
    head = HEADS[loaded.config.family][0]
    model, tree = bound(loaded, head)
    told = (head.to_json(), tree['heads']['default'])
    several = TASK | {'name': 'multi_label'}
    hf_export.save(tree['backbone'], loaded, tmp_path / 'out', told, several)
    auto = transformers.AutoModelForSequenceClassification
    found = load_with_transformers(auto, tmp_path / 'out')
    assert found.config.id2label == dict(enumerate(LABELS))
    assert found.config.problem_type == 'multi_label_classification'
    compare(model, tree, found)


def test_a_head_for_another_task_is_left_out(loaded, tmp_path, caplog):
    head = HEADS[loaded.config.family][0]
    _, tree = bound(loaded, head, outputs=1)
    told = (head.to_json(), tree['heads']['default'])
    choices = {'name': 'multiple_choice'}
    hf_export.save(tree['backbone'], loaded, tmp_path / 'out', told, choices)
    assert 'expected a task of classification, image_classification' in caplog.text
    assert 'problem_type' not in json.loads((tmp_path / 'out' / 'config.json').read_text())


@pytest.mark.parametrize(
    ('task', 'outputs', 'auto'),
    [
        ({'name': 'tagging', 'labels': LABELS}, 3, transformers.AutoModelForTokenClassification),
        ({'name': 'question_answering'}, 2, transformers.AutoModelForQuestionAnswering),
    ],
    ids=['tags', 'answers'],
)
def test_heads_on_every_token(loaded, tmp_path, task, outputs, auto):
    model, tree = bound(loaded, HeadConfig(pooling=TOKENS, layers=1), outputs)
    told = (model.head_config.to_json(), tree['heads']['default'])
    hf_export.save(tree['backbone'], loaded, tmp_path / 'out', told, task)
    found = load_with_transformers(auto, tmp_path / 'out')
    ids, mask, types = theirs.texts(found)
    ours = applied(model, tree, ids, mask, types)
    with torch.no_grad():
        given = [torch.from_numpy(np.asarray(x)).long() for x in (ids, mask, types)]
        names = ('input_ids', 'attention_mask', 'token_type_ids')
        said = found(**dict(zip(names, given, strict=True)))
    logits = said.logits if outputs == 3 else torch.stack([said.start_logits, said.end_logits], -1)
    np.testing.assert_allclose(ours[mask], logits.numpy()[mask], atol=2e-5)
    if outputs == 3:
        assert found.config.id2label == dict(enumerate(LABELS))


def test_a_regression(loaded, tmp_path):
    head = HEADS[loaded.config.family][0]
    model, tree = bound(loaded, head, outputs=1)
    told = (head.to_json(), tree['heads']['default'])
    hf_export.save(tree['backbone'], loaded, tmp_path / 'out', told)
    auto = transformers.AutoModelForSequenceClassification
    found = load_with_transformers(auto, tmp_path / 'out')
    assert (found.config.num_labels, found.config.problem_type) == (1, 'regression')
    compare(model, tree, found)


@pytest.mark.parametrize(
    'head', [HeadConfig(), HeadConfig('cls', 3), HeadConfig('cls', 2, activation='relu')], ids=str
)
def test_a_head_that_no_model_has_is_left_out(head, loaded, tmp_path, caplog):
    _, tree = bound(loaded, head)
    told = (head.to_json(), tree['heads']['default'])
    hf_export.save(tree['backbone'], loaded, tmp_path / 'out', told, TASK)
    assert 'is written without it; expected head.pooling=' in caplog.text
    again = load_backbone(str(tmp_path / 'out'))
    assert theirs.bits(again.params) == theirs.bits(tree['backbone'])
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert 'id2label' not in config


def test_mistakes_leave_nothing_behind(loaded, tmp_path):
    _, tree = bound(loaded, HeadConfig('cls', 2))
    told = (HeadConfig('cls', 2).to_json(), tree['heads']['default'])
    with pytest.raises(ValueError, match='the head has 3 outputs, but 2 labels'):
        hf_export.save(
            tree['backbone'], loaded, tmp_path / 'out', told, TASK | {'labels': ['a', 'b']}
        )
    fewer = {name: x for name, x in tree['backbone'].items() if name != 'layer_1'}
    with pytest.raises(ValueError, match='missing or unexpected: layer_1/attention/key/bias'):
        hf_export.save(fewer, loaded, tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_half_precision_is_written_in_full(loaded, tmp_path):
    half = params.cast(loaded.params, jnp.bfloat16)
    hf_export.save(half, loaded, tmp_path / 'out')
    model = load_with_transformers(transformers.AutoModel, tmp_path / 'out')
    assert model.embeddings.word_embeddings.weight.dtype == torch.float32
    found = load_backbone(str(tmp_path / 'out')).params
    assert theirs.bits(found) == theirs.bits(params.cast(half, jnp.float32))


def test_a_family_that_a_table_lacks_is_named(loaded, tmp_path, monkeypatch):
    family = loaded.config.family
    monkeypatch.delitem(hf_export._CLASSES, family)
    with pytest.raises(ValueError, match=rf"model type '{family}' is not known; .*hf_export\.py"):
        hf_export.save(loaded.params, loaded, tmp_path / 'merged')
    monkeypatch.delitem(language_heads._NAMES, family)
    with pytest.raises(ValueError, match=rf'checkpoint of {family} lies.*language_heads\.py'):
        language_heads.exists(loaded)
