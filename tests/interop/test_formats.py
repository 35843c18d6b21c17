"""What all commands do with a folder of whichever kind: its backbone's name, and merging."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import peft
import pytest
import torch
import torch_families
import transformers
from library_families import our_folder
from torch_families import CASES

from adapters_jax.interop import adapterhub, decoder_heads, formats, hub
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.interop.peft import folder as of_peft
from adapters_jax.models.heads import VOCABULARY, HeadConfig

CONFIG = 'adapter_config.json'


def write_model(directory, name, **options):
    """Write a random model of a family, with its scores of words if it has such."""
    case = CASES[name]
    model = (case.headed or case.bare)(
        case.config(**case.options | options, attn_implementation='eager')
    ).eval()
    model.generation_config = transformers.GenerationConfig()
    torch_families.randomise(model, 0)
    if hasattr(model, 'final_logits_bias'):
        model.final_logits_bias = torch.linspace(-1, 1, 61)[None]
    model.save_pretrained(directory)
    return directory


def write_adapter(directory, base, kind, text='lora[r=2]'):
    folder = our_folder(load_backbone(str(base)), text)
    return formats.save(folder, directory, load_backbone(str(base)), kind)


@pytest.fixture(scope='module')
def bert(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp('bert') / 'base', 'bert')


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def named(directory, kind, name):
    """Change the name that a foreign folder gives its backbone."""
    path = directory / CONFIG
    key = {'peft': 'base_model_name_or_path', 'adapterhub': 'model_name'}[kind]
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: name}))
    return directory


@pytest.mark.parametrize('name', ['t5-gated', 'marian', 'encoder-decoder'])
def test_a_merged_adapter_of_others_keeps_the_scores_of_words(tmp_path, name):
    base = write_model(tmp_path / 'base', name)
    write_adapter(tmp_path / 'a', base, 'adapters_jax')  # which has no head
    folder, loaded = formats.load(tmp_path / 'a')
    formats.save(folder, tmp_path / 'merged', loaded, 'merged')
    auto = transformers.AutoModelForSeq2SeqLM
    model, report = auto.from_pretrained(tmp_path / 'merged', output_loading_info=True)
    missing = [key for key in report['missing_keys'] if 'pooler' not in key]  # nothing reads it
    assert not missing and not report['unexpected_keys']
    plain = auto.from_pretrained(base).state_dict()
    found = model.state_dict()
    head = [key for key in plain if any(x in key for x in ('lm_head', 'final_logits', 'predict'))]
    assert head
    for key in head:
        np.testing.assert_array_equal(found[key], plain[key], err_msg=key)


def test_a_merged_adapter_of_peft_writes_as_peft_does(tmp_path):
    base = write_model(tmp_path / 'base', 't5-gated')
    auto = transformers.AutoModelForSeq2SeqLM
    config = peft.LoraConfig(task_type='SEQ_2_SEQ_LM', r=2, target_modules=['q', 'v'])
    model = peft.get_peft_model(auto.from_pretrained(base), config).eval()
    with torch.no_grad():
        for parameter in (x for x in model.parameters() if x.requires_grad):
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / 'a')
    folder, loaded = formats.load(tmp_path / 'a')
    formats.save(folder, tmp_path / 'merged', loaded, 'merged')
    merged = auto.from_pretrained(tmp_path / 'merged').eval()
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        found = merged(input_ids=ids, decoder_input_ids=ids).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_checkpoint_without_scores_of_words_is_merged_without_them(tmp_path):
    case = CASES['t5-gated']
    model = case.bare(case.config(**case.options))
    model.save_pretrained(tmp_path / 'base')
    write_adapter(tmp_path / 'a', tmp_path / 'base', 'adapters_jax')
    formats.save(*_held(tmp_path / 'a', tmp_path / 'merged'), 'merged')
    config = json.loads((tmp_path / 'merged' / 'config.json').read_text())
    assert config['architectures'] == ['T5Model']


def _held(source, target):
    folder, loaded = formats.load(source)
    return folder, target, loaded


@pytest.mark.parametrize('trained', [False, True])
def test_trained_scores_of_words_are_not_dropped_in_silence(tmp_path, caplog, trained):
    base = write_model(tmp_path / 'base', 't5-gated')
    loaded = load_backbone(str(base))
    words = decoder_heads.read(loaded)
    if trained:
        words['words']['kernel'] = words['words']['kernel'] + 1
    head = HeadConfig(pooling=VOCABULARY).to_json()
    folder = dataclasses.replace(our_folder(loaded, 'lora[r=2]'), head=head, head_params=words)
    formats.save(folder, tmp_path / 'a', loaded, 'peft')
    assert ('--format=adapterhub, merged and adapters_jax keep them' in caplog.text) == trained


@pytest.mark.parametrize('kind', ['peft', 'adapterhub'])
def test_another_backbone_than_the_folders_own_is_said(bert, tmp_path, caplog, kind):
    write_adapter(tmp_path / 'a', bert, kind)
    with caplog.at_level(logging.WARNING):
        formats.load(tmp_path / 'a', str(bert))
        formats.load(tmp_path / 'a', f'{bert.parent}/../{bert.parent.name}/base')
    assert not caplog.records
    named(tmp_path / 'a', kind, 'google/electra-small')
    formats.load(tmp_path / 'a', str(bert))
    assert f"the backbone 'google/electra-small' and is used over '{bert}'" in caplog.text


@pytest.mark.parametrize('kind', ['peft', 'adapterhub'])
@pytest.mark.parametrize(
    ('own', 'place'),
    [
        ('bert-base-uncased', 'bert-base-uncased'),
        ('google/bert_x', 'models--google--bert_x/snapshots/1234'),
    ],
)
def test_a_copy_does_not_give_its_place_to_what_is_written(
    bert, tmp_path, caplog, kind, own, place
):
    write_adapter(tmp_path / 'a', bert, kind)
    copy = shutil.copytree(bert, tmp_path / place)
    named(tmp_path / 'a', kind, own)
    folder, loaded = formats.load(tmp_path / 'a', str(copy))
    assert not caplog.records
    assert folder.backbone['name'] == own
    formats.save(folder, tmp_path / 'peft', loaded, 'peft')
    assert of_peft.backbone_name(tmp_path / 'peft') == own
    formats.save(folder, tmp_path / 'hub', loaded, 'adapterhub')
    assert adapterhub.backbone_name(tmp_path / 'hub') == own


def test_a_name_that_is_a_place_gives_way_to_where_the_copy_is(bert, tmp_path):
    write_adapter(tmp_path / 'a', bert, 'adapters_jax')
    copy = shutil.copytree(bert, tmp_path / 'copy')
    _, loaded = formats.load(tmp_path / 'a', str(copy))
    assert loaded.name == str(copy)
    path = tmp_path / 'a' / CONFIG
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {'backbone': values['backbone'] | {'name': 'org/bert'}}))
    _, loaded = formats.load(tmp_path / 'a', str(copy))
    assert loaded.name == 'org/bert'  # the fingerprint says that it is


def test_two_repositories_of_one_name_are_two(bert):
    def same(own, given):
        return formats._same_backbone(own, dataclasses.replace(load_backbone(bert), name=given))

    assert same('bert-base-uncased', 'google-bert/bert-base-uncased')
    assert same('minilm', 'sentence-transformers/all-MiniLM-L6-v2')
    assert not same('me/bert', 'you/bert')
    assert not same('minilm', str(bert))  # whose weights are others


@pytest.mark.parametrize('kind', ['peft', 'adapterhub'])
def test_others_know_a_short_name_as_its_repository(bert, tmp_path, kind):
    repository = 'sentence-transformers/all-MiniLM-L6-v2'
    assert (hub.published_name('minilm'), hub.short_name(repository)) == (repository, 'minilm')
    assert hub.published_name('x/y') == hub.short_name('x/y') == 'x/y'
    loaded = dataclasses.replace(load_backbone(str(bert)), name='minilm')
    formats.save(our_folder(loaded, 'lora[r=2]'), tmp_path / 'a', loaded, kind)
    assert repository in (tmp_path / 'a' / CONFIG).read_text()
    assert formats.FOREIGN[kind].backbone_name(tmp_path / 'a') == 'minilm'


def test_another_name_for_the_adapter(bert, tmp_path):
    write_adapter(tmp_path / 'ours', bert, 'adapters_jax')
    write_adapter(tmp_path / 'peft', bert, 'peft')
    write_adapter(tmp_path / 'hub', bert, 'adapterhub')
    for kind in ('ours', 'peft', 'hub'):
        assert formats.load(tmp_path / kind, name='other')[0].name == 'other'
