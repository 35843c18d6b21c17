"""The kernels of attention against attention written out, in Pallas' interpreter."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adapters_jax
from adapters_jax import attention, functional, fused_attention


def random_attention(B=2, T=128, S=64, H=2, K=16, dtype=np.float32):
    rng = np.random.default_rng(B + T + S + K)
    query, gradient = (rng.standard_normal((B, T, H, K)).astype(dtype) for _ in range(2))
    key, value = (rng.standard_normal((B, S, H, K)).astype(dtype) for _ in range(2))
    return query, key, value, gradient


def random_mask(shape):
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask[0, 0, 0] = False  # a row that sees nothing
    return mask


def by_kernels(rate, mask, words, query, key, value, gradient):
    def mix(*given):
        return fused_attention.mix(rate, *given, mask, words, True)

    mixed, pull = jax.vjp(mix, query, key, value)
    return mixed, *pull(gradient)


def written_out(rate, mask, rng, query, key, value, gradient):
    mixed, pull = jax.vjp(
        lambda *given: attention.attend(*given, mask, rate, rng), query, key, value
    )
    return mixed, *pull(gradient)


# One program for all gradients; two, of several blocks of keys; fewer tokens than a block.
SHAPES = ({'T': 128, 'S': 64}, {'T': 64, 'S': 192}, {'T': 16, 'S': 32, 'K': 32})


# Every shape, and the masks with and without dropout; the others combine them.
FAST = {
    *((0, 'no', 0.0), (0, 'rows', 0.3), (1, 'rows', 0.3), (1, 'keys', 0.0)),
    *((2, 'rows', 0.3), (0, 'keys', 0.3)),
}


@pytest.mark.parametrize(
    ('shape', 'masked', 'rate'),
    [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in itertools.product(range(3), ('no', 'rows', 'keys'), (0.0, 0.3))
    ],
)
def test_kernels_compute_what_is_written_out(shape, masked, rate):
    given = random_attention(**SHAPES[shape])
    B, T, S = len(given[0]), given[0].shape[1], given[1].shape[1]
    mask = {'no': None, 'rows': (B, 1, T, S), 'keys': (1, 1, 1, S)}[masked]
    mask = None if mask is None else random_mask(mask)
    rng = jax.random.key(3) if rate else None
    words = functional.words_of(rng) if rate else None
    found = by_kernels(rate, mask, words, *given)
    expected = written_out(rate, mask, rng, *given)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_members_of_a_population_have_their_own_dropout():
    given = random_attention(T=64, S=64)
    keys = jax.random.split(jax.random.key(0), 3)

    def alone(key):
        return by_kernels(0.3, None, functional.words_of(key), *given)

    together = jax.vmap(alone)(keys)
    for i, key in enumerate(keys):
        expected = written_out(0.3, None, key, *given)
        for a, b in zip(together, expected, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


def test_members_with_their_own_projections_and_a_common_mask():
    given = [np.stack([x, 2 * x]) for x in random_attention(T=64, S=64)]
    mask = random_mask((2, 1, 64, 64))
    words = functional.words_of(jax.random.key(1))
    together = jax.vmap(lambda *each: by_kernels(0.3, mask, words, *each))(*given)
    for i in range(2):
        expected = written_out(0.3, mask, jax.random.key(1), *(x[i] for x in given))
        for a, b in zip(together, expected, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_no_further_from_float32_than_what_is_written_out():
    given = [jnp.asarray(x, jnp.bfloat16) for x in random_attention(T=128, S=128, K=32)]
    exact = written_out(0.0, None, None, *(x.astype(jnp.float32) for x in given))
    found = by_kernels(0.0, None, None, *given)
    for a, b, right in zip(found, written_out(0.0, None, None, *given), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        errors = [np.linalg.norm(x.astype(jnp.float32) - right) for x in (a, b)]
        assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize(
    ('T', 'S', 'K', 'expected'),
    [
        (128, 128, 64, True),
        (16, 64, 32, True),
        (512, 512, 128, True),
        (128, 158, 64, False),  # keys of a prefix
        (100, 100, 64, False),
        (128, 128, 48, False),
        (8, 8, 64, False),
    ],
)
def test_which_shapes_have_kernels(T, S, K, expected):
    query, key, _, _ = random_attention(B=1, T=T, S=S, H=1, K=K)
    assert fused_attention.suits(jnp.asarray(query), jnp.asarray(key)) is expected


def test_arrays_over_several_devices_have_none():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    query, key, _, _ = (jax.device_put(x, rows) for x in random_attention(T=64, S=64))
    assert not jax.jit(lambda q, k: jnp.array(fused_attention.suits(q, k)))(query, key)


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated')
@pytest.mark.parametrize('shape', SHAPES)
def test_kernels_are_made_for_a_gpu(shape):
    """As far as JAX goes by itself: to the program that Triton is given."""
    shape = {'K': 16, **shape}

    def described(length, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((2, length, 2, shape['K']), dtype)

    def everything(query, key, value, mask, words, gradient):
        mixed, pull = jax.vjp(
            lambda *given: fused_attention.mix(0.1, *given, mask, words), query, key, value
        )
        return mixed, pull(gradient)

    T, S = shape['T'], shape['S']
    mask = jax.ShapeDtypeStruct((2, 1, T, S), bool)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32)
    given = described(T), described(S), described(S), mask, words, described(T)
    device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
    mesh = jax.sharding.AbstractMesh((1,), ('data',), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.jit(everything).trace(*given).lower(lowering_platforms=('cuda',)).as_text()
    backward = 1 if S <= fused_attention.WHOLE else 2
    assert program.count('xla.gpu.triton') == 1 + backward


def test_a_jax_without_what_kernels_are_written_in(monkeypatch, caplog):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setitem(sys.modules, 'adapters_jax.fused_attention', None)
    monkeypatch.delattr(adapters_jax, 'fused_attention')
    attention._kernels.cache_clear()
    query, key, value, _ = random_attention(T=64, S=64)
    mixed = attention.attend(query, key, value, None)
    attention._kernels.cache_clear()
    with attention.written_out():
        np.testing.assert_array_equal(mixed, attention.attend(query, key, value, None))
    assert 'attention is computed without kernels' in caplog.text
    assert 'jax==0.10.2 has it' in caplog.text


def test_a_step_on_a_gpu_takes_the_kernels_and_one_written_out_does_not(monkeypatch):
    """What such a step is compiled of, seen without a GPU."""
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    query, key, value, _ = random_attention(T=64, S=64)

    def gradients(*given):
        return jax.grad(lambda *x: attention.attend(*x, None).sum(), argnums=(0, 1, 2))(*given)

    def programs():
        return str(jax.make_jaxpr(lambda *x: gradients(*x))(query, key, value)).count('pallas_call')

    assert programs() == 2
    with attention.written_out():
        assert programs() == 0
