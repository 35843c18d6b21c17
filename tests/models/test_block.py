import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import struct

from adapters_jax.models.block import Block, BlockConfig, Memory, causal, rematerialised
from adapters_jax.params import flatten, unflatten
from adapters_jax.sites import IDENTITY, Sites, Stream

B, T, S, D, F, H = 3, 7, 5, 16, 24, 4


def torch_layer(config):
    """Return torch's own layer for the options, with weights far from initialisation."""
    options = {
        'd_model': config.hidden,
        'nhead': config.heads,
        'dim_feedforward': config.feed_forward,
        'dropout': 0.0,
        'activation': config.activation,
        'layer_norm_eps': config.norm_epsilon,
        'batch_first': True,
        'norm_first': config.pre_norm,
    }
    decoder = config.cross_attention
    layer = (torch.nn.TransformerDecoderLayer if decoder else torch.nn.TransformerEncoderLayer)(
        **options
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            noise = 0.4 * torch.randn(parameter.shape, generator=generator)
            is_scale = 'norm' in name and name.endswith('weight')
            parameter.copy_(noise + 1 if is_scale else noise)
    return layer


def leaves_of(layer):
    """Return the layer's weights as our tree."""
    state = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    decoder = 'multihead_attn.in_proj_weight' in state
    attentions = {'attention': 'self_attn'}
    norms = {'attention': 'norm1', 'feed_forward': 'norm3' if decoder else 'norm2'}
    if decoder:
        attentions['cross_attention'], norms['cross_attention'] = 'multihead_attn', 'norm2'
    dense = {'feed_forward/up': 'linear1', 'feed_forward/down': 'linear2'}
    leaves = {}
    for ours, theirs in attentions.items():
        kernels = np.split(state[f'{theirs}.in_proj_weight'], 3)
        biases = np.split(state[f'{theirs}.in_proj_bias'], 3)
        for name, kernel, bias in zip(('query', 'key', 'value'), kernels, biases, strict=True):
            leaves |= {f'{ours}/{name}/kernel': kernel.T, f'{ours}/{name}/bias': bias}
        dense[f'{ours}/output'] = f'{theirs}.out_proj'
    for ours, theirs in dense.items():
        leaves[f'{ours}/kernel'] = state[f'{theirs}.weight'].T
        leaves[f'{ours}/bias'] = state[f'{theirs}.bias']
    for ours, theirs in norms.items():
        leaves[f'{ours}/norm/scale'] = state[f'{theirs}.weight']
        leaves[f'{ours}/norm/bias'] = state[f'{theirs}.bias']
    return unflatten(leaves)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    memory = rng.standard_normal((B, S, D)).astype(np.float32)
    real, real_memory = rng.random((B, T)) < 0.7, rng.random((B, S)) < 0.6
    real[:, 0] = real_memory[:, 2] = True  # the first, so that causal attention has something
    return hidden, memory, real, real_memory


def run(config, params, sites=IDENTITY, memory=None, memory_mask=None, key=None):
    hidden, _, real, _ = inputs()
    stream = Stream(jnp.asarray(hidden), jnp.asarray(real)[:, None, None], jnp.asarray(hidden))
    return Block(config, 0).apply(
        {'params': params},
        stream,
        sites,
        key is None,
        None if memory is None else Memory(memory, memory_mask, memory_mask),
        rngs={} if key is None else {'dropout': key},
    )


@pytest.mark.parametrize(
    ('pre_norm', 'cross_attention', 'is_causal', 'activation'),
    [
        (False, False, False, 'gelu'),
        (False, False, True, 'relu'),
        (True, False, False, 'relu'),
        (True, False, True, 'gelu'),
        (False, True, False, 'relu'),
        (False, True, True, 'gelu'),
        (True, True, True, 'relu'),
    ],
)
def test_every_option_computes_what_torch_does(pre_norm, cross_attention, is_causal, activation):
    config = BlockConfig(
        D, F, H, activation, 1e-5, pre_norm, cross_attention, is_causal, dropout=0.0
    )
    layer = torch_layer(config)
    hidden, memory, real, real_memory = inputs()
    later = torch.ones(T, T).triu(1).bool() if is_causal else None
    as_torch = torch.from_numpy
    if cross_attention:
        expected = layer(
            as_torch(hidden),
            as_torch(memory),
            tgt_mask=later,
            tgt_key_padding_mask=as_torch(~real),
            memory_key_padding_mask=as_torch(~real_memory),
        )
        given = {'memory': memory, 'memory_mask': real_memory[:, None, None]}
    else:
        mask = as_torch(~real)
        expected = layer(as_torch(hidden), src_mask=later, src_key_padding_mask=mask)
        given = {}
    ours = jax.jit(lambda p: run(config, p, **given).hidden)(leaves_of(layer))
    np.testing.assert_allclose(ours, expected.detach(), atol=1e-5, rtol=0)


@struct.dataclass
class Recorder(Sites):
    """Notes each site it is called at, and changes nothing."""

    calls: list = struct.field(pytree_node=False, default_factory=list)

    def linear(self, layer, sub_layer, name, end):
        np.testing.assert_allclose(end.inputs @ end.kernel + end.bias[None, None], end.output)
        shapes = (end.inputs.shape, end.kernel.shape, end.output.shape, end.mask.shape)
        self.calls.append((layer, sub_layer, name, *shapes))
        return super().linear(layer, sub_layer, name, end)

    def key_value(self, layer, sub_layer, seen):
        shapes = (seen.key.shape, seen.value.shape, seen.mask.shape, seen.text_mask.shape)
        assert seen.inputs.shape == (B, T, D)
        self.calls.append((layer, sub_layer, 'key_value', *shapes))
        return super().key_value(layer, sub_layer, seen)

    def sub_layer(self, layer, name, end):
        self.calls.append((layer, name, end.output.shape, end.norm is None))
        return super().sub_layer(layer, name, end)

    def block(self, layer, stream):
        self.calls.append((layer, 'block'))
        return super().block(layer, stream)


@functools.cache
def decoder_params():
    return leaves_of(torch_layer(BlockConfig(D, F, H, cross_attention=True)))


@functools.cache
def encoder_params():
    return leaves_of(torch_layer(BlockConfig(D, F, H)))


@pytest.mark.parametrize('pre_norm', [False, True])
def test_sites_are_met_in_order(pre_norm):
    config = BlockConfig(D, F, H, cross_attention=True, pre_norm=pre_norm)
    recorder = Recorder()
    _, memory, _, real_memory = inputs()
    run(config, decoder_params(), recorder, memory, real_memory[:, None, None])
    expected = []
    own = (B, 1, 1, T)
    for name, length in (('attention', T), ('cross_attention', S)):
        mask = (B, 1, 1, length)
        expected.append((0, name, 'query', (B, T, D), (D, D), (B, T, D), own))
        for projection in ('key', 'value'):
            shape = (B, length, D)
            expected.append((0, name, projection, shape, (D, D), shape, mask))
        heads = (B, length, H, D // H)
        expected.append((0, name, 'key_value', heads, heads, mask, own))
        expected.append((0, name, 'output', (B, T, D), (D, D), (B, T, D), own))
        expected.append((0, name, (B, T, D), pre_norm))
    expected += [
        (0, 'feed_forward', 'up', (B, T, D), (D, F), (B, T, F), own),
        (0, 'feed_forward', 'down', (B, T, F), (F, D), (B, T, D), own),
        (0, 'feed_forward', (B, T, D), pre_norm),
        (0, 'block'),
    ]
    assert recorder.calls == expected


@struct.dataclass
class Prefix(Sites):
    """Puts one more key and value in front, which every position may attend to."""

    def key_value(self, layer, sub_layer, seen):
        more = jnp.ones((B, 1, H, D // H))
        visible = jnp.ones((*seen.mask.shape[:3], 1), bool)
        return seen.replace(
            key=jnp.concatenate([more, seen.key], 1),
            value=jnp.concatenate([5 * more, seen.value], 1),
            mask=jnp.concatenate([visible, seen.mask], 3),
        )


@pytest.mark.parametrize('is_causal', [False, True])
def test_keys_and_values_may_become_longer_than_the_text(is_causal):
    config = BlockConfig(D, F, H, causal=is_causal)
    plain = run(config, encoder_params()).hidden
    longer = run(config, encoder_params(), Prefix()).hidden
    assert longer.shape == plain.shape
    assert (np.abs(longer - plain).max(-1) > 1e-3).all()


def test_dropout_runs_with_a_key_only_and_each_sub_layer_draws_its_own():
    config = BlockConfig(D, F, H, dropout=0.5, attention_dropout=0.0)
    ends = []

    @struct.dataclass
    class Ends(Sites):
        def sub_layer(self, layer, name, end):
            ends.append(np.asarray(end.output) == 0)
            return super().sub_layer(layer, name, end)

    still = run(config, encoder_params(), Ends())
    np.testing.assert_array_equal(still.hidden, run(config, encoder_params()).hidden)
    assert not any(zero.any() for zero in ends)
    ends.clear()
    run(config, encoder_params(), Ends(), key=jax.random.key(0))
    attention, feed_forward = ends
    assert abs(attention.mean() - 0.5) < 0.15
    assert abs(feed_forward.mean() - 0.5) < 0.15
    assert (attention != feed_forward).any()


def test_attention_dropout_alone_changes_the_result():
    quiet = BlockConfig(D, F, H, dropout=0.0, attention_dropout=0.0)
    noisy = BlockConfig(D, F, H, dropout=0.0, attention_dropout=0.5)
    key = jax.random.key(0)
    still = run(quiet, encoder_params()).hidden
    np.testing.assert_array_equal(run(quiet, encoder_params(), key=key).hidden, still)
    assert (np.abs(run(noisy, encoder_params(), key=key).hidden - still).max(-1) > 0).all()


def test_causal_joins_both_masks():
    triangle = np.tril(np.ones((3, 3), bool))
    np.testing.assert_array_equal(causal(None, 3), triangle[None, None])
    padding = np.array([True, False, True]).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(causal(padding, 3), (triangle & padding[0, 0])[None, None])


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'hidden': 10, 'heads': 4}, 'hidden size 10 is not a multiple of the number of heads 4'),
        ({'heads': 0}, 'hidden size 16 is not a multiple of the number of heads 0'),
        ({'activation': 'gleu'}, "unknown activation 'gleu'; known: gelu"),
        ({'dropout': 1.0}, 'the dropout rate 1.0 is not a number in'),
        ({'attention_dropout': -0.1}, 'the dropout rate -0.1 is not a number in'),
    ],
)
def test_a_block_that_cannot_be_built_is_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        BlockConfig(**({'hidden': 16, 'feed_forward': 8, 'heads': 4} | options))


