import gzip
import itertools
import json

import pytest

from adapters_jax.data import parallel

ROWS = [('Ein Hund.', 'A dog.'), ('Zwei "Katzen".', 'Two "cats".'), ('Drei\tVögel', 'Three birds')]


def texts_of(split):
    return list(zip(split['text_a'], split['target'], strict=True))


def write_lines(path, lines):
    text = ''.join(line + '\n' for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == '.gz' else text)


@pytest.mark.parametrize('ending', ['', '.gz'])
def test_files_by_language(tmp_path, ending):
    for split in ('train', 'val', 'test_2016_flickr'):
        for place, language in enumerate(('de', 'en')):
            name = f'{split}.{language}{ending}'
            write_lines(tmp_path / name, [row[place] for row in ROWS])
    found = parallel.load({'dir': str(tmp_path), 'languages': 'de,en'})
    assert set(found) == {'train', 'validation', 'test'}
    assert all(texts_of(split) == ROWS for split in found.values())
    turned = parallel.load({'dir': str(tmp_path), 'languages': 'en,de'})
    assert texts_of(turned['train']) == [row[::-1] for row in ROWS]


@pytest.mark.parametrize(
    ('columns', 'data'),
    [
        (('source', 'target'), {}),
        (('document', 'summary'), {}),
        (('de', 'en'), {'languages': 'de,en'}),
        (('one', 'two'), {'columns': {'text_a': 'one', 'label': 'two'}}),
        (('one', 'two'), {'header': True}),
    ],
)
def test_tables(tmp_path, columns, data):
    rows = [(f'Hund {i} "x"', f'dog {i}') for i in range(30)]
    lines = ['\t'.join(columns), *('\t'.join(row) for row in rows)]
    write_lines(tmp_path / 'train.tsv', lines)
    given = {'dir': str(tmp_path), 'split_fractions': (0.2, 0.2)} | data
    found = parallel.load(given)
    assert sorted(itertools.chain(*map(texts_of, found.values()))) == sorted(rows)


@pytest.mark.parametrize(
    ('columns', 'data', 'text', 'target'),
    [
        (('summary', 'body'), {}, 'body', 'summary'),
        (('body', 'summary'), {}, 'body', 'summary'),
        (('other', 'source'), {}, 'source', 'other'),
        (('en', 'de'), {'columns': {'text_a': 'de'}}, 'de', 'en'),
        (('en', 'de'), {'columns': {'label': 0}, 'header': True}, 'de', 'en'),
        (('text', 'source'), {'columns': {'label': 'text'}}, 'source', 'text'),
    ],
)
def test_of_two_columns_each_is_one(tmp_path, columns, data, text, target):
    lines = ['\t'.join(columns), *('\t'.join(f'{name} {i}' for name in columns) for i in range(3))]
    for name in ('train', 'test'):
        write_lines(tmp_path / f'{name}.tsv', lines)
    for split in parallel.load({'dir': str(tmp_path)} | data).values():
        assert texts_of(split) == [(f'{text} {i}', f'{target} {i}') for i in range(3)]


def test_numbers_of_texts_are_nothing_to_be_written(tmp_path):
    write_lines(tmp_path / 'train.tsv', ['source\ttarget', 'a\tb'])
    write_lines(tmp_path / 'test.tsv', ['id\tsource', '1\ta'])
    assert parallel.load({'dir': str(tmp_path)})['test'].column_names == ['text_a']
    write_lines(tmp_path / 'train.tsv', ['id\tsource', '1\ta'])
    with pytest.raises(
        ValueError, match=r"no column for data\.columns\.label among 'id', 'source'"
    ):
        parallel.load({'dir': str(tmp_path)})


def test_no_text_is_written_from_itself(tmp_path):
    write_lines(tmp_path / 'train.tsv', ['one\ttwo', 'a\tb'])
    for columns in ({'text_a': 'one', 'label': 'one'}, {'text_a': 0, 'label': 'one'}):
        with pytest.raises(ValueError, match='one column is used twice'):
            parallel.load({'dir': str(tmp_path), 'columns': columns})
    with pytest.raises(ValueError, match=r"data\.languages is 'de,de'; expected two"):
        parallel.load({'dir': str(tmp_path), 'languages': 'de,de'})


