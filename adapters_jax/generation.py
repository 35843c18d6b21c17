"""Writing texts with a model that has a decoder: binds a search and the model's own steps.

The keys and values of what is written are kept, so that each step computes one token a text. Those
of the input are computed once, and all beams of a row look at the same ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from adapters_jax.adapters.bank import Bank
from adapters_jax.decoding.rules import Rules
from adapters_jax.decoding.search import Cache, Found, Search, search
from adapters_jax.model import Batch, Model, attention_mask, inputs_of
from adapters_jax.models.backbone import Backbone, Inputs, longest
from adapters_jax.params import Tree
from adapters_jax.sites import Sites


def generate(
    model: Model,
    params: Tree,
    batch: Batch,
    rules: Rules,
    how: Search,
    key: PRNGKeyArray | None = None,
    cached: bool = True,
) -> Found:
    """Return what the model writes for each row of the batch; a pure function of arrays.

    The batch is as `Model.apply` takes it, with one text a row. `rules` say what a text begins and
    ends with, how long it may be and what may not be written; `how` is the search: greedy, with
    beams, or drawn, for which it needs a `key`. Without the cache all tokens are computed anew for
    each word; it is not used either for an adapter that looks along the whole text.

    Raises:
        ValueError: the backbone has no decoder, the text may grow longer than its positions, a
            row holds several texts, or the adapter copies the batch.
    """
    _check(model, batch, rules)
    writer = _Cached if cached and model.method.stepwise else _Uncached
    own = writer(model, params, batch, rules, how.beams)
    rows = len(inputs_of(batch))
    return search(own.step, {}, rows, rules, how, own.reorder, key)


def _check(model: Model, batch: Batch, rules: Rules) -> None:
    decoder = model.config.decoder
    if decoder is None:
        raise ValueError(f'a {model.config.family} backbone writes no texts: it has no decoder')
    most = longest(decoder)
    if most is not None and rules.read > most:
        raise ValueError(
            f'max_length={rules.max_length} tokens after {len(rules.start)} start tokens need '
            f'{rules.read} positions, but the decoder has {most}; set a lower '
            'max_length'
        )
    if 'starts' in batch and batch['starts'].shape[1] > 1:
        raise ValueError('texts are written for one text a row, but these rows hold several')
    if model.method.replicas > 1:
        raise ValueError('parallel(...) copies the batch; write with one of its adapters at a time')


class _Uncached:
    """Computes all tokens of the texts so far for each word."""

    def __init__(self, model: Model, params: Tree, batch: Batch, rules: Rules, texts: int) -> None:
        self.model, self.batch, self.rules, self.texts = model, batch, rules, texts
        self.params = model.for_few_places(params)
        self.backbone = Backbone(model.config, model.dtype)
        inputs = Inputs(
            inputs_of(batch),
            batch.get('token_type_ids'),
            batch.get('positions'),
            attention_mask(batch['segments'], 1) if 'segments' in batch else None,
            batch.get('tags'),
        )
        self.memory, self.mask = self.backbone.apply(
            {'params': params['backbone']}, inputs, self._sites(1), method='encode'
        )

    def _sites(self, beams: int) -> Sites:
        """Return the adapter for rows of as many beams each."""
        batch = dict(self.batch)
        if beams > 1 and 'adapter' in batch:
            batch['adapter'] = jnp.repeat(batch['adapter'], beams, axis=0)
        if beams > 1 and isinstance(self.model.method, Bank):
            rows = jnp.repeat(inputs_of(batch), beams, axis=0)
            batch = {'input_ids': rows, 'adapter': batch.get('adapter')}
        return self.model.sites(self.params, batch)[0]

    def step(
        self, tokens: Int[Array, 'N L'], written: Int[Array, ''], cache: Cache
    ) -> tuple[Array, Cache]:
        """Return the scores of the next word."""
        beams = len(tokens) // len(self.memory)
        end = len(self.rules.start) + written
        tokens = tokens[:, : self.rules.read]
        real = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] < end, tokens.shape)
        repeat = functools.partial(jnp.repeat, repeats=beams, axis=0)
        hidden = self.backbone.apply(
            {'params': self.params['backbone']},
            Inputs(tokens, mask=real[:, None, None]),
            repeat(self.memory),
            None if self.mask is None else repeat(self.mask),
            self._sites(beams),
            method='decode',
        )
        last = jax.lax.dynamic_slice_in_dim(hidden, end - 1, 1, axis=1)
        return self.model.score_words(self.params, last)[:, 0], cache

    def reorder(self, cache: Cache, source: Int[Array, 'N']) -> Cache:
        """There is nothing to reorder."""
        return cache


class _Cached(_Uncached):
    """Keeps keys and values, and computes the last token alone.

    All texts that are looked for of one row are decoded as that row's tokens, and what is kept of
    one stays where it is when others go on with it: `slots` tells for each text which token of each
    step is its own, and its mask shows it those. So nothing that is kept is ever moved, and the
    texts of a row look at the input, and at its adapter, as one.
    """

    def step(
        self, tokens: Int[Array, 'N L'], written: Int[Array, ''], cache: Cache
    ) -> tuple[Array, Cache]:
        """Return the scores of the next word; the first step computes the start."""
        if cache:
            target, slots = self._next(tokens, written, cache['slots'])
        else:
            target, slots = self._start(tokens)
        variables = {'cache': cache['kept']} if cache else {}
        hidden, changed = self.backbone.apply(
            {'params': self.params['backbone'], **variables},
            target,
            self.memory,
            self.mask,
            self._sites(1),
            method='decode',
            mutable=['cache'],
        )
        scores = self.model.score_words(self.params, hidden if cache else hidden[:, -1:])
        return scores.reshape(len(tokens), -1), {'kept': changed['cache'], 'slots': slots}

    def _start(self, tokens: Int[Array, 'N L']) -> tuple[Inputs, Int[Array, 'N W']]:
        """Return what is decoded first, one text for each row, and nothing as its way so far."""
        count = len(self.rules.start)
        places = jnp.arange(count)
        seen = jnp.arange(len(self.kept))[None] <= places[:, None]
        inputs = self._inputs(tokens[:, :count], places, jnp.int32(0), seen[None])
        return inputs, jnp.zeros((len(tokens), self.rules.read - count), jnp.int32)

    def _next(
        self, tokens: Int[Array, 'N L'], written: Int[Array, ''], slots: Int[Array, 'N W']
    ) -> tuple[Inputs, Int[Array, 'N W']]:
        """Return the last token of each text, and the texts' ways with it."""
        count, rows = len(self.rules.start), len(self.memory)
        last = count + written - 1
        ids = jax.lax.dynamic_slice_in_dim(tokens, last, 1, axis=1).reshape(rows, self.texts)
        own = jnp.tile(jnp.arange(self.texts, dtype=jnp.int32), rows)[:, None]
        slots = jax.lax.dynamic_update_slice_in_dim(slots, own, written - 1, axis=1)
        at = count + (written - 1) * self.texts
        return self._inputs(ids, last[None], at, self._seen(slots, written)), slots

    def _inputs(
        self, ids: Int[Array, 'B T'], places: Array, at: Int[Array, ''], seen: Bool[Array, '#B T S']
    ) -> Inputs:
        return Inputs(
            ids,
            positions=jnp.broadcast_to(places, ids.shape),
            mask=jnp.broadcast_to(seen, (len(ids), *seen.shape[1:]))[:, None],
            at=at,
            kept=jnp.asarray(self.kept),
        )

    @property
    def kept(self) -> Int[np.ndarray, ' S']:
        """The position of each token that is kept: the start, then all texts' words by step."""
        count = len(self.rules.start)
        steps = np.arange(count, self.rules.read)
        return np.concatenate([np.arange(count), np.repeat(steps, self.texts)]).astype(np.int32)

    def _seen(self, slots: Int[Array, 'N W'], written: Int[Array, '']) -> Bool[Array, 'B K S']:
        """Tell which tokens each text sees: the start, and one of each step so far."""
        steps = jnp.arange(slots.shape[1]) < written
        own = (slots[:, :, None] == jnp.arange(self.texts)[None, None]) & steps[None, :, None]
        start = jnp.ones((len(slots), len(self.rules.start)), bool)
        seen = jnp.concatenate([start, own.reshape(len(slots), -1)], axis=1)
        return seen.reshape(-1, self.texts, len(self.kept))

    def reorder(self, cache: Cache, source: Int[Array, 'N']) -> Cache:
        """Give each text the way of the one that it goes on with."""
        return cache | {'slots': jnp.take(cache['slots'], source, axis=0)}
