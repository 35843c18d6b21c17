"""From recordings to what an encoder of sound reads: one channel, one rate, log-mel features.

Files are read by libsndfile, brought to the checkpoint's rate by a polyphase filter, and turned
into features by `transformers`' own extractor with the checkpoint's settings. Features depend on
the recordings, these settings and the window alone, and are kept between runs.
"""

import hashlib
import io
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float16, Float32

from adapters_jax import files
from adapters_jax.data import mpeg
from adapters_jax.data.stored import Stored, remembered
from adapters_jax.lazy import Functions

signal = Functions('scipy.signal')
SETTINGS = 'preprocessor_config.json'
CUT = 'cut.json'  # beside the features: how many recordings lost their end
FORMAT = 2  # raised whenever the same recordings would give other features, or none
# Half of what float32 takes, and 60 dB below the features: less than a recording's own noise.
KEPT_AS = np.float16
ENDLESS = 2**62  # samples, of a file that does not say how many it has

_LOG = logging.getLogger(__name__)

Recording = Mapping[str, Any]  # has 'path', or the bytes of a file as 'bytes', or both
Extractor = Any  # transformers' SequenceFeatureExtractor


def load_extractor(directory: str | os.PathLike) -> Extractor:
    """The feature extractor of a model folder.

    Raises FileNotFoundError or ValueError where the folder has none that makes log-mel features.
    """
    from transformers import AutoFeatureExtractor  # late: see `adapters_jax.lazy`

    path = pathlib.Path(directory) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f'{directory} has no {SETTINGS}, which says how sound becomes features; take the whole '
            'checkpoint'
        )
    try:
        extractor = AutoFeatureExtractor.from_pretrained(path.parent, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f'{path} is not readable: {error}') from error
    if not hasattr(extractor, 'hop_length'):
        raise ValueError(f'{path} is of {type(extractor).__name__}, which makes no log-mel frames')
    return extractor


def frames_of(extractor: Extractor, seconds: float) -> int:
    """How many frames a window has; an even number, since two of them make one vector.

    seconds: 0 for what the checkpoint was trained with. Raises ValueError where it is longer.
    """
    longest = extractor.n_samples / extractor.sampling_rate
    if not 0 <= seconds <= longest:
        raise ValueError(
            f'task.window is {seconds:g}; expected seconds up to {longest:g}, the longest sound '
            'that the checkpoint can read, or 0 for these'
        )
    samples = (seconds or longest) * extractor.sampling_rate
    frames = 2 * round(samples / extractor.hop_length / 2)
    if not frames:
        raise ValueError(f'task.window is {seconds:g} seconds, which is less than two frames')
    return frames


def decode(recording: Recording, rate: int, seconds: float = math.inf) -> Float32[np.ndarray, ' T']:
    """The sound of a file as one channel (the mean of all) at `rate` Hz, in [-1, 1] or so.

    seconds: how many are of use; what is a second or more behind them is not read. Raises
    FileNotFoundError, or ValueError where the file cannot be read or has no sound.
    """
    import soundfile  # late: see `adapters_jax.lazy`

    given, name = recording.get('bytes'), shown(recording)
    if given is None and not pathlib.Path(recording['path']).is_file():
        raise FileNotFoundError(f'there is no recording {name}')
    source = recording['path'] if given is None else io.BytesIO(given)
    try:
        with soundfile.SoundFile(source) as file:
            sound, own_rate = _read(file, seconds, recording), file.samplerate
    # Of sound without a header soundfile asks the rate by a TypeError.
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise ValueError(
            f'{name} cannot be read as sound ({error}); expected WAV, FLAC, OGG or MP3'
        ) from error
    if sound is None:
        raise ValueError(
            f'{name} does not say how long it is, or not rightly, as what was written to a pipe or '
            'joined of several files; expected a file with its length: convert it once more, into '
            'a file'
        )
    if not len(sound):
        raise ValueError(
            f'{name} has 0 samples by what its head says; expected some sound: convert it once '
            'more, or remove it'
        )
    if not np.isfinite(sound).all():
        raise ValueError(f'{name} has samples that are no numbers; replace or remove it')
    return resample(sound, own_rate, rate)


def _read(file: Any, seconds: float, recording: Recording) -> Float32[np.ndarray, ' T'] | None:
    """The mean of an open file's channels, as far as is of use; None where its length is unknown.

    A second more is read: filters look ahead, and longer recordings are known by it.
    """
    wanted = (seconds + 1) * file.samplerate
    if file.frames >= ENDLESS or (file.frames < wanted and _is_longer(file, recording)):
        return None
    most = min(wanted, file.frames)
    return file.read(math.ceil(most), dtype='float32', always_2d=True).mean(1)


