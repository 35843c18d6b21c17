"""What torch calls the parts of a block: its projections, its attentions and itself.

The names are those of the checkpoints, which each family's file under `models/` has; here they are
found by our own: the number of a layer, counted through from the encoder's first, and a path in it.
"""

import functools
import re

from adapters_jax.models import families
from adapters_jax.models.backbone import BackboneConfig

_BLOCK = re.compile(r'.*?\.\d+(?=\.)')


@functools.cache
def projections(config: BackboneConfig) -> dict[str, str]:
    """Return our path of each dense layer by its torch name: those of the blocks, and the pooler's.

    The path is 'layer_{i}/{sub_layer}/{name}' or 'pooler'; what embeds the input is left out.
    """
    return {
        name.removesuffix('.weight'): path.removesuffix('/kernel')
        for name, (path, _) in families.tensor_names(config).items()
        if path.endswith('/kernel') and not path.startswith('embeddings/')
    }


@functools.cache
def by_path(config: BackboneConfig) -> dict[str, str]:
    """Return the torch name of each dense layer by our path."""
    return {path: module for module, path in projections(config).items()}


def attention(layer: int, sub_layer: str, config: BackboneConfig) -> str:
    """Return the module that holds the queries', keys' and values' projections of an attention."""
    return by_path(config)[f'layer_{layer}/{sub_layer}/query'].rpartition('.')[0]


def block(layer: int, config: BackboneConfig) -> str:
    """Return the module that is the whole block."""
    return _BLOCK.match(by_path(config)[f'layer_{layer}/attention/query'])[0]


@functools.cache
def norms(config: BackboneConfig) -> dict[str, str]:
    """Return our path of each norm by its torch name."""
    return {
        name.removesuffix('.weight'): path.removesuffix('/scale')
        for name, (path, _) in families.tensor_names(config).items()
        if path.endswith('/scale')
    }


def prefix(config: BackboneConfig) -> str:
    """Return what precedes the backbone's tensors in a model with a head, such as 'bert.'."""
    return families.FAMILIES[config.family].prefix
