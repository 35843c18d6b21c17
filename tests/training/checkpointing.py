"""States to save and to compare, which the tests of checkpoints share."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adapters_jax.training.checkpoint import Checkpoints

IDENTITY = {'backbone_fingerprint': 'f00d', 'config': {'task': 'mrpc', 'optimizer': {'b1': 0.9}}}


def make_state(seed=0, size=40):
    """Return parameters with odd numbers among them, the state of their optimizer and a key."""
    keys = jax.random.split(jax.random.key(seed), 3)
    trainable = {
        'adapters': {'a': {'kernel': jax.random.normal(keys[0], (size, 8))}},
        'half': jax.random.normal(keys[1], (16,)).astype(jnp.bfloat16),
        'odd': jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32),
    }
    return trainable, optax.adamw(1e-3).init(trainable), jax.random.key_data(keys[2])


def abstract(tree):
    """Return the shapes, types and shardings of a state."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree):
    """Return what two states must share to be equal in every bit."""
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def numbers():
    """Return the iterator over a run's data."""
    rows = grain.MapDataset.source(range(50)).seed(3).shuffle().repeat().batch(2)
    return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=2)))


def steps_in(directory):
    """Return the steps that have a checkpoint."""
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def save_steps(directory, steps, metrics=None):
    """Save a state of its own seed at each step; return the iterators' next batches by step."""
    iterator, following = numbers(), {}
    with Checkpoints(directory, IDENTITY) as checkpoints:
        for step in steps:
            next(iterator)
            metric = (metrics or {}).get(step)
            checkpoints.save(step, make_state(step), iterator, {'at': step}, metric)
            following[step] = iterator.get_state()
    return following


def restore(directory, identity=IDENTITY, state=None):
    """Return what a new process finds, with an iterator to set."""
    with Checkpoints(directory, identity) as checkpoints:
        return checkpoints.restore(abstract(state or make_state()), numbers())


def restore_only(directory):
    """Return what a new process finds, without an iterator."""
    with Checkpoints(directory, IDENTITY) as checkpoints:
        return checkpoints.restore(abstract(make_state()), None)
