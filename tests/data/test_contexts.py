"""Windows over contexts: what they hold, and that answers come back to the character."""

import dataclasses
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import small_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax.data import answers, contexts, squad, tokenize

TOKENIZERS = {
    'bert': small_tokenizers.bert(),
    'roberta': small_tokenizers.roberta(),
    'roberta, spaces kept': small_tokenizers.roberta(trim=False),
}
SHAPE = contexts.Shape(max_length=24, stride=6, question=8)
every_tokenizer = pytest.mark.parametrize('name', TOKENIZERS)


def rows_of(*examples):
    """Return rows of (question, context, begin, end); None for no answer."""
    columns = {name: [] for name in ('id', 'question', 'context', 'answers', 'starts')}
    for number, (question, context, begin, end) in enumerate(examples):
        found = [] if begin is None else [begin]
        given_ = (str(number), question, context, [context[b:end] for b in found], found)
        for column, value in zip(columns.values(), given_, strict=True):
            column.append(value)
    features = {name: datasets.Value('string') for name in ('id', 'question', 'context')}
    features['answers'] = datasets.List(datasets.Value('string'))
    features['starts'] = datasets.List(datasets.Value('int32'))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def item(encoded, example):
    own = slice(*encoded.offsets[example : example + 2])
    return {name: column[own] for name, column in (encoded.tokens | encoded.aside).items()}


@every_tokenizer
def test_a_window_is_what_the_tokenizer_makes_of_the_pair(name):
    tokenizer = TOKENIZERS[name]
    encoded = contexts.encode(rows_of(('a cat ?', 'the fox', None, None)), tokenizer, SHAPE)
    expected = tokenizer('a cat ?', 'the fox', return_token_type_ids=True)
    found = item(encoded, 0)
    assert found['input_ids'].tolist() == expected['input_ids']
    assert found['token_type_ids'].tolist() == expected['token_type_ids']
    places = np.flatnonzero(np.array(expected.sequence_ids(0)) == 1)
    assert (encoded.examples['first'], encoded.examples['last']) == (places[0], places[-1])
    assert encoded.rows.tolist() == [0] and encoded.truncated == 0


ALPHABET = 'aZ ,½é\u0301ß\u200d\u200b😀\u2028\r\n\tא狐\x00'


@st.composite
def example(draw):
    context = draw(st.text(ALPHABET, min_size=1, max_size=80))
    begin = draw(st.integers(0, len(context) - 1))
    end = draw(st.integers(begin + 1, min(len(context), begin + 12)))
    none = draw(st.booleans()) and draw(st.booleans())
    question = draw(st.text(ALPHABET, max_size=30))
    return (question, context, None if none else begin, end)


@settings(deadline=None, max_examples=60)
@given(st.lists(example(), min_size=1, max_size=4), st.sampled_from(sorted(TOKENIZERS)))
def test_windows_cover_their_context_and_answers_come_back_to_the_character(examples, name):
    rows, tokenizer = rows_of(*examples), TOKENIZERS[name]
    encoded = contexts.encode(rows, tokenizer, SHAPE)
    assert encoded.lengths.max() <= SHAPE.max_length
    assert encoded.rows.tolist() == sorted(encoded.rows.tolist())
    assert set(encoded.rows.tolist()) == set(range(len(rows)))
    held, characters = answers.restore(encoded)
    for row, (_, context, begin, end) in enumerate(examples):
        pieces = tokenizer(context, add_special_tokens=False)['input_ids']
        own = np.flatnonzero(encoded.rows == row)
        covered, before = [], None
        for number in own:
            inside = slice(encoded.examples['first'][number], encoded.examples['last'][number] + 1)
            window = item(encoded, number)['input_ids'][inside].tolist()
            shared = 0 if before is None else SHAPE.stride
            assert before is None or before[-shared:] == window[:shared]
            covered, before = covered + window[shared:], window
        assert covered == pieces
        if begin is None:
            assert not encoded.examples['start'][own].any()
        for number, (first, last) in zip(held, characters, strict=True):
            if number in own:
                assert context[first:last] == context[begin:end]


