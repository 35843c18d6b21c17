"""From a config to the things it names: backbone, task, data, model.

Everything that can be wrong about a run is found here, before any long work starts.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax import tasks
from adapters_jax.adapters import dropping, registry
from adapters_jax.adapters.dropping import Dropped
from adapters_jax.config import Config
from adapters_jax.data import sources, tokenize
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.preprocess.chain import Chain
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.model import Model
from adapters_jax.models.block import REMAT
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree, fingerprint, flatten, merge, partition, unflatten
from adapters_jax.tasks.task import Encoding, Rows, Task
from adapters_jax.training import fitting, preprocessing, start
from adapters_jax.training.dtypes import (
    check_frozen_matrices,
    choose_dtype,
    choose_frozen_dtype,
    one_of,
)
from adapters_jax.training.members import Members
from adapters_jax.training.members import load as load_members
from adapters_jax.training.optimizer import OptimizerConfig
from adapters_jax.wheels import cache_directory

_LOG = logging.getLogger(__name__)
Splits = Mapping[str, Rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A run's parts, ready to train or evaluate.

    `splits` are encoded; `texts` are readable, as they were before the steps of `chain`. Training
    begins with the adapter `start` where there is one.
    """

    config: Config
    backbone: LoadedBackbone
    task: Task
    model: Model
    splits: Mapping[str, Encoded]
    texts: Splits
    members: Members
    chain: Chain = tokenize.NO_STEPS
    start: AdapterFolder | None = None

    @property
    def validation_splits(self) -> list[str]:
        """The names of the splits that early stopping looks at; the first one decides."""
        return [name for name in self.splits if name.startswith('validation')]

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """A name of what is in each split."""
        return {name: split.fingerprint() for name, split in self.splits.items()}

    @property
    def adapters_fingerprint(self) -> str:
        """A name of all parameters of the finished adapters, `start` too; empty without any."""
        folders = self.members.folders
        trees = {'members': {name: folder.adapter_params for name, folder in folders.items()}}
        if self.start:
            own = self.start
            trees['start'] = {
                'adapters': own.adapter_params,
                'backbone': own.backbone_params,
                'heads': own.head_params,
            }
        return fingerprint(trees) if folders or self.start else ''

    def init_params(self) -> Tree:
        """Return the backbone with a fresh adapter and head, from the config's seed."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), 0)
        tree = self.model.init(key, self.backbone.params)
        tree = fitting.with_published_head(tree, self.model, self.backbone)
        if self.members.folders:
            own = {self.model.name: self.members.overlay(tree['adapters'][self.model.name])}
            tree = tree | {'adapters': own}
        if self.start:
            tree = start.overlay(self.start, tree, self.model, self.task)
        return tree

    def tuned(self, split: str, outputs: np.ndarray) -> 'Experiment':
        """Return the experiment with its task as the outputs for a validation split settle it."""
        task = self.task.tuned(outputs, self.splits[split], self.texts[split])
        return dataclasses.replace(self, task=task)

    def score(self, split: str, outputs: np.ndarray) -> dict[str, float]:
        """Return the metrics of the outputs for a split."""
        return self.task.score(outputs, self.splits[split], self.texts[split])

    def folder(self, trainable: Tree) -> AdapterFolder:
        """Describe trained leaves as a finished adapter."""
        own = trainable.get('adapters', {}).get(self.model.name, {})
        return AdapterFolder(
            name=self.model.name,
            method=self.model.method.to_json(),
            head=self.model.head_config.to_json(),
            task=self.task.to_json(),
            backbone=self.backbone.describe(),
            max_length=self.config.data.max_length,
            pair='text_b' in self.texts['train'].column_names,
            adapter_params=merge(own, self._frozen()),
            head_params=trainable.get('heads', {}).get(self.model.name, {}),
            backbone_params=trainable.get('backbone', {}),
            preprocess=self.chain.to_json(),
        )

    def _frozen(self) -> Tree:
        """Return the adapter's frozen leaves that its options alone do not bring back."""
        method = self.model.method
        regenerated = flatten(method.constants(self.backbone.config.dimensions))

        def missing(tree: Tree) -> dict[str, Any]:
            adapter = flatten(tree['adapters'][self.model.name])
            return {
                path: leaf
                for path, leaf in adapter.items()
                if any(re.fullmatch(pattern, path) for pattern in method.frozen)
                and path not in regenerated
            }

        shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.backbone.params)
        return unflatten(missing(self.init_params())) if missing(shapes) else {}


