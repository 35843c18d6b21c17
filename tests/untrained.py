"""Folders of compositions that nobody trained: random leaves, written as a run writes its own."""

from pathlib import Path

import jax
import numpy as np
import toy

from adapters_jax.adapters import composition, registry
from adapters_jax.adapters.composed import Composed
from adapters_jax.interop import adapter_folder
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree
from adapters_jax.tasks import Classification


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
    params = model.init(jax.random.key(0), loaded.params)
    return AdapterFolder(
        name=model.name,
        method=method.to_json(),
        head=head.to_json(),
        task=task.to_json(),
        backbone=loaded.describe(),
        max_length=24,
        pair=False,
        adapter_params=_noisy(params['adapters'][model.name]),
        head_params=_noisy(params['heads'][model.name]),
    )


def write(directory: Path, *arguments: str, **options: str) -> Path:
    """Write what `folder` returns."""
    return adapter_folder.save(folder(*arguments, **options), directory)


def _noisy(tree: Tree) -> Tree:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.float32(x + 0.5 * rng.standard_normal(x.shape)), tree)
