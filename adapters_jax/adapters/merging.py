"""Merges an adapter into the backbone: plain weights that compute what both compute together.

A merged model costs nothing at inference and runs anywhere. The backbone's own tree stays as it
is, so unmerging is going back to it: nothing is ever subtracted, and no bit is lost.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from adapters_jax import params
from adapters_jax.adapters.method import At, Method
from adapters_jax.adapters.union import Union
from adapters_jax.params import Tree
from adapters_jax.sites import PROJECTIONS


def merge(method: Method, adapter: Tree, backbone: Tree) -> Tree:
    """Return a backbone without adapter that computes what `backbone` does with `adapter`.

    The members of a union are merged one after another. A method whose adapter has no parameters of
    its own (BitFit, LayerNorm tuning) has nothing to merge: what it trains is in `backbone`.
    Sums and products are computed in float64 and rounded to the type of the leaf once.

    Raises:
        ValueError: a method, or a member, that no plain weights can replace, or an adapter of
            another backbone.
    """
    leaves = params.flatten(backbone)
    for member, tree in _members(method, adapter):
        leaves |= _merged(member, tree, leaves)
    return params.unflatten(leaves)


def _members(method: Method, adapter: Tree) -> list[tuple[Method, Tree]]:
    if isinstance(method, Union):
        return [(member, adapter.get(name, {})) for name, member in method.named().items()]
    return [(method, adapter)]


def _merged(method: Method, adapter: Tree, leaves: Mapping) -> dict[str, jax.Array]:
    """Return the leaves of the backbone that the method changes, as it changes them."""
    changed = {}
    for layer, sub_layer, name in _places(method, adapter):
        path = f'layer_{layer}/{sub_layer}/{name}'
        kernel, bias = leaves.get(f'{path}/kernel'), leaves.get(f'{path}/bias')
        if kernel is None:
            raise ValueError(
                f'{method.architecture} has parameters at {path}, which the backbone lacks; '
                'expected an adapter made for this backbone'
            )
        at = At(
            layer=layer,
            name=f'{sub_layer}/{name}',
            shared=adapter.get('shared', {}),
            key=None,
            constants=adapter.get('constants', {}),
        )
        place = adapter[f'layer_{layer}'][sub_layer][name]
        kernel_and_bias = method.merge_linear(place, kernel, bias, at)
        for leaf, old, new in zip(('kernel', 'bias'), (kernel, bias), kernel_and_bias, strict=True):
            if old is not None:
                changed[f'{path}/{leaf}'] = jnp.asarray(new.astype(old.dtype))
    return changed


def _places(method: Method, adapter: Tree) -> list[tuple[int, str, str]]:
    """Return where the adapter has parameters; all of them must be at projections."""
    found = []
    for path in params.flatten(adapter):
        if path.startswith(('shared/', 'constants/')):
            continue
        place = re.fullmatch(r'layer_(\d+)/(\w+)/(\w+)/.+', path)
        known = place is not None and place[3] in PROJECTIONS.get(place[2], ())
        if not known or type(method).merge_linear is Method.merge_linear:
            raise ValueError(
                f'{method.architecture} cannot be merged into the backbone: what it does with '
                f'{path} is no change of the weights of a projection; keep the adapter beside the '
                'backbone'
            )
        found.append((int(place[1]), place[2], place[3]))
    return list(dict.fromkeys(found))
