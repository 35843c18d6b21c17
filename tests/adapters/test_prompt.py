"""Prompt tuning computes what `adapters` and `peft` compute, and what more words would."""

import dataclasses
import functools
import json

import adapters
import datasets
import jax
import jax.numpy as jnp
import live_models
import numpy as np
import peft
import pytest
import reference
import small_bert
import tiny
import tokenizers
import torch
import transformers

from adapters_jax.adapters.attention import AttentionAdapter, SideAttentionAdapter
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.union import Union
from adapters_jax.data import tokenize
from adapters_jax.model import Model
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.heads import HeadConfig

TOLERANCE = 2e-5
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'is', 'it', 'praise', 'or', 'not']


def with_prompt(mask, count=5):
    """Return which columns count: those of the prompt and of the text."""
    return np.concatenate([np.ones((len(mask), count), bool), mask], axis=1)


@pytest.mark.parametrize('family', ['bert', 'roberta'])
@pytest.mark.parametrize('combine', ['prefix', 'prefix_after_bos'])
def test_as_in_adapters(family, combine):
    options = {'prompt_length': 5, 'combine': combine}
    model = live_models.adapters_model(adapters.PromptTuningConfig(**options), family)
    prompt = model.prompt_tuning.prompt_tunings['a'].prompt_embedding.weight
    tree = {'embeddings': {'prompt': reference.to_array(prompt)}}
    ids, mask = reference.texts(model)
    found = live_models.our_hidden(PromptTuning(**options), tree, model, ids, mask)
    expected = reference.torch_hidden(model, ids, mask)
    assert live_models.difference(found, expected, with_prompt(mask)) <= TOLERANCE


PEFT = {
    'random': functools.partial(peft.PromptTuningConfig),
    'p_tuning_mlp': functools.partial(
        peft.PromptEncoderConfig, encoder_reparameterization_type='MLP', encoder_hidden_size=11
    ),
    'p_tuning_lstm': functools.partial(
        peft.PromptEncoderConfig,
        encoder_reparameterization_type='LSTM',
        encoder_hidden_size=11,
        encoder_num_layers=1,
        encoder_dropout=0.0,
    ),
}


@pytest.mark.parametrize('family', ['bert', 'roberta'])
@pytest.mark.parametrize('kind', PEFT)
def test_as_in_peft(family, kind):
    """P-tuning, too, is a prompt once its network has been run."""
    config = PEFT[kind](task_type='FEATURE_EXTRACTION', num_virtual_tokens=5)
    model = live_models.peft_model(config, family)
    tree = {'embeddings': {'prompt': saved(model)}}
    ids, mask = reference.texts(model)
    method = PromptTuning(prompt_length=5, site='words')
    found = live_models.our_hidden(method, tree, model, ids, mask)
    expected = reference.torch_hidden(model, ids, mask)
    assert live_models.difference(found, expected, with_prompt(mask)) <= TOLERANCE


def saved(model):
    return reference.to_array(model.get_prompt_embedding_to_save('default'))


def test_logits_and_token_types_as_in_peft():
    sizes = live_models.SIZES | {'num_labels': 3}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    config = peft.PromptTuningConfig(task_type='SEQ_CLS', num_virtual_tokens=5)
    theirs = peft.get_peft_model(model, config).eval()
    reference.randomise(theirs, 3)
    columns = tiny.batch([[7], [4], [9]], 9)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(columns['input_ids']).long(),
            attention_mask=torch.tensor(columns['segments'] > 0).long(),
            token_type_ids=torch.tensor(columns['token_type_ids']).long(),
        ).logits

    method = PromptTuning(prompt_length=5, site='words')
    ours = Model(reference.our_config(model), method, HeadConfig('pooler'), outputs=3)
    classifier = theirs.base_model.classifier.modules_to_save['default']
    dense = {
        'kernel': reference.to_array(classifier.weight, flip=True),
        'bias': reference.to_array(classifier.bias),
    }
    params = {
        'backbone': live_models.backbone_tree(model),
        'adapters': {'default': {'embeddings': {'prompt': saved(theirs)}}},
        'heads': {'default': {'dense_0': dense}},
    }
    found = jax.jit(ours.apply)(params, columns)[:, 0]
    assert columns['token_type_ids'].any()
    np.testing.assert_allclose(found, expected.numpy(), atol=TOLERANCE, rtol=0)


