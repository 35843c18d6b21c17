import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import ragged

from adapters_jax.data.encoded import Encoded, ranges

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=20)


def tokens_of(encoded, name, i):
    return encoded.tokens[name][encoded.offsets[i] : encoded.offsets[i + 1]]


@settings(deadline=None)
@given(LENGTHS, st.data())
def test_select_takes_tokens_and_columns_of_the_chosen_examples(lengths, data):
    encoded = ragged(lengths)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=30))
    selected = encoded.select(np.array(chosen, np.int64))
    assert len(selected) == len(chosen)
    np.testing.assert_array_equal(selected.lengths, [lengths[i] for i in chosen])
    for k, i in enumerate(chosen):
        for name in encoded.tokens:
            np.testing.assert_array_equal(tokens_of(selected, name, k), tokens_of(encoded, name, i))
        for name, column in encoded.examples.items():
            np.testing.assert_array_equal(selected.examples[name][k], column[i])
    assert selected.tokens['input_ids'].dtype == np.int32


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=10))
def test_ranges_are_the_concatenated_ranges(pairs):
    starts, lengths = (
        (np.array(column, np.int64) for column in zip(*pairs, strict=True))
        if (pairs)
        else (np.zeros(0, np.int64),) * 2
    )
    expected = [n for start, length in pairs for n in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == expected


def test_fingerprint_changes_with_any_content_and_with_nothing_else():
    encoded = ragged([3, 1, 4])
    same = ragged([3, 1, 4])
    assert encoded.fingerprint() == same.fingerprint()
    other_token = dict(encoded.tokens, input_ids=encoded.tokens['input_ids'] + 1)
    other_label = dict(encoded.examples, label=encoded.examples['label'][::-1].copy())
    other_bounds = np.array([0, 2, 4, 8])
    changed = [
        dataclasses.replace(encoded, tokens=other_token),
        dataclasses.replace(encoded, examples=other_label),
        dataclasses.replace(encoded, offsets=other_bounds),
        dataclasses.replace(encoded, examples={}),
        dataclasses.replace(encoded, examples={'class': encoded.examples['label']}),
    ]
    assert len({encoded.fingerprint(), *(item.fingerprint() for item in changed)}) == 6


@pytest.mark.parametrize(
    ('offsets', 'tokens', 'examples', 'message'),
    [
        ([0, 2, 1], 1, 2, 'ascending'),
        ([1, 2], 2, 1, 'begins with 0'),
        ([0, 2], 3, 1, "'input_ids' has shape .3,.*end at 2"),
        ([0, 2], 2, 3, "'label' has shape .3,.*1 examples"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(offsets, tokens, examples, message):
    with pytest.raises(ValueError, match=message):
        Encoded(
            {'input_ids': np.zeros(tokens, np.int32)},
            np.array(offsets),
            {'label': np.zeros(examples, np.int32)},
        )
