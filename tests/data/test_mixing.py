import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import ragged

from adapters_jax.data.batches import assemble
from adapters_jax.data.mixing import Mixer, join
from adapters_jax.data.pipeline import Plans, rows_of, train_batches
from adapters_jax.data.policies import (
    WINDOW,
    Buckets,
    Packed,
    choose_packing,
    choose_shared_buckets,
    choose_shared_packing,
)
from adapters_jax.data.shares import SCHEDULES, Mixing

PAD = 77
POLICIES = [Packed(32, 5, 6), Buckets((4, 8, 16), 7)]
EACH_POLICY = pytest.mark.parametrize('policy', POLICIES)
TASKS = st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=40), min_size=1, max_size=4)
MIXINGS = st.builds(
    Mixing, st.sampled_from(SCHEDULES[:4]), epochs=st.integers(1, 4), steps=st.integers(0, 9)
)


def joined(groups):
    return join([ragged(lengths, seed) for seed, lengths in enumerate(groups)])


def mixer(encoded, policy, mixing, seed=7):
    return Mixer(encoded.lengths, encoded.examples['task'], policy, seed, mixing)


def rng_groups(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 17, size).tolist() for size in sizes]


def test_joined_sets_come_apart_again():
    sets = [ragged(lengths, seed) for seed, lengths in enumerate(rng_groups([5, 9, 1]))]
    whole = join(sets)
    for number, one in enumerate(sets):
        part = whole.select(np.flatnonzero(whole.examples['task'] == number))
        for group in ('tokens', 'examples'):
            for name, column in getattr(one, group).items():
                np.testing.assert_array_equal(getattr(part, group)[name], column)
        np.testing.assert_array_equal(part.lengths, one.lengths)
    assert whole.examples['task'].dtype == whole.examples['label'].dtype == np.int32


def numbered(labels, dtype):
    one = ragged([3] * len(labels))
    return dataclasses.replace(one, examples={'label': np.array(labels, dtype)})


def test_classes_and_numbers_share_a_column_without_loss():
    whole = join([numbered([0, 2**24], np.int32), numbered([0.1, -3.5], np.float32)])
    assert whole.examples['label'].dtype == np.float32
    expected = [0, 2**24, np.float32(0.1), -3.5]
    assert whole.examples['label'].astype(np.float64).tolist() == [float(x) for x in expected]
    with pytest.raises(ValueError, match='16777217, too large'):
        join([numbered([0, 2**24 + 1], np.int32), numbered([0.1], np.float32)])


def test_sets_with_other_columns_are_refused():
    with pytest.raises(ValueError, match=r"another one \['input_ids', 'label', 'token_type_ids'\]"):
        join([ragged([3, 4]), numbered([1], np.int32)])


@settings(deadline=None, max_examples=40)
@given(TASKS, st.sampled_from(POLICIES), MIXINGS, st.integers(0, 5))
def test_every_row_holds_whole_texts_of_one_task_and_says_which(groups, policy, mixing, epoch):
    encoded = joined(groups)
    plan = mixer(encoded, policy, mixing)(epoch)
    for index in range(len(plan)):
        batch = assemble(encoded, plan, index, PAD)
        mask = batch['example_mask']
        assert batch['adapter'].shape == (plan.rows,) and batch['adapter'].dtype == np.int32
        assert (np.diff(batch['adapter']) >= 0).all() and batch['adapter'].min() >= 0
        assert mask[:, 0].all()  # no row is empty, in the last batch neither
        np.testing.assert_array_equal(
            batch['task'][mask], np.broadcast_to(batch['adapter'][:, None], mask.shape)[mask]
        )
        for row, slot in np.argwhere(mask):
            i, start = batch['example_id'][row, slot], batch['starts'][row, slot]
            text = encoded.tokens['input_ids'][encoded.offsets[i] : encoded.offsets[i + 1]]
            here = slice(start, start + len(text))
            np.testing.assert_array_equal(batch['input_ids'][row, here], text)
            assert (batch['segments'][row, here] == slot + 1).all()
            assert batch['label'][row, slot] == encoded.examples['label'][i]
        assert (batch['segments'] > 0).sum() == encoded.lengths[batch['example_id'][mask]].sum()
    assert plan.padding < 1 and len(plan) == mixer(encoded, policy, mixing).batches


def test_a_row_that_a_process_pads_has_no_adapter():
    encoded = joined([[3, 4, 5], [6]])
    plan = mixer(encoded, Packed(16, 2, 4), Mixing())(0)
    emptied = dataclasses.replace(plan, rows=3)
    assert assemble(encoded, emptied, 0, PAD)['adapter'].tolist() == [0, 1, -1]


