"""What older files mean that do not say it: the rules by which `adapters` 1.3.0 reads them.

(`loading.py` and `BnConfig` of the library.) Files of `adapter-transformers` 1 have no version, no
architecture and other names of tensors; files of `adapters` before 1.1.0 hold LoRAs that were
trained without their scale.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax.adapters.invertible import Invertible
from adapters_jax.interop.adapterhub import presets
from adapters_jax.interop.adapterhub.configs import UNION, Part

_LOG = logging.getLogger(__name__)
_ACTIVATIONS = {'gelu': 'gelu_new', 'gelu_orig': 'gelu'}
_TENSORS = {
    'attention_text_task_adapters': 'adapters',
    'attention_text_lang_adapters': 'adapters',
    'layer_text_task_adapters': 'adapters',
    'layer_text_lang_adapters': 'adapters',
    'invertible_lang_adapters': 'invertible_adapters',
}
_VERSION = re.compile(r'adapters\.(\d+)\.(\d+)(\.\d+)?(.*)')


def tensor_name(name: str) -> str:
    """Return today's name of a tensor."""
    for old, new in _TENSORS.items():
        name = name.replace(old, new)
    return name


def config(values: Mapping[str, Any], path: Path, given: Mapping | str | None) -> dict[str, Any]:
    """Return the configuration in a file as today's library would write it.

    `given` replaces what the file has, or lacks.

    Raises:
        ValueError: a file without a configuration, or with an unknown name for one.
    """
    found = values.get('config') if given is None else given
    if found is None:
        names = [values.get(key) for key in ('config_id', 'architecture')]
        found = next((name for name in names if _is_preset(name)), None)
    if isinstance(found, str):
        found = presets.resolve(found)
    if not isinstance(found, Mapping):
        raise ValueError(
            f'{path} has config={found!r}, which does not say what the adapter is; write there '
            'what it is, such as "config": "pfeiffer" (a name or all its options), or restore the '
            'file'
        )
    members = found.get('configs') if found.get('architecture') == UNION else None
    if isinstance(members, list) and all(isinstance(member, Mapping) for member in members):
        return dict(found) | {'configs': [_member(member, values) for member in members]}
    return _member(found, values)


def _is_preset(name: Any) -> bool:
    return isinstance(name, str) and name in presets.NAMES


def _member(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(config)
    activation = config.get('non_linearity')
    if 'version' not in values and isinstance(activation, str):
        config['non_linearity'] = _ACTIVATIONS.get(activation, activation)
    block = config.get('invertible_adapter')
    if isinstance(block, Mapping):
        config['inv_adapter'] = block.get('block_type')
        config['inv_adapter_reduction_factor'] = block.get('reduction_factor')
    if config.get('architecture') == 'lora' and _scale_was_ignored(values.get('version')):
        rank, alpha = config.get('r', 8), config.get('alpha', 8)
        if rank != alpha:
            _LOG.warning(
                'alpha=%s is read as %s: the version that wrote the adapter trained it so',
                alpha,
                rank,
            )
        config['alpha'] = rank
    return config


def _scale_was_ignored(version: Any) -> bool:
    """Tell whether the version is one of `adapters` before 1.1.0."""
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        return False
    release = (int(match[1]), int(match[2]), match[3] or '.0')
    before_release = re.match(r'\W?(dev|a|b|rc)', match[4]) is not None
    return release[:2] < (1, 1) or (release == (1, 1, '.0') and before_release)


def without_unused(
    parts: Sequence[Part], values: Mapping[str, Any], tensors: Iterable[str]
) -> list[Part]:
    """Return the methods without the invertible adapter that task adapters named and never had."""
    unused = values.get('type') == 'text_task' and not any(
        name.startswith('invertible_adapters.') for name in tensors
    )
    kept = [part for part in parts if not (unused and isinstance(part.method, Invertible))]
    return kept or list(parts)
