"""What `peft` writes for a model of any family computes the same here, and the reverse.

Models with a decoder are those that write texts, and their scores of words are compared, too.
"""

import functools
import json

import library_families as library
import numpy as np
import peft
import peft_reference as theirs
import pytest
import torch
import torch_families
import transformers
from safetensors.numpy import save_file
from torch_families import CASES, VARIANTS

from adapters_jax.interop import decoder_heads
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.interop.peft import folder as ours
from adapters_jax.models import language_head

TOLERANCE = 5e-5
pytestmark = [
    *(pytest.mark.filterwarnings(f'ignore:{m}') for m in theirs.OF_THE_LIBRARY),
    pytest.mark.filterwarnings('ignore:Could not find a config file'),
]
_BART = ('q_proj', 'k_proj', 'v_proj', 'out_proj', 'fc1', 'fc2')
_BERT = ('query', 'key', 'value', 'attention.output.dense', 'intermediate.dense', 'output.dense')
# Queries, keys, values, outputs, and the two projections of the feed-forward network.
PROJECTIONS = {
    'distilbert': ('q_lin', 'k_lin', 'v_lin', 'out_lin', 'lin1', 'lin2'),
    **dict.fromkeys(('roberta', 'electra', 'vit', 'deit'), _BERT),
    **dict.fromkeys(('bart', 'mbart', 'marian', 'whisper'), _BART),
    't5': ('q', 'k', 'v', 'o', 'wi', 'wo'),
    't5-gated': ('q', 'k', 'v', 'o', 'wi_1', 'wo', 'wi_0'),
}
NORMS = {
    'distilbert': ('sa_layer_norm', 'output_layer_norm'),
    **dict.fromkeys(('roberta', 'electra'), ('LayerNorm',)),
    **dict.fromkeys(('vit', 'deit'), ('layernorm_before', 'layernorm_after', 'layernorm')),
    **dict.fromkeys(('t5', 't5-gated'), ('layer_norm', 'final_layer_norm')),
    **dict.fromkeys(
        ('bart', 'mbart', 'marian', 'whisper'),
        ('self_attn_layer_norm', 'encoder_attn_layer_norm', 'final_layer_norm'),
    ),
}
FAMILIES = list(PROJECTIONS)
METHODS = (
    'lora', 'lora everywhere', 'lora patterns', 'lora bias', 'dora', 'vera', 'adalora', 'ia3',
    'norms', 'prompt', 'prefix',
)  # fmt: skip
# One for each kind of place; all methods are compared over all families in the slow tests.
CORE = {'lora everywhere', 'norms', 'prompt', 'prefix'}
OF_T5 = CORE | {'adalora', 'ia3'}
PRESETS = {
    'lora bias': ['lora'],
    'lora everywhere': ['lora'],
    'lora patterns': ['lora'],
    'norms': ['layer_norm'],
    'prefix': ['prefix_tuning_flat'],
    'prompt': ['prompt_tuning'],
}
# What PEFT cannot do by itself, and how it says so.
FAILS = {
    ('distilbert', 'prefix'): (TypeError, "unexpected keyword argument 'past_key_values'"),
    **{(name, 'prompt'): (KeyError, 'None') for name in ('vit', 'deit', 'whisper')},
    **{(name, 'prefix'): (KeyError, 'None') for name in ('vit', 'deit', 'whisper')},
}
DECODERS = [name for name in FAMILIES if CASES[name].headed]


def task_type(name):
    if CASES[name].kind in ('sound', 'images'):
        return None
    return 'SEQ_2_SEQ_LM' if CASES[name].headed else 'FEATURE_EXTRACTION'


