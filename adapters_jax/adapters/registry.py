"""Methods by name: the presets of papers and libraries, and the way from text or JSON."""

import itertools
from collections.abc import Mapping
from typing import Any

from adapters_jax.adapters import grammar
from adapters_jax.adapters.attention import AttentionAdapter, SideAttentionAdapter
from adapters_jax.adapters.baselines import FullFineTuning, HeadOnly, TopLayers
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.union import Union

_HOULSBY = Bottleneck(  # Houlsby et al. 2019, section 3.1
    mh_adapter=True,
    output_adapter=True,
    size=64,
    non_linearity='gelu_new',
    init_weights='houlsby',
    train_norms=True,
)
_DOUBLE_SEQ_BN = Bottleneck(  # where Houlsby et al. put it, as `adapters` has it
    mh_adapter=True, output_adapter=True, reduction_factor=16, non_linearity='swish'
)
_SEQ_BN = Bottleneck(  # Pfeiffer et al. 2021, section 3.2
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=16,
    non_linearity='relu',
    original_ln_before=True,
)
_PAR_BN = Bottleneck(  # He et al. 2022, section 4.2
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=2,
    non_linearity='relu',
    is_parallel=True,
    init_weights='mam_adapter',
    scaling=4.0,
)
_SCALED_PAR_BN = Bottleneck(
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=2,
    non_linearity='relu',
    is_parallel=True,
    init_weights='mam_adapter',
    scaling='learned',
)
_ADAPTER_PLUS = Bottleneck(  # Steitz and Roth 2024, section 3
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=96,
    non_linearity='gelu',
    original_ln_before=True,
    original_ln_after=False,
    residual_before_ln=False,
    init_weights='houlsby',
    scaling='channel',
    stochastic_depth=0.1,
)

PRESETS: dict[str, Method] = {
    'houlsby': _HOULSBY,
    'double_seq_bn': _DOUBLE_SEQ_BN,
    'pfeiffer': _SEQ_BN,
    'seq_bn': _SEQ_BN,
    'par_bn': _PAR_BN,
    'scaled_par_bn': _SCALED_PAR_BN,
    'adapter_plus': _ADAPTER_PLUS,
    'attention': AttentionAdapter(),
    'attention_side': SideAttentionAdapter(),
    'full': FullFineTuning(),
    'head': HeadOnly(),
    'top_layers': TopLayers(layers=2),
}

ARCHITECTURES: dict[str, type[Method]] = {
    cls.architecture: cls
    for cls in (
        Bottleneck,
        AttentionAdapter,
        SideAttentionAdapter,
        FullFineTuning,
        HeadOnly,
        TopLayers,
    )
}


def create(text: str) -> Method:
    """Return the method that `name` or `name[option=value,...]` writes; see `grammar`.

    Raises:
        ValueError: an unknown name or option (the known ones are listed), or an invalid value.
    """
    methods = [_preset(name, options) for name, options in grammar.parse(text)]
    if len(methods) == 1:
        return methods[0]
    members = (m.members if isinstance(m, Union) else (m,) for m in methods)
    return Union(members=tuple(itertools.chain.from_iterable(members)))


def _preset(name: str, options: Mapping[str, Any]) -> Method:
    if name not in PRESETS:
        raise ValueError(f'unknown method {name!r}; known: {", ".join(sorted(PRESETS))}')
    preset = PRESETS[name]
    if isinstance(preset, Union):
        return _union_preset(name, preset, options)
    fields = {key: value for key, value in preset.to_json().items() if key != 'architecture'}
    return preset.from_fields(fields | options)


def _union_preset(name: str, preset: Union, options: Mapping[str, Any]) -> Union:
    """Return the preset with its members' options replaced: `mam[bottleneck={size: 64}]`."""
    named = preset.named()
    for member, changes in options.items():
        if member not in named or not isinstance(changes, Mapping):
            raise ValueError(
                f'{name} has no option {member!r} with the value {changes!r}; expected a dict of '
                f'options under one of its members: {", ".join(named)}'
            )
        fields = {k: v for k, v in named[member].to_json().items() if k != 'architecture'}
        named[member] = named[member].from_fields(fields | changes)
    return Union(members=tuple(named.values()))


def from_json(values: Mapping[str, Any]) -> Method:
    """Return the method of `values['architecture']` with the other values as its fields.

    Raises:
        ValueError: an unknown architecture or field (the known ones are listed), a missing one, or
            an invalid value.
    """
    fields = dict(values)
    architecture = fields.pop('architecture', None)
    if architecture == Union.architecture:
        return Union(members=tuple(from_json(member) for member in fields['members']))
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f'unknown architecture {architecture!r}; known: {", ".join(sorted(ARCHITECTURES))}'
        )
    return ARCHITECTURES[architecture].from_fields(fields)
