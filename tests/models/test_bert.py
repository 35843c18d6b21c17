import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from flax import struct

from adapters_jax.models import families
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.bert import BertStem, default_positions
from adapters_jax.models.block import REMAT
from adapters_jax.models.families import tensor_names
from adapters_jax.params import flatten, size_bytes, unflatten
from adapters_jax.sites import Place, Sites

CLASSES = {
    'bert': (transformers.BertConfig, transformers.BertModel),
    'roberta': (transformers.RobertaConfig, transformers.RobertaModel),
}


def torch_model(family, hf_options, seed):
    """Return a torch model with weights far from initialisation, its config and our tree of it."""
    make_config, make_model = CLASSES[family]
    hf = make_config(**hf_options, attn_implementation='eager')
    torch_bert = make_model(hf).eval()
    config = families.read_config(json.loads(hf.to_json_string()))
    rng, leaves = np.random.default_rng(seed), {}
    state = torch_bert.state_dict()
    for name, (path, transpose) in tensor_names(config).items():
        shape = tuple(state[name].shape)
        leaf = tiny.random_leaf(rng, path, shape[::-1] if transpose else shape)
        state[name] = torch.from_numpy(leaf.T.copy() if transpose else leaf)
        leaves[path] = leaf
    # Every tensor of theirs has a place in our tree.
    assert set(state) - set(tensor_names(config)) <= {'embeddings.position_ids'}
    torch_bert.load_state_dict(state)
    return torch_bert, config, unflatten(leaves)


