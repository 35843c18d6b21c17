"""A population: adapters that differ in seed, learning rate, weight decay or size, trained as one.

The step of a run is a pure function, so that of N members is the same function mapped over what
tells them apart. Frozen weights and batch are not mapped: what lies below the first adapted place
is computed once for all. No member can touch another, and one whose numbers are no numbers any
more stays at its last good state.

N is the axis of the members here, always the first one.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from adapters_jax import sharding, xla
from adapters_jax.model import Batch, Model
from adapters_jax.params import Tree, flatten, merge, unflatten
from adapters_jax.tasks.task import Task
from adapters_jax.training import step as steps

EACH = P(sharding.MEMBERS)
MakeOptimizer = Callable[[Float[Array, ''], Float[Array, '']], optax.GradientTransformation]


@struct.dataclass
class Traits:
    """What tells the members of a population apart, beside their states.

    `multipliers` are for some trainable leaves what a narrow member's, padded with zeros, are
    multiplied by (`bank.multipliers`); `constants` are the frozen leaves that differ.
    """

    key: PRNGKeyArray  # [N]
    learning_rate: Float[Array, 'N']
    weight_decay: Float[Array, 'N']
    multipliers: Tree
    constants: Tree


@struct.dataclass
class State:
    """What a step replaces; `alive` tells which members still learn."""

    trainable: Tree
    opt_state: optax.OptState
    alive: Bool[Array, 'N']


PopulationStep = Callable[..., tuple[State, dict[str, Array]]]


def member_step(
    state: State,
    member: Traits,
    frozen: Tree,
    batch: Batch,
    step: Array,
    *,
    model: Model,
    make_optimizer: MakeOptimizer,
    **options: Any,
) -> tuple[State, dict[str, Array]]:
    """Take one step with one member: state and metrics are those of `step.train_step`.

    The metric `good` tells whether loss, gradient and new parameters are finite. A member for which
    they are not, or which was not alive, keeps its state.
    """
    trainable, opt_state, metrics = steps.train_step(
        state.trainable,
        state.opt_state,
        merge(frozen, member.constants),
        batch,
        member.key,
        step,
        model=model,
        optimizer=make_optimizer(member.learning_rate, member.weight_decay),
        multipliers=member.multipliers,
        **options,
    )
    numbers = [metrics['loss'], metrics['gradient_norm'], *jax.tree.leaves(trainable)]
    good = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    alive = state.alive & good
    new = State(trainable, opt_state, alive)
    kept = jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, state.replace(alive=alive))
    return kept, metrics | {'good': good}


def population_step(
    state: State,
    members: Traits,
    frozen: Tree,
    batch: Batch,
    step: Array,
    *,
    model: Model,
    chunk: int,
    **options: Any,
) -> tuple[State, dict[str, Array]]:
    """Take one step with every member; metrics are [N]. `chunk` members are computed at a time."""
    batch = with_trunk(model, state.trainable, frozen, batch)

    def one(item: tuple[State, Traits]) -> tuple[State, dict[str, Array]]:
        return member_step(*item, frozen, batch, step, model=model, **options)

    def ended(item: tuple[State, Traits]) -> tuple[State, dict[str, Array]]:
        return item[0], _zeros(jax.eval_shape(one, item)[1])

    if chunk == 1:
        return _each(one, ended, state, members)
    return over_members(one, ended, (state, members), chunk)


def _each(
    one: Callable[[Any], Any], ended: Callable[[Any], Any], state: State, members: Traits
) -> tuple[State, dict[str, Array]]:
    """Take one member's step after another, each in the place where its state is.

    A map over members would write all new states beside the old ones: twice the memory, and more
    time where much of the backbone is trained.
    """

    def turn(state: State, item: tuple[Array, Traits]) -> tuple[State, dict[str, Array]]:
        number, traits = item
        own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, False), state)
        new, metrics = jax.lax.cond(own.alive, one, ended, (own, traits))
        put = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda x, y: put(x, y, number, 0), state, new), metrics

    return jax.lax.scan(turn, state, (jnp.arange(len(state.alive)), members))


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def with_trunk(model: Model, trainable: Tree, frozen: Tree, batch: Batch) -> Batch:
    """Return the batch with the output of the trunk as its column 'trunk', where that can be.

    `trainable` is that of all members; none of it is used below the trunk's end.
    """
    tree = merge(unstack(trainable, 0), frozen)
    if 'trunk' in batch or not model.can_begin_above_trunk(tree):
        return batch
    return {**batch, 'trunk': model.trunk_outputs(tree, batch)}


def over_members(
    function: Callable[[Any], Any],
    ended: Callable[[Any], Any],
    members: tuple[State, Any],
    chunk: int,
) -> Any:
    """Map a function over the members: `chunk` at a time, 0 for all at once.

    Where members are computed one after another, one that is not alive costs nothing: `ended` is
    taken in place of the function. Where several are computed at once they are computed along.
    """
    if chunk == 1:
        return jax.lax.map(lambda own: jax.lax.cond(own[0].alive, function, ended, own), members)
    if not 0 < chunk < len(members[0].alive):
        return jax.vmap(function)(members)
    return jax.lax.map(function, members, batch_size=chunk)


def by_device(
    function: Callable[..., Any], mesh: Mesh, given: tuple[P, ...], made: P
) -> Callable[..., Any]:
    """Return the function as each device of the mesh computes it for its own members.

    `given` and `made` tell which arguments and results have an axis of members, and where. A mesh
    over which no members are spread changes nothing.
    """
    if sharding.MEMBERS not in mesh.axis_names:
        return function
    of_one = jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=made, check_vma=False)
    return functools.wraps(function)(of_one)


def jit_population_step(state: State, mesh: Mesh, **fixed: Any) -> PopulationStep:
    """Compile `population_step` for a state placed like the given one, which is donated."""

    def step(state, members, frozen, batch, step):
        return population_step(state, members, frozen, batch, step, **fixed)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    metrics = sharding.read_by_all(sharding.by_members(mesh))
    return jax.jit(
        by_device(step, mesh, (EACH, EACH, P(), P(), P()), EACH),
        donate_argnames=('state',),
        out_shardings=(shardings, metrics),
        compiler_options=xla.options(state, lean=True),
    )


def jit_population_outputs(
    model: Model, chunk: int, task: Task, mesh: Mesh
) -> Callable[[tuple[State, Traits], Tree, Batch], Float[Array, 'B S N W']]:
    """Compile the forward pass of all members, without dropout, and what the task needs of it.

    That of a member which is not alive may be zeros.
    """

    def outputs(trained, frozen, batch):
        batch = with_trunk(model, trained[0].trainable, frozen, batch)

        def one(item: tuple[State, Traits]) -> Float[Array, 'B S W']:
            state, member = item
            trainable = steps.scaled(state.trainable, member.multipliers)
            return steps.needed(model, task, merge(trainable, frozen, member.constants), batch)

        def ended(item: tuple[State, Traits]) -> Float[Array, 'B S W']:
            return _zeros(jax.eval_shape(one, item))

        return jnp.moveaxis(over_members(one, ended, trained, chunk), 0, 2)

    spread = by_device(outputs, mesh, (EACH, P(), P()), P(None, None, sharding.MEMBERS))
    return jax.jit(spread, compiler_options=xla.options(few=task.generates))


def stack(trees: Sequence[Tree]) -> Tree:
    """Return one tree of the members' trees, which have the same leaves of the same shapes."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def split_common(trees: Sequence[Tree]) -> tuple[Tree, Tree]:
    """Return the leaves that are equal in all trees, once, and the others stacked."""
    flat = [flatten(tree) for tree in trees]

    def equal(path: str) -> bool:
        first = flat[0][path]
        return all(leaves[path] is first or np.array_equal(leaves[path], first) for leaves in flat)

    common = {path: leaf for path, leaf in flat[0].items() if equal(path)}
    own = {path: np.stack([x[path] for x in flat]) for path in flat[0] if path not in common}
    return unflatten(common), unflatten(own)


def unstack(tree: Tree, index: Int[Array, ''] | int) -> Tree:
    """Return one member's tree."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def unpad(tree: Tree, shapes: Mapping[str, Any]) -> Tree:
    """Return a member's leaves without their padding, which is at the end of each axis."""
    return jax.tree.map(lambda x, own: x[tuple(slice(n) for n in own.shape)], tree, shapes)


def default_chunk() -> int:
    """Return how many members are best computed at a time on this kind of device.

    One on a CPU, where members gain nothing from each other's company but larger arrays miss the
    processor's caches; all of them elsewhere.
    """
    return 1 if jax.default_backend() == 'cpu' else 0
