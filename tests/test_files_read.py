"""Directories that are read while they are replaced, links, and what is looked at before work."""

import os
import resource
import threading
import time

import numpy as np
import pytest

from adapters_jax import files


def test_more_files_than_the_system_allows_are_refused_and_fewer_are_allowed():
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with pytest.raises(ValueError, match=r'files would be open at once.*; set sweep.size'):
            files.check_descriptors(hard, 'set sweep.size')
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
        files.check_descriptors(50, 'set sweep.size')
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
        files.check_descriptors(400, 'set sweep.size')
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def test_a_target_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    with pytest.raises(FileExistsError, match='is a directory'):
        files.check_target(tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(FileExistsError, match='is a file'):
        files.check_target(tmp_path / 'file' / 'out.jsonl')
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(FileExistsError, match='pipe is a device or a pipe'):
        files.check_target(tmp_path / 'pipe')
    with pytest.raises(FileExistsError, match='pipe is a device or a pipe'):
        files.write_text(tmp_path / 'pipe', 'x')
    assert (tmp_path / 'pipe').is_fifo()
    files.check_target(tmp_path / 'new' / 'out.jsonl')
    assert list((tmp_path / 'new').iterdir()) == []


def write_version(path, number):
    """Write one number to two files of a directory, in the place of what is there."""
    with files.atomic(path) as temporary:
        temporary.mkdir()
        for name in 'ab':
            (temporary / name).write_text(str(number))


def versions(directory):
    """Return what two files of a directory hold, read with a pause between them."""
    first = (directory / 'a').read_text()
    time.sleep(0.002)
    return first, (directory / 'b').read_text()


def test_a_reader_gets_one_version_or_the_other_and_disturbs_no_writer(tmp_path):
    path, failed, done = tmp_path / 'adapter', [], threading.Event()
    pauses = np.random.default_rng(0).uniform(0, 0.01, 200)

    def keep_writing():
        try:
            for number in range(1, 200):
                write_version(path, number)
                time.sleep(pauses[number])
        except OSError as error:
            failed.append(error)
        done.set()

    write_version(path, 0)
    writer = threading.Thread(target=keep_writing)
    writer.start()
    seen = set()
    while not done.is_set():
        first, second = files.read_whole(path, versions)
        assert first == second
        seen.add(first)
    writer.join()
    assert not failed and len(seen) > 10


def test_a_number_that_is_given_again_does_not_make_two_versions_one(tmp_path):
    path, left = tmp_path / 'adapter', [1, 2, 3, 4]
    write_version(path, 0)

    def read(directory):
        first = (directory / 'a').read_text()
        for number in [left.pop(0) for _ in left[:2]]:  # the second may take the first one's place
            write_version(path, number)
        return first, (directory / 'b').read_text()

    assert files.read_whole(path, read) == ('4', '4')


def test_a_directory_that_is_replaced_without_end_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / 'adapter'
    write_version(path, 0)
    monkeypatch.setattr(files, '_READ_AGAIN_S', 0.05)
    with pytest.raises(files.InUseError, match='replaced again and again'):
        files.read_whole(path, lambda directory: write_version(directory, 1))


def test_a_reader_takes_what_a_kill_has_left_and_changes_nothing(tmp_path):
    previous = tmp_path / '.adapter.previous'
    previous.mkdir()
    for name in 'ab':
        (previous / name).write_text('old')
    assert files.read_whole(tmp_path / 'adapter', versions) == ('old', 'old')
    assert [path.name for path in tmp_path.iterdir()] == ['.adapter.previous']
    with pytest.raises(FileNotFoundError):
        files.read_whole(tmp_path / 'absent', versions)


def test_a_link_stays_a_link_to_what_is_written(tmp_path):
    (tmp_path / 'there').mkdir()
    link = tmp_path / 'adapter'
    link.symlink_to(tmp_path / 'there')
    for number in range(2):
        with files.atomic(link) as temporary:
            temporary.mkdir()
            (temporary / 'a').write_text(str(number))
    assert link.is_symlink() and (tmp_path / 'there' / 'a').read_text() == '1'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['adapter', 'there']
