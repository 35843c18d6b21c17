"""Checks ahead of a run: what would be held and sent, and where every leaf would lie.

`python tests/test_compile.py` writes the dumps of `goldens/` anew, after a change that is meant.
"""

import functools
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import command
import jax
import pytest
import toy

from adapters_jax import compile as ahead_of_time
from adapters_jax import entry, sharding
from adapters_jax.params import flatten
from adapters_jax.training import ahead, batching, collectives, experiment, flops, loop

GOLDENS = Path(__file__).parent / 'goldens'
MESHES = {
    'data8': (8, 1, 1),
    'fsdp8': (1, 8, 1),
    'mixed222': (2, 2, 2),
    'tensor2': (1, 1, 2),
}
METHODS = {'houlsby': 'houlsby[size=8]', 'lora': 'lora[r=4]', 'full': 'full'}


@functools.cache
def plan(mesh, method, **changes):
    config = entry.load_config(f'{GOLDENS / "small.py"}:method={method}')
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    for path, value in changes.items():
        group, name = path.split('__')
        config[group][name] = value
    return ahead.plan(config)


def golden(mesh, method):
    return GOLDENS / f'{method}-{mesh}.txt'


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('mesh', MESHES)
def test_every_leaf_lies_where_it_lay(mesh, method):
    found = ahead.shardings(plan(MESHES[mesh], METHODS[method]))
    assert found == golden(mesh, method).read_text(), 'see the docstring of this file'


def test_there_is_no_dump_of_anything_else():
    expected = {golden(mesh, method).name for mesh in MESHES for method in METHODS}
    assert {path.name for path in GOLDENS.glob('*.txt')} == expected


PROGRAMS = [
    pytest.param('data8', 'lora', marks=pytest.mark.slow),
    *(('fsdp8', 'houlsby'), ('mixed222', 'lora'), ('tensor2', 'houlsby')),
]


@pytest.fixture(scope='module')
def compiled():
    """The step of a mesh and a method: its plan, and what it sends."""
    found = {}

    def get(mesh, method, **changes):
        key = mesh, method, *changes.items()
        if key not in found:
            # Dropout sends nothing, and doubles the program.
            of = plan(MESHES[mesh], METHODS[method], training__dropout=False, **changes)
            text = ahead.trace_step(of).lower().compile().as_text()
            found[key] = of, collectives.read(text)
        return found[key]

    return get


@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('method', ['houlsby', 'lora'])
def test_moments_and_gradients_are_of_trainable_leaves_only(mesh, method):
    of = plan(MESHES[mesh], METHODS[method])
    trainable = flatten(of.start.trainable)
    frozen = set(flatten(of.start.frozen))
    assert frozen and not frozen & set(trainable)
    seen = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(of.start.opt_state):
        named = jax.tree_util.keystr(path, simple=True, separator='/')
        own = [name for name in trainable if named.endswith('/' + name)]
        assert own or leaf.shape == (), named
        seen += own
        assert all(trainable[name].sharding == leaf.sharding for name in own)
    assert sorted(seen) == sorted(2 * list(trainable))


@pytest.mark.parametrize(('mesh', 'method'), PROGRAMS)
def test_rows_stay_where_they_are_and_no_gradient_of_a_frozen_leaf_is_summed(
    compiled, mesh, method
):
    """Gradients are summed over the devices that have other rows, and are no more than leaves."""
    of, found = compiled(mesh, method)
    shape = of.placement.mesh.shape
    sums = [
        one
        for one in found
        if one.kind in ('all-reduce', 'reduce-scatter') and set(one.axes(shape)) & {'data', 'fsdp'}
    ]
    trained = sum(leaf.size for leaf in jax.tree.leaves(of.start.trainable))
    summed = sum(one.size * one.times for one in sums) / 4
    rows = shape['data'] * shape['fsdp']
    # Beside the gradients: the loss, the count, and what the norms of leaves in parts come to.
    assert summed <= trained + 64 if rows > 1 else not sums
    # Devices of `tensor` may have a part each of a gradient to sum.
    assert summed >= (trained if shape['tensor'] == 1 else 0)


