"""Every method learns on real questions over a real BERT, and leaves the rest of it as it was."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from cases import IDLE, METHODS

from adapters_jax import params as trees
from adapters_jax import sharding
from adapters_jax.adapters import registry
from adapters_jax.data import pipeline
from adapters_jax.training import batching, experiment
from adapters_jax.training import step as steps
from configs import quickstart

STEPS = 20
# What learns slowly needs large steps: vectors, and what starts from zero twice.
RATES = {'vera': 0.05, 'dvora': 0.05, 'ia3': 0.02, 'layer_norm': 0.01, 'bitfit': 0.01}


@functools.cache
def questions():
    """Return the quickstart's experiment; its method is replaced."""
    config = quickstart.get_config('')
    config.data.batching = 'buckets'  # which every method can use
    config.training.batch_size = 16
    config.data.max_length = 32
    return experiment.build(config)


@pytest.mark.slow
@pytest.mark.parametrize('preset', METHODS)
def test_the_loss_falls_on_real_questions(preset):
    built = questions()
    model = dataclasses.replace(built.model, method=registry.create(preset))
    before = trees.partition(model.init(jax.random.key(0), built.backbone.params), model.rules)
    before = jax.tree.map(np.array, before)
    mesh = sharding.make_mesh(1)
    trainable, frozen = sharding.put_replicated(before, mesh)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(RATES.get(preset, 3e-3)))
    optimizer = model.method.optimizer(adam, STEPS)
    everywhere = sharding.replicated(mesh)
    state = jax.jit(optimizer.init, out_shardings=everywhere)(trainable)
    step = steps.jit_train_step(
        trainable, state, model=model, task=built.task, optimizer=optimizer, dropout=False
    )
    data = built.splits['train']
    policy = batching.choose(built.config, model, data.lengths, 1, True)
    policy = dataclasses.replace(policy, lengths=policy.lengths[-1:])  # one shape, one compilation
    stream = pipeline.train_batches(data, policy, 0, built.backbone.config.pad_id)
    key, losses = sharding.put_replicated(jax.random.key(0), mesh), []
    for number in range(STEPS):
        _, batch = next(stream)
        batch = sharding.put_batch(batch, mesh)
        trainable, state, metrics = step(trainable, state, frozen, batch, key, np.int32(number))
        losses.append(float(metrics['loss']))
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4]), losses
    after, old = trees.flatten(trainable), trees.flatten(before[0])
    same = {path for path, leaf in old.items() if np.array_equal(leaf, after[path])}
    assert same == {path for path in same if IDLE.search(path)}, same
    for path, leaf in trees.flatten(before[1]).items():
        np.testing.assert_array_equal(trees.flatten(frozen)[path], leaf, err_msg=path)
