"""Prefixes and prompts between PEFT's files and ours.

PEFT stores what its networks made of a prefix or a prompt, and not the networks. It gives a prefix
as past keys and values, so that the text's positions start after it, and puts a prompt among the
word vectors, where it takes the first positions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapters_jax.adapters.prefix import PrefixTuning, flat_from_reparametrised
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.interop.peft.tensors import Tensors, expect_shapes
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.bert import BertStem
from adapters_jax.models.text import TextStem
from adapters_jax.params import Tree

STORED = 'prompt_embeddings'


def read_prefix(
    settings: Mapping[str, Any], whole: Tensors, config: BackboneConfig
) -> tuple[PrefixTuning, Tree]:
    """Return the method and parameters of a PREFIX_TUNING folder.

    Raises:
        ValueError: a tensor or sizes that are not those of the backbone.
    """
    length = settings['num_virtual_tokens']
    _check_no_decoder(config)
    _check_sizes(settings, config, config.block.hidden)
    method = PrefixTuning(flat=True, prefix_length=length, shift_positions=True)
    layers, hidden = config.layers, config.block.hidden
    expect_shapes('the folder', whole, {STORED: (length, 2 * layers * hidden)})
    stored = whole[STORED].reshape(length, layers, 2, hidden)
    tree = {
        f'layer_{i}': {
            'attention': {
                'prefix': {
                    'key': np.ascontiguousarray(stored[:, i, 0]),
                    'value': np.ascontiguousarray(stored[:, i, 1]),
                }
            }
        }
        for i in range(layers)
    }
    return method, tree


def read_prompt(
    settings: Mapping[str, Any], whole: Tensors, config: BackboneConfig
) -> tuple[PromptTuning, Tree]:
    """Return the method and parameters of a PROMPT_TUNING or P_TUNING folder.

    Raises:
        ValueError: a tensor or sizes that are not those of the backbone.
    """
    length = settings['num_virtual_tokens']
    _check_sizes(settings, config, config.dimensions.word)
    _check_words(config)
    method = PromptTuning(prompt_length=length, site='words', combine='prefix')
    # For a model with a decoder PEFT keeps as many vectors again, which it has no use for.
    copies = settings['num_transformer_submodules'] or 1
    expect_shapes('the folder', whole, {STORED: (copies * length, config.dimensions.word)})
    return method, {'embeddings': {'prompt': np.ascontiguousarray(whole[STORED][:length])}}


def _check_sizes(settings: Mapping[str, Any], config: BackboneConfig, width: int) -> None:
    """Refuse sizes that are not the backbone's; PEFT leaves them out where it takes the model's."""
    decoder = config.decoder
    expected = {
        'num_transformer_submodules': (1,) if decoder is None else (1, 2),
        'num_layers': (config.layers, *([] if decoder is None else [decoder.layers])),
        'num_attention_heads': (config.block.heads,),
        'token_dim': (width,),
    }
    for key, values in expected.items():
        if settings[key] not in (None, *values):
            raise ValueError(
                f'the folder has {key}={settings[key]}, but for this backbone it is '
                f'{" or ".join(map(str, values))}; give the backbone that the adapter was trained '
                'on'
            )


# It is the encoder of these that scales word vectors, where PEFT hands over vectors of its own.
_SCALED_LATE = ('marian',)


def _check_words(config: BackboneConfig) -> None:
    """Refuse a prompt of a model that reads no words, or whose words PEFT changes with it.

    Raises:
        ValueError: which of the two.
    """
    if config.family in _SCALED_LATE and config.stem.scale != 1:
        raise ValueError(
            f'a prompt for {config.family} is not exchanged with PEFT: beside a prompt PEFT does '
            "not scale the word vectors; keep the adapter in this project's own format"
        )
    if not isinstance(config.stem, BertStem | TextStem):
        raise ValueError(
            f'PEFT has no prompts for {config.family}, which reads no words; keep the adapter in '
            "this project's own format"
        )


def _check_no_decoder(config: BackboneConfig) -> None:
    """Refuse a prefix of a model with a decoder.

    Raises:
        ValueError: PEFT hands one and the same prefix to a decoder's attention over itself and to
            its attention over the input, which no method of ours does.
    """
    if config.decoder is not None:
        raise ValueError(
            'a prefix of a model with a decoder is not exchanged with PEFT: there both attentions '
            "of a layer share it; use --format=adapterhub or this project's own format"
        )


def write_prefix(
    method: PrefixTuning, tree: Tree, config: BackboneConfig
) -> tuple[dict[str, Any], Tensors]:
    """Return the settings and tensors of a prefix; a network is replaced by its outputs.

    Raises:
        ValueError: layers without a prefix, or a text that keeps its positions.
    """
    _check_no_decoder(config)
    if method.leave_out or not method.shift_positions:
        raise ValueError(
            f'prefix_tuning: PEFT puts a prefix into every layer and counts positions from its '
            f'end; this adapter has leave_out={list(method.leave_out)}, '
            f'shift_positions={method.shift_positions}; write it with --format=adapterhub, or '
            'train it with shift_positions=True'
        )
    method, tree = flat_from_reparametrised(method, tree)
    hidden, length = config.block.hidden, method.prefix_length
    prefixes = [tree[f'layer_{i}']['attention']['prefix'] for i in range(config.depth)]
    stored = np.stack([np.asarray(p[leaf]) for p in prefixes for leaf in ('key', 'value')], axis=1)
    settings = _settings(length, config, hidden) | {'encoder_hidden_size': hidden}
    return settings, {STORED: stored.reshape(length, -1)}


def write_prompt(
    method: PromptTuning, tree: Tree, config: BackboneConfig
) -> tuple[dict[str, Any], Tensors]:
    """Return the settings and tensors of a prompt.

    Raises:
        ValueError: a prompt that stands elsewhere than PEFT's.
    """
    _check_words(config)
    if method.site != 'words' or method.combine != 'prefix':
        raise ValueError(
            "prompt_tuning: PEFT puts a prompt before the word vectors (site='words', "
            f"combine='prefix'); this adapter has site={method.site!r}, "
            f'combine={method.combine!r}; write it with --format=adapterhub'
        )
    return _settings(method.prompt_length, config, config.dimensions.word), {
        STORED: np.asarray(tree['embeddings']['prompt'])
    }


def _settings(length: int, config: BackboneConfig, width: int) -> dict[str, Any]:
    return {
        'num_attention_heads': config.block.heads,
        'num_layers': config.layers,
        'num_transformer_submodules': 1,
        'num_virtual_tokens': length,
        'token_dim': width,
    }
