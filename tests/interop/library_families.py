"""The `adapters` library's models of every family, small and random, and what both compute.

A model is the library's own with a random backbone; ours has the weights of its checkpoint. What is
compared are all hidden states, the encoder's and the decoder's, at what is no padding.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import adapters
import jax
import numpy as np
import reference
import torch
import torch_families
from library_folders import CONFIGS
from torch_families import CASES

from adapters_jax.adapters import registry
from adapters_jax.adapters.binding import bind
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.models.backbone import Backbone, Inputs

CLASSES = {
    'bert': adapters.BertAdapterModel,
    'roberta': adapters.RobertaAdapterModel,
    'distilbert': adapters.DistilBertAdapterModel,
    'electra': adapters.ElectraAdapterModel,
    'electra-even': adapters.ElectraAdapterModel,
    'bart': adapters.BartAdapterModel,
    'mbart': adapters.MBartAdapterModel,
    't5': adapters.T5AdapterModel,
    't5-gated': adapters.T5AdapterModel,
    'whisper': adapters.WhisperAdapterModel,
    'vit': adapters.ViTAdapterModel,
}
# Beside the configs of the older tests, what only models with a decoder have places for.
METHODS = CONFIGS | {
    'cross_bn': adapters.DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
    'cross_par_bn': adapters.ParBnConfig(cross_adapter=True),
    'cross_compacter': adapters.CompacterConfig(reduction_factor=4, cross_adapter=True),
    'decoder_prefix': adapters.PrefixTuningConfig(
        encoder_prefix=False, prefix_length=3, bottleneck_size=5
    ),
    'no_cross_prefix': adapters.PrefixTuningConfig(cross_prefix=False, flat=True, prefix_length=3),
    'whole_prefix': adapters.PrefixTuningConfig(flat=True, prefix_length=3),
    'left_out_layers': adapters.LoRAConfig(r=4, leave_out=[0, 2]),
    'prefix_reft': adapters.LoReftConfig(r=2, prefix_positions=3, suffix_positions=0, dropout=0.0),
    'whole_decoder_prefix': adapters.PrefixTuningConfig(
        encoder_prefix=False, flat=True, prefix_length=3
    ),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A family's case, the weights of its backbone in torch, and ours."""

    name: str
    config: Any
    tensors: dict[str, torch.Tensor]
    loaded: LoadedBackbone

    def model(self):
        """Return a fresh model of the library with these weights and no adapter."""
        model = CLASSES[self.name](copy.deepcopy(self.config))
        found = model.base_model.load_state_dict(self.tensors, strict=False)
        assert not found.unexpected_keys
        assert all('base_model_embeddings' in name for name in found.missing_keys)
        return model.eval()


def make(name: str, directory: Path, **options: Any) -> Source:
    """Write a family's backbone as a checkpoint and return it."""
    case = CASES[name]
    config = case.config(**case.options | options, attn_implementation='eager')
    model = case.bare(config).eval()
    torch_families.randomise(model, 0)
    model.save_pretrained(directory)
    tensors = {key: x.clone() for key, x in model.state_dict().items()}
    return Source(name, config, tensors, load_backbone(str(directory)))


def adapted(source: Source, method: str, name: str = 'ad'):
    """Return a model of the library with an adapter whose weights are random."""
    model = source.model()
    torch.manual_seed(0)  # for the random bases of orthogonal projections, which are no parameters
    model.add_adapter(name, config=METHODS[method])
    randomise(source, model)
    model.set_active_adapters(name)
    return model.eval()


