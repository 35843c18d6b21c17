"""BitFit and LayerNorm tuning train the leaves that their papers name, and no others."""

import re

import jax
import numpy as np
import peft
import pytest
import small_bert as small
import torch
import transformers

from adapters_jax import params
from adapters_jax.adapters.tuning import BitFit, LayerNormTuning
from adapters_jax.models import families
from adapters_jax.models.families import tensor_names

NORMS = ['embeddings', *(f'layer_{i}/{s}' for i in range(3) for s in ('attention', 'feed_forward'))]


def tuned(method, dimensions=small.DIMENSIONS, backbone=None):
    """Return the paths below `backbone` that the method trains."""
    tree = {'backbone': small.backbone() if backbone is None else backbone}
    leaves, _ = params.partition(tree, (*method.rules(dimensions), params.freeze('.*')))
    return {path.removeprefix('backbone/'): leaf for path, leaf in params.flatten(leaves).items()}


def bert_base():
    """Return the dimensions and the shapes of BERT-base."""
    theirs = transformers.BertConfig()
    with torch.device('meta'):
        model = transformers.BertModel(theirs)
    config = families.read_config(theirs.to_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    leaves = {
        ours: jax.ShapeDtypeStruct(shapes[name], np.float32)
        for name, (ours, _) in tensor_names(config).items()
    }
    return config.dimensions, params.unflatten(leaves)


def test_bitfit_trains_every_bias():
    everything = params.flatten(small.backbone())
    found = tuned(BitFit())
    assert set(found) == {path for path in everything if path.endswith('/bias')}
    assert 'pooler/bias' in found and 'embeddings/norm/bias' in found
    assert BitFit().init(jax.random.key(0), small.DIMENSIONS, {}) == {}


def test_partial_bitfit_trains_two_biases_a_layer():
    found = tuned(BitFit(biases='partial'))
    expected = [
        f'layer_{i}/{p}/bias' for i in range(3) for p in ('attention/query', 'feed_forward/up')
    ]
    assert set(found) == set(expected)


def test_layer_norm_tuning_trains_every_layer_norm():
    found = tuned(LayerNormTuning())
    assert set(found) == {f'{p}/norm/{leaf}' for p in NORMS for leaf in ('scale', 'bias')}


def test_counts_at_bert_base():
    """A layer has 11 D biases, 2 sub-layers have a LayerNorm; D more are the embeddings' and the
    pooler's. Ben Zaken et al. count 0.1M and, for the two, 0.04 % of 110M."""
    dimensions, backbone = bert_base()
    counts = {
        method: sum(
            int(np.prod(leaf.shape)) for leaf in tuned(method, dimensions, backbone).values()
        )
        for method in (BitFit(), BitFit(biases='partial'), LayerNormTuning())
    }
    assert list(counts.values()) == [102_912, 46_080, 38_400]
    assert counts[BitFit()] == 12 * 11 * 768 + 2 * 768


@pytest.mark.filterwarnings('ignore:Unsupported layer type')  # PEFT says it of every LayerNorm
def test_layer_norm_tuning_trains_what_peft_does():
    sizes = {'hidden_size': 24, 'num_hidden_layers': 3, 'num_attention_heads': 3}
    sizes |= {'intermediate_size': 52, 'vocab_size': 50, 'max_position_embeddings': 40}
    config = transformers.BertConfig(**sizes)
    model = peft.get_peft_model(
        transformers.BertModel(config), peft.LNTuningConfig(target_modules=['LayerNorm'])
    )
    theirs = {
        re.sub(r'^base_model\.model\.|\.ln_tuning_layers\.default', '', name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    names = tensor_names(families.read_config(config.to_dict()))
    assert {names[name][0] for name in theirs} == set(tuned(LayerNormTuning()))


@pytest.mark.parametrize(
    ('method', 'layer'),
    [
        (BitFit(), 0),
        (BitFit(biases='partial'), 0),
        (BitFit(biases='partial', leave_out=[0, 1]), 2),
        (BitFit(leave_out=[0, 1]), 0),
        (BitFit(leave_out=[0, 1], embedding_norm=False), 2),
        (LayerNormTuning(), 0),
        (LayerNormTuning(leave_out=[0]), 0),
        (LayerNormTuning(leave_out=[0], embedding_norm=False), 1),
    ],
)
def test_the_trunk_ends_where_training_begins(method, layer):
    assert method.first_layer({}, small.DIMENSIONS) == layer


@pytest.mark.parametrize('method', [BitFit, LayerNormTuning])
def test_leave_out(method):
    found = tuned(method(leave_out=[1], embedding_norm=False))
    assert {path.split('/')[0] for path in found} - {'pooler'} == {'layer_0', 'layer_2'}
    with pytest.raises(ValueError, match='leave_out names layer 3'):
        method(leave_out=[3]).rules(small.DIMENSIONS)


def test_layer_numbers_are_not_prefixes():
    dimensions, backbone = bert_base()
    method = LayerNormTuning(leave_out=[*range(2, 12)], embedding_norm=False)
    layers = {path.split('/')[0] for path in tuned(method, dimensions, backbone)}
    assert layers == {'layer_0', 'layer_1'}


def test_refusals():
    with pytest.raises(ValueError, match="biases='some' is not valid; expected 'all' or 'partial'"):
        BitFit(biases='some')
    with pytest.raises(ValueError, match='embedding_norm=1 is not valid; expected True or False'):
        LayerNormTuning(embedding_norm=1)
