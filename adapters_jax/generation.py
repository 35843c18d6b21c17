"""Writing texts with a model that has a decoder: binds a search and the model's own steps.

The keys and values of what is written are kept, so that each step computes one token a text. Those
of the input are computed once, and all beams of a row look at the same ones.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from adapters_jax.adapters.bank import Bank
from adapters_jax.decoding.rules import Rules
from adapters_jax.decoding.search import Cache, Found, Search, search
from adapters_jax.model import Batch, Model, attention_mask, inputs_of
from adapters_jax.models.backbone import Backbone, Inputs
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

    Rows hold one text each. Without the cache all tokens are computed anew for each word, which an
    adapter needs that looks along the whole text.

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
    if rules.read > decoder.positions:
        raise ValueError(
            f'max_length={rules.max_length} words behind a start of {len(rules.start)} need '
            f'{rules.read} positions, but the decoder has {decoder.positions}; set a lower '
            'max_length'
        )
    if 'starts' in batch and batch['starts'].shape[1] > 1:
        raise ValueError('texts are written for one text a row, but these rows hold several')
    if getattr(model.method, 'replicas', 1) > 1:
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
        count, texts = len(self.rules.start), len(tokens) // len(self.memory)
        if not cache:
            slots = jnp.zeros((len(tokens), self.rules.read - count), jnp.int32)
            ids, places, at = tokens[:, :count], jnp.arange(count), jnp.int32(0)
            seen = jnp.arange(self.kept.size)[None] <= places[:, None]
            variables = {}
        else:
            last = count + written - 1
            ids = jax.lax.dynamic_slice_in_dim(tokens, last, 1, axis=1).reshape(-1, texts)
            places, at = last[None], count + (written - 1) * texts
            own = jnp.tile(jnp.arange(texts, dtype=jnp.int32), len(self.memory))[:, None]
            slots = jax.lax.dynamic_update_slice_in_dim(cache['slots'], own, written - 1, axis=1)
            seen = self._seen(slots, texts, written)
            variables = {'cache': cache['kept']}
        target = Inputs(
            ids,
            positions=jnp.broadcast_to(places, ids.shape),
            mask=jnp.broadcast_to(seen, (len(ids), *seen.shape[-2:]))[:, None],
            at=at,
            kept=self.kept,
        )
        hidden, changed = self.backbone.apply(
            {'params': self.params['backbone'], **variables},
            target,
            self.memory,
            self.mask,
            self._sites(1),
            method='decode',
            mutable=['cache'],
        )
        hidden = hidden if cache else hidden[:, -1:]
        scores = self.model.score_words(self.params, hidden)
        return scores.reshape(len(tokens), -1), {'kept': changed['cache'], 'slots': slots}

    @functools.cached_property
    def kept(self) -> Int[Array, 'S']:
        """The position of each token that is kept: the start, then all texts' words by step."""
        count = len(self.rules.start)
        steps = count + jnp.arange(self.rules.read - count)
        return jnp.concatenate([jnp.arange(count), jnp.repeat(steps, self.texts)])

    def _seen(
        self, slots: Int[Array, 'N W'], texts: int, written: Int[Array, '']
    ) -> Bool[Array, 'B K S']:
        steps = jnp.arange(slots.shape[1]) < written
        own = (slots[:, :, None] == jnp.arange(texts)[None, None]) & steps[None, :, None]
        start = jnp.ones((len(slots), len(self.rules.start)), bool)
        seen = jnp.concatenate([start, own.reshape(len(slots), -1)], axis=1)
        return seen.reshape(-1, texts, seen.shape[1])

    def reorder(self, cache: Cache, source: Int[Array, 'N']) -> Cache:
        """Give each text the way of the one that it goes on with."""
        return cache | {'slots': jnp.take(cache['slots'], source, axis=0)}
