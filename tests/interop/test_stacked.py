"""Leaves stacked over layers come back as they were, whatever their layers and shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax.interop import stacked

LEAVES = st.dictionaries(
    st.tuples(
        st.sampled_from(['', 'adapter/', 'adapter/lora/']),
        st.integers(0, 12),
        st.sampled_from(['attention/query/a', 'block/prefix/projection', 'a']),
    ),
    st.tuples(st.sampled_from([(2,), (3, 1), ()]), st.sampled_from(['float32', 'float16'])),
    max_size=20,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LEAVES)
def test_unstack_is_the_inverse_of_stack(described):
    rng = np.random.default_rng(0)
    leaves = {
        f'{before}layer_{i}/{after}': rng.standard_normal(shape).astype(dtype)
        for (before, i, after), (shape, dtype) in described.items()
    }
    leaves |= {'adapter/shared/rule': rng.standard_normal((2, 2))}
    again = stacked.unstack(stacked.stack(leaves))
    assert set(again) == set(leaves)
    for path, leaf in leaves.items():
        assert again[path].dtype == leaf.dtype and again[path].shape == leaf.shape
        np.testing.assert_array_equal(again[path], leaf)


def test_a_tensor_for_each_kind_and_shape():
    leaves = {f'layer_{i}/x': np.zeros(2 if i != 3 else 4) for i in (0, 1, 2, 3, 5, 11)}
    found = {name: x.shape for name, x in stacked.stack(leaves).items()}
    assert found == {'layer_{0-2,5,11}/x': (5, 2), 'layer_3/x': (4,)}


@pytest.mark.parametrize(
    ('tensors', 'sentence'),
    [
        ({'layer_{0-2}/x': np.zeros((2, 4))}, 'one entry for each layer'),
        ({'layer_{0-99999999999}/x': np.zeros((2, 4))}, 'one entry for each layer'),
        ({'layer_{5-2}/x': np.zeros((2, 4))}, 'one entry for each layer'),
        ({'layer_{0}/x': np.zeros(())}, 'one entry for each layer'),
        ({'layer_{0-1}/x': np.zeros((2, 4)), 'layer_1/x': np.zeros(4)}, 'there twice'),
    ],
)
def test_damaged_names_are_refused(tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        stacked.unstack(tensors)