@settings(deadline=None, max_examples=40)
@given(example(), st.sampled_from(sorted(TOKENIZERS)))
def test_a_label_is_the_shortest_run_of_pieces_and_short_ones_are_held(one, name):
    _, _, begin, end = one
    if begin is None:
        return
    encoded = contexts.encode(rows_of(one), TOKENIZERS[name], SHAPE)
    held, _ = answers.restore(encoded)
    whole = contexts.encode(rows_of(one), TOKENIZERS[name], contexts.Shape(2000, 6, 8))
    run = slice(whole.examples['first'][0], whole.examples['last'][0] + 1)
    characters = item(whole, 0)['characters'][run]
    touching = [b < end and e > begin for b, e in characters]
    assert bool(len(held)) >= (0 < sum(touching) <= SHAPE.stride)
    for number in held:
        start, last = (encoded.examples[key][number] for key in ('start', 'end'))
        own = item(encoded, number)['characters']
        assert own[start, 0] < end and own[start, 1] > begin
        assert own[last, 0] < end and own[last, 1] > begin
        assert last - start + 1 == np.flatnonzero(touching)[-1] - np.flatnonzero(touching)[0] + 1


def test_pieces_keep_the_marks_that_follow_them():
    context = 'cafe\u0301 x\u0301\u0302'
    encoded = contexts.encode(rows_of(('a', context, 0, 5)), TOKENIZERS['bert'], SHAPE)
    spans = item(encoded, 0)['characters'][encoded.examples['first'][0] : -1]
    assert [context[b:e] for b, e in spans] == ['c', 'a', 'f', 'e\u0301', 'x\u0301\u0302']


def test_what_sticks_out_of_an_answer_is_kept_and_told(caplog):
    context = 'the cat is'  # "cat" is one piece
    rows = rows_of(('a', context, 5, 6), ('a', context, 3, 8), ('a', context, 4, 7))
    encoded = contexts.encode(rows, TOKENIZERS['bert'], SHAPE)
    outside = [item(encoded, i)['outside'][encoded.examples['start'][i]].tolist() for i in range(3)]
    assert outside == [[1, 1], [-1, -1], [0, 0]]
    assert '1 of 3 answers begin or end inside a piece' in caplog.text


def test_answers_that_no_window_or_piece_holds_are_told(caplog):
    rows = rows_of(('a', 'the ' * 40, 0, 150), ('a', 'x \u200b', 2, 3))
    encoded = contexts.encode(rows, TOKENIZERS['bert'], SHAPE)
    assert not encoded.examples['start'].any()
    assert '1 of 2 answers lie whole in no window; raise data.max_length' in caplog.text
    assert '1 of 2 answers stand in characters that the tokenizer drops' in caplog.text


def test_a_long_question_is_cut_and_told(caplog):
    encoded = contexts.encode(rows_of(('the ' * 9, 'a cat', 2, 5)), TOKENIZERS['bert'], SHAPE)
    assert encoded.truncated == 1 and encoded.examples['first'][0] == 1 + 8 + 1
    assert '1 of 1 questions (100.0 %) are longer than task.question_length = 8' in caplog.text


