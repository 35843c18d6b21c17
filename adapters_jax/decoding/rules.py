"""Which words may come next, whatever a model says: lengths, forced and forbidden words.

Each rule turns scores [N, V] into scores, given the tokens so far. Checkpoints carry such rules in
their generation_config.json, without which they do not write what their authors report.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER = float('-inf')


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a text looks like, in ids of the vocabulary.

    `start` is what every text is made to begin with, which no length counts. A text ends with
    `end_id`, after `max_length` words at the latest (that one included), and not before
    `min_length` words without it. `first` and `last` are words that are forced at the beginning and
    at `max_length`; -1: none. `never` are words that no text has, `not_first` those that it does
    not begin with: behind a forced one, if `start` is a single word, as `transformers` has it. No
    `repeated` words on end come twice; 0: they may. With `renormalised`, what is forbidden has no
    share of the probability, which counts where the texts of beams are compared.

    Raises:
        ValueError: no start, or lengths that are none.
    """

    start: tuple[int, ...]
    end_id: int
    pad_id: int
    max_length: int
    min_length: int = 0
    first: int = -1
    last: int = -1
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()
    repeated: int = 0
    renormalised: bool = False

    def __post_init__(self) -> None:
        if not self.start:
            raise ValueError('start has no word; expected at least the one that a decoder begins')
        if not 0 <= self.min_length <= self.max_length or self.max_length < 1:
            raise ValueError(
                f'min_length={self.min_length} and max_length={self.max_length}; expected '
                '0 <= min_length <= max_length and at least one word'
            )
        if self.repeated < 0 or self.repeated == 1:
            raise ValueError(f'repeated={self.repeated}; expected 0, or 2 or more words on end')

    @property
    def length(self) -> int:
        """The number of tokens with the start."""
        return len(self.start) + self.max_length

    @property
    def read(self) -> int:
        """The number of tokens that a decoder reads: nothing follows on the last one."""
        return self.length - 1

    def __call__(
        self, scores: Float[Array, 'N V'], tokens: Int[Array, 'N L'], written: Int[Array, '']
    ) -> Float[Array, 'N V']:
        """Return the scores of the next word, after that many written ones."""
        words = jnp.arange(scores.shape[-1])

        def without(scores: Array, forbidden: tuple[int, ...], now: Array | bool) -> Array:
            banned = (words[:, None] == jnp.array(forbidden, jnp.int32)[None]).any(1)
            return jnp.where((banned & now)[None], NEVER, scores)

        def only(scores: Array, word: int, now: Array) -> Array:
            forced = jnp.where(words == word, 0.0, NEVER)[None]
            return jnp.where(now, forced, scores)

        if self.repeated:
            scores = self._unrepeated(scores, tokens, written)
        if self.min_length:
            scores = without(scores, (self.end_id,), written < self.min_length)
        if self.never:
            scores = without(scores, self.never, True)
        if self.not_first:
            begin = int(self.first >= 0 and len(self.start) == 1)
            scores = without(scores, self.not_first, written == begin)
        if self.first >= 0:
            scores = only(scores, self.first, written == 0)
        if self.last >= 0:
            scores = only(scores, self.last, written == self.max_length - 1)
        return jax.nn.log_softmax(scores) if self.renormalised else scores

    def _unrepeated(
        self, scores: Float[Array, 'N V'], tokens: Int[Array, 'N L'], written: Int[Array, '']
    ) -> Float[Array, 'N V']:
        """Forbid each word that followed before on what the last ones are (Paulus 2018)."""
        count, length = self.repeated - 1, tokens.shape[1]
        end = len(self.start) + written
        last = jnp.take(tokens, end - count + jnp.arange(count), axis=1, mode='clip')
        places = jnp.arange(length - count)
        windows = jnp.stack([tokens[:, i : i + len(places)] for i in range(count)], axis=-1)
        same = (windows == last[:, None]).all(-1) & (places + count < end)[None] & (end >= count)
        following = tokens[:, count:]
        rows = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], following.shape)
        banned = jnp.zeros(scores.shape, bool).at[rows, following].max(same)
        return jnp.where(banned, NEVER, scores)


def from_hf(config: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Yield the settings that a generation_config.json has, under our names."""
    for theirs, ours in _NAMES.items():
        value = config.get(theirs)
        if isinstance(value, list):
            # Of several ends that are forced all are as likely, and the first one is taken.
            value = min(value, default=None) if ours == 'last' else tuple(value)
        if value is not None:
            yield ours, value
    # Marian's way to say that padding is no word. The end of a text never counts as one.
    end = config.get('eos_token_id')
    ends = end if isinstance(end, list) else [end]
    words = {own[0] for own in config.get('bad_words_ids') or () if len(own) == 1}.difference(ends)
    if words:
        yield 'never', tuple(sorted(words.union(config.get('suppress_tokens') or ())))


def unused(config: dict[str, object]) -> list[str]:
    """Return the settings of a generation_config.json that would change texts and are not used."""
    found = [
        name for name, plain in _UNUSED.items() if config.get(name) not in (None, plain, [], {})
    ]
    longer = any(len(own) > 1 for own in config.get('bad_words_ids') or ())
    return found + ['bad_words_ids of several tokens'] * longer


# With what does nothing.
_UNUSED = {
    'repetition_penalty': 1.0,
    'encoder_repetition_penalty': 1.0,
    'encoder_no_repeat_ngram_size': 0,
    'sequence_bias': None,
    'exponential_decay_length_penalty': None,
}

_NAMES = {
    'forced_bos_token_id': 'first',
    'forced_eos_token_id': 'last',
    'suppress_tokens': 'never',
    'begin_suppress_tokens': 'not_first',
    'no_repeat_ngram_size': 'repeated',
    'renormalize_logits': 'renormalised',
}