def _is_longer(file: Any, recording: Recording) -> bool:
    """Tell whether an open file has more sound than libsndfile would read of it."""
    if file.format != 'MP3':
        return False
    given = recording.get('bytes')
    content = pathlib.Path(recording['path']).read_bytes() if given is None else given
    return mpeg.goes_on(content, file.frames)


def resample(
    sound: Float32[np.ndarray, ' T'], own_rate: int, rate: int
) -> Float32[np.ndarray, ' R']:
    """The same sound at another rate, with nothing above half of the lower one."""
    if own_rate == rate:
        return sound
    common = math.gcd(own_rate, rate)
    return signal.resample_poly(sound, rate // common, own_rate // common).astype(np.float32)


def log_mel(
    sound: Float32[np.ndarray, ' T'], extractor: Extractor, frames: int
) -> Float32[np.ndarray, 'M F']:
    """The features of a sound, filled up with silence or cut to so many frames."""
    found = extractor(
        sound,
        sampling_rate=extractor.sampling_rate,
        padding='max_length',
        max_length=frames * extractor.hop_length,
        truncation=True,
        return_tensors='np',
    )
    return found['input_features'][0].astype(np.float32)


def features(
    recordings: Sequence[Recording],
    extractor: Extractor,
    seconds: float,
    cache_dir: str | os.PathLike | None = None,
) -> Float16[np.ndarray, 'N M F']:
    """The features of recordings; with a `cache_dir` they are a mapped file there.

    Sounds that are longer than the window lose their end, and are counted in the log, each time.
    Raises DiskError where the file would leave too little of the disk.
    """
    frames = frames_of(extractor, seconds)
    window = frames * extractor.hop_length / extractor.sampling_rate
    shape = len(recordings), extractor.feature_size, frames

    def fill(array: np.ndarray) -> int:
        cut = 0
        for place, recording in enumerate(recordings):
            sound = decode(recording, extractor.sampling_rate, window)
            cut += len(sound) > frames * extractor.hop_length
            array[place] = log_mel(sound, extractor, frames)
        return cut

    if cache_dir is None:
        array = np.empty(shape, KEPT_AS)
        _tell_cut(fill(array), len(recordings), extractor, frames)
        return array
    of = {'format': FORMAT, 'extractor': settings(extractor), 'recordings': digest(recordings)}
    key = hashlib.sha256(json.dumps([of, shape], sort_keys=True).encode()).hexdigest()
    directory = pathlib.Path(cache_dir) / f'sound-{key[:32]}'
    kept = directory / CUT
    stored = Stored(directory, shape, np.dtype(KEPT_AS), of)
    what = 'the cache of recordings'
    array = remembered(stored, lambda array: files.write_json(kept, fill(array)), what)
    # Folders of before the count was kept have none.
    cut = json.loads(kept.read_text('utf-8')) if kept.is_file() else 0
    _tell_cut(cut, len(recordings), extractor, frames)
    return array


def _tell_cut(cut: int, total: int, extractor: Extractor, frames: int) -> None:
    if cut:
        _LOG.warning(
            '%d of %d recordings are longer than %g seconds (task.window) and were cut.',
            *(cut, total, frames * extractor.hop_length / extractor.sampling_rate),
        )


def settings(extractor: Extractor) -> dict[str, Any]:
    """What decides the extractor's numbers, as JSON values."""
    names = ('feature_size', 'sampling_rate', 'hop_length', 'n_fft', 'dither', 'padding_value')
    return {name: getattr(extractor, name, None) for name in names}


def digest(recordings: Sequence[Recording]) -> str:
    """A hexadecimal name of the recordings: of bytes, else of paths, sizes and times of change."""
    found = hashlib.sha256()
    for recording in recordings:
        if recording.get('bytes') is not None:
            found.update(hashlib.sha256(recording['bytes']).digest())
        else:
            path = pathlib.Path(recording['path']).absolute()
            if not path.is_file():
                raise FileNotFoundError(f'there is no recording {path}')
            state = path.stat()
            found.update(f'{path}\0{state.st_size}\0{state.st_mtime_ns}\n'.encode())
    return found.hexdigest()


def shown(recording: Recording) -> str:
    """What a recording is called in messages and files."""
    return str(recording.get('path') or '(a recording without a name)')