@pytest.mark.parametrize('drops', [True, False])
def test_what_attention_returns_is_dropped_out_but_in_distilbert(drops):
    config = BlockConfig(D, F, H, dropout=0.5, attention_dropout=0.0, drops_attended=drops)
    silent = {'down': jax.tree.map(jnp.zeros_like, encoder_params()['feed_forward']['down'])}
    params = encoder_params() | {'feed_forward': encoder_params()['feed_forward'] | silent}
    trained = run(config, params, key=jax.random.key(1)).hidden
    difference = np.abs(trained - run(config, params).hidden).max()
    assert (difference > 0.1) == drops and (drops or difference == 0)


def test_a_memory_must_be_given_where_there_is_cross_attention_and_nowhere_else():
    with pytest.raises(ValueError, match='cross_attention=True, but its memory is missing'):
        run(BlockConfig(D, F, H, cross_attention=True), decoder_params())
    with pytest.raises(ValueError, match='cross_attention=False, but its memory is given'):
        run(BlockConfig(D, F, H), encoder_params(), memory=inputs()[1])


def test_an_unknown_way_of_rematerialising_is_refused():
    with pytest.raises(ValueError, match="remat is 'dot'; expected one of none, dots, full"):
        rematerialised('dot')


def test_the_tree_is_the_one_that_the_documentation_names():
    names = {
        f'attention/{name}/{leaf}'
        for name in ('query', 'key', 'value', 'output')
        for leaf in ('kernel', 'bias')
    }
    names |= {
        f'feed_forward/{name}/{leaf}' for name in ('up', 'down') for leaf in ('kernel', 'bias')
    }
    names |= {
        f'{s}/norm/{leaf}' for s in ('attention', 'feed_forward') for leaf in ('scale', 'bias')
    }
    stream = Stream(jnp.zeros((1, 2, D)), None, jnp.zeros((1, 2, D)))
    variables = jax.eval_shape(
        lambda: Block(BlockConfig(D, F, H), 0).init(jax.random.key(0), stream, IDENTITY, True)
    )
    assert set(flatten(variables['params'])) == names
