"""Products are products; their gradients are computed with the smaller factor turned over."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adapters_jax import products, xla

BOTH = [products.product, products.trained_product]
# Of a kernel of 12 x 8 or 8 x 12: all turned over, the kernel turned over, nothing; and one row.
LEADS = [(2,), (4,), (2, 4), (2, 16), ()]


def normals(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def compiled_dots(function, *arguments):
    """Return result, contracted axes of the two factors of each product of the compiled program."""
    step = jax.jit(function, compiler_options=xla.options(lean=True))
    text = step.lower(*arguments).compile().as_text()
    pattern = (
        r'= f32\[([\d,]+)\]\S* dot\(.*lhs_contracting_dims={(\d)}, rhs_contracting_dims={(\d)}'
    )
    return [
        (*map(int, shape.split(',')), int(a), int(b)) for shape, a, b in re.findall(pattern, text)
    ]


@pytest.mark.parametrize('product', BOTH)
@pytest.mark.parametrize(
    ('inputs', 'outputs'),
    [
        (12, 3),
        (8, 12),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((3, 12), (5, 5), (12, 8))),
    ],
)
@pytest.mark.parametrize('lead', LEADS)
def test_they_differ_from_a_product_in_no_number(product, inputs, outputs, lead):
    x, kernel, weights = normals((*lead, inputs), (inputs, outputs), (*lead, outputs))

    def gradients(product):
        def loss(x, kernel):
            return (weights * jnp.tanh(product(x, kernel))).sum()

        return product(x, kernel), *jax.grad(loss, (0, 1))(x, kernel)

    found, expected = gradients(product), gradients(jnp.matmul)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('product', BOTH)
@pytest.mark.parametrize('shared', ['kernel', 'x', 'nothing'])
def test_those_of_members_are_those_of_each(product, shared):
    x, kernel = normals((3, 2, 12), (3, 12, 8))
    x, kernel = x[0] if shared == 'x' else x, kernel[0] if shared == 'kernel' else kernel
    axes = tuple(None if shared == name else 0 for name in ('x', 'kernel'))
    both = jax.grad(lambda x, k: jnp.sin(product(x, k)).sum(), (0, 1))
    together = jax.vmap(both, axes)(x, kernel)
    for i in range(3):
        alone = both(x if shared == 'x' else x[i], kernel if shared == 'kernel' else kernel[i])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_the_kernels_of_members_get_their_own_gradients():
    x, kernels = normals((4, 6), (3, 6, 2))

    def gradient(kernel):
        return jax.grad(lambda k: jnp.square(products.trained_product(x, k)).sum())(kernel)

    together = jax.vmap(gradient)(kernels)
    for i, kernel in enumerate(kernels):
        np.testing.assert_allclose(together[i], gradient(kernel), rtol=1e-5)


@pytest.mark.parametrize('product', BOTH)
def test_only_what_is_asked_for_is_computed(product):
    x, kernel = normals((4, 12), (12, 8))

    def count(of):
        graded = jax.grad(lambda *given: jnp.sin(product(*given)).sum(), of)
        return str(jax.make_jaxpr(graded)(x, kernel)).count('dot_general')

    if product is products.product:
        assert [count(of) for of in (0, 1, (0, 1))] == [2, 2, 3]
    else:
        assert [count(of) for of in (1, (0, 1))] == [2, 3]


@pytest.mark.parametrize('product', BOTH)
@pytest.mark.parametrize('members', [False, True])
def test_second_derivatives_are_those_of_a_product(product, members):
    x, *kernels = normals((4, 6), (3, 6, 5), (3, 5, 2))
    _, *along = normals((1,), (6, 5), (5, 2))

    def curvature(product, *kernels):
        def loss(first, second):
            return jnp.square(jnp.tanh(product(jnp.tanh(product(x, first)), second))).sum()

        def slope(*kernels):
            return sum(map(jnp.vdot, jax.grad(loss, (0, 1))(*kernels), along))

        return jax.grad(slope, (0, 1))(*kernels)

    def run(product):
        of_one = functools.partial(curvature, product)
        return jax.vmap(of_one)(*kernels) if members else of_one(*(one[0] for one in kernels))

    for found, expected in zip(run(product), run(jnp.matmul), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('product', [products.product, products.trained_product])
def test_third_derivatives_are_those_of_a_product(product):
    x, kernel = normals((4, 6), (6, 5))

    def third(product):
        def slope(function):
            return lambda x: jnp.square(jax.grad(function)(x)).sum()

        return jax.grad(slope(slope(lambda x: jnp.sin(product(x, kernel)).sum())))(x)

    np.testing.assert_allclose(third(product), third(jnp.matmul), rtol=1e-5, atol=1e-5)


def input_gradient(x, kernel):
    return jax.grad(lambda x: jnp.sin(products.product(x, kernel)).sum())(x)


@pytest.mark.parametrize(
    ('rows', 'expected'),
    [(100, (384, 100, 1, 0)), (440, (440, 384, 1, 0)), (2000, (2000, 384, 1, 1))],
)
def test_the_gradient_for_the_input_turns_the_smaller_factor_over(rows, expected):
    x, kernel = normals((rows, 384), (384, 1536))
    assert compiled_dots(input_gradient, x, kernel) == [(rows, 1536, 1, 0), expected]


def test_rows_of_members_over_one_kernel_count_together():
    x, kernel = normals((5, 100, 384), (384, 1536))
    found = compiled_dots(jax.vmap(input_gradient, (0, None)), x, kernel)
    assert found == [(500, 1536, 1, 0), (500, 384, 1, 0)]


@pytest.mark.parametrize(('inputs', 'outputs'), [(384, 24), (24, 384)])
def test_the_gradient_for_a_kernel_turns_the_narrow_factor_over(inputs, outputs):
    x, kernel = normals((440, inputs), (inputs, outputs))

    def loss(kernel):
        return jnp.sum(jnp.sin(products.trained_product(x, kernel)))

    found = compiled_dots(jax.grad(loss), kernel)
    assert [dot[:2] for dot in found] == [(440, outputs), (24, 384)]
