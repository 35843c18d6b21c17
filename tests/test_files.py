"""Whole files or none: kills, failures, full disks and second runs."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from full_disk import file_size

from adapters_jax import files, processes

ROOT = Path(__file__).parents[1]


def run(code, *arguments, **options):
    """Start Python on `code` in a process of its own."""
    command = [sys.executable, '-c', code, *map(str, arguments)]
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT, **options
    )


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def write_tree(directory, content):
    directory.mkdir()
    (directory / 'inner').mkdir()
    (directory / 'inner' / 'file').write_text(content)


def test_a_file_replaces_another(tmp_path):
    path = tmp_path / 'new folder' / 'file.txt'
    for text in ('erste', 'zweite – ü'):
        files.write_text(path, text)
        assert path.read_text(encoding='utf-8') == text
    assert names(path.parent) == ['file.txt']


def test_a_directory_replaces_another(tmp_path):
    path = tmp_path / 'adapter'
    for content in ('old', 'new'):
        with files.atomic(path) as temporary:
            write_tree(temporary, content)
            assert not path.exists() or (path / 'inner' / 'file').read_text() == 'old'
    assert (path / 'inner' / 'file').read_text() == 'new'
    assert names(tmp_path) == ['adapter']


@pytest.mark.parametrize('make', [lambda p: p.write_text('half'), lambda p: write_tree(p, 'half')])
def test_a_failure_leaves_what_was_there(tmp_path, make):
    path = tmp_path / 'x'
    with files.atomic(path) as temporary:
        make(temporary)
    before = [p.read_text() for p in (path, *path.rglob('*')) if p.is_file()]
    with pytest.raises(ZeroDivisionError), files.atomic(path) as temporary:
        make(temporary)
        raise ZeroDivisionError
    assert names(tmp_path) == ['x']
    assert [p.read_text() for p in (path, *path.rglob('*')) if p.is_file()] == before


def test_kinds_do_not_replace_each_other(tmp_path):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(FileExistsError, match=r'folder is a directory: remove it'):
        files.write_text(tmp_path / 'folder', 'x')
    (tmp_path / 'file').touch()
    with (
        pytest.raises(FileExistsError, match=r'file is a file: remove it'),
        files.atomic(tmp_path / 'file') as temporary,
    ):
        temporary.mkdir()
    assert names(tmp_path) == ['file', 'folder']


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    code = """
import sys, time
from adapters_jax import files
with files.atomic(sys.argv[1]) as temporary:
    temporary.write_text('half')
    print('now', flush=True)
    time.sleep(60)
"""
    with run(code, path) as process:
        assert process.stdout.readline() == 'now\n'
        process.kill()
    assert path.read_text() == 'old'


@pytest.mark.parametrize(('renames', 'expected'), [(0, 'old'), (1, 'old'), (2, 'new')])
def test_a_kill_at_any_point_of_a_replacement_loses_nothing(tmp_path, renames, expected):
    """The process dies at its first, second or third step that changes names."""
    path = tmp_path / 'adapter'
    write_tree(path, 'old')
    code = """
import os, pathlib, shutil, signal, sys
from adapters_jax import files
left = int(sys.argv[2])

