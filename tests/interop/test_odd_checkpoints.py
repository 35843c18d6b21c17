"""Checkpoints whose config.json says what published ones of their family do not say."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_families
import transformers
from torch_families import CASES

from adapters_jax.adapters import registry
from adapters_jax.decoding import rules
from adapters_jax.interop import decoder_heads, hf_export
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.backbone import Backbone, Inputs
from adapters_jax.models.heads import HeadConfig
from adapters_jax.models.text import buckets
from adapters_jax.tasks.writing import generation_settings

UNTIED = {'tie_word_embeddings': False}
ODD = [
    *((family, UNTIED) for family in ('bart', 'mbart', 'marian', 'whisper')),
    ('whisper', {'scale_embedding': True}),
    ('t5', {'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 20}),
]


def made(family, folder, headed=True, **options):
    """Write a random model of a family with other options, and return it."""
    case = CASES[family]
    config = case.config(**case.options | options, attn_implementation='eager')
    model = (case.headed if headed else case.bare)(config).eval()
    torch_families.randomise(model, 1)
    model.save_pretrained(folder)
    return model


def given(family):
    """Return what is read, which of it is no padding, and what is written so far."""
    rng = np.random.default_rng(2)
    target = rng.integers(3, 55, (3, 25)).astype(np.int32)
    if family == 'whisper':
        return rng.standard_normal((3, 10, 24)).astype(np.float32), None, target
    pad = CASES[family].options.get('pad_token_id', 0)
    return *torch_families.texts(3, 30, pad, 3), target


def scores(model, family):
    """Return the scores of words that torch computes."""
    x, real, target = given(family)
    name = 'input_features' if family == 'whisper' else 'input_ids'
    mask = {} if real is None else {'attention_mask': torch.tensor(real).long()}
    x = torch.tensor(x) if family == 'whisper' else torch.tensor(x).long()
    with torch.no_grad():
        found = model(**{name: x}, **mask, decoder_input_ids=torch.tensor(target).long())
    return found.logits.numpy()


@pytest.mark.parametrize(('family', 'options'), ODD)
def test_scores_are_those_of_transformers(tmp_path, family, options):
    expected = scores(made(family, tmp_path / 'a', **options), family)
    loaded = load_backbone(tmp_path / 'a')
    words = decoder_heads.read(loaded)
    model = Model(loaded.config, registry.create('head'), HeadConfig(), loaded.config.written)
    params = {'backbone': loaded.params, 'adapters': {}, 'heads': {'default': words}}
    x, real, target = given(family)
    mask = None if real is None else jnp.asarray(real)[:, None, None, :]
    hidden = Backbone(loaded.config).apply(
        {'params': loaded.params}, x, mask=mask, target=Inputs(target), target_mask=mask
    )
    found = model.score_words(params, hidden)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize('family', ['bart', 'mbart', 'marian', 'whisper'])
def test_untied_words_are_written_as_they_were_read(tmp_path, family):
    expected = scores(made(family, tmp_path / 'a', **UNTIED), family)
    loaded = load_backbone(tmp_path / 'a')
    hf_export.save(loaded.params, loaded, tmp_path / 'b', ({}, {}))
    again, told = CASES[family].headed.from_pretrained(tmp_path / 'b', output_loading_info=True)
    assert not told['missing_keys'] and not told['unexpected_keys']
    np.testing.assert_allclose(scores(again.eval(), family), expected, atol=1e-4)


@pytest.mark.parametrize('both_ways', [True, False])
@pytest.mark.parametrize(('count', 'distance'), [(32, 128), (6, 100), (8, 200), (128, 100), (4, 9)])
def test_buckets_are_those_of_transformers(count, distance, both_ways):
    apart = np.arange(-300, 301)[None]
    reference = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    expected = reference(torch.tensor(apart), both_ways, count, distance).numpy()
    np.testing.assert_array_equal(buckets(jnp.asarray(apart), count, distance, both_ways), expected)


def test_sides_of_patches_may_be_given_one_by_one(tmp_path):
    made('vit', tmp_path / 'a', headed=False, patch_size=[4, 4])
    assert load_backbone(tmp_path / 'a').config.stem.patch == 4
    for key, value, told in (
        ('patch_size', [4, 6], r'patch_size is \[4, 6\]; only square'),
        ('pooler_act', 'relu', "pooler_act is 'relu'; only 'tanh'"),
    ):
        config = json.loads((tmp_path / 'a' / 'config.json').read_text())
        shutil.copytree(tmp_path / 'a', tmp_path / key)
        (tmp_path / key / 'config.json').write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=told):
            load_backbone(tmp_path / key)


def test_a_decoder_may_leave_its_start_open(tmp_path):
    made('bart', tmp_path / 'a')
    path = tmp_path / 'a' / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'decoder_start_token_id': None}))
    assert load_backbone(tmp_path / 'a').config.decoder.start_id == 2


def test_rules_for_texts_are_those_of_one_file(tmp_path):
    old = {'no_repeat_ngram_size': 2, 'forced_eos_token_id': 2}
    (tmp_path / 'config.json').write_text(json.dumps(old))
    assert dict(rules.from_hf(generation_settings(tmp_path))) == {'repeated': 2, 'last': 2}
    (tmp_path / 'generation_config.json').write_text('{"forced_bos_token_id": 0}')
    assert dict(rules.from_hf(generation_settings(tmp_path))) == {'first': 0}


def test_forbidden_words_come_together_and_what_is_not_used_is_named():
    settings = {'bad_words_ids': [[45], [3, 4]], 'suppress_tokens': [3], 'repetition_penalty': 1.2}
    assert dict(rules.from_hf(settings)) == {'never': (3, 45)}
    assert rules.unused(settings) == ['repetition_penalty', 'bad_words_ids of several tokens']
    assert rules.unused({'bad_words_ids': [[45]], 'repetition_penalty': 1.0}) == []
    of_marian = {'bad_words_ids': [[60]], 'eos_token_id': 0, 'renormalize_logits': True}
    assert dict(rules.from_hf(of_marian)) == {'never': (60,), 'renormalised': True}


def test_ends_may_be_a_list_and_are_no_forbidden_words():
    assert dict(rules.from_hf({'forced_eos_token_id': [5, 2]})) == {'last': 2}
    assert dict(rules.from_hf({'forced_eos_token_id': [], 'suppress_tokens': []})) == {'never': ()}
    for end in (2, [2, 7]):
        settings = {'bad_words_ids': [[2], [4]], 'eos_token_id': end}
        assert dict(rules.from_hf(settings)) == {'never': (4,)}
    assert not dict(rules.from_hf({'bad_words_ids': [[2]], 'eos_token_id': 2}))
