"""What a checkpoint's decoder has beside its words' vectors to score words with, as ours."""

from collections.abc import Mapping

import numpy as np

from adapters_jax.interop import language_heads
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.interop.tensors import WEIGHT_FILES, read_tensors
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree, flatten

_KERNEL, _KERNEL_OF_WHISPER, _BIAS = 'lm_head.weight', 'proj_out.weight', 'final_logits_bias'
_KERNELS = (_KERNEL, _KERNEL_OF_WHISPER)


def exists(backbone: LoadedBackbone) -> bool:
    """Tell whether a checkpoint has a matrix of its own to score words with."""
    if backbone.config.decoder.transformed:
        return language_heads.exists(backbone)
    return any(name in _tensors(backbone) for name in _KERNELS)


def optional(backbone: LoadedBackbone) -> Tree | None:
    """Return what `read` does, or None where the checkpoint scores no words.

    Raises:
        ValueError: as `read`.
    """
    decoder = backbone.config.decoder
    tied = decoder.tied and not decoder.transformed
    return read(backbone) if tied or exists(backbone) else None


def read(backbone: LoadedBackbone) -> Tree:
    """Return a decoder's own scores of words in float32; {} where they are its words' vectors.

    Raises:
        ValueError: tensors of other sizes than the backbone's, or a checkpoint that has none.
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


def model_class(family: str) -> str:
    """Return how the name of a family's model that writes texts ends."""
    odd = {'marian': 'MTModel', 'encoder-decoder': 'Model'}
    return odd.get(family, 'ForConditionalGeneration')


def write(params: Tree, config: BackboneConfig) -> dict[str, np.ndarray]:
    """Return the tensors that a head is in a Hugging Face model; none where it has nothing own.

    Raises:
        ValueError: a bias or a matrix where the family's models have none.
    """
    if config.decoder.transformed:
        return language_heads.write(params, config.family)
    leaves, found = flatten(params), {}
    kernel, bias = leaves.get('words/kernel'), leaves.get('words/bias')
    unscored = config.family in ('t5', 'whisper') and bias is not None
    if unscored or (kernel is not None and config.decoder.tied):
        raise ValueError(
            f'{config.family} models score words without {"a bias" if unscored else "a matrix"} of '
            "their own; keep the adapter in this project's own format"
        )
    if kernel is not None:
        name = _KERNEL_OF_WHISPER if config.family == 'whisper' else _KERNEL
        found[name] = np.ascontiguousarray(np.asarray(kernel, np.float32).T)
    if bias is not None:
        found[_BIAS] = np.asarray(bias, np.float32).reshape(1, -1)
    return found


def _tensors(backbone: LoadedBackbone) -> Mapping[str, np.ndarray]:
    there = any((backbone.directory / file).is_file() for file in WEIGHT_FILES)
    return read_tensors(backbone.directory) if there else {}
