"""Adapters that nobody trained: random leaves, written as a run writes its own."""

from pathlib import Path

import jax
import numpy as np
import toy

from adapters_jax import config as configs
from adapters_jax import files, params
from adapters_jax.adapters import composition, registry
from adapters_jax.adapters.composed import Composed
from adapters_jax.config import Config
from adapters_jax.interop import adapter_folder
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree
from adapters_jax.tasks import Classification
from adapters_jax.training import experiment


def folder(
    backbone: str, expression: str, member: str = 'pfeiffer[size=3]', pooling: str = 'mean'
) -> AdapterFolder:
    """Return a composition of one method's adapters with a head of the toy topics."""
    loaded = load_backbone(backbone)
    given = registry.create(member)
    names = composition.parse(expression).names
    method = Composed(expression=expression, members=dict.fromkeys(names, given))
    task = Classification(labels=sorted(toy.TOPICS))
    head = HeadConfig(pooling=pooling)
    model = Model(loaded.config, method, head, task.num_outputs, name='fused')
    tree = model.init(jax.random.key(0), loaded.params)
    return AdapterFolder(
        name=model.name,
        method=method.to_json(),
        head=head.to_json(),
        task=task.to_json(),
        backbone=loaded.describe(),
        max_length=24,
        pair=False,
        adapter_params=_noisy(tree['adapters'][model.name]),
        head_params=_noisy(tree['heads'][model.name]),
    )


def write(directory: Path, *arguments: str, **options: str) -> Path:
    """Write what `folder` returns."""
    return adapter_folder.save(folder(*arguments, **options), directory)


def run(config: Config, workdir: Path, seed: int = 0) -> Path:
    """Write what a finished run leaves for `evaluate` and `predict`: its config, random leaves."""
    built = experiment.build(config)
    trainable, _ = params.partition(built.init_params(), built.model.rules)
    adapter_folder.save(built.folder(_noisy(jax.device_get(trainable), seed)), workdir / 'adapter')
    files.write_json(workdir / 'config.json', configs.to_json(config))
    return workdir


def _noisy(tree: Tree, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(x + 0.5 * rng.standard_normal(x.shape)), tree)
