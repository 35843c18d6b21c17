"""The step: one pure function from trainable leaves to better ones.

Gradients are taken over the trainable tree alone; frozen leaves are an argument that is neither
differentiated nor donated. Losses are sums with counts, so the result does not depend on how
a batch is cut over devices or accumulation steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import xla
from adapters_jax.adapters import dropping
from adapters_jax.generation import generate
from adapters_jax.model import Batch, Model
from adapters_jax.params import Tree, flatten, map_with_path, merge
from adapters_jax.tasks.task import Task
from adapters_jax.training import cutting

Metrics = dict[str, Float[Array, '']]
# The sum of losses and the count of examples of each task by name, where there are several.
Parts = dict[str, tuple[Float[Array, ''], Float[Array, '']]]
TrainStep = Callable[..., tuple[Tree, Any, Metrics]]


def loss_sum(
    trainable: Tree,
    frozen: Tree,
    batch: Batch,
    key: PRNGKeyArray | None,
    model: Model,
    task: Task,
    label_smoothing: float,
    multipliers: Tree | None = None,
) -> tuple[Float[Array, ''], tuple[Float[Array, ''], Parts]]:
    """Return the sum of the losses of the batch's examples, how many there are, and of whom.

    `multipliers` are for some of the trainable leaves what they are multiplied by before use.
    """
    trainable = scaled(trainable, multipliers or {})
    outputs = model.apply(merge(trainable, frozen), batch, key)
    total, count = task.loss(outputs, batch, label_smoothing)
    penalty = model.penalty(trainable)
    # Times the count, because what is stepped on is the gradient of the sum divided by the count.
    whole = total if penalty is None else total + penalty * count
    return whole, (count, task.parts(outputs, batch, label_smoothing))


def scaled(tree: Tree, multipliers: Tree) -> Tree:
    """Return the tree with the leaves that have a multiplier multiplied by it."""
    factors = flatten(multipliers)
    return map_with_path(lambda path, x: x * factors[path] if path in factors else x, tree)


def gradients(
    trainable: Tree,
    frozen: Tree,
    batch: Batch,
    key: PRNGKeyArray | None,
    accumulate: int,
    **fixed: Any,
) -> tuple[Tree, Float[Array, ''], Float[Array, ''], Parts]:
    """Return the gradient of the summed loss, the sum, the count, and what each task has of both.

    They are sums over the `accumulate` parts that the rows are cut into.

    Raises:
        ValueError: rows that do not divide into that many parts.
    """
    grad = jax.value_and_grad(loss_sum, has_aux=True)

    def part(carry: Any, item: tuple[Array, Batch]) -> tuple[Any, Parts]:
        index, rows = item
        part_key = None if key is None else jax.random.fold_in(key, index)
        (total, (count, tasks)), grads = grad(trainable, frozen, rows, part_key, **fixed)
        return jax.tree.map(lambda a, b: a + b, carry, (grads, total, count)), tasks

    if accumulate == 1:
        (total, (count, tasks)), grads = grad(trainable, frozen, batch, key, **fixed)
        return grads, total, count, tasks
    rows = len(next(iter(batch.values())))
    if rows % accumulate:
        raise ValueError(
            f'a batch of {rows} rows does not divide into {accumulate} parts; choose '
            'training.accumulate so that it divides the rows of every batch'
        )
    zeros = (jax.tree.map(jnp.zeros_like, trainable), jnp.zeros(()), jnp.zeros(()))
    carry, tasks = jax.lax.scan(
        part, zeros, (jnp.arange(accumulate), cutting.cut(batch, accumulate))
    )
    return *carry, jax.tree.map(lambda x: x.sum(0), tasks)


def train_step(
    trainable: Tree,
    opt_state: optax.OptState,
    frozen: Tree,
    batch: Batch,
    key: PRNGKeyArray,
    step: Array,
    *,
    model: Model,
    task: Task,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
    dropout: bool = True,
    multipliers: Tree | None = None,
) -> tuple[Tree, optax.OptState, Metrics]:
    """Take one optimiser step; `key` is the run's, and each step folds its number into it.

    Metrics are `loss` (what is minimised: the mean over what the task counts, examples or words, of
    several tasks weighted, and what the method adds to it), `gradient_norm`
    (trainable leaves, before clipping) and `examples`; of several tasks also each one's own
    `loss/NAME`, NaN where it has no example.
    """
    step_key = jax.random.fold_in(key, step) if dropout else None
    fixed = {'model': model, 'task': task, 'label_smoothing': label_smoothing}
    fixed |= {'multipliers': multipliers}
    grads, total, count, tasks = gradients(trainable, frozen, batch, step_key, accumulate, **fixed)
    divisor = jnp.maximum(count, 1)
    grads = jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads)
    updates, opt_state = optimizer.update(grads, opt_state, trainable)
    metrics = {
        'loss': total / divisor,
        'gradient_norm': optax.tree.norm(grads),
        'examples': batch['example_mask'].sum(dtype=jnp.float32),
    } | {f'loss/{name}': own / n for name, (own, n) in tasks.items()}
    return optax.apply_updates(trainable, updates), opt_state, metrics


def jit_train_step(trainable: Tree, opt_state: optax.OptState, **fixed: Any) -> TrainStep:
    """Compile `train_step` for states placed like the given ones.

    The state is donated, and its output shardings are pinned to the input's: left open, XLA may
    re-shard the moments after the first step and compile a second program.
    """

    def step(trainable, opt_state, frozen, batch, key, step):
        return train_step(trainable, opt_state, frozen, batch, key, step, **fixed)

    shardings = jax.tree.map(lambda x: x.sharding, (trainable, opt_state))
    return jax.jit(
        step,
        donate_argnames=('trainable', 'opt_state'),
        out_shardings=(*shardings, None),
        compiler_options=xla.options(trainable, lean=True),
    )


class RobustStep:
    """A step that drops the adapter from as many of the lowest layers as are drawn for it.

    Each number of layers has a program of its own, compiled when it is first drawn, because a
    program with fewer adapted layers is shorter (Rücklé et al. 2021, section 3.1). In a step,
    leaves of dropped layers have a gradient of zero.
    """

    def __init__(
        self, trainable: Tree, opt_state: optax.OptState, seed: int, model: Model, **fixed: Any
    ) -> None:
        self._seed, self._layers = seed, model.config.depth
        self._steps = [
            jit_train_step(
                trainable, opt_state, model=dataclasses.replace(model, dropped=dropped), **fixed
            )
            for dropped in range(self._layers)
        ]

    def __call__(self, trainable, opt_state, frozen, batch, key, step):
        """Take the step of this number."""
        dropped = dropping.draw(self._seed, int(step), self._layers)
        return self._steps[dropped](trainable, opt_state, frozen, batch, key, step)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """Trace the program of a step that drops no layer, which is the longest."""
        return self._steps[0].trace(*arguments)

    def _cache_size(self) -> int:
        """Return how many programs have been compiled."""
        return sum(step._cache_size() for step in self._steps)


def jit_outputs(
    model: Model, task: Task | None = None, placed: Tree | None = None
) -> Callable[[Tree, Tree, Batch], Float[Array, 'B S W']]:
    """Compile the forward pass: outputs of every example of a batch, without dropout.

    With a task it is what the task needs of them (`Task.reduced`). `placed` are arrays that lie on
    the devices that the program is for, if these are not the default ones.
    """

    def outputs(trainable: Tree, frozen: Tree, batch: Batch) -> Float[Array, 'B S W']:
        params = merge(trainable, frozen)
        if task is None:
            return cutting.forward(lambda rows: model.apply(params, rows), model, batch)
        return needed(model, task, params, batch)

    few = task is not None and task.generates
    return jax.jit(outputs, compiler_options=xla.options(placed, few=few))


def needed(model: Model, task: Task, params: Tree, batch: Batch) -> Float[Array, 'B S W']:
    """Return what the task needs of the model's outputs (`Task.reduced`), without dropout.

    Of a model that writes texts these are its scores of what was to be written, where that is
    known, and then the tokens that it writes.
    """

    def reduced(rows: Batch) -> Float[Array, 'B S W']:
        return task.reduced(model.apply(params, rows), rows)

    found = []
    if not task.writes or 'target_ids' in batch:
        found.append(cutting.forward(reduced, model, batch))
    if task.generates:
        written = generate(model, params, batch, task.rules, task.search)
        found.append(written.tokens[:, None, 0].astype(jnp.float32))
    return found[0] if len(found) == 1 else jnp.concatenate(found, axis=-1)
