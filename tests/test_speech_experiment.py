"""Spoken digits: how recordings are divided, and what the table says."""

import csv
import json

import pytest

from experiments.domains import speech

SPEAKERS = ('ann', 'ben', 'cat', 'dan', 'eve')


@pytest.fixture
def recordings(tmp_path):
    """Empty files with the names of recordings: each digit once by each speaker."""
    for speaker in SPEAKERS:
        for digit in range(10):
            (tmp_path / f'{digit}_{speaker}_{digit + 5}.wav').touch()
    (tmp_path / 'readme.wav').touch()
    return tmp_path


@pytest.mark.parametrize(
    ('held_out', 'looked_at'), [('ann', 'eve'), ('ben', 'ann'), ('eve', 'dan')]
)
def test_no_speaker_is_in_two_splits(recordings, tmp_path, held_out, looked_at):
    folder = tmp_path / 'tables'
    folder.mkdir()
    sizes = speech.write_tables(recordings, held_out, folder)
    assert sizes == {'train': 30, 'validation': 10, 'test': 10}
    heard = {}
    for split in sizes:
        with (folder / f'{split}.tsv').open() as file:
            rows = list(csv.DictReader(file, delimiter='\t'))
        for row in rows:
            digit, speaker, _ = row['audio'].rpartition('/')[2].split('_')
            assert row['text'] == speech.WORDS[int(digit)]
            heard.setdefault(speaker, set()).add(split)
    assert set(heard) == set(SPEAKERS) and all(len(splits) == 1 for splits in heard.values())
    assert heard[held_out] == {'test'} and heard[looked_at] == {'validation'}


def test_recordings_of_two_speakers_are_too_few(recordings):
    for speaker in SPEAKERS[2:]:
        for path in recordings.glob(f'*_{speaker}_*'):
            path.unlink()
    with pytest.raises(FileNotFoundError, match='of 2 speakers; expected three or more'):
        speech.speakers(recordings)


@pytest.mark.parametrize(
    ('held_out', 'methods', 'message'),
    [
        (['zoe'], ['lora'], "--held_out: 'zoe' is none of ann, ben, cat"),
        ([], ['loro'], "--methods: 'loro' is none of houlsby, "),
    ],
)
def test_what_is_unknown_is_refused_before_anything_is_written(
    recordings, tmp_path, held_out, methods, message
):
    with pytest.raises(ValueError, match=message):
        speech.main(str(tmp_path / 'out'), str(recordings), held_out, methods, 1, 1.0, False)
    assert not (tmp_path / 'out').exists()


def test_each_speaker_is_held_out_in_turn(recordings, tmp_path, monkeypatch):
    def trained(config, workdir):
        train = (workdir.parent / 'tables' / 'train.tsv').read_text()
        assert f'_{workdir.parent.name}_' not in train
        assert config.data.dir == str(workdir.parent / 'tables')
        return RUN | {'test': {'wer': 0.01 * SPEAKERS.index(workdir.parent.name), 'cer': 0}}

    monkeypatch.setattr(speech, 'trained', trained)
    monkeypatch.setattr(speech, 'untrained', lambda config, path: {'test': {'wer': 9, 'cer': 9}})
    out = tmp_path / 'out'
    speech.main(str(out), str(recordings), [], ['lora'], 1, 1.0, True)
    result = json.loads((out / 'speech.json').read_text())
    assert [run['held_out'] for run in result['runs']['lora']] == list(SPEAKERS)
    assert '| `lora` | 1,000 (2 %) | 2.0 ± 1.6 | 4.0 |' in (out / 'speech.md').read_text()


RUN = {'trainable_parameters': 1000, 'total_parameters': 50000, 'seconds': 60.4}


def test_the_table_says_what_was_measured():
    run = RUN | {'test': {'wer': 0.021, 'cer': 0.01}}
    other = RUN | {'test': {'wer': 0.029, 'cer': 0.03}, 'seconds': 61}
    wide = {'test': {'wer': 0.45, 'cer': 0.3}}
    result = {
        'untrained': {'30.0': {'ann': wide, 'ben': wide}, 1.0: {'ann': run, 'ben': other}},
        'runs': {'lora': [run, other]},
        'seeds': [0],
        'sizes': {name: {'train': 2000, 'test': 500} for name in ('ann', 'ben')},
        'epochs': 1.0,
        'hardware': '2 cores',
        'commit': 'abcdef0123',
    }
    lines = speech.render(result).splitlines()
    assert lines[2] == '| none, window of 1 s | 0 | 2.5 ± 0.6 | 2.9 | 2.0 ± 1.4 |  |'
    assert lines[3] == '| none, window of 30 s | 0 | 45.0 ± 0.0 | 45.0 | 30.0 ± 0.0 |  |'
    assert lines[4] == '| `lora` | 1,000 (2 %) | 2.5 ± 0.6 | 2.9 | 2.0 ± 1.4 | 61 |'
    assert '2,000 recordings to train on, and 1,000 to test, of ann, ben' in lines[-1]
    assert (
        'highest, over 2 speakers, one seed; one learning' in lines[-1]
        and 'on 2 cores' in lines[-1]
    )
