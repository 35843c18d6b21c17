"""ELECTRA: BERT with word vectors of a width of their own and no pooler (Clark et al. 2020)."""

from collections.abc import Mapping
from typing import Any

from adapters_jax.models import bert, names
from adapters_jax.models.backbone import BackboneConfig

PREFIXES = {'electra': 'electra.'}
IGNORED = rf'{bert.IGNORED}|(discriminator|generator)_(predictions|lm_head)\..*'


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a Hugging Face config.json of model type electra.

    Raises:
        ValueError: a setting this module does not compute, or a missing key.
    """
    hf = {key: value for key, value in hf.items() if value is not None}
    bert.check_encoder(hf)
    try:
        return BackboneConfig(
            family='electra',
            layers=hf['num_hidden_layers'],
            vocabulary=hf['vocab_size'],
            positions=hf['max_position_embeddings'],
            pad_id=hf.get('pad_token_id', 0),
            block=bert.block_config(hf),
            stem=bert.BertStem(hf['type_vocab_size'], word=hf['embedding_size']),
        )
    except KeyError as error:
        raise ValueError(f'config.json lacks the key {error}, which electra needs') from error


def tensor_names(config: BackboneConfig) -> names.Names:
    """Return, for each torch tensor (without prefix), our path and whether to transpose it."""
    projected = config.stem.word != config.block.hidden
    projection = names.dense('embeddings_project', 'embeddings/projection')
    return bert.tensor_names(config) | (projection if projected else {})
