import numpy as np
import pytest
import safetensors.torch
import torch
from torch_families import CASES, inputs, models, texts

from adapters_jax.interop import hf_export
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.models.backbone import Backbone, Inputs
from adapters_jax.models.families import FAMILIES, read_config
from adapters_jax.models.text import buckets, sines

SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]


def of_kind(*kinds):
    return [name for name, case in CASES.items() if case.kind in kinds]


def assert_near(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.std() > 0.2
        np.testing.assert_allclose(mine, theirs, atol=5e-5, rtol=0)


def test_every_family_is_tried_here():
    variants = {'electra-even', 't5-gated', 'vit-unbiased'}
    assert (set(CASES) - variants) | {'xlm-roberta', 'camembert', 'mt5'} == set(FAMILIES)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', of_kind('text'))
def test_hidden_states_of_encoders(name, seed):
    theirs, loaded, _ = models(name, seed)
    ids, real = texts(4, 13, loaded.config.pad_id, seed)
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(real).long(),
            output_hidden_states=True,
        )
    found = Backbone(loaded.config).apply(
        {'params': loaded.params}, ids, mask=real[:, None, None], all_hidden=True
    )
    assert_near(found, [state.numpy() for state in expected.hidden_states])


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', of_kind('images'))
def test_hidden_states_of_images(name, seed):
    theirs, loaded, _ = models(name, seed)
    pixels = inputs(name, seed=seed)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels), output_hidden_states=True)
    model, variables = Backbone(loaded.config), {'params': loaded.params}
    found = model.apply(variables, pixels.transpose(0, 2, 3, 1), all_hidden=True)
    states = [*expected.hidden_states[:-1], expected.last_hidden_state]
    assert_near(found, [state.numpy() for state in states])
    pooled = model.apply(variables, found[-1][:, 0], method='pool')
    np.testing.assert_allclose(pooled, expected.pooler_output, atol=5e-5, rtol=0)


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', of_kind('pairs', 'sound'))
def test_hidden_states_of_encoders_and_decoders(name, seed):
    theirs, loaded, _ = models(name, seed)
    pad = loaded.config.pad_id
    target, written = texts(4, 9, pad, seed + 10)
    sound = CASES[name].kind == 'sound'
    if sound:
        values = inputs(name, 4, seed)
        given, mask = {'input_features': torch.from_numpy(values)}, None
    else:
        values, real = texts(4, 13, pad, seed)
        mask = real[:, None, None]
        given = {
            'input_ids': torch.from_numpy(values).long(),
            'attention_mask': torch.from_numpy(real).long(),
        }
    with torch.no_grad():
        expected = theirs(
            **given,
            decoder_input_ids=torch.from_numpy(target).long(),
            decoder_attention_mask=torch.from_numpy(written).long(),
            output_hidden_states=True,
        )
    found = Backbone(loaded.config).apply(
        {'params': loaded.params},
        values,
        mask=mask,
        target=Inputs(target, mask=written[:, None, None]),
        target_mask=mask,
        all_hidden=True,
    )
    states = [*expected.encoder_hidden_states, *expected.decoder_hidden_states]
    assert_near(found, [state.numpy() for state in states])


def test_a_tied_tensor_may_be_written_twice_but_not_with_two_contents(tmp_path):
    model, loaded, _ = models('bart')
    model.save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    tensors = safetensors.torch.load_file(file)
    words = model.shared.weight.detach().clone()
    for twice in (words, words + 1):
        safetensors.torch.save_file(
            tensors | {'shared.weight': words, 'decoder.embed_tokens.weight': twice.clone()}, file
        )
        if twice is words:
            again = load_backbone(str(tmp_path)).params['embeddings']['word']['embedding']
            np.testing.assert_array_equal(again, loaded.params['embeddings']['word']['embedding'])
    with pytest.raises(ValueError, match=r'two tensors for shared\.weight'):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ('model_type', 'change', 'message'),
    [
        ('bart', {'encoder_ffn_dim': 12}, 'encoder_ffn_dim=12 and decoder_ffn_dim=52'),
        ('marian', {'share_encoder_decoder_embeddings': False}, 'one vocabulary for both sides'),
        ('t5', {'feed_forward_proj': 'odd-gelu'}, "feed_forward_proj is 'odd-gelu'"),
        ('whisper', {'d_model': 30}, 'hidden size 30 is not a multiple'),
        ('vit', {'image_size': 13}, r'\(13, 13\), which patches of 4 pixels do not cover'),
    ],
)
def test_a_config_that_cannot_be_served_is_named(model_type, change, message):
    hf = CASES[model_type].config(**CASES[model_type].options).to_dict()
    with pytest.raises(ValueError, match=message):
        read_config(hf | change)
    with pytest.raises(ValueError, match=f'lacks the key .*which {model_type} needs'):
        read_config({'model_type': model_type})


@pytest.mark.parametrize('width', [6, 7])
def test_sines_are_those_of_transformers(width):
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    table = MarianSinusoidalPositionalEmbedding(9, width)
    table._init_weight()
    found = sines(np.arange(9)[None], width)[0]
    np.testing.assert_allclose(found, table.weight.detach(), atol=1e-6)


@pytest.mark.parametrize('both_ways', [True, False])
def test_buckets_are_those_of_transformers(both_ways):
    from transformers.models.t5.modeling_t5 import T5Attention

    apart = np.arange(-300, 300)[None]
    for count, distance in ((32, 128), (8, 10), (6, 40)):
        expected = T5Attention._relative_position_bucket(
            torch.from_numpy(apart), both_ways, count, distance
        )
        np.testing.assert_array_equal(buckets(apart, count, distance, both_ways), expected)


@pytest.mark.parametrize('name', of_kind('pairs', 'sound'))
def test_a_model_that_is_written_is_read_by_transformers_as_it_was(name, tmp_path):
    theirs, _, _ = models(name, headed=True)
    theirs.save_pretrained(tmp_path / 'theirs')
    loaded = load_backbone(str(tmp_path / 'theirs'))
    hf_export.save(loaded.params, loaded, tmp_path / 'ours', ({}, {}))
    again = type(theirs).from_pretrained(tmp_path / 'ours')
    state = theirs.state_dict()
    assert again.state_dict().keys() == state.keys()
    for key, tensor in again.state_dict().items():
        if 'pooler' in key:  # of the first of two BERTs, with which nobody computes
            continue
        np.testing.assert_array_equal(tensor, state[key], err_msg=key)
