"""Questions from every kind of file, and what is said where one cannot be read."""

import gzip
import json

import datasets
import pytest

from adapters_jax.data import sources, squad

CONTEXT = 'The cat sat on the 6½ mats;  the cat slept.'


def question(id_='q', *answers, **more):
    """A question as SQuAD has it; answers are (text, start)."""
    found = [{'text': text, 'answer_start': start} for text, start in answers]
    return {'id': id_, 'question': 'Who?', 'answers': found} | more


def document(*qas, context=CONTEXT):
    return {
        'version': '2.0',
        'data': [{'title': 't', 'paragraphs': [{'context': context, 'qas': qas}]}],
    }


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode('utf-8', 'surrogatepass'))
    return path


def read(path, **data):
    return squad.read({'train': str(path), **data})['train']


def answers_of(rows):
    return [list(zip(row['answers'], row['starts'], strict=True)) for row in rows]


def test_squad_1_and_2(tmp_path):
    path = write(
        tmp_path / 'train.json',
        document(
            question('a', ('cat', 4), ('The cat', 0)),
            question('b', is_impossible=True, plausible_answers=[{'text': 'x', 'answer_start': 0}]),
            question('c', ('cat', 33)),
        ),
    )
    rows = read(path)
    assert rows['id'][:] == ['a', 'b', 'c']
    assert set(rows['context'][:]) == {CONTEXT} and set(rows['question'][:]) == {'Who?'}
    assert answers_of(rows) == [[('cat', 4), ('The cat', 0)], [], [('cat', 33)]]


FLAT = {'id': 7, 'question': 'Who?', 'context': CONTEXT}


@pytest.mark.parametrize(
    'line',
    [
        FLAT | {'answers': {'text': ['cat'], 'answer_start': [4]}},
        FLAT | {'answers': [{'text': 'cat', 'answer_start': 4}]},
        FLAT | {'answers': ['cat'], 'answer_start': [4]},
        FLAT | {'answers': {'text': 'cat', 'answer_start': 4}},
        FLAT | {'answer': 'cat', 'answer_start': '4'},
        FLAT | {'answer_text': 'cat', 'start': 4.0},
        FLAT | {'answer': 'cat'},
        {'context': CONTEXT, 'qas': [question(7, ('cat', 4))]},
        document(question(7, ('cat', 4))),
    ],
)
@pytest.mark.parametrize('ending', ['jsonl', 'json', 'jsonl.gz'])
def test_the_ways_to_write_an_answer(tmp_path, line, ending):
    path = tmp_path / f'train.{ending}'
    text = json.dumps([line] if ending == 'json' else line) + '\n'
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith('gz') else text.encode())
    rows = read(path)
    assert rows['id'][:] == ['7']
    assert answers_of(rows) == [[('cat', 4)]]


def test_a_table_with_text_that_tables_find_hard(tmp_path):
    path = tmp_path / 'train.csv'
    context = 'One\r\n"two"\u2028 three,  four'
    cells = '"' + context.replace('"', '""') + '"'
    path.write_bytes(
        f'question,context,answer,answer_start\nWhich?,{cells},four,{len(context) - 4}\n'
        f'Which?,{cells},,\n'.encode()
    )
    rows = read(path)
    assert rows['context'][:] == [context] * 2
    assert answers_of(rows) == [[('four', len(context) - 4)], []]
    assert rows['id'][:] == ['1', '2']


@pytest.mark.parametrize('said', ['TRUE', 'True', 'true', '1'])
def test_a_table_may_say_that_a_question_is_impossible(tmp_path, said):
    """As a spreadsheet writes it, of a question with a plausible answer."""
    lines = [f'Who?,{CONTEXT},cat,{no}' for no in (said, 'FALSE', '0', '')]
    path = write(
        tmp_path / 'train.csv', '\n'.join(['question,context,answer,is_impossible', *lines])
    )
    assert answers_of(read(path)) == [[], *[[('cat', 4)]] * 3]


SUBJQA = 'q_review_id,question,review,human_ans_spans,human_ans_indices'


def test_subjqa_and_its_several_annotators(tmp_path, caplog):
    review = "It wasn't $11 bad. ANSWERNOTFOUND"
    lines = [
        (SUBJQA,),
        ('a', 'How?', review, "was n't $ 11", '"(3, 13)"'),
        ('a', 'How?', review, 'ANSWERNOTFOUND', '"(19, 33)"'),
        ('a', 'How?', review, '$ 11', '"(10, 13)"'),
        ('a', 'How?', review, '$ 11', '"(10, 13)"'),
        ('b', 'Why?', review, 'ANSWERNOTFOUND', '"(19, 33)"'),
        ('c', 'Why?', review, 'bad ANSWERNOTFOUND', '"(14, 33)"'),
    ]
    path = write(tmp_path / 'train.csv', '\n'.join(','.join(line) for line in lines) + '\n')
    rows = read(path)
    assert set(rows['context'][:]) == {"It wasn't $11 bad."}
    assert answers_of(rows) == [[("wasn't $11", 3), ('$11', 10)], [], [('bad.', 14)]]
    assert '4 answers are written otherwise' in caplog.text
    assert '3 lines repeat a question' in caplog.text


