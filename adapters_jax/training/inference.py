"""A finished adapter applied to encoded examples: what `evaluate` and `predict` share."""

import jax
import numpy as np
from jaxtyping import Float

from adapters_jax.adapters.dropping import Dropped
from adapters_jax.config import Config
from adapters_jax.data.encoded import Encoded
from adapters_jax.interop import adapter_folder
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone
from adapters_jax.params import Tree, flatten, partition, unflatten
from adapters_jax.tasks.task import Task
from adapters_jax.training import batching, evaluation
from adapters_jax.training.dtypes import choose_dtype, choose_frozen_dtype
from adapters_jax.training.experiment import bind
from adapters_jax.training.fitting import parameters
from adapters_jax.training.placement import Placement
from adapters_jax.training.step import jit_outputs

Held = dict[str, tuple[np.ndarray, Tree]]


class Applied:
    """A finished adapter over its backbone, on its devices, and the program that it has there.

    `dropped` is as in AdapterDrop. `held` are leaves of a backbone by path, each with what it is on
    the devices: what is there is used again, and what is not is added.

    Raises:
        ValueError: the backbone is not the one that the adapter was trained on, or the adapter's
            parameters are not those of its method, or have no layers to drop.
    """

    def __init__(
        self,
        folder: AdapterFolder,
        backbone: LoadedBackbone,
        config: Config,
        task: Task,
        dropped: Dropped = 0,
        held: Held | None = None,
    ) -> None:
        adapter_folder.check_backbone(folder, backbone.describe())
        model = bind(folder, backbone, choose_dtype(config), dropped)
        described = jax.eval_shape(model.init, jax.random.key(0), backbone.params)
        adapter_folder.check_leaves(folder, *partition(described, model.rules))
        self.model, self.task, self._config = model, task, config
        self._placement = Placement.of(config)
        # The same split as in training, so that frozen weights are in the same number format.
        trainable, frozen = partition(parameters(folder, backbone, model), model.rules)
        self._trainable = self._placement.trainable(trainable)
        self._frozen = placed_once(frozen, self._placement, config, {} if held is None else held)
        self._forward = jit_outputs(model, task)

    def outputs(self, encoded: Encoded, few: bool = False) -> Float[np.ndarray, 'N W']:
        """Return what the task needs of the outputs for every example, or every token, in order.

        With `few` batches are as small as the examples need, and of few different shapes.
        """
        parts = self._placement.row_parts
        policy = batching.choose_forward(self._config, self.model, encoded.sizes, parts, few)
        return evaluation.outputs(
            self._forward,
            self._trainable,
            self._frozen,
            encoded,
            policy,
            self.model.config.pad_id,
            self._placement.mesh,
            per_token=self.task.per_token,
            transform=self.task.transform,
        )


def placed_once(frozen: Tree, placement: Placement, config: Config, held: Held) -> Tree:
    """Place frozen leaves that are not on the devices yet; return all of them."""
    leaves = flatten(frozen)
    new = {path: x for path, x in leaves.items() if path not in held or held[path][0] is not x}
    placed = flatten(placement.frozen(unflatten(new), choose_frozen_dtype(config)))
    for path, leaf in placed.items():
        held.setdefault(path, (leaves[path], leaf))
    return unflatten({path: placed[path] if path in placed else held[path][1] for path in leaves})


def outputs(
    folder: AdapterFolder,
    backbone: LoadedBackbone,
    encoded: Encoded,
    config: Config,
    task: Task,
    dropped: Dropped = 0,
) -> Float[np.ndarray, 'N W']:
    """Return what the task needs of the outputs for every example, or every token, in order.

    Raises:
        ValueError: as `Applied` does.
    """
    return Applied(folder, backbone, config, task, dropped).outputs(encoded)
