import gzip

import datasets
import ml_collections
import pytest

from adapters_jax.data import sources

CSV = 'text,label\n' + ''.join(f'"text, {i}",{"odd" if i % 2 else "even"}\n' for i in range(40))


def load(data, kind):
    """Read as a run does, which settles the classes in between."""
    return sources.limited(sources.load(data, kind), data)


def config(**data):
    """A config as a run has it: with every key, most of them not set."""
    columns = {'text_a': '', 'text_b': '', 'label': ''} | data.pop('columns', {})
    unset = dict.fromkeys(['name', 'config_name', 'dir', 'glue', 'train', 'validation', 'test'], '')
    settings = {'header': 'auto', 'encoding': '', 'delimiter': '', 'quoting': 'auto'}
    cut = {'split_fractions': (0.1, 0.1), 'split_seed': 0, 'limit': 0}
    return ml_collections.ConfigDict({**unset, **settings, **cut, 'columns': columns, **data})


def sizes(splits):
    return {name: len(split) for name, split in splits.items()}


def put(folder, **files):
    for name, content in files.items():
        (folder / name.replace('__', '.')).write_bytes(content.encode())


def test_a_folder_with_one_file_is_cut_in_three(tmp_path):
    put(tmp_path, train__csv=CSV)
    splits = load(config(dir=str(tmp_path)), 'class')
    assert sizes(splits) == {'train': 32, 'validation': 4, 'test': 4}
    assert splits['train'].column_names == ['text_a', 'label']


def test_a_given_test_split_is_kept_and_validation_cut_off(tmp_path):
    put(tmp_path, train__csv=CSV, test__tsv='text\nunlabelled\n')
    splits = load(config(dir=str(tmp_path)), 'class')
    assert sizes(splits) == {'train': 36, 'validation': 4, 'test': 1}
    assert splits['test'].column_names == ['text_a']


def test_a_given_validation_split_leaves_training_whole(tmp_path):
    put(tmp_path, train__csv=CSV, dev__jsonl='{"text": "x", "label": "odd"}\n')
    assert sizes(load(config(dir=str(tmp_path)), 'class')) == {'train': 40, 'validation': 1}


def test_fractions_of_zero_cut_nothing(tmp_path):
    put(tmp_path, train__csv=CSV)
    splits = load(config(dir=str(tmp_path), split_fractions=(0.0, 0.0)), 'class')
    assert sizes(splits) == {'train': 40}


def test_named_files_are_looked_up_in_the_folder(tmp_path):
    put(tmp_path, one__csv=CSV, two__csv=CSV, train__csv='nothing')
    data = config(dir=str(tmp_path), train='one.csv', validation=str(tmp_path / 'two.csv'))
    assert sizes(load(data, 'class')) == {'train': 40, 'validation': 40}
    data = config(test=str(tmp_path / 'one.csv'))
    assert sizes(load(data, 'class')) == {'test': 40}


def test_a_file_without_header_by_positions(tmp_path):
    put(tmp_path, train__csv='A plane.,"An ""air"" plane.",5.0\nA man,A flute,3.8\n')
    columns = {'text_a': '0', 'text_b': '1', 'label': '2'}
    data = config(dir=str(tmp_path), columns=columns, split_fractions=(0.0, 0.0))
    train = load(data, 'number')['train']
    assert train[0] == {'text_a': 'A plane.', 'text_b': 'An "air" plane.', 'label': 5.0}
    assert len(train) == 2


def test_header_can_be_forced_either_way(tmp_path):
    put(tmp_path, train__csv='text,label\nx,y\n')
    columns = {'text_a': '0', 'label': '1'}
    data = config(dir=str(tmp_path), columns=columns, header=False, split_fractions=(0.0, 0.0))
    assert load(data, 'class')['train']['text_a'][:] == ['text', 'x']
    with data.unlocked():
        data.header = True
    assert load(data, 'class')['train']['text_a'][:] == ['x']


def test_encoding_delimiter_and_compression(tmp_path):
    content = 'NUM How many ?\nLOC Wo ist K\xf6ln ?\n'.encode('latin-1')
    (tmp_path / 'train.txt.gz').write_bytes(gzip.compress(content))
    data = config(
        dir=str(tmp_path),
        encoding='latin-1',
        delimiter=' ',
        columns={'text_a': '1', 'label': '0'},
        split_fractions=(0.0, 0.0),
    )
    assert load(data, 'class')['train']['text_a'][:] == ['How many ?', 'Wo ist Köln ?']