def test_objects_of_languages(tmp_path):
    rows = [{'translation': {'de': de, 'en': en, 'fr': 'x'}} for de, en in ROWS * 4]
    write_lines(tmp_path / 'train.jsonl', [json.dumps(row) for row in rows])
    found = parallel.load({'dir': str(tmp_path), 'languages': 'en,de'})
    assert set(texts_of(found['train'])) <= {row[::-1] for row in ROWS}


def test_files_of_one_name_belong_together(tmp_path):
    for name in ('train.en', 'train.de', 'test_2016.en', 'test_2017.en', 'test_2017.de'):
        write_lines(tmp_path / name, [name])
    found = parallel.load({'dir': str(tmp_path), 'languages': 'en,de', 'split_fractions': (0, 0)})
    assert texts_of(found['test']) == [('test_2017.en', 'test_2017.de')]


@pytest.mark.parametrize('languages', ['EN,DE', 'en,de'])
def test_languages_in_capitals(tmp_path, languages):
    write_lines(tmp_path / 'train.tsv', ['EN\tDE', 'a dog\tein Hund'])
    given = {'dir': str(tmp_path), 'languages': languages, 'split_fractions': (0, 0)}
    assert texts_of(parallel.load(given)['train']) == [('a dog', 'ein Hund')]


def test_two_columns_without_a_header(tmp_path):
    write_lines(tmp_path / 'train.tsv', ['ein Hund\ta dog'])
    given = {'dir': str(tmp_path), 'header': False, 'split_fractions': (0, 0)}
    assert texts_of(parallel.load(given)['train']) == [('ein Hund', 'a dog')]


TWO = {'train.de': ['a'], 'train.en': ['b']}


@pytest.mark.parametrize(
    ('files', 'data', 'message'),
    [
        (
            {'train.de': ['a', 'b'], 'train.en': ['a']},
            {},
            r'train\.de has a text on line 2',
        ),
        ({'train.de': ['a', ' '], 'train.en': ['a', 'b']}, {}, r'train\.en has a text on line 2'),
        ({'train.de': b'\xff\n', 'train.en': ['a']}, {}, r'train\.de is not utf-8'),
        ({'train.de.gz': b'no', 'train.en': ['a']}, {}, 'no whole gzip file'),
        ({'train.de': ['a']}, {}, "none in 'en'"),
        ({'train.tsv': ['x\ty\tz', 'a\tb\tc']}, {'languages': ''}, 'no column for data.columns'),
        ({'train.de': ['a']}, {'glue': 'rte'}, "data.glue is 'rte'"),
        ({}, {'dir': '/nowhere'}, 'not a folder'),
        (
            TWO | {'test_2016.en': ['x'], 'test_2017.de': ['y']},
            {},
            r'no two files for test .*, but test_2016\.en, test_2017\.de; give',
        ),
        (
            TWO | {f'test_{year}.{own}': ['x'] for year in (2016, 2017) for own in ('de', 'en')},
            {},
            'several files for test: test_2016.de, test_2016.en, test_2017.de, test_2017.en. Keep',
        ),
        (TWO | {'train.en.gz': ['a']}, {}, r'several files for train: train\.de, train\.en, tr'),
        (
            {'train.tsv': ['English\tGerman', 'a\tb']},
            {'languages': '', 'header': 'auto'},
            "first line, 'English', 'German', names",
        ),
        (
            {'train.jsonl': ['{"translation": {"de": "a", "en": "b"}}', '{"id": 1}']},
            {},
            r'train\.jsonl, line 2: None stands where a text must',
        ),
    ],
)
def test_mistakes_are_named(tmp_path, files, data, message):
    for name, lines in files.items():
        if isinstance(lines, bytes):
            (tmp_path / name).write_bytes(lines)
        else:
            write_lines(tmp_path / name, lines)
    given = {'dir': str(tmp_path), 'languages': 'de,en', 'header': True} | data
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parallel.load(given)
