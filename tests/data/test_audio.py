"""Recordings to features: files, channels, rates, windows, and what is kept."""

import collections
import io
import logging

import numpy as np
import pytest
import soundfile
import transformers

from adapters_jax import files
from adapters_jax.data import audio, mpeg, stored

RATE = 16000


@pytest.fixture(scope='module')
def extractor(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    transformers.WhisperFeatureExtractor(feature_size=20).save_pretrained(folder)
    return audio.load_extractor(folder)


def tone(hertz, seconds=0.5, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path, sound, rate=RATE, **options):
    soundfile.write(path, sound, rate, **options)
    return {'path': str(path)}


@pytest.mark.parametrize('ending', ['wav', 'flac'])
def test_a_file_is_read_as_it_was_written(tmp_path, ending):
    sound = tone(440)
    found = audio.decode(write(tmp_path / f'a.{ending}', sound), RATE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, sound, atol=2**-15)  # a step of 16 bits


def test_channels_are_averaged(tmp_path):
    left, right = tone(440), tone(700)
    found = audio.decode(write(tmp_path / 'a.wav', np.stack([left, right], axis=1)), RATE)
    np.testing.assert_allclose(found, (left + right) / 2, atol=5e-5)


@pytest.mark.parametrize('rate', [8000, 22050, 44100, 48000])
def test_a_tone_of_another_rate_is_the_same_tone(tmp_path, rate):
    found = audio.decode(write(tmp_path / 'a.wav', tone(440, rate=rate), rate), RATE)
    assert len(found) == 8000
    inner = slice(400, -400)  # a filter has less to go by at the edges
    np.testing.assert_allclose(found[inner], tone(440)[inner], atol=2e-3)


def test_what_a_lower_rate_cannot_carry_is_filtered_out(tmp_path):
    sound = tone(440, rate=48000) + tone(15000, rate=48000)  # would be heard as 1,000 Hz
    found = audio.decode(write(tmp_path / 'a.wav', sound, 48000, subtype='FLOAT'), RATE)
    np.testing.assert_allclose(found[400:-400], tone(440)[400:-400], atol=2e-3)


def test_bytes_are_read_as_files_are(tmp_path):
    recording = write(tmp_path / 'a.flac', tone(440))
    given = {'bytes': (tmp_path / 'a.flac').read_bytes()}
    np.testing.assert_array_equal(audio.decode(given, RATE), audio.decode(recording, RATE))


def test_features_are_those_of_transformers(extractor):
    sound = tone(440, 1.0).astype(np.float32)
    whole = audio.log_mel(sound, extractor, 3000)
    theirs = extractor(sound, sampling_rate=RATE, return_tensors='np')['input_features'][0]
    np.testing.assert_array_equal(whole, theirs)
    # A shorter window has the beginning of them, up to the filter's reach over its end.
    short = audio.log_mel(sound, extractor, 120)
    assert short.shape == (20, 120)
    np.testing.assert_allclose(short[:, :117], whole[:, :117], atol=1e-5)


def test_features_are_kept_and_made_anew_where_a_file_changes(tmp_path, extractor, monkeypatch):
    recordings = [write(tmp_path / f'{i}.wav', tone(300 + 50 * i)) for i in range(3)]
    found = audio.features(recordings, extractor, 0.5, tmp_path / 'cache')
    assert found.shape == (3, 20, 50) and found.dtype == np.float16
    np.testing.assert_array_equal(found, audio.features(recordings, extractor, 0.5))
    monkeypatch.setattr(audio, 'decode', None)
    again = audio.features(recordings, extractor, 0.5, tmp_path / 'cache')
    np.testing.assert_array_equal(again, found)
    monkeypatch.undo()
    write(tmp_path / '1.wav', tone(900, 0.4))
    changed = audio.features(recordings, extractor, 0.5, tmp_path / 'cache')
    assert (changed[1] != found[1]).any()
    np.testing.assert_array_equal(changed[::2], found[::2])


def test_features_that_would_fill_the_disk_are_refused(tmp_path, extractor, monkeypatch):
    recordings = [write(tmp_path / '0.wav', tone(300))]
    free = collections.namedtuple('Usage', 'total used free')(10**9, 10**9, stored.MARGIN)
    monkeypatch.setattr(stored.shutil, 'disk_usage', lambda _: free)
    with pytest.raises(files.DiskError, match=r'recordings needs 2\.0 kB .*free some space'):
        audio.features(recordings, extractor, 0.5, tmp_path / 'cache')
    assert not list((tmp_path / 'cache').rglob('numbers.bin'))


def test_what_is_cut_is_counted(tmp_path, extractor, caplog):
    recordings = [write(tmp_path / f'{s}.wav', tone(440, s)) for s in (0.3, 0.5, 0.7)]
    for cache in (None, tmp_path / 'cache', tmp_path / 'cache'):  # the last one is read
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger='adapters_jax.data.audio'):
            audio.features(recordings, extractor, 0.5, cache)
        assert '1 of 3 recordings are longer than 0.5 seconds' in caplog.text


