"""Small live models of `adapters` and `peft` with low-rank methods, and their weights as ours."""

import re

import jax
import numpy as np
import peft
import reference
import transformers

from adapters_jax import params
from adapters_jax.adapters.binding import bind
from adapters_jax.models import families
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Dimensions

SIZES = {
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'intermediate_size': 48,
    'vocab_size': 61,
    'max_position_embeddings': 40,
}
BERT_BASE = Dimensions(
    layers=12,
    hidden=768,
    feed_forward=3072,
    heads=12,
    word=768,
    vocabulary=30522,
    positions=512,
)
MODULES = {
    'attention.self.query': 'attention/query',
    'attention.self.key': 'attention/key',
    'attention.self.value': 'attention/value',
    'attention.output.dense': 'attention/output',
    'intermediate.dense': 'feed_forward/up',
    'output.dense': 'feed_forward/down',
}
_LEAVES = {
    'lora_A': 'a',
    'lora_B': 'b',
    'm.weight': 'magnitude',
    'gate.weight': 'gate/kernel',
    'gate.bias': 'gate/bias',
    'vera_D': 'vera_d',
    'vera_B': 'vera_b',
    'lora_A.default.weight': 'a',
    'lora_B.default.weight': 'b',
    'lora_magnitude_vector.default.weight': 'magnitude',
    'vera_lambda_d.default': 'd',
    'vera_lambda_b.default': 'b',
    'ia3_l.default': 'ia3_l',
}
_TURNED = {'lora_A', 'lora_B', 'gate.weight', 'lora_A.default.weight', 'lora_B.default.weight'}
_TENSOR = re.compile(
    r'(?:base_model\.model\.)?encoder\.layer\.(\d+)\.(.+?)\.(?:loras\.a\.)?('
    + '|'.join(map(re.escape, _LEAVES))
    + ')'
)


def adapters_model(config, seed=0):
    """Return a model of `adapters` with the adapter 'a' active and all weights random."""
    model = reference.torch_model('bert', seed, **SIZES)
    model.add_adapter('a', config=config)
    model.set_active_adapters('a')
    reference.randomise(model, seed + 1)
    return model.eval()


def peft_model(config, seed=0):
    """Return a model of `peft` with all weights random, the biases among them."""
    plain = transformers.BertModel(transformers.BertConfig(**SIZES))
    model = peft.get_peft_model(plain, config)
    reference.randomise(model, seed)
    return model.eval()


def leaves_of(model):
    """Return the trained tensors of a model's adapter by our path of the place and a leaf name."""
    leaves = {}
    for name, tensor in model.named_parameters():
        found = _TENSOR.fullmatch(name)
        if found is not None:
            leaf = _LEAVES[found[3]]
            array = reference.to_array(tensor, flip=found[3] in _TURNED)
            array = array.reshape(-1) if leaf == 'magnitude' else array
            leaves[f'layer_{found[1]}/{MODULES[found[2]]}/{leaf}'] = array
    assert leaves
    return leaves


def tree_of(model):
    """Return the adapter of a model as our tree, where the two agree on names and shapes."""
    return params.unflatten(leaves_of(model))


def backbone_tree(model):
    """Return the backbone of a model of either library."""
    tensors = {
        re.sub(r'^base_model\.model\.|base_layer\.', '', name): tensor
        for name, tensor in model.state_dict().items()
    }
    names = families.tensor_names(reference.our_config(model))
    return params.unflatten(
        {ours: reference.to_array(tensors[name], flip) for name, (ours, flip) in names.items()}
    )


def difference(method, tree, model, padded=True):
    """Return the largest difference of any hidden state between a torch model and ours."""
    config = reference.our_config(model)
    backbone = backbone_tree(model)
    check_shapes(method, config.dimensions, backbone, tree)
    ids, mask = reference.texts(model, padded=padded)
    expected = reference.torch_hidden(model, ids, mask)
    found = Backbone(config).apply(
        {'params': backbone},
        ids,
        mask=mask[:, None, None, :],
        sites=bind(method, tree, None),
        all_hidden=True,
    )
    assert len(found) == len(expected) == config.layers + 1
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))


def check_shapes(method, dimensions, backbone, theirs):
    """Our fresh tree has exactly the given leaves and shapes."""
    fresh = jax.eval_shape(lambda: method.init(jax.random.key(0), dimensions, backbone))
    shapes = {path: leaf.shape for path, leaf in params.flatten(fresh).items()}
    assert shapes == {path: leaf.shape for path, leaf in params.flatten(theirs).items()}


def base_kernels():
    """Return the shapes of the projections of a BERT-base, as `init` wants its backbone."""
    shapes = {}
    for i in range(BERT_BASE.layers):
        for name in ('query', 'key', 'value', 'output'):
            shapes[f'layer_{i}/attention/{name}/kernel'] = (768, 768)
        shapes[f'layer_{i}/feed_forward/up/kernel'] = (768, 3072)
        shapes[f'layer_{i}/feed_forward/down/kernel'] = (3072, 768)
    return params.unflatten(
        {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}
    )


def base_count(method):
    """Return the number of trained parameters at BERT-base; constants are not trained."""
    tree = jax.eval_shape(
        lambda backbone: method.init(jax.random.key(0), BERT_BASE, backbone), base_kernels()
    )
    return params.count({name: leaf for name, leaf in tree.items() if name != 'constants'})
