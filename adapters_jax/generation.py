"""Writing texts with a model that has a decoder: binds a search and the model's own steps.

The keys and values of what is written are kept, so that each step computes one token a text. Those
of the input are computed once, and all beams of a text look at the same ones.
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
from adapters_jax.params import Tree, map_with_path
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
    own = writer(model, params, batch, rules)
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

    def __init__(self, model: Model, params: Tree, batch: Batch, rules: Rules) -> None:
        self.model, self.batch, self.rules = model, batch, rules
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
    """Keeps keys and values, and computes the last token alone."""

    @property
    def routed(self) -> bool:
        """Whether each row has an adapter of its own."""
        return isinstance(self.model.method, Bank)

    def step(
        self, tokens: Int[Array, 'N L'], written: Int[Array, ''], cache: Cache
    ) -> tuple[Array, Cache]:
        """Return the scores of the next word; the first step computes the start."""
        count = len(self.rules.start)
        if cache:
            at = count + written - 1
            ids = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
        else:
            at, ids = jnp.int32(0), tokens[:, :count]
        beams = len(tokens) // len(self.memory)
        mask = self.mask
        if mask is not None and self.routed:
            mask = jnp.repeat(mask, beams, axis=0)
        places = at + jnp.arange(ids.shape[1])
        target = Inputs(ids, mask=_seen(places, (len(tokens), self.rules.read)), at=at)
        variables = {'params': self.params['backbone'], **({'cache': cache} if cache else {})}
        hidden, kept = self.backbone.apply(
            variables,
            target,
            self.memory,
            mask,
            self._sites(beams),
            method='decode',
            mutable=['cache'],
        )
        return self.model.score_words(self.params, hidden[:, -1:])[:, 0], kept['cache']

    def reorder(self, cache: Cache, source: Int[Array, 'N']) -> Cache:
        """Give each beam the keys and values of the text that it goes on with."""

        def of_texts(path: str, kept: Array) -> Array:
            # What is kept of the input is the same for all beams of a text, which do not mix. But
            # where each row has an adapter of its own, there is a row for each beam.
            own = self.routed or path.split('/')[1] == 'attention'
            return jnp.take(kept, source, axis=0) if own else kept

        return map_with_path(of_texts, cache)


def _seen(places: Int[Array, 'T'], shape: tuple[int, ...]) -> Bool[Array, 'N 1 T L']:
    seen = jnp.arange(shape[1])[None] <= places[:, None]
    return jnp.broadcast_to(seen[None, None], (shape[0], 1, *seen.shape))
