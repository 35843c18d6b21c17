"""Models of `peft` with AdaLoRA, small and random, and their parameters as our trees."""

import re

import numpy as np
import peft
import reference
import torch
import transformers
from low_rank_models import MODULES

from adapters_jax import params

TENSOR = re.compile(
    r'encoder\.layer\.(?P<layer>\d+)\.(?P<place>[\w.]+)\.lora_(?P<leaf>[AEB])\.default'
)


def plain_bert(seed=0):
    """Return a small random BERT of `transformers`."""
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=61,
        max_position_embeddings=40,
    )
    model = transformers.BertModel(config)
    reference.randomise(model, seed)
    return model.eval()


def live(targets=('query', 'value'), seed=0, **options):
    """Return a model of `peft` with AdaLoRA on it, all weights random, and its backbone's tree."""
    model = plain_bert(seed)
    backbone = reference.backbone_tree(model)
    defaults = {'init_r': 4, 'target_r': 2, 'total_step': 12, 'target_modules': list(targets)}
    model = peft.get_peft_model(model, peft.AdaLoraConfig(**defaults | options))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if TENSOR.search(name):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), backbone


def tree_of(model, read=lambda parameter: parameter):
    """Return what `read` takes from each AdaLoRA parameter of a model of `peft` as our tree."""
    leaves = {}
    for name, parameter in model.named_parameters():
        if found := TENSOR.search(name):
            path = f'layer_{found["layer"]}/{MODULES[found["place"]]}/{found["leaf"].lower()}'
            value = reference.to_array(read(parameter), flip=found['leaf'] != 'E')
            leaves[path] = value.reshape(-1) if found['leaf'] == 'E' else value
    return params.unflatten(leaves)


def give(model, gradients):
    """Set the gradients of a model of `peft`."""
    leaves = params.flatten(gradients)
    for name, parameter in model.named_parameters():
        if found := TENSOR.search(name):
            path = f'layer_{found["layer"]}/{MODULES[found["place"]]}/{found["leaf"].lower()}'
            value = np.array(leaves[path])
            value = value[:, None] if found['leaf'] == 'E' else value.T
            parameter.grad = torch.tensor(value)
