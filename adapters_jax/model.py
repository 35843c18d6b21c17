"""Binds a backbone, an adapter and a head into one `apply(params, batch)`.

This is the only place where backbones and adapters meet; neither knows the other.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters.bank import Bank, rows_of
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.dropping import Dropped, drop_layers
from adapters_jax.adapters.method import Method
from adapters_jax.models import language_head
from adapters_jax.models.backbone import Backbone, BackboneConfig, Inputs, longest
from adapters_jax.models.heads import FIRST_TOKEN, HeadBank, HeadConfig, PooledHead, init_head
from adapters_jax.params import Rule, Tree, freeze, partition, train
from adapters_jax.sites import Place, Sites

Batch = Mapping[str, Array]
READ = ('input_ids', 'pixels', 'sound')  # the columns that backbones read, of which a batch has one


@dataclasses.dataclass(frozen=True)
class Model:
    """A backbone with one adapter and one head, both stored under `name`.

    `dtype` is what activations are computed in (logits are always float32); `remat` says what of
    them is computed again in the backward pass (`models.block.REMAT`); of the layers
    `dropped` the adapter is left out (AdapterDrop, Rücklé et al. 2021). With `heads`, each row has
    the head of its adapter, and `head_config` and `outputs` are not looked at.
    """

    config: BackboneConfig
    method: Method
    head_config: HeadConfig
    outputs: int
    name: str = 'default'
    dtype: Any = jnp.float32
    remat: str = 'none'
    dropped: Dropped = 0
    heads: HeadBank | None = None

    def __post_init__(self) -> None:
        """Refuse a head that needs a pooler where the checkpoint has none."""
        if self.head_config.pooling == 'pooler' and not self.config.pooler:
            raise ValueError(
                "head.pooling is 'pooler' but the backbone has no pooler; use 'mean' or 'cls'"
            )

    @property
    def head(self) -> PooledHead:
        """The head as a Linen module."""
        return PooledHead(self.head_config, self.outputs)

    def init(self, key: PRNGKeyArray, backbone: Tree) -> Tree:
        """Return all parameters: the given backbone, a fresh adapter and a fresh head."""
        adapter_key, head_key = jax.random.split(key)
        dimensions = self.config.dimensions
        return {
            'backbone': backbone,
            'adapters': {self.name: self.method.init(adapter_key, dimensions, backbone)},
            'heads': {self.name: self._init_head(head_key)},
        }

    def _init_head(self, key: PRNGKeyArray) -> Tree:
        hidden = self.config.dimensions.hidden
        if self.config.decoder is not None:
            return language_head.init_of_decoder(key, hidden, self.outputs, self.config.decoder)
        if self.head_config.scores_words:
            return language_head.init(key, hidden, self.config.dimensions.word, self.outputs)
        return (
            init_head(self.head, key, hidden)
            if self.heads is None
            else self.heads.init(key, hidden)
        )

    @property
    def text_positions(self) -> int | None:
        """The longest text in tokens: the backbone's positions that the method leaves, if any."""
        most = longest(self.config)
        return None if most is None else most - self.method.reserved_positions

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What is trained: the adapter, its head, and the backbone leaves the method asks for."""
        name = re.escape(self.name)
        frozen = [freeze(f'adapters/{name}/{pattern}') for pattern in self.method.frozen]
        kept = self.head_config.train == 'none'
        head = (freeze if kept else train)(f'heads/{name}/.*')
        own = (train(f'adapters/{name}/.*'), head)
        return (*frozen, *own, *self.method.rules(self.config.dimensions), freeze('.*'))

    def trunk(self, params: Tree) -> Place:
        """Return where the trunk ends: the first place that anything trainable can change."""
        end = self.method.first_place(self._adapter(params), self.config.dimensions)
        return min([end, *self._tuned(params.get('backbone', {}))])

    def _tuned(self, backbone: Tree) -> list[Place]:
        """Return where the leaves act that the method trains: it may not know of all there are."""
        rules = self.method.rules(self.config.dimensions)
        if not rules:
            return []
        trained, _ = partition({'backbone': backbone}, (*rules, freeze('.*')))
        branches = trained.get('backbone', {})
        layers = (re.fullmatch(r'layer_(\d+)', name) for name in branches)
        first = [Place(0)] if 'embeddings' in branches else []
        return first + [Place(int(found[1])) for found in layers if found]

    def _adapter(self, params: Tree) -> Tree:
        tree = params.get('adapters', {}).get(self.name, {})
        return drop_layers(tree, self.dropped) if self.dropped else tree

    def penalty(self, params: Tree) -> Float[Array, ''] | None:
        """Return what the method adds to the mean loss in training, or None for nothing."""
        return self.method.penalty(self._adapter(params))

    def apply(
        self,
        params: Tree,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        record: dict[str, Array] | None = None,
    ) -> Float[Array, 'B S C']:
        """Return the outputs of every example in the batch, in float32; no key, no dropout.

        With a decoder they are its scores of every word in every place of what it reads, [B, T, V].
        With a head of tokens they are those of every token, [B, T, C], and with a language head
        those of every word in the places that the batch's column `masked` names, [B, M, V].
        For a head that reads first tokens alone, the last layer computes no others, where the
        method allows it (`Method.stepwise`).

        A batch of nothing but what the backbone reads has one text a row and no padding. Else
        `segments`, int32 [B, T], numbers each token's text in its row from 1, 0 on padding, and
        `starts`, int32 [B, S], are the places at which these texts begin.

        `record` is filled with the weights of AdapterFusion by place. For a bank the batch has the
        column `adapter`: the number of each row's adapter, or of each group of rows on end.

        Raises:
            ValueError: a batch without what the backbone reads, `attention_mask` in the place of
                `segments`, or `segments` without `starts`.
        """
        sites, rows = self.sites(params, batch, functional.fold(key, 0), record)
        places = self._read(batch) if record is None else None
        hidden = self._states(params, batch, key, sites, places)
        if self.config.decoder is not None:
            return self.score_words(params, hidden)
        batch = self._with_places(batch, hidden)
        copies = self.method.replicas
        segments = self.method.lengthen(batch['segments'], rows)
        if (self.heads or self.head_config).per_token:
            present = self.method.lengthen(jnp.ones_like(batch['segments']), rows)
            hidden = _own_places(hidden, jnp.tile(present, (copies, 1)), batch['segments'].shape[1])
            segments = batch['segments']
        if self.head_config.scores_words:
            table = params['backbone']['embeddings']['word']['embedding']
            given = params['heads'][self.name], hidden, batch['masked'], table, self.config
            return language_head.apply(*given, sites.undo)
        segments = jnp.tile(segments, (copies, 1))
        starts = batch['starts'] if places is None else _numbered(places)
        starts = jnp.tile(starts, (copies, 1))
        pooled = hidden, segments, starts, functools.partial(self._pool, params, sites)
        key = functional.fold(key, 2)
        if self.heads is not None:
            chosen = rows_of(rows, len(starts))
            return self.heads.apply(params['heads'][self.name], *pooled, chosen, key)
        own = {'params': params['heads'][self.name]}
        return self.head.apply(
            own, *pooled, key is None, rngs={} if key is None else {'dropout': key}
        )

    def _states(
        self,
        params: Tree,
        batch: Batch,
        key: PRNGKeyArray | None,
        sites: Sites,
        places: Int[Array, 'B S'] | None,
    ) -> Float[Array, 'B T D']:
        """Return what the backbone makes of the batch, of its last layer what `places` names."""
        backbone = Backbone(self.config, self.dtype, self.trunk(params), self.remat)
        return backbone.apply(
            {'params': params['backbone']},
            inputs_of(batch),
            **_beside(batch),
            sites=sites,
            deterministic=key is None,
            known=batch.get('trunk'),
            places=places,
            **_target(batch),
            rngs={} if key is None else {'dropout': functional.fold(key, 1)},
        )

    def _read(self, batch: Batch) -> Int[Array, 'B S'] | None:
        """Return the tokens whose last states the heads read, where these are the first of texts.

        None: all are read, or the method makes of one token's state something of the others'.
        """
        heads = [head for _, head, _ in self.heads.heads] if self.heads else [self.head_config]
        first = all(head.pooling in FIRST_TOKEN for head in heads)
        if not first or not self.method.stepwise or self.config.decoder is not None:
            return None
        if 'starts' in batch:
            return batch['starts']
        return jnp.zeros((len(inputs_of(batch)), 1), jnp.int32)

    def _with_places(self, batch: Batch, hidden: Float[Array, 'B T D']) -> Batch:
        """Return the batch with one example a row where it does not say what a row holds."""
        if 'segments' in batch:
            return batch
        rows = len(inputs_of(batch))
        # Vectors that the method inserts and rows that it copies are counted later.
        if 'input_ids' in batch:
            length = batch['input_ids'].shape[1]
        else:
            length = self.config.positions if 'pixels' in batch else hidden.shape[1]
        segments = jnp.ones((rows, length), jnp.int32)
        return {**batch, 'segments': segments, 'starts': jnp.zeros((rows, 1), jnp.int32)}

    def sites(
        self,
        params: Tree,
        batch: Batch,
        key: PRNGKeyArray | None = None,
        record: dict[str, Array] | None = None,
    ) -> tuple[Sites, Array | None]:
        """Return the adapter as the backbone meets it, and which of a bank's each row has."""
        adapter, rows = self._adapter(params), batch.get('adapter')
        if isinstance(self.method, Bank):
            rows = self.method.index(adapter, rows, len(inputs_of(batch)))
        return bind(self.method, adapter, key, record=record, rows=rows), rows

    def score_words(self, params: Tree, hidden: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
        """Return a decoder's score of each word in each place, in float32."""
        own, table = self._words(params)
        return language_head.apply_to_decoder(own, hidden, table, self.config.decoder)

    def for_few_places(self, params: Tree) -> Tree:
        """Return parameters with which `score_words` is fast where a step has few places."""
        own = language_head.for_few_places(*self._words(params))
        return params | {'heads': params.get('heads', {}) | {self.name: own}}

    def _words(self, params: Tree) -> tuple[Tree, Any]:
        """Return what a decoder has to score words with, and its words' vectors."""
        table = Backbone(self.config, self.dtype).apply(
            {'params': params['backbone']}, method='table'
        )
        return params.get('heads', {}).get(self.name, {}), table

    def _pool(
        self, params: Tree, sites: Sites, first: Float[Array, 'B S D']
    ) -> Float[Array, 'B S D']:
        variables = {'params': params['backbone']}
        return Backbone(self.config, self.dtype).apply(variables, first, sites, method='pool')

    def can_begin_above_trunk(self, params: Tree) -> bool:
        """Tell whether there is a trunk, and `trunk_outputs` has what it computes."""
        copied = self.method.replicas > 1
        return self.trunk(params).layer > 0 and self.config.decoder is None and not copied

    def trunk_outputs(self, params: Tree, batch: Batch) -> Float[Array, 'B T N D']:
        """Return what `apply` may begin with, as the batch's column 'trunk'.

        N is 1 or 2 (`Place.vectors`), or the number of layers for a method that reads each of them.

        Raises:
            ValueError: there is no trunk: the lowest layer is adapted.
        """
        place = self.trunk(params)
        if self.config.decoder is not None:
            raise ValueError(
                "the encoder's outputs of a model with a decoder are not stored; "
                "set training.trunk_cache='none'"
            )
        if place.layer == 0:
            raise ValueError('the lowest layer is adapted, so there is no trunk to store')
        if self.method.replicas > 1:
            raise ValueError(
                "parallel(...) copies the batch at the trunk's end, so nothing can begin there; "
                "set training.trunk_cache='none'"
            )
        layers = self.config.layers
        backbone = Backbone(self.config, self.dtype, Place(layers))
        _, sown = backbone.apply(
            {'params': params['backbone']},
            inputs_of(batch),
            **_beside(batch),
            mutable=['trunk'],
        )
        seen = sown['trunk']
        if place.layer == layers:
            chosen = range(layers) if self.method.reads_trunk else [layers - 1]
            return jnp.concatenate([seen[f'layer_{i}']['block'][0] for i in chosen], axis=2)
        here = seen[f'layer_{place.layer}']
        if place.vectors == 2:
            return here[place.stage.removesuffix('_end')]['end'][0]
        if place.stage == 'attention':
            return seen[f'layer_{place.layer - 1}']['block'][0]
        if place.stage == 'block_end':
            return here['block'][0]
        raise ValueError(f'no output is stored at the place {place.stage} of a layer')


def _numbered(places: Int[Array, 'B S']) -> Int[Array, 'B S']:
    return jnp.broadcast_to(jnp.arange(places.shape[1]), places.shape)


def _own_places(
    hidden: Float[Array, 'B P+T D'], present: Int[Array, 'B P+T'], length: int
) -> Float[Array, 'B T D']:
    """Return the states of a row's own tokens, without those of inserted vectors."""
    if hidden.shape[1] == length:
        return hidden
    order = jnp.argsort(present == 0, axis=1, stable=True)[:, :length]
    return jnp.take_along_axis(hidden, order[:, :, None], axis=1)


def inputs_of(batch: Batch) -> Array:
    """Return what a batch has for the backbone to read: tokens, pixels or sound.

    Pixels may be [B, 1, H, W, C], as columns of examples are: a row holds one image.

    Raises:
        ValueError: nothing of these, or a mask of padding under the name that tokenizers give it.
    """
    name = next((name for name in READ if name in batch), None)
    if name is None:
        raise ValueError(
            f'the batch has the columns {", ".join(batch) or "(none)"}; expected one of '
            f'{", ".join(READ)}'
        )
    if 'attention_mask' in batch and 'segments' not in batch:
        raise ValueError(
            "the batch has the column 'attention_mask', but what is padding is read from "
            "'segments' (1 for each token of a row's text, 0 for padding), with 'starts', zeros of "
            'shape [B, 1]; rename the one and add the other'
        )
    values = batch[name]
    return values[:, 0] if 'pixels' in batch and values.ndim == 5 else values


def _beside(batch: Batch) -> dict[str, Any]:
    """Return what the backbone is told of the inputs, by its own names."""
    told = {name: batch.get(name) for name in ('token_type_ids', 'positions', 'tags')}
    return told | {'mask': _mask(batch)}


def _mask(batch: Batch) -> Bool[Array, 'B 1 #T T'] | None:
    if 'segments' not in batch:
        return None
    if 'starts' not in batch:
        raise ValueError(
            "the batch has 'segments' but not 'starts', int32 [B, S], the places at which the "
            'texts of each row begin; with one text a row these are zeros of shape [B, 1]'
        )
    return attention_mask(batch['segments'], batch['starts'].shape[1])


def _target(batch: Batch) -> dict[str, Any]:
    """Return what a decoder reads: the texts so far, and who sees what of them and the input."""
    if 'target_ids' not in batch:
        return {}
    own, examples = batch['target_segments'], batch['starts'].shape[1]
    target = Inputs(
        batch['target_ids'],
        positions=batch['target_positions'],
        mask=attention_mask(own, examples),
    )
    if 'segments' not in batch or examples == 1:
        return {'target': target, 'target_mask': _mask(batch)}
    across = own[:, None, :, None] == batch['segments'][:, None, None, :]
    return {'target': target, 'target_mask': across}


def attention_mask(segments: Int[Array, 'B T'], examples: int) -> Bool[Array, 'B 1 #T T']:
    """Return who may attend to whom: tokens of the same example, and of no padding.

    With one example a row the mask hides padding only, which needs no T x T array.
    """
    if examples == 1:
        return (segments > 0)[:, None, None, :]
    return segments[:, None, :, None] == segments[:, None, None, :]
