import math
import pathlib
from decimal import Decimal

import pytest

from adapters_jax.data.columns import Choice, at_lines, build, choose

PLACE = at_lines(pathlib.Path('x.csv'), [2, 3, 5])


@pytest.mark.parametrize(
    ('names', 'expected'),
    [
        (['id', 'Text', 'Label'], {'text_a': 'Text', 'label': 'Label'}),
        (['text', 'category'], {'text_a': 'text', 'label': 'category'}),
        (
            ['sentence2', 'sentence1', 'score'],
            {'text_a': 'sentence1', 'text_b': 'sentence2', 'label': 'score'},
        ),
        (
            ['Quality', '#1 ID', '#1 String', '#2 String'],
            {'text_a': '#1 String', 'text_b': '#2 String', 'label': 'Quality'},
        ),
    ],
)
def test_usual_names_are_detected(names, expected):
    assert choose(names, Choice(), labelled=True, where='f') == expected


@pytest.mark.parametrize(
    ('names', 'choice', 'labelled', 'message'),
    [
        (['foo', 'label'], Choice(), True, "no column is known to hold the text; .*'foo', 'label'"),
        (['text', 'sentence', 'label'], Choice(), True, 'several columns could hold the text'),
        (['premise', 'hypothesis', 'text', 'label'], Choice(), True, 'several .* the text'),
        (['text', 'foo'], Choice(), True, 'no column .* the label; .*data.columns.label'),
        (['text', 'label', 'score'], Choice(), False, 'several columns could hold the label'),
        (['text', 'label'], Choice(text_a='txt'), True, "no column 'txt' .*'text', 'label'"),
        (['text', 'label'], Choice(label='7'), True, "no column '7' .*0 to 1 by position"),
        (['text', 'label'], Choice(text_b='text'), True, 'text_b is set without'),
        (['text', 'label'], Choice(text_a='text', text_b='text'), True, 'used twice'),
    ],
)
def test_doubtful_columns_are_an_error_that_lists_them(names, choice, labelled, message):
    with pytest.raises(ValueError, match=message):
        choose(names, choice, labelled, 'f')


@pytest.mark.parametrize(
    ('names', 'choice'),
    [(['Text', 'text', 'label'], Choice()), (['text', 'y', 'Y', 'Text'], Choice(label='y'))],
)
def test_columns_of_one_name_are_not_guessed(names, choice):
    with pytest.raises(ValueError, match=r"several columns of one name, .*'text'"):
        choose(names, choice, labelled=True, where='f')
    chosen = choose(names, Choice(text_a='text', label=choice.label), labelled=True, where='f')
    assert chosen['text_a'] == 'text'


def test_positions_and_names_both_choose():
    names = ['a', 'b', 'c']
    chosen = choose(names, Choice(text_a=1, label='2'), labelled=True, where='f')
    assert chosen == {'text_a': 'b', 'label': 'c'}


def test_an_unlabelled_split_needs_no_label_column():
    assert choose(['text'], Choice(), False, 'f') == {'text_a': 'text'}
    assert choose(['text'], Choice(label='y'), False, 'f') == {'text_a': 'text'}
    assert choose(['text', 'score'], Choice(label='y'), False, 'f') == {'text_a': 'text'}
    with pytest.raises(ValueError, match="no column 'y'"):
        choose(['text'], Choice(label='y'), True, 'f')


@pytest.mark.parametrize(
    ('cells', 'choice', 'header'),
    [
        (['Text', 'x'], Choice(), True),
        (['my words', 'x'], Choice(text_a='my words'), True),
        (['hello there', 'x'], Choice(text_a='words'), True),
        (['hello there', 'x'], Choice(text_a=0, label=1), False),
        (['text', 'label'], Choice(text_a=0, label=1), True),
        (['number', 'text', 'label'], Choice(text_a=1, label=2), True),
        (['question', 'label'], Choice(text_a='words', label=1), True),
        (['review_text', 'label'], Choice(text_a=0), True),
        (['premise', 'hypothesis', 'gold'], Choice(text_a=0, text_b=1, label=2), True),
    ],
)
def test_header_is_seen_from_its_names(cells, choice, header):
    assert choice.header_in(cells) is header


def test_header_that_cannot_be_seen_is_an_error():
    with pytest.raises(ValueError, match=r"first line, 'hello', '3'.*data\.header"):
        Choice().header_in(['hello', '3'])
    # A class that is called what a column is often called.
    with pytest.raises(ValueError, match=r"first line, 'question', 'how are you'.*data\.header"):
        Choice(text_a='1', label='0').header_in(['question', 'how are you'])


def test_integer_like_classes_stay_readable():
    columns = {'text_a': ['x', 'y', 'z'], 'label': [1, 2.0, ' three ']}
    assert build(columns, 'class', True, PLACE)['label'][:] == ['1', '2', 'three']
    columns['label'] = [Decimal('1.00'), Decimal('2.5'), math.inf]
    assert build(columns, 'class', True, PLACE)['label'][:] == ['1', '2.5', 'inf']
    columns['label'] = [True, False, True]
    assert build(columns, 'class', True, PLACE)['label'][:] == ['true', 'false', 'true']


