"""Exact match and F1 of answers, as the official script of SQuAD 2.0 computes them.

Answers are compared as lower-case words without punctuation and articles (Rajpurkar et al. 2016,
section 6.1), with the best of a question's answers. Of a question without answer the empty text is
the only right one; it is given where the odds of there being none exceed a threshold, and the best
threshold of a split is found as the script finds it (Rajpurkar et al. 2018). On questions that all
have an answer this is what the script of SQuAD 1.1 computes.
"""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)

Golds = Sequence[Sequence[str]]  # the answers of each question; none where it has no answer


def normalise(text: str) -> str:
    """Return the words that count: lower case, no ASCII punctuation, no articles, single spaces."""
    return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_PUNCTUATION)).split())


def exact(predicted: str, gold: str) -> float:
    """Return 1 where the words are the same, else 0."""
    return float(normalise(predicted) == normalise(gold))


def f1(predicted: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall over words; without words, exact match."""
    ours, theirs = normalise(predicted).split(), normalise(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def raw(predicted: Sequence[str], golds: Golds) -> dict[str, Float[np.ndarray, ' N']]:
    """Return 'exact' and 'f1' of each question, with the best of its answers.

    Answers without a word (an article, a full stop) do not count, and where none is left the empty
    text is the right one.
    """
    worded = [[gold for gold in own if normalise(gold)] or [''] for own in golds]
    pairs = list(zip(predicted, worded, strict=True))
    return {
        metric.__name__: np.array([max(metric(text, gold) for gold in own) for text, own in pairs])
        for metric in (exact, f1)
    }


def evaluate(
    predicted: Sequence[str], golds: Golds, odds: Float[np.ndarray, ' N'], threshold: float
) -> dict[str, float]:
    """Return all that the script reports, in per cent as it does.

    Args:
        predicted: the best answer to each of N questions that is one, N > 0.
        golds: their answers.
        odds: by how much there being no answer scores better than the predicted one.
        threshold: of the odds, beyond which the empty text is the answer.
    """
    scores, answered = raw(predicted, golds), np.array([bool(own) for own in golds])
    # Beyond the threshold nothing is said, which is right where there is nothing to say.
    silent = {name: np.where(odds > threshold, ~answered, own) for name, own in scores.items()}
    found = {name: 100 * own.mean() for name, own in silent.items()} | {'total': len(golds)}
    for prefix, those in (('HasAns', answered), ('NoAns', ~answered)):
        if those.any():
            found |= {f'{prefix}_{name}': 100 * own[those].mean() for name, own in silent.items()}
            found[f'{prefix}_total'] = int(those.sum())
    for name, own in scores.items():
        best, where = best_threshold(predicted, own, odds, answered)
        found |= {f'best_{name}': 100 * best, f'best_{name}_thresh': where}
    return {name: value if type(value) is int else float(value) for name, value in found.items()}


def best_threshold(
    predicted: Sequence[str],
    scores: Float[np.ndarray, ' N'],
    odds: Float[np.ndarray, ' N'],
    answered: Bool[np.ndarray, ' N'],
) -> tuple[float, float]:
    """Return the best mean score that a threshold of the odds gives, and that threshold.

    Questions are answered in the order of their odds, from a state in which none is. Where nothing
    beats that state the threshold is 0, as the script has it.
    """
    order = np.argsort(odds, kind='stable')
    wrong = np.array([-float(bool(text)) for text in predicted])
    gains = np.where(answered, scores, wrong)[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + (~answered).sum()
    place = int(totals.argmax())
    return totals[place] / len(odds), float(odds[order[place - 1]]) if place else 0.0


def tune(
    predicted: Sequence[str], golds: Golds, odds: Float[np.ndarray, ' N'], metric: str
) -> float:
    """Return the threshold with the best mean of `metric`, 'exact' or 'f1'.

    It is that of `best_threshold`, but where nothing should be answered it is below all odds.
    """
    answered = np.array([bool(own) for own in golds])
    scores = raw(predicted, golds)[metric]
    best, threshold = best_threshold(predicted, scores, odds, answered)
    silent = best == (~answered).mean()
    return float(odds.min()) - 1 if silent else threshold
