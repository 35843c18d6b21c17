"""The best spans, against a search through all of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax.data.encoded import Encoded
from adapters_jax.tasks import spans


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 12), st.integers(1, 15), st.integers(1, 9), st.integers(0, 10**6))
def test_the_best_pairs_are_those_of_a_full_search(width, longest, count, seed):
    starts, ends = np.random.default_rng(seed).normal(0, 1, (2, width))
    pairs = [(i, j) for i, j in itertools.product(range(width), repeat=2) if i <= j < i + longest]
    expected = sorted(pairs, key=lambda pair: -(starts[pair[0]] + ends[pair[1]]))[:count]
    assert sorted(spans.best_pairs(starts, ends, count, longest)) == sorted(expected)


def encoded(*windows):
    """Return windows of (row, characters of the context's pieces) as [CLS] q [SEP] pieces [SEP]."""
    lengths = [len(pieces) + 4 for _, pieces in windows]
    around = np.zeros((3, 2), np.int32), np.zeros((1, 2), np.int32)
    characters = [
        part
        for _, pieces in windows
        for part in (around[0], np.array(pieces).reshape(-1, 2), around[1])
    ]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Encoded(
        tokens={'input_ids': np.zeros(offsets[-1], np.int32)},
        offsets=offsets,
        examples={
            'first': np.full(len(windows), 3, np.int32),
            'last': np.array(lengths, np.int32) - 2,
        },
        aside={'characters': np.concatenate(characters).astype(np.int32)},
        rows=np.array([row for row, _ in windows], np.int64),
    )


WORDS = [(0, 3), (4, 7), (8, 11), (12, 15)]
CONTEXT = 'one two six ten'


def outputs_of(split, **best):
    """Return logits that are low but where `best` says: _NUMBER of a token, and its two."""
    logits = np.full((int(split.offsets[-1]), 2), -5.0)
    for key, values in best.items():
        logits[int(key[1:])] = values
    return logits


def test_windows_of_a_question_are_read_together():
    split = encoded((0, WORDS[:3]), (0, WORDS[2:]), (1, WORDS))
    # "two six" in the first window; "six" again, worse, in the second; [CLS] at 0, 7 and 13.
    logits = outputs_of(split, _0=(1, 1), _4=(3, 0), _5=(0, 4), _7=(-1, 0), _10=(2, 2), _13=(9, 9))
    found, other = spans.read(logits, split, [CONTEXT, CONTEXT], 3, longest=2)
    texts = [CONTEXT[span.start : span.end] for span in found.spans]
    assert texts == ['two six', 'six', 'two']
    assert [span.score for span in found.spans] == [7, 4, 3]
    # That there is none is believed least in the second window.
    assert (found.none.score, found.odds) == (-1, -8)
    assert other.none.score == 18 and other.odds == 28


def test_neither_question_nor_special_tokens_answer():
    split = encoded((0, WORDS))
    logits = outputs_of(split, _1=(50, 50), _2=(50, 50), _7=(50, 50), _4=(1, 1))
    (found,) = spans.read(logits, split, [CONTEXT], 50, longest=9)
    assert found.spans[0][:3] == (4, 7, 1)
    assert len(found.spans) == 10  # each pair of four words in order


def test_spans_are_trimmed_and_each_is_listed_once():
    context = ' a  b '
    split = encoded((0, [(0, 2), (2, 4), (3, 6)]))  # ' a', '  ', ' b '
    logits = outputs_of(split, _3=(1, 2), _4=(3, 3), _5=(2, 1))
    (found,) = spans.read(logits, split, [context], 9, longest=9)
    shown = {(span.start, span.end): span.score for span in found.spans}
    # 'a' comes of one piece or two; the blank piece alone is nothing.
    assert shown == {(1, 2): 4, (1, 5): 2, (4, 5): 4}
    assert [span.score for span in found.spans] == [4, 4, 2]


def test_a_context_without_pieces_has_no_spans():
    split = encoded((0, []))
    (found,) = spans.read(outputs_of(split, _0=(1, 2)), split, ['\u200b'], 5, longest=9)
    assert found.spans == [] and found.odds == 3


def test_shares_are_a_softmax_of_the_scores():
    listed = [spans.Span(0, 3, 1000.0, 1.0), spans.Span(0, 0, 999.0, 1.0)]
    best, none = spans.described(listed, CONTEXT)
    assert best['score'] == pytest.approx(1 / (1 + np.exp(-1)))
    assert best['score'] + none['score'] == pytest.approx(1)
    assert (best['text'], best['start'], best['end']) == ('one', 0, 3)
    assert (none['text'], none['start'], none['end']) == ('', None, None)
