"""A step of several tasks against each task's step over its own rows alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from adapters_jax import params
from adapters_jax.adapters import registry
from adapters_jax.data.batches import assemble
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.mixing import Mixer, join
from adapters_jax.data.policies import Buckets, Packed
from adapters_jax.data.shares import Mixing
from adapters_jax.tasks import Classification, Regression
from adapters_jax.tasks.mixture import Mixture
from adapters_jax.training import batching
from adapters_jax.training.routed import Routed
from adapters_jax.training.step import gradients, train_step

NAMES = ('topics', 'rated', 'judged')
TASKS = (
    Classification(labels=('a', 'b', 'c')),
    Regression(),
    Classification(labels=('no', 'yes')),
)
MIXTURE = Mixture(names=NAMES, tasks=TASKS, weights=(1.0, 0.5, 3.0))
METHOD = 'lora[r=2]'
TOKENS = ('input_ids', 'token_type_ids', 'positions', 'segments')


def encoded(task, count, seed):
    """Return random texts with labels of a task."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    size = offsets[-1]
    label = rng.normal(size=count).astype(np.float32)
    if task.label_kind == 'class':
        label = rng.integers(0, task.num_outputs, count).astype(np.int32)
    tokens = {
        'input_ids': rng.integers(1, tiny.CONFIG.vocabulary, size, dtype=np.int32),
        'token_type_ids': rng.integers(0, 2, size, dtype=np.int32),
    }
    return Encoded(tokens, offsets, {'label': label})


def mixed_batch(policy, index=0):
    """Return a batch of all tasks, as training gets it on devices that leave two rows empty."""
    joined = join([encoded(task, 9 + 4 * i, i) for i, task in enumerate(TASKS)])
    mixer = Mixer(joined.lengths, joined.examples['task'], policy, 0, Mixing('uniform'))
    batch = assemble(joined, mixer(0), index, pad_id=0)
    return batching.fill(batch, len(batch['input_ids']) + 2, 0)


@functools.cache
def routed(method, layers=1):
    """Return the model of all tasks and its parameters, far from their initialisation."""
    config = dataclasses.replace(tiny.CONFIG, layers=layers)
    members = tuple(
        tiny.model(registry.create(method), name=name, outputs=task.num_outputs, config=config)
        for name, task in zip(NAMES, TASKS, strict=True)
    )
    trees = [tiny.params(model, seed) for seed, model in enumerate(members)]
    tree = {'backbone': trees[0]['backbone']} | {
        branch: params.merge(*(own[branch] for own in trees)) for branch in ('adapters', 'heads')
    }
    rng = np.random.default_rng(9)
    moved = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), tree['adapters']
    )
    return Routed(members), tree | {'adapters': moved}


def summed(model, task, tree, batch, accumulate=1):
    """Return the gradient of the summed loss, the sum, and the count."""
    return jitted(model, task, accumulate)(*params.partition(tree, model.rules), batch)


@functools.cache
def jitted(model, task, accumulate):
    fixed = {'model': model, 'task': task, 'label_smoothing': 0.0}

    def run(trainable, frozen, batch):
        return gradients(trainable, frozen, batch, None, accumulate, **fixed)

    return jax.jit(run)


def assert_same(found, wanted, factor=1.0):
    """Compare two trees of gradients, to 1e-5 of the largest entry."""
    found, wanted = params.flatten(found), params.flatten(wanted)
    assert found.keys() == wanted.keys()
    largest = max(np.abs(leaf).max() for leaf in wanted.values())
    assert largest > 0.1
    for path, leaf in wanted.items():
        np.testing.assert_allclose(
            found[path] / (factor * largest), leaf / largest, atol=1e-5, err_msg=path
        )


def rows_of(batch, number):
    """Return a task's rows, as a batch of this task alone."""
    mine = batch['adapter'] == number
    own = {name: column[mine] for name, column in batch.items()}
    task = TASKS[number]
    kind = np.int32 if task.label_kind == 'class' else np.float32
    own['label'] = own['label'].astype(kind)
    return {name: own[name] for name in (*TOKENS, 'starts', 'example_mask', 'label')}


@pytest.mark.parametrize(
    ('method', 'policy'),
    [
        pytest.param('pfeiffer[reduction_factor=4]', Packed(24, 6, 4), marks=pytest.mark.slow),
        ('lora[r=2]', Packed(24, 6, 4)),
        pytest.param('lora[r=2]', Buckets((12,), 6), marks=pytest.mark.slow),
    ],
)
def test_each_task_gets_the_loss_and_the_gradients_of_its_own_rows_alone(method, policy):
    model, tree = routed(method)
    batch = mixed_batch(policy)
    assert set(batch['adapter']) == {-1, 0, 1, 2}
    grads, total, count, parts = summed(model, MIXTURE, tree, batch)
    assert set(parts) == set(NAMES)
    expected, examples = 0.0, 0
    for number, (member, weight) in enumerate(zip(model.members, MIXTURE.weights, strict=True)):
        wanted, loss, n, none = summed(member, TASKS[number], tree, rows_of(batch, number))
        np.testing.assert_allclose(parts[member.name], (loss, n), rtol=1e-5)
        assert not none
        for branch in ('adapters', 'heads'):
            assert_same(grads[branch][member.name], wanted[branch][member.name], weight)
        expected, examples = expected + weight * float(loss), examples + float(n)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == examples == batch['example_mask'].sum()