@pytest.mark.parametrize('rate', [8000, RATE, 44100])
def test_of_a_long_recording_no_more_is_read_than_the_window_needs(tmp_path, extractor, rate):
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (20 * rate, 2))
    recording = write(tmp_path / 'a.wav', sound, rate)
    whole = audio.log_mel(audio.decode(recording, RATE), extractor, 50)
    begun = audio.decode(recording, RATE, 0.5)
    assert len(begun) == 1.5 * RATE
    np.testing.assert_array_equal(audio.log_mel(begun, extractor, 50), whole)
    found = audio.features([recording], extractor, 0.5)
    np.testing.assert_array_equal(found[0], whole.astype(np.float16))


@pytest.mark.parametrize(
    ('seconds', 'frames'), [(0, 3000), (30, 3000), (1, 100), (0.5, 50), (0.03, 4), (1.01, 100)]
)
def test_a_window_has_an_even_number_of_frames(extractor, seconds, frames):
    assert audio.frames_of(extractor, seconds) == frames


@pytest.mark.parametrize(('seconds', 'message'), [(31, 'up to 30'), (-1, 'up to 30'), (1e-3, 'tw')])
def test_windows_that_are_none(extractor, seconds, message):
    with pytest.raises(ValueError, match=rf'task\.window is .*{message}'):
        audio.frames_of(extractor, seconds)


def test_files_that_are_no_sound(tmp_path):
    (tmp_path / 'a.wav').write_bytes(b'RIFF and nothing more')
    with pytest.raises(ValueError, match=r'a\.wav cannot be read as sound .*expected WAV, FLAC'):
        audio.decode({'path': str(tmp_path / 'a.wav')}, RATE)
    with pytest.raises(FileNotFoundError, match=r'there is no recording .*b\.wav'):
        audio.decode({'path': str(tmp_path / 'b.wav')}, RATE)
    empty = write(tmp_path / 'c.wav', np.zeros(0))
    with pytest.raises(
        ValueError, match=r'c\.wav has 0 samples by .*convert it once more, or remove'
    ):
        audio.decode(empty, RATE)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([0.0, np.nan]), RATE, format='WAV', subtype='FLOAT')
    with pytest.raises(ValueError, match=r'without a name.*no numbers; replace or remove it'):
        audio.decode({'bytes': buffer.getvalue()}, RATE)


def test_sound_without_a_header_or_a_length_is_named(tmp_path):
    (tmp_path / 'a.raw').write_bytes(bytes(800))
    with pytest.raises(ValueError, match=r'a\.raw cannot be read as sound .*expected WAV, FLAC'):
        audio.decode({'path': str(tmp_path / 'a.raw')}, RATE)
    piped = write(tmp_path / 'b.flac', tone(440))
    content = bytearray((tmp_path / 'b.flac').read_bytes())
    content[21] &= 0xF0  # of the number of samples, 36 bits
    content[22:26] = bytes(4)
    (tmp_path / 'b.flac').write_bytes(content)
    for given in (piped, {'bytes': bytes(content), 'path': 'b.flac'}):
        with pytest.raises(ValueError, match=r'b\.flac does not say how long it is'):
            audio.decode(given, RATE)


def coded(sound, rate, mode):
    """The sound as an MP3 file, and as one without the frame that says its length."""
    buffer = io.BytesIO()
    options = {'format': 'MP3', 'bitrate_mode': mode, 'compression_level': 0.1}
    with soundfile.SoundFile(buffer, 'w', rate, 1, **options) as file:
        file.write(sound)
    content = buffer.getvalue()
    return content, content[mpeg._frame(content, 0)[0] :]


@pytest.mark.parametrize('rate', [8000, 16000, 44100])
def test_mp3_files_that_are_longer_than_they_say_are_named(tmp_path, rate):
    noise = np.random.default_rng(0).normal(0, 0.3, 2 * rate)
    loud_first = np.concatenate([noise, np.zeros(6 * rate)])
    whole, piped = coded(loud_first, rate, 'VARIABLE')
    (tmp_path / 'a.mp3').write_bytes(piped)
    tagged = b'ID3\4\0\0\0\0\1\2' + bytes(130) + whole
    spoilt = [{'bytes': content} for content in (piped, whole + whole, tagged + tagged)]
    for given in (*spoilt, {'path': str(tmp_path / 'a.mp3')}):
        with pytest.raises(ValueError, match=r'does not say how long it is, or not rightly'):
            audio.decode(given, rate, 30.0)
    for content in (whole, tagged):
        assert len(audio.decode({'bytes': content}, rate)) == 8 * rate
    assert len(audio.decode({'bytes': piped}, rate, 0.5)) == 1.5 * rate  # no more is of use
    for content in coded(loud_first, rate, 'CONSTANT'):
        assert 8 * rate <= len(audio.decode({'bytes': content}, rate)) < 8.4 * rate


def test_folders_without_settings_of_sound(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no preprocessor_config\.json'):
        audio.load_extractor(tmp_path)
    (tmp_path / audio.SETTINGS).write_text('{"feature_extractor_type": "Nobody"}')
    with pytest.raises(ValueError, match='is not readable'):
        audio.load_extractor(tmp_path)