@pytest.fixture
def tokenizer_dir(tmp_path):
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizers.BertWordPieceTokenizer(ids).save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'bert'}))
    settings = {'tokenizer_class': 'BertTokenizer'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    return str(tmp_path)


@pytest.mark.parametrize('length', [3, 7, 20])
@pytest.mark.parametrize('library', ['adapters', 'peft'])
def test_a_text_to_start_from_as_in_the_libraries(library, length, tokenizer_dir):
    """The text has seven tokens, two of them special; it is cut, fits, and is repeated."""
    text = 'is it praise or not'
    if library == 'adapters':
        model = reference.torch_model(tokenizer_name_or_path=tokenizer_dir)
        options = {'prompt_length': length, 'prompt_init': 'from_string', 'prompt_init_text': text}
        model.add_adapter('a', config=adapters.PromptTuningConfig(**options))
        weight = model.prompt_tuning.prompt_tunings['a'].prompt_embedding.weight
        expected, site = reference.to_array(weight), 'embeddings'
    else:
        model = transformers.BertModel(transformers.BertConfig(**live_models.SIZES))
        config = peft.PromptTuningConfig(
            task_type='FEATURE_EXTRACTION',
            num_virtual_tokens=length,
            prompt_tuning_init='TEXT',
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=tokenizer_dir,
        )
        expected, site = saved(peft.get_peft_model(model, config)), 'words'
    method = PromptTuning(
        prompt_length=length, prompt_init='from_string', prompt_init_text=text, site=site
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_dir)
    prepared = method.prepare(lambda text: tokenizer(text)['input_ids'])
    assert prepared.prompt_init_ids == (2, 4, 5, 6, 7, 8, 3)
    backbone = live_models.backbone_tree(model)
    dimensions = reference.our_config(model).dimensions
    tree = prepared.init(jax.random.key(0), dimensions, backbone)
    np.testing.assert_array_equal(tree['embeddings']['prompt'], expected)


def test_a_text_is_encoded_once():
    method = PromptTuning(prompt_init='from_string', prompt_init_text='is it', prompt_length=2)
    prepared = method.prepare(lambda text: [4, 5])
    assert prepared == dataclasses.replace(method, prompt_init_ids=(4, 5))
    assert prepared.prepare(lambda text: [7]) is prepared
    assert PromptTuning().prepare(lambda text: [7]) == PromptTuning()
    with pytest.raises(ValueError, match="prompt_init_text='is it' has no tokens"):
        method.prepare(lambda text: [])
    start = functools.partial(small_bert_init, backbone=small_bert.backbone())
    with pytest.raises(ValueError, match='let `prepare` find the tokens of the text first'):
        start(method)
    with pytest.raises(ValueError, match=r'has \[50\], but the vocabulary has the words 0 to 49'):
        start(method.prepare(lambda text: [3, 50]))


def small_bert_init(method, backbone=None, seed=0):
    tree = method.init(jax.random.key(seed), small_bert.DIMENSIONS, backbone or {})
    return np.asarray(tree['embeddings']['prompt'])


def test_random_words_to_start_from():
    backbone = small_bert.backbone()
    table = np.asarray(backbone['embeddings']['word']['embedding'])
    method = PromptTuning(prompt_init='vocabulary', prompt_length=40)
    drawn = [small_bert_init(method, backbone, seed) for seed in (0, 1)]
    rows = [np.argmax((p[:, None] == table).all(-1), axis=1) for p in drawn]
    for prompt, row in zip(drawn, rows, strict=True):
        np.testing.assert_array_equal(table[row], prompt)
        assert len(set(row.tolist())) == 40
    assert (rows[0] != rows[1]).any()
    with pytest.raises(ValueError, match="more than the vocabulary's 50 words"):
        small_bert_init(dataclasses.replace(method, prompt_length=51), backbone)


def test_random_numbers_to_start_from():
    prompt = small_bert_init(PromptTuning(prompt_length=200))
    assert 0.49 < np.abs(prompt).max() <= 0.5
    assert abs(prompt.mean()) < 0.02
    scaled = small_bert_init(PromptTuning(prompt_length=200, random_uniform_scale=3))
    np.testing.assert_allclose(scaled, 6 * prompt, rtol=1e-5, atol=1e-6)
    seeded = PromptTuning(init_weights_seed=5)
    np.testing.assert_array_equal(small_bert_init(seeded), small_bert_init(seeded, seed=1))
    assert (small_bert_init(PromptTuning()) != small_bert_init(PromptTuning(), seed=1)).all()


def crossed(**quick):
    """Return each name with both ways to combine; that which is not given is for slow tests."""
    return [
        pytest.param(name, how, marks=[pytest.mark.slow] * (how != first))
        for name, first in quick.items()
        for how in ('prefix', 'prefix_after_bos')
    ]


COUNT = 4
LAYOUTS = crossed(alone='prefix', row='prefix', square='prefix_after_bos')
SITES = crossed(embeddings='prefix', words='prefix_after_bos')


def as_words(backbone, prompt):
    """Return a backbone in which the prompt's vectors are the last words of the vocabulary."""
    table = jnp.concatenate([backbone['embeddings']['word']['embedding'], prompt])
    return backbone | {'embeddings': backbone['embeddings'] | {'word': {'embedding': table}}}


def prompted(combine):
    """Return a text and its tags, and both with the prompt's words (tag 0) among them."""
    index = 0 if combine == 'prefix' else 1
    (text,), tags = small_bert.texts([6]), np.array([1, 2, 0, 1, 2, 1])
    own, none = np.arange(50, 50 + COUNT), np.zeros(COUNT, int)
    return text, tags, np.insert(text, index, own), np.insert(tags, index, none)


@pytest.mark.parametrize(('layout', 'combine'), LAYOUTS)
def test_at_words_it_is_what_more_words_would_be(combine, layout):
    """Whatever the mask's layout, and with another adapter that looks at words and tags."""
    method = PromptTuning(prompt_length=COUNT, combine=combine, site='words')
    other = AttentionAdapter(size=8, heads=2, tags=3)
    union = Union(members=(method, other))
    backbone = small_bert.backbone()
    tree = union.init(jax.random.key(0), small_bert.DIMENSIONS, backbone)
    tree = small_bert.perturb(tree, 0, 0.3)
    wide = as_words(backbone, tree['prompt_tuning']['embeddings']['prompt'])
    config = dataclasses.replace(small_bert.CONFIG, vocabulary=50 + COUNT)
    text, tags, long, long_tags = prompted(combine)
    expected = run(other, tree['attention'], wide, long[None], None, long_tags[None], config)
    ids, inputs = layouts(text, layout)
    tags = np.pad(tags, (0, ids.shape[1] - len(tags)))[None]
    found = run(union, tree, backbone, ids, inputs.get('mask'), tags)
    np.testing.assert_allclose(found[0, : len(long)], expected[0], atol=TOLERANCE, rtol=0)


def layouts(text, layout):
    if layout == 'alone':
        return text[None], {}
    make = small_bert.padded if layout == 'row' else small_bert.packed
    return make([text], 9)


@functools.partial(jax.jit, static_argnums=(0, 6))
def run(method, tree, backbone, ids, mask, tags=None, config=small_bert.CONFIG):
    sites = bind(method, tree, None)
    return Backbone(config).apply({'params': backbone}, ids, mask=mask, tags=tags, sites=sites)


@pytest.mark.parametrize(
    'combine', [pytest.param('prefix', marks=pytest.mark.slow), 'prefix_after_bos']
)
def test_after_the_norm_a_padded_text_has_the_states_it_has_alone(combine):
    method = PromptTuning(prompt_length=COUNT, combine=combine)
    other = AttentionAdapter(size=8, heads=2, tags=3)
    union = Union(members=(method, other))
    backbone = small_bert.backbone()
    tree = union.init(jax.random.key(0), small_bert.DIMENSIONS, backbone)
    tree = small_bert.perturb(tree, 0, 0.3)
    (text,) = small_bert.texts([6])
    tags = np.array([[1, 2, 0, 1, 2, 1, 0, 0, 0]])
    alone = run(union, tree, backbone, text[None], None, tags[:, :6])
    for layout in ('row', 'square'):
        ids, inputs = layouts(text, layout)
        found = run(union, tree, backbone, ids, inputs['mask'], tags)
        np.testing.assert_allclose(found[0, : 6 + COUNT], alone[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('other', [AttentionAdapter(), SideAttentionAdapter()])
def test_after_the_norm_it_must_come_before_who_looks_at_the_text(other):
    prompt = PromptTuning(prompt_length=COUNT)
    given = jax.random.key(0), small_bert.DIMENSIONS, small_bert.backbone()
    tree = jax.eval_shape(lambda: Union(members=(other, prompt)).init(*given))

    def states(tree, members):
        return run(Union(members=members), tree, small_bert.backbone(), np.ones((1, 3), int), None)

    with pytest.raises(ValueError, match='inserted here; list prompt_tuning first in the union'):
        jax.eval_shape(lambda tree: states(tree, (other, prompt)), tree)
    found = jax.eval_shape(lambda tree: states(tree, (prompt, other)), tree)
    assert found.shape == (1, 3 + COUNT, 24)


@pytest.mark.parametrize(('site', 'combine'), SITES)
def test_heads_take_the_first_vector_or_the_mean_of_the_text(site, combine):
    method = PromptTuning(prompt_length=COUNT, combine=combine, site=site)
    columns = tiny.batch([[3], [6]], 8)
    heads = {pooling: tiny.model(method, HeadConfig(pooling)) for pooling in ('cls', 'mean')}
    params = tiny.params(heads['cls'])
    sites = bind(method, params['adapters']['default'], None)
    hidden = jax.jit(
        lambda: Backbone(tiny.CONFIG).apply(
            {'params': params['backbone']},
            columns['input_ids'],
            columns['token_type_ids'],
            columns['positions'],
            (columns['segments'] > 0)[:, None, None, :],
            sites=sites,
        )
    )()
    assert hidden.shape == (2, 8 + COUNT, 16)
    dense = params['heads']['default']['dense_0']
    index = 0 if combine == 'prefix' else 1
    for pooling, model in heads.items():
        found = jax.jit(model.apply)(params, columns)[:, 0]
        for row, length in enumerate((3, 6)):
            text = np.delete(hidden[row], np.s_[index : index + COUNT], axis=0)[:length]
            pooled = hidden[row, 0] if pooling == 'cls' else text.mean(0)
            expected = pooled @ dense['kernel'] + dense['bias']
            np.testing.assert_allclose(found[row], expected, atol=TOLERANCE, rtol=0)


def test_only_the_prompt_is_trained_and_all_layers_serve_it():
    model = tiny.model(PromptTuning(prompt_length=COUNT))
    assert not model.method.packable
    params = tiny.params(model)
    assert model.trunk(params).layer == 0
    shapes = jax.tree.map(jnp.shape, params['adapters']['default'])
    assert shapes == {'embeddings': {'prompt': (COUNT, 16)}}
    columns = tiny.batch([[3], [6]], 8)
    gradient = jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, columns)).sum()))(params)
    prompt = gradient['adapters']['default']['embeddings']['prompt']
    assert (np.abs(prompt).max(1) > 0).all()


