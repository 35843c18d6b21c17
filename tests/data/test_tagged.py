"""Sentences with tags from folders, objects and the hub."""

import gzip
import json

import datasets
import pyarrow
import pytest

from adapters_jax.data import tagged

CONLL = 'EU B-ORG\nrejects O\n\nPeter B-PER\nBlackburn I-PER\n'
ROWS = [
    {'tokens': ['EU', 'rejects'], 'tags': ['B-ORG', 'O']},
    {'tokens': ['Peter', 'Blackburn'], 'tags': ['B-PER', 'I-PER']},
]


def lines(rows):
    return ''.join(json.dumps(row) + '\n' for row in rows)


@pytest.mark.parametrize(
    ('names', 'ignored'),
    [
        (('train.conll', 'dev.conll', 'test.conll'), ('README.md', 'mytrain.conll')),
        (('train', 'valid.txt', 'test.tsv'), ('train.py', 'train_old.txt')),
        (
            ('en_x-ud-train.rebuilt.conllu', 'en_x-ud-dev.conllu', 'en_x-ud-test.conllu'),
            ('a.txt', 'en_x-ud-train.txt', 'en_x-ud-dev.txt', 'en_x-ud-test.txt'),
        ),
        (('wnut17train.conll', 'emerging.dev.conll', 'emerging.test.annotated'), ('LICENSE.txt',)),
        (('eng.train', 'eng.testa', 'eng.testb'), ('eng.raw', 'train_dev_test.txt')),
        (('a-train.bio.gz', 'a-validation.iob2', 'a-test.conll'), ('latest.conll',)),
    ],
)
def test_files_are_found_under_the_names_that_corpora_give_them(tmp_path, names, ignored):
    for name in (*names, *ignored):
        content = CONLL
        if name.endswith('.conllu'):
            content = '1\tEU\t_\tB-ORG' + '\t_' * 6 + '\n'
        packed = gzip.compress(content.encode()) if name.endswith('.gz') else content.encode()
        (tmp_path / name).write_bytes(packed)
    found = tagged.load({'dir': str(tmp_path)})
    files = {split: rows[0]['file'] for split, rows in found.items()}
    expected = zip(('train', 'validation', 'test'), names, strict=True)
    assert files == {split: str(tmp_path / name) for split, name in expected}
    assert all(rows[0]['tokens'][0] == 'EU' for rows in found.values())


def test_a_tab_may_be_typed_as_a_shell_passes_it(tmp_path):
    (tmp_path / 'train.tsv').write_text('New York\tB-LOC\nsleeps\tO\n')
    (rows,) = tagged.load({'train': str(tmp_path / 'train.tsv'), 'delimiter': '\\t'}).values()
    assert rows[0]['tokens'] == ['New York', 'sleeps']


def test_several_files_for_a_split_are_refused(tmp_path):
    for name in ('a-train.conll', 'b-train.conll'):
        (tmp_path / name).write_text(CONLL)
    with pytest.raises(ValueError, match=r'several files for train: a-train\.conll, b-train\.con'):
        tagged.load({'dir': str(tmp_path)})
    named = tagged.load({'train': str(tmp_path / 'b-train.conll')})
    assert list(named) == ['train']
    with pytest.raises(FileNotFoundError, match=r'has no train\.conllu \(or another of \.conllu'):
        (tmp_path / 'empty').mkdir()
        tagged.load({'dir': str(tmp_path / 'empty')})


def test_objects_give_the_same_sentences_as_columns(tmp_path):
    (tmp_path / 'train.conll').write_text(CONLL)
    (tmp_path / 'train.jsonl').write_text('\n' + lines(ROWS))
    (tmp_path / 'hub.jsonl').write_text(lines({'words': r['tokens'], 'x': r['tags']} for r in ROWS))
    one, other = (tagged.load({'train': str(tmp_path / f'train.{e}')}) for e in ('conll', 'jsonl'))
    for rows in (one['train'], other['train']):
        assert rows['tokens'][:] == [row['tokens'] for row in ROWS]
        assert rows['tags'][:] == [row['tags'] for row in ROWS]
    assert 'frame' in one['train'].column_names and 'frame' not in other['train'].column_names
    assert one['train']['line'][:] == [1, 4] and other['train']['line'][:] == [2, 3]
    place = tagged.place(one['train'][1], 1).removeprefix(str(tmp_path))
    assert place == '/train.conll, line 5'
    chosen = {'train': str(tmp_path / 'hub.jsonl'), 'columns': {'text_a': 'words', 'label': 'x'}}
    assert tagged.load(chosen)['train']['tags'][:] == one['train']['tags'][:]
    del chosen['columns']
    with pytest.raises(ValueError, match=r'hub\.jsonl: no column for the tags \(expected tags or'):
        tagged.load(chosen)


