"""AdapterDrop: leave the adapter out of the lowest layers (Rücklé et al. 2021, section 3).

A layer without parameters is not adapted, so to drop a layer is to take its branch out of the tree;
the trunk then reaches up to the first layer that is left, and the program is shorter. An adapter
that is trained for a fixed number of dropped layers (the paper's specialised AdapterDrop) is one
whose method leaves them out; one that is trained with a number drawn in each step (robust
AdapterDrop) can be used with any.

Houlsby et al. (2019, section 3.6) take trained adapters out of any run of neighbouring layers, to
see what they did there.
"""

import re

import numpy as np

from adapters_jax.adapters.method import Method
from adapters_jax.params import Tree, flatten

# Separates this use of the run's seed from every other.
PURPOSE = int.from_bytes(b'drop', 'big')
_BELOW = ('words', 'embeddings')
# Of all layers; and a bank's leaves of the backbone itself, which are not added and stay.
_WHOLE = ('shared', 'constants', 'backbone')

Dropped = int | range  # so many of the lowest layers, or the layers themselves


def layers_of(dropped: Dropped) -> range:
    """Return the layers that are meant."""
    return dropped if isinstance(dropped, range) else range(dropped)


def parse(text: str) -> Dropped:
    """Read `N`, so many of the lowest layers, or `A-B`, layers A to B, the lowest being 0.

    Raises:
        ValueError: neither of the two.
    """
    found = re.fullmatch(r'(\d+)(?:-(\d+))?', text.strip())
    first, last = (found[1], found[2]) if found else ('', None)
    if not found or (last and int(last) < int(first)):
        raise ValueError(
            f'--drop_layers={text}: expected a number N, for the N lowest layers, or A-B, for '
            'layers A to B (the lowest is 0)'
        )
    return range(int(first), int(last) + 1) if last else int(first)


def describe(dropped: Dropped) -> int | str:
    """Return what `parse` reads, as short as it can be said."""
    layers = layers_of(dropped)
    if not layers or not layers.start:
        return len(layers)
    return f'{layers.start}-{layers.stop - 1}'


def drop_layers(tree: Tree, dropped: Dropped) -> Tree:
    """Return an adapter's tree without its layers among `dropped`, wherever members nest them.

    What acts on the embeddings stands below layer 0 and goes with it; what is shared by all layers
    stays.
    """
    layers = layers_of(dropped)
    if not layers:
        return tree
    kept = {}
    for name, branch in tree.items():
        layer = re.fullmatch(r'layer_(\d+)', name)
        if (layer and int(layer[1]) in layers) or (name in _BELOW and 0 in layers):
            continue
        nested = isinstance(branch, dict) and not layer and name not in _WHOLE
        kept[name] = drop_layers(branch, layers) if nested else branch
    return kept


def check_droppable(method: Method, tree: Tree, setting: str) -> None:
    """Refuse a method from which no layer can be dropped; `tree` are its parameters.

    `setting` is what asked for it, written as it would be without dropping.

    Raises:
        ValueError: it has no parameters in layers, or it inserts vectors into the text, which are
            there in every layer or in none.
    """
    method.require(
        any(re.search(r'(^|/)layer_\d+/', path) for path in flatten(tree)),
        'it has no parameters of its own in the layers, so there is nothing to drop; set '
        f'{setting}',
    )
    method.require(
        not method.inserted.count,
        'the vectors that it inserts into the text belong to all layers, so none can be dropped; '
        f'set {setting}',
    )


def draw(seed: int, step: int, layers: int) -> int:
    """Return how many layers robust training drops in a step: uniform on 0 to `layers` - 1.

    The paper's range for twelve layers is 0 to 11, both included (section 3.1).
    """
    return int(np.random.default_rng([PURPOSE, seed, step]).integers(layers))
