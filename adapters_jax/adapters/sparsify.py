"""Merging with less interference: adapters are made sparse, and may vote on signs, before the sum.

Fine-tuning changes more parameters than it needs to, and when adapters are added, what is
redundant in one disturbs another. TIES (Yadav et al. 2023) keeps the largest entries and lets the
adapters elect a sign for each; DARE (Yu et al. 2024) drops entries at random and rescales the
rest. All functions take adapters of one shape, or the deltas of adapters of the LoRA family.
"""

import zlib
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from adapters_jax.adapters.arithmetic import Leaves, check_weights, finish, match, weighted_sum
from adapters_jax.params import Tree

Elect = Literal['total', 'frequency']


def trim(tree: Tree, density: float, whole: bool = False) -> Tree:
    """Keep the share `density` of the entries with the largest magnitude, and zero the rest.

    The share is that of each leaf, as in `peft`, or of the whole adapter (Yadav et al. 2023,
    algorithm 1).

    Raises:
        ValueError: a density outside of [0, 1].
    """
    return finish(_trim(match([tree])[0], density, whole), tree)


def drop(tree: Tree, density: float, key: PRNGKeyArray) -> Tree:
    """Keep each entry with probability `density`, divided by it, and zero the rest (DARE).

    Yu et al. (2024, section 3.2). What is dropped depends on the key and the leaf's path.

    Raises:
        ValueError: a density outside of (0, 1].
    """
    return finish(_drop(match([tree])[0], density, key), tree)


def magnitude_prune(
    trees: Sequence[Tree], weights: Sequence[float], density: float, whole: bool = False
) -> Tree:
    """Return the weighted sum of trimmed adapters."""
    weights = check_weights(trees, weights)
    members = [_trim(leaves, density, whole) for leaves in match(trees)]
    return finish(weighted_sum(members, weights), trees[0])


def ties(
    trees: Sequence[Tree],
    weights: Sequence[float],
    density: float,
    elect: Elect = 'total',
    whole: bool = False,
) -> Tree:
    """Trim, elect signs and merge (Yadav et al. 2023, algorithm 1).

    An entry's sign is that of the sum of all adapters' entries ('total'), or the more frequent one;
    the weighted entries of that sign are averaged by their number, not by their weights.
    """
    weights = check_weights(trees, weights)
    members = [_trim(leaves, density, whole) for leaves in match(trees)]
    return finish(_disjoint_mean(members, weights, elect), trees[0])


def dare_linear(
    trees: Sequence[Tree], weights: Sequence[float], density: float, key: PRNGKeyArray
) -> Tree:
    """Return the weighted sum of adapters with entries dropped (Yu et al. 2024, section 3.2)."""
    weights = check_weights(trees, weights)
    return finish(weighted_sum(_drop_each(trees, density, key), weights), trees[0])


def dare_ties(
    trees: Sequence[Tree],
    weights: Sequence[float],
    density: float,
    key: PRNGKeyArray,
    elect: Elect = 'total',
) -> Tree:
    """Return what `ties` does with entries dropped at random instead of trimmed."""
    weights = check_weights(trees, weights)
    return finish(_disjoint_mean(_drop_each(trees, density, key), weights, elect), trees[0])


def _trim(leaves: Leaves, density: float, whole: bool) -> Leaves:
    if not 0 <= density <= 1:
        raise ValueError(f'density={density} is not a share; expected a number in [0, 1]')
    if not whole:
        return {
            path: x * _largest(x.ravel(), density).reshape(x.shape) for path, x in leaves.items()
        }
    keep = _largest(np.concatenate([x.ravel() for x in leaves.values()]), density)
    ends = np.cumsum([x.size for x in leaves.values()])[:-1]
    parts = zip(leaves.items(), np.split(keep, ends), strict=True)
    return {path: x * part.reshape(x.shape) for (path, x), part in parts}


def _largest(x: Float[np.ndarray, 'N'], density: float) -> Bool[np.ndarray, 'N']:
    """Return which entries are the int(density N) largest in magnitude; of equal ones the first."""
    keep = np.zeros(x.size, bool)
    keep[np.argsort(-np.abs(x), kind='stable')[: int(density * x.size)]] = True
    return keep


def _drop_each(trees: Sequence[Tree], density: float, key: PRNGKeyArray) -> list[Leaves]:
    members = match(trees)
    return [_drop(x, density, jax.random.fold_in(key, i)) for i, x in enumerate(members)]


def _drop(leaves: Leaves, density: float, key: PRNGKeyArray) -> Leaves:
    if not 0 < density <= 1:
        raise ValueError(f'density={density} is not a probability; expected a number in (0, 1]')

    def kept(path: str, shape: tuple[int, ...]) -> Bool[Array, '...']:
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return jax.random.bernoulli(leaf_key, density, shape)

    return {path: x * np.asarray(kept(path, x.shape)) / density for path, x in leaves.items()}


def _disjoint_mean(members: Sequence[Leaves], weights: Sequence[float], elect: Elect) -> Leaves:
    """Elect a sign for each entry, and average the weighted entries that have it."""
    if elect not in ('total', 'frequency'):
        raise ValueError(f"elect={elect!r} is unknown; expected 'total' or 'frequency'")
    merged = {}
    for path in members[0]:
        entries = np.stack([leaves[path] for leaves in members])
        votes = entries if elect == 'total' else np.sign(entries)
        sign = np.where(votes.sum(0) >= 0, 1, -1)
        agree = np.sign(entries) == sign
        total = sum(w * x for w, x in zip(weights, entries * agree, strict=True))
        merged[path] = total / np.maximum(agree.sum(0), 1)
    return merged
