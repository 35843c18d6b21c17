"""Two BERTs as one encoder-decoder: the second looks back, and at the first (Rothe et al. 2020).

Each has words and positions of its own. Scores of words come from the head that BERT was pretrained
under, over the second one's word vectors.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from adapters_jax.models import bert, names
from adapters_jax.models.backbone import BackboneConfig, Decoder

PREFIXES = {'encoder-decoder': ''}
IGNORED = (
    r'decoder\.cls\.predictions\..*|(encoder|decoder\.bert)\.embeddings\.position_ids|'
    r'encoder\.pooler\..*|decoder\.bert\.pooler\..*'
)


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a Hugging Face config.json of model type encoder-decoder.

    Raises:
        ValueError: stacks that are no BERTs or of different widths, or a missing key.
    """
    try:
        stacks = [_read(hf[name], name) for name in ('encoder', 'decoder')]
        start = hf.get('decoder_start_token_id', hf['decoder'].get('decoder_start_token_id'))
    except KeyError as error:
        raise ValueError(
            f'config.json lacks the key {error}, which encoder-decoder needs'
        ) from error
    encoder, decoder = stacks
    if _widths(encoder) != _widths(decoder):
        raise ValueError(
            f'the encoder and the decoder in config.json have the widths {_widths(encoder)} and '
            f'{_widths(decoder)} (hidden, feed-forward, heads); only equal ones are supported'
        )
    if start is None:
        raise ValueError('config.json lacks the key decoder_start_token_id; set it')
    return dataclasses.replace(
        encoder,
        family='encoder-decoder',
        pooler=False,
        decoder=Decoder(
            layers=decoder.layers,
            positions=decoder.positions,
            block=dataclasses.replace(decoder.block, cross_attention=True, causal=True),
            stem=dataclasses.replace(decoder.stem, decoder=True),
            start_id=start,
            vocabulary=decoder.vocabulary,
            pad_id=decoder.pad_id,
            shared_words=False,
            transformed=True,
        ),
    )


def _read(hf: Mapping[str, Any], name: str) -> BackboneConfig:
    if hf.get('model_type') != 'bert':
        raise ValueError(
            f'the {name} in config.json is of model_type {hf.get("model_type")!r}; only bert is '
            'supported'
        )
    plain = {k: v for k, v in hf.items() if k not in ('is_decoder', 'add_cross_attention')}
    return bert.read_config(plain)


def _widths(config: BackboneConfig) -> tuple[int, int, int]:
    return config.block.hidden, config.block.feed_forward, config.block.heads


_CROSS = {
    f'cross_attention/{name}': f'crossattention.self.{name}' for name in ('query', 'key', 'value')
} | {'cross_attention/output': 'crossattention.output.dense'}
_CROSS_NORMS = {'cross_attention': 'crossattention.output.LayerNorm'}


def tensor_names(config: BackboneConfig) -> names.Names:
    """Return, for each torch tensor, our path and whether to transpose it."""
    first = bert.tensor_names(dataclasses.replace(config, decoder=None))
    found = {f'encoder.{theirs}': ours for theirs, ours in first.items()}
    theirs, ours = 'decoder.bert.embeddings', 'decoder_embeddings'
    for name in ('word', 'position', 'token_type'):
        found |= names.table(f'{theirs}.{name}_embeddings', f'{ours}/{name}')
    found |= names.norm(f'{theirs}.LayerNorm', f'{ours}/norm')
    for i in range(config.decoder.layers):
        found |= names.block(
            config.layers + i,
            config.decoder.block,
            f'decoder.bert.encoder.layer.{i}',
            bert.MODULES | _CROSS,
            bert.NORMS | _CROSS_NORMS,
        )
    return found