def count(original):
    def step(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return original(*arguments, **options)
    return step

with files.atomic(sys.argv[1]) as temporary:
    (temporary / 'inner').mkdir(parents=True)
    (temporary / 'inner' / 'file').write_text('new')
    pathlib.Path.rename = count(pathlib.Path.rename)
    shutil.rmtree = count(shutil.rmtree)
"""
    with run(code, path, renames) as process:
        process.wait(60)
    assert process.returncode == -signal.SIGKILL
    files.recover(path)
    assert (path / 'inner' / 'file').read_text() == expected
    with files.atomic(path) as temporary:
        write_tree(temporary, 'third')
    assert (path / 'inner' / 'file').read_text() == 'third'
    assert not any('previous' in name for name in names(tmp_path))


WRITE = """
import sys, time
from adapters_jax import files
with files.atomic(sys.argv[1]) as temporary:
    temporary.write_text('half')
    print('writing', flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_goes_with_the_next_writing_and_what_a_live_one_writes_stays(
    tmp_path,
):
    with run(WRITE, tmp_path / 'file') as killed, run(WRITE, tmp_path / 'file') as live:
        for process in (killed, live):
            assert process.stdout.readline() == 'writing\n'
        killed.kill()
        killed.wait()
        assert len(names(tmp_path)) == 2
        files.write_text(tmp_path / 'file', 'whole')
        left = names(tmp_path)
        live.kill()
    assert left[1:] == ['file']
    assert f'{live.pid}-' in left[0] and left[0].endswith('.tmp')
    files.write_text(tmp_path / 'other', 'whole')
    assert names(tmp_path) == [left[0], 'file', 'other']
    files.write_text(tmp_path / 'file', 'again')
    assert names(tmp_path) == ['file', 'other']


def test_recover_leaves_a_whole_directory_alone(tmp_path):
    write_tree(tmp_path / 'adapter', 'kept')
    files.recover(tmp_path / 'adapter')
    files.recover(tmp_path / 'absent')
    assert names(tmp_path) == ['adapter']


def test_a_full_disk_is_said_in_a_sentence(tmp_path):
    files.write_text(tmp_path / 'file', 'old')
    with file_size(1000), pytest.raises(files.DiskError) as caught:
        files.write_text(tmp_path / 'file', 'x' * 5000)
    assert str(caught.value) == (
        f'no room to write {tmp_path}/file (file too large): free some space, '
        'or choose another directory'
    )
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / 'file').read_text() == 'old'
    assert names(tmp_path) == ['file']


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_is_explained(code):
    message = r'no room to write here/x .*: free some space'
    with pytest.raises(files.DiskError, match=message), files.explained('here/x'):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass_as_they_are():
    with pytest.raises(FileNotFoundError, match='absent'), files.explained('here'):
        Path('absent').read_text()


def unwritable(tmp_path):
    if os.geteuid() == 0:
        if not Path('/sys').is_dir():
            pytest.skip('no directory here that root may not write to')
        return Path('/sys')
    tmp_path.chmod(0o500)
    return tmp_path


def test_a_directory_that_cannot_be_written_to(tmp_path):
    directory = unwritable(tmp_path)
    message = r'cannot be written .*: choose a directory that you may write to'
    for attempt in (files.make_directory, lambda path: files.write_text(path, 'x')):
        with pytest.raises(files.DiskError, match=message):
            attempt(directory / 'new')
    with pytest.raises(files.DiskError, match=message), files.lock(directory / 'new'):
        raise AssertionError('locked what cannot be written to')


def test_make_directory(tmp_path):
    path = tmp_path / 'a' / 'b'
    assert files.make_directory(path) == path
    assert files.make_directory(path) == path
    assert names(path) == []
    (path / 'file').touch()
    with pytest.raises(FileExistsError, match=r'file is a file: remove it, or choose another'):
        files.make_directory(path / 'file')


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers()
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@hypothesis.given(value=values)
def test_plain_leaves_json_alone(value):
    assert files.plain(value) == value


def test_plain_makes_json_of_everything():
    value = {
        1: np.float32(0.5),
        'array': np.arange(4).reshape(2, 2),
        'bad': [float('nan'), np.inf, (-np.inf,)],
        'path': Path('a/b'),
        'flag': np.bool_(True),
    }
    assert files.plain(value) == {
        '1': 0.5,
        'array': [[0, 1], [2, 3]],
        'bad': ['nan', 'inf', ['-inf']],
        'path': 'a/b',
        'flag': True,
    }


def test_write_json(tmp_path):
    files.write_json(tmp_path / 'x.json', {'loss': float('nan'), 'text': 'ü'})
    text = (tmp_path / 'x.json').read_text(encoding='utf-8')
    assert json.loads(text) == {'loss': 'nan', 'text': 'ü'}
    assert 'ü' in text
    assert text.endswith('}\n')


HOLD = """
import multiprocessing, sys, time
from adapters_jax import files
with files.lock(sys.argv[1]):
    if len(sys.argv) > 2:
        child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        child.start()
        print(child.pid, flush=True)
    print('locked', flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    with run(HOLD, tmp_path) as process:
        assert process.stdout.readline() == 'locked\n'
        message = (
            rf'{tmp_path} is in use by another run \(process {process.pid} on .*choose another'
        )
        for _ in range(2):
            with pytest.raises(files.InUseError, match=message), files.lock(tmp_path):
                raise AssertionError('locked twice')
        process.kill()
    with files.lock(tmp_path):
        pass


def test_workers_of_a_killed_run_do_not_hold_its_lock(tmp_path):
    with run(HOLD, tmp_path, 'with a child') as process:
        child = int(process.stdout.readline())
        assert process.stdout.readline() == 'locked\n'
        process.kill()
        process.wait()
        try:
            os.kill(child, 0)  # it is still there
            with files.lock(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_full_disk_cannot_be_locked(tmp_path):
    message = rf'no room to write {tmp_path} .*free some space'
    with file_size(0), pytest.raises(files.DiskError, match=message), files.lock(tmp_path):
        raise AssertionError('went on')


def test_processes_that_check_the_directory_do_not_lose_its_lock(tmp_path, monkeypatch):
    """A record lock goes as soon as its process closes the file, however often it is open."""
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(processes, '_exchange', lambda message: (None, [message]))
    with processes.locked(tmp_path), run(HOLD, tmp_path, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(timeout=60)
    assert 'InUseError' in errors


def test_one_process_does_not_lock_twice(tmp_path):
    with files.lock(tmp_path):
        with pytest.raises(files.InUseError, match='this process'), files.lock(tmp_path):
            raise AssertionError('locked twice')
        # The refusal has not released the lock either.
        with run(HOLD, tmp_path, stderr=subprocess.PIPE) as process:
            _, errors = process.communicate(timeout=60)
        assert 'InUseError' in errors
    with files.lock(tmp_path):
        pass
