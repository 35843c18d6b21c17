"""The compiler's options: for the platform that a program is for, and known to this compiler."""

import types

import jax
import jax.numpy as jnp
import pytest

from adapters_jax import functional, xla


@pytest.fixture(autouse=True)
def _ask_again():
    xla._accepted.cache_clear()
    yield
    xla._accepted.cache_clear()


def test_a_program_is_compiled_with_them():
    program = jax.jit(jnp.matmul, compiler_options=xla.options(lean=True))
    assert program(jnp.eye(3), jnp.ones((3, 2))).tolist() == [[1, 1]] * 3
    assert xla.options() == xla.EIGEN_PRODUCTS
    assert xla.options(lean=True) == xla.EIGEN_PRODUCTS | xla.LEAN
    assert xla.options(few=True) == {}


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(xla, 'EIGEN_PRODUCTS', {'xla_cpu_of_another_version': 1})
    assert xla.options() == {}
    assert xla.options(lean=True) == xla.LEAN


def test_a_value_that_it_does_not_know_is_an_error(monkeypatch):
    name = next(iter(xla.EIGEN_PRODUCTS))
    monkeypatch.setattr(xla, 'EIGEN_PRODUCTS', {name: 'NOTHING'})
    with pytest.raises(jax.errors.JaxRuntimeError, match='not a valid enum value'):
        xla.options()


def test_accelerators_get_none_wherever_the_command_runs():
    device = types.SimpleNamespace(platform='tpu')
    leaf = types.SimpleNamespace(sharding=types.SimpleNamespace(device_set=[device]))
    assert xla.options([leaf], lean=True) == {}
    assert xla.options([jnp.ones(1)]) == xla.EIGEN_PRODUCTS


@pytest.mark.parametrize('norm_first', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_gradient_along_residual_connections_is_written_down_in_each_layer(norm_first):
    """Else a layer's gradient is computed again from those of all layers above, for each reader."""

    def norm(x):
        return functional.layer_norm(x, jnp.ones(64), jnp.ones(64), 1e-6)

    def loss(kernels, x):
        for kernel in kernels:
            y = functional.activation('gelu')((norm(x) if norm_first else x) @ kernel) @ kernel.T
            x = x + functional.dropout(y, 0.1, jax.random.key(0))
            x = x if norm_first else norm(x)
        return jnp.square(x).sum()

    def most_operands(layers):
        step = jax.jit(jax.grad(loss), compiler_options=xla.options(lean=True))
        kernels = [jnp.ones((64, 128))] * layers
        lines = step.lower(kernels, jnp.ones((2, 32, 64))).compile().as_text().splitlines()
        fused = [line.split(' fusion(')[1] for line in lines if ' fusion(' in line]
        return max(line.split(')')[0].count('%') for line in fused)

    assert most_operands(9) == most_operands(3)


def test_what_is_to_be_computed_again_is_not_kept_from_the_first_time():
    def loss(x):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.sin(x @ x) @ x))(x))

    step = jax.jit(jax.value_and_grad(loss), compiler_options=xla.options(lean=True))
    program = step.lower(jnp.ones((64, 64))).compile().as_text()
    assert program.count(' dot(') == 2 + 2 + 4  # forward, again, backward


def test_a_gradient_that_is_written_down_is_the_same():
    x = jax.random.normal(jax.random.key(0), (3, 4))

    def loss(x, through):
        return jnp.sum(jnp.sin(through(x)) * x)

    for of in (jax.grad, lambda f: jax.jit(jax.vmap(jax.grad(f)))):
        found = of(lambda x: loss(x, xla.gradient_once))(x)
        assert found.tolist() == of(lambda x: loss(x, lambda x: x))(x).tolist()
