"""The smallest model that has everything: what the tests of the core are run on.

Its weights are far from a fresh initialisation, so that attention is peaked, LayerNorms are not
the identity and no comparison succeeds because all numbers are near zero.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from adapters_jax.adapters.method import Change, Method
from adapters_jax.model import Model
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.bert import BertStem
from adapters_jax.models.block import BlockConfig
from adapters_jax.models.heads import HeadConfig
from adapters_jax.params import Tree, map_with_path, train
from experiments.toy import random_backbone, random_leaf

CONFIG = BackboneConfig(
    family='bert',
    layers=2,
    vocabulary=40,
    positions=32,
    pad_id=0,
    block=BlockConfig(hidden=16, feed_forward=24, heads=4),
    stem=BertStem(),
    pooler=True,
)


@dataclasses.dataclass(frozen=True)
class Shift(Method):
    """Adds a trained vector to the output of the feed-forward network, from a layer upwards."""

    architecture: ClassVar[str] = 'shift'

    lowest: int = 0
    tune_norms: bool = False

    def init(self, key, dimensions, backbone):
        layers = range(self.lowest, dimensions.layers)
        keys = jax.random.split(key, dimensions.layers)
        return {
            f'layer_{i}': {'feed_forward': {'shift': jax.random.normal(keys[i], (16,))}}
            for i in layers
        }

    def rules(self, dimensions):
        return (train(r'backbone/layer_\d/feed_forward/norm/.*'),) if self.tune_norms else ()

    def adapt(self, params, end, at):
        shift = params['shift'].reshape(1, 1, -1).astype(end.output.dtype)
        return Change(end.output + shift, shift)


def backbone(config: BackboneConfig = CONFIG, seed: int = 0) -> Tree:
    """Return random parameters of a backbone."""
    return random_backbone(config, seed)


def model(method: Method | None = None, head: HeadConfig | None = None, **options: Any) -> Model:
    """Return the tiny model with three outputs."""
    options = {'config': CONFIG, 'outputs': 3} | options
    return Model(method=method or Shift(), head_config=head or HeadConfig(), **options)


def params(of: Model, seed: int = 0) -> Tree:
    """Return the model's parameters, with a head as large as the rest."""
    tree = of.init(jax.random.key(seed), backbone(of.config, seed))
    rng = np.random.default_rng(seed + 1)
    return tree | {'heads': map_with_path(lambda p, x: random_leaf(rng, p, x.shape), tree['heads'])}


def batch(rows: Sequence[Sequence[int]], width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a batch of random texts: for each row the lengths of the texts packed into it."""
    rng = np.random.default_rng(seed)
    places = max(len(row) for row in rows)
    names = ('input_ids', 'token_type_ids', 'positions', 'segments')
    columns = {name: np.zeros((len(rows), width), np.int32) for name in names}
    per_row = (len(rows), places)
    starts, example_id = np.zeros(per_row, np.int32), np.full(per_row, -1, np.int32)
    number = 0
    for b, row in enumerate(rows):
        start = 0
        for s, length in enumerate(row):
            span = slice(start, start + length)
            columns['input_ids'][b, span] = rng.integers(1, CONFIG.vocabulary, length)
            columns['token_type_ids'][b, span] = np.arange(length) >= length // 2
            columns['positions'][b, span] = np.arange(length)
            columns['segments'][b, span] = s + 1
            starts[b, s], example_id[b, s] = start, number
            start, number = start + length, number + 1
    labels = np.where(example_id >= 0, rng.integers(0, 3, per_row), 0).astype(np.int32)
    return columns | {
        'starts': starts,
        'example_mask': example_id >= 0,
        'example_id': example_id,
        'label': labels,
    }


def alone(packed: dict[str, np.ndarray], row: int, place: int, width: int) -> dict[str, np.ndarray]:
    """Return one text of a packed batch as a batch of its own, padded to `width`."""
    member = packed['segments'][row] == place + 1
    names = ('input_ids', 'token_type_ids', 'positions', 'segments')
    columns = {name: np.zeros((1, width), np.int32) for name in names}
    for name in names:
        columns[name][0, : member.sum()] = packed[name][row, member]
    columns['segments'] = np.minimum(columns['segments'], 1)
    single = {
        name: packed[name][row : row + 1, place : place + 1]
        for name in ('example_mask', 'example_id', 'label')
    }
    return columns | single | {'starts': np.zeros((1, 1), np.int32)}