def build(
    config: Config,
    backbone: LoadedBackbone | None = None,
    name: str = 'default',
    members: Members | None = None,
) -> Experiment:
    """Load and check everything that a config names.

    `backbone` and `members` are what it names by those keys, where they are at hand already.

    Raises:
        ValueError, FileNotFoundError: the first mistake found, in one sentence.
    """
    check_numbers(config)
    OptimizerConfig(**config.optimizer.to_dict())
    HeadConfig(**config.head.to_dict())
    members = members or load_members(config)
    choose_dtype(config)
    choose_remat(config)
    choose_frozen_dtype(config)
    kind = tasks.kind(config.task.name)
    chain = preprocessing.make_chain(config)
    preprocessing.check_task(kind, chain)
    preprocessing.check_tags(members.method, chain)
    preprocessing.check_members(members.folders, chain)
    texts = kind.read(config.data)
    if 'train' not in texts:
        raise ValueError('there is no training split; set data.train, data.dir or data.name')
    task = make_task(config, texts['train'])
    texts = sources.limited(texts, config.data)
    backbone = backbone or load_backbone(config.backbone, dtype=None)
    fitting.check_input(task, backbone)
    task = fitted(task, backbone)
    model = make_model(config, members, task, backbone, name)
    first = start.load(config)
    if first:
        start.check(first, model)
        start.check_members(first, members.folders)
        start.announce(first, model, task)
    splits = encode_splits(config, texts, task, model, backbone, chain)
    return Experiment(config, backbone, task, model, splits, texts, members, chain, first)


def make_model(
    config: Config, members: Members, task: Task, backbone: LoadedBackbone, name: str = 'default'
) -> Model:
    """Bind what a config names; `backbone` may hold shapes in place of parameters.

    Raises:
        ValueError: parts that do not fit one another.
    """

    def token_ids(text: str) -> list[int]:
        return tokenize.load_tokenizer(backbone.directory)(text)['input_ids']

    model = Model(
        config=backbone.config,
        method=members.method.prepare(token_ids),
        head_config=fitting.choose_head(config, task, backbone),
        outputs=task.num_outputs,
        name=name,
        dtype=choose_dtype(config),
        remat=choose_remat(config),
    )
    fitting.check_texts(task, model)
    check_model(model, backbone.params)
    if choose_frozen_dtype(config) == jnp.int8:
        check_frozen_matrices(model, backbone.params)
    if config.training.adapter_drop != 'none':
        shapes = jax.eval_shape(model.init, jax.random.key(0), backbone.params)
        setting = "training.adapter_drop='none'"
        dropping.check_droppable(model.method, shapes['adapters'][model.name], setting)
    return model


