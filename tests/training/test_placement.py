"""Meshes: the same numbers on each, and every leaf where the rules say."""

import json
import re

import jax
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec as P

from adapters_jax.evaluate import evaluate
from adapters_jax.interop.adapter_folder import load
from adapters_jax.params import flatten
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import experiment, grid, loop
from adapters_jax.training.placement import Placement
from adapters_jax.training.population_run import PopulationRun

MESHES = {
    'data': (8, 1, 1),
    'fsdp': (1, 8, 1),
    'tensor': (1, 1, 2),
    'mixed': (2, 2, 2),
}
# One, two, four and eight devices.
ALL_MESHES = [
    *((n, 1, 1) for n in (2, 4, 8)),
    *((1, n, 1) for n in (2, 4, 8)),
    *((1, 1, n) for n in (2, 4, 8)),
    *((2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 4, 2), (4, 1, 2)),
]
PFEIFFER = 'pfeiffer[reduction_factor=2]'

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toys')
    toy.write_backbone(folder / 'bert', layers=2)
    toy.write_backbone(folder / 'shallow')
    toy.write_texts(folder / 'texts.csv', 240)
    return folder


def config(toys, mesh=(1, 1, 1), method=PFEIFFER, **changes):
    settings = {'method': method, 'training__steps': 10} | changes
    backbone = settings.pop('backbone', 'bert')
    given = toy.config(str(toys / backbone), str(toys / 'texts.csv'), **settings)
    given.mesh.data, given.mesh.fsdp, given.mesh.tensor = mesh
    return given


def built(toys, folder, *args, **changes):
    given = config(toys, *args, **changes)
    return loop.Trainer(experiment.build(given), folder)


def specs(tree):
    return {path: leaf.sharding.spec for path, leaf in flatten(tree).items()}


@pytest.fixture(scope='module')
def alone(toys, tmp_path_factory):
    """The losses and the test metrics on one device, by method."""
    found = {}

    def get(method, steps=10):
        if (method, steps) not in found:
            folder = tmp_path_factory.mktemp('alone')
            found[method, steps] = run(toys, folder, (1, 1, 1), method, steps)
        return found[method, steps]

    return get


def run(toys, folder, mesh, method, steps=10):
    train(config(toys, mesh, method, training__steps=steps, training__dropout=True), folder)
    losses = [loss for _, loss in toy.losses(folder)]
    assert len(losses) == steps
    return losses, evaluate(folder)['metrics']


@pytest.mark.slow  # one that goes on over another mesh is a fast test, below
@pytest.mark.parametrize('mesh', MESHES)
def test_losses_and_metrics_are_those_of_one_device(toys, tmp_path, alone, mesh):
    losses, metrics = run(toys, tmp_path, MESHES[mesh], PFEIFFER)
    expected, exact = alone(PFEIFFER)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert metrics == exact


@pytest.mark.slow
@pytest.mark.parametrize('method', [PFEIFFER, 'lora', 'bitfit', 'full'])
@pytest.mark.parametrize('mesh', ALL_MESHES, ids=str)
def test_every_mesh_and_four_methods(toys, tmp_path, alone, mesh, method):
    losses, metrics = run(toys, tmp_path, mesh, method, 50)
    expected, exact = alone(method, 50)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert metrics == exact


def test_leaves_lie_as_the_rules_say(toys, tmp_path):
    trainer = built(toys, tmp_path, (2, 2, 2))
    frozen = specs(trainer.frozen)
    assert frozen['backbone/layer_1/attention/query/kernel'] == P('fsdp', 'tensor')
    assert frozen['backbone/layer_1/feed_forward/down/kernel'] == P('tensor', 'fsdp')
    assert frozen['backbone/embeddings/word/embedding'] == P(None, ('fsdp', 'tensor'))
    assert frozen['backbone/layer_0/attention/norm/scale'] == P()
    word = flatten(trainer.frozen)['backbone/embeddings/word/embedding']
    assert {s.data.shape for s in word.addressable_shards} == {(word.shape[0], 32 // 4)}
    assert set(specs(trainer.trainable).values()) == {P()}


def test_frozen_weights_may_be_whole_and_adapters_in_parts(toys, tmp_path):
    given = {'mesh__frozen': 'replicated', 'mesh__rules': ('adapters/.*/down/kernel=fsdp,-',)}
    trainer = built(toys, tmp_path, (2, 2, 2), **given)
    assert set(specs(trainer.frozen).values()) == {P()}
    trainable = specs(trainer.trainable)
    cut = {path for path, spec in trainable.items() if spec == P('fsdp', None)}
    assert cut == {path for path in trainable if re.fullmatch('adapters/.*/down/kernel', path)}
    assert cut
    # The moments lie with their leaves, and there are none of frozen leaves.
    shapes = {path: leaf.shape for path, leaf in flatten(trainer.trainable).items()}
    moments = jax.tree_util.tree_leaves_with_path(trainer.opt_state)
    seen = 0
    for path, leaf in moments:
        named = jax.tree_util.keystr(path, simple=True, separator='/')
        own = [name for name in shapes if named.endswith('/' + name)]
        assert len(own) == 1 or leaf.ndim == 0, named
        if own:
            seen += 1
            assert leaf.shape == shapes[own[0]] and leaf.sharding.spec == trainable[own[0]]
    assert seen == 2 * len(shapes)


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'mesh__tensor': 16}, r'mesh\.tensor is 16 but 8 devices are present'),
        (
            {'mesh__data': -1, 'mesh__fsdp': 3},
            r'mesh\.fsdp x mesh\.tensor is 3, which does not divide the 8 devices',
        ),
        ({'mesh__frozen': 'half'}, "mesh.frozen is 'half'; expected one of sharded, replicated"),
        ({'mesh__rules': ('.*=rows',)}, "mesh.rules has '.*=rows'; expected 'REGEX=axis,axis'"),
        ({'mesh__rules': ('.*=fsdp,fsdp',)}, r"'\.\*=fsdp,fsdp'; expected .* once at most"),
        ({'mesh__rules': ('.*=fsdp+-',)}, r"mesh.rules has '\.\*=fsdp\+-'; expected"),
        ({'mesh__rules': ('(=fsdp',)}, 'whose REGEX is none'),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(toys, changes, sentence):
    given = toy.config(str(toys / 'bert'), str(toys / 'texts.csv'), **changes)
    with pytest.raises(ValueError, match=sentence):
        Placement.of(given)


