"""Scores of written texts, of languages with and without spaces between words."""

import logging

import pytest
import sacrebleu

from adapters_jax.tasks import text_metrics
from adapters_jax.tasks.sequence_to_sequence import SequenceToSequence
from adapters_jax.tasks.text_metrics import TEXT_METRICS

CHINESE = ['今天天气很好', '我喜欢吃苹果', '你好吗']
WRITTEN = ['今天天气不好', '我喜欢吃苹果', '你好吗']


@pytest.mark.parametrize(
    ('options', 'tokenizer'),
    [
        ({'languages': ('en_XX', 'zh_CN')}, 'zh'),
        ({'languages': ('en_XX', 'ja_XX')}, 'char'),
        ({'bleu_tokenizer': 'zh'}, 'zh'),
        ({'languages': ('zh_CN', 'de_DE')}, '13a'),
        ({}, '13a'),
    ],
)
def test_what_counts_as_a_word_is_the_language_s(options, tokenizer):
    task = SequenceToSequence(**options)
    expected = sacrebleu.corpus_bleu(WRITTEN, [CHINESE], tokenize=tokenizer).score
    assert task.compared('bleu', WRITTEN, CHINESE) == expected
    assert (expected > 50) == (tokenizer != '13a')
    assert task.compared('chrf', WRITTEN, CHINESE) == TEXT_METRICS['chrf'](WRITTEN, CHINESE)


def test_a_score_that_must_be_0_is_told_of(caplog):
    caplog.set_level(logging.WARNING)
    assert text_metrics.bleu(CHINESE, CHINESE) == 0
    assert "set task.bleu_tokenizer to 'zh' or 'char'" in caplog.text
    assert TEXT_METRICS['rougeL'](['привет мир'], ['привет мир']) == 0
    assert 'of which alone ROUGE is made' in caplog.text
    caplog.clear()
    text_metrics.bleu(['a b'], ['a b']), TEXT_METRICS['rougeL'](['a b'], ['a b'])
    assert not caplog.text


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"bleu_tokenizer is 'mecab'; sacrebleu has .*ja-mecab"):
        SequenceToSequence(bleu_tokenizer='mecab')


def test_spaces_at_the_ends_of_what_was_wanted_are_no_difference():
    assert TEXT_METRICS['exact'](['Hallo', 'a'], ['Hallo ', 'b']) == 0.5
