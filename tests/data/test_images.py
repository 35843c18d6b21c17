"""Sets of images from every source, and their pixels on the disk."""

import gzip
import logging
import tarfile

import datasets
import numpy as np
import pytest
import toy_images

from adapters_jax.data import images
from adapters_jax.data.pixels import Preparation
from adapters_jax.defaults import data as section

PREPARATION = Preparation((16, 16))
FILES = toy_images.files(12)
LABELS = [name.partition('/')[0] for name in FILES]


def read(**changes):
    return images.read({**section(), 'split_fractions': (0.0, 0.0), **changes})


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def ids(values):
    return np.array([sorted(toy_images.COLOURS).index(value) for value in values], np.int32)


def decoded(rows, cache=None):
    return images.encode(rows, PREPARATION, ids, cache)


def expected(names):
    return np.stack([PREPARATION(FILES[name]) for name in names])


@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    """A set with three splits, of four images each, by name of file."""
    names = sorted(FILES)
    parts = {'train': names[::3], 'dev': names[1::3], 'test': names[2::3]}
    return {f'{split}/{name}': FILES[name] for split, part in parts.items() for name in part}


def test_folders_and_tar_files_hold_the_same(splits, tmp_path):
    folder = write(tmp_path / 'set', splits | {'train/.DS_Store': b'', 'train/notes.txt': b'a'})
    tar = toy_images.write_tar(tmp_path / 'set.tar', {f'./{k}': v for k, v in splits.items()})
    inner = {f'cifar/{k}': v for k, v in splits.items()}
    wrapped = toy_images.write_tar(tmp_path / 'wrapped.tar', inner)
    for where in (folder, tar, wrapped):
        found = read(dir=where)
        assert list(found) == ['train', 'validation', 'test']
        for split, stem in (('train', 'train'), ('validation', 'dev'), ('test', 'test')):
            names = sorted(k.partition('/')[2] for k in splits if k.startswith(stem))
            assert found[split]['label'][:] == [name.partition('/')[0] for name in names]
            encoded = decoded(found[split])
            np.testing.assert_array_equal(encoded.examples['pixels'], expected(names))
            np.testing.assert_array_equal(encoded.examples['label'], ids(found[split]['label']))
            assert encoded.lengths.tolist() == [1] * len(names) and not encoded.tokens
    assert read(dir=folder)['train']['image'][0] == f'{folder}/train/{sorted(FILES)[0]}'
    assert read(dir=tar)['train']['image'][0] == f'{tar}:train/{sorted(FILES)[0]}'


@pytest.mark.parametrize('level', ['train', 'train/blue', 'train/blue/more'])
def test_folders_may_be_links(level, tmp_path):
    contents = {f'train/{name.replace("/", "/more/")}': FILES[name] for name in sorted(FILES)}
    plain = read(dir=write(tmp_path / 'plain', contents))['train']
    write(tmp_path / 'linked', contents)
    linked = tmp_path / 'linked' / level
    linked.rename(tmp_path / 'elsewhere')
    linked.symlink_to(tmp_path / 'elsewhere')
    found = read(dir=str(tmp_path / 'linked'))['train']
    assert found['label'][:] == plain['label'][:] and found['digest'][:] == plain['digest'][:]


def test_images_may_be_links(tmp_path, caplog):
    folder, (name, *_) = tmp_path / 'set', sorted(FILES)
    write(folder, FILES)
    at = (folder / name).parent
    (at / 'hard.png').hardlink_to(folder / name)
    (at / 'soft.png').symlink_to(f'../{name}')
    (at / 'soft_to_hard.png').symlink_to('hard.png')
    (at / 'lost.png').symlink_to('nothing.png')
    (at / 'round.png').symlink_to('round.png')
    with tarfile.open(tmp_path / 'set.tar', 'w') as tar:
        tar.add(folder, '.')
    for where in (folder, tmp_path / 'set.tar'):
        caplog.clear()
        found = read(dir=str(where))['train']
        assert len(found) == len(FILES) + 3
        assert found['digest'][:].count(found['digest'][0]) == 4
        assert f'{where}: 2 links to images lead to no file and are passed over' in caplog.text


def test_of_two_images_of_one_name_in_a_tar_file_the_later_one_is_taken(tmp_path):
    (name, *_), tar = sorted(FILES), toy_images.write_tar(tmp_path / 'set.tar', FILES)
    other = write(tmp_path, {'other': FILES[sorted(FILES)[-1]]})
    with tarfile.open(tar, 'a') as archive:
        archive.add(f'{other}/other', name)
    found = read(dir=tar)['train']
    assert len(found) == len(FILES)
    assert len(set(found['digest'][:])) == len(FILES) - 1


def test_links_that_lead_back_are_not_followed(tmp_path):
    folder = write(tmp_path / 'set', {f'train/{name}': content for name, content in FILES.items()})
    (tmp_path / 'set/train/blue/up').symlink_to(tmp_path / 'set')
    (tmp_path / 'set/train/blue/across').symlink_to(tmp_path / 'set/train/red')
    (tmp_path / 'set/train/red/across').symlink_to(tmp_path / 'set/train/blue')
    found = read(dir=folder)['train']
    # By way of the links each of the two is also in the other.
    assert len(found) == len(FILES) + LABELS.count('red') + LABELS.count('blue')


