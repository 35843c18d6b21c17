"""Every method over a backbone whose matrices are in 8 bits: it computes what it would over the
same numbers in float32, whatever of the backbone it reads, and so do its gradients.
"""

import cases
import jax
import numpy as np
import pytest

from adapters_jax import params as trees
from adapters_jax import quantize
from adapters_jax.models.backbone import CHANNELS

# They read kernels' norms, kernels, and outputs of projections.
FAST = {'dora', 'ia3'}


def in_8_bits(path, leaf):
    axis = quantize.channel_axis(path, CHANNELS)
    return leaf if axis is None else quantize.to_int8(leaf, axis)


def loss(trainable, frozen, preset):
    batch = cases.layout(preset)
    outputs = cases.model(preset).apply(trees.merge(trainable, frozen), batch)
    return cases.TASK.loss(outputs, batch, 0)[0], outputs


@pytest.mark.parametrize('preset', cases.quick(families=FAST))
def test_outputs_and_gradients_are_those_of_the_weights_that_are_kept(preset):
    trainable, exact = trees.partition(cases.trained(preset), cases.model(preset).rules)
    frozen = trees.map_with_path(in_8_bits, exact)
    kept = trees.map_with_path(lambda _, leaf: quantize.dequantize(leaf), frozen)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (_, found), gradient = run(trainable, frozen, preset)
    (_, expected), expected_gradient = run(trainable, kept, preset)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradient))
    for path, leaf in trees.flatten(gradient).items():
        other = trees.flatten(expected_gradient)[path]
        np.testing.assert_allclose(leaf, other, atol=1e-4 * scale, err_msg=path)
    # And what 8 bits change at all, of outputs as large as these.
    changed = np.abs(found - run(trainable, exact, preset)[0][1]).max()
    assert 0 < changed < 0.1 * np.abs(expected).max()
