"""Which compositions compute in `adapters` what they compute here.

Where the library takes the first adapter of a block for all of them, applies a LayerNorm once for
each block around an adapter, or forgets what a neighbour did, a composition that was trained there
has other outputs here, and ours has others there. What agrees was found by trying
(`tests/interop/test_composed_agreement.py`); the rest is refused, as silence would be worse.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.composed import blocks_of
from adapters_jax.adapters.composition import Composition
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.invertible import Invertible
from adapters_jax.adapters.lora import DoRA
from adapters_jax.adapters.low_rank import LowRank
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.prefix import PrefixTuning
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.reft import ReFT
from adapters_jax.adapters.union import Union
from adapters_jax.params import Tree, flatten

_LOG = logging.getLogger(__name__)
# Of the path of a leaf. A bottleneck has projections of its own, `up` and `down`.
_PLACE = re.compile(
    r'(?P<place>(?P<sub_layer>layer_\d+/\w+)(/(query|key|value|output|up|down)(?=/))?)'
)
_OF_THE_FIRST = (Invertible, PromptTuning, ReFT)  # of a block the first adapter's alone acts
# How a bottleneck is placed, which the library asks one of a block's adapters for.
_PLACING = (
    'is_parallel',
    'original_ln_before',
    'original_ln_after',
    'residual_before_ln',
    'adapter_residual_before_ln',
)


class _Leaf(NamedTuple):
    """An adapter: what it consists of, and where in the layers it has parameters."""

    parts: tuple[Method, ...]
    places: frozenset[Any]


_Leaves = list[_Leaf]  # in the order in which they are written
_Problem = Callable[[Composition, list[_Leaves], str], str | None]


def check(tree: Composition, members: Mapping[str, Method], params: Mapping[str, Tree]) -> None:
    """Refuse a composition that has other outputs in the library.

    `params` are those of each adapter, which tell where it acts.

    Raises:
        ValueError: the block, and what is in the way.
    """
    adapters = {name: _leaf(members[name], params[name]) for name in tree.names}
    if len(tree.names) > 1:
        _check(tree, adapters, around='')
    if any(block.kind == 'average' for block in blocks_of(tree)):
        _LOG.warning(
            '`adapters` divides the average in %s by the number of adapters once more: outputs '
            'there and here differ',
            tree,
        )


def _leaf(method: Method, params: Tree) -> _Leaf:
    union = isinstance(method, Union)
    parts = method.named() if union else {'': method}
    own = ((part, params.get(name, {}) if union else params) for name, part in parts.items())
    places = (place for part, tree in own for place in _places(part, tree))
    return _Leaf(tuple(parts.values()), frozenset(places))


def _places(part: Method, params: Tree) -> Iterator[Any]:
    """Yield the sub-layers and the projections at which a method acts."""
    if isinstance(part, PrefixTuning):  # whose parameters may be common to all layers
        yield 'prefix', part.leave_out, part.encoder_prefix, part.cross_prefix
        return
    for found in filter(None, map(_PLACE.match, flatten(params))):
        yield found['sub_layer']
        yield found['place']


def _check(node: Composition | str, adapters: Mapping[str, _Leaf], around: str) -> None:
    if isinstance(node, str):
        return
    own = [_leaves(child, adapters) for child in node.children]
    for problem in _PROBLEMS:
        if said := problem(node, own, around):
            raise ValueError(
                f'{node} is not exchanged with `adapters`, which computes something else: {said}; '
                'keep it in the format of this project'
            )
    for child in node.children:
        _check(child, adapters, node.kind)


def _leaves(node: Composition | str, adapters: Mapping[str, _Leaf]) -> _Leaves:
    if isinstance(node, str):
        return [adapters[node]]
    return [leaf for child in node.children for leaf in _leaves(child, adapters)]


def _parts(children: list[_Leaves]) -> list[Method]:
    return [part for leaves in children for leaf in leaves for part in leaf.parts]


def _holding(children: list[_Leaves], *kinds: type[Method]) -> list[int]:
    """Return which children have a part of one of the kinds."""
    return [i for i, own in enumerate(children) if any(isinstance(x, kinds) for x in _parts([own]))]


def _gates(node: Composition, children: list[_Leaves], around: str) -> str | None:
    if any(getattr(part, 'use_gating', False) for part in _parts(children)):
        return 'gates act otherwise in a composition than alone'
    return None


def _first(node: Composition, children: list[_Leaves], around: str) -> str | None:
    for kind in _OF_THE_FIRST:
        places = _holding(children, kind)
        if places and (node.kind != 'stack' or around or places != [0]):
            return f'of {kind.architecture} it takes that of the first adapter alone'
    return None


def _stacked(node: Composition, children: list[_Leaves], around: str) -> str | None:
    """What acts on what a parallel bottleneck or a change of a projection returned."""
    if node.kind != 'stack' or len(children) == 1:
        return None
    bottlenecks = _holding(children, Bottleneck)
    if len(bottlenecks) > 1 and any(getattr(x, 'is_parallel', False) for x in _parts(children)):
        return 'of a stack with a parallel bottleneck the last one alone acts'
    changed = [part for part in _parts(children) if isinstance(part, LowRank | IA3)]
    several = len(_holding(children, LowRank, IA3)) > 1
    if several and not all(isinstance(part, IA3) for part in changed):
        return "the second adapter of a projection acts on the first one's change, not on the input"
    if around and len(_holding(children, PrefixTuning)) > 1:
        return 'prefixes of a stack are not joined inside of another block'
    return None


def _mixed(node: Composition, children: list[_Leaves], around: str) -> str | None:
    """What a block other than a stack takes of one adapter for all, or does again inside."""
    if node.kind == 'stack':
        return None
    places = [frozenset().union(*(leaf.places for leaf in own)) for own in children]
    kinds = [_holding(children, kind) for kind in (Bottleneck, LowRank, IA3, PrefixTuning)]
    if (node.kind != 'fuse' and len(set(places)) > 1) or any(
        0 < len(holding) < len(children) for holding in kinds
    ):
        return 'where one of them does nothing, it takes the others alone'
    lengths = {part.prefix_length for part in _parts(children) if isinstance(part, PrefixTuning)}
    if len(lengths) > 1:
        return 'prefixes of different lengths are padded'
    bottlenecks = [part for part in _parts(children) if isinstance(part, Bottleneck)]
    if len({tuple(getattr(part, name) for name in _PLACING) for part in bottlenecks}) > 1:
        return 'LayerNorm and residual are those of one adapter for all'
    if node.kind == 'fuse' and any(part.is_parallel for part in bottlenecks):
        return 'parallel bottlenecks are fused with the input of the sub-layer as query'
    nested = any(isinstance(child, Composition) for child in node.children)
    if nested and any(part.original_ln_before for part in bottlenecks):
        return 'a LayerNorm before the adapters (original_ln_before) is applied once for each block'
    if _holding(children, DoRA):
        return 'weight decomposition is not computed row by row'
    return None


_PROBLEMS: tuple[_Problem, ...] = (_gates, _first, _stacked, _mixed)
