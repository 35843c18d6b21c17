"""The optimiser against its definitions, torch's AdamW, and BERT's own code."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adapters_jax import config
from adapters_jax.training.optimizer import (
    NO_DECAY,
    OptimizerConfig,
    Rates,
    decay_mask,
    make_optimizer,
    make_schedule,
)

PLAIN = OptimizerConfig(learning_rate=0.1, schedule='constant', warmup=0.0, clip_norm=0.0)


def tree(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    dense = {
        'kernel': jax.random.normal(keys[0], (5, 3), dtype),
        'bias': jax.random.normal(keys[1], (3,), dtype),
    }
    norm = {
        'scale': jax.random.normal(keys[2], (3,), dtype),
        'bias': jax.random.normal(keys[3], (3,), dtype),
    }
    return {'adapters': {'a': {'layer_0': {'down': dense, 'norm_before': norm}}}}


def run(optimizer, params, gradients):
    """Return the parameters after each of the gradients, and the last state."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(one, other, **tolerances):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerances), one, other)


@pytest.mark.parametrize(
    ('schedule', 'after'),
    [
        ('linear', lambda t: 1 - t),
        ('cosine', lambda t: (1 + math.cos(math.pi * t)) / 2),
        ('constant', lambda t: 1.0),
    ],
)
@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    total=st.integers(1, 5000), warmup=st.integers(0, 9900), place=st.floats(0, 1), data=st.data()
)
def test_schedule_follows_its_formula(schedule, after, total, warmup, place, data):
    rate = make_schedule(OptimizerConfig(2.0, schedule, warmup / 10_000), total)
    rise = warmup * total // 10_000  # exactly, as the share is written
    step = data.draw(st.sampled_from([0, rise, max(rise - 1, 0), total - 1, int(place * total)]))
    expected = step / rise if step < rise else after((step - rise) / (total - rise))
    np.testing.assert_allclose(rate(step), 2 * expected, rtol=1e-5, atol=2e-6)


def test_rates_are_those_of_the_schedule_wherever_a_run_goes_on():
    peaks = np.float32([1e-3, 2.0])
    config = OptimizerConfig(2.0, 'cosine', 0.1)
    for rate in (make_schedule(config, 9000), make_schedule(config, 9000, peaks)):
        rates = Rates(rate)
        for step in (0, 1, 899, 900, 4095, 4096, 5, 8999):
            np.testing.assert_allclose(rates(step), rate(step), rtol=1e-6)


def test_no_rate_is_computed_between_steps():
    """It would wait for the step that the device takes at that time."""
    asked = []
    rates = Rates(lambda step: asked.append(step) or step * 2.0)
    assert [rates(step) for step in range(100)] == [2 * step for step in range(100)]
    assert len(asked) == 1


def test_schedule_of_a_single_step():
    assert make_schedule(OptimizerConfig(0.5, warmup=0.9), 1)(0) == 0.5


def test_schedule_refuses_no_steps():
    with pytest.raises(ValueError, match='total_steps must be at least 1, got 0'):
        make_schedule(PLAIN, 0)


def test_no_decay_for_biases_norms_and_scales():
    paths = {
        'backbone': {'layer_0': {'attention': {'query': {'kernel': 1, 'bias': 0}}}},
        'adapters': {
            'a': {
                'norm': {'scale': 0, 'bias': 0},
                'norm_before': {'scale': 0},
                'feed_forward': {'norm': {'bias': 0}},
                'up': {'kernel': 1},
                'scaling': 0,
                'query': {'a': 1, 'b': 1, 'scale': 0, 'magnitude': 0},
                'down': {'input_scale': 0},
                'normal': {'kernel': 1},
                'bias_table': 1,
            },
            'norms': {'up': {'kernel': 1, 'bias': 0}},  # names of tasks
            'scale': {'up': {'kernel': 1}},
        },
        'heads': {'a': {'kernel': 1, 'bias': 0}, 'abnormal': {'kernel': 1}},
    }
    mask = decay_mask(PLAIN, paths)
    wrong = jax.tree_util.tree_map_with_path(
        lambda p, got, wanted: None if got == bool(wanted) else jax.tree_util.keystr(p), mask, paths
    )
    assert not jax.tree.leaves(wrong)


