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
