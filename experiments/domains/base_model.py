"""An encoder-decoder to begin with: a pretrained encoder, a fresh decoder and its own tokenizer.

What comes out is a folder like any checkpoint's: two BERTs of the model type encoder-decoder. It
knows nothing yet of what it shall write; training all of it is the caller's.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from adapters_jax import files, params
from adapters_jax.interop import hub, language_heads
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.models import families
from adapters_jax.models.backbone import shapes

PAD, START, END = '<pad>', '<s>', '</s>'
_SIGMA = 0.02  # of fresh matrices, as BERT's
_FILES = ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.txt')


def write(
    folder: Path, encoder: str, texts: Iterable[str], layers: int, words: int, seed: int
) -> None:
    """Write an encoder-decoder whose decoder is random.

    `texts` are what the decoder's tokenizer is made of: byte pairs, `words` of them. The decoder
    has the encoder's widths, and `layers` of its own.
    """
    source = hub.locate(encoder)
    tokenizer = _train_tokenizer(texts, words)
    config = _config(json.loads((source / hub.CONFIG).read_text('utf-8')), tokenizer, layers)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hub.CONFIG).write_text(json.dumps(config, indent=2))
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    own = folder / hub.WRITER
    own.mkdir(exist_ok=True)
    tokenizer.save(str(own / 'tokenizer.json'))
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'pad_token': PAD}
    settings |= {'bos_token': START, 'eos_token': END, 'clean_up_tokenization_spaces': False}
    (own / 'tokenizer_config.json').write_text(json.dumps(settings))
    # Last: the weights tell that the model is whole.
    _write_tensors(folder, config, params.flatten(load_backbone(encoder).params), seed)


def _train_tokenizer(texts: Iterable[str], words: int) -> tokenizers.Tokenizer:
    """Return a tokenizer of byte pairs (Sennrich et al. 2016) that loses nothing of a text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, START, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=words, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f'$A {END}', special_tokens=[(END, special.index(END))]
    )
    return tokenizer


def _config(
    encoder: dict[str, Any], tokenizer: tokenizers.Tokenizer, layers: int
) -> dict[str, Any]:
    """Return the config of both."""
    plain = {'model_type': 'bert'} | encoder
    decoder = plain | {
        'vocab_size': tokenizer.get_vocab_size(),
        'num_hidden_layers': layers,
        'max_position_embeddings': 128,
        'pad_token_id': 0,
        'is_decoder': True,
        'add_cross_attention': True,
    }
    return {
        'model_type': 'encoder-decoder',
        'architectures': ['EncoderDecoderModel'],
        'is_encoder_decoder': True,
        'encoder': plain,
        'decoder': decoder,
        'decoder_start_token_id': 1,
        'pad_token_id': 0,
        'eos_token_id': 2,
    }


def _write_tensors(
    folder: Path, config: dict[str, Any], known: dict[str, np.ndarray], seed: int
) -> None:
    """Write the encoder's own tensors, and random ones for the rest."""
    own, rng = families.read_config(config), np.random.default_rng(seed)
    expected = {path: leaf.shape for path, leaf in params.flatten(shapes(own)).items()}
    encoders = {p: x for p, x in known.items() if p in expected and not p.startswith('pooler')}

    def leaf(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if path in encoders and _of_encoder(path, own.layers):
            return np.asarray(encoders[path], np.float32)
        if path.endswith(('kernel', 'embedding')):
            return (_SIGMA * rng.standard_normal(shape)).astype(np.float32)
        return np.full(shape, float(path.endswith('scale')), np.float32)

    tensors = {}
    for theirs, (ours, transposed) in families.tensor_names(own).items():
        value = leaf(ours, expected[ours])
        tensors[theirs] = np.ascontiguousarray(value.T if transposed else value)
    hidden = own.block.hidden
    head = {
        'transform/kernel': (hidden, hidden),
        **dict.fromkeys(('transform/bias', 'norm/scale', 'norm/bias'), (hidden,)),
        'words/bias': (own.written,),
    }
    fresh = params.unflatten({path: leaf(path, shape) for path, shape in head.items()})
    with files.atomic(folder / 'model.safetensors') as temporary:
        save_file(tensors | language_heads.write(fresh, own.family), temporary)


def _of_encoder(path: str, layers: int) -> bool:
    """Tell whether a leaf is the encoder's: its layers come first."""
    first = path.split('/')[0]
    return first == 'embeddings' or (
        first.startswith('layer_') and int(first.removeprefix('layer_')) < layers
    )
