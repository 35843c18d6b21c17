"""Methods by name: the way from a line of text or from JSON to a method."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from adapters_jax import grammar
from adapters_jax.adapters.adalora import AdaLoRA
from adapters_jax.adapters.attention import AttentionAdapter, SideAttentionAdapter
from adapters_jax.adapters.baselines import FullFineTuning, HeadOnly, TopLayers
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.compacter import Compacter
from adapters_jax.adapters.composed import Composed
from adapters_jax.adapters.fusion import FusionConfig
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.invertible import Invertible
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.mtl_lora import MTLLoRA
from adapters_jax.adapters.prefix import PrefixTuning
from adapters_jax.adapters.presets import PRESETS
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.reft import ReFT
from adapters_jax.adapters.tuning import BitFit, LayerNormTuning
from adapters_jax.adapters.union import Union
from adapters_jax.adapters.vera import DVoRA, VeRA

ARCHITECTURES: dict[str, type[Method]] = {
    cls.architecture: cls
    for cls in (
        Bottleneck,
        Compacter,
        Invertible,
        ReFT,
        BitFit,
        LayerNormTuning,
        LoRA,
        DoRA,
        VeRA,
        DVoRA,
        AdaLoRA,
        MTLLoRA,
        IA3,
        PrefixTuning,
        PromptTuning,
        AttentionAdapter,
        SideAttentionAdapter,
        FullFineTuning,
        HeadOnly,
        TopLayers,
    )
}


def _composed(fields: Mapping[str, Any]) -> Composed:
    members, options = fields.get('members'), fields.get('fusion', {})
    for name, value in (('members', members), ('fusion', options)):
        if not isinstance(value, Mapping):
            raise ValueError(f'composed: {name}={value!r} is not valid; expected an object')
    for name, value in members.items():
        if not isinstance(value, Mapping):
            raise ValueError(f'composed: the member {name!r} is {value!r}; expected an object')
    frozen = fields.get('frozen_members', ())
    if not isinstance(frozen, list | tuple) or not all(isinstance(x, str) for x in frozen):
        raise ValueError(f'composed: frozen_members={frozen!r} is not valid; expected names')
    rest = {key: value for key, value in fields.items() if key not in ('members', 'fusion')}
    methods = {name: from_json(member) for name, member in members.items()}
    known = {field.name for field in dataclasses.fields(FusionConfig)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f'fusion has no option {unknown[0]!r}; known: {", ".join(sorted(known))}')
    return Composed.from_fields(rest | {'members': methods, 'fusion': FusionConfig(**options)})


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
    return _changed(preset, options)


def _changed(method: Method, options: Mapping[str, Any]) -> Method:
    """Return the method with some options replaced; one of two that exclude each other goes."""
    fields = {key: value for key, value in method.to_json().items() if key != 'architecture'}
    for given, other in (('size', 'reduction_factor'), ('reduction_factor', 'size')):
        if {given, other} <= set(fields) and options.get(given) is not None:
            fields[other] = None
    return method.from_fields(fields | options)


def _union_preset(name: str, preset: Union, options: Mapping[str, Any]) -> Union:
    """Return the preset with its members' options replaced: `mam[bottleneck={size: 64}]`."""
    named = preset.named()
    for member, changes in options.items():
        if member not in named or not isinstance(changes, Mapping):
            raise ValueError(
                f'{name} has no option {member!r} with the value {changes!r}; expected a dict of '
                f'options under one of its members: {", ".join(named)}'
            )
        named[member] = _changed(named[member], changes)
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
        members = fields.get('members')
        if not isinstance(members, list) or not all(isinstance(m, Mapping) for m in members):
            raise ValueError(f'union: members={members!r} is not valid; expected a list of methods')
        return Union(members=tuple(from_json(member) for member in members))
    if architecture == Composed.architecture:
        return _composed(fields)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f'unknown architecture {architecture!r}; known: {", ".join(sorted(ARCHITECTURES))}'
        )
    return ARCHITECTURES[architecture].from_fields(fields)