def config_of(name, method):
    """Return PEFT's config of a method in a family."""
    everything, task = list(PROJECTIONS[name]), {'task_type': task_type(name)}
    query, key, value, down = (everything[i] for i in (0, 1, 2, 5))
    # Which it does not find in every family's config by itself.
    hidden = {'token_dim': 32, 'num_attention_heads': 4}
    width = hidden | {'token_dim': 20 if name == 'electra' else 32}
    some = {'target_modules': [query, value], **task}
    if method == 'lora patterns':
        block = PATTERN_OF[CASES[name].kind if name != 'distilbert' else name]
        first = f'{block}.0.*{query}' if not name.startswith('t5') else f'encoder.block.0.*{query}'
        return peft.LoraConfig(r=3, lora_alpha=5, rank_pattern={first: 2}, **some)
    return {
        'lora': lambda: peft.LoraConfig(r=3, lora_alpha=5, **some),
        'lora everywhere': lambda: peft.LoraConfig(r=3, target_modules=everything, **task),
        'lora bias': lambda: peft.LoraConfig(r=2, bias='all', **some),
        'dora': lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, **some),
        'vera': lambda: peft.VeraConfig(r=6, d_initial=0.3, **some),
        'adalora': lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, **some),
        'ia3': lambda: peft.IA3Config(
            target_modules=[key, value, down], feedforward_modules=[down], **task
        ),
        'norms': lambda: peft.LNTuningConfig(target_modules=list(NORMS[name]), **task),
        'prompt': lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **task, **width),
        'prefix': lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **task, **hidden),
    }[method]()


PATTERN_OF = {
    'distilbert': 'transformer.layer',
    'text': 'encoder.layer',
    'images': 'encoder.layer',
    'pairs': 'encoder.layers',
    'sound': 'encoder.layers',
}


def fresh(source):
    """Return a model of `transformers` with the backbone's weights, for generation if it can."""
    case = CASES[source.name]
    cls = case.headed or case.bare
    return cls.from_pretrained(source.loaded.directory, attn_implementation='eager').eval()


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp('peft')
    transformers.logging.set_verbosity_error()

    def make(name):
        case = CASES[name]
        config = case.config(**case.options, attn_implementation='eager')
        model = (case.headed or case.bare)(config).eval()
        model.generation_config = transformers.GenerationConfig()
        torch_families.randomise(model, 0)
        model.save_pretrained(root / name)
        return library.Source(name, config, {}, load_backbone(str(root / name)))

    return functools.cache(make)


def _quick(name):
    return OF_T5 if name == 't5' else CORE


def pairs():
    """Return all pairs that the library computes; those of no new kind are slow tests."""
    left = {*FAILS, ('marian', 'prompt'), *((name, 'prefix') for name in DECODERS)}
    # Its projections have no biases, and so do not RMSNorms.
    left |= {(name, 'lora bias') for name in ('t5', 't5-gated')}
    return [
        pytest.param(name, m, marks=torch_families.marks(name, m in _quick(name)))
        for name in FAMILIES
        for m in METHODS
        if (name, m) not in left
    ]


def logits(folder, of, states):
    """Return our scores of words of the decoder's last states."""
    backbone = folder.overlay(of.loaded.params, {})['backbone']
    config = of.loaded.config
    where = 'embeddings' if config.decoder.shared_words else 'decoder_embeddings'
    table = backbone[where]['word']['embedding']
    head = decoder_heads.read(of.loaded)
    return np.asarray(language_head.apply_to_decoder(head, states, table, config.decoder))


def check(folder, of, found, x):
    expected = library.states_of(found)
    states = library.our_states(folder, of, x)
    assert library.difference(states, expected, x) <= TOLERANCE
    if x.target is not None:
        mine, scores = logits(folder, of, states[-1]), found.logits.numpy()
        assert (np.abs(mine - scores) * x.target_mask[..., None]).max() <= TOLERANCE


def shows(holds=True):
    return pytest.mark.shows_family(
        'peft', family='name', parameter='method', presets=PRESETS, holds=holds
    )


