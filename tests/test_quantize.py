"""Matrices in 8 bits: how far they are off, what is computed with them, and where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from adapters_jax import functional, params, quantize, sharding
from adapters_jax.models.backbone import LAYOUTS
from adapters_jax.training.placement import Placement

RNG = np.random.default_rng(0)
# Channels of very different sizes, and one of zeros.
SIZES = np.array([1e-3, 1.0, 0.0, 50.0, 1e-6, 7.0], np.float32)
MATRIX = RNG.standard_normal((40, 6)).astype(np.float32) * SIZES
X = RNG.standard_normal((2, 3, 40)).astype(np.float32)
MESHES = {'one': (1, 1, 1), 'data': (8, 1, 1), 'fsdp': (1, 4, 1), 'mixed': (2, 2, 2)}


def in_8_bits(matrix=MATRIX, axis=1):
    return jax.jit(quantize.to_int8, static_argnums=1)(matrix, axis)


@pytest.mark.parametrize('axis', [0, 1])
def test_every_weight_is_off_by_at_most_half_the_scale_of_its_own_channel(axis):
    matrix = MATRIX if axis else MATRIX.T
    found = in_8_bits(matrix, axis)
    assert (found.qvalue.dtype, found.qvalue.shape) == (jnp.int8, matrix.shape)
    largest = np.abs(matrix).max(1 - axis, keepdims=True)
    assert found.scale.shape == largest.shape
    # Half a scale, and the rounding of the scale itself.
    off = np.abs(quantize.dequantize(found) - matrix)
    assert (off <= largest / 127 / 2 * (1 + 1e-5)).all()
    assert off.max() > 0.4 * largest.max() / 127
    assert not np.asarray(quantize.dequantize(found))[
        np.broadcast_to(largest == 0, off.shape)
    ].any()


def test_the_product_is_that_of_the_weights_that_are_kept():
    found = in_8_bits()
    exact = X @ np.asarray(quantize.dequantize(found))
    product = jax.jit(quantize.product)(X, found)
    np.testing.assert_allclose(product, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
    narrow = jax.jit(quantize.product)(jnp.bfloat16(X), found)
    assert narrow.dtype == jnp.bfloat16
    # Two roundings to eight binary digits, those of the input and of the sum.
    norms = np.linalg.norm(X, axis=-1)[..., None] * np.linalg.norm(MATRIX, axis=0)
    assert (np.abs(narrow.astype(np.float32) - exact) <= 2**-7 * norms + 1e-30).all()


def test_the_gradient_of_the_product_is_that_of_the_weights_that_are_kept():
    found = in_8_bits()
    out = RNG.standard_normal((2, 3, 6)).astype(np.float32)
    _, backward = jax.vjp(lambda x: functional.dense(x, found), X)
    (gradient,) = backward(out)
    exact = out @ np.asarray(quantize.dequantize(found)).T
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize('matrix', [in_8_bits(), jnp.bfloat16(MATRIX)], ids=['int8', 'bfloat16'])
def test_for_the_backward_pass_the_stored_numbers_are_kept_and_no_copy_in_float32(matrix):
    _, backward = jax.vjp(lambda x: functional.dense(x, matrix), X)
    kept = [x for x in jax.tree.leaves(backward) if x.shape == MATRIX.shape]
    assert {x.dtype for x in kept} == {jax.tree.leaves(matrix)[0].dtype}


def test_rows_of_a_table():
    table = in_8_bits(MATRIX, 0)
    ids = np.array([[3, 0], [39, 3]])
    expected = np.asarray(quantize.dequantize(table))[ids]
    np.testing.assert_array_equal(quantize.rows(table, ids), expected)


def test_sizes():
    tree = {'a': in_8_bits(), 'b': np.zeros((2, 3), np.float32)}
    assert params.count(tree) == params.count({'a': MATRIX}) + 6
    assert params.size_bytes(tree) == MATRIX.size + 4 * 6 + 4 * 6
    assert params.count(jax.eval_shape(lambda: tree)) == params.count(tree)


# ---- a backbone


def placed(mesh):
    placement = Placement(sharding.make_mesh(*mesh), LAYOUTS)
    return params.flatten(placement.frozen({'backbone': tiny.backbone()}, np.int8))


@pytest.mark.parametrize('mesh', MESHES)
def test_matrices_lie_as_their_floats_would_and_hold_the_same_integers_on_every_mesh(mesh):
    exact = params.flatten({'backbone': tiny.backbone()})
    found, alone = placed(MESHES[mesh]), placed((1, 1, 1))
    assert list(found) == list(exact)
    where = params.flatten(
        sharding.layouts({'backbone': tiny.backbone()}, sharding.make_mesh(*MESHES[mesh]), LAYOUTS)
    )
    quantised = {p for p, leaf in found.items() if quantize.is_quantized(leaf)}
    assert quantised == {
        p for p in exact if p.endswith('/kernel') or p == 'backbone/embeddings/word/embedding'
    }
    for path, leaf in found.items():
        if path not in quantised:
            assert leaf.dtype == np.float32
            np.testing.assert_array_equal(leaf, exact[path])
            continue
        assert leaf.qvalue.sharding.is_equivalent_to(where[path], 2)
        np.testing.assert_array_equal(leaf.qvalue, alone[path].qvalue)
        np.testing.assert_array_equal(leaf.scale, alone[path].scale)


def test_devices_of_a_cpu_hold_what_is_no_matrix_once():
    for path, leaf in placed((4, 1, 1)).items():
        if not quantize.is_quantized(leaf):
            parts = [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
            assert len(parts) == 4 and len(set(parts)) == 1, path


def test_scales_are_cut_along_their_own_axis_alone():
    found = placed((1, 2, 2))
    up = found['backbone/layer_0/feed_forward/up/kernel']
    assert (up.qvalue.sharding.spec, up.scale.sharding.spec) == (
        P('fsdp', 'tensor'),
        P(None, 'tensor'),
    )
    word = found['backbone/embeddings/word/embedding']
    assert word.scale.sharding.is_fully_replicated and not word.qvalue.sharding.is_fully_replicated
