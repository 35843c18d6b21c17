"""Compositions as one would compute them by hand: one row, one token, one adapter after another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Sites

CONFIG = tiny.CONFIG
LENGTHS, TOKENS = (9, 6, 4), 9


def trained(method, seed=0):
    """Return parameters of a method, every leaf away from its initialisation."""
    tree = method.init(jax.random.key(seed), CONFIG.dimensions, tiny.backbone())
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), tree)


def texts():
    """Return `input_ids` and `mask` [B, T], padded."""
    rng = np.random.default_rng(5)
    mask = np.arange(TOKENS) < np.array(LENGTHS)[:, None]
    return rng.integers(1, CONFIG.vocabulary, mask.shape) * mask, mask


def hidden(sites, ids, mask=None):
    """Return the last hidden states."""
    mask = None if mask is None else mask[:, None, None]
    return Backbone(CONFIG).apply({'params': tiny.backbone()}, ids, mask=mask, sites=sites)


def composed(method, tree):
    """Return the last hidden states of all rows in one batch."""
    run = jax.jit(lambda tree: hidden(bind(method, tree, None), *texts()))
    return np.asarray(run(tree))


def row_alone(method, tree, row, copy=0):
    """Return the last hidden states of one row, without its padding, through its own adapters."""
    ids, _ = texts()
    node = chosen(method.tree, row, len(ids), copy)
    one = ids[row : row + 1, : LENGTHS[row]]
    # Not compiled as a whole: the operations recur from row to row and from test to test.
    return np.asarray(hidden(Plain(method, tree, node), one))[0]


def chosen(node, row, rows, copy, start=0):
    """Return what is left of a tree for one row: nothing divides the batch any more.

    `start` is the token at which the part of the sequence begins that the node acts on.
    """
    if isinstance(node, str):
        return node
    if isinstance(node, Parallel):
        return chosen(node.children[copy], row, rows, copy, start)
    if isinstance(node, BatchSplit):
        ends = np.cumsum(node.batch_sizes)
        child = int(np.argmax(row < ends))
        size = node.batch_sizes[child]
        return chosen(node.children[child], row - (ends[child] - size), size, copy, start)
    lengths = node.splits if isinstance(node, Split) else (0,) * len(node.children)
    starts = start + np.cumsum((0, *lengths[:-1]))
    children = tuple(
        chosen(child, row, rows, copy, int(begin))
        for child, begin in zip(node.children, starts, strict=True)
    )
    return Kept(type(node), children, node, start)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A block over what is left of its children."""

    kind: type
    children: tuple
    node: object
    start: int


class Plain(Sites):
    """The sites of one row."""

    def __init__(self, method, tree, node):
        self.method, self.tree, self.node, self.bound = method, tree, node, {}

    def leaf(self, name, path):
        if path not in self.bound:
            self.bound[path] = bind(self.method.members[name], self.tree[name], None, path)
        return self.bound[path]

    def fold(self, call, value, mean, node=None, path=''):
        """Return what `call(leaf, value)` makes of a value: in order, or joined by `mean`."""
        node = self.node if node is None else node
        if isinstance(node, str):
            return call(self.leaf(node, path), value)
        found = []
        for i, child in enumerate(node.children):
            result = self.fold(call, value, mean, child, f'{path}/{i}')
            if node.kind is Stack:
                value = result
            found.append(result)
        return value if node.kind is Stack else mean(node, found, value)

    def words(self, words):
        return self.fold(lambda leaf, x: leaf.words(x), words, untouched)

    def stream(self, call, stream):
        before = stream.carry

        def mean(node, found, value):
            fresh = [(k, x) for one in found for k, x in one.carry.items()]
            carry = before | {k: x for k, x in fresh if x is not before.get(k)}
            return found[0].replace(hidden=weigh(node, [x.hidden for x in found]), carry=carry)

        return self.fold(call, stream, mean)

    def embeddings(self, stream):
        return self.stream(lambda leaf, x: leaf.embeddings(x), stream)

    def block(self, layer, stream):
        return self.stream(lambda leaf, x: leaf.block(layer, x), stream)

    def output(self, stream):
        return self.stream(lambda leaf, x: leaf.output(x), stream)

    def key_value(self, layer, sub_layer, seen):
        return self.fold(lambda leaf, x: leaf.key_value(layer, sub_layer, x), seen, untouched)

    def linear(self, layer, sub_layer, name, end):
        def call(leaf, output):
            return leaf.linear(layer, sub_layer, name, end.replace(output=output))

        return self.fold(call, end.output, weigh)

    def sub_layer(self, layer, name, end):
        def call(leaf, given):
            change = leaf.adapt(layer, name, end.replace(output=given[0]))
            return change.output, change.up

        def join(node, found, given):
            outputs, ups = zip(*found, strict=True)
            if node.kind is not Fuse:
                return weigh(node, outputs), None
            own = self.tree['fusion'][node.node.fusion][f'layer_{layer}'].get(name)
            if own is None:
                return found[0]
            last = node.node.children[-1]
            while not isinstance(last, str):
                last = last.children[-1]
            return fuse(
                own, self.method.members[last].read(end.replace(output=given[0])), ups
            ), None

        output, _ = self.fold(call, (end.output, None), join)
        acting = [x for x in self.bound.values() if x.ends(layer, name)]
        return acting[-1].close(layer, name, end, output) if acting else end.finish(output)


def untouched(node, found, value):
    """Return what the adapters in a mean, a split or a fusion leave as it is."""
    return found[0]


def weigh(node, found, value=None):
    """Return a mean, or each token of the one whose part it is in."""
    if node.kind is Fuse:  # where fused adapters do not act
        return found[0]
    if node.kind is Average:
        return sum(w * x for w, x in zip(node.node.weights, found, strict=True))
    assert node.kind is Split
    owners = np.repeat(np.arange(len(found)), node.node.splits)
    owners = np.pad(owners, (node.start, len(found[0][0])), mode='edge')  # the rest is not read
    return jnp.stack([found[owners[t]][:, t] for t in range(found[0].shape[1])], axis=1)


def fuse(params, read, ups):
    """Return the mixture of AdapterFusion with the options of 'dynamic'."""
    (query, residual), ups = read, jnp.stack(ups, axis=2)

    def dense(name, x):
        y = jnp.einsum('...i,io->...o', x, params[name]['kernel'])
        return y + params[name]['bias'].reshape((1,) * (y.ndim - 1) + (-1,))

    scores = jnp.sum(dense('query', query)[:, :, None] * dense('key', ups), axis=-1)
    shares = jnp.exp(scores) / jnp.exp(scores).sum(-1, keepdims=True)
    return residual + jnp.sum(shares[..., None] * (ups @ params['value']['kernel']), axis=2)