@shows()
@pytest.mark.parametrize(('name', 'method'), pairs(), ids=lambda x: x.replace(' ', '-'))
def test_there_and_back(source, tmp_path, name, method):
    of = source(name)
    model = theirs.adapt(fresh(of), config_of(name, method), sigma=0.1)
    x = library.given(of)
    model.save_pretrained(tmp_path / 'a')
    found = library.outputs(model.double(), of, x)
    plain = library.outputs(fresh(of), of, x)
    before, after = library.states_of(plain)[-1], library.states_of(found)[-1]
    assert before.shape != after.shape or np.abs(before - after).max() > 1e-3
    folder = ours.load(tmp_path / 'a', of.loaded, 'mine')
    check(folder, of, found, x)
    ours.save(folder, tmp_path / 'b', of.loaded)
    again = reload(of, tmp_path / 'b', method)
    check(folder, of, library.outputs(again.double(), of, x), x)


def reload(of, directory, method):
    """Return what PEFT makes of a folder of ours; all that is in it is what it would save again."""
    config = json.loads((directory / 'adapter_config.json').read_text())
    assert config['task_type'] == task_type(of.name)
    model = peft.PeftModel.from_pretrained(fresh(of), directory).eval()
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    written = theirs.load_file(directory / 'adapter_model.safetensors')
    copies = {key for key in saved if 'original_module' in key or 'modules_to_save' in key}
    assert set(written) == set(saved) - copies
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, saved[key].detach().numpy(), err_msg=key)
    return model


@shows('fails')
@pytest.mark.slow  # of the library alone
@pytest.mark.parametrize(('name', 'method'), FAILS)
def test_peft_still_fails_by_itself(source, name, method):
    of = source(name)
    error, words = FAILS[name, method]
    with pytest.raises(error, match=words):
        model = theirs.adapt(fresh(of), config_of(name, method))
        library.outputs(model, of, library.given(of))


@shows('differs')
@pytest.mark.parametrize('method', ['prefix'])
@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS))
        for name in DECODERS
        if name != 'whisper'
    ],
)
def test_a_prefix_of_a_decoder_is_refused(source, tmp_path, name, method):
    of = source(name)
    theirs.adapt(fresh(of), config_of(name, method)).save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match='both attentions of a layer share it'):
        ours.load(tmp_path / 'a', of.loaded)
    own = library.our_folder(of.loaded, 'prefix_tuning[flat=True,prefix_length=3]')
    with pytest.raises(ValueError, match='both attentions of a layer share it'):
        ours.save(own, tmp_path / 'b', of.loaded)


def test_a_prompt_before_words_that_lose_their_scale_is_refused(source, tmp_path):
    of = source('marian')
    model = theirs.adapt(fresh(of), config_of('marian', 'prompt'))
    model.save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match='PEFT does not scale the word vectors'):
        ours.load(tmp_path / 'a', of.loaded)
    x = library.given(of)
    words = model.get_input_embeddings()(torch.from_numpy(x.values).long())
    with_prompt = library.outputs(model, of, x).encoder_hidden_states[0][:, 4:]
    alone = library.outputs(fresh(of), of, x).encoder_hidden_states[0]
    positions = alone - 32**0.5 * words  # the model's own sum
    shifted = fresh(of).get_encoder().embed_positions((3, 17))[None, 4:]
    assert torch.allclose(with_prompt, words + shifted, atol=1e-4)
    assert not torch.allclose(with_prompt, words + positions, atol=1e-1)


@pytest.mark.parametrize('name', ['vit', 'whisper'])
def test_a_prompt_among_no_words_is_refused(source, tmp_path, name):
    with pytest.raises(ValueError, match=r'reads no(ne| words)'):
        own = library.our_folder(source(name).loaded, "prompt_tuning[prompt_length=3,site='words']")
        ours.save(own, tmp_path / 'b', source(name).loaded)