def test_limit_draws_a_repeatable_sample(tmp_path):
    put(tmp_path, train__csv=CSV)
    first, again = (
        load(config(dir=str(tmp_path), limit=10, split_seed=seed), 'class')['train'][:]
        for seed in (4, 4)
    )
    assert first == again
    assert len(first['text_a']) == 10
    assert first['text_a'] != [f'text, {i}' for i in range(10)]
    assert set(first['label']) == {'odd', 'even'}


def hub(monkeypatch, splits):
    asked = []
    monkeypatch.setattr(
        datasets, 'load_dataset', lambda *names: asked.append(names) or datasets.DatasetDict(splits)
    )
    return asked


def hub_split(labels, **texts):
    names = datasets.ClassLabel(names=['neg', 'pos'])
    split = datasets.Dataset.from_dict({**texts, 'label': labels})
    return split.cast_column('label', names)


def test_hub_data_gets_its_class_names_and_loses_hidden_labels(monkeypatch):
    splits = {
        'train': hub_split([0, 1], text=['a', 'b']),
        'unsupervised': hub_split([-1], text=['u']),
        'test': hub_split([-1, -1], text=['c', 'd']),
    }
    asked = hub(monkeypatch, splits)
    data = config(name='some/set', config_name='plain', split_fractions=(0.0, 0.0))
    found = load(data, 'class')
    assert asked == [('some/set', 'plain')]
    assert sizes(found) == {'train': 2, 'test': 2}
    assert found['train']['label'][:] == ['neg', 'pos']
    assert found['test'].column_names == ['text_a']


def test_of_two_splits_for_one_use_it_is_told_which_is_used(monkeypatch, caplog):
    names = ('train', 'dev', 'validation')
    hub(monkeypatch, {name: hub_split([1], text=[name]) for name in names})
    assert load(config(name='some/set'), 'class')['validation']['text_a'][:] == ['validation']
    assert 'some/set: of its splits for validation the last one is used, valid' in caplog.text


@pytest.mark.parametrize('hidden', [-1, -1.0, '-1'])
def test_hidden_labels_of_any_type_are_none(monkeypatch, hidden):
    splits = {
        'train': datasets.Dataset.from_dict({'text': ['a'], 'label': [type(hidden)(1)]}),
        'test': datasets.Dataset.from_dict({'text': ['c', 'd'], 'label': [hidden, hidden]}),
    }
    hub(monkeypatch, splits)
    found = load(config(name='some/set', split_fractions=(0.0, 0.0)), 'number')
    assert found['train']['label'][:] == [1.0]
    assert found['test'].column_names == ['text_a']


@pytest.mark.parametrize('kind', ['class', 'number', 'classes'])
def test_labels_that_a_test_file_hides_are_none(tmp_path, kind):
    put(tmp_path, train__csv=CSV.replace('even', '2').replace('odd', '1'))
    (tmp_path / 'test.csv').write_text('text,label\nc,-1\nd,-1\n')
    found = load(config(dir=str(tmp_path)), kind)
    assert found['test'].column_names == ['text_a'] and 'label' in found['train'].column_names


def test_one_class_with_a_comma_in_its_name_is_one(monkeypatch):
    rows = datasets.Dataset.from_dict({'text': ['a'], 'label': [0]})
    names = datasets.ClassLabel(names=['salt, pepper', 'other'])
    hub(monkeypatch, {'train': rows.cast_column('label', names)})
    found = load(config(name='some/set', split_fractions=(0.0, 0.0)), 'classes')
    assert found['train']['label'][:] == [['salt, pepper']]


def hub_sets(labels):
    features = {'text': datasets.Value('string')}
    features['label'] = datasets.List(datasets.ClassLabel(names=['x', 'y']))
    columns = {'text': ['a'] * len(labels), 'label': labels}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_sets_of_classes_from_the_hub(monkeypatch):
    hub(monkeypatch, {'train': hub_sets([[0, 1], []]), 'test': hub_sets([[-1], [-1]])})
    found = load(config(name='some/set', split_fractions=(0.0, 0.0)), 'classes')
    assert found['train']['label'][:] == [['x', 'y'], []]
    assert found['test'].column_names == ['text_a']


