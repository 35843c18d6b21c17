"""Texts of any length, from files to parts of which no word is lost."""

import json

import numpy as np
import pytest
import toy

from adapters_jax.data import corpus, sources, tokenize
from adapters_jax.data.corpus import Corpus


def read(tmp_path, name, text, **data):
    path = tmp_path / name
    path.write_text(text)
    given = {'train': str(path)} | data
    return sources.read(given, Corpus.of(given))['train']['text_a'][:]


def test_files_of_every_kind(tmp_path):
    assert read(tmp_path, 'a.txt', 'one\ttwo, three\n \n\nfour\n') == ['one\ttwo, three', 'four']
    assert read(tmp_path, 'A.TXT', 'one\ttwo\nthree\n') == ['one\ttwo', 'three']
    assert read(tmp_path, 'b.txt.csv', 'text,label\n"a, b",x\n') == ['a, b']
    assert read(tmp_path, 'b.csv', 'text,label\n"a, b",x\nc,\n') == ['a, b', 'c']
    lines = [{'text': 'a'}, {'text': ''}, {'text': 'b'}, {'other': 1}]
    assert read(tmp_path, 'c.jsonl', '\n'.join(map(json.dumps, lines))) == ['a', 'b']
    assert read(tmp_path, 'd.csv', 'id,body text\n1,a\n', columns={'text_a': 'body text'}) == ['a']


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('a.jsonl', '{"text": 3}', 'line 1: 3 stands where a text must'),
        ('a.jsonl', '{"text": "a", "title": "b"}', "the columns are 'text', 'title'; set it to"),
        ('a.txt', '\n \n', "split 'train' is empty|has no examples|is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, text)


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
    return tokenize.load_tokenizer(toy.write_backbone(tmp_path_factory.mktemp('bert')))


TEXTS = ['the cat', 'xyz ' * 30 + 'dog', 'a', 'rain snow ' * 20]


def test_parts_follow_one_another_and_lose_nothing(tokenizer, tmp_path):
    encoded = corpus.encode(TEXTS, tokenizer, 16, cache_dir=tmp_path)
    assert encoded.lengths.max() == 16 and encoded.truncated == 0
    for number, text in enumerate(TEXTS):
        own = encoded.select(np.flatnonzero(encoded.rows == number))
        words = own.tokens['word'] >= 0
        expected = tokenizer(text, add_special_tokens=False)
        assert own.tokens['input_ids'][words].tolist() == expected['input_ids']
        assert own.tokens['word'][words].tolist() == expected.word_ids()
        assert (own.tokens['input_ids'][own.offsets[:-1]] == tokenizer.cls_token_id).all()
        assert (own.tokens['input_ids'][own.offsets[1:] - 1] == tokenizer.sep_token_id).all()
    assert (np.diff(encoded.rows) >= 0).all() and len(encoded) > len(TEXTS)
    (stored,) = tmp_path.iterdir()
    stored.touch()
    again = corpus.encode(TEXTS, tokenizer, 16, cache_dir=tmp_path)
    assert again.fingerprint() == encoded.fingerprint() and (again.rows == encoded.rows).all()


def test_a_length_that_fits_no_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match='max_length is 2, which leaves no room'):
        corpus.encode(TEXTS, tokenizer, 2)