CHOSEN = {'t5': ('LORA', 'IA3'), 'bart': ('ADALORA', 'VERA', 'LN_TUNING')}  # quick ones


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] * (kind not in quick))
        for name, quick in CHOSEN.items()
        for kind in ('LORA', 'IA3', 'VERA', 'LN_TUNING', 'ADALORA')
    ],
)
def test_what_peft_chooses_where_nobody_does(source, tmp_path, name, kind):
    """A config without target modules is one with those that PEFT itself resolves."""
    of = source(name)
    cls = {
        'LORA': functools.partial(peft.LoraConfig, r=3),
        'IA3': peft.IA3Config,
        'VERA': functools.partial(peft.VeraConfig, r=6, target_modules=None),
        'LN_TUNING': peft.LNTuningConfig,
        'ADALORA': functools.partial(peft.AdaLoraConfig, init_r=3, target_r=2, total_step=10),
    }[kind]
    model = theirs.adapt(fresh(of), cls(task_type='SEQ_2_SEQ_LM'), sigma=0.1)
    model.save_pretrained(tmp_path / 'a')
    theirs.edit_config(tmp_path / 'a', target_modules=None, feedforward_modules=None)
    x = library.given(of)
    if kind != 'IA3':
        edit = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
        del edit['feedforward_modules']
        (tmp_path / 'a' / 'adapter_config.json').write_text(json.dumps(edit))
    check(ours.load(tmp_path / 'a', of.loaded), of, library.outputs(model, of, x), x)


def test_what_older_peft_stored_with_all_biases(source, tmp_path):
    """It kept all whose name has 'bias' in it, buffers and T5's biases of positions among them."""
    of, path = source('bart'), tmp_path / 'bart' / 'adapter_model.safetensors'
    theirs.adapt(fresh(of), config_of('bart', 'lora bias')).save_pretrained(tmp_path / 'bart')
    expected = ours.load(tmp_path / 'bart', of.loaded)
    buffer = {'base_model.model.final_logits_bias': np.zeros((1, 61), np.float32)}
    save_file(theirs.load_file(path) | buffer, path)
    found = ours.load(tmp_path / 'bart', of.loaded)
    assert theirs.bits(found.backbone_params) == theirs.bits(expected.backbone_params)

    of, path = source('t5'), tmp_path / 't5' / 'adapter_model.safetensors'
    theirs.adapt(fresh(of), config_of('t5', 'lora bias')).save_pretrained(tmp_path / 't5')
    tables = {
        f'base_model.model.{name}': x.numpy()
        for name, x in fresh(of).state_dict().items()
        if 'relative_attention_bias' in name
    }
    assert len(tables) == 2
    plain = theirs.load_file(path)
    save_file(plain | tables, path)
    assert not ours.load(tmp_path / 't5', of.loaded).backbone_params
    save_file(plain | {name: x + 1 for name, x in tables.items()}, path)
    with pytest.raises(ValueError, match=r'older PEFT trained .*relative_attention_bias\.weight'):
        ours.load(tmp_path / 't5', of.loaded)


def test_the_biases_of_a_family_that_has_none(source, tmp_path):
    of = source('t5')
    config = peft.LoraConfig(r=2, bias='lora_only', task_type='SEQ_2_SEQ_LM')
    theirs.adapt(fresh(of), config).save_pretrained(tmp_path / 'a')
    assert not ours.load(tmp_path / 'a', of.loaded).backbone_params


def test_a_family_without_defaults_asks_for_modules(source, tmp_path):
    of = source('whisper')
    model = theirs.adapt(fresh(of), config_of('whisper', 'lora'))
    model.save_pretrained(tmp_path / 'a')
    theirs.edit_config(tmp_path / 'a', target_modules=None)
    with pytest.raises(ValueError, match='PEFT has no choice of its own for LORA on whisper'):
        ours.load(tmp_path / 'a', of.loaded)


def test_a_classifier_of_a_decoder_is_refused(source, tmp_path):
    of = source('bart')
    config = peft.LoraConfig(r=2, target_modules=['q_proj'], modules_to_save=['classifier'])
    theirs.adapt(fresh(of), config).save_pretrained(tmp_path / 'a')
    with pytest.raises(ValueError, match='a classifier of a bart model is not supported'):
        ours.load(tmp_path / 'a', of.loaded)


torch.set_num_threads(1)
