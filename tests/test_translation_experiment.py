"""The parts of the experiment on translation: its base model, its texts, its table."""

import json
import zipfile

import numpy as np
import torch
import toy
import transformers

from adapters_jax.data import parallel, tokenize
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.models.backbone import Backbone, Inputs
from adapters_jax.params import flatten
from experiments.domains import base_model, interface_texts, translation

TEXTS = ['Ein Hund läuft über die grüne Wiese.', 'Zwei Männer spielen „Fußball“ – draußen.'] * 20


def test_a_base_model_is_an_encoder_with_a_fresh_decoder(tmp_path):
    encoder = toy.write_backbone(tmp_path / 'bert', layers=2)
    base_model.write(tmp_path / 'base', encoder, TEXTS, layers=1, words=300, seed=0)
    loaded, source = load_backbone(str(tmp_path / 'base')), flatten(load_backbone(encoder).params)
    found = flatten(loaded.params)
    same = {p for p in source if p in found and np.array_equal(found[p], source[p])}
    assert same == {p for p in source if not p.startswith('pooler')}
    assert loaded.config.layers == 2 and loaded.config.depth == 3
    tokenizer = tokenize.load_writer(loaded.directory)
    for text in (*TEXTS[:2], 'Żółw 🐢 123'):  # whatever it is, nothing of it is lost
        ids = tokenizer(text)['input_ids']
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    theirs = transformers.EncoderDecoderModel.from_pretrained(tmp_path / 'base').eval()
    ids, target = np.array([[5, 6, 7]]), np.array([[1, 9, 8, 7]])
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(ids),
            decoder_input_ids=torch.from_numpy(target),
            output_hidden_states=1,
        )
    mine = Backbone(loaded.config).apply({'params': loaded.params}, ids, target=Inputs(target))
    np.testing.assert_allclose(mine, expected.decoder_hidden_states[-1], atol=5e-5)


def test_strings_are_those_that_are_translated_and_plain(tmp_path, monkeypatch):
    entries = {f'String {i}': f'Text {i}' for i in range(60)}
    odd = {'<b>Bold</b>': 'Fett', 'Yes': '', '%s of %s': '%s von %s'}
    text = 'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
    for source, target in (entries | odd).items():
        text += f'msgid "{source}"\nmsgstr "{target}"\n\n'
    text += '#, fuzzy\nmsgid "Guess"\nmsgstr "Geraten"\n'
    with zipfile.ZipFile(tmp_path / 'x.whl', 'w') as wheel:
        wheel.writestr('django/conf/locale/de/LC_MESSAGES/django.po', text)
        wheel.writestr('django/conf/locale/fr/LC_MESSAGES/django.po', text.replace('Text', 'Mot'))
    monkeypatch.setattr(interface_texts.wheels, 'fetch', lambda *pin: tmp_path / 'x.whl')
    sizes = interface_texts.write(tmp_path / 'de', 'de')
    found = parallel.load({'dir': str(tmp_path / 'de'), 'quoting': 'none'})
    assert sizes == {name: len(split) for name, split in found.items()} and all(sizes.values())
    pairs = {row['text_a']: row['target'] for split in found.values() for row in split}
    assert pairs == entries
    interface_texts.write(tmp_path / 'fr', 'fr')
    other = parallel.load({'dir': str(tmp_path / 'fr'), 'quoting': 'none'})
    assert other['test']['text_a'][:] == found['test']['text_a'][:]


def test_the_table_has_a_row_for_each_run():
    scores = {translation.CAPTIONS: {'bleu': 31.25, 'chrf': 55.0}}
    row = {'title': 'a', 'scores': scores, 'seconds': 61.0, 'trained': 50, 'total': 200}
    result = {
        'rows': {'a': row, 'b': row | {'trained': 0, 'title': 'b'}},
        'sizes': {'train': 9, 'test': 7},
        'epochs': 8.0,
        'tuning_epochs': 20.0,
        'trials': {'lora': {'nll': {'0.003': 4.19, '0.01': 3.88}, 'rate': 0.01}},
        'trial_epochs': 12.0,
        'language_epochs': 1.0,
        'base_seconds': 600.0,
        'hardware': 'this',
        'commit': 'abcdef0123',
    }
    table = translation.render(json.loads(json.dumps(result)))
    assert '| a | 50 (25 %) | 61 |  |  | 31.2 | 55.0 |  |  |  |  |' in table
    assert '| b | - | 61 |' in table
    assert 'after 12 epochs: `lora` 0.01 (3.88) or 0.003 (4.19). Of 1 rows' in table
    assert '--language_epochs=1 --methods=`' in table  # seed 0 needs no option
    assert '--methods= --seed=3`' in translation.render(result | {'seed': 3})


def test_the_rate_is_the_one_with_the_lower_cross_entropy(tmp_path, monkeypatch):
    seen = {}

    def train(config, workdir):
        seen[workdir.name] = rate = config.optimizer.learning_rate
        assert config.training.epochs == 12
        return {'metrics': {'validation': {'nll': 5 - rate if config.seed else 5 + rate}}}

    monkeypatch.setattr(translation, 'train', train)
    for seed, best in ((0, 3e-3), (1, 1e-2)):
        found = translation.choose_rate(
            tmp_path, 'lora', translation.Lesson('strings', '', 12, seed)
        )
        assert found['rate'] == best and found['nll'][best] == min(found['nll'].values())
    assert seen == {'lora_0.003': 3e-3, 'lora_0.01': 1e-2}
