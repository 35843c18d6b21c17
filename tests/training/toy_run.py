"""A small training run for `test_checkpoint_kill` to kill: `toy_run.py DIRECTORY STEPS SIZE PAUSE`.

It leaves DIRECTORY/batches.txt with the batch of every step it took, and DIRECTORY/final.txt with
the digest of the whole state after the last one.
"""

import hashlib
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adapters_jax import files
from adapters_jax.training.checkpoint import Checkpoints
from adapters_jax.training.optimizer import OptimizerConfig, make_optimizer

SAVE_EVERY = 3


def make_iterator():
    numbers = grain.MapDataset.source(range(101)).seed(5).shuffle().repeat()
    rows = numbers.map(lambda i: {'x': np.float32([i, i * i % 7])})
    return iter(rows.batch(4).to_iter_dataset(grain.ReadOptions(num_threads=2)))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def digest(tree):
    state = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        state.update(np.ascontiguousarray(leaf).tobytes())
    return state.hexdigest()


def main(directory, steps, size, pause):
    optimizer = make_optimizer(OptimizerConfig(), steps)
    key = jax.random.key(7)

    def step_fn(state, batch):
        trainable, opt_state = state

        def loss(tree):
            noise = jax.random.normal(jax.random.fold_in(key, opt_state[1].count), (size,))
            return jnp.sum(jnp.square(tree['w'] * noise - batch['x'].mean()))

        updates, opt_state = optimizer.update(jax.grad(loss)(trainable), opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    train_step = jax.jit(step_fn, donate_argnums=0)
    trainable = {'w': jax.random.normal(jax.random.key(1), (size,))}
    state, iterator, step = (trainable, jax.jit(optimizer.init)(trainable)), make_iterator(), 0
    identity = {'backbone_fingerprint': 'toy', 'config': {'size': size}}
    with (
        files.lock(directory),
        Checkpoints(directory / 'checkpoints', identity) as checkpoints,
        (directory / 'batches.txt').open('a') as batches,
    ):
        restored = checkpoints.restore(abstract(state), iterator)
        if restored:
            state, step = restored.state, restored.step
            assert restored.progress == {'step': step}
        while step < steps:
            batch = next(iterator)
            print(step, hashlib.sha256(batch['x'].tobytes()).hexdigest(), file=batches, flush=True)
            state = train_step(state, batch)
            step += 1
            if step % SAVE_EVERY == 0:
                checkpoints.save(step, state, iterator, {'step': step}, metric=-abs(step - 6.0))
            time.sleep(pause)
    files.write_text(directory / 'final.txt', digest(state))


if __name__ == '__main__':
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