@pytest.mark.parametrize('share', [0.07, 0.29, 0.57, 0.58])
def test_a_warm_up_is_its_share_of_the_steps(share):
    config = dataclasses.replace(PLAIN, warmup=share)
    rates = np.array([float(make_schedule(config, 100)(step)) for step in range(100)])
    assert np.argmax(rates >= PLAIN.learning_rate) == round(100 * share)


def test_decay_exclude_matches_whole_paths():
    config = dataclasses.replace(PLAIN, decay_exclude=[r'heads/.*'])
    mask = decay_mask(config, {'heads': {'x': 1}, 'adapters': {'heads': {'x': 1}}})
    assert mask == {'heads': {'x': False}, 'adapters': {'heads': {'x': True}}}


def test_decay_alone_shrinks_what_it_covers():
    params = tree()
    still = jax.tree.map(jnp.zeros_like, params)
    after, _ = run(make_optimizer(dataclasses.replace(PLAIN, weight_decay=0.5), 9), params, [still])
    expected = jax.tree.map(
        lambda x, decays: x * 0.95 if decays else x, params, decay_mask(PLAIN, params)
    )
    assert_close(after, expected, rtol=1e-6)


def test_agrees_with_torch():
    torch = pytest.importorskip('torch')
    config = OptimizerConfig(0.01, 'linear', 0.25, 0.1, clip_norm=0.7, b2=0.99)
    params, gradients, total = tree(), [tree(seed) for seed in range(1, 13)], 12
    after, _ = run(make_optimizer(config, total), params, gradients)

    masked = zip(jax.tree.leaves(params), jax.tree.leaves(decay_mask(config, params)), strict=True)
    tensors = [(torch.nn.Parameter(torch.from_numpy(np.array(x))), decay) for x, decay in masked]
    groups = [{'params': [t], 'weight_decay': 0.1 if decay else 0.0} for t, decay in tensors]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=config.epsilon)
    factor = torch.optim.lr_scheduler.LambdaLR(
        reference, lambda step: step / 3 if step < 3 else (12 - step) / 9
    )
    for gradient in gradients:
        for (tensor, _), g in zip(tensors, jax.tree.leaves(gradient), strict=True):
            tensor.grad = torch.from_numpy(np.array(g))
        torch.nn.utils.clip_grad_norm_([t for t, _ in tensors], 0.7)
        reference.step()
        factor.step()
    for (tensor, _), x in zip(tensors, jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(x, tensor.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_without_bias_correction_it_is_the_adam_of_bert():
    config = dataclasses.replace(PLAIN, bias_correction=False, weight_decay=0.01, b2=0.99)
    kernel = np.array(jax.random.normal(jax.random.key(0), (4, 3)), np.float64)
    gradients = np.array(jax.random.normal(jax.random.key(1), (6, 4, 3)))
    params, given = {'kernel': jnp.float32(kernel)}, [{'kernel': jnp.asarray(g)} for g in gradients]
    after, state = run(make_optimizer(config, 6), params, given)

    m = v = np.zeros((4, 3))
    for g in gradients.astype(np.float64):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        kernel = kernel - 0.1 * (m / (np.sqrt(v) + config.epsilon) + 0.01 * kernel)
    np.testing.assert_allclose(after['kernel'], kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(optax.tree.get(state, 'mu')['kernel'], m, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_global_norm():
    clipped = make_optimizer(dataclasses.replace(PLAIN, clip_norm=1.0, weight_decay=0.0), 5)
    params, gradient = tree(), tree(1)
    norm = optax.tree.norm(gradient)
    assert norm > 1
    scaled = jax.tree.map(lambda g: g / norm, gradient)
    state = clipped.update(gradient, clipped.init(params), params)[1]
    assert_close(optax.tree.get(state, 'mu'), jax.tree.map(lambda g: 0.1 * g, scaled), rtol=1e-5)
    small = jax.tree.map(lambda g: 0.5 * g, scaled)
    state = clipped.update(small, clipped.init(params), params)[1]
    assert_close(optax.tree.get(state, 'mu'), jax.tree.map(lambda g: 0.1 * g, small), rtol=1e-6)


@pytest.mark.parametrize('corrected', [True, False])
def test_half_precision_leaves_have_full_precision_moments(corrected):
    config = dataclasses.replace(PLAIN, bias_correction=corrected, weight_decay=0.01)
    optimizer = make_optimizer(config, 10)
    half, gradients = tree(dtype=jnp.bfloat16), [tree(s, jnp.bfloat16) for s in (1, 2, 3)]
    state = optimizer.init(half)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, half)
        floats = [x for x in jax.tree.leaves((updates, state)) if x.dtype != jnp.int32]
        assert {x.dtype for x in floats} == {jnp.dtype('float32')}
    assert jax.tree.leaves(optax.apply_updates(half, updates))[0].dtype == jnp.bfloat16
    widened = [jax.tree.map(lambda g: g.astype(jnp.float32), gradient) for gradient in gradients]
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    expected = optimizer.init(wide)
    for gradient in widened:
        expected = optimizer.update(gradient, expected, wide)[1]
    assert_close(state, expected, rtol=0)


def test_a_population_trains_as_its_members_do_alone():
    rates, decays = jnp.array([1e-3, 1e-2, 0.1]), jnp.array([0.0, 0.1, 0.5])
    config = OptimizerConfig(warmup=0.3)
    params, gradients = tree(), [tree(seed) for seed in range(1, 6)]

    def train(rate, decay):
        return run(make_optimizer(config, 5, rate, decay), params, gradients)

    together, states = jax.vmap(train)(rates, decays)
    for i in range(3):
        member = dataclasses.replace(
            config, learning_rate=float(rates[i]), weight_decay=float(decays[i])
        )
        alone, state = run(make_optimizer(member, 5), params, gradients)
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-5, atol=1e-6)
        assert_close(jax.tree.map(lambda x, i=i: x[i], states), state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'learning_rate': 0.0}, 'learning_rate must be a finite number above 0, got 0.0'),
        ({'learning_rate': math.nan}, 'learning_rate must be .* got nan'),
        ({'learning_rate': '1e-3'}, "learning_rate must be .* got '1e-3'"),
        ({'learning_rate': True}, 'learning_rate must be .* got True'),
        (
            {'schedule': 'polynomial'},
            r"one of \['linear', 'cosine', 'constant'\], got 'polynomial'",
        ),
        ({'warmup': 1.0}, r'warmup must be a share of all steps in \[0, 1\), got 1.0'),
        ({'warmup': -0.1}, 'warmup must be'),
        ({'weight_decay': -1}, 'weight_decay must be a finite number of at least 0, got -1'),
        ({'clip_norm': -1.0}, r'clip_norm must be at least 0 \(0: no clipping\), got -1.0'),
        ({'b1': 1.0}, r'b1 must be in \[0, 1\), got 1.0'),
        ({'b2': 2}, 'b2 must be'),
        ({'epsilon': 0}, 'epsilon must be a finite number above 0, got 0'),
        ({'decay_exclude': ['(']}, r"decay_exclude holds '\(', which is no regular expression"),
        ({'decay_exclude': '.*bias'}, r"got the string '.\*bias': write \['.\*bias'\]"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)


def test_numbers_of_numpy_are_numbers():
    assert dataclasses.replace(PLAIN, learning_rate=np.float32(0.25)).learning_rate == 0.25


def test_config_from_json_is_the_same():
    config = OptimizerConfig(decay_exclude=('a', 'b'))
    fields = dataclasses.asdict(config) | {'decay_exclude': ['a', 'b']}
    assert OptimizerConfig(**fields) == config


def test_a_config_excludes_from_decay_what_the_optimizer_does():
    assert config.base().optimizer.decay_exclude == NO_DECAY