def test_a_context_of_ten_thousand_words(caplog):
    context = ' '.join(['the'] * 9_999 + ['cat'])
    shape = contexts.Shape(384, 128, 64)
    begin = len(context) - 3
    encoded = contexts.encode(rows_of(('a', context, begin, begin + 3)), TOKENIZERS['bert'], shape)
    room = 384 - 3 - 1
    assert len(encoded) == 1 + -(-(10_000 - room) // (room - 128))
    assert np.flatnonzero(encoded.examples['start']).tolist() == [len(encoded) - 1]
    assert not caplog.text


def test_token_types_tell_question_and_context_apart_unless_asked_not_to(tmp_path):
    given = rows_of(('a cat ?', 'the fox', None, None)), TOKENIZERS['bert']
    plain = contexts.encode(*given, SHAPE, None, tmp_path)
    shape = dataclasses.replace(SHAPE, types=False)
    without = contexts.encode(*given, shape, None, tmp_path)
    assert sorted(set(plain.tokens['token_type_ids'])) == [0, 1]
    assert not without.tokens['token_type_ids'].any()
    np.testing.assert_array_equal(without.tokens['input_ids'], plain.tokens['input_ids'])


def test_windows_are_kept_between_runs(tmp_path, monkeypatch):
    rows = rows_of(('a cat ?', 'the ' * 40 + 'fox', 160, 163), ('the ' * 9, 'a cat', 2, 5))
    given = rows, TOKENIZERS['bert'], SHAPE, None, tmp_path
    first = contexts.encode(*given)
    monkeypatch.setattr(contexts, '_pieces', lambda *_: pytest.fail('tokenized again'))
    again = contexts.encode(*given)
    assert again.fingerprint() == first.fingerprint() and again.truncated == first.truncated == 1
    for name, column in (first.aside | {'rows': first.rows}).items():
        np.testing.assert_array_equal((again.aside | {'rows': again.rows})[name], column)
    monkeypatch.undo()
    other = contexts.encode(*given[:2], contexts.Shape(24, 3, 8), None, tmp_path)
    assert other.offsets[-1] != first.offsets[-1]


def test_a_context_without_a_piece_is_one_window():
    encoded = contexts.encode(rows_of(('a', '\u200b', None, None)), TOKENIZERS['bert'], SHAPE)
    assert encoded.lengths.tolist() == [4]
    assert encoded.examples['last'][0] == encoded.examples['first'][0] - 1


def test_shapes_that_do_not_work():
    rows, tokenizer = rows_of(('a', 'a', None, None)), TOKENIZERS['bert']
    with pytest.raises(ValueError, match=r'max_length is 24, .* leaves 13 .* task.stride = 13'):
        contexts.encode(rows, tokenizer, contexts.Shape(24, 13, 8))
    with pytest.raises(ValueError, match='max_length is 24, but the model has 20 positions'):
        contexts.encode(rows, tokenizer, SHAPE, positions=20)


def test_a_tokenizer_without_special_tokens_is_refused():
    plain = small_tokenizers.roberta()
    plain.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match='expects special tokens before, between and behind'):
        contexts.frame_of(plain)


FILES = os.environ.get('QUESTION_FILES', '')


@pytest.mark.skipif(not FILES, reason='set QUESTION_FILES to files of questions, with : between')
@pytest.mark.parametrize('path', FILES.split(':'))
@pytest.mark.parametrize('name', [*TOKENIZERS, *filter(None, [os.environ.get('TOKENIZER')])])
def test_real_answers_come_back_to_the_character(path, name, capsys):
    """Every answer, also the second and third of a question; see `data.answers`."""
    tokenizer = TOKENIZERS.get(name) or tokenize.load_tokenizer(name)
    rows = squad.read({'train': path})['train']
    single = [
        (row['question'], row['context'], start, start + len(answer))
        for row in rows
        for answer, start in zip(row['answers'], row['starts'], strict=True)
    ]
    encoded = contexts.encode(rows_of(*single), tokenizer, contexts.Shape(100_000, 128, 64))
    held, characters = answers.restore(encoded)
    wrong = [
        number
        for number, (first, last) in zip(held, characters, strict=True)
        if single[number][1][first:last] != single[number][1][slice(*single[number][2:])]
    ]
    pairs = np.stack([encoded.examples[key][held] for key in ('start', 'end')], 1)
    sticking = encoded.aside['outside'][encoded.offsets[held, None] + pairs, [0, 1]]
    with capsys.disabled():
        print(
            f'\n{Path(path).parent.name}/{Path(path).name}, {Path(name).name[:20]}: '
            f'{len(rows)} questions, {len(single)} answers, {len(held)} have pieces, '
            f'{len(held) - len(wrong)} come back exactly, of which {(sticking > 0).any(1).sum()} '
            'begin or end inside a piece'
        )
    assert not wrong and len(held) == len(single)
