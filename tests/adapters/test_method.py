"""What all methods share: the identity by default, the trunk, rules, and keys that differ."""

import dataclasses
import re
from typing import ClassVar

import jax
import numpy as np
import pytest
import small_bert as small
import torch_families

from adapters_jax import params
from adapters_jax.adapters import registry
from adapters_jax.adapters.binding import Adapted
from adapters_jax.adapters.method import Method
from adapters_jax.models.backbone import Backbone, shapes
from adapters_jax.params import train
from adapters_jax.sites import Dimensions


@dataclasses.dataclass(frozen=True)
class Tuning(Method):
    architecture: ClassVar[str] = 'tuning'
    pattern: str

    def rules(self, dimensions):
        return (train(self.pattern),)


@dataclasses.dataclass(frozen=True)
class Recorder(Method):
    architecture: ClassVar[str] = 'recorder'
    calls: ClassVar[list] = []

    def adapt(self, params, end, at):
        self.calls.append((at.layer, at.name, at.key))
        return super().adapt(params, end, at)

    def linear(self, params, end, at):
        self.calls.append((at.layer, at.name, at.key))
        return end.output

    def key_value(self, params, seen, at):
        self.calls.append((at.layer, f'{at.name}/key_value', at.key))
        return seen

    def words(self, params, words, at):
        self.calls.append((at.layer, 'words', at.key))
        return words

    def block(self, params, stream, at):
        self.calls.append((at.layer, 'block', at.key))
        return stream

    def embeddings(self, params, stream, at):
        self.calls.append((at.layer, 'embeddings', at.key))
        return stream

    def output(self, params, stream, at):
        self.calls.append((at.layer, 'output', at.key))
        return stream


def full_tree():
    projections = {name: {} for name in ('query', 'key', 'value', 'output')}
    layer = {'attention': projections, 'feed_forward': {'up': {}, 'down': {}}, 'block': {}}
    return {f'layer_{i}': layer for i in range(3)} | {'output': {}}


def test_the_base_method_is_the_identity_at_every_site():
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    sites = Adapted(params=full_tree(), key=None, method=registry.create('head'))
    weights = {'params': small.backbone()}
    found = Backbone(small.CONFIG).apply(weights, ids, sites=sites, **inputs)
    np.testing.assert_array_equal(found, Backbone(small.CONFIG).apply(weights, ids, **inputs))


def test_every_call_of_a_site_has_its_own_key():
    Recorder.calls.clear()
    ids, inputs = small.padded(small.texts([9, 4]), 12)
    sites = Adapted(params=full_tree(), key=jax.random.key(0), method=Recorder())
    Backbone(small.CONFIG).apply({'params': small.backbone()}, ids, sites=sites, **inputs)
    places = [(layer, name) for layer, name, _ in Recorder.calls]
    assert len(places) == len(set(places)) == 3 * (4 + 2 + 1 + 2 + 1) + 3
    keys = {jax.random.key_data(key).tobytes() for *_, key in Recorder.calls}
    assert len(keys) == len(places)


def test_an_array_with_a_projections_name_belongs_to_the_sub_layer():
    Recorder.calls.clear()
    ids, inputs = small.padded(small.texts([9]), 12)
    tree = {'layer_0': {'feed_forward': {'down': np.ones(3)}}}
    sites = Adapted(params=tree, key=None, method=Recorder())
    Backbone(small.CONFIG).apply({'params': small.backbone()}, ids, sites=sites, **inputs)
    assert (0, 'feed_forward', None) in Recorder.calls
    assert (0, 'feed_forward/down', None) not in Recorder.calls


@pytest.mark.parametrize(
    ('pattern', 'layer'),
    [
        ('backbone/.*', 0),
        ('backbone/embeddings/position/embedding', 0),
        ('backbone/layer_2/.*', 2),
        ('backbone/layer_[12]/attention/value/bias', 1),
        ('backbone/layer_1/feed_forward/up/kernel', 1),
        ('backbone/pooler/.*', 3),
        ('heads/.*', 3),
    ],
)
def test_the_trunk_ends_at_the_first_tuned_layer(pattern, layer):
    assert Tuning(pattern=pattern).first_layer({}, small.DIMENSIONS) == layer
    assert Tuning(pattern=pattern).first_layer({'layer_0': {}}, small.DIMENSIONS) == 0


