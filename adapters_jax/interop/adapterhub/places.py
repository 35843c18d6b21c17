"""Where `adapters` keeps the parts of an adapter in a model of each family.

Projections and blocks have the names of the checkpoint (`interop.modules`); what is here is what
the library adds to them, and what it leaves out: some families lack some methods there, and at some
places it computes something that nothing of ours does.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from adapters_jax.adapters.invertible import Invertible
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.prefix import PrefixTuning
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.reft import ReFT
from adapters_jax.interop import modules
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.text import RELATIVE


class Model(NamedTuple):
    """The library's class of a model type, and what precedes the backbone's tensors in it."""

    name: str
    prefix: str


MODELS = {
    'bert': Model('BertAdapterModel', 'bert.'),
    'roberta': Model('RobertaAdapterModel', 'roberta.'),
    'xlm-roberta': Model('XLMRobertaAdapterModel', 'roberta.'),
    'distilbert': Model('DistilBertAdapterModel', 'distilbert.'),
    'electra': Model('ElectraAdapterModel', 'electra.'),
    'bart': Model('BartAdapterModel', 'model.'),
    'mbart': Model('MBartAdapterModel', 'model.'),
    't5': Model('T5AdapterModel', 'transformer.'),
    'mt5': Model('MT5AdapterModel', 'transformer.'),
    'whisper': Model('WhisperAdapterModel', 'model.'),
    'vit': Model('ViTAdapterModel', 'vit.'),
}

_Modules = Mapping[str, str]
_OUTPUTS = {'attention': 'attention.output', 'feed_forward': 'output'}
_OWN = {
    'attention': 'attention_adapters',
    'cross_attention': 'cross_attention_adapters',
    'feed_forward': 'output_adapters',
}
# Below a block of the encoder and one of the decoder: the modules with what ends the sub-layers.
_ENDS: dict[str, tuple[_Modules, _Modules]] = {
    **dict.fromkeys(('bert', 'roberta', 'electra'), (_OUTPUTS, {})),
    'distilbert': (_OWN, {}),
    'vit': (_OWN | {'feed_forward': 'output.output_adapters'}, {}),
    **dict.fromkeys(('bart', 'mbart', 'whisper'), (_OWN, _OWN)),
    't5': (
        {'attention': 'layer.0', 'feed_forward': 'layer.1'},
        {'attention': 'layer.0', 'cross_attention': 'layer.1', 'feed_forward': 'layer.2'},
    ),
}
# The projections that can be adapted there.
PROJECTIONS = ('query', 'key', 'value', 'up', 'down')


def end(layer: int, sub_layer: str, config: BackboneConfig) -> str:
    """Return the module that holds the bottlenecks and the fusions at the end of a sub-layer."""
    own = _ENDS[config.family][in_decoder(layer, config)]
    return f'{modules.block(layer, config)}.{own[sub_layer]}'


def in_decoder(layer: int, config: BackboneConfig) -> bool:
    """Tell whether a layer is the decoder's."""
    return layer >= config.layers


def prefixes(layer: int, sub_layer: str, config: BackboneConfig) -> str:
    """Return the group of prefixes that an attention belongs to."""
    if sub_layer == 'cross_attention':
        return 'cross_prefix'
    if config.decoder is not None and not in_decoder(layer, config):
        return 'encoder_prefix'
    return 'self' if config.family == 'distilbert' else 'self_prefix'


def attentions(config: BackboneConfig) -> list[str]:
    """Return the modules of all attentions, each of which may have a prefix."""
    kinds = ('attention', 'cross_attention')
    return [
        modules.attention(i, kind, config)
        for i in range(config.depth)
        for kind in (kinds if in_decoder(i, config) else kinds[:1])
    ]


def embeddings(config: BackboneConfig) -> str:
    """Return what precedes the names of what stands at the embedded input."""
    return '' if config.decoder is None else 'encoder.'


def counts_keys(config: BackboneConfig) -> bool:
    """Tell whether a prefix moves the keys: the library computes relative positions of all keys."""
    return getattr(config.stem, 'kind', None) == RELATIVE


def meant(method: Method, config: BackboneConfig) -> Method:
    """Return a method with the options that the library does not write, since it has one way."""
    if isinstance(method, PrefixTuning) and counts_keys(config):
        return dataclasses.replace(method, count_keys=True)
    return method


def check(method: Method, config: BackboneConfig) -> None:
    """Refuse a method where the library has no place for it, or does not do what it says.

    Raises:
        ValueError: the pair, and what is in the way.
    """
    for kind, problem in _PROBLEMS.items():
        said = problem(method, config) if isinstance(method, kind) else None
        if said:
            raise ValueError(
                f'{method.architecture} on {config.family} is not exchanged with `adapters`: {said}'
                '; keep the adapter in the format of this project'
            )


def _invertible(method: Invertible, config: BackboneConfig) -> str | None:
    if config.family == 'vit':
        return 'it has no invertible adapters of images'
    if config.family == 'whisper':
        return "it changes the encoder's last states, and not its embedded input"
    return None


def _prompt(method: PromptTuning, config: BackboneConfig) -> str | None:
    if config.decoder is not None:
        return 'it has no prompts for models with a decoder'
    return None


def _prefix(method: PrefixTuning, config: BackboneConfig) -> str | None:
    counted = counts_keys(config)
    if method.count_keys != counted:
        return f'it has count_keys={counted} there, and this has count_keys={method.count_keys}'
    if not counted:
        return None
    left = set(method.leave_out)
    stacks = (
        (range(config.layers), method.encoder_prefix),
        (range(config.layers, config.depth), True),
    )
    if any(there and 0 < len(left & set(layers)) < len(layers) for layers, there in stacks):
        return 'where some layers of a stack have no prefix, it drops relative positions'
    return None


def _reft(method: ReFT, config: BackboneConfig) -> str | None:
    if config.decoder is None or not method.suffix_positions:
        return None
    return 'of a text that a decoder writes it takes other tokens for the last ones'


_PROBLEMS = {
    Invertible: _invertible,
    PromptTuning: _prompt,
    PrefixTuning: _prefix,
    ReFT: _reft,
}
