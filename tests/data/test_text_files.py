import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters_jax.data.text_files import Layout, open_table

CELLS = st.text(st.characters(codec='utf-8', exclude_characters='\r\x00'), max_size=12)


def read(path, layout=None, skip_broken=False):
    table = open_table(path, layout or Layout())
    values, lines = table.read({name: name for name in table.names}, skip_broken)
    return table.names, list(zip(*values.values(), strict=True)), lines


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_csv_gives_back_what_a_csv_writer_wrote(tmp_path, rows):
    path = tmp_path / 'x.csv'
    with path.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([('a', 'b'), *rows])
    assert read(path)[1] == rows


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            *[st.text(st.characters(codec='utf-8', exclude_characters='\t\r\n'), min_size=1)] * 2
        ),
        min_size=1,
        max_size=5,
    )
)
def test_tsv_keeps_every_character_of_a_field(tmp_path, rows):
    path = tmp_path / 'x.tsv'
    path.write_bytes('\r\n'.join('\t'.join(row) for row in [('a', 'b'), *rows]).encode())
    assert read(path)[1] == rows


def test_line_numbers_count_lines_of_the_file_not_records(tmp_path):
    path = tmp_path / 'x.csv'
    path.write_text('text,label\n"two\nlines",1\n\nlast,0\n')
    assert read(path) == (['text', 'label'], [('two\nlines', '1'), ('last', '0')], [2, 5])


def test_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    path = tmp_path / 'x.tsv'
    path.write_bytes('\ufefftext\tlabel\r\nhi\t1\r\n'.encode())
    assert read(path)[0] == ['text', 'label']


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.jsonl', '.json'])
def test_every_kind_of_file_reads_the_same(tmp_path, suffix, packed):
    rows = [('Was ist das?', 'frage'), ('ein "Satz", ja', 'aussage')]
    objects = [dict(zip(('text', 'label'), row, strict=True)) for row in rows]
    path = tmp_path / f'x{suffix}'
    if suffix == '.csv':
        with path.open('w', newline='') as file:
            csv.writer(file).writerows([('text', 'label'), *rows])
    else:
        lines = {
            '.tsv': '\n'.join(map('\t'.join, [('text', 'label'), *rows])),
            '.jsonl': '\n'.join(map(json.dumps, objects)),
            '.json': json.dumps(objects),
        }
        path.write_text(lines[suffix])
    if packed:
        content = path.read_bytes()
        path = tmp_path / f'x{suffix}.gz'
        path.write_bytes(gzip.compress(content))
    assert read(path)[:2] == (['text', 'label'], rows)


@pytest.mark.parametrize('suffix', ['.csv', '.txt', '.jsonl', '.json'])
def test_damaged_archives_are_named(tmp_path, suffix):
    rows = [{'a': f'{number**3} text', 'b': 'x'} for number in range(3000)]
    text = {'.json': json.dumps(rows), '.jsonl': '\n'.join(map(json.dumps, rows))}
    whole = gzip.compress(text.get(suffix, 'a,b\n' + '3,"4"\n' * 9000).encode())
    middle = len(whole) // 2
    damaged = whole[:middle] + b'\xff' * 40 + whole[middle + 40 :]
    what = 'is no whole gzip file'
    # What is unpacked before the damage is noticed may be refused for itself.
    for content, said in ((whole[:middle], what), (b'plain', what), (damaged, '')):
        path = tmp_path / f'x{suffix}.gz'
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf'x\{suffix}\.gz.*{said}'):
            read(path)


def test_parquet_reads_as_it_was_written(tmp_path):
    objects = [{'text': 'a "b",\n', 'label': 1.5}, {'text': 'c', 'label': 2.0}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), tmp_path / 'x.parquet')
    expected = (['text', 'label'], [('a "b",\n', 1.5), ('c', 2.0)], [1, 2])
    assert read(tmp_path / 'x.parquet') == expected


