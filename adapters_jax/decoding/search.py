"""Looking for the texts that a model gives high scores: one word after another, or with beams.

A search knows of the model only a function `step(tokens, written, cache) -> (logits, cache)`: what
it says of the next word of each row, given all tokens [N, L] and how many of them are written
beyond the start. Everything has a fixed shape, so that a whole search is one compiled program.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from adapters_jax.decoding.rules import NEVER, Rules

Cache = Any
Step = Callable[[Int[Array, 'N L'], Int[Array, ''], Cache], tuple[Float[Array, 'N V'], Cache]]
# Gives each beam what is kept of the row that it goes on with: at first one row for each text.
Reorder = Callable[[Cache, Int[Array, 'N']], Cache]
_FAR = -1.0e9  # the score of what does not exist; finite, so that sums of it are numbers


@dataclasses.dataclass(frozen=True)
class Search:
    """How texts are looked for.

    With `beams` of 1, the likeliest word is taken each time, or one is drawn where `temperature`
    is above 0: of the `top_k` likeliest (0: all), and of those that have `top_p` of the
    probability. With more, as many texts are followed at once and the `n_best` are returned; their
    scores are log-probabilities over the length to the power of `length_penalty`. A search ends
    when nothing can get better: as it is guessed from the length so far (False), from the longest
    ('never'), or as soon as there are as many texts as beams (True).

    Raises:
        ValueError: numbers out of range, beams that are drawn, or words to draw from where none is.
    """

    beams: int = 1
    n_best: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal['never'] = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.beams < 1 or not 1 <= self.n_best <= self.beams:
            raise ValueError(
                f'beams={self.beams} and n_best={self.n_best}; expected 1 <= n_best <= beams'
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f'length_penalty={self.length_penalty}; expected a finite number')
        if not isinstance(self.early_stopping, bool) and self.early_stopping != 'never':
            raise ValueError(
                f"early_stopping={self.early_stopping!r}; expected True, False or 'never'"
            )
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f'temperature={self.temperature}, top_k={self.top_k} and top_p={self.top_p}; '
                'expected two numbers of at least 0, and one in (0, 1]'
            )
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise ValueError(
                f'top_k={self.top_k} and top_p={self.top_p} with a temperature of 0, which takes '
                'the likeliest word; expected temperature=1.0, or neither of them'
            )
        if self.temperature and self.beams > 1:
            raise ValueError(
                f'temperature={self.temperature} with beams={self.beams}; expected a temperature '
                'of 0 with beams, or one beam'
            )


class Found(NamedTuple):
    """The texts of each row, the best first; what follows on the end is padding.

    `tokens` are without the start.
    """

    tokens: Int[Array, 'B N L']
    scores: Float[Array, 'B N']


def search(
    step: Step,
    cache: Cache,
    rows: int,
    rules: Rules,
    how: Search,
    reorder: Reorder,
    key: PRNGKeyArray | None = None,
) -> Found:
    """Return the texts that are found for each row.

    Raises:
        ValueError: words are to be drawn and there is no key.
    """
    if how.temperature and key is None:
        raise ValueError(f'temperature={how.temperature}, but no key to draw words with')
    if how.beams == 1:
        return _words(step, cache, rows, rules, how, key)
    return _Beams(step, rows, rules, how, reorder)(cache)


def _started(rules: Rules, *rows: int) -> Int[Array, '... L']:
    tokens = jnp.full((*rows, rules.length), rules.pad_id, jnp.int32)
    return tokens.at[..., : len(rules.start)].set(jnp.array(rules.start, jnp.int32))


def _written(tokens: Int[Array, '... L'], word: Int[Array, '...'], place: Any) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(tokens, word[..., None], place, axis=-1)


# ---- one text a row


class _Text(NamedTuple):
    written: Int[Array, '']
    tokens: Int[Array, 'B L']
    scores: Float[Array, 'B']
    ended: Bool[Array, 'B']
    cache: Cache


def _words(
    step: Step, cache: Cache, rows: int, rules: Rules, how: Search, key: PRNGKeyArray | None
) -> Found:
    def advance(state: _Text) -> _Text:
        logits, cache = step(state.tokens, state.written, state.cache)
        logits = logits.astype(jnp.float32)
        allowed = rules(logits, state.tokens, state.written)
        if how.temperature:
            own = jax.random.fold_in(key, state.written)
            word = jax.random.categorical(own, _narrowed(allowed, how))
        else:
            word = allowed.argmax(-1)
        of_word = jnp.take_along_axis(jax.nn.log_softmax(allowed), word[:, None], axis=-1)[:, 0]
        word = jnp.where(state.ended, rules.pad_id, word).astype(jnp.int32)
        return _Text(
            state.written + 1,
            _written(state.tokens, word, len(rules.start) + state.written),
            state.scores + jnp.where(state.ended, 0, of_word),
            state.ended | (word == rules.end_id),
            cache,
        )

    def goes_on(state: _Text) -> Bool[Array, '']:
        return (state.written < rules.max_length) & ~state.ended.all()

    nothing = jnp.zeros(rows), jnp.zeros(rows, bool)
    state = advance(_Text(jnp.int32(0), _started(rules, rows), *nothing, cache))
    if rules.max_length > 1:  # else there is no second step, of which nothing could be kept
        state = jax.lax.while_loop(goes_on, advance, state)
    return Found(state.tokens[:, None, len(rules.start) :], state.scores[:, None])


def _narrowed(scores: Float[Array, 'N V'], how: Search) -> Float[Array, 'N V']:
    """Return the scores of what may be drawn (Fan et al. 2018; Holtzman et al. 2020, eq. 3)."""
    scores = scores / how.temperature
    if how.top_k:
        least = jax.lax.top_k(scores, min(how.top_k, scores.shape[-1]))[0][:, -1:]
        scores = jnp.where(scores < least, NEVER, scores)
    if how.top_p < 1:
        order = jnp.argsort(-scores, axis=-1)
        sorted_ = jnp.take_along_axis(scores, order, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(sorted_), axis=-1) - jax.nn.softmax(sorted_)
        sorted_ = jnp.where(before < how.top_p, sorted_, NEVER)
        scores = jnp.take_along_axis(sorted_, jnp.argsort(order, axis=-1), axis=-1)
    return scores


# ---- beams


class _State(NamedTuple):
    written: Int[Array, '']
    tokens: Int[Array, 'B K L']  # of the texts that are followed
    scores: Float[Array, 'B K']  # their log-probabilities
    ended: Int[Array, 'B K L']  # the best texts that have ended
    ended_scores: Float[Array, 'B K']
    has_ended: Bool[Array, 'B K']
    open: Bool[Array, 'B']  # whether anything can still get better
    stuck: Bool[Array, '']  # whether everything that could be followed has ended
    cache: Cache


@dataclasses.dataclass(frozen=True)
class _Beams:
    """Follows several texts of each row, and keeps the best of those that have ended."""

    step: Step
    rows: int
    rules: Rules
    how: Search
    reorder: Reorder

    def __call__(self, cache: Cache) -> Found:
        state = self._start()
        # All beams begin with the same: the first word is looked for with one row for each text.
        logits, cache = self.step(state.tokens[:, 0], state.written, cache)
        state = self._advanced(state, logits[:, None], cache)
        if self.rules.max_length > 1:  # as in `_words`
            state = jax.lax.while_loop(self._goes_on, self._followed, state)
        best = slice(0, self.how.n_best)
        texts = state.ended[:, best, len(self.rules.start) :]
        return Found(texts, state.ended_scores[:, best])

    def _start(self) -> _State:
        tokens = _started(self.rules, self.rows, self.how.beams)
        none = jnp.zeros(tokens.shape[:2], bool)
        far = jnp.full(none.shape, _FAR)
        return _State(
            written=jnp.int32(0),
            tokens=tokens,
            scores=far.at[:, 0].set(0),
            ended=tokens,
            ended_scores=far,
            has_ended=none,
            open=~none[:, 0],
            stuck=jnp.bool_(False),
            cache={},
        )

    def _goes_on(self, state: _State) -> Bool[Array, '']:
        done = state.has_ended.all() & (self.how.early_stopping is True)
        return state.open.any() & ~done & ~state.stuck

    def _followed(self, state: _State) -> _State:
        flat = state.tokens.reshape(self.rows * self.how.beams, -1)
        logits, cache = self.step(flat, state.written, state.cache)
        return self._advanced(state, logits.reshape(self.rows, self.how.beams, -1), cache)

    def _advanced(self, state: _State, logits: Float[Array, 'B K V'], cache: Cache) -> _State:
        """Follow the best continuations, of which twice as many as beams are looked at: as many
        as beams may end."""
        beams, followed = self.how.beams, logits.shape[1]
        scores, of, word = self._candidates(state, logits)
        place = len(self.rules.start) + state.written
        tokens = _written(_chosen(state.tokens, of), word, place)
        written = state.written + 1
        ends = (word == self.rules.end_id) | (written >= self.rules.max_length)
        own_scores, best = jax.lax.top_k(scores + jnp.where(ends, _FAR, 0), beams)
        source = _chosen(of, best) + jnp.arange(self.rows)[:, None] * followed
        state = state._replace(
            written=written,
            tokens=_chosen(tokens, best),
            scores=own_scores,
            stuck=ends.all(),
            cache=self.reorder(cache, source.reshape(-1)),
            **self._ended(state, tokens, scores, ends),
        )
        return state._replace(open=state.open & self._can_improve(state))

    def _candidates(
        self, state: _State, logits: Float[Array, 'B K V']
    ) -> tuple[Float[Array, 'B N'], Int[Array, 'B N'], Int[Array, 'B N']]:
        """Return the best continuations: their scores, the beams that they go on with, and the
        words that they add."""
        rows, followed, vocabulary = logits.shape
        scores = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(-1, vocabulary)
        flat = state.tokens[:, :followed].reshape(-1, self.rules.length)
        scores = self.rules(scores, flat, state.written).reshape(logits.shape)
        scores = (scores + state.scores[:, :followed, None]).reshape(rows, -1)
        scores, chosen = best(scores, 2 * self.how.beams)
        return scores, chosen // vocabulary, (chosen % vocabulary).astype(jnp.int32)

    def _ended(
        self,
        state: _State,
        tokens: Int[Array, 'B N L'],
        scores: Float[Array, 'B N'],
        ends: Bool[Array, 'B N'],
    ) -> dict[str, Array]:
        """Return the best texts that have ended; only among the first beams does one end."""
        beams, written = self.how.beams, state.written + 1
        now = ends & (jnp.arange(2 * beams) < beams)[None]
        full = state.has_ended.all(1) & (self.how.early_stopping is True)
        counts = now & ~full[:, None] & state.open[:, None]
        own = scores / written.astype(jnp.float32) ** self.how.length_penalty
        own = jnp.where(counts, own, own + _FAR)
        scores, best = jax.lax.top_k(jnp.concatenate([state.ended_scores, own], axis=1), beams)
        texts = jnp.concatenate([state.ended, tokens], axis=1)
        has = jnp.concatenate([state.has_ended, now], axis=1)
        return {
            'ended': _chosen(texts, best),
            'ended_scores': scores,
            'has_ended': _chosen(has, best),
        }

    def _can_improve(self, state: _State) -> Bool[Array, 'B']:
        longest = self.how.early_stopping == 'never' and self.how.length_penalty > 0
        length = self.rules.max_length if longest else state.written
        hoped = state.scores[:, :1] / jnp.float32(length) ** self.how.length_penalty
        worst = jnp.where(state.has_ended, state.ended_scores.min(1, keepdims=True), _FAR)
        return (hoped > worst).any(1)


def best(
    scores: Float[Array, 'B N'], count: int, group: int = 32
) -> tuple[Float[Array, 'B C'], Int[Array, 'B C']]:
    """Return the highest scores of each row and where they are: what `jax.lax.top_k` returns.

    They lie in as many groups of neighbours, those with the highest maxima. A maximum is much
    cheaper than an order, and groups of 32 are what XLA's CPU compiler reduces without a detour.
    """
    rows, width = scores.shape
    groups = -(-width // group)
    if groups <= count:
        return jax.lax.top_k(scores, count)
    padding = ((0, 0), (0, groups * group - width))
    grouped = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(rows, groups, group)
    # In the order of the row, since of equal scores the first ones count.
    where = jnp.sort(jax.lax.top_k(grouped.max(-1), count)[1], axis=-1)
    found, chosen = jax.lax.top_k(_chosen(grouped, where).reshape(rows, -1), count)
    return found, _chosen(where, chosen // group) * group + chosen % group


def _chosen(values: Array, which: Int[Array, 'B N']) -> Array:
    """Return `values[b, which[b, n]]`."""
    index = which.reshape(which.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)
