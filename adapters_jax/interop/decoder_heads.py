"""What a checkpoint's decoder has beside its words' vectors to score words with, as ours."""

from collections.abc import Mapping

import numpy as np

from adapters_jax.interop import language_heads
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.tensors import WEIGHT_FILES, read_tensors
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

_KERNELS, _BIAS = ('lm_head.weight', 'proj_out.weight'), 'final_logits_bias'


def exists(backbone: LoadedBackbone) -> bool:
    """Tell whether a checkpoint has a matrix of its own to score words with."""
    if backbone.config.decoder.transformed:
        return language_heads.exists(backbone)
    return any(name in _tensors(backbone) for name in _KERNELS)


def read(backbone: LoadedBackbone) -> Tree:
    """Return a decoder's own scores of words in float32; {} where they are its words' vectors.

    Raises:
        ValueError: tensors of other sizes than the backbone's, a checkpoint that says that its
            scores are products with its words' vectors and has others, or one that has none.
    """
    decoder, vocabulary = backbone.config.decoder, backbone.config.written
    if decoder.transformed:
        return language_heads.read(backbone)
    tensors = _tensors(backbone)
    own: dict[str, np.ndarray] = {}
    kernel = next((np.asarray(tensors[k], np.float32) for k in _KERNELS if k in tensors), None)
    if kernel is not None and kernel.shape != (vocabulary, backbone.config.block.hidden):
        raise ValueError(
            f'the scores of words in {backbone.directory} have the shape {kernel.shape}, expected '
            f'{(vocabulary, backbone.config.block.hidden)}'
        )
    if not decoder.tied:
        if kernel is None:
            raise ValueError(
                f'{backbone.directory} has no lm_head.weight, with which its words are scored; '
                'take a checkpoint with a language head'
            )
        own['kernel'] = np.ascontiguousarray(kernel.T)
    if _BIAS in tensors:
        bias = np.array(tensors[_BIAS], np.float32).reshape(-1)
        if bias.shape != (vocabulary,):
            raise ValueError(
                f'{_BIAS} in {backbone.directory} is of {len(bias)} words, expected {vocabulary}'
            )
        if bias.any():
            own['bias'] = bias
    return {'words': own} if own else {}


def write(tree: Tree, config: BackboneConfig) -> dict[str, np.ndarray]:
    """Return the tensors of such scores, under their names in a checkpoint of the family."""
    if config.decoder.transformed:
        return language_heads.write(tree, config.family)
    own = {name: np.asarray(leaf, np.float32) for name, leaf in tree.get('words', {}).items()}
    found = {}
    if 'kernel' in own:
        found['lm_head.weight'] = np.ascontiguousarray(own['kernel'].T)
    if 'bias' in own:
        found[_BIAS] = own['bias'].reshape(1, -1)
    return found


def _tensors(backbone: LoadedBackbone) -> Mapping[str, np.ndarray]:
    there = any((backbone.directory / file).is_file() for file in WEIGHT_FILES)
    return read_tensors(backbone.directory) if there else {}
