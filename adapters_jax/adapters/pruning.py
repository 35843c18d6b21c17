"""Fewer adapters under a trained fusion: those that it gives little weight are taken out.

Rücklé et al. (2021, section 4) prune fused adapters by their mean attention weights after training;
the fusion's own parameters do not depend on how many adapters it mixes, so they stay as they are.
"""

from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Array, Bool, Float

from adapters_jax.adapters import composition
from adapters_jax.adapters.composed import Composed, blocks_of
from adapters_jax.adapters.composition import Composition, Fuse
from adapters_jax.params import Tree


def importance(
    weights: Mapping[str, Float[Array, 'B T N']], real: Bool[np.ndarray, 'B T']
) -> dict[str, np.ndarray]:
    """Return the mean weight [N] of each fused adapter over the real tokens, by place."""
    return {place: np.asarray(x)[np.asarray(real)].mean(0) for place, x in weights.items()}


def by_fusion(
    found: Mapping[str, Float[np.ndarray, 'N']],
) -> dict[str, dict[str, Float[np.ndarray, 'N']]]:
    """Return what was recorded under '{fusion}/layer_{i}/{sub_layer}', by fusion and by place."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in found.items():
        fusion, layer, sub_layer = key.rsplit('/', 2)
        parts.setdefault(fusion, {})[f'{layer}/{sub_layer}'] = value
    return parts


def strongest(
    found: Mapping[str, Float[np.ndarray, 'N']], names: Collection[str], count: int
) -> tuple[str, ...]:
    """Return the adapters with the largest mean weight over all places, in their own order.

    Raises:
        ValueError: a count that is not between 1 and the number of adapters.
    """
    if not 1 <= count <= len(names):
        raise ValueError(f'{count} of {len(names)} adapters cannot be kept; expected 1 or more')
    order = np.argsort(-np.mean(list(found.values()), axis=0), kind='stable')[:count]
    return tuple(name for i, name in enumerate(names) if i in order)


def prune(method: Composed, params: Tree, keep: Collection[str]) -> tuple[Composed, Tree]:
    """Return the composition whose fusions mix only the adapters that are kept.

    A fused stack is kept with its last adapter, by whose name the fusion knows it.

    Raises:
        ValueError: a name that is not fused, a fusion that is left with nothing, or two that are
            left with the same adapters, by which they are known.
    """
    fuses = [block for block in blocks_of(method.tree) if isinstance(block, Fuse)]
    fused = {composition.last(child) for block in fuses for child in block.children}
    strange = sorted(set(keep) - fused)
    known = ', '.join(sorted(fused)) or 'none'
    method.require(not strange, f'{strange} are not fused; fused are {known}')
    for block in fuses:
        left = [child for child in block.children if composition.last(child) in keep]
        method.require(bool(left), f'{block} is left with no adapters; keep one or more of them')
    renamed: dict[str, str] = {}
    tree = _pruned(method.tree, keep, renamed)
    alike = sorted({name for name in renamed.values() if list(renamed.values()).count(name) > 1})
    method.require(not alike, f'several fusions would mix {alike} and no more; keep more of them')
    members = {name: method.members[name] for name in tree.names}
    pruned = Composed(
        expression=str(tree),
        members=members,
        frozen_members=tuple(name for name in method.frozen_members if name in members),
        fusion=method.fusion,
    )
    own = {name: params[name] for name in members if name in params}
    return pruned, own | {'fusion': {renamed[n]: x for n, x in params['fusion'].items()}}


def _pruned(node: str | Composition, keep: Collection[str], renamed: dict[str, str]):
    if isinstance(node, str):
        return node
    children = [_pruned(child, keep, renamed) for child in node.children]
    if not isinstance(node, Fuse):
        return type(node)(*children, **node.options())
    left = Fuse(*(child for child in children if composition.last(child) in keep))
    renamed[node.fusion] = left.fusion
    return left
