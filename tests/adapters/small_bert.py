"""A small random BERT of our own for tests of adapters: no torch, no files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax.adapters.binding import Adapted
from adapters_jax.models.backbone import Backbone, BackboneConfig
from adapters_jax.models.bert import BertStem
from adapters_jax.models.block import BlockConfig
from adapters_jax.params import flatten, map_with_path

CONFIG = BackboneConfig(
    family='bert',
    layers=3,
    vocabulary=50,
    positions=40,
    pad_id=0,
    block=BlockConfig(hidden=24, feed_forward=52, heads=3),
    stem=BertStem(),
    pooler=True,
)
DIMENSIONS = CONFIG.dimensions
# Its lower layers: parameters of the ones above are not read.
SHALLOW = {count: Backbone(dataclasses.replace(CONFIG, layers=count)) for count in (1, 2)}


@functools.cache
def backbone(seed=0):
    """Return a backbone whose leaves are all random; LayerNorm scales lie around 1."""
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(
        lambda: Backbone(CONFIG).init(jax.random.key(0), ids, method='initialise')['params']
    )
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
        return jnp.asarray(noise + path.endswith('scale'))

    # Kept for all tests, also where the first one asks inside of a function that is traced.
    with jax.ensure_compile_time_eval():
        return map_with_path(draw, shapes)


def perturb(tree, seed, sigma):
    """Add noise to every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(sigma * rng.standard_normal(x.shape), x.dtype), tree
    )


def fresh(method, seed=0, sigma=0.0, layers=CONFIG.layers):
    """Return parameters of the method, as initialised or with noise on every leaf."""
    dimensions = dataclasses.replace(DIMENSIONS, layers=layers)
    tree = method.init(jax.random.key(seed), dimensions, {})
    return perturb(tree, seed, sigma) if sigma else tree


def forward(method, tree, weights, ids, *, key=None, model=None, **inputs):
    """Return the last hidden states with the adapter bound; `key` is for the adapter's dropout."""
    sites = Adapted(params=tree, key=key, method=method)
    return (model or Backbone(CONFIG)).apply({'params': weights}, ids, sites=sites, **inputs)


# Compiling is nearly all of the time that these tests take.
_QUICKLY = {'xla_backend_optimization_level': 0}


def run(method, tree, weights, ids, *, model=None, **inputs):
    """Return what `forward` does, compiled; not for use inside of a transformation."""
    return _run(method, model or Backbone(CONFIG), tree, weights, ids, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=_QUICKLY)
def _run(method, model, tree, weights, ids, inputs):
    return forward(method, tree, weights, ids, model=model, **inputs)


def gradient(loss, tree):
    """Return the gradient of `loss` at `tree` by path."""
    return flatten(jax.jit(jax.grad(loss), compiler_options=_QUICKLY)(tree))


def texts(lengths, seed=0):
    """Return a list of random texts (arrays of token ids) of the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CONFIG.vocabulary, n) for n in lengths]


def padded(items, length):
    """Return `(ids, inputs)`: one text a row, padded to `length`."""
    ids = np.zeros((len(items), length), np.int32)
    for row, text in zip(ids, items, strict=True):
        row[: len(text)] = text
    return ids, {'mask': (ids != 0)[:, None, None, :]}


def packed(items, length):
    """Return `(ids, inputs)`: all texts in one row, each seeing itself only, then padding."""
    ids, segments, positions = (np.zeros((1, length), np.int32) for _ in range(3))
    start = 0
    for i, text in enumerate(items, 1):
        end = start + len(text)
        ids[0, start:end], segments[0, start:end] = text, i
        positions[0, start:end] = np.arange(len(text))
        start = end
    mask = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
    return ids, {'mask': mask[:, None], 'positions': positions}


def hidden_by_layout(method, tree, weights, items, length=32):
    """Return each text's hidden states after two layers, three times: alone, padded, packed."""
    states = functools.partial(run, method, tree, weights, model=SHALLOW[2])
    alone = [states(text[None]) for text in items]
    ids, inputs = padded(items, length)
    rows = states(ids, **inputs)
    ids, inputs = packed(items, length)
    row = states(ids, **inputs)
    ends = np.cumsum([len(text) for text in items])
    return [
        (one[0], rows[i, : len(text)], row[0, ends[i] - len(text) : ends[i]])
        for i, (one, text) in enumerate(zip(alone, items, strict=True))
    ]
