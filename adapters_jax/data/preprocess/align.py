"""From the tags of words to the tags of word pieces, which is what a batch has a column for."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int32

from adapters_jax.data.preprocess.document import Document, Span


def piece_tags(
    offsets: Sequence[Span],
    sequences: Sequence[int | None],
    documents: Sequence[Document],
    ids: Mapping[str, int],
) -> Int32[np.ndarray, ' T']:
    """Return the id of the tag of each of T pieces: that of the first word it has a letter of.

    offsets: the letters of its text that a piece stands for, from and to. sequences: which of the
    `documents` that is, or None for special tokens, which have tag 0, as has a piece of no word.
    ids: those of the tags; others are 0.
    """
    found = np.zeros(len(offsets), np.int32)
    which = np.array([-1 if number is None else number for number in sequences])
    letters = np.array(offsets, np.int64).reshape(-1, 2)
    for number, document in enumerate(documents):
        if not document.tags:
            continue
        begins, ends = np.array(document.spans, np.int64).T
        own = np.flatnonzero(which == number)
        begin, end = letters[own].T
        word = np.searchsorted(ends, begin, side='right')
        near = np.minimum(word, len(ends) - 1)
        inside = (word < len(ends)) & (begins[near] < end)
        tags = np.array([ids.get(tag, 0) for tag in document.tags], np.int32)
        found[own] = np.where(inside, tags[near], 0)
    return found
