"""Windows over words: each word once, where it has most around it."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax.data.windows import Window, cut, largest_word


@st.composite
def sentences(draw):
    """The pieces of a sentence's words, and the room of a window."""
    room = draw(st.integers(1, 14))
    sizes = draw(st.lists(st.integers(1, largest_word(room)), max_size=40))
    return np.array(sizes, np.int64), room


def context(sizes, window, word):
    """How many pieces a word has on its poorer side; none are missing where a sentence ends."""
    left, right = sizes[window.begin : word].sum(), sizes[word + 1 : window.end].sum()
    whole = sizes.sum() + 1
    return min(left if window.begin else whole, right if window.end < len(sizes) else whole)


@given(sentences())
def test_every_word_counts_once_where_it_has_most_context(sentence):
    sizes, room = sentence
    found = cut(sizes, room)
    assert [w for one in found for w in range(one.first, one.last)] == list(range(len(sizes)))
    for one in found:
        assert sizes[one.begin : one.end].sum() <= room
        assert one.begin <= one.first <= one.last <= one.end
        for word in range(one.first, one.last):
            others = [context(sizes, w, word) for w in found if w.begin <= word < w.end]
            assert context(sizes, one, word) == max(others)


@given(sentences())
def test_windows_are_as_few_as_half_of_each_being_shared_allows(sentence):
    sizes, room = sentence
    found = cut(sizes, room)
    assert (len(found) == 1) == (sizes.sum() <= room)
    for one, after in itertools.pairwise(found):
        assert sizes[one.begin : one.end + 1].sum() > room  # full
        assert one.begin < after.begin <= one.end < after.end
        assert sizes[after.begin : one.end].sum() <= room // 2


def test_by_example():
    assert cut(np.array([1, 2, 1]), 4) == [Window(0, 3, 0, 3)]
    assert cut(np.array([], int), 4) == [Window(0, 0, 0, 0)]
    assert cut(np.ones(6, int), 4) == [Window(0, 4, 0, 3), Window(2, 6, 3, 6)]
