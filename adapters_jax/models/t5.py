"""T5 and mT5: encoder-decoders with relative positions and RMSNorm (Raffel et al. 2020).

Projections have no biases and scores are not divided by the root of the head size. From version
1.1 on, the feed-forward network is gated and scores of words have a matrix of their own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adapters_jax.models import names
from adapters_jax.models.backbone import BackboneConfig, Decoder
from adapters_jax.models.block import BlockConfig
from adapters_jax.models.text import RELATIVE, TextStem

PREFIXES = {'t5': ''}
ALIASES = {
    'encoder.embed_tokens.weight': 'shared.weight',
    'decoder.embed_tokens.weight': 'shared.weight',
}
# The head; and a table of the first checkpoints that cross-attention never used.
IGNORED = r'lm_head\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_.*'
_UNBIASED = ('query', 'key', 'value', 'output', 'up', 'down', 'gate')


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a Hugging Face config.json of model type t5 or mt5.

    Raises:
        ValueError: an unknown feed-forward network, or a missing key.
    """
    try:
        return _read(hf)
    except KeyError as error:
        raise ValueError(f'config.json lacks the key {error}, which t5 needs') from error


def _read(hf: Mapping[str, Any]) -> BackboneConfig:
    gate, _, activation = hf.get('feed_forward_proj', 'relu').rpartition('-')
    if gate not in ('', 'gated'):
        raise ValueError(
            f'feed_forward_proj is {hf["feed_forward_proj"]!r}; expected an activation or '
            'gated-ACTIVATION'
        )
    # T5's gated GELU is the approximate one, whatever it is called.
    activation = 'gelu_new' if (gate, activation) == ('gated', 'gelu') else activation
    rate = hf.get('dropout_rate', 0.1)
    block = BlockConfig(
        hidden=hf['d_model'],
        feed_forward=hf['d_ff'],
        heads=hf['num_heads'],
        activation=activation,
        norm_epsilon=hf.get('layer_norm_epsilon', 1e-6),
        pre_norm=True,
        dropout=rate,
        attention_dropout=rate,
        activation_dropout=rate,
        head_size=hf['d_kv'],
        scaled=False,
        centred=False,
        unbiased=_UNBIASED,
        gated=bool(gate),
    )
    stem = TextStem(
        positions=hf.get('n_positions', 512),
        kind=RELATIVE,
        buckets=hf.get('relative_attention_num_buckets', 32),
        distance=hf.get('relative_attention_max_distance', 128),
    )
    tied = hf.get('tie_word_embeddings', True)
    decoder_layers = hf.get('num_decoder_layers')
    pad_id, start_id = hf.get('pad_token_id', 0), hf.get('decoder_start_token_id')
    decoder = Decoder(
        layers=hf['num_layers'] if decoder_layers is None else decoder_layers,
        positions=stem.positions,
        block=dataclasses.replace(block, cross_attention=True, causal=True),
        stem=dataclasses.replace(stem, decoder=True, shared=True),
        start_id=pad_id if start_id is None else start_id,
        final_norm=True,
        tied=tied,
        scale=hf['d_model'] ** -0.5 if tied else 1.0,
    )
    return BackboneConfig(
        family='t5',
        layers=hf['num_layers'],
        vocabulary=hf['vocab_size'],
        positions=stem.positions,
        pad_id=pad_id,
        block=block,
        stem=stem,
        final_norm=True,
        final_dropout=True,
        decoder=decoder,
    )


def _modules(gated: bool, decoder: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Return the names of a block's projections and of its norms."""
    kinds = [('attention', 'SelfAttention'), *([('cross_attention', 'EncDecAttention')] * decoder)]
    modules, norms = {}, {}
    for place, (kind, theirs) in enumerate(kinds):
        for name in ('query', 'key', 'value', 'output'):
            modules[f'{kind}/{name}'] = f'layer.{place}.{theirs}.{name[0]}'
        norms[kind] = f'layer.{place}.layer_norm'
    last = f'layer.{len(kinds)}'
    ups = {'gate': 'wi_0', 'up': 'wi_1'} if gated else {'up': 'wi'}
    for ours, theirs in (ups | {'down': 'wo'}).items():
        modules[f'feed_forward/{ours}'] = f'{last}.DenseReluDense.{theirs}'
    return modules, norms | {'feed_forward': f'{last}.layer_norm'}


def tensor_names(config: BackboneConfig) -> names.Names:
    """Return, for each torch tensor, our path and whether to transpose it."""
    found = names.table('shared', 'embeddings/word')
    stacks = (
        ('encoder', '', 0, config.layers),
        ('decoder', 'decoder_', config.layers, config.depth),
    )
    for stack, ours, first, end in stacks:
        modules = _modules(config.block.gated, stack == 'decoder')
        for i in range(first, end):
            found |= names.block(i, config.block, f'{stack}.block.{i - first}', *modules)
        first_block = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias'
        found |= names.table(first_block, f'{ours}embeddings/relative')
        found |= names.norm(f'{stack}.final_layer_norm', f'{ours}final_norm', centred=False)
    return found
