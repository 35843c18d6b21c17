"""Words and their pieces: one token stands for each word, whatever the tokenizer makes of it."""

import datasets
import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_jax.data import words
from adapters_jax.data.tokenize import load_tokenizer

WORDS = ['a', 'man', 'flute', 'unknown', '\u200b', 'what-is', 'of off', '\u00a0', "plane's", '#']
SENTENCES = st.lists(st.lists(st.sampled_from(WORDS), max_size=14), min_size=1, max_size=4)


@pytest.fixture(scope='module')
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope='module')
def byte_level():
    """A tokenizer such as RoBERTa's, to which a word inside a text is another than at its begin."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>'))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ['<s>', '</s>', '<unk>', '<pad>']
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([' a man with a flute', 'a plane'], trainer)
    backend.post_processor = tokenizers.processors.RobertaProcessing(('</s>', 1), ('<s>', 0))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token='<unk>', bos_token='<s>', eos_token='</s>'
    )


def examples(encoded):
    """The ids and words of each example, and its row."""
    ids = np.split(encoded.tokens['input_ids'], encoded.offsets[1:-1])
    word = np.split(encoded.aside['word'], encoded.offsets[1:-1])
    return list(zip(ids, word, encoded.rows, strict=True))


@pytest.mark.parametrize('kind', ['tokenizer', 'byte_level'])
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SENTENCES, st.integers(3, 20))
def test_every_word_of_every_sentence_has_one_token(request, kind, sentences, max_length):
    tokenizer = request.getfixturevalue(kind)
    encoded = words.encode(sentences, tokenizer, max_length)
    assert encoded.lengths.max() <= max_length
    assert set(encoded.rows) == set(range(len(sentences)))
    for row, sentence in enumerate(sentences):
        own = [word for _, word, number in examples(encoded) if number == row]
        seen = np.concatenate(own)
        assert seen[seen >= 0].tolist() == list(range(len(sentence)))
    for ids, word, row in examples(encoded):
        first, last = ids[0], ids[-1]
        assert tokenizer.convert_ids_to_tokens([first, last]) in (
            ['[CLS]', '[SEP]'],
            ['<s>', '</s>'],
        )
        assert word[0] == word[-1] == -1
        for token, number in zip(ids, word, strict=True):
            if number >= 0:
                text = ''.join(' ' + w for w in sentences[row][number : number + 1])
                pieces = tokenizer(text, add_special_tokens=False)['input_ids']
                assert token == (pieces[0] if pieces else tokenizer.unk_token_id)


def test_a_sentence_that_fits_is_what_the_tokenizer_makes_of_its_text(tokenizer):
    sentences = [['What', 'is', 'a', "plane's", 'flute', '?'], ['a'], []]
    encoded = words.encode(sentences, tokenizer, 30, positions=30)
    texts = datasets.Dataset.from_dict({'text_a': [' '.join(s) for s in sentences]})
    expected = tokenizer(texts['text_a'][:], return_attention_mask=False)
    for (ids, _, _), theirs in zip(examples(encoded), expected['input_ids'], strict=True):
        assert ids.tolist() == theirs
    types = np.concatenate(expected['token_type_ids'])
    assert encoded.tokens['token_type_ids'].tolist() == types.tolist()
    assert encoded.examples == {} and encoded.truncated == 0
    with pytest.raises(ValueError, match='max_length is 30, but the model has 16 positions'):
        words.encode(sentences, tokenizer, 30, positions=16)


def test_it_is_kept_on_disk_and_read_from_there(tokenizer, tmp_path, monkeypatch):
    sentences = [['a', 'man', 'a', 'man']] * 3
    first = words.encode(sentences, tokenizer, 5, tmp_path)
    monkeypatch.setattr(words, '_pieces', None)  # nothing is encoded again
    again = words.encode(sentences, tokenizer, 5, tmp_path)
    assert again.fingerprint() == first.fingerprint()
    assert again.rows.tolist() == first.rows.tolist() == [0, 0, 1, 1, 2, 2]
    assert again.aside['word'].tolist() == first.aside['word'].tolist()
    monkeypatch.undo()
    assert len(words.encode(sentences, tokenizer, 6, tmp_path)) == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_what_the_tokenizer_does_not_see_is_told(tokenizer, caplog):
    encoded = words.encode([['a', '\u200b', 'man'], [' ']], tokenizer, 9)
    tokens = tokenizer.convert_ids_to_tokens(encoded.tokens['input_ids'])
    assert tokens == ['[CLS]', 'a', '[UNK]', 'man', '[SEP]', '[CLS]', '[UNK]', '[SEP]']
    assert 'sees nothing in 2 words' in caplog.text and '[UNK]' in caplog.text