def test_parquet_may_be_compressed_as_a_whole(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({'text': ['a', 'b']}), tmp_path / 'x.parquet')
    path = tmp_path / 'y.parquet.gz'
    path.write_bytes(gzip.compress((tmp_path / 'x.parquet').read_bytes()))
    assert read(path) == read(tmp_path / 'x.parquet')


@pytest.mark.parametrize(
    'column',
    [pyarrow.array([2**31 - 1], pyarrow.date32()), pyarrow.array([b'\xff']).view('string')],
)
def test_what_parquet_holds_and_python_does_not_is_named(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table({'x': column}), tmp_path / 'x.parquet')
    with pytest.raises(ValueError, match=r'x\.parquet holds a text .* or a date .* leave out its'):
        open_table(tmp_path / 'x.parquet', Layout())


@pytest.mark.parametrize('keep', [0, 40, -4])
def test_damaged_parquet_files_are_named(tmp_path, keep):
    path = tmp_path / 'x.parquet'
    pyarrow.parquet.write_table(pyarrow.table({'text': ['a', 'b']}), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match=r'x\.parquet is no whole Parquet file \(.*; fetch it again'
    ):
        open_table(path, Layout())


def test_text_files_divide_at_the_first_delimiter_only(tmp_path):
    path = tmp_path / 'x.txt'
    path.write_bytes('DESC How did it\xe9 go ?\nNUM How many ?\n'.encode('latin-1'))
    layout = Layout(encoding='latin-1', delimiter=' ', header=False)
    assert read(path, layout)[1] == [('DESC', 'How did ité go ?'), ('NUM', 'How many ?')]


def test_text_files_without_tabs_hold_one_text_a_line(tmp_path):
    path = tmp_path / 'x.txt'
    path.write_text('one, two\n\nthree\n')
    assert read(path, Layout(header=False)) == (['0'], [('one, two',), ('three',)], [1, 3])


@pytest.mark.parametrize(
    ('name', 'content', 'layout', 'message'),
    [
        ('x.tsv', 'a\tb\n1\t2\n1\t2\t3\n', {}, r'x\.tsv, line 3: 3 fields where .* 2'),
        ('x.csv', 'a,b\n1,2\n"open,3\n', {}, r"x\.csv, line 3: .*quoting='none'"),
        ('x.csv', 'a,b\n', {}, 'has no examples'),
        ('x.csv', '', {}, r'x\.csv is empty'),
        ('x.jsonl', '', {}, r'x\.jsonl is empty'),
        ('x.jsonl', '{"a": 1}\n\n{"a": \n', {}, r'x\.jsonl, line 3: not JSON'),
        ('x.jsonl', '{"a": 1}\n5\n', {}, r'x\.jsonl, entry 2: 5 where an object'),
        ('x.json', '{"a": 1}', {}, r'list of objects.*\.jsonl'),
        ('x.json', '[\n{"a" 1}]', {}, r'x\.json, line 2: not JSON'),
        ('x.json', '{"a": 1}\n{"a": 2}\n', {}, r'object on its first line .* end in \.jsonl'),
        ('x.csv', 'a,A,a\n1,2,3\n', {}, r"x\.csv: 2 columns have the name 'a'"),
        ('x.csv', 'a||b\n1||2\n', {'delimiter': '||'}, r"delimiter is '\|\|', .* one character"),
        ('x.csv', b'a,b\n\xe9,1\n', {}, r'x\.csv is not utf-8.*data\.encoding'),
        ('x.csv', b'\xe9,1\n', {}, r'x\.csv is not utf-8.*data\.encoding'),
        ('x.jsonl', b'\xe9\n', {}, r'x\.jsonl is not utf-8.*data\.encoding'),
        ('x.csv', 'a,b\n', {'encoding': 'utf-16'}, r'x\.csv: UTF-16 stream .* to utf-16-le'),
        ('x.xlsx', '', {}, r'x\.xlsx is of no kind.*\.csv.*data\.delimiter'),
        ('x.json', '{"a": [], "b": []}', {}, r'x\.json: name the lists .* x\.json#a; .* has a, b'),
        ('x.json#a+c', '{"a": [], "b": [], "c": 1}', {}, r'x\.json#a\+c: name .* has a, b'),
        ('x.json', '{"a": ["x"], "b": [{}]}', {}, r'as in x\.json#b; the file has b\.'),
        ('x.json', '{"text": ["x"], "label": [1]}', {}, 'list of objects, one for each row'),
        ('x.json#a', '{"a": [{}, 5]}', {}, r'x\.json#a, entry 2: 5 where an object'),
        ('x.json#a', '[]', {}, r'x\.json#a: name the lists .* has none'),
        ('x.json#a', '{"a": []}', {}, r'x\.json#a is empty'),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, layout, message):
    path = tmp_path / name.partition('#')[0]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, Layout(**layout))


