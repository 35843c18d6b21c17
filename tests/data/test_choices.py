"""Questions with candidates from the columns that data sets have them in."""

import json

import pytest

from adapters_jax.data import sources
from adapters_jax.data.choices import Choices


def read(tmp_path, name, text, **data):
    path = tmp_path / name
    path.write_text(text)
    given = {'train': str(path)} | data
    return sources.read(given, Choices.of(given))['train'].to_list()


def read_lines(tmp_path, *lines, **data):
    return read(tmp_path, 'in.jsonl', '\n'.join(map(json.dumps, lines)), **data)


def test_lists_of_any_length(tmp_path):
    found = read_lines(
        tmp_path,
        {'context': 'c', 'question': 'q', 'choices': ['x', 'y'], 'label': 1},
        {'context': 'd', 'question': None, 'choices': ['x', 'y', 'z'], 'label': 'C'},
        {'context': 'e', 'question': 'r', 'choices': ['x', 'y'], 'label': 'x'},
    )
    assert found == [
        {'text_a': 'c', 'text_b': 'q', 'choices': ['x', 'y'], 'label': 1},
        {'text_a': 'd', 'text_b': '', 'choices': ['x', 'y', 'z'], 'label': 2},
        {'text_a': 'e', 'text_b': 'r', 'choices': ['x', 'y'], 'label': 0},
    ]


ONE = {'text_a': 'p', 'choices': ['x', 'y'], 'label': 1}
PAIR = ONE | {'text_b': 'q'}


@pytest.mark.parametrize(
    ('cells', 'data', 'expected'),
    [
        ('video-id,sent1,sent2,ending0,ending1,label\n7,p,q,x,y,1', {}, PAIR),  # SWAG
        ('premise,choice1,choice2,question,idx,label\np,x,y,q,0,1', {}, PAIR),  # COPA
        ('ctx,ctx_a,ctx_b,ending0,ending1,label\npq,p,q,x,y,1', {}, PAIR),  # HellaSwag
        ('sentence,option1,option2,answer\np,x,y,2', {'first_choice': 1}, ONE),  # WinoGrande
        ('goal,sol1,sol2,label\np,x,y,1', {}, ONE),  # PIQA
        ('context,question,answerA,answerB,answerC,label\np,q,x,y,,B', {}, PAIR),  # SocialIQA
        ('id,a,b,right,left,label\n9,x,y,p,q,b',
         {'columns': {'text_a': 'right', 'text_b': 'left', 'choices': 'a+b'}}, PAIR),
    ],
)  # fmt: skip
def test_tables_with_a_column_for_each_candidate(tmp_path, cells, data, expected):
    assert read(tmp_path, 'in.csv', cells + '\n', **data) == [expected]


def test_lists_as_race_and_arc_have_them(tmp_path):
    race = {'article': 'p', 'question': 'q', 'options': ['x', 'y'], 'answer': 'B', 'id': '1'}
    assert read_lines(tmp_path, race) == [PAIR]
    own = {'text': ['x', 'y'], 'label': ['1', '2']}
    arc = {'id': 'a', 'question': 'p', 'choices': own, 'answerKey': '2'}
    assert read_lines(tmp_path, arc) == [ONE]


def test_copas_questions_are_spelt_out(tmp_path):
    line = {'premise': 'p', 'question': 'cause', 'choice1': 'x', 'choice2': 'y', 'label': 1}
    assert read_lines(tmp_path, line)[0]['text_b'] == 'What was the cause?'


def test_the_first_row_need_not_have_as_many_candidates_as_another(tmp_path):
    few = {'text': 'p', 'choice1': 'x', 'choice2': 'y', 'label': 0}
    many = few | {'choice3': 'z', 'label': 2}
    found = read_lines(tmp_path, few, many)
    assert found[0]['choices'] == ['x', 'y'] and found[1]['choices'] == ['x', 'y', 'z']


@pytest.mark.parametrize('label', [{}, {'y': -1}, {'y': -1.0}, {'y': '-1'}, {'gold': 1}])
def test_a_test_file_may_lack_the_label_that_is_named(tmp_path, label):
    line = {'text': 'p', 'choices': ['x', 'y']}
    (tmp_path / 'test.jsonl').write_text(json.dumps(line | label))
    (tmp_path / 'train.jsonl').write_text(json.dumps(line | {'y': 1}))
    given = {'dir': str(tmp_path), 'columns': {'label': 'y'}}
    found = sources.read(given, Choices.of(given))
    assert found['train']['label'][:] == [1] and 'label' not in found['test'].column_names


@pytest.mark.parametrize(
    ('line', 'data', 'message'),
    [
        ({'text': 'p', 'label': 1}, {}, r"no columns are known to hold the candidates.*'text', 'l"),
        ({'foo': 'p', 'choices': ['x', 'y'], 'label': 1}, {}, 'no column is known to hold what'),
        ({'text': 'p', 'choices': ['x', 'y']}, {}, 'no column could hold the label'),
        ({'text': 'p', 'choices': ['x', 'y'], 'label': 1, 'gold': 1}, {}, 'several columns could'),
        ({'text': 'p', 'choices': ['x', 'y'], 'label': 1, 'Text': 'q'}, {}, "one name, 'text', 'T"),
        ({'text': 'p', 'choices': ['x'], 'label': 0}, {}, r"line 1: the candidates are \['x'\]; e"),
        ({'text': 'p', 'choices': ['x', ' '], 'label': 0}, {}, 'line 1: the candidates are'),
        ({'text': 'p', 'choice1': '', 'choice2': 'y', 'choice3': 'z', 'label': 'B'}, {},
         r"line 1: the candidates are \['', 'y', 'z'\]"),
        ({'text': 'p', 'choices': ['3', '2', '0'], 'label': '2'}, {},
         "line 1: the label '2' may be the number of a candidate or the text of another"),
        ({'text': 'p', 'choices': ['C', 'D', 'A', 'B'], 'label': 'C'}, {},
         "line 1: the label 'C' may be the letter of a candidate or the text of another"),
        ({'text': 'p', 'choices': ['x\ud83d', 'y'], 'label': 0}, {}, 'line 1: a candidate holds'),
        ({'context': 'p', 'question': '\ud83d', 'choices': ['x', 'y'], 'label': 0}, {},
         'line 1: the question holds'),
        ({'context': 'p', 'question': ['q', 'r'], 'choices': ['x', 'y'], 'label': 0}, {},
         r"line 1: the question is \['q', 'r'\], which is not a text"),
        ({'text': ' ', 'choices': ['x', 'y'], 'label': 0}, {}, "line 1: ' ' stands where the text"),
        ({'text': 'p', 'choices': ['x', 'y'], 'label': 2}, {}, 'label 2 is none of the 2 candida'),
        ({'text': 'p', 'choices': ['x', 'y'], 'label': 'z'}, {}, "label 'z' is none of the 2"),
        ({'text': 'p', 'choices': ['x', 'x'], 'label': 'x'}, {}, "label 'x' is none of the 2"),
        ({'text': 'p', 'choices': ['x', 'y'], 'label': None}, {}, 'no label, here or on any later'),
        ({'text': 'p', 'choices': ['x', 'y'], 'label': 0}, {'columns': {'choices': 'a+b'}},
         r"no column 'a' \(data.columns.choices\)"),
        ({'text': 'p', 'choices': ['x', 'y'], 'label': 0}, {'first_choice': 1}, 'number from 1'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, line, data, message):
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path, line, **data)