@pytest.mark.parametrize(
    ('mesh', 'method', 'changes', 'gathered'),
    [
        # With whole weights, as on the mesh of all kinds, there is nothing to gather.
        pytest.param('data8', 'lora', {}, False, marks=pytest.mark.slow),
        pytest.param(
            *('fsdp8', 'houlsby', {'mesh__frozen': 'replicated'}, False), marks=pytest.mark.slow
        ),
        ('mixed222', 'lora', {'mesh__frozen': 'replicated'}, False),
        ('tensor2', 'houlsby', {}, False),
        ('fsdp8', 'houlsby', {}, True),
        ('mixed222', 'lora', {}, True),
    ],
)
def test_frozen_weights_are_gathered_where_they_lie_in_parts_only(
    compiled, mesh, method, changes, gathered
):
    of, found = compiled(mesh, method, **changes)
    frozen = [one for one in found if 'frozen weights' in one.purpose()]
    gathers = [one for one in frozen if one.kind == 'all-gather']
    assert bool(gathers) == gathered
    if not gathered:
        return
    # Each matrix of each layer is gathered, once, over `fsdp` alone.
    matrices = [path for path in flatten(of.start.frozen) if re.search(r'layer_.*/kernel$', path)]
    sources = [source for one in gathers for source in one.sources if 'kernel' in source]
    named = [source.replace("']['", '/') for source in sources]
    assert {path for path in matrices if any(path in name for name in named)} == set(matrices)
    assert len(named) == len(set(named))
    assert all(one.axes(of.placement.mesh.shape) == ('fsdp',) for one in gathers)


def described(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): (leaf.shape, str(leaf.dtype), leaf.sharding.spec)
        for path, leaf in leaves
    }


@pytest.mark.parametrize(
    'frozen_dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow), 'int8']
)
def test_a_run_has_the_leaves_that_were_foretold(tmp_path, frozen_dtype):
    backbone = toy.write_backbone(tmp_path / 'bert', layers=2)
    config = toy.config(backbone, toy.write_texts(tmp_path / 'texts.csv', 60))
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 2, 2, 2
    config.training.frozen_dtype, config.training.batch_size = frozen_dtype, 8
    run = loop.Trainer(experiment.build(config), tmp_path / 'run')
    _, columns = next(run.iterator)
    batch = sharding.put_batch(batching.fill(columns, run.own_rows, run.pad_id), run.mesh)
    rows, length = batch['input_ids'].shape
    config.training.batch_size = rows
    of = ahead.plan(config, None, length, batch['starts'].shape[1], labels=3)
    assert described(of.start.trainable) == described(run.trainable)
    assert described(of.start.frozen) == described(run.frozen)
    assert described(of.start.opt_state) == described(run.opt_state)
    assert described(of.batch) == described(batch)


def test_bytes_a_device_holds(compiled):
    of, _ = compiled('fsdp8', 'houlsby')
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(of.start.frozen))
    held = sharding.bytes_per_device(of.start.frozen)
    assert whole / 8 < held < whole / 2
    assert (
        sharding.bytes_per_device(of.batch)
        == sum(leaf.size * leaf.dtype.itemsize for leaf in of.batch.values()) / 8
    )


def test_the_command_reads_no_weights_and_writes_what_it_says(tmp_path):
    config = f'--config={GOLDENS / "small.py"}:method={METHODS["lora"]}'
    options = ['--config.mesh.fsdp=2', '--devices=4', f'--output={tmp_path / "out"}']
    options += ['--config.training.dropout=False']
    done = command.run('compile', config, *options, folder=tmp_path / 'run')
    assert done.status == 0, done.err
    assert 'mesh data 2 x fsdp 2 x tensor 1 of cpu' in done.out
    report = json.loads((tmp_path / 'out' / 'compiled.json').read_text())
    assert report['mesh'] == {'data': 2, 'fsdp': 2, 'tensor': 1}
    assert set(report['held']) == {'frozen', 'trainable', 'optimiser', 'batch'}
    for name in ('step', 'forward'):
        assert report[name]['flops'] > 0 and report[name]['memory']['temp'] > 0
    kinds = {(row['kind'], row['for']) for row in report['step']['collectives']}
    assert ('all-gather', 'frozen weights') in kinds and ('all-reduce', 'backward pass') in kinds
    assert {row['for'] for row in report['forward']['collectives']} <= {
        *('frozen weights', 'forward pass')
    }
    dump = (tmp_path / 'out' / 'shardings.txt').read_text()
    assert (
        'frozen/backbone/layer_0/attention/query/kernel float32[32, 32] (fsdp, tensor) 2048' in dump
    )


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (['--topology=h100:8'], '--topology=h100:8: expected a TPU topology such as v5e:4x4; for'),
        (['--topology=v5e:2x2', '--devices=2'], '--devices=2 and --topology=v5e:2x2 name two'),
        (['--devices=-1'], '--devices is -1; expected 1 or more'),
        (['--devices=2', '--config.mesh.fsdp=3'], 'mesh.fsdp is 3 but 2 devices are present'),
        (['--devices=2', '--length=-3'], '--length is -3; expected 0 or more'),
        (['--devices=2', '--labels=-1'], '--labels is -1; expected 0 or more'),
        (
            ['--devices=2', '--config.data.max_length=100'],
            'max_length is 100, but the model has 64 positions; set it to 64 or less',
        ),
        (['--devices=2', '--config.data.max_length=-3'], 'max_length is -3, which leaves no room'),
        (['--devices=2', '--length=500'], 'a row has 500 tokens; expected 256 at most: the 64 pos'),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(tmp_path, options, sentence):
    config = f'--config={GOLDENS / "small.py"}'
    assert sentence in command.refused('compile', config, *options, folder=tmp_path)


