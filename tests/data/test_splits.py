import collections
import logging

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax.data.splits import same_text_groups, split_off, tell_shared

FRACTIONS = {'validation': 0.2, 'test': 0.2}


def texts_of(dataset):
    columns = [name for name in ('text_a', 'text_b') if name in dataset.column_names]
    return {' '.join(text.lower().split()) for name in columns for text in dataset[name][:]}


def pool_of(texts, labels):
    return datasets.Dataset.from_dict({'text_a': texts, 'label': labels})


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=60, max_size=120), st.integers(0, 5))
def test_every_row_is_in_one_split_and_no_text_in_two(numbers, seed):
    if len(set(numbers)) < 12:
        numbers = list(range(60))
    texts = [f'Text  {n}' if i % 2 else f'text {n} ' for i, n in enumerate(numbers)]
    splits = split_off(pool_of(texts, [str(n % 3) for n in numbers]), FRACTIONS, seed)
    assert sorted(t for split in splits.values() for t in split['text_a']) == sorted(texts)
    train, validation, test = (texts_of(splits[name]) for name in ('train', *FRACTIONS))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_pairs_that_share_either_text_stay_together():
    rng = np.random.default_rng(0)
    first = [f'premise {i}' for i in rng.integers(0, 400, 800)]
    second = [f'hypothesis {i}' for i in rng.integers(0, 2000, 800)]
    pool = datasets.Dataset.from_dict({'text_a': first, 'text_b': second, 'label': [0.5] * 800})
    splits = split_off(pool, FRACTIONS, seed=1)
    assert {'train', 'validation', 'test'} == set(splits)
    assert not texts_of(splits['train']) & (
        texts_of(splits['validation']) | texts_of(splits['test'])
    )


def test_one_text_in_all_pairs_falls_back_to_equal_pairs(caplog):
    groups = same_text_groups(['Why?'] * 5, ['a', 'b', 'a', 'c', 'd'])
    assert len(set(groups)) == 4
    assert groups[0] == groups[2]
    assert 'ties more than 20 %' in caplog.text


def test_classes_keep_their_shares_and_the_split_its_size():
    labels = ['a'] * 700 + ['b'] * 200 + ['c'] * 100
    splits = split_off(pool_of([f't{i}' for i in range(1000)], labels), FRACTIONS, seed=3)
    for name in FRACTIONS:
        counts = collections.Counter(splits[name]['label'])
        assert len(splits[name]) == 200
        assert abs(counts['a'] - 140) <= 2
        assert abs(counts['b'] - 40) <= 2
        assert abs(counts['c'] - 20) <= 2


def test_rare_classes_always_stay_learnable():
    labels = ['common'] * 40 + [f'rare{i}' for i in range(10)] + ['twin', 'twin']
    for seed in range(5):
        splits = split_off(pool_of([f't{i}' for i in range(52)], labels), FRACTIONS, seed)
        assert set(splits['train']['label']) == set(labels)


def test_a_class_that_only_repeated_texts_have_stays_learnable():
    texts = [f't{i}' for i in range(40)]
    labels = [('x', 'y')[i % 2] for i in range(40)]
    for place in range(0, 40, 4):
        pool = pool_of([*texts, texts[place], texts[place]], [*labels, 'z', 'v'])
        splits = split_off(pool, FRACTIONS, seed=place)
        assert set(splits['train']['label']) == {'x', 'y', 'z', 'v'}


def test_rare_tags_always_stay_learnable():
    tags = [['O', 'O']] * 40 + [['O', f'B-{i}'] for i in range(10)]
    for seed in range(5):
        pool = datasets.Dataset.from_dict({'tokens': [['a', 'b']] * 50, 'tags': tags})
        splits = split_off(pool, FRACTIONS, seed, np.arange(50))
        assert {tag for own in splits['train']['tags'] for tag in own} == {
            'O',
            *(f'B-{i}' for i in range(10)),
        }


def test_more_classes_than_held_out_places_are_drawn_without_strata():
    labels = [str(i % 30) for i in range(90)]
    splits = split_off(pool_of([f't{i}' for i in range(90)], labels), {'test': 0.1}, seed=0)
    assert len(splits['test']) == 9
    assert set(splits['train']['label']) == set(labels)


def test_the_cut_depends_on_the_seed_alone_and_keeps_the_order():
    pool = pool_of([f't{i:03}' for i in range(100)], [str(i % 2) for i in range(100)])
    once, again, other = (split_off(pool, FRACTIONS, seed)['test'][:] for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert once['text_a'] == sorted(once['text_a'])


@pytest.mark.parametrize(
    ('size', 'fractions', 'message'),
    [
        (3, {'validation': 0.1}, 'too few to cut 10% off as validation'),
        (1, {'test': 0.5}, 'too few'),
        (100, {'validation': 0.5, 'test': 0.5}, 'sum below 1'),
        (100, {'validation': -0.5}, 'sum below 1'),
    ],
)
def test_impossible_cuts_are_refused(size, fractions, message):
    with pytest.raises(ValueError, match=message):
        split_off(pool_of([f't{i}' for i in range(size)], ['a'] * size), fractions, 0)


def test_a_class_of_its_own_for_each_text_is_told():
    # As where numbers are read as classes.
    pool = pool_of([f't{i}' for i in range(30)], [str(i) for i in range(30)])
    with pytest.raises(ValueError, match=r'30 rows .* of 30 classes, which keep one each'):
        split_off(pool, FRACTIONS, 0)


@pytest.mark.parametrize(('column', 'listed'), [('text_a', False), ('tokens', True)])
@pytest.mark.parametrize(
    ('shared', 'level'), [(0, None), (1, logging.INFO), (2, logging.WARNING), (20, logging.WARNING)]
)
def test_examples_that_are_in_two_given_splits_are_told(caplog, column, listed, shared, level):
    def split(numbers):
        texts = [f'text {i}' for i in numbers]
        return datasets.Dataset.from_dict({column: [t.split() for t in texts] if listed else texts})

    caplog.set_level(logging.INFO)
    tell_shared({'train': split(range(50)), 'test': split(range(50 - shared, 70 - shared))})
    assert [record.levelno for record in caplog.records] == ([level] if level else [])
    if level:
        assert f'{shared} of 20 examples of test ({5 * shared:.1f} %) are training' in caplog.text


def test_a_text_under_another_question_is_another_example(caplog):
    caplog.set_level(logging.INFO)
    pairs = [{'text_a': ['a', 'b'], 'text_b': ['c', 'd']}, {'text_a': ['a'], 'text_b': ['d']}]
    tell_shared(dict(zip(('train', 'test'), map(datasets.Dataset.from_dict, pairs), strict=True)))
    tell_shared({'test': datasets.Dataset.from_dict(pairs[0])})
    assert not caplog.records
