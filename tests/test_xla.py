"""The compiler's options: for the platform that a program is for, and known to this compiler."""

import types

import jax
import jax.numpy as jnp
import pytest

from adapters_jax import xla


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
