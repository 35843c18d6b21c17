"""AdaLoRA's rank schedule: an optimiser around another one that prunes singular values.

How important a triplet (a singular value with its two vectors) is can be told from the gradient
alone, so the schedule needs nothing of the model: it finds the triplets in the trainable tree,
keeps moving averages beside the inner optimiser's state, and sends the singular values that the
budget has no room for to zero. All of it is array code, so it runs in a jitted step, and in one
that is mapped over a population.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from adapters_jax.params import Tree

_FACTORS = ('a', 'b', 'e')  # a triplet's right vectors [I, R], left vectors [R, O], values [R]

Triplets = tuple[Tree, ...]  # one dict of a, b, e for each adapted projection, by sorted path


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When and down to what the ranks are cut; steps count the updates from 1.

    Until `tinit` all triplets stay. Then the budget falls, and every `delta_t` steps the least
    important triplets beyond it are masked; from `total_steps - tfinal` on the mask stays.

    Raises:
        ValueError: no step is left between the first phase and the last.
    """

    total_steps: int
    target_r: int
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if self.tinit >= self.last:
            raise ValueError(
                f'adalora: tinit={self.tinit} and tfinal={self.tfinal} leave none of the '
                f'{self.total_steps} steps to reduce the ranks in; lower them or train for longer'
            )

    @property
    def last(self) -> int:
        """The step that decides which triplets stay for good."""
        return self.total_steps - self.tfinal

    def budget(self, step: int, initial: int, target: int) -> int:
        """Return how many triplets may stay after a step (Zhang et al. 2023, section 3.3)."""
        if step <= self.tinit:
            return initial
        if step >= self.last:
            return target
        left = 1 - (step - self.tinit) / (self.last - self.tinit)
        return int((initial - target) * left**3 + target)

    def excess(self, initial: int, matrices: int) -> Int[np.ndarray, 'N']:
        """Return how many triplets are over the budget after each of the steps 0 to `last`."""
        target = self.target_r * matrices
        budgets = [self.budget(step, initial, target) for step in range(self.last + 1)]
        return np.maximum(initial - np.array(budgets, np.int32), 0)


class RankState(NamedTuple):
    """The inner optimiser's state beside the schedule's own."""

    inner: Any
    step: Int[Array, '']
    sensitivity: Triplets  # moving average of |weight * gradient|
    uncertainty: Triplets  # moving average of its distance from that average
    keep: tuple[Bool[Array, 'R'], ...]  # the last decision


def schedule_ranks(
    inner: optax.GradientTransformation, schedule: Schedule
) -> optax.GradientTransformation:
    """Return `inner` with the singular values in the trainable tree pruned on schedule.

    Every adapter in the tree has the whole budget. A masked value is exactly zero after
    `optax.apply_updates`. Importance is judged by the weights after the update and the gradient
    that led to it. Zhang et al. (2023), algorithm 1.
    """

    def init(trainable: Tree) -> RankState:
        nodes = find_triplets(trainable)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), nodes)
        return RankState(
            inner=inner.init(trainable),
            step=jnp.zeros((), jnp.int32),
            sensitivity=zeros,
            uncertainty=jax.tree.map(jnp.zeros_like, zeros),
            keep=tuple(jnp.ones(node['e'].shape, bool) for node in nodes),
        )

    def update(gradients: Tree, state: RankState, trainable: Tree) -> tuple[Tree, RankState]:
        updates, inner_state = inner.update(gradients, state.inner, trainable)
        nodes = find_triplets(trainable)
        if not nodes:
            return updates, state._replace(inner=inner_state)
        after = optax.apply_updates(nodes, find_triplets(updates))
        state = _observe(schedule, state, after, find_triplets(gradients))
        state, masked = _allocate(schedule, state, _per_adapter(trainable))
        values = [node['e'] for node in nodes]
        kept = zip(find_triplets(updates), values, state.keep, strict=True)
        pruned = [jnp.where(masked & ~keep, -e.astype(u['e'].dtype), u['e']) for u, e, keep in kept]
        return _with_values(updates, iter(pruned)), state._replace(inner=inner_state)

    return optax.GradientTransformation(init, update)


