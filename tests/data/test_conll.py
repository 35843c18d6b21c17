"""Files with a word a line: what is read, what is kept, and what is refused with its line."""

import dataclasses
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_jax.data import conll
from adapters_jax.data.conll import Layout

UNIVERSAL = """# newdoc id = a
# sent_id = 1
# text = Don't # go_
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\tVB\tMood=Imp\t4\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
2.1\tplease\tplease\tINTJ\tUH\t_\t_\t_\t4:dep\tCopyOf=-1
3\t#\t#\tSYM\tNN\t_\t4\tdep\t_\t_
4\tgo\tgo\tVERB\tVB\t_\t0\troot\t_\tSpaceAfter=No
5\t_\t_\t_\tNFP\t_\t4\tpunct\t_\t_

# sent_id = 2
1\tof course\tof course\tADV\tRB\t_\t0\troot\t_\t_

"""


def write(folder, content, name='train.conll'):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def words(found):
    return [one.words for one in found]


def tags(found):
    return [one.tags for one in found]


def written(found, change=lambda tag: tag):
    """The text of a file with its tags changed."""
    return ''.join(
        one.frame[0]
        + ''.join(change(t) + after for t, after in zip(one.tags, one.frame[1:], strict=True))
        for one in found
    )


def test_conllu_has_its_words_and_keeps_everything_else(tmp_path):
    path = write(tmp_path, UNIVERSAL, 'train.conllu')
    found = conll.read(path, Layout())
    assert words(found) == [['Do', "n't", '#', 'go', '_'], ['of course']]
    assert tags(found) == [['AUX', 'PART', 'SYM', 'VERB', ''], ['ADV']]
    assert [one.line for one in found] == [1, 12]
    assert written(found, lambda tag: tag or '_') == UNIVERSAL
    changed = written(found, lambda tag: 'X').splitlines()
    for old, new in zip(UNIVERSAL.splitlines(), changed, strict=True):
        expected = old.split('\t')
        if expected[0].isdecimal():
            expected[3] = 'X'
        assert new == '\t'.join(expected)
    # The same content under another name, and other columns by name and by place.
    other = write(tmp_path, UNIVERSAL, 'train.txt')
    assert conll.read(other, Layout()) == found
    by_name = conll.read(path, Layout(word='lemma', tag='XPOS'))
    assert by_name == conll.read(path, Layout(word='2', tag='-6'))
    assert tags(by_name) == [['VB', 'RB', 'NN', 'VB', 'NFP'], ['RB']]
    assert tags(conll.read(path, Layout(tag='FEATS')))[0][:2] == ['Mood=Imp', '_']


CELL = st.text(st.characters(exclude_categories=['Cs', 'Cc']), min_size=1, max_size=4)
PLAIN = CELL.filter(lambda cell: cell.strip(' \ufeff') == cell and ' ' not in cell)
PLAIN = PLAIN.filter(lambda cell: cell[0] != '#' and not cell[0].isdecimal())
SENTENCES = st.lists(
    st.lists(st.tuples(PLAIN, PLAIN, PLAIN), min_size=1, max_size=4), min_size=1, max_size=4
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    SENTENCES,
    st.sampled_from(['\t', ' ', '  ', ' \t']),
    st.sampled_from(['\n', '\r\n']),
    st.sampled_from(['', '-DOCSTART- -X- O\n\n', '# id 17\n']),
    st.booleans(),
    st.sampled_from(['\n', ' \n\n', '\t\n', '']),
)
def test_any_columns_are_read_and_written_again(tmp_path, rows, between, end, head, mark, tail):
    lines = [end.join(between.join(row) for row in sentence) + end for sentence in rows]
    content = head + end.join(lines).removesuffix('' if tail else end) + tail
    path = write(tmp_path, (b'\xef\xbb\xbf' if mark else b'') + content.encode())
    found = conll.read(path, Layout())
    assert words(found) == [[row[0] for row in sentence] for sentence in rows]
    assert tags(found) == [[row[-1] for row in sentence] for sentence in rows]
    assert written(found) == content
    assert tags(conll.read(path, Layout(tag=1))) == [[row[1] for row in s] for s in rows]


def test_hash_signs_are_words_where_they_stand_as_words(tmp_path):
    content = '# id 5\tdomain=en\n#\tO\n#go\tB-X\n# id = 3\n\n#\tO\n1\tO\n'
    found = conll.read(write(tmp_path, content.replace('# id = 3\n', '')), Layout())
    assert words(found) == [['#', '#go'], ['#', '1']]
    with pytest.raises(ValueError, match=r'line 4: 4 columns, where most other lines have 2'):
        conll.read(write(tmp_path, content.replace('\t', ' ')), Layout())
    spaced = '# a b = c\nEU B-ORG\n# O\n'
    assert words(conll.read(write(tmp_path, spaced), Layout())) == [['EU', '#']]


