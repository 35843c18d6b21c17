"""The compiled step takes the memory that is promised, by the compiler's count.

Under the compiler's own flags there is more to see: tests/test_production.py.
"""

import dataclasses
import functools

import pytest
import tiny

from adapters_jax.models.block import BlockConfig
from experiments.bench import memory
from experiments.bench.memory import Setting

METHOD = 'bitfit'  # the least to compile


@functools.cache
def measured(layers, *setting, method=METHOD, rows=8, tokens=64):
    # Wide enough that activations, and weights, outweigh everything else.
    block = BlockConfig(hidden=64, feed_forward=256, heads=4)
    config = dataclasses.replace(tiny.CONFIG, layers=layers, positions=64, block=block)
    return memory.measure(config, Setting(method, *setting), rows, tokens)


def matrices(layers):
    """Return how many weights the layers' kernels have."""
    return layers * (4 * 64 * 64 + 2 * 64 * 256)


def test_recomputed_activations_are_not_kept():
    # Not BitFit: a CPU's schedule leaves its sums of gradients, and what they are of, for the end.
    kept, least = recomputed('none'), recomputed('full')
    assert kept['arguments'] == least['arguments']
    assert kept['temporary'] > 1.5 * least['temporary']


@pytest.mark.slow
def test_of_some_activations_the_products_are_kept():
    kept, some, least = (recomputed(remat) for remat in ('none', 'dots', 'full'))
    assert kept['arguments'] == some['arguments'] == least['arguments']
    assert kept['temporary'] > 1.15 * some['temporary'] > 1.5 * least['temporary']


def recomputed(remat):
    return measured(3, 'float32', 'float32', remat, method='lora')


def test_what_the_backward_pass_computes_again_is_not_kept():
    """Of attention's weights and of the feed-forward network one array each, four times as wide as
    the rest; dropped weights and GELU's distribution function would be another of both."""
    one, three = (measured(layers, 'float32', 'float32')['temporary'] for layers in (1, 3))
    wide = 4 * 8 * 64 * 256  # bytes
    assert three - one < 2 * 4.5 * wide


@pytest.mark.parametrize(
    ('stored', 'saved'), [pytest.param('bfloat16', 2, marks=pytest.mark.slow), ('int8', 3)]
)
def test_smaller_weights_save_their_bytes(stored, saved):
    exact, found = measured(1, 'float32'), measured(1, stored)
    for kind in ('frozen_bytes', 'arguments'):
        assert exact[kind] - found[kind] > 0.95 * saved * matrices(1), kind


def test_full_fine_tuning_takes_the_weights_four_times():
    """Weights and two moments, given away to the outputs, and the gradient."""
    found = measured(1, method='full', rows=1, tokens=8)
    assert found['frozen_bytes'] == 0
    assert 0 <= found['arguments'] - 3 * 4 * found['trainable'] < 2**10
    assert found['new_outputs'] < 2**13
    assert found['temporary'] > 4 * matrices(1)


def test_the_table_sets_peaks_against_full_fine_tuning():
    row = measured(1, 'int8') | {'peak': 3 * 2**19}
    full = row | {'method': 'full', 'peak': 2 * 2**20}
    given = {'rows': 2, 'tokens': 32, 'hardware': 'a processor', 'commit': 'abcdef123'}
    lines = memory.render({'shapes': {'base': [full, row]}} | given).splitlines()
    assert lines[2].startswith('| `full` | - | `float32` | `none` |')
    assert lines[2].endswith('| 2 (1.00) |')
    assert lines[3].startswith(f'| `{METHOD}` | `int8` |')
    assert lines[3].endswith('| 2 (0.75) |')