def check_model(model: Model, backbone: Tree) -> None:
    """Trace initialisation and forward pass once, on shapes, for what only they can find.

    Raises:
        ValueError: a method that does not fit the backbone or trains nothing of it, or members of a
            union that do not fit one another.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), backbone)
    trained = partition(shapes, model.rules)[0].keys() & {'adapters', 'backbone'}
    if not trained and model.method.rules(model.config.dimensions):
        raise ValueError(
            f'{model.method.architecture} trains nothing here: a {model.config.family} backbone '
            'has none of the parameters that it is for; choose another method'
        )
    jax.eval_shape(model.apply, shapes, fitting.smallest_batch(model.config))


def check_trained(trainable: Tree, config: Config) -> None:
    """Refuse a run that would train nothing.

    Raises:
        ValueError: there are no leaves, neither of an adapter nor of a head.
    """
    if not trainable:
        raise ValueError(
            f'nothing is left to train: {config.method} brings no parameters, and the head comes '
            "with the checkpoint; set head.train='all', or choose another method"
        )


# The least value of a key of `training`; below it nothing sensible could be done.
_LEAST = {'batch_size': 1} | dict.fromkeys(
    ('accumulate', 'steps', 'evaluate_every', 'patience', 'checkpoint_every', 'log_every'), 0
)
_SEEDS = 2**32  # of which JAX draws different numbers: a larger seed draws those of its remainder


def check_numbers(config: Config) -> None:
    """Refuse numbers out of their range.

    Raises:
        ValueError: the key, its value and the least or the most allowed.
    """
    values = {f'training.{key}': (config.training[key], least) for key, least in _LEAST.items()}
    for key, (value, least) in (values | {'seed': (config.seed, 0)}).items():
        if value < least:
            raise ValueError(f'{key} is {value}; expected {least} or more')
    if config.seed >= _SEEDS:
        raise ValueError(f'seed is {config.seed}; expected less than {_SEEDS}')
    if not (config.training.steps or 0 < config.training.epochs < math.inf):
        raise ValueError(f'training.epochs is {config.training.epochs}; expected more than 0')
    if not 0 <= config.training.label_smoothing < 1:
        raise ValueError(
            f'training.label_smoothing is {config.training.label_smoothing}; '
            'expected a number in [0, 1)'
        )


def choose_remat(config: Config) -> str:
    """Return what the backward pass finds of a block's activations.

    Raises:
        ValueError: no such policy.
    """
    return one_of(config, 'remat', REMAT)


def make_task(config: Config, train: Rows | None) -> Task:
    """Build the task; what the config leaves open, the training rows decide."""
    settings = tasks.kind(config.task.name).settings(config.task, train)
    return tasks.create(
        config.task.name,
        metrics=tuple(config.task.metrics),
        primary=config.task.primary,
        **settings,
    )


def encode_splits(
    config: Config,
    texts: Splits,
    task: Task,
    model: Model,
    backbone: LoadedBackbone,
    chain: Chain,
) -> dict[str, Encoded]:
    """Take every split through the chain, tokenize it and attach its labels as numbers."""
    tokenizer = fitting.tokenizer_of(backbone)
    cache = config.data.cache_dir
    given = Path(cache or cache_directory() / 'tokens').expanduser()
    directory = None if cache == 'none' else given
    encoding = Encoding(tokenizer, config.data.max_length, model.text_positions, directory, chain)
    return {name: _encode(name, rows, task, encoding, backbone) for name, rows in texts.items()}


def _encode(
    split: str, rows: Rows, task: Task, encoding: Encoding, backbone: LoadedBackbone
) -> Encoded:
    try:
        return fitting.encode(task, rows, encoding, backbone)
    except ValueError as error:
        raise ValueError(f'in the split {split!r}: {error}') from error


def fitted(task: Task, backbone: LoadedBackbone) -> Task:
    """Return the task for a backbone and its tokenizer."""
    return task.fitted(backbone.config, backbone.directory)


def served(folder: AdapterFolder, backbone: LoadedBackbone) -> Task:
    """Return the task that a finished adapter serves, with what its folder does not say of it.

    Raises:
        ValueError: the adapter came without a head.
    """
    task = task_of(folder)
    # What writes needs a tokenizer, which no folder of an adapter holds.
    whole = not task.writes and task.to_json().keys() <= folder.task.keys()
    return task if whole else fitted(task, backbone)


def task_of(folder: AdapterFolder) -> Task:
    """Return the task that a finished adapter serves.

    Raises:
        ValueError: the adapter came without a task, and perhaps without a head.
    """
    if not folder.task and folder.head:
        raise ValueError(
            f'the adapter {folder.name!r} has a head that scores words, but does not say for which '
            'task; train it further for one with config.start, or give it to transformers with '
            '`convert --format=merged`'
        )
    if not folder.task:
        raise ValueError(
            f'the adapter {folder.name!r} has no head and no task, so it computes hidden states '
            'but predicts nothing; take the folder that has them, or train it further for a task '
            'with config.start (a model that writes texts brings its own head)'
        )
    return tasks.from_json(folder.task)


def bind(
    folder: AdapterFolder, backbone: LoadedBackbone, dtype: Any = jnp.float32, dropped: Dropped = 0
) -> Model:
    """Return the model that a finished adapter and its backbone make.

    From the layers `dropped` the adapter is left out (AdapterDrop).

    Raises:
        ValueError: layers that there are not, an adapter from which none can be dropped, or one
            that divides batches.
    """
    method = registry.from_json(folder.method)
    fitting.check_undivided(method)
    _check_dropped(dropped, backbone.config.depth)
    if dropped:
        dropping.check_droppable(method, folder.adapter_params, '--drop_layers=0')
    return Model(
        config=backbone.config,
        method=method,
        head_config=HeadConfig.from_json(folder.head),
        outputs=task_of(folder).num_outputs,
        name=folder.name,
        dtype=dtype,
        dropped=dropped,
    )


def _check_dropped(dropped: Dropped, layers: int) -> None:
    if isinstance(dropped, range) and dropped.stop > layers:
        raise ValueError(
            f'--drop_layers={dropped.start}-{dropped.stop - 1}: expected layers of 0 to '
            f'{layers - 1}, those that the backbone has'
        )
    if isinstance(dropped, int) and not 0 <= dropped <= layers:
        raise ValueError(
            f'--drop_layers={dropped}: expected 0 to {layers}, the layers of the backbone'
        )
