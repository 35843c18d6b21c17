"""The adapter that a config asks for: a method, or an expression over named adapters.

`config.adapters` names adapters: folders of finished ones, which stay frozen, and methods of fresh
ones, which are trained. Where it is not empty, `config.method` is an expression over these names.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from adapters_jax import params
from adapters_jax.adapters import composition, registry
from adapters_jax.adapters.composed import Composed
from adapters_jax.adapters.fusion import FusionConfig
from adapters_jax.adapters.method import Method
from adapters_jax.config import Config, named_items
from adapters_jax.interop import formats
from adapters_jax.interop.adapter_folder import AdapterFolder


@dataclasses.dataclass(frozen=True, eq=False)
class Members:
    """The method of a run, and the finished adapters in it by name."""

    method: Method
    folders: Mapping[str, AdapterFolder]

    def overlay(self, tree: params.Tree) -> params.Tree:
        """Return a fresh tree of the method with the finished adapters' parameters in it."""
        leaves = params.flatten(tree)
        for name, folder in self.folders.items():
            leaves |= params.flatten({name: folder.adapter_params})
        return params.unflatten(leaves)


def load(config: Config) -> Members:
    """Read what `config.method` and `config.adapters` name.

    Raises:
        ValueError: an expression with a name that `adapters` does not define, or one that no block
            supports; a name that is not used; an adapter of another backbone.
        FileNotFoundError: an adapter folder that is not there.
    """
    given = named_items(config.adapters, 'adapters')
    if not given:
        return Members(registry.create(config.method), {})
    expression = composition.parse(config.method)
    unknown = [name for name in expression.names if name not in given]
    unused = [name for name in given if name not in expression.names]
    if unknown or unused:
        raise ValueError(
            f'config.method is {config.method!r} and config.adapters names {", ".join(given)}; '
            f'{(unknown + unused)[0]!r} is in one of them only; use exactly the same names'
        )
    folders = {
        name: _folder(value, config.backbone) for name, value in given.items() if is_folder(value)
    }
    methods = {
        name: registry.from_json(folders[name].method)
        if name in folders
        else registry.create(value)
        for name, value in given.items()
    }
    method = Composed(
        expression=str(expression),
        members=methods,
        frozen_members=tuple(folders),
        fusion=FusionConfig(**config.fusion.to_dict()),
    )
    return Members(method, folders)


def is_folder(text: str) -> bool:
    """Tell whether a value of `config.adapters` is a directory and not a method."""
    return '/' in text or Path(text).is_dir()


def _folder(directory: str, backbone: str) -> AdapterFolder:
    folder = formats.load_once(Path(directory), backbone)
    if folder.backbone_params:
        raise ValueError(
            f'{directory} holds leaves of the backbone itself ({min(folder.backbone_params)}...), '
            'which all adapters share, so it cannot be part of an expression; train one whose '
            'method leaves the backbone as it is, such as double_seq_bn in place of houlsby'
        )
    return folder
