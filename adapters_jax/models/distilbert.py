"""DistilBERT: BERT without token types and pooler, half as deep (Sanh et al. 2019, section 3)."""

from collections.abc import Mapping
from typing import Any

from adapters_jax.models import bert, names
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.block import BlockConfig

PREFIXES = {'distilbert': 'distilbert.'}
IGNORED = rf'{bert.IGNORED}|(vocab_|pre_classifier).*'


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a Hugging Face config.json of model type distilbert.

    Positions that the checkpoint computed by sines are tensors in it like learned ones.

    Raises:
        ValueError: a missing key, or sizes that do not fit together.
    """
    try:
        block = BlockConfig(
            hidden=hf['dim'],
            feed_forward=hf['hidden_dim'],
            heads=hf['n_heads'],
            activation=hf.get('activation', 'gelu'),
            dropout=hf.get('dropout', 0.1),
            attention_dropout=hf.get('attention_dropout', 0.1),
            drops_attended=False,
        )
        return BackboneConfig(
            family='distilbert',
            layers=hf['n_layers'],
            vocabulary=hf['vocab_size'],
            positions=hf['max_position_embeddings'],
            pad_id=hf.get('pad_token_id', 0),
            block=block,
            stem=bert.BertStem(token_types=0),
        )
    except KeyError as error:
        raise ValueError(f'config.json lacks the key {error}, which distilbert needs') from error


MODULES = {
    'attention/query': 'attention.q_lin',
    'attention/key': 'attention.k_lin',
    'attention/value': 'attention.v_lin',
    'attention/output': 'attention.out_lin',
    'feed_forward/up': 'ffn.lin1',
    'feed_forward/down': 'ffn.lin2',
}
NORMS = {'attention': 'sa_layer_norm', 'feed_forward': 'output_layer_norm'}


def tensor_names(config: BackboneConfig) -> names.Names:
    """Return, for each torch tensor (without prefix), our path and whether to transpose it."""
    found: names.Names = {}
    for name in ('word', 'position'):
        found |= names.table(f'embeddings.{name}_embeddings', f'embeddings/{name}')
    found |= names.norm('embeddings.LayerNorm', 'embeddings/norm')
    for i in range(config.layers):
        found |= names.block(i, config.block, f'transformer.layer.{i}', MODULES, NORMS)
    return found
