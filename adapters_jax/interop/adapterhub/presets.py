"""The names that `adapters` has for configurations, which a file may give in place of one.

Old names are kept, since the oldest files are the ones that name instead of describe.
"""

from typing import Any

from adapters_jax import grammar

_SEQ_BN = {
    'mh_adapter': False,
    'output_adapter': True,
    'reduction_factor': 16,
    'non_linearity': 'relu',
    'original_ln_before': True,
}
_DOUBLE_SEQ_BN = {
    'mh_adapter': True,
    'output_adapter': True,
    'reduction_factor': 16,
    'non_linearity': 'swish',
}
_PAR_BN = {
    'mh_adapter': False,
    'output_adapter': True,
    'reduction_factor': 2,
    'non_linearity': 'relu',
    'init_weights': 'mam_adapter',
    'is_parallel': True,
    'scaling': 4.0,
}
_INVERTIBLE = {'inv_adapter': 'nice', 'inv_adapter_reduction_factor': 2}
_COMPACTER = {'phm_layer': True, 'reduction_factor': 32, 'non_linearity': 'gelu'}
_PREFIX = {'architecture': 'prefix_tuning'}
_LORA = {'architecture': 'lora'}
_VERA = _LORA | {'vera_d': 0.1, 'vera_b': 0.0, 'init_weights': 'vera'}
_REFT = {
    'architecture': 'reft',
    'layers': 'all',
    'prefix_positions': 3,
    'suffix_positions': 0,
    'r': 1,
    'orthogonality': False,
}
_GATED = {'use_gating': True}


def _union(*configs: dict[str, Any]) -> dict[str, Any]:
    return {'architecture': 'union', 'configs': list(configs)}


PRESETS: dict[str, dict[str, Any]] = {
    'seq_bn': _SEQ_BN,
    'double_seq_bn': _DOUBLE_SEQ_BN,
    'par_bn': _PAR_BN,
    'scaled_par_bn': _PAR_BN | {'scaling': 'learned'},
    'seq_bn_inv': _SEQ_BN | _INVERTIBLE,
    'double_seq_bn_inv': _DOUBLE_SEQ_BN | _INVERTIBLE,
    'compacter++': _SEQ_BN | _COMPACTER,
    'compacter': _DOUBLE_SEQ_BN | _COMPACTER,
    'prefix_tuning': _PREFIX,
    'prefix_tuning_flat': _PREFIX | {'flat': True},
    'prompt_tuning': {'architecture': 'prompt_tuning'},
    'lora': _LORA,
    'ia3': _LORA
    | {
        'intermediate_lora': True,
        'r': 1,
        'alpha': 1,
        'attn_matrices': ['k', 'v'],
        'composition_mode': 'scale',
        'init_weights': 'ia3',
    },
    'vera': _VERA,
    'dora': _LORA | {'use_dora': True},
    'dvora': _VERA | {'use_dora': True},
    'mtl_lora': {'architecture': 'mtl_lora'},
    'loreft': _REFT | {'orthogonality': True},
    'noreft': _REFT,
    'direft': _REFT | {'subtract_projection': False},
    'mam': _union(_PREFIX | {'bottleneck_size': 800}, _PAR_BN),
    'unipelt': _union(
        _PREFIX | {'prefix_length': 10} | _GATED, _SEQ_BN | _GATED, _LORA | {'alpha': 2} | _GATED
    ),
}
_OLD_NAMES = {
    'pfeiffer': 'seq_bn',
    'houlsby': 'double_seq_bn',
    'parallel': 'par_bn',
    'scaled_parallel': 'scaled_par_bn',
    'pfeiffer+inv': 'seq_bn_inv',
    'houlsby+inv': 'double_seq_bn_inv',
}
NAMES = frozenset(PRESETS) | frozenset(_OLD_NAMES)


def resolve(text: str) -> dict[str, Any]:
    """Return the configuration that `name` or `name[field=value,...]|name` stands for.

    Raises:
        ValueError: an unknown name (the known ones are listed), or text that is none.
    """
    configs = [_named(name, options) for name, options in grammar.parse(text)]
    return configs[0] if len(configs) == 1 else _union(*configs)


def _named(name: str, options: dict[str, Any]) -> dict[str, Any]:
    preset = PRESETS.get(_OLD_NAMES.get(name, name))
    if preset is None:
        known = ', '.join(sorted(NAMES))
        raise ValueError(f'{name!r} is no configuration of `adapters`; known: {known}')
    return preset | options
