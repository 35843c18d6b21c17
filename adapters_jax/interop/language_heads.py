"""The heads that BERT, RoBERTa and their kin were pretrained under, as ours.

They are read only where a masked language model asks for them: to everything else they are tensors
that come with a checkpoint and are no part of it. ELECTRA's generators have one; the discriminators
do not.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.tensors import WEIGHT_FILES, read_tensors
from adapters_jax.params import Tree, flatten, unflatten


class _Names(NamedTuple):
    """A family's tensors: those that have our leaves, and the matrix that is the word embeddings.

    Of several names for one leaf the first is written.
    """

    leaves: Mapping[str, str]
    tied: str


def _of_bert(prefix: str) -> _Names:
    leaves = {
        'transform.dense.weight': 'transform/kernel',
        'transform.dense.bias': 'transform/bias',
        'transform.LayerNorm.weight': 'norm/scale',
        'transform.LayerNorm.gamma': 'norm/scale',
        'transform.LayerNorm.bias': 'norm/bias',
        'transform.LayerNorm.beta': 'norm/bias',
        'bias': 'words/bias',
        'decoder.bias': 'words/bias',
    }
    return _Names({prefix + name: path for name, path in leaves.items()}, f'{prefix}decoder.weight')


_NAMES = {
    'bert': _of_bert('cls.predictions.'),
    'encoder-decoder': _of_bert('decoder.cls.predictions.'),
    'roberta': _Names(
        {
            'lm_head.dense.weight': 'transform/kernel',
            'lm_head.dense.bias': 'transform/bias',
            'lm_head.layer_norm.weight': 'norm/scale',
            'lm_head.layer_norm.bias': 'norm/bias',
            'lm_head.bias': 'words/bias',
            'lm_head.decoder.bias': 'words/bias',
        },
        'lm_head.decoder.weight',
    ),
    'distilbert': _Names(
        {
            'vocab_transform.weight': 'transform/kernel',
            'vocab_transform.bias': 'transform/bias',
            'vocab_layer_norm.weight': 'norm/scale',
            'vocab_layer_norm.bias': 'norm/bias',
            'vocab_projector.bias': 'words/bias',
        },
        'vocab_projector.weight',
    ),
    'electra': _Names(
        {
            'generator_predictions.dense.weight': 'transform/kernel',
            'generator_predictions.dense.bias': 'transform/bias',
            'generator_predictions.LayerNorm.weight': 'norm/scale',
            'generator_predictions.LayerNorm.bias': 'norm/bias',
            'generator_lm_head.bias': 'words/bias',
        },
        'generator_lm_head.weight',
    ),
}


def _names_of(family: str) -> _Names:
    if family not in _NAMES:
        raise ValueError(
            f'where the language head of a checkpoint of {family} lies is not known; expected a '
            f'backbone of {", ".join(_NAMES)} (or add it to interop/language_heads.py)'
        )
    return _NAMES[family]


def exists(backbone: LoadedBackbone) -> bool:
    """Tell whether a checkpoint has a language head.

    Raises:
        ValueError: a family of which nobody has said where it lies.
    """
    names = _names_of(backbone.config.family)
    return any(name in names.leaves or name == names.tied for name in _tensors(backbone))


def read(backbone: LoadedBackbone) -> Tree:
    """Return a checkpoint's language head as parameters in float32; {} where it has none.

    Raises:
        ValueError: a head that lacks tensors, or of other sizes than the backbone's, or one whose
            output embeddings are not its word embeddings.
    """
    names, tensors = _names_of(backbone.config.family), _tensors(backbone)
    leaves = {
        path: np.array(tensors[name], np.float32)
        for name, path in names.leaves.items()
        if name in tensors
    }
    if not leaves and names.tied not in tensors:
        return {}
    if 'transform/kernel' in leaves:
        leaves['transform/kernel'] = np.ascontiguousarray(leaves['transform/kernel'].T)
    _check(leaves, backbone)
    if names.tied in tensors:
        _check_tied(np.asarray(tensors[names.tied], np.float32), backbone)
    return unflatten(leaves)


def write(tree: Tree, family: str) -> dict[str, np.ndarray]:
    """Return the tensors of a head, under their names in a checkpoint of the family."""
    first = {path: name for name, path in reversed(_names_of(family).leaves.items())}
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(tree).items()}
    return {
        first[path]: np.ascontiguousarray(leaf.T if path.endswith('kernel') else leaf)
        for path, leaf in leaves.items()
    }


def _tensors(backbone: LoadedBackbone) -> Mapping[str, np.ndarray]:
    there = any((backbone.directory / file).is_file() for file in WEIGHT_FILES)
    return read_tensors(backbone.directory) if there else {}


def _check(leaves: Mapping[str, np.ndarray], backbone: LoadedBackbone) -> None:
    hidden, width = backbone.config.dimensions.hidden, _table(backbone).shape[1]
    shapes = {
        'transform/kernel': (hidden, width),
        'words/bias': (backbone.config.written,),
        **dict.fromkeys(('transform/bias', 'norm/scale', 'norm/bias'), (width,)),
    }
    for path, shape in shapes.items():
        found = leaves[path].shape if path in leaves else 'missing'
        if found != shape:
            raise ValueError(
                f'the language head in {backbone.directory} has {path} {found}, expected {shape}; '
                "restore the checkpoint, or set head.train='all' after removing the head from it"
            )


def _check_tied(decoder: np.ndarray, backbone: LoadedBackbone) -> None:
    if not np.array_equal(decoder, np.asarray(_table(backbone), np.float32)):
        raise ValueError(
            f'the output embeddings of {backbone.directory} are not its word embeddings; only '
            'heads that share them are supported, as BERT and RoBERTa do'
        )


def _table(backbone: LoadedBackbone) -> np.ndarray:
    """Return the vectors of the words that are scored."""
    own = 'embeddings' if backbone.config.decoder is None else 'decoder_embeddings'
    return backbone.params[own]['word']['embedding']
