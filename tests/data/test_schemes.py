"""Spans as tags: whatever the scheme, the same spans come back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax.data import schemes
from adapters_jax.data.schemes import Span

TYPES = st.sampled_from(['PER', 'creative-work', ''])
LETTERS = st.sampled_from([f'{letter}-{kind}' for letter in 'BIESLU' for kind in ('PER', 'LOC')])
ANY_TAGS = st.lists(st.one_of(st.just('O'), LETTERS), max_size=12)
NAMES = st.sampled_from(list(schemes.SCHEMES))


@st.composite
def sentences(draw):
    """Spans that do not overlap, some next to each other, and the length of their sentence."""
    found, place = [], draw(st.integers(0, 2))
    for _ in range(draw(st.integers(0, 5))):
        last = place + draw(st.integers(0, 3))
        found.append(Span(draw(TYPES), place, last))
        place = last + 1 + draw(st.integers(0, 2))
    return found, place


@given(sentences(), NAMES, NAMES)
def test_conversions_keep_the_spans(sentence, first, second):
    found, length = sentence
    tags = schemes.tags_of(found, length, first)
    assert schemes.spans(tags) == found
    other = schemes.convert(tags, first, second)
    assert len(other) == length and schemes.spans(other) == found
    assert other == schemes.tags_of(found, length, second)
    assert schemes.convert(other, second, first) == tags
    assert schemes.flaws([tags], first) == []


@given(st.lists(sentences(), min_size=1, max_size=4), NAMES)
def test_a_scheme_is_recognised_by_what_it_writes(several, scheme):
    tags = [schemes.tags_of(found, length, scheme) for found, length in several]
    found = schemes.detect(tags)
    # Where a scheme cannot be told from the tags, the one that is found writes the same ones.
    again = [schemes.tags_of(own, length, found) for own, length in several]
    assert again == tags
    letters = {tag[0] for sentence in tags for tag in sentence}
    if {'I', 'E'} <= letters or {'I', 'L'} <= letters or letters & {'S', 'U'}:
        assert found == scheme


@given(ANY_TAGS, NAMES)
def test_tags_that_are_not_well_formed_are_mended_once(tags, scheme):
    new = schemes.convert(tags, scheme, scheme)
    assert schemes.spans(new) == schemes.spans(tags)
    assert schemes.convert(new, scheme, scheme) == new
    assert [tag == 'O' for tag in new] == [tag == 'O' for tag in tags]
    wrong = [place for _, place in schemes.flaws([tags], scheme)]
    assert wrong == [i for i, tag in enumerate(tags) if tag != new[i]]


@pytest.mark.parametrize(
    ('tags', 'expected'),
    [
        (['B-X', 'I-X', 'O', 'B-X'], 'bio'),
        (['I-X', 'I-X', 'O', 'I-Y'], 'iob1'),
        (['I-X', 'B-X', 'I-X', 'O'], 'iob1'),
        (['B-X', 'I-X', 'O', 'B-Y', 'O', 'I-Y'], 'bio'),  # with one mistake
        (['O', 'O'], 'bio'),
        (['B', 'I', 'O'], 'bio'),
        (['S-X', 'O', 'B-X', 'E-X'], 'iobes'),
        (['U-X', 'O', 'B-X', 'L-X'], 'bilou'),
        (['NOUN', 'O', 'B-X'], 'none'),
        (['S-X', 'U-X'], 'none'),
        (['B_X', 'I_X'], 'none'),
    ],
)
def test_schemes_by_example(tags, expected):
    assert schemes.detect([tags]) == expected


def test_what_is_not_known_or_no_span_stays_as_it_is():
    tags = ['I-X', '', 'I-X', 'O']
    assert schemes.convert(tags, 'iob1', 'iobes') == ['S-X', '', 'S-X', 'O']
    assert schemes.detect([tags]) == 'iob1'
    assert schemes.convert(['NOUN', ''], 'none', 'none') == ['NOUN', '']
    with pytest.raises(ValueError, match="the tag 'NOUN' is of no scheme"):
        schemes.spans(['O', 'NOUN'])


def test_the_labels_of_a_scheme_are_all_that_a_span_may_have():
    assert schemes.labels(['Y', 'X'], 'bio') == ['O', 'B-X', 'I-X', 'B-Y', 'I-Y']
    assert schemes.labels([''], 'iobes') == ['O', 'B', 'I', 'E', 'S']


@pytest.mark.parametrize(
    ('labels', 'expected'),
    [
        (['O', 'B-X', 'I-X', 'B-Y'], 'bio'),
        (['O', 'B-X', 'E-X'], 'iobes'),
        (['O', 'B-X', 'L-X'], 'none'),
        (['NOUN', 'O'], 'none'),
    ],
)
def test_labels_say_their_scheme(labels, expected):
    assert schemes.of_labels(labels) == expected
