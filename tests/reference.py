"""The same model twice: in torch, as `transformers` and `adapters` compute it, and as our trees.

Torch stays in here and in the tests; the package itself never imports it.
"""

import re
from typing import Any

import adapters
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from jaxtyping import Array

from adapters_jax import params
from adapters_jax.models import families
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.params import Tree

_FAMILIES = {
    'bert': (transformers.BertConfig, transformers.BertModel),
    'roberta': (transformers.RobertaConfig, transformers.RobertaModel),
}
_SITES = {'attention.output': 'attention', 'output': 'feed_forward'}
_ADAPTER_TENSOR = re.compile(
    r'encoder\.layer\.(?P<layer>\d+)\.(?P<site>attention\.output|output)'
    r'\.adapters\.(?P<name>[^.]+)\.(?P<rest>.+)'
)


def torch_model(family: str = 'bert', seed: int = 0, **changes: Any) -> torch.nn.Module:
    """Return a small random model of `transformers`, prepared by `adapters`, in evaluation mode."""
    config_class, model_class = _FAMILIES[family]
    sizes = {
        'hidden_size': 32,
        'num_hidden_layers': 3,
        'num_attention_heads': 4,
        'intermediate_size': 48,
        'vocab_size': 61,
        'max_position_embeddings': 40,
    }
    model = model_class(config_class(**sizes | changes))
    adapters.init(model)
    randomise(model, seed)
    return model.eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Set every parameter to random non-zero values: LayerNorm scales around 1, others around 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    scales = {id(norm.weight) for norm in norms}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if id(parameter) in scales else 0.2 * noise)


def add_bottleneck(model: torch.nn.Module, name: str, seed: int = 1, **options: Any) -> None:
    """Add a bottleneck adapter with random weights to the torch model and make it active."""
    model.add_adapter(name, config=adapters.BnConfig(**options))
    model.set_active_adapters(name)
    randomise(model, seed)
    model.eval()


def our_config(model: torch.nn.Module) -> BackboneConfig:
    """Return our config of a torch model."""
    return families.read_config(model.config.to_dict())


def backbone_tree(model: torch.nn.Module) -> Tree:
    """Return the torch model's own weights as our `backbone` tree."""
    tensors = model.state_dict()
    names = families.tensor_names(our_config(model))
    return params.unflatten(
        {ours: to_array(tensors[theirs], flip) for theirs, (ours, flip) in names.items()}
    )


def bottleneck_tree(model: torch.nn.Module, name: str) -> Tree:
    """Return the weights of a bottleneck adapter of the torch model as our tree."""
    leaves = {}
    for theirs, tensor in model.named_parameters():  # lists a shared tensor under one name only
        match = _ADAPTER_TENSOR.fullmatch(theirs)
        if match is not None and match['name'] == name:
            leaf = _adapter_leaf(match['rest'])
            path = f'layer_{match["layer"]}/{_SITES[match["site"]]}/{leaf}'
            leaves[path] = to_array(tensor, flip=leaf.endswith('kernel'))
    return params.unflatten(leaves)


def _adapter_leaf(rest: str) -> str:
    """Return our name of an adapter's tensor."""
    if rest == 'scaling':
        return rest
    module, _, kind = rest.rpartition('.')
    if module.startswith('adapter_norm_'):
        leaf = {'weight': 'scale', 'bias': 'bias'}[kind]
        return f'{module.removeprefix("adapter_")}/{leaf}'
    # With a LayerNorm before it, the down-projection is the second module of a sequence.
    part = {'adapter_up': 'up', 'gate': 'gate'}.get(module, 'down')
    return f'{part}/{"kernel" if kind == "weight" else "bias"}'


def to_array(tensor: torch.Tensor, flip: bool = False) -> Array:
    """Return a torch tensor as an array, transposed where torch keeps it as [out, in]."""
    array = tensor.detach().numpy()
    return jnp.asarray(array.T if flip else array)


def texts(
    model: torch.nn.Module, seed: int = 0, rows: int = 3, length: int = 9, padded: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return random `input_ids` and `mask` [B, T], True at tokens; `padded` rows end in padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, model.config.vocab_size, (rows, length))
    lengths = rng.integers(2, length, rows) if padded else np.full(rows, length)
    mask = np.arange(length) < lengths[:, None]
    return np.where(mask, ids, model.config.pad_token_id), mask


def torch_hidden(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Return the torch model's hidden states: of the embedded input and of every layer."""
    with torch.no_grad():
        output = model(
            torch.tensor(ids), attention_mask=torch.tensor(mask).long(), output_hidden_states=True
        )
    return [hidden.numpy() for hidden in output.hidden_states]
