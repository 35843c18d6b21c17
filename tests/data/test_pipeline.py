import dataclasses
import itertools
import json
import os
import signal
import threading

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import ragged

from adapters_jax.data import pipeline
from adapters_jax.data.batches import Buckets, Packed, plan_epoch
from adapters_jax.data.pipeline import Position, eval_batches, rows_of, train_batches

LENGTHS = np.random.default_rng(0).integers(1, 17, 90)
ENCODED = ragged(LENGTHS)
POLICIES = [Packed(32, 4, 6), Buckets((4, 8, 16), 8)]
EACH_POLICY = pytest.mark.parametrize('policy', POLICIES)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(one, other):
    assert [position for position, _ in one] == [position for position, _ in other]
    for (_, first), (_, second) in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for name, array in first.items():
            assert array.dtype == second[name].dtype
            np.testing.assert_array_equal(array, second[name])


@EACH_POLICY
def test_every_epoch_has_every_example_once_in_its_own_order(policy):
    count = len(plan_epoch(LENGTHS, policy, 1, 0, True))
    items = take(train_batches(ENCODED, policy, 1, pad_id=0), 3 * count)
    assert [p for p, _ in items] == [Position(e, i) for e in range(3) for i in range(count)]
    orders = []
    for epoch in range(3):
        ids = [b['example_id'][b['example_mask']] for p, b in items if p.epoch == epoch]
        orders.append(np.concatenate(ids).tolist())
        assert sorted(orders[-1]) == list(range(90))
    assert orders[0] != orders[1] != orders[2] != orders[0]


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(POLICIES), st.integers(0, 60), st.integers(0, 60))
def test_a_restored_iterator_repeats_every_later_batch(policy, saved_at, elsewhere):
    iterator = train_batches(ENCODED, policy, 3, pad_id=9)
    take(iterator, saved_at)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 12)
    fresh = train_batches(ENCODED, policy, 3, pad_id=9)
    take(fresh, elsewhere)
    fresh.set_state(state)
    assert_same(take(fresh, 12), expected)


def test_orbax_saves_and_restores_the_position(tmp_path):
    iterator = train_batches(ENCODED, POLICIES[0], 3, pad_id=0)
    take(iterator, 17)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = take(iterator, 5)
        fresh = train_batches(ENCODED, POLICIES[0], 3, pad_id=0)
        manager.restore(1, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert_same(take(fresh, 5), expected)


def cut(policy, processes):
    """Return the rows of each of so many processes."""
    share = rows_of(policy) // processes
    return [(share * p, share * (p + 1)) for p in range(processes)]


@EACH_POLICY
@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_the_rows_of_the_same_batches(policy, processes):
    whole = take(train_batches(ENCODED, policy, 3, pad_id=5), 30)
    shares = [
        take(train_batches(ENCODED, policy, 3, pad_id=5, rows=rows), 30)
        for rows in cut(policy, processes)
    ]
    joined = [
        (parts[0][0], {k: np.concatenate([b[k] for _, b in parts]) for k in parts[0][1]})
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)


def test_a_position_saved_on_one_process_continues_on_two():
    iterator = train_batches(ENCODED, POLICIES[0], 3, pad_id=0)
    take(iterator, 11)
    state = iterator.get_state()
    expected = next(iterator)
    second = train_batches(ENCODED, POLICIES[0], 3, pad_id=0, rows=(2, 4))
    second.set_state(state)
    position, batch = next(second)
    assert position == expected[0]
    np.testing.assert_array_equal(batch['input_ids'], expected[1]['input_ids'][2:])


@EACH_POLICY
def test_threads_and_prefetch_change_nothing(policy):
    one = take(train_batches(ENCODED, policy, 2, pad_id=0, threads=0, prefetch=0), 40)
    assert_same(take(train_batches(ENCODED, policy, 2, 0, threads=8, prefetch=32), 40), one)


@EACH_POLICY
def test_evaluation_sees_every_example_once_and_can_be_repeated(policy):
    batches = eval_batches(ENCODED, policy, pad_id=0)
    first, second = list(batches), list(batches)
    ids = np.concatenate([b['example_id'][b['example_mask']] for b in first])
    assert sorted(ids.tolist()) == list(range(90))
    assert_same([(None, b) for b in first], [(None, b) for b in second])
    labels = np.concatenate([b['label'][b['example_mask']] for b in first])
    np.testing.assert_array_equal(labels, ENCODED.examples['label'][ids])


@EACH_POLICY
def test_evaluation_on_several_processes_is_exact(policy):
    shares = [list(eval_batches(ENCODED, policy, pad_id=0, rows=rows)) for rows in cut(policy, 4)]
    assert len({len(share) for share in shares}) == 1
    ids = [b['example_id'][b['example_mask']] for share in shares for b in share]
    assert sorted(np.concatenate(ids).tolist()) == list(range(90))


def test_a_process_may_have_no_row():
    _, batch = next(train_batches(ENCODED, POLICIES[0], 3, pad_id=0, rows=(4, 4)))
    assert {len(column) for column in batch.values()} == {0}


def spoilt(monkeypatch, at, become):
    """Let the assembling of batch number `at` become something else."""
    assemble = pipeline.assemble

    def spoil(encoded, plan, index, *rest):
        return become() if index == at else assemble(encoded, plan, index, *rest)

    monkeypatch.setattr(pipeline, 'assemble', spoil)


def fail():
    raise MemoryError('no memory left')


@pytest.mark.parametrize('make', [lambda *given: iter(eval_batches(*given)), None])
def test_a_worker_that_fails_is_told_of(monkeypatch, make):
    spoilt(monkeypatch, 3, fail)
    stream = make(ENCODED, POLICIES[0], 0) if make else train_batches(ENCODED, POLICIES[0], 1, 0)
    assert len(take(stream, 3)) == 3
    expected = r'a data worker failed \(MemoryError: no memory left\); the same command goes on'
    with pytest.raises(pipeline.WorkerError, match=expected) as caught:
        next(stream)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_a_worker_that_hangs_is_not_waited_for_forever(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(pipeline, 'PATIENCE', 0.3)
    spoilt(monkeypatch, 3, release.wait)
    before = signal.getsignal(signal.SIGALRM)
    stream = train_batches(ENCODED, POLICIES[0], 1, 0)
    try:
        assert len(take(stream, 3)) == 3
        with pytest.raises(pipeline.HungWorkerError, match=r'no data worker made a batch in 0.3 s'):
            next(stream)
    finally:
        release.set()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_mapped_file_that_is_cut_while_it_is_read(tmp_path):
    """Reading it on would end the process with SIGBUS; one that is deleted can be read on."""
    values = np.arange(LENGTHS.sum() * 1024, dtype=np.float32).reshape(-1, 1024)
    path = tmp_path / 'numbers'
    values.tofile(path)
    mapped = np.memmap(path, np.float32, 'r', shape=values.shape).view(np.ndarray)
    stored = dataclasses.replace(ENCODED, tokens=ENCODED.tokens | {'trunk': mapped})
    path.unlink()
    assert len(list(eval_batches(stored, POLICIES[0], 0))) > 4
    values.tofile(path)
    mapped = np.memmap(path, np.float32, 'r', shape=values.shape).view(np.ndarray)
    stored = dataclasses.replace(ENCODED, tokens=ENCODED.tokens | {'trunk': mapped})
    stream = train_batches(stored, POLICIES[0], 1, 0, prefetch=1)
    next(stream)
    os.truncate(path, 4096)
    with pytest.raises(pipeline.WorkerError, match=r'numbers has been cut to 4096 bytes of \d+'):
        take(stream, 3)
