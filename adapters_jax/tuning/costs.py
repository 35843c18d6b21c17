"""What an adapter costs beside its parameters: arithmetic and time, of inference and of training.

FLOPs are what the compiler counts in the program, the same in every run; seconds are of this
machine, measured in turns so that a slow minute slows all alike, and only their ratios mean much.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from adapters_jax import attention, params, sharding, xla
from adapters_jax.adapters import registry
from adapters_jax.config import Config
from adapters_jax.data import batches, pipeline, policies
from adapters_jax.model import Model, inputs_of
from adapters_jax.training import experiment
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.members import load as load_members
from adapters_jax.training.population_run import PopulationRun

ROWS, ROUNDS = 32, 5
_BARE = ''


@dataclasses.dataclass(frozen=True)
class Inference:
    """A forward pass with an adapter, as multiples of the backbone's with a head alone."""

    flops: float
    seconds: float


def inference(configs: Mapping[str, Config], run: Experiment) -> dict[str, Inference]:
    """Return what each config's adapter costs in inference, by the name of the config.

    One text a row, so that how texts are batched does not matter: the longest validation texts.
    `run` is an experiment over the same backbone and data.
    """
    bare = dataclasses.replace(run.model, method=registry.create('head'))
    models = {_BARE: bare} | {name: _model(config, run) for name, config in configs.items()}
    place = sharding.replicated(sharding.make_mesh(1, devices=jax.local_devices()[:1]))
    backbone = sharding.place(run.backbone.params, np.float32, place)
    batch = jax.device_put(_batch(run))
    programs = {name: _compile(model, backbone, batch) for name, model in models.items()}
    seconds = _in_turns({name: call for name, (call, _) in programs.items()})

    def cost(name: str) -> Inference:
        # Each round by itself, so that what slows a whole round cancels.
        rounds = zip(seconds[name], seconds[_BARE], strict=True)
        times = statistics.median(own / bare for own, bare in rounds)
        return Inference(programs[name][1] / programs[_BARE][1], times)

    return {name: cost(name) for name in configs}


def _model(config: Config, run: Experiment) -> Model:
    return experiment.make_model(config, load_members(config), run.task, run.backbone)


def _batch(run: Experiment) -> batches.Batch:
    split = run.splits[run.validation_splits[0]]
    policy = policies.choose_buckets(split.sizes, ROWS)
    pad_id, transform = run.backbone.config.pad_id, run.task.transform
    found = pipeline.eval_batches(split, policy, pad_id, transform=transform)
    return max(found, key=lambda batch: inputs_of(batch).shape[1])


def _compile(model: Model, backbone: params.Tree, batch: Any) -> tuple[Callable[[], Any], float]:
    # What the numbers are changes neither the arithmetic nor the time, so nothing is drawn.
    shapes = jax.eval_shape(model.init, jax.random.key(0), backbone)
    fresh = {name: tree for name, tree in shapes.items() if name != 'backbone'}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), fresh)
    tree = jax.device_put(zeros) | {'backbone': backbone}
    program = counted = _program(model, tree, batch)
    if jax.default_backend() == 'gpu':  # whose kernels of attention say nothing of their products
        with attention.written_out():
            counted = _program(model, tree, batch)
    return lambda: program(tree, batch), counted.cost_analysis()['flops']


def _program(model: Model, tree: params.Tree, batch: Any) -> jax.stages.Compiled:
    # A function of its own, which JAX has not traced before in another way.
    apply = functools.partial(model.apply)
    return jax.jit(apply, compiler_options=xla.options()).lower(tree, batch).compile()


def training(runs: Sequence[PopulationRun]) -> dict[str, float]:
    """Return the seconds of a training step for one member, by the members' names.

    Each population is spread over the devices as in training: by its members, or by rows.
    """
    calls = {str(number): run.rehearse() for number, run in enumerate(runs)}
    seconds = _in_turns(calls)
    return {
        name: statistics.median(seconds[str(number)]) / len(run.names)
        for number, run in enumerate(runs)
        for name in run.names
    }


def _in_turns(calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Return the seconds of each call in rounds, in each of which all are called in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 1):
        for name in list(calls)[:: 1 if round_ % 2 else -1]:
            started = time.perf_counter()
            jax.block_until_ready(calls[name]())
            found[name].append(time.perf_counter() - started)
    # The first round compiles, and fills caches.
    return {name: values[1:] for name, values in found.items()}
