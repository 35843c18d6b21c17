"""Exact match, F1 and thresholds against a second implementation, and the one in `transformers`."""

import random
import re
import string

import numpy as np
import pytest
from transformers.data.metrics import squad_metrics as theirs

from adapters_jax.tasks import squad_metrics as ours

# ---- From the description in the papers: no code of ours, no code of the script's. ----


def words_of(text):
    """Lower-case, without punctuation, then without articles, cut at white space."""
    kept = [letter for letter in text.lower() if letter not in string.punctuation]
    spaced = re.split(r'(\w+)', ''.join(kept))
    return ''.join(' ' if token in ('a', 'an', 'the') else token for token in spaced).split()


def overlap(predicted, gold):
    left, common = list(gold), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            common += 1
    if not predicted or not gold:
        return float(predicted == gold)
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def best_of(predicted, golds):
    """Return exact match and F1 with the best answer; with none left, the empty text is right."""
    against = [words for words in map(words_of, golds) if words] or [[]]
    own = words_of(predicted)
    return float(any(own == gold for gold in against)), max(overlap(own, gold) for gold in against)


def mean_at(threshold, scores, odds, golds):
    """Return the mean score where nothing is said beyond a threshold."""
    said = [
        score if own <= threshold else float(not gold)
        for score, own, gold in zip(scores, odds, golds, strict=True)
    ]
    return sum(said) / len(said)


PAIRS = [
    ('', []),
    ('', ['']),
    ('the', ['a']),
    ('the', []),
    ('cat', ['the']),
    ('The  Cat!', ['cat', 'dog']),
    ('U.S.', ['us']),
    ('theatre', ['the atre', 'atre']),
    ('an-answer', ['answer']),
    ('a-b', ['ab', 'b']),
    ("rock'n'roll", ['rock n roll']),
    ('the the the', ['the']),
    ('b b b a', ['b b', 'a b b']),
    ('6½', ['6½ sacks', '6']),
    ('ÉCOLE', ['école']),
    ('İstanbul', ['istanbul']),
    ('ẞ', ['ß']),
    ('«der Hund»', ['der Hund']),
    ('“a quote”', ['quote']),
    ('a\u2028line', ['line']),
    ('a\u00a0line', ['line']),
    ('😀', ['😀 face']),
    ('北京 市', ['北京']),
    ('a_b', ['ab']),
    ('le chat', ['the chat']),
    ('$11', ['11', '$ 11']),
    ('...', ['!']),
    ('...', []),
]
PIECES = [
    *(
        'the',
        'a',
        'an',
        'The',
        'A',
        'cat',
        'Cat',
        'dog',
        'U.S.',
        "it's",
        '6½',
        'É',
        'é',
        '北京',
        '😀',
    ),
    *('-', '.', ',', '!', "'", '"', '_', ' ', '  ', '\t', '\u2028', '\u00a0', '«', '’', 'theatre'),
]


def random_pairs(count, seed=0):
    rng = random.Random(seed)

    def text():
        return ''.join(
            rng.choice([' ', '', ' ']) + rng.choice(PIECES) for _ in range(rng.randint(0, 6))
        )

    pairs = [(text(), [text() for _ in range(rng.choice([0, 1, 1, 3]))]) for _ in range(count)]
    # Answers that are nearly right are where mistakes would show.
    return pairs + [(gold[0] + rng.choice(['', '.', ' cat']), gold) for _, gold in pairs if gold]


ALL = PAIRS + random_pairs(200)


def test_each_pair_scores_as_in_the_description_and_in_transformers():
    assert len(ALL) > 300
    predicted, golds = zip(*ALL, strict=True)
    found = ours.raw(predicted, golds)
    for i, (text, own) in enumerate(ALL):
        exact, f1 = best_of(text, own)
        assert found['exact'][i] == exact, (text, own)
        assert found['f1'][i] == pytest.approx(f1, abs=1e-12), (text, own)
        for gold in own:
            assert ours.normalise(gold) == theirs.normalize_answer(gold)
            assert ours.exact(text, gold) == theirs.compute_exact(gold, text)
            assert ours.f1(text, gold) == pytest.approx(theirs.compute_f1(gold, text), abs=1e-12)


class Example:
    """A question as `squad_evaluate` takes it."""

    def __init__(self, id_, golds):
        self.qas_id, self.answers = id_, [{'text': gold} for gold in golds]


def case(seed):
    rng = np.random.default_rng(seed)
    pairs = random_pairs(100, seed) if seed else ALL
    if seed % 3 == 1:
        pairs = [pair for pair in pairs if pair[1]]
    if seed % 3 == 2:
        pairs = [pair for pair in pairs if not pair[1]] or pairs
    # Odds that tell a little, and some that are equal.
    answered = np.array([bool(golds) for _, golds in pairs])
    odds = rng.normal(0, 1, len(pairs)) - answered + (3 if seed == 4 else 0)
    odds[::9] = odds[0]
    return *zip(*pairs, strict=True), odds


@pytest.mark.parametrize('seed', range(8))
def test_whole_splits_score_as_in_transformers(seed):
    predicted, golds, odds = case(seed)
    ids = list(map(str, range(len(predicted))))
    for threshold in (-0.7, 0.0, float(odds[0])):
        expected = theirs.squad_evaluate(
            [Example(*pair) for pair in zip(ids, golds, strict=True)],
            dict(zip(ids, predicted, strict=True)),
            dict(zip(ids, odds.tolist(), strict=True)),
            threshold,
        )
        found = ours.evaluate(predicted, golds, odds, threshold)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-9), (name, threshold)


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('metric', ['exact', 'f1'])
def test_the_tuned_threshold_is_the_best_of_all(seed, metric):
    predicted, golds, odds = case(seed)
    odds = odds + np.random.default_rng(seed).random(len(odds)) * 1e-3  # no two are equal
    # An article alone is right where nothing is, and the script does not know it.
    predicted = [text if words_of(text) else 'cat' for text in predicted]
    scores = [best_of(*pair)[metric == 'f1'] for pair in zip(predicted, golds, strict=True)]
    means = [mean_at(value, scores, odds, golds) for value in [odds.min() - 1, *odds]]
    tuned = ours.tune(predicted, golds, odds, metric)
    assert mean_at(tuned, scores, odds, golds) == pytest.approx(max(means), abs=1e-12)
    assert ours.evaluate(predicted, golds, odds, tuned)[metric] == pytest.approx(100 * max(means))


def test_where_nothing_should_be_answered_nothing_is():
    odds = np.array([-3.0, -2.0])
    assert ours.tune(['a cat', 'dog'], [[], []], odds, 'f1') < -3
    found = ours.evaluate(['a cat', 'dog'], [[], []], odds, -4.0)
    assert (found['exact'], found['NoAns_exact'], found['best_f1_thresh']) == (100, 100, 0)
    assert 'HasAns_exact' not in found