def test_words_may_hold_blanks_and_signs_that_nobody_sees(tmp_path):
    content = 'of course\tO\n\u200b\tO\n \tO\nNew\u00a0York\tB-X\n\u2028\tO\n\n\ufeff\n'
    found = conll.read(write(tmp_path, content), Layout())
    assert words(found) == [['of course', '\u200b', ' ', 'New\u00a0York', '\u2028']]
    assert written(found) == content


def test_a_file_without_tags(tmp_path):
    path = write(tmp_path, 'EU\nrejects\r\n\nGerman\n', 'test.txt')
    found = conll.read(path, Layout(labelled=False))
    assert words(found) == [['EU', 'rejects'], ['German']] and tags(found) == [None, None]
    named = [
        dataclasses.replace(one, tags=[tag] * len(one.words))
        for one, tag in zip(found, 'OX', strict=True)
    ]
    assert written(named) == 'EU\tO\nrejects\tO\r\n\nGerman\tX\n'
    path = write(tmp_path, 'EU NNP\n', 'test.txt')
    wide = conll.read(path, Layout(tag=2, labelled=False))
    assert tags(wide) == [None] and wide[0].frame == ['EU NNP ', '\n']


def test_blanks_around_a_delimiter_are_no_part_of_words_and_tags(tmp_path):
    content = 'New York | B-X\n is|  O  \n'
    found = conll.read(write(tmp_path, content), Layout(delimiter='|'))
    assert words(found) == [['New York', 'is']] and tags(found) == [['B-X', 'O']]
    assert written(found, str.lower) == content.lower().replace('new york', 'New York')


LINES = {
    'a word alone': ('EU B-X\nrejects\n', {}, 'line 2: 1 column, where most other lines have 2'),
    'too many': ('a O\nb O\n\nc d O\n', {}, "line 4: 3 columns, .* mend the line 'c d O'"),
    'no tags at all': ('\nEU\nrejects\n', {}, 'line 2: 1 column, here and on the other lines'),
    'an empty word': ('EU\tO\n\tO\n', {}, 'line 2: the word is empty'),
    'an empty tag': ('EU\tO\nmet\t\n', {}, "line 2: 'met' has no tag"),
    'another delimiter': ('EU|O\nmet|O|O\n', {'delimiter': '|'}, 'line 2: 3 columns'),
    'nothing': (' \n\n', {}, 'has no words'),
    'comments only': ('# id = 3\n\n', {}, 'has no words'),
    'a column that is not there': ('EU O\n', {'tag': '2'}, r'columns.label is .2., but .* 0 to 1'),
    'a name': ('EU O\n', {'tag': 'ner'}, "columns.label is 'ner'.* position from 0 to 1, or -1"),
    'words are tags': ('EU O\n', {'tag': 0}, 'words and tags are both to be column 0 of 2'),
    'old line ends': ('EU O\rmet B-X\r\rBonn O\r', {}, 'line 1: a carriage return inside'),
    'latin-1': ('caf\udce9 O\n', {}, r'is not utf-8 \(byte 0xe9'),
}


@pytest.mark.parametrize('name', LINES)
def test_mistakes_are_told_with_their_line(tmp_path, name):
    content, given_layout, expected = LINES[name]
    path = write(tmp_path, content.encode('utf-8', 'surrogateescape'))
    with pytest.raises(ValueError, match=expected) as caught:
        conll.read(path, Layout(**given_layout))
    assert 'train.conll' in str(caught.value)


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda text: text.replace('\t', ' '), 'line 4: 1 column, where CoNLL-U, .* has 10'),
        (lambda text: text.replace('4\tgo', 'x\tgo'), "line 9: the ID 'x'; expected a number"),
        (lambda text: text.replace('\t_\tSpaceAfter=No', ''), 'line 9: 8 columns, where CoNLL-U'),
    ],
)
def test_mistakes_in_conllu(tmp_path, change, expected):
    path = write(tmp_path, change(UNIVERSAL), 'train.conllu')
    with pytest.raises(ValueError, match=expected):
        conll.read(path, Layout())
    path = write(tmp_path, UNIVERSAL, 'train.conllu')
    with pytest.raises(ValueError, match=re.escape("'ner', but") + '.* one of ID, FORM, .* or a'):
        conll.read(path, Layout(tag='ner'))


def test_a_damaged_archive(tmp_path):
    for content in (b'EU O\n', bytes.fromhex('1f8b0800000000000003')):
        with pytest.raises(ValueError, match=r'train\.conll\.gz is no whole gzip file'):
            conll.read(write(tmp_path, content, 'train.conll.gz'), Layout())
