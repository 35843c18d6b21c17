"""One of C classes for an image."""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from adapters_jax.data import images
from adapters_jax.data.augmentation import AUGMENTATIONS, augment
from adapters_jax.data.batches import Batch
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.image_files import File
from adapters_jax.data.images import PIXELS
from adapters_jax.data.pixels import Preparation
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.tasks.classifier import Classifier
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.task import Encoding, Objects, Rows

TOKENS = ('segments', 'positions')  # what a batch says of tokens, which images have not


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageClassification(Classifier):
    """Choose one of `labels` for an image; see `Classifier`.

    Attributes:
        augment: what is done to training images in each epoch; see `data.augmentation`.
        size, channels, resize, resample, scale, mean, std: how an image becomes pixels; see
            `data.pixels.Preparation`. The checkpoint's folder says it: see `fitted`.

    Raises:
        ValueError: an augmentation that there is not, or what `Preparation` refuses.
    """

    name: ClassVar[str] = 'image_classification'
    reads: ClassVar[str] = PIXELS

    augment: str = 'none'
    size: tuple[int, int] = (224, 224)
    channels: int = 3
    resize: tuple[int, ...] = (224, 224)
    resample: int = 2
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        lists = ('size', 'resize', 'mean', 'std')
        self._set(**{name: tuple(getattr(self, name)) for name in lists})
        if self.augment not in AUGMENTATIONS:
            raise ValueError(
                f'augment is {self.augment!r}; expected one of {", ".join(AUGMENTATIONS)}'
            )
        _ = self.preparation

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return the classes and the augmentation."""
        return {**super().settings(given, train), 'augment': given['augment']}

    def fitted(self, backbone: BackboneConfig, directory: Path | None) -> Self:
        """Return the task for the images that a backbone takes."""
        stem = backbone.stem
        found = Preparation.of(stem.image, stem.channels, directory)
        return dataclasses.replace(self, **dataclasses.asdict(found))

    @property
    def preparation(self) -> Preparation:
        """How an image becomes pixels."""
        fields = (field.name for field in dataclasses.fields(Preparation))
        return Preparation(**{name: getattr(self, name) for name in fields})

    @property
    def draws(self) -> bool:
        """Whether each epoch has other views of the images."""
        return self.augment != 'none'

    @property
    def layout(self) -> Hashable:
        """Images that are prepared alike can lie in one batch."""
        return super().layout, self.preparation

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names; see `data.images`."""
        return images.read(data)

    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Turn images into pixels and labels into numbers."""
        return images.encode(rows, self.preparation, self.label_column, encoding.cache_dir)

    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the images that the objects name as {"image": PATH}."""
        return images.of_files(
            [_file(given, number) for number, given in zip(lines, objects, strict=True)]
        )

    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return where the image is, and the label as `gold`."""
        return {'image': row['image']} | ({'gold': row['label']} if 'label' in row else {})

    def transform(self, batch: Batch, seed: int = 0, epoch: int | None = None) -> Batch:
        """Return the batch with the numbers that the backbone reads, float32 [B, 1, H, W, C].

        In training (`epoch` is given) they are of other views of the images in each epoch.
        """
        pixels = batch[PIXELS]
        if epoch is not None and self.draws:
            pixels = augment(pixels, batch['example_id'], self.augment, seed, epoch)
        others = {name: column for name, column in batch.items() if name not in TOKENS}
        return others | {PIXELS: self.preparation.normalise(pixels)}

    def batch_shapes(self, rows: int, length: int, texts: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a batch's images and labels."""
        shape = (rows, texts, *self.size, self.channels)
        pixels = jax.ShapeDtypeStruct(shape, jnp.float32)
        return {PIXELS: pixels} | super().batch_shapes(rows, length, texts)


def _file(given: Mapping[str, Any], line: int) -> File:
    """Return the file that an object names.

    Raises:
        ValueError: it names none, or there is no such file.
    """
    path = given.get('image')
    if not isinstance(path, str) or not path:
        raise ValueError(
            f'input line {line} has no path under \'image\'; expected {{"image": PATH}} (this one '
            f'has: {", ".join(given)})'
        )
    if not Path(path).is_file():
        raise ValueError(f'input line {line}: there is no image {path}')
    return File(PurePosixPath(Path(path).as_posix()), path, path)
