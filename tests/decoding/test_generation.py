"""Texts written by random models, against `transformers`: the very same words."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch_families import CASES, VARIANTS, inputs, models, texts

from adapters_jax import params as trees
from adapters_jax import sharding
from adapters_jax.adapters import registry
from adapters_jax.adapters.bank import Bank
from adapters_jax.decoding.rules import Rules
from adapters_jax.decoding.search import Search, search
from adapters_jax.generation import generate
from adapters_jax.model import Model
from adapters_jax.models.backbone import LAYOUTS
from adapters_jax.models.heads import HeadConfig
from adapters_jax.training.placement import Placement

WRITERS = ['bart', 'mbart', 'marian', 't5', 't5-gated', 'whisper', 'encoder-decoder']


@functools.cache
def pair(name, seed=0):
    """Return a torch model with scores of words, our model of it, and its parameters."""
    theirs, loaded, head = models(name, seed, headed=True)
    model = Model(loaded.config, registry.create('head'), HeadConfig(), loaded.config.written)
    return theirs, model, {'backbone': loaded.params, 'adapters': {}, 'heads': {'default': head}}


def batch_of(name, rows, seed, pad):
    """Return the same inputs for torch and for us."""
    if CASES[name].kind == 'sound':
        sound = inputs(name, rows, seed)
        return {'input_features': torch.from_numpy(sound)}, {'sound': sound}
    ids, real = texts(rows, 11, pad, seed)
    ours = {'input_ids': ids, 'segments': real.astype(np.int32), 'starts': np.zeros((rows, 1), int)}
    return {
        'input_ids': torch.from_numpy(ids).long(),
        'attention_mask': torch.from_numpy(real).long(),
    }, ours


def rules_of(name, **options):
    _, model, _ = pair(name)
    return Rules((model.config.decoder.start_id,), end_of(name), model.config.pad_id, 12, **options)


@functools.partial(jax.jit, static_argnames=('model', 'rules', 'how', 'cached'))
def write(model, params, batch, rules, how, key=None, cached=True):
    """Return what `generate` does, as one program: step by step it would be hundreds."""
    return generate(model, params, batch, rules, how, key, cached)


@functools.cache
def end_of(name):
    """Return the id that a random model writes in about every second text: the end."""
    _, model, params = pair(name)
    rules = Rules((model.config.decoder.start_id,), -1, model.config.pad_id, 12)
    _, batch = batch_of(name, 100, 3, model.config.pad_id)
    tokens = write(model, params, batch, rules, Search()).tokens[:, 0]
    shares = [(tokens == word).any(1).mean() for word in range(model.config.written)]
    return int(np.abs(np.array(shares) - 0.5).argmin())


def theirs_of(model, given, rules, **options):
    """Return what torch writes behind the start, padded to our length."""
    config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=rules.max_length,
        min_new_tokens=rules.min_length or None,
        eos_token_id=rules.end_id,
        pad_token_id=rules.pad_id,
        decoder_start_token_id=rules.start[0],
        forced_bos_token_id=rules.first if rules.first >= 0 else None,
        forced_eos_token_id=rules.last if rules.last >= 0 else None,
        suppress_tokens=list(rules.never) or None,
        begin_suppress_tokens=list(rules.not_first) or None,
        no_repeat_ngram_size=rules.repeated,
        renormalize_logits=rules.renormalised,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    with torch.no_grad():  # Whisper's own method adds rules for long recordings
        found = transformers.GenerationMixin.generate(model, **given, generation_config=config)
    tokens = found.sequences[:, 1:].numpy()
    wide = np.full((len(tokens), rules.max_length), rules.pad_id)
    wide[:, : tokens.shape[1]] = tokens
    # Where the padding's id is 0, its beam search fills up with the end.
    after = np.cumsum(wide == rules.end_id, axis=1) - (wide == rules.end_id) > 0
    wide[after] = rules.pad_id
    return wide, found


@pytest.mark.parametrize(
    ('name', 'cached'),
    [
        pytest.param(name, cached, marks=[pytest.mark.slow] * (name != 'bart'))
        for name in WRITERS  # of the others, beams say the same
        for cached in (True, False)
    ],
)
def test_the_likeliest_words_are_those_of_transformers(name, cached):
    theirs, model, params = pair(name)
    rules = rules_of(name)
    given, batch = batch_of(name, 100 if cached else 40, 3, model.config.pad_id)
    expected, _ = theirs_of(theirs, given, rules)
    found = write(model, params, batch, rules, Search(), cached=cached)
    np.testing.assert_array_equal(found.tokens[:, 0], expected)
    ends = (expected == rules.end_id).any(1)
    assert 0.1 < ends.mean() < 0.9


def _repeats(name, how):
    return name in VARIANTS or how in HOWS[3:] or (name != 'bart' and how != HOWS[0])


HOWS = [(False, 1.0), (True, 1.0), ('never', 2.0), (False, -0.5), ('never', -0.5)]


@pytest.mark.parametrize(
    ('name', 'how', 'penalty'),
    [
        pytest.param(name, *how, marks=[pytest.mark.slow] * _repeats(name, how))
        for name in WRITERS
        for how in HOWS
    ],
)
def test_beams_are_those_of_transformers(name, how, penalty):
    theirs, model, params = pair(name)
    rules = rules_of(name)
    search = Search(beams=4, n_best=3, length_penalty=penalty, early_stopping=how)
    given, batch = batch_of(name, 100, 5, model.config.pad_id)
    expected, whole = theirs_of(
        theirs,
        given,
        rules,
        num_beams=4,
        num_return_sequences=3,
        length_penalty=penalty,
        early_stopping=how,
    )
    found = write(model, params, batch, rules, search)
    np.testing.assert_array_equal(found.tokens.reshape(-1, rules.max_length), expected)
    np.testing.assert_allclose(
        found.scores.reshape(-1), whole.sequences_scores.numpy(), rtol=1e-4, atol=1e-4
    )


# ---- drawing words


def test_the_likeliest_of_one_is_no_draw():
    _, model, params = pair('bart')
    rules, (_, batch) = rules_of('bart'), batch_of('bart', 100, 3, model.config.pad_id)
    expected = write(model, params, batch, rules, Search()).tokens
    for narrow in ({'top_k': 1}, {'top_p': 1e-6}):
        how = Search(temperature=2.0, **narrow)
        found = write(model, params, batch, rules, how, jax.random.key(0)).tokens
        np.testing.assert_array_equal(found, expected)


def test_words_are_drawn_as_often_as_the_model_says():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0, 0.5]])
    rules = Rules((0,), 4, 0, 1)

    def counts(rows, **options):
        def step(tokens, written, cache):
            return jnp.broadcast_to(logits, (len(tokens), 5)), cache

        found = search(step, {}, rows, rules, Search(**options), None, jax.random.key(1))
        return np.bincount(np.asarray(found.tokens).reshape(-1), minlength=5) / rows

    def shares(temperature, kept):
        weights = np.where(kept, np.exp(np.asarray(logits[0]) / temperature), 0)
        return weights / weights.sum()

    every = np.ones(5, bool)
    for options, expected in (
        ({'temperature': 1.0}, shares(1.0, every)),
        ({'temperature': 0.5}, shares(0.5, every)),
        ({'temperature': 1.0, 'top_k': 2}, shares(1.0, np.array([1, 1, 0, 0, 0]))),
        # Half of all is the first word's, so that nine tenths take three.
        ({'temperature': 1.0, 'top_p': 0.85}, shares(1.0, np.array([1, 1, 0, 0, 1]))),
    ):
        np.testing.assert_allclose(counts(20_000, **options), expected, atol=0.015)


# ---- adapters


# One behind sub-layers, one among the keys, one that looks along the whole text.
KINDS = ('prefix_tuning', 'attention')
METHODS = ['houlsby', 'lora', 'prefix_tuning', 'ia3', 'unipelt', 'attention', 'loreft', 'bitfit']


@functools.cache
def adapted(method):
    """Return a model with an adapter that matters, and its parameters."""
    _, plain, params = pair('bart')
    model = dataclasses.replace(plain, method=registry.create(method))
    fresh = model.init(jax.random.key(0), params['backbone'])
    trainable, frozen = trees.partition(fresh, model.rules)
    part = 'adapters' if trainable.get('adapters') else 'backbone'
    rng = np.random.default_rng(0)
    trainable[part] = jax.tree.map(
        lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), trainable[part]
    )
    return model, trees.merge(trainable, frozen) | {'heads': params['heads']}


@pytest.mark.parametrize(
    ('method', 'beams'),
    [
        pytest.param(name, beams, marks=[pytest.mark.slow] * (beams == 1 or name not in KINDS))
        for name in METHODS
        for beams in (3, 1)
    ],
)
def test_with_an_adapter_the_cache_changes_nothing(method, beams):
    model, params = adapted(method)
    rules, (_, batch) = rules_of('bart'), batch_of('bart', 12, 4, 1)
    how = Search(beams=beams)
    found = [write(model, params, batch, rules, how, cached=c) for c in (True, False)]
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-4)
    _, plain, without = pair('bart')
    assert np.abs(found[0].scores - write(plain, without, batch, rules, how).scores).max() > 0.01


@pytest.mark.parametrize('name', ['t5', pytest.param('whisper', marks=pytest.mark.slow)])
def test_texts_may_begin_with_several_words(name):
    """As Whisper's do, with the language and what to write; T5 counts how far they are away."""
    _, model, params = pair(name)
    rules = dataclasses.replace(rules_of(name), start=(model.config.decoder.start_id, 5, 7))
    _, batch = batch_of(name, 12, 4, model.config.pad_id)
    found, whole = (
        write(model, params, batch, rules, Search(3, n_best=3), cached=c) for c in (True, False)
    )
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    assert len(np.unique(found.tokens.reshape(-1, 12), axis=0)) > 6