@pytest.mark.parametrize(
    ('layout', 'message'),
    [
        ({'quoting': 'some'}, "quoting is 'some'"),
        ({'encoding': 'utf-9'}, "encoding is 'utf-9'"),
        ({'encoding': 'base64'}, "encoding is 'base64'"),
    ],
)
def test_unknown_settings_are_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        Layout(**layout)


@pytest.mark.parametrize('name', ['x.csv', 'x.txt'])
def test_a_tab_may_be_typed_as_a_shell_passes_it(tmp_path, name):
    (tmp_path / name).write_text('a\tb\n1\t2\n')
    assert read(tmp_path / name, Layout(delimiter='\\t'))[1] == [('1', '2')]


def test_broken_lines_are_skipped_on_request_only(tmp_path):
    path = tmp_path / 'x.tsv'
    path.write_text('a\tb\n1\t2\nbroken\n3\t4\n')
    assert read(path, skip_broken=True)[1:] == ([('1', '2'), ('3', '4')], [2, 4])


def test_lists_of_a_json_object_are_read_by_name(tmp_path):
    lists = {'train': [['a', 'x'], ['b', 'y']], 'val': [['c', 'x']], 'other': [['d', 'z']]}
    (tmp_path / 'x.json').write_text(json.dumps(lists))
    names, rows, _ = read(tmp_path / 'x.json#train+other')
    assert (names, rows) == (['0', '1'], [('a', 'x'), ('b', 'y'), ('d', 'z')])
    assert read(tmp_path / 'x.json#val')[1] == [('c', 'x')]
    (tmp_path / 'y.json#val').write_text('{"a": 5}')  # a file may have such a name
    with pytest.raises(ValueError, match='is of no kind'):
        read(tmp_path / 'y.json#val')


def test_with_a_delimiter_any_file_is_text(tmp_path):
    (tmp_path / 'x.all').write_text('1 one two\n0 three\n')
    names, rows, _ = read(tmp_path / 'x.all', Layout(delimiter=' ', header=False))
    assert (names, rows) == (['0', '1'], [('1', 'one two'), ('0', 'three')])


@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-be'])
def test_two_bytes_a_letter_are_recognised(tmp_path, encoding):
    """Read as Latin-1, which other files may be, they would be nonsense and no error."""
    path = tmp_path / 'x.tsv'
    text = 'text\tlabel\nhällo\tx\n'
    path.write_bytes((('' if encoding == 'utf-16' else '\ufeff') + text).encode(encoding))
    with pytest.raises(ValueError, match=r"set data\.encoding, for instance to 'utf-16'"):
        read(path)
    assert read(path, Layout('utf-16'))[:2] == (['text', 'label'], [('hällo', 'x')])


@pytest.mark.parametrize('name', ['x.json', 'x.jsonl'])
@pytest.mark.parametrize('value', ['[' * 10**5, '{"n": ' + '1' * 5000 + '}'])
def test_json_beyond_all_limits_is_named(tmp_path, name, value):
    path = tmp_path / name
    path.write_text(f'{value}\n')
    with pytest.raises(ValueError, match=rf'{name}, line 1: JSON beyond what can be read'):
        open_table(path, Layout())
    path.write_text(f'{value}\n{{}}\n')
    with pytest.raises(ValueError, match=rf'{name}, line 1'):
        open_table(path, Layout())
