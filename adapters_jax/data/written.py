"""Texts and what is to be written for them, as tokens.

A decoder reads what it has written so far: it begins with a start of its own, and is to say the
text's first token there, its second behind the first, and the end at last (teacher forcing).
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from adapters_jax.data import tokenize
from adapters_jax.data.encoded import Encoded, offsets_of
from adapters_jax.data.tokenize import Tokenizer

_LOG = logging.getLogger(__name__)


def encode(
    examples: Encoded,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    max_length: int,
    start: tuple[int, ...],
) -> Encoded:
    """Return the examples with what is to be written for each: at most `max_length` tokens.

    A longer text loses its end, but not the token that ends it. Of a start of several tokens all
    but the last one are followed by what nobody has to say, the label -1.
    """
    pieces, cut = encode_texts(texts, tokenizer, max_length)
    if cut:
        _LOG.warning(
            '%d of %d texts to be written (%.1f %%) are longer than task.target_length = %d and '
            'were cut.',
            *(cut, len(texts), 100 * cut / len(texts), max_length),
        )
    before = np.array(start, np.int32)
    nothing = np.full(len(start) - 1, -1, np.int32)
    read = [np.concatenate([before, own[:-1]]) for own in pieces]
    labels = [np.concatenate([nothing, own]) for own in pieces]
    return dataclasses.replace(
        examples,
        target={'target_ids': np.concatenate(read), 'label': np.concatenate(labels)},
        target_offsets=offsets_of(np.array([len(own) for own in labels], np.int64)),
    )


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> tuple[list[np.ndarray], int]:
    """Return the tokens of texts to be written, as the tokenizer makes them of a target.

    The second value is how many of the texts were cut.
    """
    pieces: list[np.ndarray] = []
    cut = 0
    for begin in range(0, len(texts), tokenize.BATCH):
        batch = tokenizer(
            text_target=list(texts[begin : begin + tokenize.BATCH]),
            max_length=max_length,
            truncation=True,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )
        pieces += [_until_end(np.array(ids, np.int32), tokenizer) for ids in batch['input_ids']]
        cut += sum(bool(encoding.overflowing) for encoding in batch.encodings)
    return pieces, cut


def _until_end(pieces: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens without those behind the end: the language, of the first mBART."""
    ends = np.flatnonzero(pieces == tokenizer.eos_token_id)
    return pieces[: ends[-1] + 1] if len(ends) else pieces


def reader(tokenizer: Tokenizer) -> Callable[[np.ndarray], str]:
    """Return what turns the tokens of a text into the text, without special ones."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip()