def test_a_text_may_be_as_long_as_the_decoder_has_positions():
    model, params = adapted('lora')
    _, batch = batch_of('bart', 4, 4, 1)
    rules = Rules((2,), end_of('bart'), 1, model.config.decoder.positions, min_length=40)
    found = [write(model, params, batch, rules, Search(), cached=c).tokens for c in (True, False)]
    np.testing.assert_array_equal(*found)
    assert (np.asarray(found[0]) != 1).all()
    longer = dataclasses.replace(rules, max_length=41)
    with pytest.raises(ValueError, match='need 41 positions, but the decoder has 40'):
        generate(model, params, batch, longer, Search())


@pytest.mark.parametrize(
    'method',
    [
        'prefix_tuning',
        pytest.param('houlsby', marks=pytest.mark.slow),
        pytest.param('lora', marks=pytest.mark.slow),
    ],
)
def test_each_row_may_have_an_adapter_of_its_own(method):
    model, params = adapted(method)
    rules, (_, batch) = rules_of('bart'), batch_of('bart', 12, 4, 1)
    own = params['adapters']['default']
    other = jax.tree.map(lambda x: -2 * x, own)  # of a LoRA the product of two must change, too
    bank = Bank(members={'a': model.method, 'b': model.method})
    both = dataclasses.replace(model, method=bank)
    stacked = params | {'adapters': {'default': bank.stack({'a': own, 'b': other})}}
    which = np.array([0, 1, 1, 0, -1, 0, 1, 0, -1, 1, 0, 1], np.int32)
    how = Search(beams=3)
    mixed = write(both, stacked, batch | {'adapter': which}, rules, how)
    _, plain, without = pair('bart')
    alone = {-1: write(plain, without, batch, rules, how).tokens}
    for number, tree in ((0, own), (1, other)):
        given = params | {'adapters': {'default': tree}}
        alone[number] = write(model, given, batch, rules, how).tokens
    for one, two in itertools.combinations(alone.values(), 2):
        assert (one != two).any()
    for row, number in enumerate(which.tolist()):
        np.testing.assert_array_equal(mixed.tokens[row], alone[number][row])


