"""From the bytes of an image file to the pixels that a backbone was pretrained on.

Two halves: what is the same in every epoch (decoding, resizing, cropping) is done once and kept as
bytes; what would make these four times as large (scaling and normalisation) is done to each batch.
Both do what the image processors of `transformers` do, as a checkpoint's preprocessor_config.json
describes it.
"""

import dataclasses
import io
import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
from jaxtyping import Float32, UInt8
from PIL.ExifTags import Base
from PIL.Image import Transpose

CONFIG = 'preprocessor_config.json'
MODES = {1: 'L', 3: 'RGB'}
# What Pillow raises for a file that is no image, or was cut, or would fill the memory.
UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, struct.error, zlib.error)
# The last two: of damaged AVIF and TIFF files.
UNREADABLE += (PIL.Image.DecompressionBombError, RuntimeError, TypeError)
# What undoes each orientation that a camera notes.
UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How images become pixels [H, W, C].

    Attributes:
        size: height and width of what comes out.
        channels: 1 (grey) or 3 (red, green, blue).
        resize: height and width that images are resized to, or the length of the shorter side
            alone, or nothing: they have their size; the middle is cropped.
        resample: Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, ...
        scale, mean, std: a byte x becomes (x * scale - mean) / std, by channel.

    Raises:
        ValueError: a value out of its range.
    """

    size: tuple[int, int]
    channels: int = 3
    resize: tuple[int, ...] = ()
    resample: int = 2
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        """Refuse what no image could be prepared by."""
        if self.channels not in MODES:
            raise ValueError(
                f'the backbone takes images of {self.channels} channels; expected 1 (grey) or 3'
            )
        if self.resample not in list(PIL.Image.Resampling):
            raise ValueError(f'resample is {self.resample}; expected one of 0 to 5')
        for name in ('mean', 'std'):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(
                    f'image_{name} is {list(getattr(self, name))}; expected {self.channels} numbers'
                )
        if not all(self.std):
            raise ValueError(f'image_std is {list(self.std)}; expected no zeros')

    @classmethod
    def of(cls, size: tuple[int, int], channels: int, directory: Path | None) -> Self:
        """Return what a checkpoint's folder says; where it is silent, ViT's own settings.

        Raises:
            ValueError: the file is damaged, asks for what is not done here, or makes images of
                another size than the backbone takes.
        """
        path = None if directory is None else directory / CONFIG
        if path is None or not path.is_file():
            half = (0.5,) * channels
            return cls(size, channels, resize=size, mean=half, std=half)
        try:
            found = _read(json.loads(path.read_text('utf-8')), size, channels)
            made = cls(size, channels, **found)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{path} cannot be followed: {error}') from error
        return made

    def __call__(self, content: bytes) -> UInt8[np.ndarray, 'H W C']:
        """Return the pixels of an encoded image.

        Raises:
            ValueError: it cannot be read, has more than 8 bits a channel, or has another size than
                the backbone takes and is not to be resized.
        """
        try:
            with PIL.Image.open(io.BytesIO(content)) as image:
                image = self._resized(self._converted(image))
        except PIL.UnidentifiedImageError as error:  # whose words are about our buffer
            raise ValueError('cannot be read as an image (of no format that is known)') from error
        except UNREADABLE as error:
            raise ValueError(f'cannot be read as an image ({error})') from error
        height, width = self.size
        if (
            image.height < height
            or image.width < width
            or (not self.resize and self._differs(image))
        ):
            raise ValueError(
                f'is {image.height} x {image.width} pixels, but the backbone takes '
                f'{height} x {width} and {CONFIG} does not resize it'
            )
        top, left = (image.height - height) // 2, (image.width - width) // 2
        pixels = np.asarray(image.crop((left, top, left + width, top + height)))
        return pixels.reshape(height, width, self.channels)

    def _converted(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """Return the image upright and in the channels wanted."""
        if image.mode.startswith(('I', 'F')):
            raise ValueError(f'it has more than 8 bits a channel: mode {image.mode}')
        image = _upright(image)
        if 'transparency' in image.info:
            image = image.convert('RGBA')
        return image.convert(MODES[self.channels])

    def _resized(self, image: PIL.Image.Image) -> PIL.Image.Image:
        if not self.resize:
            return image
        height, width = self.resize if len(self.resize) == 2 else self._by_shorter_side(image)
        return image.resize((width, height), PIL.Image.Resampling(self.resample))

    def _by_shorter_side(self, image: PIL.Image.Image) -> tuple[int, int]:
        short, (side,) = min(image.size), self.resize
        return int(side * image.height / short), int(side * image.width / short)

    def _differs(self, image: PIL.Image.Image) -> bool:
        return (image.height, image.width) != self.size

    def normalise(self, pixels: UInt8[np.ndarray, '... C']) -> Float32[np.ndarray, '... C']:
        """Return the numbers that the backbone reads."""
        mean, std = np.array(self.mean), np.array(self.std)
        return pixels * np.float32(self.scale / std) - np.float32(mean / std)


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the image as its camera was held.

    Pillow's own function also writes the rest of the EXIF data anew, and fails where these are odd.
    """
    image.load()
    turn = UPRIGHT.get(image.getexif().get(Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _read(given: Mapping[str, Any], size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Translate preprocessor_config.json."""
    resize = _sides(given.get('size', size)) if given.get('do_resize', True) else ()
    crop = given.get('crop_size') if given.get('do_center_crop', False) else None
    out = _sides(crop) if crop is not None else resize or size
    if out != size:
        shown = ' x '.join(map(str, out))
        raise ValueError(
            f'it makes images of {shown} pixels, but config.json has image_size '
            f'{" x ".join(map(str, size))}; mend one of them'
        )
    normalised = given.get('do_normalize', True)
    mean = given.get('image_mean', (0.5,) * channels) if normalised else (0.0,) * channels
    std = given.get('image_std', (0.5,) * channels) if normalised else (1.0,) * channels
    return {
        'resize': resize,
        'resample': int(given.get('resample', 2)),
        'scale': given.get('rescale_factor', 1 / 255) if given.get('do_rescale', True) else 1.0,
        'mean': tuple(mean),
        'std': tuple(std),
    }


def _sides(given: Any) -> tuple[int, ...]:
    """Return height and width, or the shorter side alone."""
    if isinstance(given, int):
        return (given, given)
    if isinstance(given, Mapping):
        if given.keys() == {'height', 'width'}:
            return (given['height'], given['width'])
        if given.keys() == {'shortest_edge'}:
            return (given['shortest_edge'],)
    elif len(given) == 2:
        return tuple(given)
    raise ValueError(
        f'the size {given!r}; expected a number, "height" and "width", or "shortest_edge"'
    )
