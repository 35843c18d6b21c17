"""Tables and hub data sets of recordings, in one form."""

import shutil

import datasets
import numpy as np
import pytest
import soundfile

from adapters_jax.data import audio, recordings, sources


@pytest.fixture
def folder(tmp_path):
    """Twelve recordings and a table that names them."""
    lines = ['audio\ttext\n']
    for i in range(12):
        soundfile.write(tmp_path / f'{i}.wav', np.full(80, i / 100), 8000)
        lines.append(f'{i}.wav\tthe  same words\n' if i < 8 else f'{i}.wav\tnumber {i}\n')
    (tmp_path / 'train.tsv').write_text(''.join(lines))
    return tmp_path


def test_paths_are_relative_to_the_table(folder):
    for data in ({'dir': str(folder)}, {'train': str(folder / 'train.tsv')}):
        rows = recordings.load(data)['train']
        assert rows['target'][:][7:9] == ['the same words', 'number 8']
        assert rows['audio'][3] == {'path': str(folder / '3.wav'), 'bytes': None}


def test_the_same_words_may_be_on_both_sides_of_a_cut(folder):
    data = {'dir': str(folder), 'split_fractions': (0.25, 0.25)}
    found = recordings.load(data)
    assert {name: len(rows) for name, rows in found.items()} == {
        'train': 6,
        'validation': 3,
        'test': 3,
    }
    paths = [one['path'] for rows in found.values() for one in rows['audio'][:]]
    assert len(set(paths)) == 12


@pytest.mark.parametrize('twice', ['path', 'copy', 'bytes'])
def test_the_same_recording_is_on_one_side_of_a_cut(folder, twice, monkeypatch):
    other = {'path': './', 'copy': 'of_'}.get(twice, '')
    lines = (folder / 'train.tsv').read_text().splitlines(keepends=True)
    (folder / 'train.tsv').write_text(''.join(lines + [f'{other}{line}' for line in lines[1:]]))
    data = {'dir': str(folder), 'split_fractions': (0.25, 0.25)}
    if twice == 'copy':
        for i in range(12):
            shutil.copy(folder / f'{i}.wav', folder / f'of_{i}.wav')
    if twice == 'bytes':
        made = [{'bytes': (folder / f'{i % 12}.wav').read_bytes()} for i in range(24)]
        rows = datasets.Dataset.from_dict({'audio': made, 'text': ['a'] * 24})
        monkeypatch.setattr(sources.datasets, 'load_dataset', lambda *_: {'train': rows})
        data = {'name': 'org/speech', 'split_fractions': (0.25, 0.25)}
    found = recordings.load(data)
    assert [len(rows) for rows in found.values()] == [12, 6, 6]
    sides = [{audio.decode(one, 8000)[0] for one in rows['audio'][:]} for rows in found.values()]
    assert [len(side) for side in sides] == [6, 3, 3] and len(set.union(*sides)) == 12


def test_a_split_without_words_has_none(folder):
    (folder / 'test.tsv').write_text('audio\n0.wav\n1.wav\n')
    rows = recordings.load({'dir': str(folder)})['test']
    assert rows.column_names == ['audio'] and len(rows) == 2


def test_hub_sets_give_the_bytes_of_files(folder, monkeypatch):
    files = [(folder / f'{i}.wav').read_bytes() for i in range(3)]
    columns = {'audio': [{'bytes': b, 'path': f'{i}.wav'} for i, b in enumerate(files)]}
    # As Common Voice and LibriSpeech have them.
    columns |= {'path': ['0.mp3', '1.mp3', '2.mp3'], 'file': ['0.flac', '1.flac', '2.flac']}
    rows = datasets.Dataset.from_dict(columns | {'sentence': ['a', 'b', 'c']})
    rows = rows.cast_column('audio', datasets.Audio(8000))
    monkeypatch.setattr(sources.datasets, 'load_dataset', lambda *_: {'train': rows})
    found = recordings.load({'name': 'org/speech'})['train']
    assert [one['bytes'] for one in found['audio'][:]] == files
    assert found['target'][:] == ['a', 'b', 'c']
    sound = audio.decode(found['audio'][2], 8000)
    np.testing.assert_allclose(sound, 0.02, atol=1e-4)


@pytest.mark.parametrize(
    ('table', 'message'),
    [
        ('audio\ttext\n0.wav\t\n', r"line 2: '' stands where what is said must"),
        ('audio\ttext\n99.wav\ta\n', r'line 2: there is no file .*99\.wav; .* holds'),
        ('audio\ttext\n\ta\n', r"line 2: '' stands where the path of a sound file must"),
        ('one\ttwo\n0.wav\ta\n', r'no column is the audio; set data\.columns\.text_a to one'),
        ('audio\ttwo\n0.wav\ta\n', r'no column is what is said; set data\.columns\.label to'),
        ('audio\tfile\n0.wav\ta\n', r'several columns \(.*audio.*file.*\) may be the audio; set'),
    ],
)
def test_mistakes_are_named_with_their_place(folder, table, message):
    (folder / 'train.tsv').write_text(table)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        recordings.load({'dir': str(folder), 'header': True})


def test_glue_has_no_recordings():
    with pytest.raises(ValueError, match=r"data\.glue is 'rte', which has no recordings"):
        recordings.load({'glue': 'rte'})
