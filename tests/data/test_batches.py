import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import ragged

from adapters_jax.data.batches import Buckets, Packed, assemble, choose_packing, plan_epoch

PAD = 77
LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=60)
POLICIES = st.one_of(
    st.builds(Packed, st.integers(16, 40), st.integers(1, 6), st.integers(1, 5)),
    st.builds(Buckets, st.just((4, 8, 16)), st.integers(1, 7)),
)


def all_batches(encoded, plan):
    return [assemble(encoded, plan, i, PAD) for i in range(len(plan))]


def width(policy):
    return policy.row_length if isinstance(policy, Packed) else policy.lengths[-1]


@settings(deadline=None)
@given(LENGTHS, POLICIES, st.integers(0, 99), st.booleans())
def test_unpacking_the_batches_gives_back_every_example_once(lengths, policy, epoch, shuffle):
    encoded = ragged(lengths)
    plan = plan_epoch(encoded.lengths, policy, 7, epoch, shuffle)
    seen = []
    for batch in all_batches(encoded, plan):
        for row, slot in np.argwhere(batch['example_mask']):
            i = batch['example_id'][row, slot]
            seen.append(i)
            part = slice(encoded.offsets[i], encoded.offsets[i + 1])
            start = batch['starts'][row, slot]
            here = slice(start, start + lengths[i])
            for name, column in encoded.tokens.items():
                np.testing.assert_array_equal(batch[name][row, here], column[part])
            for name, column in encoded.examples.items():
                np.testing.assert_array_equal(batch[name][row, slot], column[i])
    assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None)
@given(LENGTHS, POLICIES, st.integers(0, 99))
def test_segments_positions_and_padding(lengths, policy, epoch):
    encoded = ragged(lengths)
    plan = plan_epoch(encoded.lengths, policy, 7, epoch, True)
    tokens = 0
    for batch in all_batches(encoded, plan):
        segments, mask = batch['segments'], batch['example_mask']
        for row in range(len(segments)):
            count = int(mask[row].sum())
            assert mask[row, :count].all()
            ids = batch['example_id'][row, :count]
            expected = [(k + 1, p) for k, i in enumerate(ids) for p in range(lengths[i])]
            filled = len(expected)
            found = list(zip(segments[row], batch['positions'][row], strict=True))
            assert found[:filled] == expected
            assert not segments[row, filled:].any()
            assert not batch['positions'][row, filled:].any()
            assert not batch['token_type_ids'][row, filled:].any()
            assert (batch['input_ids'][row, filled:] == PAD).all()
            tokens += filled
        assert (batch['example_id'][~mask] == -1).all()
        assert not batch['starts'][~mask].any()
        assert not batch['label'][~mask].any()
        assert not batch['target'][~mask].any()
    assert tokens == sum(lengths)
    computed = sum(batch['segments'].size for batch in all_batches(encoded, plan))
    assert plan.padding == pytest.approx(1 - tokens / computed)


@settings(deadline=None)
@given(LENGTHS, POLICIES)
def test_shapes_dtypes_and_the_plans_own_account(lengths, policy):
    encoded = ragged(lengths)
    plan = plan_epoch(encoded.lengths, policy, 0, 0, True)
    batches = all_batches(encoded, plan)
    shapes = {(*b['input_ids'].shape, b['example_mask'].shape[1]) for b in batches}
    assert shapes == plan.shapes
    assert len(shapes) <= (1 if isinstance(policy, Packed) else len(policy.lengths))
    assert all(t <= width(policy) for _, t, _ in shapes)
    counts = [int(batch['example_mask'].sum()) for batch in batches]
    assert counts == plan.examples_per_batch.tolist()
    assert min(counts) > 0
    for batch in batches:
        for name in ('input_ids', 'token_type_ids', 'positions', 'segments'):
            assert batch[name].dtype == np.int32
            assert batch[name].shape == batch['input_ids'].shape
        for name in ('starts', 'example_id', 'label'):
            assert batch[name].dtype == np.int32
            assert batch[name].shape == batch['example_mask'].shape
        assert batch['example_mask'].dtype == bool
        assert batch['target'].dtype == np.float32
        assert batch['target'].shape == (*batch['example_mask'].shape, 3)