@settings(deadline=None, max_examples=40)
@given(TASKS, MIXINGS)
def test_rows_follow_the_shares_at_every_batch_to_one_row(groups, mixing):
    encoded, policy = joined(groups), POLICIES[0]
    mixed = mixer(encoded, policy, mixing)
    task, sizes = encoded.examples['task'], mixed.sizes
    passes = np.array([passes_of(lengths, policy) for lengths in groups])
    owed = np.zeros(len(groups))
    for epoch in range(4):
        share = mixing.of(sizes, epoch) * passes / sizes
        total = len(mixed(epoch)) * policy.rows
        owed += total * share / share.sum()
        before, counts = mixed.rows(epoch)
        assert counts.sum() == total
        # Nothing is owed to a task for longer than an epoch.
        assert np.abs(owed - before - counts).max() < 2
        had = np.cumsum(rows_by_task(mixed(epoch), task, len(groups)), axis=0)
        wanted = np.arange(1, len(had) + 1)[:, None] * counts / len(had)
        assert np.abs(had - wanted).max() < 1


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_rows_of_an_epoch_are_the_same_in_whatever_order_epochs_are_asked_for(epochs):
    encoded = joined([[3] * 7, [5] * 40])
    mixing = Mixing(steps=3)
    asked = mixer(encoded, POLICIES[0], mixing)
    for epoch in epochs:
        found, expected = asked.rows(epoch), mixer(encoded, POLICIES[0], mixing).rows(epoch)
        np.testing.assert_array_equal(found, expected)


def passes_of(lengths, policy):
    """Return how many rows hold a task's examples once."""
    alone = join([ragged(lengths)])
    return mixer(alone, dataclasses.replace(policy, rows=1), Mixing()).batches


def rows_by_task(plan, task, tasks):
    """Return how many rows each batch has of each task, [M, A]."""
    new = plan.slot == 0
    batch = np.repeat(np.arange(len(plan)), plan.examples_per_batch)[new]
    counts = np.zeros((len(plan), tasks), int)
    np.add.at(counts, (batch, task[plan.example[new]]), 1)
    return counts


@pytest.mark.parametrize('schedule', SCHEDULES[:4])
@EACH_POLICY
def test_examples_come_in_the_shares_of_the_schedule(policy, schedule):
    encoded = joined(rng_groups([900, 90, 210]))
    mixing = Mixing(schedule, epochs=3)
    mixed = mixer(encoded, policy, mixing)
    for epoch in range(3):
        seen = np.bincount(encoded.examples['task'][mixed(epoch).example])
        share = mixing.of(mixed.sizes, epoch)
        # A packed row's number of examples varies around its task's mean.
        tolerance = 0.03 if isinstance(policy, Packed) else 1 / seen.sum() + 1e-9
        assert np.abs(seen / seen.sum() - share).max() <= tolerance


@settings(deadline=None, max_examples=40)
@given(TASKS, st.sampled_from(POLICIES), MIXINGS)
def test_no_example_comes_again_before_all_of_its_task_have_come(groups, policy, mixing):
    encoded = joined(groups)
    mixed = mixer(encoded, policy, mixing)
    used = np.zeros(len(encoded), int)
    for epoch in range(4):
        plan = mixed(epoch)
        for index in range(len(plan)):
            entries = slice(plan.first[index], plan.first[index + 1])
            np.add.at(used, plan.example[entries], 1)
            # With buckets the order within a window of batches is that of the lengths.
            if isinstance(policy, Packed) or index == len(plan) - 1:
                check_even(used, encoded.examples['task'])


def check_even(used, task):
    for number in range(task.max() + 1):
        assert np.ptp(used[task == number]) <= 1


def test_buckets_are_even_at_the_end_of_every_window():
    encoded = joined(rng_groups([700, 40]))
    mixed = mixer(encoded, Buckets((4, 8, 16), 2), Mixing('uniform'))
    used, plan = np.zeros(len(encoded), int), mixed(0)
    windows = round(len(plan) / WINDOW)
    assert windows == 6
    ends = [
        i for i in range(len(plan)) if i * windows // len(plan) != (i + 1) * windows // len(plan)
    ]
    for begin, end in itertools.pairwise([-1, *ends]):
        np.add.at(used, plan.example[plan.first[begin + 1] : plan.first[end + 1]], 1)
        check_even(used, encoded.examples['task'])
        counts = np.bincount(encoded.examples['task'][plan.example[: plan.first[end + 1]]])
        assert abs(counts[0] - counts[1]) < 2


@EACH_POLICY
def test_equal_shares_of_all_examples_are_one_pass_an_epoch(policy):
    encoded = joined(rng_groups([200, 70, 130]))
    mixed = mixer(encoded, policy, Mixing('proportional'))
    used = np.zeros(len(encoded), int)
    for epoch in range(8):
        np.add.at(used, mixed(epoch).example, 1)
    # Eight of each, and what the rounding of an epoch up to whole batches adds to that.
    assert used.min() >= 8 and used.max() <= 9


