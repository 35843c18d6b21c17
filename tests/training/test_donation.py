"""A step takes the memory of what it replaces, and leaves what it does not replace alone.

Read from the compiled program: which of its inputs share their memory with an output.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
import tiny

from adapters_jax import params as trees
from adapters_jax import sharding, tasks
from adapters_jax.adapters import registry
from adapters_jax.models.backbone import LAYOUTS
from adapters_jax.training import population
from adapters_jax.training import step as steps
from adapters_jax.training.optimizer import OptimizerConfig, make_optimizer
from adapters_jax.training.placement import Placement

TASK = tasks.Classification(labels=('a', 'b', 'c'))
CONFIG = dataclasses.replace(tiny.CONFIG, layers=1)
BATCH = tiny.batch([[3, 4], [8], [2, 2], [5]], 8)
# A method, what frozen weights are stored in, and the mesh.
CASES = {
    'int8': ('lora[r=2]', np.int8, (1, 1, 1)),
    'full': ('full', np.float32, (1, 1, 1)),
    'mesh': ('houlsby[size=4]', np.int8, (1, 2, 2)),
}
PARAMETER = re.compile(r'\bparameter\((\d+)\).*?op_name="([^"]*)"')
ALIASED = re.compile(r'\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, \S+?\)')


@functools.cache
def program(case):
    """Return the arguments of a step, the jitted step, and its compiled program."""
    text, stored, shape = CASES[case]
    model = tiny.model(registry.create(text), config=CONFIG)
    placement = Placement(sharding.make_mesh(*shape), LAYOUTS)
    trainable, frozen = trees.partition(tiny.params(model), model.rules)
    trainable = placement.trainable(trainable)
    optimizer = make_optimizer(OptimizerConfig(), 10)
    state = placement.moments(optimizer.init, trainable)
    fixed = {'model': model, 'task': TASK, 'optimizer': optimizer, 'dropout': False}
    step = steps.jit_train_step(trainable, state, **fixed)
    frozen = placement.frozen(frozen, stored)
    batch = sharding.put_batch(BATCH, placement.mesh)
    arguments = trainable, state, frozen, batch, placement.put(jax.random.key(0)), np.int32(0)
    return arguments, step, step.lower(*arguments).compile()


def names(tree, argument):
    """Return the leaves' names as a program calls its inputs."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {argument + jax.tree_util.keystr(path) for path, _ in paths}


def aliased(compiled):
    """Return the names of the inputs whose memory becomes an output's."""
    text = compiled.as_text()
    inputs = {int(number): name for number, name in PARAMETER.findall(text.partition('ENTRY')[2])}
    header = re.search(r'input_output_alias=\{(.*?)\}, \w+=', text)[1]
    return {inputs[int(number)].replace('\\', '') for number in ALIASED.findall(header)}


@pytest.mark.parametrize('case', CASES)
def test_the_program_takes_the_memory_of_all_that_is_trained_and_of_nothing_else(case):
    (trainable, state, *_), _, compiled = program(case)
    assert aliased(compiled) == names(trainable, 'trainable') | names(state, 'opt_state')
    if case != 'mesh':
        bytes_of = trees.size_bytes((trainable, state))
        assert compiled.memory_analysis().alias_size_in_bytes == bytes_of


@pytest.mark.parametrize('case', CASES)
def test_after_a_step_the_old_state_is_gone_and_the_frozen_weights_are_not(case):
    arguments, step, _ = program(case)
    trainable, state, frozen, *rest = jax.tree.map(lambda x: x, arguments)
    before = jax.device_get(frozen)
    new, new_state, _ = step(trainable, state, frozen, *rest)
    assert all(x.is_deleted() for x in jax.tree.leaves((trainable, state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((new, new_state, frozen)))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(frozen))


def test_a_population_gives_its_state_away_too():
    model = tiny.model(registry.create('pfeiffer[reduction_factor=4]'), config=CONFIG)
    trainable, frozen = trees.partition(tiny.params(model), model.rules)

    def make_optimizer(rate, decay):
        return optax.adamw(rate, weight_decay=decay)

    two = jax.device_put(population.stack([trainable, trainable]))
    state = population.State(two, jax.vmap(make_optimizer(1, 0).init)(two), np.ones(2, bool))
    mesh = sharding.make_mesh(1)
    state = sharding.put_replicated(state, mesh)
    rates = np.float32([1e-3, 1e-2])
    traits = population.Traits(jax.random.split(jax.random.key(0)), rates, 0 * rates, {}, {})
    step = population.jit_population_step(
        state, mesh, model=model, task=TASK, make_optimizer=make_optimizer, chunk=0
    )
    compiled = step.lower(state, traits, frozen, BATCH, np.int32(0)).compile()
    assert aliased(compiled) == names(state, 'state')
    assert compiled.memory_analysis().alias_size_in_bytes == trees.size_bytes(state)
