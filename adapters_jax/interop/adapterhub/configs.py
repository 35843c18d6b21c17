"""The configurations of `adapters` as methods of ours, and the reverse.

One configuration may be two methods: a bottleneck and what stands at the embeddings. Several may be
a union. What depends on more than options (LoRA's factors, old files) is in `low_rank` and
`legacy`.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.compacter import Compacter
from adapters_jax.adapters.invertible import Invertible
from adapters_jax.adapters.method import Method, adapted_layers
from adapters_jax.adapters.prefix import PrefixTuning
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.reft import ReFT
from adapters_jax.interop.adapterhub import low_rank
from adapters_jax.interop.adapterhub.schema import (
    SCHEMAS,
    BnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ReftConfig,
    Schema,
)
from adapters_jax.sites import Dimensions

UNION = 'union'
_PHM = tuple(f.name for f in dataclasses.fields(BnConfig) if 'phm' in f.name or 'hyper' in f.name)


class Part(NamedTuple):
    """A method, and the configuration that it comes from or goes to."""

    config: Schema
    method: Method


def read(values: Mapping[str, Any]) -> list[Part]:
    """Return the methods of a configuration, one or more.

    Raises:
        ValueError: an unknown architecture, a field that is missing, or an invalid value.
    """
    if values.get('architecture') != UNION:
        return _read_one(values)
    members = values.get('configs')
    if not isinstance(members, list) or not all(isinstance(m, dict) for m in members):
        raise ValueError(f'a union has configs={members!r}; expected a list of configurations')
    return list(itertools.chain.from_iterable(_read_one(member) for member in members))


def _read_one(values: Mapping[str, Any]) -> list[Part]:
    architecture = values.get('architecture')
    architecture = None if architecture == 'bottleneck' else architecture
    if architecture is not None and not isinstance(architecture, str):
        raise ValueError(f'the config has architecture={architecture!r}; expected text')
    if architecture not in SCHEMAS:
        known = ', '.join(name or 'bottleneck' for name in SCHEMAS)
        raise ValueError(f'unknown architecture {architecture!r}; known: {known}, {UNION}')
    config = SCHEMAS[architecture].from_json(values)
    return [Part(config, method) for method in _READERS[type(config)](config)]


def _fields(source: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def _common(a: type, b: type, *but: str) -> tuple[str, ...]:
    """Return the names of the fields that two classes share."""
    names = {field.name for field in dataclasses.fields(b)}
    return tuple(f.name for f in dataclasses.fields(a) if f.name in names and f.name not in but)


def _read_bottleneck(config: BnConfig) -> list[Method]:
    methods: list[Method] = []
    if config.mh_adapter or config.output_adapter or config.cross_adapter:
        cls = Compacter if config.phm_layer else Bottleneck
        methods.append(cls(**_fields(config, _common(BnConfig, cls))))
    if config.inv_adapter is not None:
        if config.inv_adapter_reduction_factor is None:
            raise ValueError(
                f'the config has inv_adapter={config.inv_adapter!r} without '
                'inv_adapter_reduction_factor; expected a number'
            )
        methods.append(
            Invertible(
                non_linearity=config.non_linearity,
                block_type=config.inv_adapter,
                reduction_factor=config.inv_adapter_reduction_factor,
            )
        )
    if not methods:
        raise ValueError('the config has neither an adapter after a sub-layer nor inv_adapter')
    return methods


def _read_prompt(config: PromptTuningConfig) -> list[Method]:
    # What the prompt started from is of no account any more, and its tokens are not known.
    names = _common(PromptTuningConfig, PromptTuning, 'prompt_init')
    return [PromptTuning(**_fields(config, names))]


def _read_reft(config: ReftConfig) -> list[Method]:
    if not config.output_reft:
        raise ValueError('the config of a reft adapter has output_reft=false, which adapts nothing')
    return [ReFT(**_fields(config, _common(ReftConfig, ReFT)))]


_READERS = {
    BnConfig: _read_bottleneck,
    PrefixTuningConfig: lambda config: [
        PrefixTuning(**_fields(config, _common(PrefixTuningConfig, PrefixTuning)))
    ],
    PromptTuningConfig: _read_prompt,
    ReftConfig: _read_reft,
    **{cls: lambda config: [low_rank.read(config)] for cls in low_rank.SCHEMAS},
}


def write(method: Method, dimensions: Dimensions) -> Schema:
    """Return the configuration of a method that is not low-rank.

    Raises:
        ValueError: a method or an option for which the library has no place; it is named.
    """
    for cls, writer in _WRITERS.items():
        if isinstance(method, cls):
            return writer(method, dimensions)
    raise ValueError(
        f'`adapters` has no method {method.architecture!r}; keep the adapter in the format of this '
        'project'
    )


def _write_bottleneck(method: Bottleneck, dimensions: Dimensions) -> BnConfig:
    _refuse(method, method.train_norms, 'trained LayerNorms of the backbone (train_norms=True)')
    shared = _fields(method, _common(BnConfig, type(method), 'reduction_factor', 'init_weights'))
    if isinstance(method, Compacter):
        blocks = method.shared_W_phm and not method.factorized_phm_W
        _refuse(method, blocks, 'shared_W_phm with full blocks (factorized_phm_W=False)')
        shared['phm_layer'] = True
    if not isinstance(method.scaling, str):
        shared['scaling'] = float(method.scaling)  # the library takes no whole number
    factor = method.reduction_factor
    return BnConfig(
        **shared,
        reduction_factor=_factor(method.size, dimensions.hidden) if factor is None else factor,
        # The other one is ours; it is of account at the start of training only.
        init_weights='bert' if method.init_weights == 'zero' else method.init_weights,
    )


def _factor(size: int, hidden: int) -> float:
    """Return a number by which the hidden size is divided to the adapter's, rounding down."""
    if hidden % size == 0:
        return hidden // size
    candidates = (hidden / size, hidden / (size + 0.5))
    return next(factor for factor in candidates if int(hidden // factor) == size)


def _write_invertible(method: Invertible, dimensions: Dimensions) -> BnConfig:
    return BnConfig(
        mh_adapter=False,
        output_adapter=False,
        reduction_factor=16,
        non_linearity=method.non_linearity,
        inv_adapter=method.block_type,
        inv_adapter_reduction_factor=method.reduction_factor,
    )


def _write_prefix(method: PrefixTuning, dimensions: Dimensions) -> PrefixTuningConfig:
    _refuse(method, method.shift_positions, 'shift_positions=True')
    return PrefixTuningConfig(**_fields(method, _common(PrefixTuningConfig, PrefixTuning)))


def _write_prompt(method: PromptTuning, dimensions: Dimensions) -> PromptTuningConfig:
    _refuse(method, method.site != 'embeddings', f'site={method.site!r}')
    # Any other start would be made, in vain, by whoever reads the file.
    names = _common(PromptTuningConfig, PromptTuning, 'prompt_init')
    return PromptTuningConfig(**_fields(method, names))


def _write_reft(method: ReFT, dimensions: Dimensions) -> ReftConfig:
    """`special.with_subtraction` has been applied to it."""
    layers = method.adapted(dimensions) if method.leave_out else method.layers
    return ReftConfig(**_fields(method, _common(ReftConfig, ReFT, 'layers')), layers=layers)


_WRITERS = {
    Bottleneck: _write_bottleneck,
    Invertible: _write_invertible,
    PrefixTuning: _write_prefix,
    PromptTuning: _write_prompt,
    ReFT: _write_reft,
}


def join(parts: Sequence[Schema], dimensions: Dimensions) -> dict[str, Any]:
    """Return the `config` entry of a file for the configurations of an adapter's methods.

    Raises:
        ValueError: two that the library cannot tell apart.
    """
    configs = _with_invertible(parts)
    for a, b in itertools.combinations(configs, 2):
        if a.architecture == b.architecture and not _apart(a, b, dimensions):
            raise ValueError(
                f'`adapters` cannot have two {a.architecture or "bottleneck"} members in the same '
                'layers; keep the adapter in the format of this project'
            )
    values = [config.to_json() for config in configs]
    return values[0] if len(values) == 1 else {'architecture': UNION, 'configs': values}


def _with_invertible(parts: Sequence[Schema]) -> list[Schema]:
    """Write an invertible adapter into the configuration of the bottleneck beside it."""
    configs = list(parts)
    alone = [c for c in configs if isinstance(c, BnConfig) and _is_invertible_only(c)]
    others = [c for c in configs if isinstance(c, BnConfig) and c not in alone]
    hosts = [c for c in others if alone and c.non_linearity == alone[0].non_linearity]
    if len(alone) != 1 or not hosts:
        return configs
    fields = ('inv_adapter', 'inv_adapter_reduction_factor')
    merged = dataclasses.replace(hosts[0], **_fields(alone[0], fields))
    return [merged if c is hosts[0] else c for c in configs if c is not alone[0]]


def _is_invertible_only(config: BnConfig) -> bool:
    others = config.mh_adapter or config.output_adapter or config.cross_adapter
    return config.inv_adapter is not None and not others


def _apart(a: Schema, b: Schema, dimensions: Dimensions) -> bool:
    """Tell whether the library accepts two configurations of one architecture."""
    if isinstance(a, BnConfig) and not (a.leave_out or b.leave_out):
        return a.mh_adapter != b.mh_adapter and a.output_adapter != b.output_adapter
    if not hasattr(a, 'leave_out'):
        return False
    layers = [set(adapted_layers(config.leave_out, dimensions)) for config in (a, b)]
    return not layers[0] & layers[1]


def _refuse(method: Method, condition: bool, what: str) -> None:
    if condition:
        raise ValueError(
            f'{method.architecture}: `adapters` has no {what}, so the adapter cannot be written in '
            'its format; keep it in the format of this project'
        )