@pytest.mark.skipif(find_spec('libtpu') is not None, reason='the TPU compiler is here')
def test_without_the_tpu_compiler_it_says_what_to_install():
    with pytest.raises(ValueError, match=r'v5e:2x2: the TPU compiler is not here; .*pip install'):
        ahead.topology('v5e:2x2')


@pytest.mark.slow
def test_tpus_that_are_not_at_hand(tmp_path):
    pytest.importorskip('libtpu')
    config = f'--config={GOLDENS / "small.py"}'
    options = ['--config.mesh.fsdp=2', '--topology=v5e:2x2', f'--output={tmp_path / "out"}']
    done = command.run('compile', config, *options, folder=tmp_path / 'run')
    assert done.status == 0, done.err
    report = json.loads((tmp_path / 'out' / 'compiled.json').read_text())
    assert report['device'] == 'TPU v5 lite' and report['mesh']['data'] == 2
    kinds = {(row['kind'], row['for']) for row in report['step']['collectives']}
    assert ('all-gather', 'frozen weights') in kinds and ('all-reduce', 'backward pass') in kinds
    bad = [config, '--topology=v5e:8x9']
    assert 'is none that the TPU compiler knows' in command.refused(
        'compile', *bad, folder=tmp_path
    )


def test_fewer_devices_than_jax_has_are_those_that_were_asked_for():
    given = entry.load_config(f'{GOLDENS / "small.py"}:method=head')
    report, _ = ahead_of_time.check(given, devices=2)
    assert math.prod(report['mesh'].values()) == 2


def test_a_schedule_of_steps_that_only_the_data_tells_is_accepted(caplog):
    given = entry.load_config(f'{GOLDENS / "small.py"}:method=adalora[tinit=2000]')
    given.training.steps, given.training.epochs = 0, 100.0
    given.training.trunk_cache = 'float32'
    ahead.plan(given)
    assert 'what is compiled here computes them' in caplog.text


def test_a_row_may_be_as_long_as_those_that_texts_share_in_training():
    given = entry.load_config(f'{GOLDENS / "small.py"}:method=head')
    of = ahead.plan(given, length=256)  # of texts of 16 tokens, or fewer
    assert of.batch['input_ids'].shape[1] == 256
    given.task.name = 'multiple_choice'  # an example is a question with each of its candidates
    assert ahead.plan(given, length=1000).batch['input_ids'].shape[1] == 1000


def test_more_devices_than_jax_has_found_already():
    jax.devices()
    with pytest.raises(ValueError, match='but JAX has found 8 devices in this process already'):
        ahead_of_time.simulate(64)
    ahead_of_time.simulate(8)


if __name__ == '__main__':
    ahead_of_time.simulate(8)
    for mesh in MESHES:
        for method in METHODS:
            golden(mesh, method).write_text(ahead.shardings(plan(MESHES[mesh], METHODS[method])))
    print(f'wrote the dumps of {GOLDENS}')


def test_of_robust_training_the_step_that_drops_no_layer_is_compiled():
    plain = ahead.trace_step(plan((1, 1, 1), 'pfeiffer'))
    robust = ahead.trace_step(plan((1, 1, 1), 'pfeiffer', training__adapter_drop='robust'))
    assert flops.product_flops(robust.jaxpr) == flops.product_flops(plain.jaxpr) > 0
