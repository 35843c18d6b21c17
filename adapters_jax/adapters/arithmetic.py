"""Arithmetic on whole adapters: averages, sums and negation of their parameters.

Adapters of one shape are vectors that can be added (Ilharco et al. 2023; Zhang et al. 2023,
"Composing parameter-efficient modules with arithmetic operations"). Everything here is done on the
host in float64 and rounded to the type of the leaf once; arrays come back as they were given, of
numpy or of JAX. What a method never trains (`constants`) is no part of the vector: it must be the
same in all adapters, and stays.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax import params
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.union import Union
from adapters_jax.params import Tree

Leaves = dict[str, np.ndarray]  # trained leaves in float64, by '/'-joined path


def average(
    trees: Sequence[Tree], weights: Sequence[float] | None = None, normalise: bool = True
) -> Tree:
    """Return the weighted mean of adapters of one shape; without weights, the plain one.

    Weights may be negative. They are divided by their sum, so the mean of equal adapters is that
    adapter, bit for bit (in float32 or narrower); not with `normalise=False`.

    Raises:
        ValueError: weights that sum to zero, or what `add` refuses.
    """
    weights = check_weights(trees, [1.0] * len(trees) if weights is None else weights)
    if normalise:
        total = math.fsum(weights)
        if abs(total) <= 1e-12 * math.fsum(map(abs, weights)):
            raise ValueError(
                f'the weights {weights} sum to zero and cannot be normalised; change one, or set '
                'normalise=False to take the weighted sum'
            )
        weights = [weight / total for weight in weights]
    return add(trees, weights)


def add(trees: Sequence[Tree], weights: Sequence[float], origin: Tree | None = None) -> Tree:
    """Return the weighted sum of adapters of one shape.

    With an `origin`, sums what distinguishes them from it: `origin + sum_i w_i (tree_i - origin)`,
    the task arithmetic of Ilharco et al. (2023, section 2). That is what (IA)³ needs, whose vectors
    start at one.

    Raises:
        ValueError: no trees, a number of weights that is not theirs, weights that are not finite,
            or trees that differ in leaves, shapes or constants.
    """
    weights = check_weights(trees, weights)
    members = match(trees if origin is None else [*trees, origin])
    start = None if origin is None else members.pop()
    return finish(weighted_sum(members, weights, start), trees[0])


def negate(method: Method, tree: Tree) -> Tree:
    """Return the adapter that changes the backbone the other way (Zhang et al. 2023, section 3).

    Of a product one factor is negated: `b` of the LoRA family, the up-projection of a bottleneck
    or the LayerNorm after it. (IA)³'s vectors are mirrored at one: `2 - scale`. The members of a
    union are negated one by one.

    Raises:
        ValueError: a method for which no parameters do that.
    """
    if isinstance(method, Union):
        return {name: negate(one, tree.get(name, {})) for name, one in method.named().items()}
    pattern, mirror = _negated(method)
    (leaves,) = match([tree])
    turned = {p: mirror - x for p, x in leaves.items() if re.fullmatch(pattern, p)}
    return finish(leaves | turned, tree)


def _negated(method: Method) -> tuple[str, float]:
    """Return which leaves change sign, and the point at which they are mirrored."""
    options = method.to_json()
    match options['architecture']:
        case 'lora' | 'adalora' | 'mtl_lora' | 'vera':
            return r'layer_.*/b', 0.0
        case 'ia3' if not options['use_gating']:
            return r'layer_.*/(scale|input_scale)', 2.0
        case 'bottleneck' | 'compacter' if not options['ln_after']:
            return r'(.*/)?up/(kernel|left|weight|bias)', 0.0
        case 'bottleneck' | 'compacter' if not options['adapter_residual_before_ln']:
            return r'layer_.*/norm_after/(scale|bias)', 0.0
    raise ValueError(
        f'{options["architecture"]} with these options has no negation: no parameters of its form '
        'have the opposite effect; expected an ungated LoRA, VeRA or (IA)³, or a bottleneck'
    )


def check_weights(trees: Sequence[Any], weights: Sequence[float]) -> list[float]:
    """Return the weights as numbers.

    Raises:
        ValueError: no adapters, another number of weights, or one that is not finite.
    """
    if not trees:
        raise ValueError('there is no adapter to combine; expected at least one')
    weights = [float(weight) for weight in weights]
    if len(weights) != len(trees):
        raise ValueError(f'{len(weights)} weights for {len(trees)} adapters; expected one for each')
    if not all(map(math.isfinite, weights)):
        raise ValueError(f'the weights {weights} are not all finite; expected plain numbers')
    return weights


def match(trees: Sequence[Tree]) -> list[Leaves]:
    """Return the trained leaves of each adapter in float64.

    Raises:
        ValueError: leaves that not all have, have in another shape, or constants that differ.
    """
    flat = [params.flatten(tree) for tree in trees]
    for number, leaves in enumerate(flat[1:], 2):
        for path in sorted(flat[0].keys() ^ leaves.keys()):
            has, lacks = (1, number) if path in flat[0] else (number, 1)
            raise ValueError(
                f'adapter {has} has {path} and adapter {lacks} has not; expected adapters of the '
                'same method with the same options'
            )
        for path, leaf in leaves.items():
            _check_leaf(path, number, flat[0][path], leaf)
    return [
        {p: np.asarray(x).astype(np.float64) for p, x in leaves.items() if not _is_constant(p)}
        for leaves in flat
    ]


def _check_leaf(path: str, number: int, first: Any, leaf: Any) -> None:
    if first.shape != leaf.shape:
        raise ValueError(
            f'{path} has shape {first.shape} in adapter 1 and {leaf.shape} in adapter {number}; '
            'expected equal shapes (adapters of the LoRA family with different ranks can be '
            'combined by their deltas)'
        )
    if _is_constant(path) and not np.array_equal(np.asarray(first), np.asarray(leaf)):
        raise ValueError(
            f'{path} differs between adapters 1 and {number}: they were trained around different '
            'constants, so their parameters have no common meaning; expected equal seeds'
        )


def finish(leaves: Leaves, like: Tree) -> Tree:
    """Return the leaves as a tree, each of the type it has in `like`; constants are those of it."""

    def convert(path: str, old: Any) -> Any:
        if _is_constant(path):
            return old
        new = leaves[path].astype(old.dtype)
        return jnp.asarray(new) if isinstance(old, jax.Array) else new

    return params.map_with_path(convert, like)


def weighted_sum(
    members: Sequence[Leaves], weights: Sequence[float], origin: Leaves | None = None
) -> Leaves:
    """Return `origin + sum_i w_i (member_i - origin)` for each leaf; no origin is zero."""
    if origin is not None:
        members = [{path: x[path] - origin[path] for path in x} for x in members]
        members, weights = [*members, origin], [*weights, 1.0]
    weighted = [
        {path: w * x for path, x in leaves.items()}
        for w, leaves in zip(weights, members, strict=True)
    ]
    return {path: functools.reduce(np.add, [x[path] for x in weighted]) for path in members[0]}


def _is_constant(path: str) -> bool:
    return 'constants' in path.split('/')