@settings(deadline=None)
@given(LENGTHS, POLICIES, st.integers(1, 6), st.booleans())
def test_parts_of_the_rows_make_up_the_whole_batch(lengths, policy, parts, shuffle):
    encoded = ragged(lengths)
    plan = plan_epoch(encoded.lengths, policy, 3, 2, shuffle)
    bounds = np.linspace(0, plan.rows, parts + 1).astype(int)
    for index in range(len(plan)):
        whole = assemble(encoded, plan, index, PAD)
        pieces = [
            assemble(encoded, plan, index, PAD, (int(first), int(last)))
            for first, last in itertools.pairwise(bounds)
        ]
        for name, array in whole.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), array)


def same(one, other):
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
    )


@pytest.mark.parametrize('policy', [Packed(32, 4, 5), Buckets((8, 16), 8)])
def test_order_depends_on_seed_and_epoch_and_on_nothing_else(policy):
    lengths = np.random.default_rng(0).integers(1, 17, 200)
    plan = plan_epoch(lengths, policy, 5, 3, True)
    np.random.default_rng(1).random(9)
    assert same(plan, plan_epoch(lengths.copy(), policy, 5, 3, True))
    for seed, epoch in ((5, 4), (6, 3), (3, 5)):
        other = plan_epoch(lengths, policy, seed, epoch, True)
        assert not np.array_equal(plan.example, other.example)
        assert len(other) == len(plan)
    unshuffled = plan_epoch(lengths, policy, 5, 3, False)
    assert same(unshuffled, plan_epoch(lengths, policy, 6, 9, False))


# In buckets an example's neighbours are those of like length: here about a sixth of all.
@pytest.mark.parametrize(('policy', 'most'), [(Packed(32, 4, 5), 150), (Buckets((8, 16), 8), 50)])
def test_shuffling_moves_an_example_all_over_the_epoch(policy, most):
    lengths = np.random.default_rng(0).integers(1, 17, 400)
    places = []
    neighbours = set()
    for epoch in range(100):
        plan = plan_epoch(lengths, policy, 0, epoch, True)
        batch = np.searchsorted(plan.first, np.flatnonzero(plan.example == 9), 'right')[0] - 1
        places.append(batch / len(plan))
        neighbours |= set(plan.example[plan.first[batch] : plan.first[batch + 1]].tolist())
    assert abs(np.mean(places) - 0.5) < 0.1
    assert min(places) < 0.1
    assert max(places) > 0.85
    assert len(neighbours) > most


def test_only_the_last_batch_has_empty_rows():
    lengths = np.random.default_rng(0).integers(1, 17, 203)
    for policy in (Packed(16, 8, 4), Buckets((4, 8, 16), 8)):
        encoded = ragged(lengths)
        for shuffle in (False, True):
            plan = plan_epoch(lengths, policy, 0, 1, shuffle)
            used = [b['example_mask'].any(axis=1) for b in all_batches(encoded, plan)]
            assert all(rows.all() for rows in used[:-1])


@pytest.mark.parametrize(
    ('lengths', 'message'),
    [
        ([5, 40], 'hold examples of 1 to 16 .* 2 have 5 to 40'),
        ([0, 5], '0 to 5'),
        ([], 'no examples'),
    ],
)
def test_examples_that_do_not_fit_are_refused(lengths, message):
    for policy in (Packed(16, 4, 4), Buckets((8, 16), 4)):
        with pytest.raises(ValueError, match=message):
            plan_epoch(np.array(lengths, int), policy, 0, 0, False)


def test_a_large_epoch_is_planned_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(3.2, 0.6, 400_000), 4, 128).astype(int)
    begin = time.perf_counter()
    policy = choose_packing(lengths, 32, max_length=128)
    plan = plan_epoch(lengths, policy, 0, 0, True)
    # 0.4 s on one core; the bound is for a busy machine.
    assert time.perf_counter() - begin < 8
    assert plan.padding < 0.05
    np.testing.assert_array_equal(np.sort(plan.example), np.arange(400_000))