def test_columns_may_be_named(tmp_path):
    path = write(tmp_path / 'train.tsv', f'q\tabout\twhat\tstart\nWho?\t{CONTEXT}\tcat\t4\n')
    named = {'text_a': 'q', 'text_b': 1, 'label': 'what'}
    assert answers_of(read(path, columns=named)) == [[('cat', 4)]]
    with pytest.raises(
        ValueError, match=r"the question should be in the column 'x', but there are"
    ):
        read(path, columns=named | {'text_a': 'x'})
    with pytest.raises(ValueError, match=r'question .* one of question, .*set data.columns.text_a'):
        read(path)


def test_a_start_that_is_off_moves_to_the_nearest_place(tmp_path, caplog):
    # 35 is where "cat" would be if ½ were two bytes; without a start the first place is taken.
    path = write(
        tmp_path / 'a.json', document(question('a', ('cat', 35)), question('b', ('cat', -1)))
    )
    assert answers_of(read(path)) == [[('cat', 33)], [('cat', 4)]]
    assert '1 answers begin elsewhere' in caplog.text
    assert '1 answers without a start occur several times' in caplog.text


ODD = [
    ('I am 😀 glad', '😀'),
    ('  leading and  doubled spaces', 'doubled spaces'),
    ('line\u2028separator\r\nreturn', 'separator\r\nreturn'),
    ('cafe\u0301 noir', 'cafe\u0301'),
    ('הוא גר בירושלים מאז', 'בירושלים'),
    (' '.join(f'w{i}' for i in range(10_000)), 'w9999'),
]


@pytest.mark.parametrize(('context', 'answer'), ODD)
def test_any_text_keeps_its_characters(tmp_path, context, answer):
    given = question('a', (answer, context.index(answer)))
    (row,) = read(write(tmp_path / 'train.json', document(given, context=context)))
    assert (row['context'], row['answers']) == (context, [answer])
    assert context[row['starts'][0] :].startswith(answer)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (document(question('a'), context=' '), r"question 'a': the context is ' '; give a text"),
        (document(question('a', question='')), "question 'a': the question is ''"),
        (document(question('a', ('dog', 4))), r"'dog' is nowhere in its context.* 4 reads 'cat'"),
        (document(question('a', ('', 4))), "question 'a': the text of an answer is ''"),
        (document(question('a', ('cat', 'x'))), "'cat' begins at 'x'; expected the number"),
        (document(question('a', ('cat', 4.5))), "'cat' begins at 4.5; expected the number"),
        (document(question('a', ('cat', -3))), "'cat' begins at -3; expected the number"),
        (
            document(question('a', ('cat', 4)), question('a', ('cat', 4), question='When?')),
            r"qas\[1\], question 'a': .*qas\[0\], question 'a' has the same id with another",
        ),
        (document(question('a') | {'answers': 3}), "the answers are '3'; expected a text, or"),
        (
            document(question('a') | {'answers': {'text': ['cat'], 'answer_start': [1, 2]}}),
            'expected two lists of one length',
        ),
        (
            document(question('a', ('cat', 4)), {'id': 'b', 'question': 'Who?'}),
            r"question 'b': the question has no answers \(1 of 2",
        ),
        (document('x'), r"qas\[0\]: 'x' where an object must stand"),
        (document(), 'has no questions; it must hold at least one'),
        ({'data': []}, 'has no questions'),
        ('{"data": [\n1,,]}', 'line 2: not JSON'),
        ('', 'line 1: not JSON'),
        (document(question('a'), context='half \ud83d'), r'context holds .* at character 5, which'),
        (document(question('a\ud83d')), r'the id holds .* at character 1, which'),
        ([{'text': 'x'}], r'the question should be in the column one of question'),
        ([FLAT | {'answer': 'cat', 'answers': []}], r'one of answers, .*set data.columns.label'),
    ],
)
def test_what_cannot_be_read_is_said_with_its_place(tmp_path, content, message):
    path = write(tmp_path / 'given.json', content)
    with pytest.raises(ValueError, match=message) as raised:
        read(path)
    assert 'given.json' in str(raised.value)


