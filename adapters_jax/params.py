"""Trees of parameters: which leaves are trained, and everything that follows from that choice.

A model's parameters are plain nested dicts of arrays in three branches,
`{'backbone': ..., 'adapters': {name: ...}, 'heads': {name: ...}}`. Training splits them in two by
rules over their paths; gradients, optimiser moments, clipping and checkpoints then exist for the
trainable half only, because the other half never reaches them.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Leaves whose whole path matches `pattern` are trained, or kept frozen."""

    pattern: str
    train: bool

    def matches(self, path: str) -> bool:
        """Tell whether the pattern covers the '/'-joined path from its first to its last letter."""
        return re.fullmatch(self.pattern, path) is not None


def train(pattern: str) -> Rule:
    """Return a rule: train the leaves whose path matches `pattern`."""
    return Rule(pattern, True)


def freeze(pattern: str) -> Rule:
    """Return a rule: keep the leaves whose path matches `pattern` as they are."""
    return Rule(pattern, False)


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Return the leaves of a nested dict by '/'-joined path, in sorted order.

    A branch without leaves has no path, so it is not in the result.

    Raises:
        ValueError: a name with a '/'.
    """
    leaves = {}
    for name in sorted(tree):
        if '/' in name:
            raise ValueError(
                f"parameter name {name!r} holds a '/', which separates levels of a path"
            )
        path, value = f'{prefix}{name}', tree[name]
        if isinstance(value, Mapping):
            leaves.update(flatten(value, path + '/'))
        else:
            leaves[path] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Return the nested dict of '/'-joined paths: the inverse of `flatten`.

    Raises:
        ValueError: a path that is a leaf and at the same time a branch of other leaves.
    """
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split('/')
        node: Any = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name in node:
            raise ValueError(f'parameter {path!r} conflicts with another: one is inside the other')
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> Tree:
    """Apply `function(path, leaf)` to every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def decide(paths: Iterable[str], rules: Sequence[Rule]) -> dict[str, Rule]:
    """Return the first rule that matches each path.

    Raises:
        ValueError: a path that no rule covers; all such paths are listed.
    """
    decided = {p: next((rule for rule in rules if rule.matches(p)), None) for p in paths}
    uncovered = [path for path, rule in decided.items() if rule is None]
    if uncovered:
        raise ValueError(
            f'no rule covers {len(uncovered)} of {len(decided)} parameters: '
            f"{', '.join(uncovered)}; end the rules with freeze('.*') or name these leaves"
        )
    return decided


def partition(params: Mapping[str, Any], rules: Sequence[Rule]) -> tuple[Tree, Tree]:
    """Split parameters into `(trainable, frozen)` by ordered rules; the first match wins.

    Raises:
        ValueError: a leaf that no rule covers.
    """
    leaves = flatten(params)
    decided = decide(leaves, rules)
    trainable = {path: leaf for path, leaf in leaves.items() if decided[path].train}
    frozen = {path: leaf for path, leaf in leaves.items() if not decided[path].train}
    return unflatten(trainable), unflatten(frozen)


def merge(*trees: Mapping[str, Any]) -> Tree:
    """Join trees whose leaves are disjoint: `merge(*partition(params, rules)) == params`.

    Raises:
        ValueError: a path that two trees hold, or that is a leaf in one and a branch in another.
    """
    merged: Tree = {}
    for tree in trees:
        _merge_into(merged, tree, '')
    return merged


def _merge_into(target: Tree, source: Mapping[str, Any], prefix: str) -> None:
    for name, value in source.items():
        path = f'{prefix}{name}'
        if name in target and isinstance(value, Mapping) != isinstance(target[name], dict):
            raise ValueError(f'parameter {path!r} is a leaf in one tree and a branch in another')
        if isinstance(value, Mapping):
            _merge_into(target.setdefault(name, {}), value, path + '/')
        elif name in target:
            raise ValueError(f'parameter {path!r} is in two of the trees that are to be merged')
        else:
            target[name] = value


def count(tree: Any) -> int:
    """Return the number of scalars in a tree of arrays (or of shapes).

    An array in 8 bits (`quantize`) has as many as the one that it stands for.
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, 'shape'))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def size_bytes(tree: Any) -> int:
    """Return the bytes that a tree of arrays (or of shapes) takes."""
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def cast(tree: Any, dtype: Any) -> Any:
    """Return the tree with every floating-point leaf in `dtype`; other leaves are untouched."""

    def convert(leaf: Any) -> Any:
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(convert, tree)


def fingerprint(tree: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that depend on every path, shape and bit of the tree.

    Leaves are hashed in float32 where they are floating-point, so that a checkpoint has one
    fingerprint however it was stored.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in flatten(tree).items():
        array = np.asarray(leaf)
        if jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            array = array.astype(np.float32, copy=False)
        digest.update(f'{path}:{array.dtype}:{array.shape};'.encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def summary(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    """Return a sentence with the numbers of trainable and total parameters."""
    tuned, total = count(trainable), count(trainable) + count(frozen)
    return f'{tuned:,} trainable of {total:,} parameters ({100 * tuned / max(total, 1):.3f} %)'