@pytest.mark.parametrize('bad', [[0, -1], [None]])
def test_sets_with_what_is_no_class_are_named(monkeypatch, bad):
    hub(monkeypatch, {'train': hub_sets([[0], bad])})
    with pytest.raises(ValueError, match=r'some/set, split train, row 1: .* from 0 to 1: mend'):
        load(config(name='some/set'), 'classes')


def test_glue_without_a_folder_comes_from_the_hub(monkeypatch):
    pairs = {'premise': ['a'], 'hypothesis': ['b']}
    names = ['train', 'validation_matched', 'validation_mismatched', 'test_matched']
    asked = hub(monkeypatch, {name: hub_split([1], **pairs) for name in names})
    found = load(config(glue='mnli'), 'class')
    assert asked == [('nyu-mll/glue', 'mnli')]
    assert list(found) == names
    assert found['train'][0] == {'text_a': 'a', 'text_b': 'b', 'label': 'pos'}


def test_a_hub_that_does_not_answer_is_one_sentence(monkeypatch):
    def fail(*_):
        raise ConnectionError('no network')

    monkeypatch.setattr(datasets, 'load_dataset', fail)
    with pytest.raises(ValueError, match=r"data\.name is 'no/such'.*trec.*no network"):
        load(config(name='no/such'), 'class')


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        ({}, r'names no source.*trec.*data\.dir'),
        ({'name': 'trec', 'dir': 'x'}, 'dir, name, which name several sources'),
        ({'name': 'trec', 'glue': 'rte'}, 'glue, name, which name several sources'),
        ({'glue': 'rte', 'train': 'x.csv'}, 'glue, train, which name several sources'),
        ({'dir': '/nowhere/at/all'}, "'/nowhere/at/all', which is not a folder"),
        ({'train': '/'}, r'data\.train: / is a folder; name a file in it.* as data\.dir \(/ holds'),
        ({'train': '/nowhere/x.csv'}, r'data\.train: there is no file /nowhere/x\.csv; the folder'),
    ],
)
def test_sources_that_cannot_be_are_refused(data, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(config(**data), 'class')


def test_a_relative_file_is_told_with_the_folder_that_it_was_looked_for_in(tmp_path, monkeypatch):
    (tmp_path / 'notes.md').touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf'file x\.csv; {tmp_path} holds notes\.md'):
        load(config(train='x.csv'), 'class')