def in_parts(tree):
    leaves = jax.tree.leaves(tree)
    return any(leaf.addressable_shards[0].data.size < leaf.size for leaf in leaves)


@pytest.mark.parametrize('shape', [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_a_sharded_model_writes_the_same(shape):
    model, params = adapted('lora')
    rules, (_, batch) = rules_of('bart'), batch_of('bart', 16, 4, 1)
    how = Search(beams=3)
    expected = write(model, params, batch, rules, how)
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = Placement(mesh, LAYOUTS).frozen(params, jnp.float32)
        split = sharding.put_batch(batch, mesh)
        found = write(model, placed, split, rules, how)
    assert in_parts(split)
    assert in_parts(placed) == (shape != (8, 1, 1))
    np.testing.assert_array_equal(found.tokens, expected.tokens)


# ---- mistakes


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Search(beams=2, n_best=3), 'beams=2 and n_best=3'),
        (lambda: Search(beams=2, temperature=1.0), 'temperature=1.0 with beams=2'),
        *((lambda: Search(early_stopping='now'), 'now'), (lambda: Search(top_p=0.0), 'top_p=0.0')),
        (lambda: Search(beams=2, length_penalty=float('inf')), 'length_penalty=inf; expected'),
        (lambda: Rules((), 1, 0, 5), 'start has no word'),
        (lambda: Rules((1,), 1, 0, 5, min_length=6), 'min_length=6 and max_length=5'),
        (lambda: Rules((1,), 1, 0, 5, repeated=1), 'repeated=1'),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_be_written_is_refused_before_it_is_tried():
    model, params = adapted('lora')
    _, batch = batch_of('bart', 2, 4, 1)
    with pytest.raises(ValueError, match=r'max_length=60 tokens .* the decoder has 40'):
        generate(model, params, batch, Rules((2,), 1, 1, 60), Search())
    with pytest.raises(ValueError, match='no key to draw words with'):
        generate(model, params, batch, Rules((2,), 1, 1, 6), Search(temperature=1.0))
    encoder = dataclasses.replace(model, config=dataclasses.replace(model.config, decoder=None))
    with pytest.raises(ValueError, match='a bart backbone writes no texts'):
        generate(encoder, params, batch, Rules((2,), 1, 1, 6), Search())


@pytest.mark.parametrize('name', ['t5', pytest.param('bart', marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'text',
    ['prompt_tuning[prompt_length=3]', pytest.param('prefix_tuning', marks=pytest.mark.slow)],
)
def test_what_an_adapter_puts_before_the_input_is_seen_while_writing(name, text):
    """With keys kept or computed anew; of T5's prefixes the keys are counted, too."""
    _, model, params = pair(name)
    if text == 'prefix_tuning':
        text += f'[prefix_length=3,bottleneck_size=5,count_keys={name == "t5"}]'
    model = dataclasses.replace(model, method=registry.create(text))
    fresh = model.method.init(jax.random.key(0), model.config.dimensions, params['backbone'])
    params = params | {'adapters': {model.name: fresh}}
    rules, (_, batch) = rules_of(name), batch_of(name, 30, 4, model.config.pad_id)
    how = Search(beams=2)
    kept, anew = (write(model, params, batch, rules, how, cached=c).tokens for c in (True, False))
    np.testing.assert_array_equal(kept, anew)
    others = params | {'adapters': jax.tree.map(lambda x: -x, params['adapters'])}
    assert (kept != write(model, others, batch, rules, how).tokens).any()


@pytest.mark.parametrize(
    'options', [{'top_k': 5}, {'top_p': 0.5}, {'beams': 4, 'top_k': 5}, {'early_stopping': 1}]
)
def test_options_that_would_do_nothing_are_refused(options):
    with pytest.raises(ValueError, match=r'expected (temperature|True, False)'):
        Search(**options)
