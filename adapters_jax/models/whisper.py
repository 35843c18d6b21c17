"""Whisper: an encoder of sound and a decoder of words (Radford et al. 2023, section 2.2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax import functional
from adapters_jax.models import bart, leaves, names
from adapters_jax.models.backbone import BackboneConfig, Inputs, Table
from adapters_jax.models.block import BlockConfig
from adapters_jax.models.text import TextStem
from adapters_jax.sites import Sites, Stream

PREFIXES = {'whisper': 'model.'}
IGNORED = r'proj_out\.weight'
ALIASES: dict[str, str] = {}
_KERNEL, _STRIDE = 3, 2


@dataclasses.dataclass(frozen=True)
class SoundStem:
    """Two convolutions over frames of log-mel features, the second with a stride of 2."""

    reads: ClassVar[str] = 'sound'
    scale: ClassVar[float] = 1.0

    bands: int
    positions: int  # of the vectors that come out, of which two frames make one
    word: int = 0

    def module(self, config: BackboneConfig, block: BlockConfig, dtype: Any) -> nn.Module:
        """Return the embedding module."""
        return SoundEmbeddings(self, block, dtype)

    def example(self) -> Float[Array, '1 M F']:
        """Return the smallest input."""
        return jnp.zeros((1, self.bands, _STRIDE), jnp.float32)


class SoundEmbeddings(nn.Module):
    """The module of `SoundStem`; its input is [B, M, F], bands before frames."""

    stem: SoundStem
    block: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, inputs: Inputs, sites: Sites, deterministic: bool, shared: None = None
    ) -> Stream:
        """Return the stream that the blocks start with."""
        hidden = self.block.hidden
        x = inputs.values.swapaxes(1, 2).astype(self.dtype)
        for name, stride in (('first', 1), ('second', _STRIDE)):
            x = functional.activation('gelu')(Convolution(hidden, stride, name=name)(x))
        places = Table(self.stem.positions, hidden, name='position')()
        vectors = x
        x = x + places[None, : x.shape[1]].astype(self.dtype)
        rng = None if deterministic else self.make_rng('dropout')
        x = functional.dropout(x, self.block.dropout, rng)
        return sites.embeddings(Stream(x, inputs.mask, vectors, inputs.tags))


class Convolution(nn.Module):
    """A convolution over time with three taps, as long as its input over the stride."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, 'B F I']) -> Float[Array, 'B F O']:
        """Return the outputs."""
        shape = (_KERNEL, x.shape[-1], self.features)
        kernel = leaves.leaf(self, 'kernel', leaves.normal, shape).astype(x.dtype)
        bias = leaves.leaf(self, 'bias', leaves.zeros, (self.features,)).astype(x.dtype)
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,), [(1, 1)], dimension_numbers=('NWC', 'WIO', 'NWC')
        )
        return y + bias.reshape(1, 1, -1)


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a Hugging Face config.json of model type whisper.

    Raises:
        ValueError: stacks of different widths, or a missing key.
    """
    try:
        bart.equal_stacks(hf)
        block = bart.block_config(hf, pre_norm=True, unbiased=('key',))
        # transformers reads `scale_embedding` and does not use it.
        written = TextStem(hf['max_target_positions'])
        decoder = bart.decoder(hf, block, written, final_norm=True)
        stem = dataclasses.replace(decoder.stem, shared=False)
        return BackboneConfig(
            family='whisper',
            layers=hf['encoder_layers'],
            vocabulary=hf['vocab_size'],
            positions=hf['max_source_positions'],
            pad_id=hf['pad_token_id'],
            block=block,
            stem=SoundStem(hf['num_mel_bins'], hf['max_source_positions']),
            final_norm=True,
            decoder=dataclasses.replace(decoder, stem=stem, shared_words=False),
        )
    except KeyError as error:
        raise ValueError(f'config.json lacks the key {error}, which whisper needs') from error


def tensor_names(config: BackboneConfig) -> names.Names:
    """Return, for each torch tensor (without prefix), our path and whether to transpose it."""
    found = names.table('decoder.embed_tokens', 'decoder_embeddings/word')
    for stack, ours in (('encoder', 'embeddings'), ('decoder', 'decoder_embeddings')):
        found |= names.table(f'{stack}.embed_positions', f'{ours}/position')
    for theirs, ours in (('conv1', 'first'), ('conv2', 'second')):
        found |= names.dense(f'encoder.{theirs}', f'embeddings/{ours}')
    return found | bart.block_names(config)