def test_a_text_for_which_no_position_is_left_is_refused(tokenizer_dir):
    texts = datasets.Dataset.from_dict({'text_a': ['is it']})
    tokenizer = tokenize.load_tokenizer(tokenizer_dir)
    for site, left in (('embeddings', 32), ('words', 28)):
        model = tiny.model(PromptTuning(prompt_length=COUNT, site=site))
        assert model.text_positions == left
        with pytest.raises(ValueError, match=f'max_length is {left + 1}, but the model has {left}'):
            tokenize.encode(texts, tokenizer, max_length=left + 1, positions=left)
        tiny.params(tiny.model(PromptTuning(prompt_length=31, site=site)))
    with pytest.raises(ValueError, match="with site='words' leaves no position for the text"):
        tiny.params(tiny.model(PromptTuning(prompt_length=32, site='words')))


def test_word_vectors_of_another_width_than_the_hidden_states():
    dimensions = dataclasses.replace(small_bert.DIMENSIONS, word=8)
    table = np.random.default_rng(0).standard_normal((dimensions.vocabulary, 8))
    words = {'embeddings': {'word': {'embedding': table.astype(np.float32)}}}
    for site in ('words', 'embeddings'):  # both are before the vectors get the hidden size
        for start in ('random_uniform', 'vocabulary'):
            method = PromptTuning(site=site, prompt_init=start)
            tree = method.init(jax.random.key(0), dimensions, words)
            assert tree['embeddings']['prompt'].shape == (10, 8)


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'prompt_length': 0}, 'prompt_length=0 is not at least 1'),
        ({'random_uniform_scale': -1.0}, 'random_uniform_scale=-1.0 is negative'),
        ({'prompt_init': 'from_string'}, 'without prompt_init_text; give the text to start from'),
        ({'combine': 'suffix'}, "combine='suffix' is not valid; expected 'prefix' or"),
        ({'site': 'block'}, "site='block' is not valid; expected 'embeddings' or 'words'"),
        ({'prompt_init_ids': [1.5]}, 'expected a list, each item a whole number or None'),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PromptTuning(**options)


@pytest.mark.parametrize(
    ('site', 'init'), [('words', 'random_uniform'), ('embeddings', 'vocabulary')]
)
def test_words_are_not_looked_for_where_sound_or_an_image_is_read(site, init):
    sound = dataclasses.replace(small_bert.DIMENSIONS, reads_words=False)
    method = PromptTuning(prompt_length=2, site=site, prompt_init=init)
    with pytest.raises(ValueError, match='about vectors of words, and the backbone reads none'):
        method.init(jax.random.key(0), sound, {})


def test_words_to_start_from_are_as_large_as_those_of_the_text():
    """mBART multiplies the vectors of its table by the root of their width."""
    large = dataclasses.replace(small_bert.DIMENSIONS, word_scale=3.0)
    method = PromptTuning(prompt_length=4, site='words', prompt_init='vocabulary')
    plain, scaled = (
        method.init(jax.random.key(0), dimensions, small_bert.backbone())['embeddings']['prompt']
        for dimensions in (small_bert.DIMENSIONS, large)
    )
    np.testing.assert_allclose(scaled, 3 * plain, rtol=1e-6)
