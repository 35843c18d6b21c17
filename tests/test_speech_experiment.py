"""Spoken digits: how recordings are divided, and what the table says."""

import csv

import pytest

from experiments.domains import speech


@pytest.fixture
def recordings(tmp_path):
    """Empty files with the names of recordings: each digit once by each speaker."""
    speakers = [name for names in speech.SPEAKERS.values() for name in names]
    for speaker in speakers:
        for digit in range(10):
            (tmp_path / f'{digit}_{speaker}_{digit + 5}.wav').touch()
    (tmp_path / 'readme.wav').touch()
    return tmp_path


def test_no_speaker_is_in_two_splits(recordings, tmp_path):
    folder = tmp_path / 'tables'
    folder.mkdir()
    sizes = speech.write_tables(recordings, folder)
    assert sizes == {'train': 40, 'validation': 10, 'test': 10}
    heard = {}
    for split in sizes:
        with (folder / f'{split}.tsv').open() as file:
            rows = list(csv.DictReader(file, delimiter='\t'))
        for row in rows:
            digit, speaker, _ = row['audio'].rpartition('/')[2].split('_')
            assert row['text'] == speech.WORDS[int(digit)]
            heard.setdefault(speaker, set()).add(split)
    assert sorted(map(len, heard.values())) == [1] * 6


def test_a_speaker_who_is_missing_is_named(recordings, tmp_path):
    for path in recordings.glob('*_theo_*'):
        path.unlink()
    with pytest.raises(FileNotFoundError, match='no recordings DIGIT_SPEAKER_TAKE'):
        speech.write_tables(recordings, tmp_path)


def test_a_method_that_is_none_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"--methods: 'loro' is none of houlsby, "):
        speech.main(str(tmp_path / 'out'), str(tmp_path), ['loro'], 1, 1.0, False)
    assert not (tmp_path / 'out').exists()


def test_the_table_says_what_was_measured():
    run = {'test': {'wer': 0.021, 'cer': 0.01}, 'trainable_parameters': 1000, 'seconds': 60.4}
    other = run | {'test': {'wer': 0.029, 'cer': 0.03}, 'seconds': 61}
    result = {
        'untrained': {'30.0': {'test': {'wer': 0.45, 'cer': 0.3}}, 1.0: {'test': run['test']}},
        'runs': {'lora': [run | {'total_parameters': 50000}, other | {'total_parameters': 50000}]},
        'seeds': [0, 1],
        'sizes': {'train': 2000, 'test': 500},
        'epochs': 1.0,
        'hardware': '2 cores',
    }
    lines = speech.render(result).splitlines()
    assert lines[2] == '| none, window of 1 s | 0 | 2.1 | 1.0 | |'
    assert lines[3] == '| none, window of 30 s | 0 | 45.0 | 30.0 | |'
    assert lines[4] == '| `lora` | 1,000 (2 %) | 2.5 ± 0.6 | 2.0 ± 1.4 | 61 |'
    assert '500 of one whom no run has heard' in lines[-1] and 'on 2 cores' in lines[-1]
