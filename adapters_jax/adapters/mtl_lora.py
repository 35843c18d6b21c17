"""MTL-LoRA: LoRA with a small matrix for the task between its factors, and several up-projections.

Yang et al. (2025) share `a` and the up-projections among tasks, and give each task a matrix of its
own between them and its own weights for mixing the up-projections. An adapter here is what one
task uses of that.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.adapters import parts
from adapters_jax.adapters.low_rank import Factors, LowRank
from adapters_jax.adapters.method import At
from adapters_jax.params import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTLLoRA(LowRank):
    """LoRA for many tasks, as one of them sees it (Yang et al. 2025).

    The options have the names and the defaults of the `adapters` library.
    """

    architecture: ClassVar[str] = 'mtl_lora'

    alpha: float = 8.0
    n_up_projection: int = 1
    task_specific_matrix_type: Literal['singular_values', 'linear'] = 'singular_values'
    weights_sharpness: float = 0.05  # the temperature of the softmax that mixes them
    init_weights: Literal['lora', 'bert'] = 'lora'  # of a and b

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        self.require(self.alpha > 0, f'alpha={self.alpha} is not above 0')
        self.require(
            self.n_up_projection >= 1, f'n_up_projection={self.n_up_projection} is not at least 1'
        )
        self.require(
            self.weights_sharpness > 0, f'weights_sharpness={self.weights_sharpness} is not above 0'
        )

    def draw(self, key: PRNGKeyArray, inputs: int, outputs: int, rank: int) -> Tree:
        """Return fresh factors; the task's matrix is the identity.

        Up-projections that start equal, mixed in equal shares, would stay equal for ever, as in the
        `adapters` library; here the shares of several differ a little from the start.
        The `adapters` library fills its 'linear' matrix with ones, which would leave one rank.
        """
        keys = jax.random.split(key, 3)
        several = self.n_up_projection > 1
        noise = jax.random.normal(keys[2], (self.n_up_projection,)) * 0.02 * several
        a, b = {
            'lora': (parts.uniform_by_inputs, parts.zeros),
            'bert': (parts.normal(0.02), parts.normal(0.02)),
        }[self.init_weights]
        diagonal = self.task_specific_matrix_type == 'singular_values'
        return {
            'a': a(keys[0], (inputs, rank)),
            'b': b(keys[1], (self.n_up_projection, rank, outputs)),
            'weights': 1 + noise,
            'task': {'values': jnp.ones(rank)} if diagonal else {'matrix': jnp.eye(rank)},
        }

    def factors(self, params: Tree, inputs: int, at: At) -> Factors:
        """Return `a` times the task's matrix, and the mixed up-projections, scaled by alpha / r."""
        a, task = params['a'], params['task']
        first = a * task['values'].reshape(1, -1) if 'values' in task else a @ task['matrix']
        shares = _softmax(params['weights'] / self.weights_sharpness)
        return first, (params['b'] * shares.reshape(-1, 1, 1)).sum(0) * (self.alpha / self.r)


def _softmax(x: Float[Array, 'N']) -> Float[Array, 'N']:
    """Return the softmax in the type of `x`, numpy's float64 among them."""
    powers = (np if isinstance(x, np.ndarray) else jnp).exp(x - x.max())
    return powers / powers.sum()
