"""The families of backbones by the `model_type` of their config.json.

A family's module has `read_config`, `tensor_names` and `PREFIXES`: what precedes the backbone's
tensors in the checkpoint of a model with a head, by model type. It may have `ALIASES` and `IGNORED`
(see `Family`).

That is enough to train. What else a family may have, each in a table by its name:

| where | what for |
|---|---|
| `interop/language_heads.py` | `masked_lm` |
| `interop/hf_heads.py`, `interop/decoder_heads.py` | published heads of classes and of words |
| `interop/hf_export.py` | merged models for transformers |
| `interop/adapterhub/places.py`, `interop/peft/names.py` | adapters of the two libraries |
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from adapters_jax.models import (
    bart,
    bert,
    distilbert,
    electra,
    encoder_decoder,
    marian,
    t5,
    vit,
    whisper,
)
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.names import Names


class Family(NamedTuple):
    """What is known about a family of models."""

    model_type: str  # the family's own; another model type of the same architecture uses it too
    prefix: str
    read_config: Callable[[Mapping[str, Any]], BackboneConfig]
    tensor_names: Callable[[BackboneConfig], Names]
    aliases: Mapping[str, str]  # other names of a tensor that the checkpoint may hold twice
    ignored: str  # a pattern for what is no part of the backbone, if anything


_MODULES = (bert, distilbert, electra, encoder_decoder, bart, marian, t5, whisper, vit)
# The same architectures with another vocabulary.
_ALIASES = {'xlm-roberta': 'roberta', 'camembert': 'roberta', 'mt5': 't5'}


def _family(module: ModuleType, model_type: str, prefix: str) -> Family:
    aliases, ignored = getattr(module, 'ALIASES', {}), getattr(module, 'IGNORED', '')
    return Family(model_type, prefix, module.read_config, module.tensor_names, aliases, ignored)


_OWN = {
    model_type: _family(module, model_type, prefix)
    for module in _MODULES
    for model_type, prefix in module.PREFIXES.items()
}
FAMILIES = _OWN | {alias: _OWN[name] for alias, name in _ALIASES.items()}


def find(hf: Mapping[str, Any]) -> Family:
    """Return the family of a config.json; the first BERT configs do not say which they are.

    Raises:
        ValueError: an unknown model type.
    """
    model_type = hf.get('model_type', 'bert')
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f'model_type {model_type!r} is not supported; expected one of {", ".join(FAMILIES)}'
        )
    return FAMILIES[model_type]


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a config.json.

    Raises:
        ValueError: an unknown model type, a setting that is not supported, or a missing key.
    """
    family = find(hf)
    return family.read_config({**hf, 'model_type': family.model_type})


def tensor_names(config: BackboneConfig) -> Names:
    """Return, for each torch tensor (without prefix), our path below `backbone` and whether to
    transpose it."""
    return FAMILIES[config.family].tensor_names(config)
