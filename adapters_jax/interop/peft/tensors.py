"""The tensors of a PEFT folder, sorted by what they belong to, each of them accounted for.

Names begin with `base_model.model.` (`base_model.` in folders of prompts), then comes the prefix of
the encoder in a model with a head, such as `bert.`. Both are stripped. Some folders hold a tensor
more than once, since PEFT collects biases by their names' ends; the copies are dropped.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as to_bytes

from adapters_jax.interop import hf_heads, modules, torch_pickle
from adapters_jax.interop.tensors import SafetensorsFile, check_is_weights, contents
from adapters_jax.models import families
from adapters_jax.models.backbone import BackboneConfig

SAFETENSORS, TORCH = 'adapter_model.safetensors', 'adapter_model.bin'
Tensors = dict[str, np.ndarray]

# What each type trains: by module, or for the whole model.
PARAMETERS = {
    'LORA': ('lora_A.weight', 'lora_B.weight', 'lora_magnitude_vector'),
    'ADALORA': ('lora_A', 'lora_B', 'lora_E'),
    'IA3': ('ia3_l',),
    'VERA': ('vera_lambda_d', 'vera_lambda_b'),
    'LN_TUNING': ('ln_tuning_layers.weight', 'ln_tuning_layers.bias'),
}
WHOLE = {
    'VERA': ('vera_A', 'vera_B'),
    'PREFIX_TUNING': ('prompt_embeddings',),
    'PROMPT_TUNING': ('prompt_embeddings',),
    'P_TUNING': ('prompt_embeddings',),
}
_OUTER = re.compile(r'base_model\.(model\.)?')
# A buffer of BART and its kin, which older PEFT took for one of the biases that it stores.
_UNTRAINED = 'final_logits_bias'


@dataclasses.dataclass(frozen=True)
class Contents:
    """The tensors in float32, by names without prefixes.

    `modules` has those of the method by the module they adapt, `whole` those that no module owns,
    `leaves` tensors of the backbone itself, `classifier` those of the head.
    """

    prefix: str  # of the encoder in the adapted model: 'bert.' or, for a bare encoder, ''
    modules: dict[str, Tensors]
    whole: Tensors
    leaves: Tensors
    classifier: Tensors


def read(directory: Path, kind: str, config: BackboneConfig) -> Contents:
    """Read and sort the tensors of a folder.

    Raises:
        FileNotFoundError: no tensor file.
        ValueError: a damaged file, tensors that are not finite floating-point numbers, or tensors
            that a folder of this type cannot hold; these are listed.
    """
    inside = modules.prefix(config)
    tensors, prefix = {}, ''
    for name, tensor in _read_file(Path(directory)).items():
        inner = _OUTER.sub('', name, count=1) if _OUTER.match(name) else name
        prefix = inside if inner.startswith(inside) else prefix
        standard = inner.removeprefix(inside)
        if standard in tensors:
            raise ValueError(f'{directory} has two tensors for {standard}: {name} is the second')
        tensors[standard] = tensor
    return _sort(_without_copies(tensors), prefix, kind, config, directory)


def _read_file(directory: Path) -> Tensors:
    for name in (SAFETENSORS, TORCH):
        path = directory / name
        if path.is_file():
            check_is_weights(path)
            read = SafetensorsFile if name == SAFETENSORS else torch_pickle.load
            return {key: _checked(path, key, tensor) for key, tensor in read(path).items()}
    found = contents(directory) if directory.is_dir() else 'nothing'
    raise FileNotFoundError(
        f'{directory} has no tensors: expected {SAFETENSORS} or {TORCH}; it holds {found}'
    )


def _checked(path: Path, name: str, tensor: np.ndarray) -> np.ndarray:
    """Return a copy in float32: a view of the mapped file would die with it."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f'{path}: {name} holds {tensor.dtype}, expected floating-point numbers')
    with np.errstate(over='ignore'):
        copy = np.array(tensor, np.float32, order='C')
    if not np.isfinite(copy).all():
        raise ValueError(f'{path}: {name} holds NaN or infinity; restore it from its source')
    return copy


def _without_copies(tensors: Tensors) -> Tensors:
    """Drop copies: the untrained module beside a trained one, and the trained one's second name."""
    kept = {}
    for name, tensor in tensors.items():
        plain = name.replace('.base_layer.', '.')
        before, inside, after = plain.partition('.modules_to_save.')
        if inside:
            plain = f'{before}.{after}'
        # The second name may have the adapter's own in it.
        named = f'{before}.{after.partition(".")[2]}'
        if '.original_module.' in name or (inside and {plain, named} & set(tensors)):
            continue
        kept[plain.removesuffix('.weight') if _is_magnitude(plain) else plain] = tensor
    return kept


def _is_magnitude(name: str) -> bool:
    return name.endswith('.lora_magnitude_vector.weight')  # as PEFT keeps it in memory


def _sort(
    tensors: Tensors, prefix: str, kind: str, config: BackboneConfig, directory: Path
) -> Contents:
    sorted_ = Contents(prefix, {}, {}, {}, {})
    leaves = families.tensor_names(config)
    unknown = []
    for name, tensor in tensors.items():
        ending = next((p for p in PARAMETERS.get(kind, ()) if name.endswith(f'.{p}')), None)
        if name == _UNTRAINED and config.decoder is not None:
            continue
        if ending is not None:
            module = name.removesuffix(f'.{ending}')
            sorted_.modules.setdefault(module, {})[ending] = tensor
        elif name in WHOLE.get(kind, ()):
            sorted_.whole[name] = tensor
        elif name in leaves:
            sorted_.leaves[name] = tensor
        elif hf_heads.is_head(name):
            sorted_.classifier[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f'{directory} has tensors that no {kind} adapter of a {config.family} model has: '
            f'{listed(unknown)}'
        )
    return sorted_


def expect_shapes(module: str, found: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors of a module that are missing, unexpected or of another shape.

    Raises:
        ValueError: the first of them.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise ValueError(f'{module}.{name} is missing; restore the folder from its source')
        if found[name].shape != shape:
            raise ValueError(
                f'{module}.{name} has shape {found[name].shape}, expected {shape}: the config and '
                'the backbone say so'
            )
    for name in found:
        if name not in wanted:
            raise ValueError(f'{module}.{name} is unexpected: the config asks for no such tensor')


def listed(names: list[str]) -> str:
    """Return the first names of a list, for messages."""
    more = f' and {len(names) - 5} more' if len(names) > 5 else ''
    return ', '.join(names[:5]) + more


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file that torch's readers take for one of their own."""
    plain = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    path.write_bytes(to_bytes(plain, {'format': 'pt'}))