def test_lines_are_named(tmp_path):
    path = write(
        tmp_path / 'a.jsonl', json.dumps(FLAT | {'answers': []}) + '\n\n{"context": "x"}\n'
    )
    with pytest.raises(ValueError, match=r'a.jsonl, line 3: the question is None'):
        read(path)
    path = write(tmp_path / 'a.csv', 'question,context,answer\nWho?,me,me\nWho?,me\n')
    with pytest.raises(ValueError, match=r'a.csv, line 3: 2 fields where the first line has 3'):
        read(path)


def test_a_test_split_may_have_no_answers(tmp_path):
    train = write(tmp_path / 'train.json', document(question('a', ('cat', 4))))
    test = write(tmp_path / 'test.jsonl', json.dumps(FLAT) + '\n')
    found = squad.read({'train': str(train), 'test': str(test)})
    assert found['test'].column_names == ['id', 'question', 'context']
    with pytest.raises(ValueError, match='has no answers'):
        squad.read({'train': str(train), 'validation': str(test)})


def test_answers_of_a_test_split_may_be_secret(tmp_path):
    """Hub data sets such as adversarial_qa give each of its questions an empty list."""
    train = write(tmp_path / 'train.json', document(question('a', ('cat', 4))))

    def test_split(*questions):
        test = write(tmp_path / 'test.json', document(*questions))
        return squad.read({'train': str(train), 'test': str(test)})['test']

    assert 'answers' not in test_split(question('b'), question('c')).column_names
    assert answers_of(test_split(question('b'), question('c', ('cat', 4)))) == [[], [('cat', 4)]]
    said = test_split(question('b', is_impossible=True), question('c', is_impossible=True))
    assert answers_of(said) == [[], []]
    rows = 'question,context,answer\nWho?,The cat,ANSWERNOTFOUND\n'
    test = write(tmp_path / 'test.csv', rows)
    found = squad.read({'train': str(train), 'test': str(test)})['test']
    assert answers_of(found) == [[]]


def test_a_test_split_may_lack_the_answers_that_are_named(tmp_path):
    line = {'question': 'Who?', 'context': CONTEXT}
    train = write(tmp_path / 'train.jsonl', json.dumps(line | {'said': 'cat'}))
    test = write(tmp_path / 'test.jsonl', json.dumps(line))
    given = {'train': str(train), 'columns': {'label': 'said'}}
    assert 'answers' not in squad.read(given | {'test': str(test)})['test'].column_names
    with pytest.raises(ValueError, match="answers should be in the column 'said'"):
        squad.read(given | {'validation': str(test)})


def test_columns_of_one_name_are_refused(tmp_path):
    path = write(tmp_path / 'a.csv', 'question,question,context\nWho?,Why?,me\n')
    with pytest.raises(ValueError, match=r"a\.csv: 2 columns have the name 'question'"):
        read(path)
    path = write(tmp_path / 'a.csv', 'question,Question,context,answer\nWho?,Why?,me,me\n')
    with pytest.raises(ValueError, match="of one name, 'question', 'Question'"):
        read(path)


def test_questions_of_a_paragraph_stay_together(tmp_path):
    paragraphs = [
        {'context': f'{CONTEXT} {i}', 'qas': [question(f'{i}-{j}', ('cat', 4)) for j in range(5)]}
        for i in range(40)
    ]
    path = write(tmp_path / 'train.json', {'data': [{'paragraphs': paragraphs}]})
    found = squad.read({'train': str(path), 'split_fractions': (0.1, 0.1)})
    assert {name: len(rows) for name, rows in found.items()} == {
        'train': 160,
        'validation': 20,
        'test': 20,
    }
    contexts = [set(rows['context'][:]) for rows in found.values()]
    assert len(set.union(*contexts)) == sum(map(len, contexts)) == 40


def test_hub_data_sets(monkeypatch):
    row = FLAT | {'id': 'a', 'title': 't', 'answers': {'text': ['cat'], 'answer_start': [4]}}
    none = row | {'id': 'b', 'answers': {'text': [], 'answer_start': []}}
    rows = datasets.Dataset.from_list([row, none])
    monkeypatch.setattr(
        sources.datasets, 'load_dataset', lambda *_: {'train': rows, 'validation': rows}
    )
    found = squad.read({'name': 'squad_v2'})
    assert list(found) == ['train', 'validation']
    assert answers_of(found['validation']) == [[('cat', 4)], []]


def test_sources_without_questions_are_refused():
    with pytest.raises(ValueError, match=r"data.name is 'trec', which has no questions"):
        squad.read({'name': 'trec'})
    with pytest.raises(ValueError, match=r"data.glue is 'rte', which has no questions"):
        squad.read({'glue': 'rte'})
