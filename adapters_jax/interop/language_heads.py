"""The heads that BERT and RoBERTa checkpoints were pretrained under, as ours.

They are read only where a masked language model asks for them: to everything else they are tensors
that come with a checkpoint and are no part of it.
"""

from collections.abc import Mapping

import numpy as np

from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.tensors import WEIGHT_FILES, read_tensors
from adapters_jax.params import Tree, flatten, unflatten

# Of each family, below its prefix: the tensors that have our leaves, and other names for them.
_NAMES = {
    'bert': (
        'cls.predictions.',
        {
            'transform.dense.weight': 'transform/kernel',
            'transform.dense.bias': 'transform/bias',
            'transform.LayerNorm.weight': 'norm/scale',
            'transform.LayerNorm.gamma': 'norm/scale',
            'transform.LayerNorm.bias': 'norm/bias',
            'transform.LayerNorm.beta': 'norm/bias',
            'bias': 'words/bias',
            'decoder.bias': 'words/bias',
        },
    ),
    'roberta': (
        'lm_head.',
        {
            'dense.weight': 'transform/kernel',
            'dense.bias': 'transform/bias',
            'layer_norm.weight': 'norm/scale',
            'layer_norm.bias': 'norm/bias',
            'bias': 'words/bias',
            'decoder.bias': 'words/bias',
        },
    ),
}
_NAMES['encoder-decoder'] = ('decoder.cls.predictions.', _NAMES['bert'][1])
_DECODER = 'decoder.weight'


def exists(backbone: LoadedBackbone) -> bool:
    """Tell whether a checkpoint has a language head."""
    prefix, _ = _NAMES[backbone.config.family]
    return any(name.startswith(prefix) for name in _tensors(backbone))


def read(backbone: LoadedBackbone) -> Tree:
    """Return a checkpoint's language head as parameters in float32; {} where it has none.

    Raises:
        ValueError: a head that lacks tensors, or of other sizes than the backbone's, or one whose
            output embeddings are not its word embeddings.
    """
    prefix, names = _NAMES[backbone.config.family]
    tensors = _tensors(backbone)
    leaves = {
        path: np.array(tensors[prefix + name], np.float32)
        for name, path in names.items()
        if prefix + name in tensors
    }
    if not leaves and prefix + _DECODER not in tensors:
        return {}
    if 'transform/kernel' in leaves:
        leaves['transform/kernel'] = np.ascontiguousarray(leaves['transform/kernel'].T)
    _check(leaves, backbone)
    if prefix + _DECODER in tensors:
        _check_tied(np.asarray(tensors[prefix + _DECODER], np.float32), backbone)
    return unflatten(leaves)


def write(tree: Tree, family: str) -> dict[str, np.ndarray]:
    """Return the tensors of a head, under their names in a checkpoint of the family."""
    prefix, names = _NAMES[family]
    first = {path: name for name, path in reversed(names.items())}
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(tree).items()}
    return {
        prefix + first[path]: np.ascontiguousarray(leaf.T if path.endswith('kernel') else leaf)
        for path, leaf in leaves.items()
    }


def _tensors(backbone: LoadedBackbone) -> Mapping[str, np.ndarray]:
    there = any((backbone.directory / file).is_file() for file in WEIGHT_FILES)
    return read_tensors(backbone.directory) if there else {}


def _check(leaves: Mapping[str, np.ndarray], backbone: LoadedBackbone) -> None:
    hidden, words = backbone.config.dimensions.hidden, backbone.config.written
    shapes = {
        'transform/kernel': (hidden, hidden),
        'words/bias': (words,),
        **dict.fromkeys(('transform/bias', 'norm/scale', 'norm/bias'), (hidden,)),
    }
    for path, shape in shapes.items():
        found = leaves[path].shape if path in leaves else 'missing'
        if found != shape:
            raise ValueError(
                f'the language head in {backbone.directory} has {path} {found}, expected {shape}; '
                "restore the checkpoint, or set head.train='all' after removing the head from it"
            )


def _check_tied(decoder: np.ndarray, backbone: LoadedBackbone) -> None:
    own = 'embeddings' if backbone.config.decoder is None else 'decoder_embeddings'
    table = np.asarray(backbone.params[own]['word']['embedding'], np.float32)
    if not np.array_equal(decoder, table):
        raise ValueError(
            f'the output embeddings of {backbone.directory} are not its word embeddings; only '
            'heads that share them are supported, as BERT and RoBERTa do'
        )
