"""What PEFT's `adapter_config.json` may say, and which of it this project computes.

PEFT writes every setting of a method, most of them at a default that does nothing. A setting that
changes the numbers and that nobody here computes must stop the reader, by name; one that only
matters in training, or that says where the file comes from, must not.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax.adapters import fields

CONFIG = 'adapter_config.json'
VERSION = '0.21.2'  # of PEFT, whose settings these are

Names = tuple[str, ...] | str | None  # a list of names, or one regular expression

_ALL_TYPES = {
    'auto_mapping': None,
    'base_model_name_or_path': None,
    'inference_mode': True,
    'modules_to_save': None,
    'peft_version': VERSION,
    'revision': None,
    'task_type': None,
}
_TARGETS = {'target_modules': None}
_LAYERS = {'layers_pattern': None, 'layers_to_transform': None}
_LORA = {
    'alora_invocation_tokens': None,
    'alpha_pattern': {},
    'arrow_config': None,
    'bias': 'none',
    'corda_config': None,
    'ensure_weight_tying': False,
    'eva_config': None,
    'exclude_modules': None,
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'kasa_config': None,
    'layer_replication': None,
    'loftq_config': {},
    'lora_alpha': 8,
    'lora_bias': False,
    'lora_dropout': 0.0,
    'lora_ga_config': None,
    'megatron_config': None,
    'megatron_core': 'megatron.core',
    'monteclora_config': None,
    'qalora_group_size': 16,
    'r': 8,
    'rank_pattern': {},
    'target_parameters': None,
    'trainable_token_indices': None,
    'use_bdlora': None,
    'use_dora': False,
    'use_qalora': False,
    'use_rslora': False,
    'velora_config': None,
}
_PROMPT = {
    'num_attention_heads': None,
    'num_layers': None,
    'num_transformer_submodules': None,
    'num_virtual_tokens': None,
    'token_dim': None,
}

# The settings that PEFT writes for each type, with their defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    'LORA': _ALL_TYPES | _TARGETS | _LAYERS | _LORA,
    'ADALORA': {
        **_ALL_TYPES | _TARGETS | _LAYERS | _LORA,
        'beta1': 0.85,
        'beta2': 0.85,
        'deltaT': 1,
        'init_r': 12,
        'orth_reg_weight': 0.5,
        'rank_pattern': None,
        'target_r': 8,
        'tfinal': 0,
        'tinit': 0,
        'total_step': None,
    },
    'IA3': {
        **_ALL_TYPES | _TARGETS,
        'exclude_modules': None,
        'fan_in_fan_out': False,
        'feedforward_modules': None,
        'init_ia3_weights': True,
    },
    'VERA': {
        **_ALL_TYPES | _TARGETS | _LAYERS,
        'bias': 'none',
        'd_initial': 0.1,
        'fan_in_fan_out': False,
        'init_weights': True,
        'projection_prng_key': 0,
        'r': 256,
        'save_projection': True,
        'vera_dropout': 0.0,
    },
    'LN_TUNING': _ALL_TYPES | _TARGETS | {'exclude_modules': None},
    'PREFIX_TUNING': {
        **_ALL_TYPES | _PROMPT,
        'encoder_hidden_size': None,
        'init_weights': None,
        'prefix_projection': False,
    },
    'PROMPT_TUNING': {
        **_ALL_TYPES | _PROMPT,
        'prompt_tuning_init': 'RANDOM',
        'prompt_tuning_init_text': None,
        'tokenizer_kwargs': None,
        'tokenizer_name_or_path': None,
    },
    'P_TUNING': {
        **_ALL_TYPES | _PROMPT,
        'encoder_dropout': 0.0,
        'encoder_hidden_size': None,
        'encoder_num_layers': 2,
        'encoder_reparameterization_type': 'MLP',
    },
}

# What this project computes or needs, and the type of its value.
_READ: dict[str, Any] = {
    'alpha_pattern': Mapping[str, float] | None,
    'base_model_name_or_path': str | None,
    'beta1': float,
    'beta2': float,
    'bias': str,
    'd_initial': float,
    'deltaT': int,
    'exclude_modules': Names,
    'feedforward_modules': Names,
    'init_lora_weights': bool | str | None,
    'init_r': int,
    'layers_pattern': Names,
    'layers_to_transform': tuple[int, ...] | int | None,
    'lora_alpha': float,
    'lora_dropout': float,
    'modules_to_save': Names,
    'num_attention_heads': int | None,
    'num_layers': int | None,
    'num_transformer_submodules': int | None,
    'num_virtual_tokens': int,
    'orth_reg_weight': float,
    'projection_prng_key': int,
    'r': int,
    'rank_pattern': Mapping[str, int | tuple[bool, ...]] | None,
    'save_projection': bool,
    'target_modules': Names,
    'target_r': int,
    'task_type': str | None,
    'tfinal': int,
    'tinit': int,
    'token_dim': int | None,
    'total_step': int | None,
    'use_dora': bool,
    'use_rslora': bool,
    'vera_dropout': float,
}
# What only matters in training, is about another program, or only acts with a setting beside it.
_WITHOUT_EFFECT = {
    'auto_mapping',
    'corda_config',
    'encoder_dropout',
    'encoder_hidden_size',
    'encoder_num_layers',
    'encoder_reparameterization_type',
    'eva_config',
    'inference_mode',
    'init_ia3_weights',
    'init_weights',
    'loftq_config',
    'lora_ga_config',
    'megatron_core',
    'peft_type',
    'peft_version',
    'prefix_projection',
    'prompt_tuning_init',
    'prompt_tuning_init_text',
    'qalora_group_size',
    'revision',
    'runtime_config',
    'tokenizer_kwargs',
    'tokenizer_name_or_path',
    'velora_config',
}
# Of the adapter, not of the backbone.
_HARMLESS_INITIALISATIONS = ('gaussian', 'eva', 'orthogonal', 'mica')


def parse(directory: Path) -> dict[str, Any] | None:
    """Return the JSON object in a folder's config, or None where there is none."""
    try:
        config = json.loads((Path(directory) / CONFIG).read_text('utf-8'))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def read(directory: Path) -> dict[str, Any]:
    """Return the checked settings of a folder, those it leaves out at their defaults.

    Lists come as tuples.

    Raises:
        FileNotFoundError: no config.
        ValueError: no JSON object, a type that is not supported, a value of the wrong type, or a
            setting that this project does not compute.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f'{directory} is not an adapter: it has no {CONFIG}')
    config = parse(directory)
    if config is None:
        raise ValueError(f'{path} holds no JSON object; restore it from its source')
    kind = config.get('peft_type')
    if not isinstance(kind, str) or kind not in DEFAULTS:
        raise ValueError(
            f'{path} has the peft_type {kind!r}, which is not supported; expected one of '
            f'{", ".join(sorted(DEFAULTS))}'
        )
    defaults = DEFAULTS[kind]
    for key, value in config.items():
        _check(path, key, value, defaults)
    settings = defaults | {'peft_type': kind} | {k: v for k, v in config.items() if k in defaults}
    settings = {key: fields.freeze(value) for key, value in settings.items()}
    for key, value in settings.items():
        _check_type(path, key, value)
    _check_initialisation(path, settings)
    return settings


def write(kind: str, **settings: Any) -> dict[str, Any]:
    """Return the whole config of a type, from the settings that are not at their defaults."""
    return dict(sorted((DEFAULTS[kind] | {'peft_type': kind} | settings).items()))


def _check(path: Path, key: str, value: Any, defaults: Mapping[str, Any]) -> None:
    """Refuse a setting that would change what is computed."""
    if not value or key in _WITHOUT_EFFECT or (key in defaults and key in _READ):
        return
    if key not in defaults:
        raise ValueError(
            f'{path} has {key}={value!r}, a setting that this project does not know; it would '
            'compute something else'
        )
    if value != defaults[key]:
        raise ValueError(
            f'{path} has {key}={value!r}, which this project does not compute; expected '
            f'{defaults[key]!r}. Merge the adapter with PEFT, and load the result as a backbone'
        )


def _check_type(path: Path, key: str, value: Any) -> None:
    if key in _READ and not fields.fits(value, _READ[key]):
        expected = fields.expected(_READ[key])
        raise ValueError(f'{path} has {key}={fields.thaw(value)!r}; expected {expected}')


def _check_initialisation(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse initialisations that take something out of the backbone's weights."""
    value = settings.get('init_lora_weights')
    if isinstance(value, str) and value.lower() not in _HARMLESS_INITIALISATIONS:
        raise ValueError(
            f'{path} has init_lora_weights={value!r}, which changes the weights of the backbone, '
            'and the file does not hold those; save the adapter with PEFT as plain LoRA '
            '(path_initial_model_for_weight_conversion)'
        )
