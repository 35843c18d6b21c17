"""ReFT: low-rank interventions on the hidden states of a text's first and last tokens.

Wu et al. (2024) edit representations instead of weights: after a block, the states at a few
positions are moved within a subspace of R dimensions. LoReFT, NoReFT and DiReFT differ in whether
the subspace's basis is orthonormal and in what is written into it.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters import parts
from adapters_jax.adapters.method import At, Method, adapted_layers
from adapters_jax.params import Tree
from adapters_jax.sites import Dimensions, Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReFT(Method):
    """Interventions at the first `prefix_positions` and the last `suffix_positions` of each text.

    A text shorter than that is covered as far as it goes, and where both cover a position the
    suffix's intervention counts; both read the block's own output. (`adapters` 1.3.0 does the same
    but fails, or mixes positions up, where `suffix_positions` exceeds a text's length.) No start is
    the identity: LoReFT changes nothing only where the source equals the projection.
    """

    architecture: ClassVar[str] = 'reft'

    layers: Literal['all'] | tuple[int, ...] = 'all'
    prefix_positions: int = 3
    suffix_positions: int = 0
    r: int = 1
    orthogonality: bool  # keep the projection's columns orthonormal
    subtract_projection: bool = True  # replace what the subspace holds, instead of adding to it
    tied_weights: bool = False  # one intervention a layer, for prefix and suffix
    dropout: float = 0.05  # of the whole state at the positions, as in the authors' code
    non_linearity: str | None = None  # of the source
    leave_out: tuple[int, ...] = ()
    init_weights_seed: int | None = None

    @property
    def stepwise(self) -> bool:
        """No: positions are counted from the ends of the whole text."""
        return False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        for name in ('prefix_positions', 'suffix_positions'):
            count = getattr(self, name)
            self.require(count >= 0, f'{name}={count} is below 0')
        self.require(
            self.prefix_positions + self.suffix_positions > 0,
            'prefix_positions and suffix_positions are both 0; set at least one above 0',
        )
        self.require(self.r >= 1, f'r={self.r} is not at least 1')
        self.require(0 <= self.dropout < 1, f'dropout={self.dropout} is not in [0, 1)')
        if self.non_linearity is not None:
            functional.activation(self.non_linearity.lower())

    def adapted(self, dimensions: Dimensions) -> list[int]:
        """Return the layers with interventions.

        Raises:
            ValueError: `layers` or `leave_out` names a layer that the backbone does not have, or
                they leave none.
        """
        kept = adapted_layers(self.leave_out, dimensions)
        if self.layers == 'all':
            return kept
        absent = [i for i in self.layers if not 0 <= i < dimensions.layers]
        self.require(
            not absent,
            f'layers names layer {min(absent, default=None)}, but the backbone has layers 0 to '
            f'{dimensions.layers - 1}',
        )
        chosen = [i for i in kept if i in self.layers]
        self.require(bool(chosen), f'layers={list(self.layers)} leaves no layer to adapt')
        return chosen

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return fresh parameters; equal seeds give equal ones whatever the key.

        Raises:
            ValueError: more orthonormal columns than there are dimensions.
        """
        if self.init_weights_seed is not None:
            key = jax.random.key(self.init_weights_seed)
        self.require(
            self.r <= dimensions.hidden or not self.orthogonality,
            f'r={self.r} exceeds the hidden size {dimensions.hidden}, in which no more than that '
            'many directions are orthogonal',
        )
        ends = ('prefix',) if self.tied_weights else ('prefix', 'suffix')
        return {
            f'layer_{layer}': {
                'block': {
                    end: self._init_one(functional.fold(key, layer, i), dimensions.hidden)
                    for i, end in enumerate(ends)
                }
            }
            for layer in self.adapted(dimensions)
        }

    def _init_one(self, key: PRNGKeyArray, hidden: int) -> Tree:
        keys, bound = jax.random.split(key, 3), hidden**-0.5
        if self.orthogonality:
            projection = orthonormal(jax.random.normal(keys[0], (hidden, self.r)))
        else:
            projection = parts.uniform_by_inputs(keys[0], (hidden, self.r))
        source = parts.dense(keys[1], parts.uniform_by_inputs, hidden, self.r)
        source['bias'] = jax.random.uniform(keys[2], (self.r,), minval=-bound, maxval=bound)
        return {'projection': projection, 'source': source}

    def block(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Intervene at the chosen positions (Wu et al. 2024, section 3.3)."""
        x = result = stream.hidden
        before, after = neighbours(stream.mask, x.shape[1])
        ends = (('prefix', self.prefix_positions, before), ('suffix', self.suffix_positions, after))
        for i, (end, count, distance) in enumerate(ends):
            if count:
                unit = params['prefix' if self.tied_weights else end]
                changed = self.intervene(unit, x, functional.fold(at.key, i))
                chosen = (before >= 0) & (after >= 0) & (distance < count)
                result = jnp.where(chosen[..., None], changed, result)
        return stream.replace(hidden=result)

    def intervene(
        self, params: Tree, x: Float[Array, 'B T D'], key: PRNGKeyArray | None
    ) -> Float[Array, 'B T D']:
        """Return the changed states: x + (Wx + b - Rx)R, for DiReFT x + (Wx + b)R (eq. 2 and 3)."""
        basis = params['projection']
        basis = (orthonormal(basis) if self.orthogonality else basis).astype(x.dtype)
        source = parts.apply_dense(params['source'], x)
        if self.non_linearity is not None:
            source = functional.activation(self.non_linearity.lower())(source)
        if self.subtract_projection:
            source = source - x @ basis
        return functional.dropout(x + source @ basis.T, self.dropout, key)


def neighbours(
    mask: Bool[Array, '#B 1 #T T'] | None, length: int
) -> tuple[Int[Array, '#B T'], Int[Array, '#B T']]:
    """Return how many tokens of its text stand before and after each position.

    A text is the tokens that a position may attend to. One of the two numbers is negative at a
    position outside of the text that it sees, which is padding.
    """
    index = jnp.arange(length).reshape(1, -1)
    if mask is None:
        return index, index[:, ::-1]
    first, count = jnp.argmax(mask[:, 0], axis=-1), mask[:, 0].sum(-1)
    return index - first, first + count - 1 - index


def orthonormal(matrix: Float[Array, 'D R']) -> Float[Array, 'D R']:
    """Return orthonormal columns with the span of the matrix's: the Q of QR with diag(R) > 0.

    Orthonormal columns come out as they are. The matrix itself is trained, in float32.
    """
    matrix = matrix.astype(jnp.float32)
    if matrix.shape[1] == 1:  # the same, without the decomposition that accelerators are slow at
        return matrix / jnp.linalg.norm(matrix)
    q, r = jnp.linalg.qr(matrix)
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).reshape(1, -1)


def torch_parametrization(
    weight: Float[np.ndarray, 'R D'],
) -> tuple[Float[np.ndarray, 'R D'], Float[np.ndarray, 'K K']]:
    """Return `(original, base)` of which torch's orthogonal parametrisation makes `weight`.

    Of the many pairs this is the one whose Householder reflections (or, for R = D, matrix
    exponential) are the identity: the weight is the first part of an orthogonal `base`.
    """
    rank, hidden = weight.shape
    if rank == hidden:
        return -np.eye(rank, dtype=weight.dtype), weight.copy()
    base, _ = np.linalg.qr(weight.T.astype(np.float64), mode='complete')
    base = base.astype(weight.dtype)
    base[:, :rank] = weight.T
    return -np.eye(rank, hidden, dtype=weight.dtype), base