def odd_inputs(config, rows, length, seed, padding):
    """Return token ids, token types and a mask with padding anywhere, if only one token is real."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(config.pad_id + 1, config.vocabulary, (rows, length)).astype(np.int32)
    real = np.ones((rows, length), bool)
    if padding:
        real = rng.random((rows, length)) < 0.6
        real[0, : length // 3] = False  # leading
        real[-1] = np.arange(length) == length // 2  # all but one
        ids[~real] = config.pad_id
    types = rng.integers(0, config.stem.token_types, (rows, length)).astype(np.int32)
    return ids, types, real


@pytest.mark.parametrize(
    ('family', 'hidden', 'heads', 'layers', 'options', 'rows', 'length', 'padding'),
    [
        ('bert', 32, 4, 3, {}, 3, 17, True),
        ('bert', 24, 1, 2, {'hidden_act': 'relu', 'layer_norm_eps': 1e-5}, 2, 1, False),
        ('bert', 20, 5, 1, {'hidden_act': 'gelu_new', 'type_vocab_size': 4}, 4, 9, True),
        ('bert', 48, 12, 2, {'max_position_embeddings': 512}, 2, 512, True),
        ('bert', 16, 2, 5, {'vocab_size': 7, 'pad_token_id': 3}, 2, 40, True),
        ('roberta', 32, 4, 3, {}, 3, 17, True),
        ('roberta', 24, 2, 2, {'hidden_act': 'gelu_new', 'type_vocab_size': 2}, 3, 33, True),
        ('roberta', 16, 4, 1, {'max_position_embeddings': 514}, 2, 512, False),
        ('roberta', 16, 4, 1, {'max_position_embeddings': 514}, 2, 512, True),
        ('roberta', 16, 8, 2, {'hidden_act': 'relu', 'pad_token_id': 0}, 2, 1, False),
    ],
)
def test_every_hidden_state_is_that_of_transformers(
    family, hidden, heads, layers, options, rows, length, padding
):
    seed = hidden + length
    hf_options = {
        'hidden_size': hidden,
        'num_attention_heads': heads,
        'num_hidden_layers': layers,
        'intermediate_size': 3 * hidden + 1,
        'vocab_size': 61,
        'max_position_embeddings': 64,
        'type_vocab_size': 1 if family == 'roberta' else 2,
    }
    theirs, config, params = torch_model(family, hf_options | options, seed)
    ids, types, real = odd_inputs(config, rows, length, seed, padding)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(ids).long(),
            token_type_ids=torch.from_numpy(types).long(),
            attention_mask=torch.from_numpy(real).long(),
            output_hidden_states=True,
        )

    @jax.jit
    def ours(params, ids, types, mask):
        model, variables = Backbone(config), {'params': params}
        hidden = model.apply(variables, ids, types, mask=mask, all_hidden=True)
        return hidden, model.apply(variables, hidden[-1][:, 0], method='pool')

    states, pooled = ours(params, ids, types, real[:, None, None])
    assert len(states) == len(expected.hidden_states) == layers + 1
    for state, reference in zip(states, expected.hidden_states, strict=True):
        assert reference.std() > 0.3
        np.testing.assert_allclose(state, reference, atol=2e-5, rtol=0)
    np.testing.assert_allclose(pooled, expected.pooler_output, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_minilm_is_that_of_transformers():
    from adapters_jax.interop.backbones import load_backbone

    loaded = load_backbone('minilm')
    theirs = transformers.BertModel.from_pretrained(loaded.directory).eval()
    ids, types, real = odd_inputs(loaded.config, 4, 128, 0, True)
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(ids).long(),
            token_type_ids=torch.from_numpy(types).long(),
            attention_mask=torch.from_numpy(real).long(),
            output_hidden_states=True,
        )
    states = Backbone(loaded.config).apply(
        {'params': loaded.params}, ids, types, mask=real[:, None, None], all_hidden=True
    )
    for state, reference in zip(states, expected.hidden_states, strict=True):
        np.testing.assert_allclose(state, reference, atol=2e-5, rtol=0)


def test_default_positions_are_those_of_the_families():
    ids = np.array([[0, 5, 0, 7, 8]])
    roberta = dataclasses.replace(tiny.CONFIG, family='roberta', pad_id=0, stem=BertStem(1, 1))
    np.testing.assert_array_equal(default_positions(tiny.CONFIG, ids), [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(default_positions(roberta, ids), [[-1, 0, -1, 1, 2]])


@pytest.mark.parametrize('wrong', [{'input_ids': 40}, {'positions': 32}])
def test_what_no_table_holds_gives_nan_and_not_a_neighbours_vector(params, wrong):
    right = {'input_ids': 39, 'positions': 31}
    for values, fine in ((right, True), (right | wrong, False)):
        given = {name: np.full((1, 2), value) for name, value in values.items()}
        ids = given.pop('input_ids')
        hidden = Backbone(tiny.CONFIG).apply({'params': params}, ids, **given)
        assert np.isfinite(hidden).all() == fine


# ---- dropout and the trunk

IDS = np.random.default_rng(0).integers(1, 40, (2, 6)).astype(np.int32)


@pytest.fixture(scope='module')
def params():
    return tiny.backbone()


@pytest.fixture(scope='module')
def hidden_states(params):
    """Return a function from (trunk, seed) to all hidden states; seed None: no dropout."""

    def states(params, trunk, key):
        rngs = {} if key is None else {'dropout': key}
        model = Backbone(tiny.CONFIG, trunk=Place(trunk))
        return model.apply(
            {'params': params}, IDS, deterministic=key is None, all_hidden=True, rngs=rngs
        )

    compiled = jax.jit(states, static_argnums=1)
    return lambda trunk, seed: compiled(
        params, trunk, None if seed is None else jax.random.key(seed)
    )


@pytest.mark.parametrize('trunk', [0, 1, 2])
def test_dropout_starts_above_the_trunk(hidden_states, trunk):
    still, one, two = hidden_states(0, None), hidden_states(trunk, 1), hidden_states(trunk, 2)
    below = trunk + 1 if trunk else 0  # a trunk has the embeddings in it
    for i in range(tiny.CONFIG.layers + 1):
        if i < below:
            np.testing.assert_allclose(one[i], still[i], atol=1e-6)
            np.testing.assert_array_equal(one[i], two[i])
        else:
            assert np.abs(one[i] - two[i]).max() > 0.1
            assert np.abs(one[i] - still[i]).max() > 0.1
    np.testing.assert_array_equal(hidden_states(trunk, 1)[-1], one[-1])


# ---- rematerialisation and number formats


def loss(params, remat):
    config = dataclasses.replace(tiny.CONFIG, pooler=False)
    model = Backbone(config, trunk=Place(1), remat=remat)
    rngs = {'dropout': jax.random.key(1)}
    hidden = model.apply({'params': params}, IDS, deterministic=False, rngs=rngs)
    return jnp.square(hidden - 0.5).mean()


def without_pooler(params):
    return {name: params[name] for name in ('embeddings', 'layer_0', 'layer_1')}


@pytest.mark.parametrize(
    'remat',
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name == 'full'))  # tests/conformance has it
        for name in sorted(set(REMAT) - {'none'})
    ],
)
def test_remat_changes_no_number(params, remat):
    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (plain, gradient), (again, found) = (
        grad(without_pooler(params), policy) for policy in ('none', remat)
    )
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    scale = max(np.abs(leaf).max() for leaf in flatten(gradient).values())
    for path, leaf in flatten(gradient).items():
        assert np.abs(leaf).max() > 0 or path.endswith('key/bias'), path
        np.testing.assert_allclose(flatten(found)[path], leaf, atol=1e-6 * scale)


def test_each_policy_keeps_less_than_the_one_before(params):
    def bytes_of(remat):
        given = without_pooler(params)
        _, backward = jax.eval_shape(lambda p: jax.vjp(lambda q: loss(q, remat), p), given)
        floats = [x for x in jax.tree.leaves(backward) if jnp.issubdtype(x.dtype, jnp.floating)]
        return size_bytes(floats)

    kept = [bytes_of(remat) for remat in REMAT]
    assert kept[0] > 1.2 * kept[1] > 1.2**2 * kept[2], kept


def test_bfloat16_is_near_float32(params):
    run = jax.jit(
        lambda params, dtype: Backbone(tiny.CONFIG, dtype).apply({'params': params}, IDS),
        static_argnums=1,
    )
    wide, narrow = run(params, jnp.float32), run(params, jnp.bfloat16)
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    assert np.abs(narrow.astype(jnp.float32) - wide).max() < 0.25
    assert np.abs(narrow.astype(jnp.float32) - wide).mean() < 0.03


# ---- sites


@struct.dataclass
class Tagged(Sites):
    """Carries the sum of the tags from the embeddings to the last output."""

    def embeddings(self, stream):
        return stream.replace(carry={'tags': stream.tags.sum(1), 'words': stream.word_vectors})

    def block(self, layer, stream):
        return stream.replace(carry=stream.carry | {f'block_{layer}': jnp.float32(layer)})

    def output(self, stream):
        total = sum(stream.carry[f'block_{i}'] for i in range(2))
        shift = (stream.carry['tags'] * total).reshape(-1, 1, 1)
        return stream.replace(hidden=stream.carry['words'] + shift)


@pytest.mark.parametrize('remat', REMAT)
def test_adapters_see_words_and_tags_and_carry_what_they_like(params, remat):
    tags = np.arange(12).reshape(2, 6)
    model = Backbone(tiny.CONFIG, remat=remat)
    hidden = model.apply({'params': params}, IDS, tags=tags, sites=Tagged())
    words = params['embeddings']['word']['embedding'][IDS]
    np.testing.assert_allclose(hidden, words + tags.sum(1).reshape(2, 1, 1), atol=1e-6)
    states = model.apply({'params': params}, IDS, tags=tags, sites=Tagged(), all_hidden=True)
    np.testing.assert_array_equal(states[-1], hidden)


# ---- configs


HF = {
    'model_type': 'bert',
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_attention_heads': 4,
    'num_hidden_layers': 2,
    'vocab_size': 40,
    'max_position_embeddings': 32,
    'type_vocab_size': 2,
}


def test_a_config_is_translated():
    assert families.read_config(HF) == tiny.CONFIG
    options = {
        'model_type': 'roberta',
        'pad_token_id': 1,
        'hidden_act': 'relu',
        'layer_norm_eps': 1e-5,
        'hidden_dropout_prob': 0.2,
        'attention_probs_dropout_prob': 0.3,
    }
    roberta = families.read_config(HF | options)
    assert (roberta.positions, roberta.stem.position_offset, roberta.pad_id) == (30, 2, 1)
    block = roberta.block
    assert (block.activation, block.norm_epsilon) == ('relu', 1e-5)
    assert (block.dropout, block.attention_dropout) == (0.2, 0.3)


def test_dimensions_are_those_of_the_backbone():
    sizes = dataclasses.asdict(tiny.CONFIG.dimensions)
    assert sizes == {
        'layers': 2,
        'hidden': 16,
        'feed_forward': 24,
        'heads': 4,
        'word': 16,
        'vocabulary': 40,
        'positions': 32,
        'inner': 16,
        'decoder_layers': 0,
        'gated': False,
        'reads_words': True,
        'word_scale': 1.0,
    }


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        ({'position_embedding_type': 'relative_key'}, "'relative_key' is not supported; expected"),
        ({'is_decoder': True}, 'is_decoder=true in config.json: only encoders'),
        ({'add_cross_attention': True}, 'add_cross_attention=true in config.json'),
        ({'hidden_act': 'gelu_11'}, "unknown activation 'gelu_11'; known: gelu"),
        ({'num_attention_heads': 3}, 'hidden size 16 is not a multiple of the number of heads 3'),
        ({'model_type': 'roberta'}, "config.json lacks the key 'pad_token_id', which roberta"),
        ({'model_type': 'roberta', 'pad_token_id': None}, "lacks the key 'pad_token_id', which ro"),
    ],
)
def test_a_config_this_module_does_not_compute_is_refused(change, expected):
    with pytest.raises(ValueError, match=expected):
        families.read_config(HF | change)


@pytest.mark.parametrize('key', ['hidden_size', 'num_hidden_layers', 'vocab_size'])
def test_a_config_without_a_size_is_refused(key):
    with pytest.raises(ValueError, match=f"config.json lacks the key '{key}', which bert needs"):
        families.read_config({k: v for k, v in HF.items() if k != key})


def test_a_checkpoint_without_a_pooler_has_none():
    config = dataclasses.replace(tiny.CONFIG, pooler=False)
    shapes = jax.eval_shape(
        lambda: Backbone(config).init(jax.random.key(0), jnp.asarray(IDS), method='initialise')
    )
    assert 'pooler' not in shapes['params']
    assert not any('pooler' in name for name in tensor_names(config))
    names = {path for path, _ in tensor_names(tiny.CONFIG).values()}
    assert names == set(flatten(tiny.backbone()))