def test_numbers_become_floats():
    dataset = build({'text_a': ['x', 'y'], 'label': ['4.25', 3]}, 'number', True, PLACE)
    assert dataset['label'][:] == [4.25, 3.0]


def test_a_split_with_empty_labels_is_unlabelled_where_that_is_allowed():
    columns = {'text_a': ['x', 'y'], 'label': ['', None]}
    assert build(columns, 'class', False, PLACE).column_names == ['text_a']
    with pytest.raises(ValueError, match='line 2: no label'):
        build(columns, 'class', True, PLACE)


def test_a_split_in_which_no_class_applies_is_labelled():
    columns = {'text_a': ['x', 'y'], 'label': ['', ' ']}
    assert build(columns, 'classes', True, PLACE)['label'][:] == [[], []]
    assert build(columns, 'classes', False, PLACE).column_names == ['text_a']
    with pytest.raises(ValueError, match='line 2: no label'):
        build(columns | {'label': [None, None]}, 'classes', True, PLACE)


@pytest.mark.parametrize(
    ('columns', 'kind', 'message'),
    [
        ({'text_a': ['x', ' '], 'label': ['a', 'b']}, 'class', r'x\.csv, line 3: text_a is empty'),
        ({'text_a': ['x'], 'text_b': [''], 'label': ['a']}, 'class', 'line 2: text_b is empty'),
        ({'text_a': ['x', 5], 'label': ['a', 'b']}, 'class', 'line 3: text_a is 5'),
        ({'text_a': ['x', 'y'], 'label': ['a', '']}, 'class', 'line 3: the label is empty'),
        ({'text_a': ['x', 'y'], 'label': [1.0, math.nan]}, 'class', 'line 3: the label is empty'),
        ({'text_a': ['x'], 'label': [math.nan]}, 'class', 'line 2: no label, here or on any later'),
        ({'text_a': ['x'], 'label': [[1]]}, 'class', r'line 2: the label \[1\] is neither'),
        ({'text_a': ['x', 'y'], 'label': ['1', '3,8']}, 'number', "line 3: the label '3,8' is not"),
        ({'text_a': ['x', 'y'], 'label': ['1', 'nan']}, 'number', "line 3: the label 'nan' is not"),
        ({'text_a': ['x', 'y'], 'label': ['1', '']}, 'number', "line 3: the label '' is not"),
        ({'text_a': ['x'], 'label': ['1']}, 'text', "label_kind is 'text'"),
    ],
)
def test_bad_values_are_named_with_their_line(columns, kind, message):
    with pytest.raises(ValueError, match=message):
        build(columns, kind, True, PLACE)


@pytest.mark.parametrize('cell', ['["a", "b"]', "['a']", ' [] ', '[a, b]', '[0 1 1]'])
def test_a_list_written_into_a_cell_is_no_set_of_classes(cell):
    columns = {'text_a': ['x', 'y'], 'label': ['a,b', cell]}
    with pytest.raises(ValueError, match=r'line 3: .* a list written as a text; give the names'):
        build(columns, 'classes', True, PLACE)


def test_brackets_may_be_part_of_the_names_of_classes():
    columns = {'text_a': ['x', 'y'], 'label': ['[a],[b]', ['[c]']]}
    assert build(columns, 'classes', True, PLACE)['label'][:] == [['[a]', '[b]'], ['[c]']]


@pytest.mark.parametrize(
    'labels',
    [
        [[0, 1], [0, 0], [1, 0]],
        [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
        [[True, False, False], [False, True, True]],
        ['0,1,1', '0,0,0'],
    ],
)
def test_a_number_for_each_class_is_no_set_of_classes(labels):
    columns = {'text_a': ['x'] * len(labels), 'label': labels}
    with pytest.raises(ValueError, match=r'a 0 or a 1 for each of [23] classes, .* give the names'):
        build(columns, 'classes', True, PLACE)


@pytest.mark.parametrize(
    'labels', [[[0, 1], [1]], [[0], [1]], [[1, 1, 2], [0, 1, 0]], [[0, 1]] * 2]
)
def test_classes_may_be_called_by_numbers(labels):
    columns = {'text_a': ['x', 'y'], 'label': labels}
    expected = [list(dict.fromkeys(map(str, own))) for own in labels]
    assert build(columns, 'classes', True, PLACE)['label'][:] == expected


@pytest.mark.parametrize(('kind', 'label'), [('class', 'b\ud83d'), ('classes', ['a', 'b\ud83d'])])
def test_half_a_character_in_a_label_is_told(kind, label):
    columns = {'text_a': ['x', 'y'], 'label': ['a', label]}
    with pytest.raises(ValueError, match=r'line 3: the label holds .* half of a character'):
        build(columns, kind, True, PLACE)


@pytest.mark.parametrize('sign', [';', '\t', '|'])
def test_another_sign_between_columns_is_suggested(sign):
    with pytest.raises(ValueError, match=r'columns.* divides its columns, set data.delim'):
        Choice().header_in([f'text{sign}label'])
    with pytest.raises(ValueError, match=r'counted from 0\.$'):
        Choice().header_in([f'good{sign}day'])
