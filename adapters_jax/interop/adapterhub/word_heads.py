"""The heads of AdapterHub folders that score words: those of models with a decoder.

The library has a matrix in each such file, also where a model's scores are products with its word
vectors; ours have one only where it is another (`models.language_head`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapters_jax.interop.adapterhub import store
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.models.heads import VOCABULARY, HeadConfig
from adapters_jax.params import Tree, flatten

KIND = 'seq2seq_lm'


def read(
    values: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    loaded: LoadedBackbone,
    directory: Path,
) -> tuple[dict[str, Any], Tree]:
    """Return the head's description and what is its own; `values` is the whole head_config.json.

    Raises:
        ValueError: layers before the scores, tensors that are not those of the config, or a matrix
            that is not the word vectors' although the checkpoint says that it is.
    """
    path = directory / store.HEAD.config
    layers = store.field(config, 'layers', int, path, 1)
    if layers != 1:
        raise ValueError(f'{path} has layers={layers}; only heads of one layer are supported')
    name, table = store.field(values, 'name', str, path), _table(loaded)
    biased = store.field(config, 'bias', bool, path, False)
    expected = {f'heads.{name}.0.weight': table.shape}
    expected |= {f'heads.{name}.0.bias': table.shape[:1]} if biased else {}
    store.check_tensors(tensors, expected, directory)
    weight = store.copied(tensors[f'heads.{name}.0.weight'])
    tied = np.array_equal(weight, table)
    if loaded.config.decoder.tied and not tied:
        raise ValueError(
            f'{directory} scores words with another matrix than the word vectors of '
            f'{loaded.name!r}, whose config.json says tie_word_embeddings=true; give the '
            'checkpoint that it was trained on'
        )
    own = {} if tied and loaded.config.decoder.tied else {'kernel': np.ascontiguousarray(weight.T)}
    own |= {'bias': store.copied(tensors[f'heads.{name}.0.bias'])} if biased else {}
    return HeadConfig(pooling=VOCABULARY).to_json(), {'words': own} if own else {}


def write(
    params: Tree, name: str, loaded: LoadedBackbone
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the config of the library's head and its tensors."""
    leaves = flatten(params)
    kernel, bias = leaves.get('words/kernel'), leaves.get('words/bias')
    weight = _table(loaded) if kernel is None else np.asarray(kernel).T
    found = {f'heads.{name}.0.weight': weight}
    found |= {} if bias is None else {f'heads.{name}.0.bias': np.asarray(bias)}
    config = {
        'head_type': KIND,
        'vocab_size': len(weight),
        'layers': 1,
        'activation_function': None,
        'layer_norm': False,
        'bias': bias is not None,
        'shift_labels': False,
        'label2id': None,
    }
    return config, found


def _table(loaded: LoadedBackbone) -> np.ndarray:
    """Return the word vectors that are compared with what the decoder says, [V, D]."""
    where = 'embeddings' if loaded.config.decoder.shared_words else 'decoder_embeddings'
    return np.asarray(loaded.params[where]['word']['embedding'], np.float32)
