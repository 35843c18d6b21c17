import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax.data.batches import plan_epoch
from adapters_jax.data.policies import (
    Buckets,
    Packed,
    _bucket_bounds,
    choose_buckets,
    choose_packing,
    pack,
)


def lengths_like(kind, size=4000):
    """Token counts as in real data: questions, sentence pairs, pairs with long tails, documents."""
    rng = np.random.default_rng(1)
    mean, spread, low, high = {
        'questions': (2.55, 0.3, 5, 40),
        'pairs': (3.25, 0.35, 12, 128),
        'tailed': (4.1, 0.5, 20, 256),
        'documents': (6.5, 0.8, 50, 512),
    }[kind]
    return np.clip(rng.lognormal(mean, spread, size), low, high).astype(int)


KINDS = ['questions', 'pairs', 'tailed', 'documents']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('batch_size', [16, 32, 64])
def test_packing_pads_less_than_five_percent_at_the_batch_size_asked_for(kind, batch_size):
    lengths = lengths_like(kind)
    policy = choose_packing(lengths, batch_size, max_length=512)
    plan = plan_epoch(lengths, policy, seed=0, epoch=0, shuffle=True)
    assert plan.padding < 0.05
    assert policy.row_length % 8 == 0
    assert abs(plan.examples_per_batch[:-1].mean() / batch_size - 1) < 0.13


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('batch_size', [16, 32, 64])
def test_buckets_pad_less_than_twenty_percent(kind, batch_size):
    lengths = lengths_like(kind)
    policy = choose_buckets(lengths, batch_size)
    for shuffle in (False, True):
        plan = plan_epoch(lengths, policy, seed=0, epoch=0, shuffle=shuffle)
        assert plan.padding < 0.2
        assert len(plan.shapes) <= 6


def test_rows_come_in_the_multiple_asked_for_at_the_same_batch_size():
    lengths = lengths_like('questions')
    policy = choose_packing(lengths, 32, max_length=64, rows_multiple=8)
    plan = plan_epoch(lengths, policy, seed=0, epoch=0, shuffle=True)
    assert policy.rows % 8 == 0
    assert plan.padding < 0.05
    assert abs(plan.examples_per_batch[:-1].mean() - 32) < 4


def test_what_cannot_be_had_is_said(caplog):
    policy = choose_packing(np.full(500, 50), 4, max_length=56, rows_multiple=8)
    assert policy.rows == 8
    assert 'not 4: its rows hold' in caplog.text
    caplog.clear()
    choose_packing(np.full(500, 129), 32, max_length=129, max_padding=0.001)
    assert 'No packing of these lengths pads less than' in caplog.text
    caplog.clear()
    choose_buckets(np.arange(1, 500), 4, max_buckets=1)
    assert 'No 1 bucket lengths pad less than' in caplog.text


def test_rows_grow_where_the_longest_example_packs_badly():
    policy = choose_packing(np.full(1000, 65), 32, max_length=128)
    assert policy.row_length == 136  # 2 x 65 of 136; one of 72 would pad 10 %


def test_short_texts_get_finer_buckets():
    lengths = np.repeat([3, 5, 9], 320)
    assert choose_buckets(lengths, 32, max_padding=0.05).lengths == (3, 5, 9)
    assert choose_buckets(lengths, 32, max_padding=0.9).lengths == (8, 16)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.integers(1, 4),
    st.sampled_from([1, 2, 8]),
)
def test_bucket_bounds_are_the_best_there_are(lengths, most, multiple):
    lengths = np.array(lengths)
    candidates = sorted(set((-(-lengths // multiple) * multiple).tolist()))

    def cost(bounds):
        return np.array(bounds)[np.searchsorted(bounds, lengths)].sum()

    found = _bucket_bounds(lengths, most, multiple)
    sizes = range(1, min(most, len(candidates)) + 1)
    choices = itertools.chain(*(itertools.combinations(candidates, size) for size in sizes))
    assert len(found) <= most
    assert cost(found) == min(cost(bounds) for bounds in choices if bounds[-1] == candidates[-1])


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40), st.integers(1, 9)
)
def test_packed_rows_overflow_neither_tokens_nor_segments(lengths, row_length, segments):
    lengths = sorted(lengths, reverse=True)
    rows, count = pack(lengths, row_length, segments)
    assert sorted(set(rows.tolist())) == list(range(count))
    assert np.bincount(rows, lengths).max() <= row_length
    assert np.bincount(rows).max() <= segments


@pytest.mark.parametrize('values', [{'rows': 0}, {'row_length': 0}, {'max_segments': -1}])
def test_packed_must_be_positive(values):
    with pytest.raises(ValueError, match='must be positive'):
        Packed(**{'row_length': 8, 'rows': 8, 'max_segments': 8, **values})


@pytest.mark.parametrize(('lengths', 'size'), [((), 4), ((8, 16), 0), ((0, 8), 4), ((16, 8), 4)])
def test_buckets_must_be_positive_and_ascend(lengths, size):
    with pytest.raises(ValueError, match='must'):
        Buckets(lengths, size)


@pytest.mark.parametrize('choose', [choose_packing, choose_buckets])
def test_lengths_that_cannot_be_are_refused(choose):
    with pytest.raises(ValueError, match='has 90 tokens, but max_length is 64'):
        choose(np.array([5, 90]), 4, max_length=64)
    with pytest.raises(ValueError, match='must be positive'):
        choose(np.array([5, 0]), 4, max_length=64)
    with pytest.raises(ValueError, match='at least one'):
        choose(np.array([], int), 4, max_length=64)