def find_triplets(tree: Mapping[str, Any]) -> Triplets:
    """Return the nodes that hold a triplet's factors, in the order of their sorted paths."""
    if set(_FACTORS) <= set(tree):
        return ({name: tree[name] for name in _FACTORS},)
    branches = [tree[name] for name in sorted(tree) if isinstance(tree[name], Mapping)]
    return tuple(node for branch in branches for node in find_triplets(branch))


def _per_adapter(trainable: Tree) -> list[int]:
    """Return how many of the tree's triplets each adapter has, in the order of `find_triplets`."""
    own = trainable.get('adapters')
    trees = [own[name] for name in sorted(own)] if own else [trainable]
    return [count for count in (len(find_triplets(tree)) for tree in trees) if count]


def _with_values(tree: Mapping[str, Any], values: Any) -> Tree:
    """Return the tree with the `e` of each triplet replaced by the next of `values`."""
    if set(_FACTORS) <= set(tree):
        return dict(tree) | {'e': next(values)}
    return {
        name: _with_values(tree[name], values) if isinstance(tree[name], Mapping) else tree[name]
        for name in sorted(tree)
    }


def _observe(
    schedule: Schedule, state: RankState, after: Triplets, gradients: Triplets
) -> RankState:
    """Count the step and, before the last phase, update both moving averages (section 3.2)."""
    step = state.step + 1
    watching = step < schedule.last

    def average(beta: float, mean: Array, value: Array) -> Array:
        return jnp.where(watching, beta * mean + (1 - beta) * value, mean)

    importance = jax.tree.map(
        lambda w, g: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)), after, gradients
    )
    sensitivity = jax.tree.map(
        lambda mean, value: average(schedule.beta1, mean, value), state.sensitivity, importance
    )
    uncertainty = jax.tree.map(
        lambda mean, value, smooth: average(schedule.beta2, mean, jnp.abs(value - smooth)),
        state.uncertainty,
        importance,
        sensitivity,
    )
    return state._replace(step=step, sensitivity=sensitivity, uncertainty=uncertainty)


def _allocate(
    schedule: Schedule, state: RankState, counts: list[int]
) -> tuple[RankState, Bool[Array, '']]:
    """Decide which triplets stay; return also whether this step masks the others.

    `counts` of them on end are those of one adapter, and compete for its budget.
    """
    scores = [
        triplet_scores(node, spread)
        for node, spread in zip(state.sensitivity, state.uncertainty, strict=True)
    ]
    thresholds: list[Array] = []
    for count in counts:
        own = scores[len(thresholds) : len(thresholds) + count]
        thresholds += [_threshold(schedule, state.step, own)] * count
    between = (state.step > schedule.tinit) & (state.step % schedule.delta_t == 0)
    decides = (between & (state.step < schedule.last)) | (state.step == schedule.last)
    keep = tuple(
        jnp.where(decides, score > threshold, old)
        for score, threshold, old in zip(scores, thresholds, state.keep, strict=True)
    )
    return state._replace(keep=keep), decides | (state.step > schedule.last)


def _threshold(
    schedule: Schedule, step: Int[Array, ''], scores: list[Float[Array, 'R']]
) -> Float[Array, '']:
    """Return the score that triplets of one adapter must be above to stay."""
    ranked = jnp.sort(jnp.concatenate(scores))
    count = jnp.asarray(schedule.excess(len(ranked), len(scores)))[jnp.minimum(step, schedule.last)]
    return jnp.where(count > 0, ranked[jnp.maximum(count - 1, 0)], -jnp.inf)


def triplet_scores(sensitivity: Tree, uncertainty: Tree) -> Float[Array, 'R']:
    """Return the importance of each triplet of a projection (Zhang et al. 2023, section 3.2).

    That of a vector is the mean over its entries, so wide projections have no advantage.
    """
    entries = {name: sensitivity[name] * uncertainty[name] for name in _FACTORS}
    return entries['e'] + (entries['a'].mean(0) + entries['b'].mean(1))
