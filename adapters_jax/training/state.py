"""What a run of one adapter starts from: arrays where they belong, and the programs over them.

Training makes it of arrays, the check ahead of it (`ahead`) of shapes alone; since both come
through here, what is checked is what is trained.
"""

import dataclasses
import functools
from typing import Any

import jax

from adapters_jax import params
from adapters_jax.config import Config
from adapters_jax.training.dtypes import choose_frozen_dtype
from adapters_jax.training.experiment import Experiment, check_trained
from adapters_jax.training.optimizer import OptimizerConfig, make_optimizer
from adapters_jax.training.placement import Placement
from adapters_jax.training.step import RobustStep, jit_outputs, jit_train_step


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """Trees and programs before the first step."""

    trainable: params.Tree
    frozen: params.Tree
    opt_state: Any
    key: Any
    train_step: Any
    forward: Any


def prepare(
    experiment: Experiment,
    tree: params.Tree,
    placement: Placement,
    total_steps: int,
    parts: int = 1,
) -> Start:
    """Return where a run starts from `tree`, all parameters as arrays or as shapes.

    A step cuts a batch into so many parts.

    Raises:
        ValueError: nothing to train, or a leaf that does not divide over the mesh.
    """
    config, model = experiment.config, experiment.model
    trainable, frozen = params.partition(tree, model.rules)
    check_trained(trainable, config)
    trainable = placement.trainable(trainable)
    frozen = placement.frozen(frozen, choose_frozen_dtype(config))
    adam = make_optimizer(OptimizerConfig(**config.optimizer.to_dict()), total_steps)
    optimizer = model.method.optimizer(adam, total_steps)
    opt_state = placement.moments(optimizer.init, trainable)
    robust = config.training.adapter_drop == 'robust'
    make = functools.partial(RobustStep, seed=config.seed) if robust else jit_train_step
    step = make(
        trainable,
        opt_state,
        model=model,
        task=experiment.task,
        optimizer=optimizer,
        **step_options(config, parts),
    )
    key = placement.put(jax.random.fold_in(jax.random.key(config.seed), 1))
    forward = jit_outputs(model, experiment.task, trainable)
    return Start(trainable, frozen, opt_state, key, step, forward)


def step_options(config: Config, parts: int) -> dict[str, Any]:
    """Return what a config says of a step, which cuts a batch into so many parts."""
    training = config.training
    return {
        'accumulate': parts,
        'label_smoothing': training.label_smoothing,
        'dropout': training.dropout,
    }
