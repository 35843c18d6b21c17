"""BART, mBART and Marian: encoder-decoders with the blocks of the first transformer.

BART normalises after each sub-layer (Lewis et al. 2020, section 2.1), mBART before it, with one
more LayerNorm at the end of each stack (Liu et al. 2020, section 2.2); Marian's positions are sines
and its embeddings are not normalised (Junczys-Dowmunt et al. 2018).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adapters_jax.models import names
from adapters_jax.models.backbone import BackboneConfig, Decoder
from adapters_jax.models.block import BlockConfig
from adapters_jax.models.text import LEARNED, SINES, TextStem

PREFIXES = {'bart': 'model.', 'mbart': 'model.'}
# Under which other names a checkpoint may hold the words' vectors.
ALIASES = {
    'encoder.embed_tokens.weight': 'shared.weight',
    'decoder.embed_tokens.weight': 'shared.weight',
}
# The heads.
IGNORED = r'lm_head\.weight|final_logits_bias|(classification_head|qa_outputs)\..*'


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a Hugging Face config.json of model type bart, mbart or marian.

    Raises:
        ValueError: stacks of different widths, or a missing key.
    """
    family = hf['model_type']
    try:
        equal_stacks(hf)
        block = block_config(hf, pre_norm=family == 'mbart')
        scale = hf['d_model'] ** 0.5 if hf.get('scale_embedding', False) else 1.0
        kind, offset = (SINES, 0) if family == 'marian' else (LEARNED, 2)
        shared = hf.get('share_encoder_decoder_embeddings', True)
        if not shared:
            raise ValueError(
                'share_encoder_decoder_embeddings=false in config.json: only models with one '
                'vocabulary for both sides are supported'
            )
        stem = TextStem(hf['max_position_embeddings'], kind, offset, scale, family != 'marian')
        return BackboneConfig(
            family=family,
            layers=hf['encoder_layers'],
            vocabulary=hf['vocab_size'],
            positions=hf['max_position_embeddings'],
            pad_id=hf.get('pad_token_id', 1),
            block=block,
            stem=stem,
            final_norm=family == 'mbart',
            decoder=decoder(hf, block, stem, final_norm=family == 'mbart'),
        )
    except KeyError as error:
        raise ValueError(f'config.json lacks the key {error}, which {family} needs') from error


def equal_stacks(hf: Mapping[str, Any]) -> None:
    """Refuse an encoder and a decoder of different widths: an adapter has one set of sizes.

    Raises:
        ValueError: their feed-forward widths or numbers of heads differ.
    """
    for key in ('ffn_dim', 'attention_heads'):
        both = [hf[f'{stack}_{key}'] for stack in ('encoder', 'decoder')]
        if both[0] != both[1]:
            raise ValueError(
                f'encoder_{key}={both[0]} and decoder_{key}={both[1]} in config.json: only stacks '
                'of equal widths are supported'
            )


def block_config(hf: Mapping[str, Any], **options: Any) -> BlockConfig:
    """Return the block of a model whose config has the names of BART's."""
    return BlockConfig(
        hidden=hf['d_model'],
        feed_forward=hf['encoder_ffn_dim'],
        heads=hf['encoder_attention_heads'],
        activation=hf.get('activation_function', 'gelu'),
        norm_epsilon=1e-5,
        dropout=hf.get('dropout', 0.1),
        attention_dropout=hf.get('attention_dropout', 0.0),
        activation_dropout=hf.get('activation_dropout', 0.0),
        **options,
    )


def decoder(hf: Mapping[str, Any], block: BlockConfig, stem: TextStem, **options: Any) -> Decoder:
    """Return the decoder that belongs to an encoder of this block and stem."""
    start = hf.get('decoder_start_token_id')
    return Decoder(
        layers=hf['decoder_layers'],
        positions=stem.positions,
        block=dataclasses.replace(block, cross_attention=True, causal=True),
        stem=dataclasses.replace(stem, decoder=True, shared=True),
        start_id=2 if start is None else start,
        tied=hf.get('tie_word_embeddings', True),
        **options,
    )


_ATTENTION = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'output': 'out_proj'}
MODULES = {f'attention/{ours}': f'self_attn.{theirs}' for ours, theirs in _ATTENTION.items()}
MODULES |= {'feed_forward/up': 'fc1', 'feed_forward/down': 'fc2'}
CROSS = {f'cross_attention/{ours}': f'encoder_attn.{theirs}' for ours, theirs in _ATTENTION.items()}
NORMS = {'attention': 'self_attn_layer_norm', 'feed_forward': 'final_layer_norm'}
CROSS_NORMS = {'cross_attention': 'encoder_attn_layer_norm'}


def tensor_names(config: BackboneConfig) -> names.Names:
    """Return, for each torch tensor (without prefix), our path and whether to transpose it."""
    found = names.table('shared', 'embeddings/word')
    for stack, ours, stem in (
        ('encoder', 'embeddings', config.stem),
        ('decoder', 'decoder_embeddings', config.decoder.stem),
    ):
        if stem.kind == LEARNED:
            found |= names.table(f'{stack}.embed_positions', f'{ours}/position')
        if stem.norm:
            found |= names.norm(f'{stack}.layernorm_embedding', f'{ours}/norm')
    return found | block_names(config)


def block_names(config: BackboneConfig) -> names.Names:
    """Return the names of all blocks, and of the LayerNorms at the ends of the stacks."""
    found: names.Names = {}
    for i in range(config.layers):
        found |= names.block(i, config.block, f'encoder.layers.{i}', MODULES, NORMS)
    for i in range(config.decoder.layers):
        given = f'decoder.layers.{i}', MODULES | CROSS, NORMS | CROSS_NORMS
        found |= names.block(config.layers + i, config.decoder.block, *given)
    if config.final_norm:
        found |= names.norm('encoder.layer_norm', 'final_norm')
    if config.decoder.final_norm:
        found |= names.norm('decoder.layer_norm', 'decoder_final_norm')
    return found
