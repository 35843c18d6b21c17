"""Arithmetic on adapters of the LoRA family by what they do: the changes of the kernels.

The factors of a low-rank change are not unique, so sums of factors mean less than sums of their
products, the deltas. Deltas of different ranks, scales and even methods can be combined; the
result is split into factors again, by a singular value decomposition or, exactly, by putting all
factors side by side. It is a plain LoRA whose `alpha / r` is 1: all scales are in its factors, so
the rank it is given does not change its strength.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from adapters_jax import params
from adapters_jax.adapters.arithmetic import add, check_weights
from adapters_jax.adapters.lora import LoRA
from adapters_jax.adapters.low_rank import Factors, LowRank, WeightDecomposed, widen
from adapters_jax.adapters.method import At, Method
from adapters_jax.params import Tree

Combine = Callable[[Sequence[Tree], Sequence[float]], Tree]  # such as `add`, or a partial `ties`
Delta = Float[np.ndarray, 'I O']

_ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'output': 'o'}


def combine_deltas(
    methods: Sequence[Method],
    trees: Sequence[Tree],
    weights: Sequence[float],
    rank: int,
    combine: Combine = add,
) -> tuple[LoRA, Tree]:
    """Combine the deltas of adapters and return the best approximation of that rank.

    A projection that an adapter leaves alone has a delta of zero. The singular values are split
    evenly between the factors. Exact if `rank` is at least that of the result (for a sum: the sum
    of the ranks). `combine` may be any function of trees and weights, such as
    `functools.partial(ties, density=0.2)`.

    Raises:
        ValueError: a method whose change of a kernel is no product of its own parameters, a rank
            below 1, or what `combine` refuses.
    """
    weights = _check_members(methods, trees, weights)
    if rank < 1:
        raise ValueError(f'rank={rank} is not at least 1')
    found = [deltas(method, tree) for method, tree in zip(methods, trees, strict=True)]
    shapes = {place: delta.shape for member in found for place, delta in member.items()}
    filled = [
        {place: member.get(place, np.zeros(shape)) for place, shape in shapes.items()}
        for member in found
    ]
    combined = params.flatten(combine([params.unflatten(member) for member in filled], weights))
    factors = {place: split(delta, rank) for place, delta in combined.items()}
    return _as_lora(methods, factors, trees)


def concatenate(
    methods: Sequence[Method], trees: Sequence[Tree], weights: Sequence[float]
) -> tuple[LoRA, Tree]:
    """Return the weighted sum of the deltas exactly: the factors side by side along the rank.

    Raises:
        ValueError: what `combine_deltas` refuses.
    """
    weights = _check_members(methods, trees, weights)
    factors: dict[str, Factors] = {}
    for method, tree, weight in zip(methods, trees, weights, strict=True):
        for place, (a, b) in _factors(method, tree).items():
            before = factors.get(place, (a[:, :0], b[:0]))
            factors[place] = np.hstack([before[0], a]), np.vstack([before[1], weight * b])
    return _as_lora(methods, factors, trees)


def combine_factors(
    methods: Sequence[LoRA],
    trees: Sequence[Tree],
    weights: Sequence[float],
    combine: Combine = add,
) -> tuple[LoRA, Tree]:
    """Combine the factors of LoRAs of one rank, the first and the second apart (`peft`'s way).

    Each factor gets the square root of weight times scale, `a` with its sign, so that every
    adapter's own product has its weight; the products of factors of different adapters come on
    top, so this approximates the sum of deltas roughly. In its favour: it needs no decomposition.

    Raises:
        ValueError: methods other than LoRA, or with a scale that is not the same everywhere, or
            what `combine` refuses.
    """
    weights = _check_members(methods, trees, weights)
    scaled = [
        weight * _scale(method, tree)
        for method, tree, weight in zip(methods, trees, weights, strict=True)
    ]
    roots = [math.sqrt(abs(weight)) for weight in scaled]
    signed = [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)]
    a = params.flatten(combine([_only(tree, 'a') for tree in trees], signed))
    b = params.flatten(combine([_only(tree, 'b') for tree in trees], roots))
    factors = {path[:-2]: (a[path], b[f'{path[:-2]}/b']) for path in a}
    return _as_lora(methods, factors, trees)


def deltas(method: Method, tree: Tree) -> dict[str, Delta]:
    """Return the change of each kernel by the path of its projection, in float64.

    Raises:
        ValueError: a method whose change is no product of its own parameters.
    """
    return {place: a @ b for place, (a, b) in _factors(method, tree).items()}


def split(delta: Delta, rank: int) -> Factors:
    """Return factors whose product is the nearest of that rank (Eckart and Young 1936)."""
    u, values, v = np.linalg.svd(delta, full_matrices=False)
    roots = np.sqrt(values[:rank])
    missing = rank - len(roots)
    a = np.pad(u[:, :rank] * roots.reshape(1, -1), ((0, 0), (0, missing)))
    return a, np.pad(v[:rank] * roots.reshape(-1, 1), ((0, missing), (0, 0)))


def _factors(method: Method, tree: Tree) -> dict[str, Factors]:
    """Return both factors of each change by the path of its projection, scales included."""
    _check(method)
    found = {}
    for place in _places(tree):
        layer, _, name = place.removeprefix('layer_').partition('/')
        node = widen(_at(tree, place))
        at = At(layer=int(layer), name=name, shared={}, key=None)
        found[place] = method.factors(node, len(node['a']), at)
    return found


def _check_members(
    methods: Sequence[Method], trees: Sequence[Tree], weights: Sequence[float]
) -> list[float]:
    if len(methods) != len(trees):
        raise ValueError(f'{len(methods)} methods for {len(trees)} adapters; expected one for each')
    return check_weights(trees, weights)


def _check(method: Method) -> None:
    own = isinstance(method, LowRank) and not isinstance(method, WeightDecomposed)
    if not own or method.architecture == 'vera' or method.use_gating:
        raise ValueError(
            f'{method.architecture} cannot be combined by deltas: its change of a kernel is no '
            'product of parameters of its own; expected LoRA, AdaLoRA or MTL-LoRA without gates'
        )


def _scale(method: Method, tree: Tree) -> float:
    """Return the scale of a LoRA's products."""
    if not isinstance(method, LoRA) or isinstance(method, WeightDecomposed) or method.use_gating:
        raise ValueError(
            f'the factors of {method.architecture} cannot be combined; expected LoRA without '
            'gates (combine_deltas takes more methods)'
        )
    places = [place.removeprefix('layer_').partition('/') for place in _places(tree)]
    scales = {method.scaling(int(layer), name) for layer, _, name in places}
    if len(scales) != 1:
        raise ValueError(
            f'alpha / r is not the same for all projections, but {sorted(scales)}; combine the '
            'deltas of such adapters instead of their factors'
        )
    return scales.pop()


def _places(tree: Tree) -> list[str]:
    paths = params.flatten(tree)
    return [path[:-2] for path in paths if re.fullmatch(r'layer_\d+/\w+/\w+/a', path)]


def _at(tree: Tree, path: str) -> Tree:
    for name in path.split('/'):
        tree = tree[name]
    return tree


def _only(tree: Tree, factor: str) -> Tree:
    """Return one factor of each projection; the result of their combination is kept in float64."""
    return params.unflatten(
        {f'{place}/{factor}': widen(_at(tree, place)[factor]) for place in _places(tree)}
    )


def _as_lora(
    methods: Sequence[LowRank], factors: Mapping[str, Factors], like: Sequence[Tree]
) -> tuple[LoRA, Tree]:
    """Return factors that hold all scales as a LoRA, in the type of the first leaf of `like`."""
    ranks = {place.removeprefix('layer_'): a.shape[1] for place, (a, _) in factors.items()}
    method = _described(methods, ranks)  # first: without ranks there is no leaf either
    old = jax.tree.leaves(list(like))[0]

    def convert(x: np.ndarray) -> Any:
        new = x.astype(old.dtype)
        return jnp.asarray(new) if isinstance(old, jax.Array) else new

    leaves = {}
    for place, (a, b) in factors.items():
        leaves[f'{place}/a'], leaves[f'{place}/b'] = convert(a), convert(b)
    return method, params.unflatten(leaves)


def _described(methods: Sequence[LowRank], ranks: Mapping[str, int]) -> LoRA:
    """Return the LoRA with these ranks by projection ('3/attention/query'), all scales 1.

    It sits where any of the methods does; a place that the options cannot leave out has rank 0.
    """
    if not ranks:
        raise ValueError('no adapter changes anything: every rank is 0; expected one that does')
    r = max(ranks.values())
    names = {rank.split('/')[-1] for rank in ranks}
    subs = {rank.split('/')[1] for rank in ranks}
    letters = tuple(letter for name, letter in _ATTENTION.items() if name in names)
    attention = {'attention', 'cross_attention'} & subs
    feed_forward = {'up', 'gate', 'down'} & names
    patterns = [key for m in methods for key in getattr(m, 'rank_pattern', {})]
    numbers = [int(found[0]) for key in [*ranks, *patterns] if (found := re.match(r'\d+', key))]
    left_out = set.intersection(*(set(m.leave_out) for m in methods))
    layers = [i for i in range(max(numbers) + 1) if i not in left_out]
    chosen = [f'{s}/{n}' for s in attention for n in _ATTENTION if n in names]
    chosen += [f'feed_forward/{name}' for name in feed_forward]
    everywhere = {f'{layer}/{place}': 0 for layer in layers for place in chosen} | dict(ranks)
    others = {place: rank for place, rank in sorted(everywhere.items()) if rank != r}
    return LoRA(
        r=r,
        alpha=float(r),
        attn_matrices=letters,
        selfattn_lora='attention' in subs,
        crossattn_lora='cross_attention' in subs,
        intermediate_lora='up' in names,
        gate_lora='gate' in names,
        output_lora='down' in names,
        dropout=methods[0].dropout,
        leave_out=tuple(sorted(left_out)),
        rank_pattern=others,
        alpha_pattern={place: float(rank) for place, rank in others.items() if rank},
    )
