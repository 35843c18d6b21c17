"""Wheels come from an index that the tests make themselves: a folder, and pip with no network."""

import hashlib
import io
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from adapters_jax import wheels

REPOSITORY = Path(__file__).parents[1]
FILES = {'canary/data.txt': b'some data', 'canary/other.txt': b'more'}


def build_wheel(folder: Path, package: str, files: dict[str, bytes], version: str = '1.0') -> str:
    """Write a wheel to a folder that serves as package index and return its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f'{package}-{version}.dist-info'
    metadata = f'Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n'
    metadata += 'Requires-Python: >=3.99\n'  # a bound that would stop an installation
    path = folder / f'{package}-{version}-py3-none-any.whl'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f'{info}/METADATA', metadata)
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n')
        archive.writestr(f'{info}/RECORD', '')
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    folder = tmp_path / 'index'
    folder.mkdir()
    monkeypatch.setenv('ADAPTERS_JAX_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path):
    build_wheel(tmp_path, 'canary', FILES)
    return tmp_path / 'canary-1.0-py3-none-any.whl'


def forbid_pip(monkeypatch):
    def run(*_args, **_kwargs):
        raise AssertionError('pip was called')

    monkeypatch.setattr(wheels.subprocess, 'run', run)


def test_fetch_downloads_once_and_then_serves_from_the_cache(index, monkeypatch):
    sha256 = build_wheel(index, 'canary', FILES)
    first = wheels.fetch('canary', '1.0', sha256)
    assert hashlib.sha256(first.read_bytes()).hexdigest() == sha256
    assert first.is_relative_to(wheels.cache_directory())
    forbid_pip(monkeypatch)
    assert wheels.fetch('canary', '1.0', sha256) == first
    assert [p.name for p in first.parent.iterdir() if p.name.startswith('.fetching')] == []


def test_nothing_of_the_wheel_is_run_or_installed(index, tmp_path):
    canary = tmp_path / 'sprung'
    code = f'import os; os.mkdir({str(canary)!r})\n'.encode()
    files = {'canary/__init__.py': code, 'canary.pth': b'import canary\n', 'setup.py': code}
    path = wheels.fetch('canary', '1.0', build_wheel(index, 'canary', files))
    assert wheels.read(path, 'canary/__init__.py') == code
    exec(code)  # the trap works
    assert canary.exists()
    canary.rmdir()
    program = 'import importlib.util as u; assert u.find_spec("canary") is None'
    subprocess.run([sys.executable, '-c', program], check=True)
    assert not canary.exists()


def test_another_file_under_the_same_name_is_refused_with_both_hashes(index):
    found = build_wheel(index, 'canary', FILES)
    expected = '0' * 64
    with pytest.raises(wheels.HashMismatchError) as error:
        wheels.fetch('canary', '1.0', expected)
    assert found in str(error.value)
    assert expected in str(error.value)
    assert not list(wheels.cache_directory().rglob('*.whl'))


def test_the_hash_is_checked_here_too_and_not_left_to_pip(index, monkeypatch):
    build_wheel(index, 'canary', FILES)

    def lax_download(_package, _version, _sha256, staging):
        (staging / 'canary-1.0-py3-none-any.whl').write_bytes(b'something else')
        return staging / 'canary-1.0-py3-none-any.whl'

    monkeypatch.setattr(wheels, '_download', lax_download)
    with pytest.raises(
        wheels.HashMismatchError, match=hashlib.sha256(b'something else').hexdigest()
    ):
        wheels.fetch('canary', '1.0', 'a' * 64)
    assert not list(wheels.cache_directory().rglob('*.whl'))


def test_a_damaged_cached_wheel_is_fetched_again(index, caplog):
    sha256 = build_wheel(index, 'canary', FILES)
    path = wheels.fetch('canary', '1.0', sha256)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with caplog.at_level(logging.WARNING, logger='adapters_jax.wheels'):
        assert wheels.fetch('canary', '1.0', sha256).read_bytes() == whole
    assert 'fetching it again' in caplog.text


def test_a_damaged_cached_wheel_is_never_served(index):
    sha256 = build_wheel(index, 'canary', FILES)
    wheels.fetch('canary', '1.0', sha256).write_bytes(b'damaged')
    (index / 'canary-1.0-py3-none-any.whl').unlink()
    with pytest.raises(wheels.FetchError):
        wheels.fetch('canary', '1.0', sha256)


def test_a_version_that_the_index_lacks_is_named(index):
    build_wheel(index, 'canary', FILES)
    with pytest.raises(wheels.FetchError, match=r'canary==2\.0') as error:
        wheels.fetch('canary', '2.0', 'a' * 64)
    assert not isinstance(error.value, wheels.IndexUnreachableError)


def test_an_unreachable_index_is_told_from_a_missing_package(index, monkeypatch):
    monkeypatch.delenv('PIP_NO_INDEX')
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    with pytest.raises(wheels.IndexUnreachableError, match='not reachable'):
        wheels.fetch('canary', '1.0', 'a' * 64)


@pytest.mark.parametrize(
    'package, version, sha256',
    [
        ('canary\n--index-url=http://evil', '1.0', 'a' * 64),
        ('-r other.txt', '1.0', 'a' * 64),
        ('canary', '1.0 --hash=sha256:00', 'a' * 64),
        ('canary', '1.0', 'A' * 64),
        ('canary', '1.0', 'abc'),
    ],
)
def test_a_pin_cannot_smuggle_options_into_the_requirements(index, package, version, sha256):
    with pytest.raises(ValueError, match='is not valid'):
        wheels.fetch(package, version, sha256)


def test_two_processes_fetch_the_same_wheel_once(index):
    sha256 = build_wheel(index, 'canary', {'canary/large': os.urandom(2_000_000)})
    program = (
        'import logging, sys; logging.basicConfig(level=logging.INFO)\n'
        'from adapters_jax import wheels\n'
        f'path = wheels.fetch("canary", "1.0", "{sha256}")\n'
        'print(wheels.sha256_of(path))'
    )
    command = [sys.executable, '-c', program]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    running = [subprocess.Popen(command, cwd=REPOSITORY, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in running]
    assert [out.strip() for out, _ in outputs] == [sha256, sha256]
    assert sum(err.count('fetching canary') for _, err in outputs) == 1


def test_read_returns_a_file_and_names_what_is_there_instead(wheel):
    assert wheels.read(wheel, 'canary/data.txt') == b'some data'
    with pytest.raises(FileNotFoundError, match=r"no file 'data\.txt'; it has canary/data\.txt"):
        wheels.read(wheel, 'data.txt')


def test_a_file_of_an_archive_inside_the_wheel(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, 'w') as archive:
        archive.writestr('folder/config.json', '{}')
    build_wheel(tmp_path, 'canary', {'canary/model.zip': inner.getvalue()})
    path = tmp_path / 'canary-1.0-py3-none-any.whl'
    assert wheels.read(path, 'canary/model.zip!folder/config.json') == b'{}'
    with pytest.raises(FileNotFoundError, match='absent'):
        wheels.read(path, 'canary/model.zip!absent')


@pytest.mark.parametrize('content', [b'', b'not an archive', b'PK\x03\x04'])
def test_what_is_no_archive_is_named(tmp_path, content):
    (tmp_path / 'bad.whl').write_bytes(content)
    with pytest.raises(ValueError, match=r'bad\.whl is not a readable wheel'):
        wheels.read(tmp_path / 'bad.whl', 'anything')


def test_extract_writes_files_under_their_new_names(wheel, tmp_path):
    target = tmp_path / 'a' / 'b'
    members = {'data.txt': 'canary/data.txt', 'deeper/other': 'canary/other.txt'}
    assert wheels.extract(wheel, members, target) == target
    assert (target / 'data.txt').read_bytes() == b'some data'
    assert (target / 'deeper' / 'other').read_bytes() == b'more'


@pytest.mark.parametrize('name', ['../up', '/etc/up', 'a/../../up', '', '.', '..', 'a\\..\\up'])
def test_a_target_outside_the_directory_is_refused(wheel, tmp_path, name):
    target = tmp_path / 'in' / 'side'
    with pytest.raises(ValueError, match='not a place inside'):
        wheels.extract(wheel, {'data.txt': 'canary/data.txt', name: 'canary/other.txt'}, target)
    assert not target.exists()
    assert not list(tmp_path.rglob('up'))


def test_a_missing_member_leaves_no_directory(wheel, tmp_path):
    with pytest.raises(FileNotFoundError, match='absent'):
        members = {'data.txt': 'canary/data.txt', 'x': 'absent'}
        wheels.extract(wheel, members, tmp_path / 'target')
    assert not (tmp_path / 'target').exists()


def test_a_failure_half_way_leaves_nothing(wheel, tmp_path, monkeypatch):
    write, written = Path.write_bytes, []

    def full_disk(path, content):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, 'No space left on device')
        return write(path, content)

    monkeypatch.setattr(Path, 'write_bytes', full_disk)
    parent = tmp_path / 'parent'
    with pytest.raises(OSError, match='No space left'):
        members = {'data.txt': 'canary/data.txt', 'other.txt': 'canary/other.txt'}
        wheels.extract(wheel, members, parent / 'target')
    assert len(written) == 2
    assert [path.name for path in parent.iterdir()] == ['.target.lock']


def test_an_existing_directory_is_repaired_and_keeps_what_is_not_ours(wheel, tmp_path):
    target = tmp_path / 'target'
    target.mkdir()
    (target / 'mine').write_text('kept')
    (target / 'data.txt').write_text('damaged')
    wheels.extract(wheel, {'data.txt': 'canary/data.txt'}, target)
    assert (target / 'mine').read_text() == 'kept'
    assert (target / 'data.txt').read_bytes() == b'some data'


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv('ADAPTERS_JAX_CACHE', str(tmp_path))
    assert wheels.cache_directory() == tmp_path
    monkeypatch.delenv('ADAPTERS_JAX_CACHE')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert wheels.cache_directory() == tmp_path / '.cache' / 'adapters_jax'
