"""From a config of several tasks to what they share, and what each has of its own.

Each task is an experiment as in a run by itself: data, labels, adapter, head. What they share is
the backbone, the batches, and the step.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from adapters_jax import config as configs
from adapters_jax import params, tasks
from adapters_jax.config import Config
from adapters_jax.data.encoded import TAGS, Encoded
from adapters_jax.data.mixing import join
from adapters_jax.data.shares import Mixing
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.tasks.mixture import Mixture
from adapters_jax.training import experiment
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.routed import Routed

BEST = ('mean', 'each')


@dataclasses.dataclass(frozen=True, eq=False)
class Multitask:
    """The parts of a run of several tasks, with each task's own experiment under its name.

    `splits` has the examples of all training splits together as 'train', and the other splits of
    each task as 'TASK/SPLIT'.
    """

    config: Config
    backbone: LoadedBackbone
    task: Mixture
    model: Routed
    members: Mapping[str, Experiment]
    splits: Mapping[str, Encoded]

    @property
    def validation_splits(self) -> list[str]:
        """The validation splits of all tasks; a task's first one counts for the mean."""
        return [
            f'{name}/{split}'
            for name, member in self.members.items()
            for split in member.validation_splits
        ]

    @property
    def fingerprints(self) -> dict[str, str]:
        """A name of what is in each split 'TASK/SPLIT', the training splits each by itself."""
        return {
            f'{name}/{split}': found
            for name, member in self.members.items()
            for split, found in member.fingerprints.items()
        }

    @property
    def adapters_fingerprint(self) -> str:
        """Empty: no finished adapter is part of such a run."""
        return ''

    def member(self, split: str) -> Experiment:
        """Return the experiment that a split 'TASK/SPLIT' belongs to."""
        return self.members[split.partition('/')[0]]

    def init_params(self) -> params.Tree:
        """Return the backbone with each task's adapter and head as it begins by itself."""
        own = [member.init_params() for member in self.members.values()]
        branches = {
            branch: params.merge(*(tree[branch] for tree in own))
            for branch in ('adapters', 'heads')
        }
        return {'backbone': self.backbone.params} | branches

    def mixing(self, epochs: int) -> Mixing:
        """Return how the tasks share the batches of so many epochs."""
        return make_mixing(self.config, epochs)


def build(config: Config) -> Multitask:
    """Load and check everything that a config of several tasks names.

    Raises:
        ValueError, FileNotFoundError: the first mistake found, in one sentence with its task.
    """
    make_mixing(config, 1)
    if config.start:
        raise ValueError(
            f'config.start is {config.start!r}, but a run of several tasks trains an adapter for '
            'each, and one adapter cannot start them all; leave it empty, or train them one by one'
        )
    if config.mixing.best not in BEST:
        raise ValueError(
            f'mixing.best is {config.mixing.best!r}; expected one of {", ".join(BEST)}'
        )
    for name in sorted(config.tasks):
        _check_kind(config, name)
    backbone = load_backbone(config.backbone, dtype=None)
    members = {name: build_member(config, name, backbone) for name in sorted(config.tasks)}
    _check_validation(members)
    model = Routed(tuple(member.model for member in members.values()))
    mixture = Mixture(
        names=tuple(members),
        tasks=tuple(member.task for member in members.values()),
        weights=tuple(config.tasks[name].weight for name in members),
    )
    splits = {'train': join([member.splits['train'] for member in members.values()])} | {
        f'{name}/{split}': encoded
        for name, member in members.items()
        for split, encoded in member.splits.items()
        if split != 'train'
    }
    built = Multitask(config, backbone, mixture, model, members, splits)
    _check_model(built)
    return built


def _check_model(built: Multitask) -> None:
    """Trace the forward pass once, on shapes, for what only that can find."""
    shapes = jax.eval_shape(built.init_params)
    names = ('input_ids', 'token_type_ids', 'positions', 'segments')
    batch = dict.fromkeys((*names, TAGS), np.ones((1, 8), np.int32))
    batch |= {'starts': np.zeros((1, 1), np.int32), 'adapter': np.zeros(1, np.int32)}
    jax.eval_shape(built.model.apply, shapes, batch)


def _check_kind(config: Config, name: str) -> None:
    """Refuse a task whose batches are not of texts."""
    kind = tasks.kind(configs.of_task(config, name).task.name)
    if kind.reads != 'input_ids':
        raise ValueError(
            f'task {name!r}: {kind.name} cannot share a run with other tasks, because it reads no '
            'texts; train it by itself'
        )


def _check_validation(members: Mapping[str, Experiment]) -> None:
    """Refuse a mean over some of the tasks only."""
    without = [name for name, member in members.items() if not member.validation_splits]
    if without and len(without) < len(members):
        raise ValueError(
            f'the tasks {", ".join(without)} have no validation split and the others have; give '
            'them one, or let data.split_fractions cut one off'
        )


def build_member(config: Config, name: str, backbone: LoadedBackbone | None = None) -> Experiment:
    """Load and check one of the tasks of a config.

    Raises:
        ValueError, FileNotFoundError: the first mistake found, in one sentence with its task.
    """
    try:
        return experiment.build(configs.of_task(config, name), backbone, name)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f'task {name!r}: {error}') from error


def make_mixing(config: Config, epochs: int) -> Mixing:
    """Return what the config says of the tasks' shares.

    Raises:
        ValueError: a value out of range.
    """
    given = config.mixing
    return Mixing(
        schedule=given.schedule,
        temperature=given.temperature,
        shares=tuple(config.tasks[name].share for name in sorted(config.tasks)),
        epochs=epochs,
        steps=given.steps,
    )
