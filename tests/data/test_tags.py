"""Tags from a real spaCy pipeline, and from words to word pieces."""

import re
import subprocess
import sys

import datasets
import numpy as np
import pipelines
import pytest
import spacy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_jax.data import batches, tokenize
from adapters_jax.data.encoded import TAGS, Encoded, tokens_on_end
from adapters_jax.data.policies import Buckets, Packed
from adapters_jax.data.preprocess import chain, tags
from adapters_jax.data.preprocess.align import piece_tags
from adapters_jax.data.preprocess.document import Document

NOUN, VERB, DET = (tags.UNIVERSAL.index(tag) + 1 for tag in ('NOUN', 'VERB', 'DET'))


@pytest.fixture(scope='session')
def pipeline(tmp_path_factory):
    """A spaCy pipeline on the disk that knows a few words."""
    known = {'NOUN': ['man', 'plane', 'capital'], 'DET': ['a', 'an'], 'AUX': ['is']}
    return pipelines.write(tmp_path_factory.mktemp('spacy') / 'few', known)


@pytest.fixture(scope='module')
def tokenizer(tokenizer_dir):
    return tokenize.load_tokenizer(tokenizer_dir)


def by_spacy(pipeline):
    return chain.create([f'tags[spacy={pipeline}]'], lambda directory: None)


def by_letter():
    """Return a chain that tags words by the letter they begin with, and marks them otherwise."""
    known = {'a': 'DET', 'm': 'NOUN', 'i': 'VERB'}
    tagger = tags.LoadedTagger(
        lambda texts: [[known.get(word[0].lower(), 'X') for word in words] for words in texts],
        tags.UNIVERSAL,
        'by letter',
    )
    return chain.create(['tags[adapter=x]'], lambda directory: tagger)


def test_spacy_tags_the_words_as_they_are(pipeline):
    made = by_spacy(pipeline)
    documents, _ = made.run(['A man is off', 'the plane', '\x00'])
    assert [document.tags for document in documents] == [
        ('DET', 'NOUN', 'AUX', ''),
        ('', 'NOUN'),
        (),
    ]
    assert made.to_json()[0]['source'] == 'spaCy en_few_words 1.2'
    assert made.inventory == tags.UNIVERSAL and len(tags.UNIVERSAL) == 17


def test_a_trained_tagger_of_spacy_will_do(tmp_path):
    made = spacy.blank('en')
    tagger = made.add_pipe('morphologizer')
    for tag in ('NOUN', 'VERB'):
        tagger.add_label(f'POS={tag}')
    example = spacy.training.Example.from_dict(
        made.make_doc('cat sleeps'), {'pos': ['NOUN', 'VERB'], 'morphs': ['', '']}
    )
    optimizer = made.initialize(lambda: [example])
    for _ in range(20):
        made.update([example], sgd=optimizer)
    made.to_disk(tmp_path / 'trained')
    (document,), _ = by_spacy(tmp_path / 'trained').run(['cat sleeps'])
    assert document.tags == ('NOUN', 'VERB')


def test_a_pipeline_without_parts_of_speech_is_refused(tmp_path):
    spacy.blank('en').to_disk(tmp_path / 'blank')
    with pytest.raises(ValueError, match=r'spaCy en_pipeline 0.0.0 gave no word a part of speech'):
        by_spacy(tmp_path / 'blank').run(['a man'])


def test_a_missing_pipeline_is_named_with_the_command_that_mends_it():
    sentence = "no pipeline 'en_nowhere'; install it (python -m spacy download en_nowhere)"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        by_spacy('en_nowhere')


def test_without_spacy_everything_else_works(pipeline):
    """In a process of its own, where importing spaCy fails."""
    script = (
        'import sys; sys.modules["spacy"] = None\n'
        'from adapters_jax.data.preprocess import chain\n'
        'made = chain.create(["lower", "stop_words"], None)\n'
        'print(made.run(["The Cat"])[0][0].text)\n'
        'try: chain.create(["tags[spacy=en_core_web_sm]"], None)\n'
        'except ValueError as error: print(error)\n'
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.stdout == (
        'cat\n'
        'tags[spacy=en_core_web_sm] needs spaCy, which is not installed: '
        'pip install "spacy==3.8.18"\n'
    ), done.stderr


PIECES = st.sampled_from(
    [
        *('a', 'man', 'is', 'off', 'Plane', "isn't", '?', '3.5', '\x00'),
        *('e\u0301', '🦊', '👩\u200d👧', 'ﬁ', '狐'),
    ]
)
TEXTS = st.lists(
    st.tuples(PIECES, st.sampled_from([' ', '  ', '\t', '\u00a0', ''])), min_size=1, max_size=8
).map(lambda parts: ''.join(word + gap for word, gap in parts))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.integers(5, 40))
def test_each_piece_has_the_tag_of_the_word_whose_letters_it_is_of(tokenizer, pairs, max_length):
    made = by_letter()
    first, second = (list(column) for column in zip(*pairs, strict=True))
    split = datasets.Dataset.from_dict({'text_a': first, 'text_b': second})
    encoded = tokenize.encode(split, tokenizer, max_length, chain=made)
    plain = tokenize.encode(split, tokenizer, max_length)
    assert np.array_equal(encoded.tokens['input_ids'], plain.tokens['input_ids'])
    assert encoded.tokens[TAGS].dtype == np.int32
    columns = np.split(encoded.tokens[TAGS], encoded.offsets[1:-1])
    for texts, found in zip(pairs, columns, strict=True):
        pieces = tokenizer(
            *texts, max_length=max_length, truncation='longest_first', return_offsets_mapping=True
        )
        documents = [made.run([text])[0][0] for text in texts]
        for i, ((begin, end), number) in enumerate(
            zip(pieces['offset_mapping'], pieces.sequence_ids(), strict=True)
        ):
            expected = 0
            if number is not None:
                own = documents[number]
                # The longhand of the definition: the first word that has one of the letters.
                for (a, b), tag in zip(own.spans, own.tags, strict=True):
                    if {*range(a, b)} & {*range(begin, end)}:
                        expected = tags.UNIVERSAL.index(tag) + 1
                        break
            assert found[i] == expected, (texts, i)


