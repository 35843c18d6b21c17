import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_jax.data import tokenize
from adapters_jax.data.tokenize import encode, load_tokenizer, tokenizer_fingerprint

WORDS = ['a', 'man', 'plane', 'off', 'is', 'unknown']
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(' '.join)


@pytest.fixture(scope='module')
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def dataset_of(pairs):
    first, second = zip(*pairs, strict=True)
    return datasets.Dataset.from_dict({'text_a': first, 'text_b': second})


def parts(encoded):
    return {
        name: np.split(column, encoded.offsets[1:-1]) for name, column in encoded.tokens.items()
    }


def test_padding_and_truncation_of_the_file_are_reset(tokenizer):
    assert tokenizer.backend_tokenizer.padding is None
    assert tokenizer.backend_tokenizer.truncation is None
    split = datasets.Dataset.from_dict({'text_a': ['a', 'man ' * 50]})
    assert encode(split, tokenizer, 100).lengths.tolist() == [3, 52]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.integers(5, 30))
def test_pairs_are_those_of_the_tokenizer_cut_longest_first(tokenizer, pairs, max_length):
    encoded = encode(dataset_of(pairs), tokenizer, max_length)
    columns = parts(encoded)
    cut = 0
    for i, (first, second) in enumerate(pairs):
        a, b = (tokenizer.tokenize(text) for text in (first, second))
        cut += len(a) + len(b) + 3 > max_length
        while len(a) + len(b) + 3 > max_length:
            (a if len(a) > len(b) else b).pop()
        tokens = tokenizer.convert_ids_to_tokens(columns['input_ids'][i])
        assert len(tokens) == len(a) + len(b) + 3
        kept = tokens[1 : tokens.index('[SEP]')], tokens[tokens.index('[SEP]') + 1 : -1]
        # Which of two equally long texts loses a token is the tokenizer's choice.
        assert abs(len(kept[0]) - len(a)) <= 1
        assert tokenizer.tokenize(first)[: len(kept[0])] == kept[0]
        assert tokenizer.tokenize(second)[: len(kept[1])] == kept[1]
        types = [0] * (len(kept[0]) + 2) + [1] * (len(kept[1]) + 1)
        assert columns['token_type_ids'][i].tolist() == types
    assert encoded.truncated == cut


def test_more_texts_than_one_call_takes_keep_their_order(tokenizer, monkeypatch):
    split = datasets.Dataset.from_dict({'text_a': ['a ' * (i % 7 + 1) for i in range(50)]})
    whole = encode(split, tokenizer, 16)
    monkeypatch.setattr(tokenize, 'BATCH', 8)
    assert encode(split, tokenizer, 16).fingerprint() == whole.fingerprint()
    assert whole.lengths.tolist() == [i % 7 + 3 for i in range(50)]


def test_labels_are_mapped_and_never_cached(tokenizer, tmp_path):
    split = datasets.Dataset.from_dict({'text_a': ['a', 'man'], 'label': ['no', 'yes']})

    def ids(labels):
        return np.array([['no', 'yes'].index(label) for label in labels], np.int32)

    first = encode(split, tokenizer, 9, ids, cache_dir=tmp_path)
    second = encode(split, tokenizer, 9, lambda labels: ids(labels) + 5, cache_dir=tmp_path)
    assert first.examples['label'].tolist() == [0, 1]
    assert second.examples['label'].tolist() == [5, 6]
    assert encode(split, tokenizer, 9).examples == {}
    assert encode(split.remove_columns('label'), tokenizer, 9, ids).examples == {}


def test_cache_is_read_and_named_by_texts_length_and_tokenizer(tokenizer, tmp_path, monkeypatch):
    split = datasets.Dataset.from_dict({'text_a': ['a man', 'is off ' * 9]})
    fresh = encode(split, tokenizer, 9, cache_dir=tmp_path / 'new')
    assert [path.suffix for path in (tmp_path / 'new').iterdir()] == ['.npz']
    with monkeypatch.context() as patched:
        patched.setattr(tokenize, '_encode_texts', lambda *_: pytest.fail('not read from cache'))
        cached = encode(split, tokenizer, 9, cache_dir=tmp_path / 'new')
    assert cached.fingerprint() == fresh.fingerprint()
    assert cached.truncated == fresh.truncated == 1
    encode(split, tokenizer, 8, cache_dir=tmp_path / 'new')
    encode(split.select([1, 0]), tokenizer, 9, cache_dir=tmp_path / 'new')
    pair = split.add_column('text_b', ['a', 'a'])
    encode(pair, tokenizer, 9, cache_dir=tmp_path / 'new')
    assert len(list((tmp_path / 'new').iterdir())) == 4


def test_a_damaged_cache_file_is_replaced(tokenizer, tmp_path, caplog):
    split = datasets.Dataset.from_dict({'text_a': ['a man', 'is off']})
    fresh = encode(split, tokenizer, 9, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    packed = whole.index(b'PK\x01\x02') + 10  # how the first member is, by the table of contents
    other = bytearray(whole)
    other[packed] = 255
    for damaged in (b'', whole[: len(whole) // 2], b'rubbish', bytes(other)):
        path.write_bytes(damaged)
        again = encode(split, tokenizer, 9, cache_dir=tmp_path)
        assert again.fingerprint() == fresh.fingerprint()
        assert 'is damaged' in caplog.text
        assert path.stat().st_size == len(whole)
        caplog.clear()


def test_a_write_that_fails_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np, 'savez', full)
    split = datasets.Dataset.from_dict({'text_a': ['a man']})
    with pytest.raises(OSError, match=r'no room to write .*no space left'):
        encode(split, tokenizer, 9, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_truncation_is_logged(tokenizer, caplog):
    split = datasets.Dataset.from_dict({'text_a': ['a', 'man ' * 9, 'a ' * 8]})
    assert encode(split, tokenizer, 10).truncated == 1
    assert '1 of 3 examples (33.3 %) are longer than max_length = 10' in caplog.text
    caplog.clear()
    assert encode(split, tokenizer, 11).truncated == 0
    assert caplog.text == ''


def test_fingerprint_ignores_what_a_call_switches_on(tokenizer):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(['a man'], max_length=5, truncation=True, padding='max_length')
    assert tokenizer_fingerprint(tokenizer) == before
    other = load_tokenizer(tokenizer.name_or_path)
    assert tokenizer_fingerprint(other) == before
    other.add_tokens(['flugzeug'])
    assert tokenizer_fingerprint(other) != before


@pytest.mark.parametrize(
    ('max_length', 'positions', 'message'),
    [(600, 512, 'max_length is 600, but the model has 512 positions'), (2, None, 'no room')],
)
def test_lengths_that_cannot_be_are_refused(tokenizer, max_length, positions, message):
    split = datasets.Dataset.from_dict({'text_a': ['a']})
    with pytest.raises(ValueError, match=message):
        encode(split, tokenizer, max_length, positions=positions)


def test_folders_without_tokenizer_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no folder .*nowhere'):
        load_tokenizer(tmp_path / 'nowhere')
    (tmp_path / 'notes.md').write_text('')
    with pytest.raises(ValueError, match=r'no readable tokenizer \(it holds notes\.md\)'):
        load_tokenizer(tmp_path)
