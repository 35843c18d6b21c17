"""VeRA: low-rank changes whose matrices are random, frozen and shared; two vectors are trained.

Kopiczko et al. (2024) draw one pair of matrices for the whole backbone and train, for each
projection, a vector between them and one after them. The matrices are drawn from a seed, so an
adapter's file holds the vectors only.
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.adapters.low_rank import Factors, LowRank, WeightDecomposed, widen
from adapters_jax.adapters.method import At
from adapters_jax.params import Tree
from adapters_jax.sites import Dimensions


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(LowRank):
    """Vector-based random matrix adaptation (Kopiczko et al. 2024, eq. 2).

    The matrices are as wide as the widest adapted projection; narrower ones use the first of their
    rows and columns, as in `peft`.
    """

    architecture: ClassVar[str] = 'vera'

    d_initial: float = 0.1
    b_initial: float = 0.0
    projection_seed: int = 0
    save_projection: bool = False  # keep the matrices in the file: they are not those of the seed

    def __post_init__(self) -> None:
        """Refuse a seed that is none."""
        super().__post_init__()
        self.require(
            self.projection_seed >= 0, f'projection_seed={self.projection_seed} is not at least 0'
        )

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh vectors, and the shared matrices under `constants`."""
        tree = super().init(key, dimensions, backbone)
        return tree | {'constants': self._projections(dimensions)}

    @property
    def stores_constants(self) -> bool:
        """Whether the matrices are not those of the seed."""
        return self.save_projection

    def constants(self, dimensions: Dimensions) -> Tree:
        """Return the shared matrices, unless they are to be kept in the file."""
        return {} if self.save_projection else {'constants': self._projections(dimensions)}

    def _projections(self, dimensions: Dimensions) -> Tree:
        sizes = [place.sizes(dimensions) for place in self.places(dimensions)]
        inputs, outputs = (max(widths) for widths in zip(*sizes, strict=True))
        bits = np.random.Philox(self.projection_seed)
        return {
            'a': kaiming_uniform(bits, inputs, self.r),
            'b': kaiming_uniform(bits, self.r, outputs),
        }

    def draw(self, key: PRNGKeyArray, inputs: int, outputs: int, rank: int) -> Tree:
        """Return fresh vectors."""
        return {'d': jnp.full(rank, self.d_initial), 'b': jnp.full(outputs, self.b_initial)}

    def factors(self, params: Tree, inputs: int, at: At) -> Factors:
        """Return the shared matrices, scaled by the two vectors."""
        self.require(
            {'a', 'b'} <= set(at.constants),
            'the shared matrices are missing; with save_projection=True they must be in the file, '
            'under constants',
        )
        d, b = params['d'], params['b']
        a = at.constants['a'][:inputs] * d.reshape(1, -1)
        return a, at.constants['b'][:, : len(b)] * b.reshape(1, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DVoRA(WeightDecomposed, VeRA):
    """VeRA on the direction of each kernel, with its magnitude (Liu et al. 2024, section 5.4)."""

    architecture: ClassVar[str] = 'dvora'


def kaiming_uniform(bits: np.random.BitGenerator, inputs: int, outputs: int) -> Float[Array, 'I O']:
    """Draw from U(-sqrt(6/I), sqrt(6/I)) (He et al. 2015, eq. 10), alike on every platform.

    Each number is an odd integer of 24 bits times a constant: one rounding, which no compiler can
    contract with another operation.
    """
    raw = bits.random_raw(inputs * outputs) >> np.uint64(40)
    odd = 2 * raw.astype(np.int64) + 1 - 2**24
    scale = np.float32(math.sqrt(6 / inputs) / 2**24)
    return jnp.asarray(odd.astype(np.float32).reshape(inputs, outputs) * scale)


def as_lora(
    a: Float[Array, 'R I'],
    b: Float[Array, 'O R'],
    vera_d: Float[Array, 'R R'],
    vera_b: Float[Array, 'O O'],
) -> Tree:
    """Return the LoRA factors that equal a VeRA module of `adapters`, in float32.

    That library trains full matrices where the paper has vectors: `vera_B b vera_D a x` is a
    low-rank change with factors of its own. Its `alpha / r` stays to be applied.
    """
    a, b, vera_d, vera_b = (widen(x) for x in (a, b, vera_d, vera_b))
    return {
        'a': jnp.asarray(a.T, jnp.float32),
        'b': jnp.asarray((vera_b @ b @ vera_d).T, jnp.float32),
    }