def randomise(source: Source, model: torch.nn.Module, seed: int = 1) -> None:
    """Randomise all but the backbone; the signs within an orthogonal projection stay."""
    signs = {
        name: x.detach().diagonal().clone()
        for name, x in model.named_parameters()
        if name.endswith('parametrizations.weight.original')
    }
    reference.randomise(model, seed)
    own = {f'{model.base_model_prefix}.{name}': x for name, x in source.tensors.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in own:
                parameter.copy_(own[name])
            elif name in signs:
                parameter.diagonal().copy_(signs[name])
            elif name.endswith(('.vera_D', '.vera_B')):  # as it starts, and as the paper has it
                parameter.copy_(torch.diag(1 + parameter.diagonal()))
            elif parameter.ndim == 2:  # states of a pre-LN stack must not grow without end
                parameter.mul_(0.3)


def reloaded(source: Source, directory: Path):
    """Return a fresh model of the library with the folder's adapter; nothing may be left over."""
    model, found = source.model(), {}
    name = model.load_adapter(str(directory), use_safetensors=True, loading_info=found)
    assert not any(found.values()), found
    model.set_active_adapters(name)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Given:
    """Inputs: texts, pictures or sound, and what a decoder has written; masks are [B, T]."""

    values: np.ndarray
    mask: np.ndarray | None = None
    target: np.ndarray | None = None
    target_mask: np.ndarray | None = None


def given(source: Source, padded: bool = True, seed: int = 0) -> Given:
    """Return random inputs of the family's kind."""
    kind, pad = CASES[source.name].kind, source.loaded.config.pad_id
    if kind == 'images':
        return Given(torch_families.inputs(source.name, seed=seed))
    target = written = None
    if kind in ('pairs', 'sound'):
        target, written = _texts(9, pad, seed + 10, padded)
    if kind == 'sound':
        return Given(torch_families.inputs(source.name, 3, seed), None, target, written)
    return Given(*_texts(13, pad, seed, padded), target, written)


def _texts(length: int, pad: int, seed: int, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    ids, real = torch_families.texts(3, length, pad, seed)
    if padded:
        return ids, real
    full = np.random.default_rng(seed).integers(3, 55, ids.shape).astype(np.int32)
    return full, np.ones_like(real)


def library_states(model, source: Source, x: Given) -> list[np.ndarray]:
    """Return the library's hidden states: the encoder's, then the decoder's.

    They are those in the type that the model's weights have.
    """
    return states_of(outputs(model.base_model, source, x))


def outputs(model: torch.nn.Module, source: Source, x: Given) -> Any:
    """Return what a torch model of the family's kind makes of the inputs."""
    kind = CASES[source.name].kind
    keys = {'images': 'pixel_values', 'sound': 'input_features'}
    values, dtype = torch.from_numpy(x.values), next(model.parameters()).dtype
    named = {keys.get(kind, 'input_ids'): values.to(dtype) if kind in keys else values.long()}
    if x.mask is not None:
        named['attention_mask'] = torch.from_numpy(x.mask).long()
    if x.target is not None:
        named['decoder_input_ids'] = torch.from_numpy(x.target).long()
        named['decoder_attention_mask'] = torch.from_numpy(x.target_mask).long()
    torch.set_default_dtype(dtype)  # of what the library makes on the way
    try:
        with torch.no_grad():
            return model(**named, output_hidden_states=True)
    finally:
        torch.set_default_dtype(torch.float32)


def states_of(found: Any) -> list[np.ndarray]:
    """Return all hidden states: the encoder's, then the decoder's."""
    if hasattr(found, 'decoder_hidden_states'):
        states = [*found.encoder_hidden_states, *found.decoder_hidden_states]
    else:
        states = list(found.hidden_states)
        if hasattr(found, 'last_hidden_state'):
            states[-1] = found.last_hidden_state
    return [state.numpy() for state in states]


def our_states(folder, source: Source, x: Given) -> list[np.ndarray]:
    """Return our hidden states, as `library_states` does."""
    config = source.loaded.config
    method = registry.from_json(folder.method)
    tree = folder.overlay(source.loaded.params, method.constants(config.dimensions))
    images = CASES[source.name].kind == 'images'
    values = x.values.transpose(0, 2, 3, 1) if images else x.values
    mask = None if x.mask is None else x.mask[:, None, None]
    more = {}
    if x.target is not None:
        seen = Inputs(x.target, mask=x.target_mask[:, None, None])
        more = {'target': seen, 'target_mask': mask}
    found = Backbone(config).apply(
        {'params': tree['backbone']},
        values,
        mask=mask,
        sites=bind(method, tree['adapters'].get(folder.name, {}), None),
        all_hidden=True,
        **more,
    )
    return [np.asarray(state) for state in jax.device_get(found)]


def difference(found: list[np.ndarray], expected: list[np.ndarray], x: Given) -> float:
    """Return the largest difference of two lists of states at what is no padding.

    Vectors that an adapter inserts stand before the text.
    """
    assert len(found) == len(expected)
    largest = 0.0
    encoders = len(found) if x.target is None else _count(found, x)
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        mask = x.mask if i < encoders else x.target_mask
        assert mine.shape == theirs.shape
        apart = np.abs(mine - theirs)
        if mask is not None:
            inserted = mine.shape[1] - mask.shape[1]
            apart = apart * np.pad(mask, ((0, 0), (inserted, 0)), constant_values=True)[..., None]
        largest = max(largest, float(apart.max()))
    return largest


def _count(states: list[np.ndarray], x: Given) -> int:
    """Return how many of the states are the encoder's."""
    return sum(state.shape[1] != x.target.shape[1] for state in states)


def make_ours(name: str, directory: Path) -> LoadedBackbone:
    """Write a family's backbone as a checkpoint, and return ours; the library need not have it."""
    case = CASES[name]
    model = case.bare(case.config(**case.options)).eval()
    torch_families.randomise(model, 0)
    model.save_pretrained(directory)
    return load_backbone(str(directory))


def our_folder(loaded: LoadedBackbone, text: str) -> AdapterFolder:
    """Return a fresh adapter of ours, without a head."""
    method = registry.create(text)
    tree = method.init(jax.random.key(0), loaded.config.dimensions, loaded.params)
    return AdapterFolder(
        name='ad',
        method=method.to_json(),
        head={},
        task={},
        backbone=loaded.describe(),
        max_length=loaded.config.positions,
        pair=None,
        adapter_params=tree,
        head_params={},
    )