def test_what_does_not_divide_is_named(toys, tmp_path):
    rule = ('heads/.*/kernel=-,tensor',)
    with pytest.raises(ValueError, match=r'heads/.* does not\s+divide over mesh.tensor=2.*rules='):
        built(toys, tmp_path, (2, 2, 2), mesh__rules=rule)


def test_a_run_goes_on_over_another_mesh(toys, tmp_path):
    changes = {'backbone': 'shallow', 'training__dropout': True, 'training__checkpoint_every': 4}
    train(config(toys, **changes), tmp_path / 'alone')
    (tmp_path / 'moved').mkdir()
    trainer = loop.Trainer(experiment.build(config(toys, (1, 4, 2), **changes)), tmp_path / 'moved')
    take = trainer.take_step

    def stopping():
        if trainer.step == 4:
            trainer._stop.make()
        return take()

    trainer.take_step = stopping
    with pytest.raises(SystemExit):
        trainer.run()
    train(config(toys, (4, 1, 2), **changes), tmp_path / 'moved')
    moved, alone = (toy.losses(tmp_path / name) for name in ('moved', 'alone'))
    assert [step for step, _ in moved] == list(range(1, 11))
    np.testing.assert_allclose([x for _, x in moved], [x for _, x in alone], rtol=1e-5)


GRID = ('optimizer.learning_rate=1e-3,1e-2', 'seed=0,1')


def swept(toys, folder, mesh, **changes):
    """Return losses, metrics and adapter of each of four members trained on a mesh."""
    settings = {'training__steps': 6, 'sweep__grid': GRID, 'backbone': 'shallow'} | changes
    sweep(config(toys, mesh, **settings), folder)
    members = sorted((folder / 'members').iterdir())
    assert len(members) == 4
    return {
        m.name: (
            [x for _, x in toy.losses(m)],
            json.loads((m / 'summary.json').read_text())['metrics'],
            flatten(load(m / 'adapter').adapter_params),
        )
        for m in members
    }


def same_members(found, expected):
    for name, (losses, metrics, leaves) in expected.items():
        np.testing.assert_allclose(found[name][0], losses, rtol=1e-5)
        assert found[name][1] == metrics
        for path, leaf in leaves.items():
            np.testing.assert_allclose(found[name][2][path], leaf, atol=1e-5, err_msg=path)


@pytest.fixture(scope='module')
def members(toys, tmp_path_factory):
    return swept(toys, tmp_path_factory.mktemp('members'), (1, 1, 1))


ONE = {'data': 1, 'fsdp': 1, 'tensor': 1}


@pytest.mark.slow  # one that goes on over other devices is a fast test, below
@pytest.mark.parametrize(
    ('mesh', 'spread', 'axes'),
    [
        ((4, 1, 1), True, ONE | {'members': 4}),
        ((2, 1, 1), True, ONE | {'members': 2}),
        # Rows are spread: four do not divide over eight; weights lie in parts; it is not wanted.
        ((8, 1, 1), True, ONE | {'data': 8}),
        ((2, 2, 2), True, {'data': 2, 'fsdp': 2, 'tensor': 2}),
        ((4, 1, 1), False, ONE | {'data': 4}),
    ],
)
def test_members_are_spread_over_the_devices_of_data(
    toys, tmp_path, members, monkeypatch, mesh, spread, axes
):
    seen = []
    prepare = PopulationRun._prepare_state

    def watched(run):
        prepare(run)
        seen.append((dict(run.mesh.shape), {x.sharding.spec for x in jax.tree.leaves(run.state)}))

    monkeypatch.setattr(PopulationRun, '_prepare_state', watched)
    same_members(swept(toys, tmp_path, mesh, mesh__members=spread), members)
    assert seen == [(axes, {P('members') if 'members' in axes else P()})]


@pytest.mark.parametrize(
    ('method', 'spread'),
    [
        ('lora[r=2]', True),
        pytest.param('head', False, marks=pytest.mark.slow),
        ('pfeiffer[leave_out=[0]]', False),
    ],
)
def test_a_trunk_is_not_computed_by_each_device(toys, tmp_path, method, spread):
    given = config(toys, (2, 1, 1), method=method, sweep__grid=('seed=0,1',))
    group = grid.expand(given)
    run = PopulationRun(
        experiment.build(group[0].config), group, tmp_path / 'p', tmp_path / 'members'
    )
    assert ('members' in run.mesh.axis_names) == spread


def test_a_population_goes_on_over_other_devices(toys, tmp_path, members, monkeypatch):
    take, seen = PopulationRun.take_step, []

    def stopping(run):
        seen.append(dict(run.mesh.shape))
        if run.step == 3:
            run._stop.make()
        return take(run)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(PopulationRun, 'take_step', stopping)
        swept(toys, tmp_path, (4, 1, 1))
    assert seen == [ONE | {'members': 4}] * 4
    same_members(swept(toys, tmp_path, (2, 1, 2)), members)
