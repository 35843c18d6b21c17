"""Arrays on disk: whole or not there, checked, shared by processes, refused where too large."""

import collections
import json
import logging
import multiprocessing
import os
import resource
import signal
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from adapters_jax import files
from adapters_jax.data import stored
from adapters_jax.data.stored import HEADER, NUMBERS, Stored, check_room, readable

SHAPE = (700, 2, 8)


def numbers(dtype=np.float32):
    return np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)


def make(tmp_path, dtype=np.float32, of=None, shape=SHAPE):
    return Stored(tmp_path / 'array', shape, np.dtype(dtype), of or {'text': 'abc'})


def fill(array):
    array[:] = numbers(array.dtype)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != files.LOCK_FILE)


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_what_is_stored_is_read_bit_by_bit_and_cannot_be_changed(tmp_path, dtype):
    written = make(tmp_path, dtype).make(fill)
    read = make(tmp_path, dtype).read()
    for array in (written, read):
        assert array.dtype == dtype and array.shape == SHAPE
        assert array.tobytes() == numbers(dtype).tobytes()
        with pytest.raises(ValueError, match='read-only'):
            array[0] = 0
    assert names(tmp_path / 'array') == [HEADER, NUMBERS]
    assert (tmp_path / 'array' / NUMBERS).stat().st_size == make(tmp_path, dtype).nbytes


def test_nothing_is_there_before_and_nothing_is_filled_twice(tmp_path, caplog):
    assert make(tmp_path).read() is None
    calls = collections.Counter()

    def counted(array):
        calls['fill'] += 1
        fill(array)

    for _ in range(3):
        make(tmp_path).make(counted)
    assert calls['fill'] == 1 and not caplog.records


def test_a_failure_while_filling_leaves_nothing(tmp_path):
    def fail(array):
        array[:5] = 1
        raise KeyError('broken off')

    with pytest.raises(KeyError, match='broken off'):
        make(tmp_path).make(fail)
    assert names(tmp_path / 'array') == [] and make(tmp_path).read() is None


def die(folder):
    def fail(array):
        array[:5] = 1
        os.kill(os.getpid(), signal.SIGKILL)

    make(folder).make(fail)


def test_a_kill_while_filling_leaves_nothing_that_is_read_and_the_next_one_clears_up(tmp_path):
    process = multiprocessing.get_context('spawn').Process(target=die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = names(tmp_path / 'array')
    assert left.endswith('.tmp') and make(tmp_path).read() is None
    np.testing.assert_array_equal(make(tmp_path).make(fill), numbers())
    assert names(tmp_path / 'array') == [HEADER, NUMBERS]


def cut(folder):
    os.truncate(folder / NUMBERS, 1000)


def blank(folder):
    with (folder / NUMBERS).open('r+b') as file:
        file.write(bytes(1000))


def change_the_end(folder):
    with (folder / NUMBERS).open('r+b') as file:
        file.seek(-3, os.SEEK_END)
        file.write(b'xyz')


def remove_numbers(folder):
    (folder / NUMBERS).unlink()


def break_header(folder):
    (folder / HEADER).write_bytes(b'{"of": \xff')


def other_header(folder):
    header = json.loads((folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header | {'shape': [1, 2, 8]}))


def no_object(folder):
    (folder / HEADER).write_text('[]')


FLAWS = {
    cut: 'has 1000 bytes instead of 44800',
    blank: 'other numbers than were written',
    change_the_end: 'other numbers than were written',
    remove_numbers: 'No such file',
    break_header: 'codec',
    other_header: 'describes another array',
    no_object: 'describes another array',
}


@pytest.mark.parametrize('damage', FLAWS)
def test_damage_is_said_and_mended(tmp_path, caplog, damage):
    make(tmp_path).make(fill)
    damage(tmp_path / 'array')
    assert make(tmp_path).read() is None
    (message,) = caplog.messages
    assert FLAWS[damage] in message and 'computing it again' in message
    np.testing.assert_array_equal(make(tmp_path).make(fill), numbers())
    np.testing.assert_array_equal(make(tmp_path).read(), numbers())


def test_an_array_of_something_else_is_none(tmp_path):
    make(tmp_path).make(fill)
    assert make(tmp_path, of={'text': 'other'}).read() is None
    assert make(tmp_path, ml_dtypes.bfloat16).read() is None
    assert make(tmp_path, shape=(2, *SHAPE[:1], 8)).read() is None
    assert make(tmp_path).read() is not None


def fill_slowly(folder, log):
    def slow(array):
        with log.open('a') as file:
            file.write('filled\n')
        time.sleep(0.5)
        fill(array)

    read = make(folder).make(slow)
    assert read.tobytes() == numbers().tobytes()


def test_of_two_processes_one_writes_and_the_other_waits(tmp_path):
    context = multiprocessing.get_context('spawn')
    log = tmp_path / 'log'
    both = [context.Process(target=fill_slowly, args=(tmp_path, log)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == 'filled\n'


def test_waiting_is_said(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(stored, 'POLL', 0.01)
    begun, free = threading.Event(), threading.Event()

    def slow(array):
        begun.set()
        assert free.wait(10)
        fill(array)

    other = threading.Thread(target=lambda: make(tmp_path).make(slow))
    other.start()
    assert begun.wait(10)
    mine = threading.Thread(target=lambda: make(tmp_path).make(slow))
    mine.start()
    while not caplog.messages:
        time.sleep(0.01)
    free.set()
    other.join()
    mine.join()
    assert caplog.messages == [f'Another run is writing {tmp_path / "array"}: waiting for it.']


def test_a_map_stays_whole_while_the_files_are_written_anew(tmp_path):
    mapped = make(tmp_path).make(fill)
    blank(tmp_path / 'array')
    cut_off = mapped.copy()
    make(tmp_path).make(fill)
    np.testing.assert_array_equal(mapped, cut_off)  # the old file: no part of it is missing


def test_a_disk_that_becomes_full_is_said_in_a_sentence(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        with pytest.raises(files.DiskError, match='no room to write'):
            make(tmp_path).make(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path / 'array') == []


Usage = collections.namedtuple('Usage', ['total', 'used', 'free'])


@pytest.mark.parametrize('spare', [0, -1])
def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch, spare):
    needed = 3 * 10**9
    monkeypatch.setattr(
        stored.shutil, 'disk_usage', lambda path: Usage(0, 0, needed + stored.MARGIN + spare)
    )
    folder = tmp_path / 'not' / 'there'
    if spare == 0:
        check_room(folder, needed, 'the cache', 'delete something')
        return
    message = (
        f'the cache needs 3.0 GB in {folder}, but of the 3.3 GB free there 268.4 MB are to stay '
        'free: delete something'
    )
    with pytest.raises(files.DiskError) as caught:
        check_room(folder, needed, 'the cache', 'delete something')
    assert str(caught.value) == message
    assert not (tmp_path / 'not').exists()


@pytest.mark.parametrize(
    ('size', 'words'),
    [
        (0, '0 bytes'),
        (999, '999 bytes'),
        (1000, '1.0 kB'),
        (2_500_000, '2.5 MB'),
        (1_234e9, '1,234.0 GB'),
    ],
)
def test_sizes_in_words(size, words):
    assert readable(size) == words
