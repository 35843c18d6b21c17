"""Rates of wrong words and characters, after Whisper's normaliser."""

import json

import pytest

from adapters_jax.tasks.speech_metrics import SPEECH_METRICS, load_normaliser

WANTED = ['the cat sat', 'on the mat']


@pytest.mark.parametrize(
    ('written', 'wer', 'cer', 'exact'),
    [
        (WANTED, 0.0, 0.0, 1.0),
        (['the cat', 'on the mat'], 1 / 6, 4 / 21, 0.5),  # one word missing
        (['the cat sat', 'on the the mat'], 1 / 6, 4 / 21, 0.5),  # one too many
        (['a cat sat', 'on the mat'], 1 / 6, 3 / 21, 0.5),  # one wrong
        (['', ''], 1.0, 1.0, 0.0),
    ],
)
def test_rates_are_of_all_texts_together(written, wer, cer, exact):
    found = {name: metric(written, WANTED) for name, metric in SPEECH_METRICS.items()}
    assert found == pytest.approx({'wer': wer, 'cer': cer, 'exact': exact})


def test_words_that_are_made_up_where_nothing_was_said_count():
    assert SPEECH_METRICS['wer'](['a b', 'c'], ['', 'c']) == pytest.approx(2.0)


def test_english_is_compared_without_case_signs_and_spellings(tmp_path):
    (tmp_path / 'normalizer.json').write_text(json.dumps({'colour': 'color'}))
    normalise = load_normaliser(tmp_path, language='en')
    assert normalise('Mr. Smith paints [laughs] the  COLOUR, twenty-one!') == (
        'mister smith paints the color 21'
    )
    assert normalise('Six.') == normalise('6') == '6'
    (tmp_path / 'normalizer.json').write_text('[]')
    with pytest.raises(ValueError, match='holds a list, expected an object'):
        load_normaliser(tmp_path, language='en')


def test_other_languages_keep_their_words(tmp_path):
    normalise = load_normaliser(tmp_path, language='de')
    assert normalise('Sechs, bitte!').strip() == 'sechs bitte'


def test_letters_are_the_words_of_languages_without_spaces(tmp_path):
    """As Whisper's authors compare them (Radford et al. 2023, appendix C)."""
    normalise = load_normaliser(tmp_path, language='zh')
    written, wanted = (normalise(text) for text in ('我今天去了学校上课', '我今天去了学校上学'))
    assert SPEECH_METRICS['wer']([written], [wanted]) == pytest.approx(1 / 9)
