"""From scores of tokens to the best answers of a question, over all windows of its context.

A span's score is the sum of the logits of its first and its last token (Devlin et al. 2019, section
4.2); logits of different windows are compared as they are. That there is no answer scores what
[CLS] does, as both ends, in the window that believes in it least (section 4.3).
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from adapters_jax.data.encoded import Encoded


class Span(NamedTuple):
    """Characters of a context, from `start` to before `end`, with the logits of both ends."""

    start: int
    end: int
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        """The sum of the logits."""
        return self.start_logit + self.end_logit


class Reading(NamedTuple):
    """What is read in a context: spans of different characters, the best one first.

    `none` has the logits of there being no answer; its characters are none.
    """

    none: Span
    spans: list[Span]

    @property
    def odds(self) -> float:
        """By how much there being no answer scores better than the best span."""
        return self.none.score - (self.spans[0].score if self.spans else 0.0)


def read(
    outputs: Float[np.ndarray, 'L 2'],
    encoded: Encoded,
    contexts: Sequence[str],
    count: int,
    longest: int,
) -> Iterator[Reading]:
    """Yield for each context the `count` best spans of at most `longest` tokens.

    `outputs` are the logits of the start and the end of an answer for all L tokens of `encoded`,
    whose rows are the contexts.
    """
    ends = np.searchsorted(encoded.rows, np.arange(len(contexts) + 1))
    for context, own in zip(contexts, itertools.pairwise(ends), strict=True):
        windows = [_window(outputs, encoded, example) for example in range(*own)]
        none = min((Span(0, 0, *map(float, logits[0])) for logits, *_ in windows), key=_score)
        found = [span for window in windows for span in _spans(*window, count, longest)]
        yield Reading(none, _distinct(found, context)[:count])


def _score(span: Span) -> float:
    return span.score


def _window(
    outputs: Float[np.ndarray, 'L 2'], encoded: Encoded, example: int
) -> tuple[Float[np.ndarray, 'T 2'], Int[np.ndarray, 'W 2'], int, int]:
    """Return a window's logits, the characters of its context's W pieces, and where these are."""
    own = slice(*encoded.offsets[example : example + 2])
    first, last = (int(encoded.examples[name][example]) for name in ('first', 'last'))
    characters = encoded.aside['characters'][own][first : last + 1]
    return outputs[own].astype(np.float64), characters, first, last + 1


def _spans(
    logits: Float[np.ndarray, 'T 2'],
    characters: Int[np.ndarray, 'W 2'],
    first: int,
    end: int,
    count: int,
    longest: int,
) -> list[Span]:
    starts, ends = logits[first:end].T
    return [
        Span(int(characters[i, 0]), int(characters[j, 1]), float(starts[i]), float(ends[j]))
        for i, j in best_pairs(starts, ends, count, longest)
    ]


def best_pairs(
    starts: Float[np.ndarray, ' W'], ends: Float[np.ndarray, ' W'], count: int, longest: int
) -> list[tuple[int, int]]:
    """Return the `count` pairs i <= j < i + longest with the largest starts[i] + ends[j].

    All of them are compared, W times `longest` sums, rather than those of the best starts with the
    best ends, among which there may be no pair in order.
    """
    if not len(starts):
        return []
    longest = min(longest, len(starts))
    padded = np.pad(ends, (0, longest - 1), constant_values=-np.inf)
    sums = starts[:, None] + np.lib.stride_tricks.sliding_window_view(padded, longest)
    flat = sums.ravel()
    chosen = np.argpartition(-flat, min(count, len(flat)) - 1)[:count]
    chosen = chosen[np.isfinite(flat[chosen])]
    return [(int(i), int(i + d)) for i, d in zip(*np.divmod(chosen, longest), strict=True)]


def _distinct(spans: Sequence[Span], context: str) -> list[Span]:
    """Return spans without white space at their ends, the best of equal ones, in order."""
    found: dict[tuple[int, int], Span] = {}
    for span in sorted(spans, key=lambda span: (-span.score, span.start, span.end)):
        text = context[span.start : span.end]
        start = span.start + len(text) - len(text.lstrip())
        end = start + len(text.strip())
        if start < end:
            found.setdefault((start, end), span._replace(start=start, end=end))
    return list(found.values())


def described(listed: Sequence[Span], context: str) -> list[dict[str, Any]]:
    """Return spans as JSON-able objects, with their texts and the softmax of their scores.

    Where there is no answer the text is empty and has no place.
    """
    scores = np.array([span.score for span in listed])
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    return [
        {
            'text': context[span.start : span.end],
            'start': span.start if span.end else None,
            'end': span.end or None,
            'score': share,
            'start_logit': span.start_logit,
            'end_logit': span.end_logit,
        }
        for span, share in zip(listed, shares.tolist(), strict=True)
    ]