@pytest.mark.parametrize('family', ['electra', 'vit', 't5', 'whisper'])
def test_no_leaf_of_a_family_is_tuned_below_the_trunks_end(family):
    config = torch_families.models(family)[1].config
    sizes = config.dimensions
    for path in params.flatten(shapes(config)):
        branch = path.partition('/')[0]
        layers = {
            'embeddings': 0,
            'decoder_embeddings': config.layers,
            'final_norm': config.layers - 1 if config.decoder else config.layers,
        }
        number = re.fullmatch(r'layer_(\d+)', branch)
        own = int(number[1]) if number else layers.get(branch, sizes.layers)
        found = Tuning(pattern=f'backbone/{re.escape(path)}').first_layer({}, sizes)
        assert found <= own, path


def test_a_leaf_that_only_the_methods_author_knows_is_below_the_trunk():
    assert Tuning(pattern='backbone/embeddings/own/kernel').first_layer({}, small.DIMENSIONS) == 0
    for preset in ('layer_norm[embedding_norm=False,leave_out=[0]]', 'top_layers[layers=2]'):
        assert registry.create(preset).first_layer({}, small.DIMENSIONS) == 1


def tuned_paths(text):
    method = registry.create(text)
    rules = (*method.rules(small.DIMENSIONS), params.freeze('.*'))
    tuned, _ = params.partition({'backbone': small.backbone()}, rules)
    return method, set(params.flatten(tuned))


def test_baselines_train_what_they_say():
    everything = {f'backbone/{path}' for path in params.flatten(small.backbone())}
    full, paths = tuned_paths('full')
    assert paths == everything and full.first_layer({}, small.DIMENSIONS) == 0
    head, paths = tuned_paths('head')
    assert paths == set() and head.first_layer({}, small.DIMENSIONS) == 3
    top, paths = tuned_paths('top_layers[layers=2]')
    starts = ('backbone/layer_1/', 'backbone/layer_2/', 'backbone/pooler/')
    assert paths == {path for path in everything if path.startswith(starts)}
    assert top.first_layer({}, small.DIMENSIONS) == 1
    assert all(method.init(jax.random.key(0), small.DIMENSIONS, {}) == {} for method in (full, top))


def test_more_top_layers_than_there_are():
    with pytest.raises(ValueError, match='layers=4, but the backbone has 3'):
        registry.create('top_layers[layers=4]').rules(small.DIMENSIONS)


def test_top_layers_do_not_match_by_prefix():
    dimensions = dataclasses.replace(small.DIMENSIONS, layers=12)
    (layers, _) = registry.create('top_layers[layers=2]').rules(dimensions)
    hits = [i for i in range(12) if layers.matches(f'backbone/layer_{i}/attention/norm/scale')]
    assert hits == [10, 11]


_BOTH = Dimensions(4, 24, 52, 3, 24, 50, 40, decoder_layers=2)


@pytest.mark.parametrize('name', ['lora', 'dora', 'vera', 'adalora', 'mtl_lora'])
def test_a_low_rank_method_without_a_place_is_refused(name):
    method = registry.create(f'{name}[selfattn_lora=False,leave_out=[2,3]]')
    with pytest.raises(ValueError, match=r'leave_out=\[2, 3\] keeps no layer that has cross-att'):
        method.init(jax.random.key(0), _BOTH, {})


def test_ranks_of_0_everywhere_are_refused():
    method = registry.create('lora[rank_pattern={query: 0, value: 0}]')
    with pytest.raises(ValueError, match='gives every adapted projection the rank 0'):
        method.init(jax.random.key(0), _BOTH, {})
