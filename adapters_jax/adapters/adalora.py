"""AdaLoRA: low-rank changes in the form of a singular value decomposition, and a budget for it.

Zhang et al. (2023) train `a diag(e) b` and take singular values away in training where they matter
least, so that the projections end with different ranks. Two things beyond LoRA make it work: a
penalty that keeps the vectors orthogonal, and the schedule (`rank_schedule`) around the optimiser.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import params
from adapters_jax.adapters import parts
from adapters_jax.adapters.low_rank import Factors, LowRank, Place
from adapters_jax.adapters.method import At
from adapters_jax.adapters.rank_schedule import Schedule, find_triplets, schedule_ranks
from adapters_jax.params import Tree
from adapters_jax.sites import Dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRank):
    """Adaptive budget allocation (Zhang et al. 2023); the schedule's defaults are `peft`'s.

    Every projection starts with rank `r`, and `target_r` is their mean in the end. `rank_pattern`
    is what an adapter has once `prune` took its zeros away: '3/attention/query' keeps so many.
    """

    architecture: ClassVar[str] = 'adalora'

    r: int = 12  # at the start: `init_r` in `peft`
    target_r: int = 8
    alpha: float = 8.0
    tinit: int = 0  # steps before the budget begins to fall
    tfinal: int = 0  # steps after it has fallen
    delta_t: int = 1  # steps between two allocations
    beta1: float = 0.85  # of the moving average of the sensitivity
    beta2: float = 0.85  # of the moving average of its uncertainty
    orth_reg: float = 0.5  # the factor of the penalty
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        self.require(
            1 <= self.target_r <= self.r,
            f'target_r={self.target_r} is not between 1 and r={self.r}, the rank at the start',
        )
        self.require(self.alpha > 0, f'alpha={self.alpha} is not above 0')
        self.require(self.orth_reg >= 0, f'orth_reg={self.orth_reg} is not at least 0')
        self.require(self.delta_t >= 1, f'delta_t={self.delta_t} is not at least 1')
        for name in ('tinit', 'tfinal'):
            self.require(
                getattr(self, name) >= 0, f'{name}={getattr(self, name)} is not at least 0'
            )
        for name in ('beta1', 'beta2'):
            beta = getattr(self, name)
            self.require(0 < beta < 1, f'{name}={beta} is not between 0 and 1')
        for key, rank in self.rank_pattern.items():
            self.require(
                0 <= rank <= self.r,
                f'rank_pattern has {key!r}: {rank}; expected a rank between 0 and r={self.r}',
            )

    def places(self, dimensions: Dimensions) -> list[Place]:
        """Return the projections that the options choose.

        Raises:
            ValueError: the backbone has none of them, or `rank_pattern` names others.
        """
        chosen = super().places(dimensions)
        named = {f'{place.layer}/{place.sub_layer}/{place.name}' for place in chosen}
        for key in self.rank_pattern:
            self.require(
                key in named,
                f'rank_pattern names {key!r}, but no adapted projection is called so; expected '
                f'keys like {min(named)!r}',
            )
        return chosen

    def rank(self, layer: int, place: str) -> int:
        """Return R at `place`, a path like 'attention/query'; 0 where nothing is left."""
        return self.rank_pattern.get(f'{layer}/{place}', self.r)

    def draw(self, key: PRNGKeyArray, inputs: int, outputs: int, rank: int) -> Tree:
        """Return fresh triplets, their singular values zero (section 3.1)."""
        keys = jax.random.split(key)
        draw = parts.normal(0.02)
        return {
            'a': draw(keys[0], (inputs, rank)),
            'e': jnp.zeros(rank),
            'b': draw(keys[1], (rank, outputs)),
        }

    def factors(self, params: Tree, inputs: int, at: At) -> Factors:
        """Return both factors, the first one with the singular values.

        The scale is that of the rank at the start, however many triplets are left; its denominator
        is that of the authors' code.
        """
        scaling = self.alpha / (self.r + 1e-5)
        return params['a'] * params['e'].reshape(1, -1), params['b'] * scaling

    def penalty(self, params: Tree) -> Float[Array, ''] | None:
        """Return the mean distance of the vectors from orthonormality, times `orth_reg`.

        Section 3.1; the distances are norms, not their squares, and the mean is over matrices, as
        in `peft`.
        """
        if not self.orth_reg:
            return None
        nodes = find_triplets(params)
        matrices = [x for node in nodes for x in (node['a'].T, node['b'])]
        distances = [_from_orthonormal(rows) for rows in matrices]
        return self.orth_reg * sum(distances) / max(len(distances), 1)

    def optimizer(
        self, inner: optax.GradientTransformation, total_steps: int
    ) -> optax.GradientTransformation:
        """Return the optimiser that keeps the budget.

        Raises:
            ValueError: `tinit` and `tfinal` leave no step between them.
        """
        shared = ('target_r', 'tinit', 'tfinal', 'delta_t', 'beta1', 'beta2')
        options = {name: getattr(self, name) for name in shared}
        return schedule_ranks(inner, Schedule(total_steps=total_steps, **options))


def prune(method: AdaLoRA, tree: Tree) -> tuple[AdaLoRA, Tree]:
    """Return the same adapter without the triplets whose singular value is zero.

    `rank_pattern` of the returned method says how many each projection has left; one without any
    has no parameters.
    """
    leaves, ranks = params.flatten(tree), {}
    pruned = dict(leaves)
    for path in [path.removesuffix('/e') for path in leaves if path.endswith('/e')]:
        keep = np.flatnonzero(np.asarray(leaves[f'{path}/e']))
        ranks[path.removeprefix('layer_')] = len(keep)
        if len(keep):
            pruned[f'{path}/a'] = leaves[f'{path}/a'][:, keep]
            pruned[f'{path}/e'] = leaves[f'{path}/e'][keep]
            pruned[f'{path}/b'] = leaves[f'{path}/b'][keep]
        else:
            pruned = {name: x for name, x in pruned.items() if not name.startswith(path + '/')}
    left = dict(method.rank_pattern) | ranks
    return dataclasses.replace(method, rank_pattern=left), params.unflatten(pruned)


def _from_orthonormal(rows: Float[Array, 'R I']) -> Float[Array, '']:
    """Return the Frobenius norm of `rows rowsᵀ - 1`, its gradient zero where the norm is."""
    rows = rows.astype(jnp.float32)
    gram = jnp.matmul(rows, rows.T, precision='highest') - jnp.eye(len(rows))
    squares = jnp.square(gram).sum()
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