def test_files_that_are_passed_over_are_counted(tmp_path, caplog):
    kinds = {'.JFIF': 'JPEG', '.jpe': 'JPEG', '.jp2': 'JPEG2000', '.pnm': 'PPM'}
    pixels = toy_images.picture('red', np.random.default_rng(0))
    contents = {f'red/a{end}': toy_images.encoded(pixels, kind) for end, kind in kinds.items()}
    folder = write(tmp_path / 'set', contents)
    tar = toy_images.write_tar(tmp_path / 'set.tar', contents)
    for where in (folder, tar):
        rows = read(dir=where)['train']
        assert len(rows) == 4 and images.encode(rows, PREPARATION, lambda names: np.zeros(4))
    assert not caplog.text
    contents |= {'red/b.heic': b'a', 'red/c.heic': b'a', 'red/notes': b'a', '.DS_Store': b'a'}
    folder = write(tmp_path / 'set', contents)
    tar = toy_images.write_tar(tmp_path / 'set.tar', contents)
    for where in (folder, tar):
        caplog.clear()
        assert len(read(dir=where)['train']) == 4
        assert f'{where}: 3 files are passed over' in caplog.text
        assert '(2 .heic, 1 none)' in caplog.text


def test_splits_may_be_named_one_by_one(splits, tmp_path):
    write(tmp_path, splits)
    tar = toy_images.write_tar(tmp_path / 'more.tar', FILES)
    found = read(dir=str(tmp_path), train='more.tar', validation='dev')
    assert list(found) == ['train', 'validation']
    assert [len(rows) for rows in found.values()] == [12, 4]
    with pytest.raises(ValueError, match=r'holds the splits train, validation, test; give it as'):
        read(train=str(tmp_path))
    assert len(read(train=tar)['train']) == 12


def test_a_set_without_splits_is_cut_without_sharing_an_image(tmp_path):
    twice = {f'{name[:-4]}-again.png': content for name, content in toy_images.files(30).items()}
    folder = write(tmp_path, toy_images.files(30) | twice)
    found = read(dir=folder, split_fractions=(0.2, 0.2))
    assert {split: len(rows) for split, rows in found.items()} == {
        'train': 36,
        'validation': 12,
        'test': 12,
    }
    parts = [set(rows['digest']) for rows in found.values()]
    assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])


def test_a_pattern_finds_the_class_in_a_name(tmp_path):
    flat = {name.replace('/', '_'): content for name, content in FILES.items()}
    tar = toy_images.write_tar(tmp_path / 'flat.tar', {f'train/{k}': v for k, v in flat.items()})
    found = read(dir=tar, class_pattern=r'^([a-z]+)_\d')
    assert found['train']['label'][:] == sorted(LABELS)
    with pytest.raises(ValueError, match=r'lies in no folder.*set data.class_pattern'):
        read(dir=tar)
    with pytest.raises(ValueError, match=r'finds no class in .blue_0000.png'):
        read(dir=tar, class_pattern='(purple)_')
    with pytest.raises(ValueError, match='expected one group, around the class'):
        read(dir=tar, class_pattern='[a-z]+_')
    with pytest.raises(ValueError, match='which is no regular expression'):
        read(dir=tar, class_pattern='([a-z+_')


def test_test_images_need_no_class(splits, tmp_path):
    bare = {f'test/{i}.png': content for i, content in enumerate(FILES.values())}
    folder = write(tmp_path, {k: v for k, v in splits.items() if 'test' not in k} | bare)
    found = read(dir=folder)
    assert 'label' not in found['test'].column_names and len(found['test']) == 12
    assert 'label' not in decoded(found['test']).examples


@pytest.mark.parametrize('typed', [True, False])
def test_image_data_sets(typed, tmp_path):
    names = sorted(FILES)
    label = datasets.ClassLabel(names=sorted(toy_images.COLOURS))
    features = datasets.Features({'picture': datasets.Image(), 'label': label})
    features |= {} if typed else {'label': datasets.Value('string')}
    values = [name.partition('/')[0] for name in names]
    columns = {'picture': [{'bytes': FILES[name], 'path': None} for name in names]}
    columns['label'] = [sorted(toy_images.COLOURS).index(v) for v in values] if typed else values
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    whole = datasets.DatasetDict({'train': made, 'validation': made.select(range(3))})
    whole.save_to_disk(tmp_path / 'set')
    found = read(name=str(tmp_path / 'set'))
    assert [len(rows) for rows in found.values()] == [12, 3]
    assert found['train']['label'][:] == values
    np.testing.assert_array_equal(decoded(found['train']).examples['pixels'], expected(names))
    made.save_to_disk(tmp_path / 'single')
    single = read(name=str(tmp_path / 'single'))
    assert {split: rows['label'][:] for split, rows in single.items()} == {'train': values}
    with pytest.raises(ValueError, match=r"columns of images \['picture'\].*'label'"):
        read(name=str(tmp_path / 'set'), columns={'text_a': 'label'})
    with pytest.raises(ValueError, match=r'name its column in data.columns.label'):
        read(name=str(tmp_path / 'set'), columns={'label': 'kind'})


