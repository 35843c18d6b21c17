"""Small live models of `adapters` and `peft` with prefixes and prompts, their weights as ours."""

import functools
import re

import adapters
import jax
import numpy as np
import peft
import reference
import transformers

from adapters_jax import params
from adapters_jax.adapters.binding import bind
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.families import tensor_names

PLAIN = {
    'bert': (transformers.BertConfig, transformers.BertModel),
    'roberta': (transformers.RobertaConfig, transformers.RobertaModel),
}
SIZES = {
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 48,
    'vocab_size': 61,
    'max_position_embeddings': 40,
    'attn_implementation': 'eager',  # with 'sdpa' the prompts of `adapters` look at padding
}
_GATE = re.compile(r'encoder\.layer\.(\d+)\.attention\.self\.prefix_tuning\.prefix_gates\.a\.(\w+)')
_LORA = re.compile(r'encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.loras\.a\.(.+)')


def adapters_model(config, family='bert', seed=0, **sizes):
    """Return a model of `adapters` with the adapter 'a' active and all weights random."""
    model = reference.torch_model(family, seed, **SIZES | sizes)
    model.add_adapter('a', config=config)
    model.set_active_adapters('a')
    reference.randomise(model, seed + 1)
    return model.eval()


def peft_model(config, family='bert', seed=0, **sizes):
    """Return a model of `peft` with all weights random."""
    config_class, model_class = PLAIN[family]
    model = peft.get_peft_model(model_class(config_class(**SIZES | sizes)), config)
    reference.randomise(model, seed)
    return model.eval()


def prefix_tree(model):
    """Return the prefix of a model of `adapters` as our tree."""
    tensors = {
        name.split('.self_prefix.')[1]: reference.to_array(tensor)
        for name, tensor in model.named_parameters()
        if '.self_prefix.' in name  # each is listed under one of its many names
    }
    gates = {
        (int(found[1]), found[2]): reference.to_array(tensor, flip=found[2] == 'weight')
        for name, tensor in model.named_parameters()
        if (found := _GATE.fullmatch(name))
    }
    adapted = model.adapters_config.match('a', adapters.PrefixTuningConfig)
    layers = [i for i in range(model.config.num_hidden_layers) if i not in adapted.leave_out]
    tree = prefix_from_tensors(tensors, layers, model.config.hidden_size)
    for i in layers if gates else ():
        gate = {'kernel': gates[i, 'weight'], 'bias': gates[i, 'bias']}
        tree[f'layer_{i}']['attention']['prefix']['gate'] = gate
    return tree


def prefix_from_tensors(tensors, layers, hidden):
    """Return our tree of the tensors of one prefix, the last of which is 2 L D wide."""
    if 'control_trans' in tensors:
        flat = tensors['control_trans'].reshape(-1, len(layers), 2, hidden)
        return {
            f'layer_{i}': {'attention': {'prefix': {'key': flat[:, n, 0], 'value': flat[:, n, 1]}}}
            for n, i in enumerate(layers)
        }
    weight = tensors['control_trans.2.weight'].reshape(len(layers), 2, hidden, -1)
    bias = tensors['control_trans.2.bias'].reshape(len(layers), 2, hidden)
    down = {'kernel': tensors['control_trans.0.weight'].T, 'bias': tensors['control_trans.0.bias']}
    shared = {'attention': {'embedding': tensors['wte.weight'], 'down': down}}
    return {'shared': shared} | {
        f'layer_{i}': {
            'attention': {
                'prefix': {
                    'key': {'kernel': weight[n, 0].T, 'bias': bias[n, 0]},
                    'value': {'kernel': weight[n, 1].T, 'bias': bias[n, 1]},
                }
            }
        }
        for n, i in enumerate(layers)
    }


def lora_tree(model):
    """Return the LoRAs of a model of `adapters` as our tree."""
    names = {'lora_A': 'a', 'lora_B': 'b', 'gate.weight': 'gate/kernel', 'gate.bias': 'gate/bias'}
    leaves = {}
    for name, tensor in model.named_parameters():
        if found := _LORA.fullmatch(name):
            path = f'layer_{found[1]}/attention/{found[2]}/{names[found[3]]}'
            leaves[path] = reference.to_array(tensor, flip=found[3] != 'gate.bias')
    return params.unflatten(leaves)


def backbone_tree(model):
    """Return the backbone of a model of either library, whatever it is wrapped in."""
    config = reference.our_config(model)
    tensors = {re.sub(r'^(base_model\.)?(bert\.|roberta\.)?', '', k): v for k, v in _state(model)}
    return params.unflatten(
        {
            ours: reference.to_array(tensors[theirs], flip)
            for theirs, (ours, flip) in tensor_names(config).items()
        }
    )


def _state(model):
    return model.state_dict().items()


def our_hidden(method, tree, model, ids, mask, **inputs):
    """Return our hidden states, as a torch model returns its own."""
    config = reference.our_config(model)
    check_shapes(method, config.dimensions, tree)
    return _apply(config, method, tree, backbone_tree(model), ids, mask, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config, method, tree, backbone, ids, mask, inputs):
    return Backbone(config).apply(
        {'params': backbone},
        ids,
        mask=mask[:, None, None, :],
        sites=bind(method, tree, None),
        all_hidden=True,
        **inputs,
    )


def check_shapes(method, dimensions, theirs):
    """Our fresh tree has exactly the library's leaves and shapes."""
    backbone = {'embeddings': {'word': {'embedding': np.zeros((61, 32), np.float32)}}}
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), dimensions, backbone))
    shapes = {path: leaf.shape for path, leaf in params.flatten(fresh).items()}
    assert shapes == {path: leaf.shape for path, leaf in params.flatten(theirs).items()}


def difference(ours, theirs, kept=None):
    """Return the largest difference of any hidden state, at the columns that are kept."""
    assert len(ours) == len(theirs)
    kept = np.ones(theirs[0].shape[:2], bool) if kept is None else kept
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(np.asarray(a)[kept] - b[kept]).max() for a, b in pairs)
