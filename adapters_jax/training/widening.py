"""From the members of a sweep to what a population is made of: one wide model, and padded trees."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from adapters_jax import params
from adapters_jax.adapters import bank
from adapters_jax.adapters.method import Method
from adapters_jax.config import Config
from adapters_jax.data import tokenize
from adapters_jax.params import Tree
from adapters_jax.training import grid, start
from adapters_jax.training.experiment import Experiment, check_model, check_trained
from adapters_jax.training.members import load as load_members


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """What belongs to one member: its experiment, its fresh parameters, and its folder."""

    name: str
    experiment: Experiment
    trainable: Tree
    frozen: Tree
    multipliers: Tree
    shapes: Tree  # of the trainable leaves without padding
    workdir: Path


def widen(
    experiment: Experiment, members: Sequence[grid.Member], folder: Path
) -> tuple[Any, list[Own]]:
    """Return the model that all members are computed with, and what belongs to each.

    A member is initialised as it would be alone, by its own method and seed, and then padded.
    """
    by_text = {member.config.method: member.config for member in members}
    methods = {text: _prepared(experiment, config) for text, config in by_text.items()}
    different = tuple(dict.fromkeys(methods.values()))
    widest = bank.widest(different) if len(different) > 1 else different[0]
    model = dataclasses.replace(experiment.model, method=widest)
    alone = {m: dataclasses.replace(model, method=m) for m in different}
    for own_model in alone.values():
        check_model(own_model, experiment.backbone.params)
        if experiment.start:
            start.check(experiment.start, own_model)
    owns = []
    for member in members:
        own_model = alone[methods[member.config.method]]
        own = dataclasses.replace(experiment, config=member.config, model=own_model)
        owns.append(_own(member.name, own, model, len(different) > 1, folder / member.name))
    return model, owns


def _own(name: str, alone: Experiment, wide: Any, padded: bool, workdir: Path) -> Own:
    tree = alone.init_params()
    shapes, _ = params.partition(jax.eval_shape(lambda: tree), alone.model.rules)
    check_trained(shapes, alone.config)
    multipliers: Tree = {}
    if padded:
        given = alone.model.method, tree['adapters'][wide.name], wide.method
        factors = {'adapters': {wide.name: bank.multipliers(*given)}}
        multipliers, _ = params.partition(factors, wide.rules)
        tree = tree | {'adapters': {wide.name: bank.pad(*given)}}
    trainable, frozen = params.partition(tree, wide.rules)
    return Own(name, alone, trainable, frozen, multipliers, shapes, workdir)


def _prepared(experiment: Experiment, config: Config) -> Method:
    def encode(text: str) -> list[int]:
        return tokenize.load_tokenizer(experiment.backbone.directory)(text)['input_ids']

    return load_members(config).method.prepare(encode)