def same(one, other):
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for field in dataclasses.fields(one)
    )


@EACH_POLICY
def test_a_plan_depends_on_seed_and_epoch_and_on_nothing_else(policy):
    encoded, mixing = joined(rng_groups([60, 25])), Mixing('annealed', epochs=5)
    one, two = mixer(encoded, policy, mixing), mixer(encoded, policy, mixing)
    in_order = [one(epoch) for epoch in range(5)]
    for epoch in (4, 1, 3, 0, 2):
        assert same(two(epoch), in_order[epoch])
    assert len({len(plan) for plan in in_order}) == 1
    examples = [plan.example.tolist() for plan in in_order]
    assert all(a != b for a, b in itertools.combinations(examples, 2))
    assert mixer(encoded, policy, mixing, seed=8)(0).example.tolist() != examples[0]


@EACH_POLICY
def test_a_restored_iterator_repeats_every_later_batch(policy):
    encoded, mixing = joined(rng_groups([60, 25])), Mixing('annealed', epochs=3)

    def make(**shared):
        return train_batches(encoded, policy, 3, pad_id=PAD, mixing=mixing, **shared)

    iterator = make()
    list(itertools.islice(iterator, 5))
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(itertools.islice(iterator, 30))
    assert {position.epoch for position, _ in expected} >= {1, 2}
    fresh = make()
    fresh.set_state(state)
    check_same(itertools.islice(fresh, 30), expected)
    # The position is the number of a batch, so it says nothing of threads or processes.
    parts = [make(rows=(i, i + 1), threads=1) for i in range(rows_of(policy))]
    for part in parts:
        part.set_state(state)
    merged = [
        (items[0][0], {k: np.concatenate([b[k] for _, b in items]) for k in items[0][1]})
        for items in zip(*(itertools.islice(part, 10) for part in parts), strict=True)
    ]
    check_same(merged, expected[:10])


def check_same(found, expected):
    for (position, batch), (wanted, other) in zip(found, expected, strict=True):
        assert position == wanted and batch.keys() == other.keys()
        for name, column in batch.items():
            np.testing.assert_array_equal(column, other[name])


def like_glue(scale=1):
    """Return lengths as those of RTE, STS-B and SST-2: few long texts, many short ones."""
    rng, facts = np.random.default_rng(0), ((2490, 65, 0.5), (5749, 30, 0.4), (20000, 12, 0.5))
    return [
        np.clip(rng.lognormal(np.log(mean), spread, count // scale), 4, 128).astype(int)
        for count, mean, spread in facts
    ]


@pytest.mark.parametrize('schedule', ['proportional', 'uniform', 'annealed'])
def test_padding_stays_below_5_percent_packed_and_20_percent_in_buckets(schedule):
    groups, mixing = like_glue(), Mixing(schedule, epochs=3)
    encoded = joined(groups)
    shares = mixing.average(np.array([len(group) for group in groups]))
    packed = choose_shared_packing(groups, shares, 32, max_length=128)
    plans = [Plans(encoded, packed, 0, mixing)(epoch) for epoch in range(3)]
    assert max(plan.padding for plan in plans) < 0.05
    examples = np.mean([plan.examples_per_batch.mean() for plan in plans])
    assert abs(examples - 32) < 3.2
    buckets = choose_shared_buckets(groups, shares, 32)
    plans = [Plans(encoded, buckets, 0, mixing)(epoch) for epoch in range(3)]
    assert np.mean([plan.padding for plan in plans]) < 0.2
    assert len(set.union(*(plan.shapes for plan in plans))) <= 10


def test_the_packing_of_one_group_is_the_packing_of_its_lengths():
    for lengths in like_glue(10):
        one = choose_shared_packing([lengths], np.ones(1), 32, 128, 2)
        assert one == choose_packing(lengths, 32, 128, 2)


def test_a_large_epoch_is_planned_too():
    groups = like_glue()
    encoded = joined([*groups, np.tile(groups[2], 15)])
    mixed = mixer(encoded, Packed(128, 8, 24), Mixing('annealed', epochs=5))
    assert len(encoded) > 300_000 and mixed(2).padding < 0.05


def test_a_task_without_examples_or_with_too_long_ones_is_refused():
    encoded = joined([[3, 4], [20]])
    with pytest.raises(ValueError, match='hold examples of 1 to 16 tokens, but these 1 have 20'):
        mixer(encoded, Packed(16, 2, 4), Mixing())
    task = np.array([0, 2])
    with pytest.raises(ValueError, match='no examples'):
        Mixer(np.array([3, 4]), task, Packed(16, 2, 4), 0, Mixing())
