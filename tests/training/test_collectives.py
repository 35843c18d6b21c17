"""The reader of compiled programs: sizes, groups, loops, pairs; by hand and by the compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from adapters_jax import sharding
from adapters_jax.training import collectives, hlo

MESH = {'data': 2, 'fsdp': 2, 'tensor': 2}


def module(*lines, more='', devices=8):
    """Return a program whose entry has these lines."""
    inside = '\n'.join(f'  {line}' for line in lines)
    return (
        f'HloModule jit_step, is_scheduled=true, num_partitions={devices}\n\n{more}\n'
        f'ENTRY %main.1_spmd (p: f32[4,8]) -> f32[4,8] {{\n'
        f'  %p = f32[4,8]{{1,0}} parameter(0), metadata={{op_name="frozen[\\\'w\\\']"}}\n'
        f'{inside}\n}}\n'
    )


@pytest.mark.parametrize(
    ('type_', 'size'),
    [
        ('f32[4,8]{1,0}', 128),
        ('bf16[4,8]{1,0:T(8,128)(2,1)S(1)}', 64),
        ('pred[3]{0}', 3),
        ('s4[5]{0}', 3),
        ('f8e4m3fn[16]{0}', 16),
        ('f64[]', 8),
        ('c64[2]', 16),
        ('u32[<=7,2]', 56),
        ('token[]', 0),
        ('(f32[2]{0}, /*index=1*/s8[3]{0})', 11),
    ],
)
def test_bytes_of_types(type_, size):
    assert sum(array.bytes for array in hlo.arrays(type_)) == size


@pytest.mark.parametrize(
    ('notation', 'groups'),
    [
        ('{{0,1},{2,3}}', ((0, 1), (2, 3))),
        ('{}', (tuple(range(8)),)),
        ('[2,4]<=[8]', ((0, 1, 2, 3), (4, 5, 6, 7))),
        ('[4,2]<=[2,4]T(1,0)', ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_every_notation_of_groups(notation, groups):
    assert collectives.read_groups(f' channel_id=1, replica_groups={notation}, x=1', 8) == groups


def test_an_unknown_notation_is_refused():
    with pytest.raises(ValueError, match='in a notation that is not known'):
        collectives.read_groups('replica_groups=<4>', 8)


@pytest.mark.parametrize(
    ('line', 'kind', 'sent'),
    [
        ('f32[4,8]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8]', 'all-reduce', 2 * 3 / 4 * 128),
        ('f32[16,8]{1,0} all-gather(%p), replica_groups=[2,4]<=[8]', 'all-gather', 3 / 4 * 512),
        ('f32[1,8]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8]', 'reduce-scatter', 96),
        ('f32[4,8]{1,0} all-to-all(%p), replica_groups=[4,2]<=[8]', 'all-to-all', 64),
        (
            'f32[4,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{2,2}}',
            'collective-permute',
            128,
        ),
        ('f32[4,8]{1,0} all-reduce(%p), replica_groups={{0},{1}}', 'all-reduce', 0),
    ],
)
def test_bytes_on_the_wire(line, kind, sent):
    (found,) = collectives.read(module(f'ROOT %x = {line}'))
    assert (found.kind, found.sent, found.times, found.sure) == (kind, sent, 1, True)
    assert found.sources == {"frozen['w']"} and found.purpose() == 'frozen weights'


def test_a_pair_of_start_and_done_counts_once():
    groups = 'replica_groups=[1,8]<=[8], dimensions={0}'
    (found,) = collectives.read(
        module(
            f'%s = (f32[4,8]{{1,0}}, f32[32,8]{{1,0}}) all-gather-start(%p), {groups}',
            'ROOT %d = f32[32,8]{1,0} all-gather-done(%s)',
        )
    )
    assert found.kind == 'all-gather' and found.size == 32 * 8 * 4
    more = module('ROOT %r = f32[1,8] reduce-scatter(%q), replica_groups=[2,4]<=[8]')
    wrapped = more.partition('ENTRY %main.1_spmd')[2].replace('%p = ', '%q = ')
    (found,) = collectives.read(
        module(
            '%s = ((f32[4,8]), f32[1,8], u32[]) async-start(%p), calls=%wrapped',
            'ROOT %d = f32[1,8] async-done(%s), calls=%wrapped',
            more=f'%wrapped{wrapped}',
        )
    )
    assert found.kind == 'reduce-scatter' and found.size == 128


def test_several_arrays_together_are_summed():
    (found,) = collectives.read(
        module(
            'ROOT %x = (f32[2]{0}, /*index=1*/bf16[3,2]{1,0:T(8,128)}) all-reduce(%p, %p), '
            'replica_groups={}, metadata={op_name="jit(step)/transpose(jvp(Bert))/x"}'
        )
    )
    assert found.size == 8 + 12 and len(found.groups[0]) == 8


BODY = """
%body (b: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %b = (s32[], f32[4,8]{1,0}) parameter(0)
  %w = f32[4,8]{1,0} get-tuple-element(%b), index=1
  %n = s32[] get-tuple-element(%b), index=0
  %g = f32[16,8]{1,0} all-gather(%w), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%n, %w)
}
"""


@pytest.mark.parametrize('known', [True, False])
def test_loops_multiply(known):
    trips = ', backend_config={"known_trip_count":{"n":"5"}}' if known else ''
    (found,) = collectives.read(
        module(
            '%zero = s32[] constant(0)',
            '%start = (s32[], f32[4,8]) tuple(%zero, %p)',
            f'ROOT %l = (s32[], f32[4,8]) while(%start), condition=%body, body=%body{trips}',
            more=BODY,
        ).replace('condition=%body, ', '')
    )
    assert (found.times, found.sure) == ((5, True) if known else (1, False))
    assert found.sent == found.times * 3 / 4 * 512
    assert found.sources == {"frozen['w']"}, 'a weight is followed into the loop'


def test_what_is_computed_has_no_source():
    (found,) = collectives.read(
        module(
            '%double = f32[4,8]{1,0} add(%p, %p)',
            'ROOT %x = f32[16,8]{1,0} all-gather(%double), replica_groups=[2,4]<=[8], '
            'metadata={op_name="jit(step)/jvp(Bert)/add"}',
        )
    )
    assert not found.sources and found.purpose() == 'forward pass'


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match='no ENTRY computation'):
        collectives.read('nothing')


def test_axes_are_those_along_which_groups_differ():
    def along(groups):
        return collectives.Collective('all-reduce', 1, groups).axes(MESH)

    assert along(((0, 1), (2, 3))) == ('tensor',)
    assert along(((0, 2, 4, 6), (1, 3, 5, 7))) == ('data', 'fsdp')
    assert along((tuple(range(8)),)) == ('data', 'fsdp', 'tensor')


@functools.cache
def mesh():
    return sharding.make_mesh(2, 2, 2)


# What each asks of 8 devices, [4, 8] numbers on each, and what the compiler must make of it.
ASKED = {
    'all-reduce': (lambda x: jax.lax.psum(x, 'tensor'), ('tensor',), 128),
    'all-gather': (lambda x: jax.lax.all_gather(x, ('data', 'fsdp')), ('data', 'fsdp'), 512 * 0.75),
    'reduce-scatter': (
        lambda x: jax.lax.psum_scatter(x, 'fsdp', scatter_dimension=0, tiled=True),
        ('fsdp',),
        64,
    ),
    'all-to-all': (lambda x: jax.lax.all_to_all(x, 'data', 0, 0, tiled=True), ('data',), 64),
    'collective-permute': (
        lambda x: jax.lax.ppermute(x, 'tensor', [(0, 1), (1, 0)]),
        ('tensor',),
        128,
    ),
}


@pytest.mark.parametrize('kind', ASKED)
def test_the_compiler_s_own_programs(kind):
    function, axes, sent = ASKED[kind]
    apart = P(('data', 'fsdp', 'tensor'))
    mapped = jax.shard_map(function, mesh=mesh(), in_specs=apart, out_specs=apart, check_vma=False)
    shape = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    (found,) = collectives.read(jax.jit(mapped).lower(shape).compile().as_text())
    assert found.kind == kind and found.axes(mesh().shape) == axes and found.sent == sent


def test_a_loop_of_the_compiler():
    def summed(x):
        add = lambda total, _: (total + jax.lax.psum(total, 'data'), None)  # noqa: E731
        return jax.lax.scan(add, x, None, length=7)[0]

    apart = P(('data', 'fsdp', 'tensor'))
    mapped = jax.shard_map(summed, mesh=mesh(), in_specs=apart, out_specs=apart, check_vma=False)
    text = jax.jit(mapped).lower(np.zeros((32, 8), np.float32)).compile().as_text()
    found = collectives.read(text)
    assert sum(one.times for one in found) == 7 and all(one.sure for one in found)
    assert collectives.summarise(found, mesh().shape) == [
        {
            'kind': 'all-reduce',
            'axes': 'data',
            'for': 'update',
            'count': 7,
            'bytes': 7 * 128,
            'sure': True,
        }
    ]
