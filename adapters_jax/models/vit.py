"""ViT and DeiT: encoders of images, of which each patch is a token (Dosovitskiy et al. 2021).

DeiT has one more vector than ViT before the patches, its distillation token (Touvron et al. 2021).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from adapters_jax import functional
from adapters_jax.models import bert, leaves, names
from adapters_jax.models.backbone import BackboneConfig, Inputs
from adapters_jax.models.block import BlockConfig
from adapters_jax.sites import Sites, Stream

PREFIXES = {'vit': 'vit.', 'deit': 'deit.'}
IGNORED = r'((cls_|distillation_)?classifier|decoder)\..*|embeddings\.mask_token'
ALIASES: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class PatchStem:
    """Square patches, one projection for all, and learned positions behind the first vectors."""

    reads: ClassVar[str] = 'pixels'
    scale: ClassVar[float] = 1.0

    image: tuple[int, int]  # height and width
    patch: int
    channels: int
    tokens: tuple[str, ...] = ('cls',)  # learned vectors before the patches
    word: int = 0

    @property
    def positions(self) -> int:
        """The number of vectors of an image."""
        patches = (self.image[0] // self.patch) * (self.image[1] // self.patch)
        return patches + len(self.tokens)

    def module(self, config: BackboneConfig, block: BlockConfig, dtype: Any) -> nn.Module:
        """Return the embedding module."""
        return PatchEmbeddings(self, block, dtype)

    def example(self) -> Float[Array, '1 H W C']:
        """Return the smallest input."""
        return jnp.zeros((1, *self.image, self.channels), jnp.float32)


class PatchEmbeddings(nn.Module):
    """The module of `PatchStem`; its input is [B, H, W, C]."""

    stem: PatchStem
    block: BlockConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, inputs: Inputs, sites: Sites, deterministic: bool, shared: None = None
    ) -> Stream:
        """Return the stream that the blocks start with."""
        s, hidden = self.stem, self.block.hidden
        x = patches(inputs.values.astype(self.dtype), s.patch)
        shape = (s.patch, s.patch, s.channels, hidden)
        x = Patch(shape, name='patch')(x)
        vectors = x
        first = [leaves.leaf(self, name, leaves.normal, (1, 1, hidden)) for name in s.tokens]
        first = [jnp.broadcast_to(v, (len(x), 1, hidden)).astype(self.dtype) for v in first]
        x = jnp.concatenate([*first, x], axis=1)
        places = leaves.leaf(self, 'position', leaves.normal, (1, s.positions, hidden))
        x = x + places.astype(self.dtype)
        rng = None if deterministic else self.make_rng('dropout')
        x = functional.dropout(x, self.block.dropout, rng)
        vectors = jnp.concatenate([*first, vectors], axis=1)
        return sites.embeddings(Stream(x, inputs.mask, vectors, inputs.tags))


class Patch(nn.Module):
    """The projection of patches; its kernel is that of a convolution, [W, H, C, D]."""

    shape: tuple[int, int, int, int]

    @nn.compact
    def __call__(self, x: Float[Array, 'B N P']) -> Float[Array, 'B N D']:
        """Return a vector for each patch."""
        kernel = leaves.leaf(self, 'kernel', leaves.normal, self.shape)
        bias = leaves.leaf(self, 'bias', leaves.zeros, self.shape[-1:])
        return functional.dense(x, kernel.reshape(-1, self.shape[-1]), bias)


def patches(image: Float[Array, 'B H W C'], size: int) -> Float[Array, 'B N P']:
    """Return the patches row by row, each as its columns one after another."""
    batch, height, width, channels = image.shape
    rows, columns = height // size, width // size
    x = image.reshape(batch, rows, size, columns, size, channels)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows * columns, -1)


def _side(patch: Any) -> int:
    """Return the length of a patch's sides, which may be given one by one."""
    sides = {*patch} if isinstance(patch, list | tuple) else {patch}
    if len(sides) != 1:
        raise ValueError(f'patch_size is {patch}; only square patches are supported')
    return sides.pop()


def read_config(hf: Mapping[str, Any]) -> BackboneConfig:
    """Translate a Hugging Face config.json of model type vit or deit.

    Raises:
        ValueError: an image that patches do not cover, or a missing key.
    """
    family = hf['model_type']
    try:
        sides = hf['image_size']
        image = tuple(sides) if isinstance(sides, list | tuple) else (sides, sides)
        stem = PatchStem(
            image=image,
            patch=_side(hf['patch_size']),
            channels=hf.get('num_channels', 3),
            tokens=('cls', 'distillation') if family == 'deit' else ('cls',),
        )
        if any(side % stem.patch for side in image):
            raise ValueError(
                f'image_size is {image}, which patches of {stem.patch} pixels do not cover'
            )
        unbiased = () if hf.get('qkv_bias', True) else ('query', 'key', 'value')
        block = bert.block_config(hf)
        return BackboneConfig(
            family=family,
            layers=hf['num_hidden_layers'],
            vocabulary=0,
            positions=stem.positions,
            pad_id=0,
            block=dataclasses.replace(block, pre_norm=True, unbiased=unbiased),
            stem=stem,
            pooler=True,
            final_norm=True,
        )
    except KeyError as error:
        raise ValueError(f'config.json lacks the key {error}, which {family} needs') from error


MODULES = {
    'attention/query': 'attention.attention.query',
    'attention/key': 'attention.attention.key',
    'attention/value': 'attention.attention.value',
    'attention/output': 'attention.output.dense',
    'feed_forward/up': 'intermediate.dense',
    'feed_forward/down': 'output.dense',
}
NORMS = {'attention': 'layernorm_before', 'feed_forward': 'layernorm_after'}


def tensor_names(config: BackboneConfig) -> names.Names:
    """Return, for each torch tensor (without prefix), our path and whether to transpose it."""
    found: names.Names = {
        f'embeddings.{name}_token': (f'embeddings/{name}', False) for name in config.stem.tokens
    }
    found['embeddings.position_embeddings'] = ('embeddings/position', False)
    found |= names.dense('embeddings.patch_embeddings.projection', 'embeddings/patch')
    for i in range(config.layers):
        found |= names.block(i, config.block, f'encoder.layer.{i}', MODULES, NORMS)
    found |= names.norm('layernorm', 'final_norm')
    return found | (names.dense('pooler.dense', 'pooler') if config.pooler else {})