def test_a_task_that_a_batch_has_nothing_of_gets_no_gradient():
    model, tree = routed(METHOD)
    batch = mixed_batch(Packed(24, 6, 4))
    gone = batch['adapter'] == 1
    batch = {
        name: np.where(gone.reshape(-1, *[1] * (column.ndim - 1)), 0, column)
        for name, column in batch.items()
    }
    batch['adapter'] = np.where(gone, -1, batch['adapter'])
    grads, _, _, parts = summed(model, MIXTURE, tree, batch)
    assert parts['rated'] == (0, 0) and parts['topics'][1] > 0
    for branch in ('adapters', 'heads'):
        sizes = {
            name: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(own))
            for name, own in grads[branch].items()
        }
        assert sizes['rated'] == 0 and sizes['topics'] > 0 and sizes['judged'] > 0


def test_accumulation_gives_the_same_gradients():
    model, tree = routed(METHOD)
    batch = mixed_batch(Packed(24, 6, 4))
    whole, *sums = summed(model, MIXTURE, tree, batch)
    parts, *others = summed(model, MIXTURE, tree, batch, accumulate=4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), others, sums)
    assert_same(parts, whole)


def test_the_outputs_of_a_row_are_those_of_its_own_model():
    model, tree = routed(METHOD)
    batch = mixed_batch(Packed(24, 6, 4))
    found = np.asarray(jax.jit(model.apply)(tree, batch))
    assert found.shape == (8, 4, 3)
    for number, member in enumerate(model.members):
        mine = batch['adapter'] == number
        own = np.asarray(jax.jit(member.apply)(tree, rows_of(batch, number)))
        real = batch['example_mask'][mine]
        np.testing.assert_allclose(found[mine][real][:, : member.outputs], own[real], atol=1e-5)
        assert not found[mine][..., member.outputs :].any()
    assert not found[batch['adapter'] < 0].any()


@pytest.mark.parametrize(
    'method',
    ['pfeiffer[reduction_factor=4]', pytest.param('bitfit', marks=pytest.mark.slow)],
)
def test_all_members_drop_the_same_layers(method):
    whole, tree = routed(method, layers=2)
    model = dataclasses.replace(whole, dropped=1)
    batch = mixed_batch(Packed(24, 6, 4))
    found, kept = (np.asarray(jax.jit(one.apply)(tree, batch)) for one in (model, whole))
    for number, member in enumerate(whole.members):
        alone = dataclasses.replace(member, dropped=1)
        assert model.trunk(tree) == alone.trunk(tree)
        mine = batch['adapter'] == number
        own = np.asarray(jax.jit(alone.apply)(tree, rows_of(batch, number)))
        real = batch['example_mask'][mine]
        np.testing.assert_allclose(found[mine][real][:, : member.outputs], own[real], atol=1e-5)
        assert method == 'bitfit' or np.abs(kept - found)[mine][real].max() > 1e-2


def test_what_is_trained_is_what_every_member_trains_and_nothing_else():
    model, tree = routed('pfeiffer[leave_out=[0],reduction_factor=4]', layers=2)
    trainable, frozen = params.partition(tree, model.rules)
    assert set(trainable) == {'adapters', 'heads'} and set(frozen) == {'backbone'}
    assert set(trainable['adapters']) == set(trainable['heads']) == set(NAMES)
    assert model.trunk(tree) == model.members[0].trunk(tree) and model.trunk(tree).layer == 1


class _Plain:
    """An optimizer that hands the gradients on."""

    @staticmethod
    def update(grads, state, trainable):
        return grads, state


def test_a_step_is_along_the_mean_over_all_examples():
    model, tree = routed(METHOD)
    batch = mixed_batch(Packed(24, 6, 4))
    grads, total, count, parts = summed(model, MIXTURE, tree, batch)
    trainable, frozen = params.partition(tree, model.rules)

    def step(trainable, frozen, batch):
        fixed = {'model': model, 'task': MIXTURE, 'optimizer': _Plain, 'dropout': False}
        return train_step(trainable, (), frozen, batch, jax.random.key(0), 0, **fixed)

    stepped, _, metrics = jax.jit(step)(trainable, frozen, batch)
    assert metrics['examples'] == count
    np.testing.assert_allclose(metrics['loss'], total / count, rtol=1e-6)
    for name, (own, n) in parts.items():
        np.testing.assert_allclose(metrics[f'loss/{name}'], own / n, rtol=1e-6)
    moved = jax.tree.map(lambda new, old: new - old, stepped, trainable)
    assert_same(moved, jax.tree.map(lambda x: x / count, grads))
