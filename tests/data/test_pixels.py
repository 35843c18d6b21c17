"""Pixels against the image processors of transformers, which read the same settings."""

import io
import json

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest
import transformers

from adapters_jax.data.pixels import Preparation

SIZES = [(40, 30), (24, 24), (17, 61), (24, 90)]
PROCESSORS = {
    'vit': transformers.ViTImageProcessor(size={'height': 24, 'width': 24}),
    'deit': transformers.DeiTImageProcessor(
        size={'height': 28, 'width': 28}, crop_size={'height': 24, 'width': 24}
    ),
    'shortest': transformers.CLIPImageProcessor(size={'shortest_edge': 24}, crop_size=24),
    'nearest': transformers.ViTImageProcessor(
        size={'height': 24, 'width': 24}, resample=0, image_mean=[0.1, 0.2, 0.3]
    ),
    'unscaled': transformers.ViTImageProcessor(
        size={'height': 24, 'width': 24}, do_rescale=False, do_normalize=False
    ),
}


def picture(size, seed=0, mode='RGB'):
    """An image with smooth parts, edges and noise, as files have them."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    large = PIL.Image.fromarray(coarse).resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(large) + rng.normal(0, 20, (*size, 3)), 0, 255)
    return PIL.Image.fromarray(noisy.astype(np.uint8)).convert(mode)


def content(image, kind='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize('kind', ['PNG', 'JPEG'])
@pytest.mark.parametrize('name', PROCESSORS)
def test_pixels_are_those_of_transformers(name, kind, tmp_path):
    PROCESSORS[name].save_pretrained(tmp_path)
    ours = Preparation.of((24, 24), 3, tmp_path)
    for seed, size in enumerate(SIZES):
        given = content(picture(size, seed), kind)
        read = PIL.Image.open(io.BytesIO(given))
        expected = PROCESSORS[name](read, return_tensors='np')['pixel_values'][0]
        found = ours.normalise(ours(given))
        assert found.dtype == np.float32 and expected.std() > 0.1
        atol = 1e-4 if name == 'unscaled' else 2e-6
        np.testing.assert_allclose(found.transpose(2, 0, 1), expected, atol=atol, rtol=0)


def test_without_the_file_it_is_what_vit_has(tmp_path):
    given = content(picture((40, 30)))
    expected = PROCESSORS['vit'](picture((40, 30)), return_tensors='np')['pixel_values'][0]
    for directory in (None, tmp_path):
        ours = Preparation.of((24, 24), 3, directory)
        np.testing.assert_allclose(
            ours.normalise(ours(given)).transpose(2, 0, 1), expected, atol=2e-6, rtol=0
        )


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', 'CMYK', '1', 'LA'])
def test_every_kind_of_colours_becomes_three_channels_or_one(mode):
    image = picture((24, 24), mode=mode)
    given = content(image, 'TIFF')
    expected = image.convert('RGBA').convert('RGB') if mode in ('P', 'LA') else image.convert('RGB')
    np.testing.assert_array_equal(Preparation((24, 24))(given), np.asarray(expected))
    grey = Preparation((24, 24), 1, mean=(0.5,), std=(0.5,))
    assert grey(given).shape == (24, 24, 1)


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'WEBP'])
@pytest.mark.parametrize('orientation', range(10))
def test_an_image_is_turned_upright(orientation, kind):
    image = picture((24, 24))
    exif = image.getexif()
    exif[0x0112] = orientation
    lossless = {'lossless': True} if kind == 'WEBP' else {}
    given = content(image, kind, exif=exif, **lossless)
    expected = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(given)))
    np.testing.assert_array_equal(Preparation((24, 24))(given), np.asarray(expected))
    if orientation == 6:  # to be turned right by a quarter
        np.testing.assert_array_equal(expected, np.rot90(np.asarray(image), 3))


def test_an_image_whose_camera_wrote_nonsense_is_turned_upright():
    # Orientation 6, and a resolution that is a word.
    entries = b'\x01\x12\0\3\0\0\0\1\0\6\0\0' + b'\x01\x1a\0\2\0\0\0\3hi\0\0'
    exif = b'Exif\0\0MM\0*\0\0\0\x08\0\2' + entries + bytes(4)
    image = picture((24, 24))
    found = Preparation((24, 24))(content(image, exif=exif))
    np.testing.assert_array_equal(found, np.rot90(np.asarray(image), 3))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        (b'', 'cannot be read as an image'),
        (b'no image', r'cannot be read as an image \(of no format that is known\)'),
        (content(picture((24, 24)), 'JPEG')[:300], 'cannot be read as an image'),
        (content(picture((24, 24)))[:-300], 'cannot be read as an image'),
        (content(PIL.Image.new('I;16', (24, 24))), 'more than 8 bits a channel'),
        (content(picture((23, 24))), 'is 23 x 24 pixels, but the backbone takes 24 x 24'),
        (content(picture((24, 25))), 'is 24 x 25 pixels, but the backbone takes 24 x 24'),
    ],
)
def test_what_is_no_such_image_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Preparation((24, 24))(given)


@pytest.mark.skipif(not PIL.features.check('avif'), reason='this Pillow reads no AVIF')
def test_a_damaged_avif_file_is_refused():
    whole = content(picture((24, 24)), 'AVIF')
    assert Preparation((24, 24))(whole).shape == (24, 24, 3)
    with pytest.raises(ValueError, match='cannot be read as an image'):
        Preparation((24, 24))(whole.replace(b'av01', b'none'))


def test_a_damaged_tiff_file_is_refused():
    whole = content(picture((24, 24)), 'TIFF')
    offsets = b'\x11\x01\x04\0'  # where the pixels begin, as whole numbers
    with pytest.raises(ValueError, match='cannot be read as an image'):
        Preparation((24, 24))(whole.replace(offsets, b'\x11\x01\x0b\0'))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'size': {'height': 30, 'width': 24}}, 'images of 30 x 24 pixels.*image_size 24 x 24'),
        ({'size': {'longest_edge': 24}}, "the size {'longest_edge': 24}; expected a number"),
        ({'image_std': [0.5, 0.0, 0.5]}, 'expected no zeros'),
        ({'image_mean': [0.5]}, r'image_mean is \[0.5\]; expected 3 numbers'),
        ({'resample': 9}, 'resample is 9; expected one of 0 to 5'),
    ],
)
def test_settings_that_cannot_be_followed_are_named(change, message, tmp_path):
    PROCESSORS['vit'].save_pretrained(tmp_path)
    path = tmp_path / 'preprocessor_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f'{path} cannot be followed: .*{message}'):
        Preparation.of((24, 24), 3, tmp_path)
    path.write_text('{')
    with pytest.raises(ValueError, match='cannot be followed'):
        Preparation.of((24, 24), 3, tmp_path)
