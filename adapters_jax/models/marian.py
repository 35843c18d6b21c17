"""Marian (opus-mt): BART's network with sines for positions, which a checkpoint need not hold."""

from adapters_jax.models import bart
from adapters_jax.models.bart import ALIASES, read_config, tensor_names

__all__ = ['ALIASES', 'IGNORED', 'PREFIXES', 'read_config', 'tensor_names']

PREFIXES = {'marian': 'model.'}
IGNORED = rf'{bart.IGNORED}|(encoder|decoder)\.embed_positions\.weight'
