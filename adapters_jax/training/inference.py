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
from adapters_jax.params import partition
from adapters_jax.tasks.task import Task
from adapters_jax.training import batching, evaluation
from adapters_jax.training.dtypes import choose_dtype, choose_frozen_dtype
from adapters_jax.training.experiment import bind
from adapters_jax.training.fitting import parameters
from adapters_jax.training.placement import Placement
from adapters_jax.training.step import jit_outputs


def outputs(
    folder: AdapterFolder,
    backbone: LoadedBackbone,
    encoded: Encoded,
    config: Config,
    task: Task,
    dropped: Dropped = 0,
) -> Float[np.ndarray, 'N W']:
    """Return what the task needs of the outputs for every example, or every token, in order.

    `dropped` is as in AdapterDrop.

    Raises:
        ValueError: the backbone is not the one that the adapter was trained on, or the adapter's
            parameters are not those of its method, or have no layers to drop.
    """
    adapter_folder.check_backbone(folder, backbone.describe())
    model = bind(folder, backbone, choose_dtype(config), dropped)
    described = jax.eval_shape(model.init, jax.random.key(0), backbone.params)
    adapter_folder.check_leaves(folder, *partition(described, model.rules))
    placement = Placement.of(config)
    # The same split as in training, so that frozen weights are in the same number format.
    trainable, frozen = partition(parameters(folder, backbone, model), model.rules)
    return evaluation.outputs(
        jit_outputs(model, task),
        placement.trainable(trainable),
        placement.frozen(frozen, choose_frozen_dtype(config)),
        encoded,
        batching.choose(config, model, encoded.sizes, placement.row_parts, training=False),
        backbone.config.pad_id,
        placement.mesh,
        per_token=task.per_token,
        transform=task.transform,
    )