def test_pieces_of_a_long_word_and_of_a_pair(tokenizer):
    """By hand: nothing here is computed as the code does it."""
    ids = {'DET': DET, 'NOUN': NOUN}
    documents = [Document('a plane', ((0, 1), (2, 7)), ('DET', 'NOUN')), Document('\x00')]
    offsets = [(0, 0), (0, 1), (2, 4), (4, 7), (1, 3), (0, 0), (0, 1), (0, 0)]
    sequences = [None, 0, 0, 0, 0, None, 1, None]
    found = piece_tags(offsets, sequences, documents, ids)
    assert found.tolist() == [0, DET, NOUN, NOUN, NOUN, 0, 0, 0]


def test_tags_outside_of_the_inventory_are_none():
    document = Document('a plane', ((0, 1), (2, 7)), ('', 'NOUN'))
    assert piece_tags([(0, 1), (2, 7)], [0, 0], [document], {'NOUN': 3}).tolist() == [0, 3]
    assert piece_tags([], [], [document], {}).tolist() == []


def test_steps_change_the_tokens_and_the_cache_keeps_them_apart(tokenizer, tmp_path, monkeypatch):
    split = datasets.Dataset.from_dict({'text_a': ['what IS a plane', 'is a']})
    chains = [
        chain.create(names, lambda directory: None)
        for names in ([], ['lower'], ['stop_words'], ['lower', 'stop_words'])
    ]
    made = [*chains, by_letter()]
    fresh = [tokenize.encode(split, tokenizer, 9, cache_dir=tmp_path, chain=c) for c in made]
    assert len(list(tmp_path.iterdir())) == len(made)
    assert fresh[0].fingerprint() == tokenize.encode(split, tokenizer, 9).fingerprint()
    words = [
        tokenizer.decode(np.split(e.tokens['input_ids'], e.offsets[1:-1])[0]) for e in fresh[:3]
    ]
    assert words == ['[CLS] what is a plane [SEP]'] * 2 + ['[CLS] plane [SEP]']
    with monkeypatch.context() as patched:
        patched.setattr(chain.Chain, 'run', lambda *_: pytest.fail('not read from the cache'))
        again = [tokenize.encode(split, tokenizer, 9, cache_dir=tmp_path, chain=c) for c in made]
    assert [e.fingerprint() for e in again] == [e.fingerprint() for e in fresh]
    assert len({e.fingerprint() for e in fresh}) == 3  # this tokenizer makes small letters itself


def test_texts_without_words_are_told_of_from_the_cache_too(tokenizer, tmp_path, caplog):
    split = datasets.Dataset.from_dict({'text_a': ['what is a', 'plane', 'a flute', 'is ?']})
    made = chain.create(['stop_words'], lambda directory: None)
    for _ in range(2):
        caplog.clear()
        encoded = tokenize.encode(split, tokenizer, 9, cache_dir=tmp_path, chain=made)
        assert '2 of 4 examples (50.0 %) had no word left after a step of data.prep' in caplog.text
    assert encoded.lengths.tolist() == [5, 3, 3, 4]


@pytest.mark.parametrize('policy', [Packed(16, 2, 4), Buckets((8,), 3)])
def test_batches_have_the_column(tokenizer, policy):
    split = datasets.Dataset.from_dict({'text_a': ['a man is off', 'a man', 'plane', 'is a']})
    encoded = tokenize.encode(split, tokenizer, 9, chain=by_letter())
    plan = batches.plan_epoch(encoded.lengths, policy, 0, 0, shuffle=True)
    for index in range(len(plan)):
        batch = batches.assemble(encoded, plan, index, pad_id=0)
        pieces, found = batch['input_ids'], batch[TAGS]
        words = tokenizer.convert_tokens_to_ids(['a', 'man', 'is', 'off', 'plane'])
        expected = dict(zip(words, [DET, NOUN, VERB, 17, 17], strict=True))
        assert found.tolist() == [[expected.get(int(i), 0) for i in row] for row in pieces]


def test_sets_with_and_without_tags_on_end():
    def encoded(**columns):
        return Encoded(columns, np.array([0, 2]), {})

    ids, own = np.array([5, 6], np.int32), np.array([1, 2], np.int32)
    plain, tagged = encoded(input_ids=ids), encoded(input_ids=ids, tags=own)
    found = tokens_on_end([plain, tagged])
    assert found[TAGS].tolist() == [0, 0, 1, 2] and found[TAGS].dtype == np.int32
    assert set(tokens_on_end([plain, plain])) == {'input_ids'}