@pytest.mark.parametrize(
    ('files', 'data', 'message'),
    [
        ({'notes__md': ''}, {}, r'no train\.csv .* holds notes\.md'),
        ({'train__csv': CSV, 'train__tsv': ''}, {}, r'several files for train: train\.csv, train'),
        ({'train__csv': 'text,label\n'}, {}, r'train\.csv has no examples'),
        ({'train__csv': CSV, 'dev__csv': ''}, {}, r'dev\.csv is empty'),
        ({'train__csv': 'text,label\nx,1\n ,1\n'}, {}, r'train\.csv, line 3: text_a is empty'),
        ({'train__csv': 'text,label\nx,1\ny\n'}, {}, r'line 3: 1 fields where .* 2'),
        ({'train__csv': CSV}, {'columns': {'label': 'y'}}, "no column 'y' .*'text', 'label'"),
        ({'train__csv': CSV}, {'header': 'maybe'}, "data.header is 'maybe'"),
        ({'train__csv': CSV}, {'split_fractions': (0.1,)}, 'needs .validation, test.'),
        ({'train__csv': CSV}, {'split_seed': -1}, 'data.split_seed is -1; it must be 0 or'),
        ({'train__csv': CSV}, {'limit': -1}, 'data.limit is -1'),
        ({'train__csv': CSV}, {'train_limit': -1}, 'data.train_limit is -1'),
        ({'train__csv': CSV, 'dev__csv': 'text\nx\n'}, {}, r'dev\.csv: no column .* the label'),
        (
            {'train__csv': CSV, 'dev__csv': 'sentence1,sentence2,label\nx,y,1\n'},
            {},
            "'validation' has pairs of texts, and 'train' single ones",
        ),
        (
            {'train__csv': 'sentence1,sentence2,label\nx,y,1\n', 'test__csv': CSV},
            {},
            "'train' has pairs of texts, and 'test' single ones",
        ),
    ],
)
def test_bad_folders_and_files_are_explained(tmp_path, files, data, message):
    put(tmp_path, **files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(config(dir=str(tmp_path), **data), 'class')


def test_rows_without_a_text_are_skipped_on_request_only(tmp_path, caplog):
    put(tmp_path, train__csv='text,label\n ,1\nx,1\n,2\ny,2\n', dev__csv='text,label\n,1\n')
    with pytest.raises(ValueError, match=r'train\.csv, line 2: text_a is empty.*skip_empty'):
        load(config(dir=str(tmp_path)), 'class')
    with pytest.raises(ValueError, match=r'dev\.csv, line 2: no text'):
        load(config(dir=str(tmp_path), skip_empty=True), 'class')
    (tmp_path / 'dev.csv').unlink()
    caplog.clear()
    found = load(config(dir=str(tmp_path), skip_empty=True, split_fractions=(0, 0)), 'class')
    assert found['train'][:] == {'text_a': ['x', 'y'], 'label': ['1', '2']}
    assert 'skipped 2 rows without a text, from' in caplog.text and 'line 2 on' in caplog.text


def test_few_training_rows_leave_the_other_splits_whole(tmp_path):
    rows = 'text,label\n' + ''.join(f'text {i},{i % 2}\n' for i in range(40))
    put(tmp_path, train__csv=rows)
    whole, few = (load(config(dir=str(tmp_path), train_limit=n), 'class') for n in (0, 6))
    assert {name: len(split) for name, split in few.items()} == {
        'train': 6,
        'validation': 4,
        'test': 4,
    }
    for name in ('validation', 'test'):
        assert few[name][:] == whole[name][:]
    assert set(few['train']['text_a']) < set(whole['train']['text_a'])
    again = load(config(dir=str(tmp_path), train_limit=6), 'class')
    assert again['train'][:] == few['train'][:]


def test_regression_labels_must_be_numbers(tmp_path):
    put(tmp_path, train__csv='sentence1,sentence2,score\na,b,1.5\nc,d,good\n')
    with pytest.raises(ValueError, match=r"train\.csv, line 3: the label 'good' is not"):
        load(config(dir=str(tmp_path)), 'number')


def test_unknown_label_kind_is_refused_first():
    with pytest.raises(ValueError, match="label_kind is 'words'"):
        load({'name': 'trec'}, 'words')


def test_lists_are_named_of_json_files_alone(tmp_path):
    (tmp_path / 'x.csv').write_text('text,label\na,b\n')
    with pytest.raises(ValueError, match=r'data.train: .* only a \.json file .* leave out #train'):
        load({'train': str(tmp_path / 'x.csv#train')}, 'class')


@pytest.mark.parametrize(
    ('first', 'told'), [('phrase,verdict\n', True), ('fine,good\n', False), ('text,label\n', False)]
)
def test_a_first_line_that_may_be_a_header_is_told(tmp_path, caplog, first, told):
    (tmp_path / 'x.csv').write_text(first + 'a,good\nb,bad\nc,bad\nd,good\n')
    given = {'train': str(tmp_path / 'x.csv'), 'columns': {'text_a': '0', 'label': '1'}}
    load(given, 'class')
    assert ("the only one of the class 'verdict'; if it names" in caplog.text) is told
    caplog.clear()
    load(given | {'header': 'false'}, 'class')
    assert not caplog.text


@pytest.mark.parametrize('name', ['set[1]', 'set*', 'set?'])
def test_of_a_saved_set_the_folder_may_have_any_name(name, tmp_path):
    rows = datasets.Dataset.from_dict({'text': ['a', 'b'], 'label': ['x', 'y']})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / 'set 1'))
    datasets.DatasetDict(train=rows.select([1])).save_to_disk(str(tmp_path / name))
    found = load(config(name=str(tmp_path / name), split_fractions=(0.0, 0.0)), 'class')
    assert {split: own['text_a'][:] for split, own in found.items()} == {'train': ['b']}


def test_a_folder_of_files_whose_path_is_a_pattern_is_refused(tmp_path):
    (tmp_path / 'set[1]').mkdir()
    put(tmp_path / 'set[1]', train__csv=CSV)
    with pytest.raises(ValueError, match=r'set\[1\].* a folder whose path is read as a pattern'):
        load(config(name=str(tmp_path / 'set[1]')), 'class')