def test_a_row_of_a_data_set_without_its_image_is_named(tmp_path):
    image = {'bytes': next(iter(FILES.values())), 'path': None}
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('string')})
    columns = {'image': [image, None], 'label': ['red', 'red']}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / 'set')
    with pytest.raises(ValueError, match=r'row 1 has no image; remove the row, or give it one'):
        read(name=str(tmp_path / 'set'))


@pytest.mark.parametrize('labels', [{}, {'kind': [-1]}])
def test_a_hub_set_may_lack_the_label_that_is_named(monkeypatch, labels):
    features = datasets.Features({'image': datasets.Image(), 'kind': datasets.Value('int64')})
    image = {'bytes': next(iter(FILES.values())), 'path': None}
    train = datasets.Dataset.from_dict({'image': [image], 'kind': [3]}, features=features)
    test = train.remove_columns('kind')
    for name, column in labels.items():
        test = test.add_column(name, column)
    found = {'train': train, 'test': test}
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_: datasets.DatasetDict(found))
    read_splits = read(name='some/set', columns={'label': 'kind'})
    assert read_splits['train']['label'][:] == ['3']
    assert 'label' not in read_splits['test'].column_names


def test_pixels_are_kept_on_disk_and_mapped(splits, tmp_path, caplog, monkeypatch):
    rows = read(dir=write(tmp_path / 'set', splits))['train']
    plain, first = decoded(rows), decoded(rows, tmp_path / 'cache')
    kept = first.examples['pixels']
    assert isinstance(kept.base, np.memmap) and not kept.flags.writeable
    np.testing.assert_array_equal(kept, plain.examples['pixels'])
    assert first.fingerprint() == plain.fingerprint()
    monkeypatch.setattr(images, '_fill', lambda *_: pytest.fail('decoded again'))
    again = decoded(rows, tmp_path / 'cache')
    assert again.fingerprint() == first.fingerprint()
    # Other labels, other images or another preparation are another split.
    monkeypatch.undo()
    relabelled = rows.remove_columns('label').add_column('label', rows['label'][::-1])
    assert decoded(relabelled, tmp_path / 'cache').fingerprint() != first.fingerprint()
    fewer = decoded(rows.select([0, 1]), tmp_path / 'cache')
    assert fewer.fingerprint() != first.fingerprint() and len(fewer) == 2
    other = images.encode(rows, Preparation((8, 8), resize=(8, 8)), ids, tmp_path / 'cache')
    assert other.examples['pixels'].shape == (4, 8, 8, 3)
    assert len(list((tmp_path / 'cache').glob('pixels-*'))) == 3
    # What is damaged is said, and made again.
    path = sorted((tmp_path / 'cache').glob('pixels-*/numbers.bin'))[0]
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        for part in (rows, rows.select([0, 1])):
            found = decoded(part, tmp_path / 'cache').examples['pixels']
            np.testing.assert_array_equal(found, plain.examples['pixels'][: len(part)])


def test_a_failed_decoding_leaves_nothing(splits, tmp_path):
    broken = splits | {'train/red/9.png': b'no image'}
    rows = read(dir=write(tmp_path / 'set', broken))['train']
    for cache in (None, tmp_path / 'cache'):
        with pytest.raises(ValueError, match=r'train/red/9.png cannot be read.*replace or remove'):
            decoded(rows, cache)
    left = [path.name for path in (tmp_path / 'cache').rglob('*') if path.is_file()]
    assert not {'numbers.bin', 'header.json'} & set(left)


@pytest.mark.parametrize(
    ('contents', 'message'),
    [
        ({}, 'holds no images'),
        ({'train/red/notes.txt': b'a', 'train/blue/0.png': b''}, 'train/red holds no images'),
        ({'train/0.png': b'', 'train/red/1.png': b''}, r'train/0.png lies in no folder'),
        (
            {f'{k}/0.png': b'' for k in ('car', 'train', 'bus')},
            r'\(train\) .* \(bus, car\); if all',
        ),
        ({'val/red/0.png': b'', 'valid/red/0.png': b''}, 'several folders for validation'),
    ],
)
def test_folders_that_are_no_set(contents, message, tmp_path):
    (tmp_path / 'set').mkdir()
    folder = write(tmp_path / 'set', contents)
    with pytest.raises(ValueError, match=message):
        read(dir=folder)


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"set of texts .'trec'.*but the task is of images"):
        read(name='trec')
    with pytest.raises(FileNotFoundError, match=r'there is no folder or tar file .*nowhere'):
        read(dir=str(tmp_path / 'nowhere'))
    (tmp_path / 'set.tar.gz').write_bytes(gzip.compress(b'a' * 600))
    with pytest.raises(ValueError, match=r'cannot be read as a tar file.*not compressed'):
        read(train=str(tmp_path / 'set.tar.gz'))
