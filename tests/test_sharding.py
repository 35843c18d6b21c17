import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adapters_jax import sharding


@pytest.mark.parametrize(('asked', 'expected'), [(-1, 8), (8, 8), (2, 2), (1, 1)])
def test_a_mesh_spans_the_devices_asked_for(asked, expected):
    mesh = sharding.make_mesh(asked)
    assert dict(mesh.shape) == {'data': expected, 'fsdp': 1, 'tensor': 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert list(mesh.devices.flat) == jax.devices()[:expected]


@pytest.mark.parametrize('asked', [0, -2, 9])
def test_a_mesh_of_devices_that_are_not_there_is_refused(asked):
    with pytest.raises(ValueError, match=rf'mesh.data is {asked} but 8 devices .* from 1 to 8'):
        sharding.make_mesh(asked)


def test_a_batch_is_spread_by_rows():
    batch = {'ids': np.arange(24, dtype=np.int32).reshape(8, 3), 'mask': np.ones(8, bool)}
    placed = sharding.put_batch(batch, sharding.make_mesh(4))
    for name, column in batch.items():
        np.testing.assert_array_equal(placed[name], column)
        assert placed[name].dtype == column.dtype
        rows = [np.asarray(shard.data) for shard in placed[name].addressable_shards]
        np.testing.assert_array_equal(np.stack(rows), column.reshape(4, 2, *column.shape[1:]))


def test_rows_that_do_not_divide_are_refused_with_a_way_out():
    batch = {'ids': np.zeros((6, 3))}
    with pytest.raises(ValueError, match=r'6 rows does not divide over 4 devices.*batch_size.*mes'):
        sharding.put_batch(batch, sharding.make_mesh(4))
    assert sharding.put_batch(batch, sharding.make_mesh(2))['ids'].shape == (6, 3)


def test_replicated_leaves_are_whole_on_every_device():
    tree = {'a': {'b': np.arange(5.0, dtype=np.float32)}}
    placed = sharding.put_replicated(tree, sharding.make_mesh(8))['a']['b']
    assert placed.is_fully_replicated
    assert len(placed.addressable_shards) == 8
    np.testing.assert_array_equal(placed.addressable_shards[7].data, tree['a']['b'])


def test_who_computes_a_member_has_arrays_for_itself():
    seen = []

    def look(x):
        seen.append(sharding.devices_of(x))
        return x

    mesh = sharding.make_mesh(4, members=8)
    own = jax.shard_map(look, mesh=mesh, in_specs=P('members'), out_specs=P('members'))
    rows = sharding.make_mesh(4)
    for function, where in ((look, rows), (own, mesh), (look, sharding.make_mesh(1))):
        x = jax.device_put(np.zeros(8), NamedSharding(where, P(where.axis_names[0])))
        jax.jit(function)(x)
    assert seen == [4, 1, 1]


def pointers(leaf):
    return [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_devices_of_a_cpu_hold_what_they_share_once(dtype):
    tree = {'kernel': np.arange(24, dtype=np.float32).reshape(4, 6), 'one': np.float32(3)}
    tree |= {'number': np.arange(5), 'none': np.zeros((0, 3), np.float32)}
    mesh = sharding.make_mesh(4, tensor=2)
    where = jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)
    where['kernel'] = NamedSharding(mesh, P('tensor'))
    placed = sharding.place(tree, dtype, where, shared=True)
    assert placed['kernel'].dtype == dtype and placed['number'].dtype == jax.numpy.int32
    jax.tree.map(np.testing.assert_array_equal, tree, jax.device_get(placed))
    assert len(set(pointers(placed['one']))) == 1
    assert len(set(pointers(placed['kernel']))) == 2


def test_what_is_shared_is_no_part_of_what_it_came_from():
    given = np.arange(6, dtype=np.float32)
    placed = sharding.place(
        {'x': given}, np.float32, sharding.replicated(sharding.make_mesh()), True
    )
    given[:] = 0
    np.testing.assert_array_equal(placed['x'], np.arange(6))
    del given
    np.testing.assert_array_equal(jax.jit(lambda x: x + 1)(placed['x']), np.arange(1, 7))


@pytest.mark.parametrize('devices', [1, 4])
def test_what_every_device_has_is_a_copy(devices):
    memory = np.zeros(1088, np.uint8)
    first = -memory.ctypes.data % 64  # an array that begins here could be taken as it is
    given = memory[first : first + 1024].view(np.float32)
    placed = sharding.put_replicated({'x': given}, sharding.make_mesh(devices))['x']
    given[:] = 1
    assert all((np.asarray(part.data) == 0).all() for part in placed.addressable_shards)
