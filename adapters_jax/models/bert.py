"""BERT and RoBERTa: an embedding module, a translated config and a table of tensor names.

RoBERTa is the same network with positions that start after the padding id and one token type
(Liu et al. 2019, section 3; Devlin et al. 2019, section 3).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from adapters_jax import functional, quantize
from adapters_jax.models import names
from adapters_jax.models.backbone import BackboneConfig, Inputs, Table
from adapters_jax.models.block import BlockConfig
from adapters_jax.models.layers import Dense, Norm
from adapters_jax.sites import Sites, Stream, Words

PREFIXES = {'bert': 'bert.', 'roberta': 'roberta.'}
# Constants, and the heads of whatever a checkpoint was trained for.
HEADS = r'(cls|lm_head|classifier|qa_outputs)\..*'
IGNORED = rf'embeddings\.(position_ids|token_type_ids)|{HEADS}'


@dataclasses.dataclass(frozen=True)
class BertStem:
    """Word, position and token-type embeddings, summed and normalised (Devlin 2019, fig. 2).

    Vectors narrower than the hidden size are projected after that (Clark et al. 2020, section 3.2).
    """

    reads: ClassVar[str] = 'input_ids'
    scale: ClassVar[float] = 1.0

    token_types: int = 2  # 0: none
    position_offset: int = 0  # RoBERTa counts positions from pad_id + 1
    word: int = 0
    decoder: bool = False  # whether it is the second stack's

    def module(self, config: BackboneConfig, block: BlockConfig, dtype: Any) -> nn.Module:
        """Return the embedding module."""
        return Embeddings(config, self, block, dtype)

    def example(self) -> Int[Array, '1 1']:
        """Return the smallest input."""
        return jnp.zeros((1, 1), jnp.int32)


class Embeddings(nn.Module):
    """The module of `BertStem`."""

    config: BackboneConfig
    stem: BertStem
    block: BlockConfig
    dtype: Any

    def setup(self) -> None:
        """Name the tables as the parameter tree does."""
        c, s = self.config, self.stem
        width = s.word or self.block.hidden
        positions = c.decoder.positions if s.decoder else c.positions
        self.word = Table(c.written if s.decoder else c.vocabulary, width)
        self.position = Table(positions + s.position_offset, width)
        if s.token_types:
            self.token_type = Table(s.token_types, width)
        where = 'decoder_embeddings/norm' if s.decoder else 'embeddings/norm'
        self.norm = Norm(self.block.norm_epsilon, where)
        if width != self.block.hidden:
            self.projection = Dense(self.block.hidden)

    def __call__(
        self, inputs: Inputs, sites: Sites, deterministic: bool, shared: None = None
    ) -> Stream:
        """Return the stream that the blocks start with: the embedded input and what it is of."""
        c, s, ids = self.config, self.stem, inputs.values
        types = jnp.zeros_like(ids) if inputs.token_types is None else inputs.token_types
        positions = inputs.positions
        if positions is None:
            positions = default_positions(c, ids)
        vectors = quantize.rows(self.word(), ids)
        words = Words(vectors, types, positions, inputs.mask, inputs.tags)
        words = words if s.decoder else sites.words(words)
        x = words.vectors
        x = x + jnp.take(self.position(), words.positions + s.position_offset, axis=0)
        if s.token_types:
            x = x + jnp.take(self.token_type(), words.token_types, axis=0)
        x = self.norm(x.shape[-1], sites)(x)
        rng = None if deterministic else self.make_rng('dropout')
        x = functional.dropout(x, self.block.dropout, rng).astype(self.dtype)
        vectors = words.vectors.astype(self.dtype)
        stream = Stream(x, words.mask, vectors, words.tags, at=inputs.at)
        stream = sites.target(stream) if s.decoder else sites.embeddings(stream)
        if not s.word or s.word == self.block.hidden:
            return stream

        def bias(own: Array) -> Array:
            return sites.vector('embeddings/projection/bias', own)

        return stream.replace(hidden=self.projection(stream.hidden, bias))

    def table(self) -> Any:
        """Return the word vectors."""
        return self.word()


def default_positions(config: BackboneConfig, input_ids: Int[Array, 'B T']) -> Int[Array, 'B T']:
    """Return the positions that the original model gives to unpacked rows.

    BERT counts every column; RoBERTa counts the tokens that are not padding, and places padding at
    the padding id itself (-1 here, before the offset).
    """
    if not config.stem.position_offset:
        return jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
    real = (input_ids != config.pad_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real - 1


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a Hugging Face config.json of model type bert or roberta.

    Raises:
        ValueError: a setting this module does not compute, or a missing key.
    """
    hf = {key: value for key, value in hf.items() if value is not None}  # null says nothing
    family = hf.get('model_type', 'bert')
    check_encoder(hf)
    try:
        offset = hf['pad_token_id'] + 1 if family == 'roberta' else 0
        return BackboneConfig(
            family=family,
            layers=hf['num_hidden_layers'],
            vocabulary=hf['vocab_size'],
            positions=hf['max_position_embeddings'] - offset,
            pad_id=hf.get('pad_token_id', 0),
            block=block_config(hf),
            stem=BertStem(hf['type_vocab_size'], offset),
            pooler=True,
        )
    except KeyError as error:
        raise ValueError(f'config.json lacks the key {error}, which {family} needs') from error


def block_config(hf: Mapping[str, Any]) -> BlockConfig:
    """Return the block of an encoder whose config has the names of BERT's."""
    return BlockConfig(
        hidden=hf['hidden_size'],
        feed_forward=hf['intermediate_size'],
        heads=hf['num_attention_heads'],
        activation=hf.get('hidden_act', 'gelu'),
        norm_epsilon=hf.get('layer_norm_eps', 1e-12),
        dropout=hf.get('hidden_dropout_prob', 0.1),
        attention_dropout=hf.get('attention_probs_dropout_prob', 0.1),
    )


def check_encoder(hf: Mapping[str, Any]) -> None:
    """Refuse what makes an encoder something else.

    Raises:
        ValueError: relative positions, or a decoder.
    """
    position_type = hf.get('position_embedding_type', 'absolute')
    if position_type != 'absolute':
        raise ValueError(
            f'position_embedding_type {position_type!r} is not supported; expected "absolute"'
        )
    for key in ('is_decoder', 'add_cross_attention'):
        if hf.get(key, False):
            raise ValueError(
                f'{key}=true in config.json: only encoders of this family are supported'
            )


MODULES = {
    'attention/query': 'attention.self.query',
    'attention/key': 'attention.self.key',
    'attention/value': 'attention.self.value',
    'attention/output': 'attention.output.dense',
    'feed_forward/up': 'intermediate.dense',
    'feed_forward/down': 'output.dense',
}
NORMS = {'attention': 'attention.output.LayerNorm', 'feed_forward': 'output.LayerNorm'}


def tensor_names(config: BackboneConfig) -> names.Names:
    """Return, for each torch tensor (without prefix), our path below `backbone` and whether to
    transpose it."""
    tables = ['word', 'position', *(['token_type'] if config.stem.token_types else [])]
    found: names.Names = {}
    for name in tables:
        found |= names.table(f'embeddings.{name}_embeddings', f'embeddings/{name}')
    found |= names.norm('embeddings.LayerNorm', 'embeddings/norm')
    for i in range(config.layers):
        found |= names.block(i, config.block, f'encoder.layer.{i}', MODULES, NORMS)
    return found | (names.dense('pooler.dense', 'pooler') if config.pooler else {})
