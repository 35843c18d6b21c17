"""Where a run's arrays live: what `config.mesh` says, applied to the trees of a model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from adapters_jax import quantize, sharding
from adapters_jax.config import Config
from adapters_jax.models.backbone import CHANNELS, LAYOUTS
from adapters_jax.params import Tree
from adapters_jax.sharding import Layout

FROZEN = ('sharded', 'replicated')


def make_mesh(config: Config, devices: Sequence[Any] | None = None, members: int = 1) -> Mesh:
    """Return the mesh that a config asks for, of these devices or of JAX's, for so many members.

    Raises:
        ValueError: devices that are not there.
    """
    mesh = config.mesh
    spread = members if mesh.members else 1
    return sharding.make_mesh(mesh.data, mesh.fsdp, mesh.tensor, devices, spread)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, the rules of where leaves lie on it, and whether they hold for frozen ones too."""

    mesh: Mesh
    rules: tuple[Layout, ...] = ()
    frozen_whole: bool = False

    @classmethod
    def of(cls, config: Config, mesh: Mesh | None = None) -> 'Placement':
        """Return what a config asks for; its own rules precede those of the backbone.

        Raises:
            ValueError: devices that are not there, or a rule or setting that is none.
        """
        mesh_config = config.mesh
        if mesh_config.frozen not in FROZEN:
            raise ValueError(
                f'mesh.frozen is {mesh_config.frozen!r}; expected one of {", ".join(FROZEN)}'
            )
        given = tuple(Layout.parse(text) for text in mesh_config.rules)
        whole = mesh_config.frozen == 'replicated'
        return cls(mesh or make_mesh(config), (*given, *LAYOUTS), whole)

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return sharding.replicated(self.mesh)

    @property
    def row_parts(self) -> int:
        """Into how many parts the rows of a batch are cut."""
        return sharding.row_parts(self.mesh)

    def trainable(self, tree: Tree) -> Tree:
        """Place the leaves that are trained, in float32."""
        return self._place(tree, np.float32, sharding.layouts(tree, self.mesh, self.rules))

    def frozen(self, tree: Tree, dtype: DTypeLike) -> Tree:
        """Place the leaves that are not, floating-point ones in `dtype`.

        In 8 bits are the backbone's matrices; the other leaves are float32 then.
        """
        where = sharding.layouts(tree, self.mesh, () if self.frozen_whole else self.rules)
        if np.dtype(dtype) != np.int8:
            return self._place(tree, dtype, where, shared=True)
        return jax.tree_util.tree_map_with_path(self._place_in_8_bits, tree, where)

    def _place_in_8_bits(self, path: Any, leaf: Any, where: NamedSharding) -> Any:
        """Place a leaf; a matrix is in float32 only until it is there."""
        placed = self._place(leaf, np.float32, where, shared=True)
        axis = quantize.channel_axis(sharding.name_of(path), CHANNELS)
        return placed if axis is None else self._quantize(placed, axis)

    def _place(self, tree: Any, dtype: DTypeLike, where: Any, shared: bool = False) -> Any:
        return sharding.place(tree, dtype, where, shared)

    def _quantize(self, matrix: Any, axis: int) -> Any:
        return quantize.quantize(matrix, axis)

    def moments(self, init: Any, trainable: Tree) -> Any:
        """Return an optimiser's first state, born where the leaves are that it belongs to."""
        return jax.jit(init, out_shardings=self._beside(init, trainable))(trainable)

    def _beside(self, init: Any, trainable: Tree) -> Any:
        own = jax.tree.map(lambda leaf: leaf.sharding, trainable)
        return sharding.like(jax.eval_shape(init, trainable), own, self.everywhere)

    def put(self, tree: Any) -> Any:
        """Place a copy of every leaf on every device."""
        return sharding.put_replicated(tree, self.mesh)


class Described(Placement):
    """The same for trees of shapes: it says where leaves would lie, and makes no array."""

    def _place(self, tree: Any, dtype: DTypeLike, where: Any, shared: bool = False) -> Any:
        return sharding.describe(tree, where, dtype)

    def _quantize(self, matrix: Any, axis: int) -> Any:
        return sharding.describe(*quantize.describe(matrix, axis))

    def moments(self, init: Any, trainable: Tree) -> Any:
        """Return the shapes of an optimiser's first state, and where they would lie."""
        return sharding.describe(jax.eval_shape(init, trainable), self._beside(init, trainable))

    def put(self, tree: Any) -> Any:
        """Return what every device would hold whole."""
        return sharding.describe(tree, jax.tree.map(lambda _: self.everywhere, tree))