@pytest.mark.parametrize(
    ('row', 'expected'),
    [
        ({'tokens': ['a', 'b'], 'tags': ['O']}, 'line 3: 2 words have 1 tags'),
        ({'tokens': 'a b', 'tags': ['O', 'O']}, 'line 3: the tokens are a b; expected a list of w'),
        ({'tokens': ['a', ''], 'tags': ['O', 'O']}, 'line 3: the tokens are .* none of them empty'),
        ({'tokens': ['a'], 'tags': [0]}, r'line 3: the tags are \[0\]; expected a list of texts'),
        ({'tokens': ['a']}, 'line 3: the tags are None; expected a list of texts'),
        ({'tokens': ['a'], 'tags': ['x\ud83d']}, 'line 3: the tag .* half of a character'),
    ],
)
def test_objects_that_are_no_tagged_sentence(tmp_path, row, expected):
    (tmp_path / 'train.jsonl').write_text(lines([*ROWS, row]))
    with pytest.raises(ValueError, match=expected):
        tagged.load({'dir': str(tmp_path)})


def test_a_test_split_may_have_no_tags(tmp_path):
    (tmp_path / 'train.jsonl').write_text(lines(ROWS))
    (tmp_path / 'test.conllu').write_text('1\tEU' + '\t_' * 8 + '\n')
    found = tagged.load({'dir': str(tmp_path)})
    assert found['test'].column_names == ['tokens', 'frame', 'file', 'line']
    (tmp_path / 'train.jsonl').unlink()
    (tmp_path / 'test.conllu').rename(tmp_path / 'train.conllu')
    with pytest.raises(ValueError, match=r'train\.conllu: no word has a tag'):
        tagged.load({'dir': str(tmp_path)})


def test_held_out_sentences_are_not_trained_on(tmp_path):
    once = [f'word{i} O\nother B-X\n\n' for i in range(30)]
    (tmp_path / 'train.conll').write_text(''.join(once * 2))
    found = tagged.load({'dir': str(tmp_path), 'split_fractions': (0.2, 0.2), 'split_seed': 3})
    texts = {k: {' '.join(tokens) for tokens in rows['tokens']} for k, rows in found.items()}
    assert {split: len(own) for split, own in texts.items()} == {
        'train': 18,
        'validation': 6,
        'test': 6,
    }
    assert len(set().union(*texts.values())) == 30


def test_hub_data_sets_name_their_tags(monkeypatch):
    features = datasets.Features(
        {
            'id': datasets.Value('string'),
            'tokens': datasets.List(datasets.Value('string')),
            'ner_tags': datasets.List(datasets.ClassLabel(names=['O', 'B-X'])),
        }
    )

    def split(tags):
        values = {'id': ['0'], 'tokens': [['a', 'b']], 'ner_tags': [tags]}
        return datasets.Dataset.from_dict(values, features=features)

    hub = {'train': split([1, 0]), 'validation': split([0, 1]), 'test': split([-1, -1])}
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_: datasets.DatasetDict(hub))
    found = tagged.load({'name': 'some/set'})
    assert found['train'][0]['tags'] == ['B-X', 'O']
    assert 'tags' not in found['test'].column_names
    assert tagged.place(found['validation'][0], 1) == 'some/set, split validation, line 1'
    hub['train'] = split([1, None])
    assert tagged.load({'name': 'some/set'})['train'][0]['tags'] == ['B-X', '']
    # Parquet may hold what libraries of training ignore.
    column = pyarrow.array([[1, -100]], pyarrow.list_(pyarrow.int64()))
    table = pyarrow.table({'id': ['0'], 'tokens': [['a', 'b']], 'ner_tags': column})
    hub['train'] = datasets.Dataset(table).cast(features)
    with pytest.raises(ValueError, match=r'split train, line 1: the number -100 among the tags'):
        tagged.load({'name': 'some/set'})


@pytest.mark.parametrize(
    ('data', 'expected'),
    [
        ({'glue': 'rte'}, r'data\.glue names texts without tags'),
        ({'name': 'trec'}, r'data\.name names texts without tags'),
        ({'dir': 'd', 'columns': {'text_b': 'x'}}, "text_b is 'x', but a sentence that is tagged"),
        ({}, 'data names no source'),
    ],
)
def test_sources_without_tags_are_refused(data, expected):
    with pytest.raises(ValueError, match=expected):
        tagged.load(data)
