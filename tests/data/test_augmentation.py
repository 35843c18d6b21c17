"""Views of images: what they may be, and that they follow from seed, epoch and image alone."""

import numpy as np
import pytest

from adapters_jax.data.augmentation import AUGMENTATIONS, augment

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(1, 256, (6, 1, 16, 24, 3), dtype=np.uint8)
EXAMPLES = np.array([[4], [7], [0], [-1], [9], [2]], np.int32)


def shifts(image, view):
    """Return the moves (down, right) of the image that give the view."""
    height, width, _ = image.shape
    found = []
    for down in range(-height // 8, height // 8 + 1):
        for right in range(-width // 8, width // 8 + 1):
            padded = np.pad(image, ((2, 2), (3, 3), (0, 0)))
            moved = padded[2 - down : 2 - down + height, 3 - right : 3 - right + width]
            if (moved == view).all():
                found.append((down, right))
    return found


def test_each_view_is_the_image_moved_and_perhaps_mirrored():
    seen, mirrored = set(), 0
    for epoch in range(40):
        views = augment(PIXELS, EXAMPLES, 'crop_flip', 3, epoch)
        assert (views[3] == PIXELS[3]).all()  # no image is there
        for place in np.flatnonzero(EXAMPLES[:, 0] >= 0):
            image, view = PIXELS[place, 0], views[place, 0]
            straight, turned = shifts(image, view), shifts(image, view[:, ::-1])
            assert len(straight) + len(turned) == 1
            seen.update(straight + turned)
            mirrored += len(turned)
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-3, 4)}
    assert 70 <= mirrored <= 130  # of 200


@pytest.mark.parametrize('kind', AUGMENTATIONS)
def test_a_view_follows_from_seed_epoch_and_example(kind):
    views = augment(PIXELS, EXAMPLES, kind, 1, 5)
    assert views.dtype == np.uint8 and not np.shares_memory(views, PIXELS)
    order = np.array([5, 3, 0, 1, 4, 2])
    np.testing.assert_array_equal(augment(PIXELS[order], EXAMPLES[order], kind, 1, 5), views[order])
    for others in ([(1, epoch) for epoch in range(6, 12)], [(seed, 5) for seed in range(2, 8)]):
        same = [(views == augment(PIXELS, EXAMPLES, kind, *when)).all() for when in others]
        assert all(same) if kind == 'none' else sum(same) < 3
    moved = {'none': False, 'flip': True, 'crop': True, 'crop_flip': True}[kind]
    assert (views != PIXELS).any() == moved
    whole = np.sort(views.reshape(6, -1)) == np.sort(PIXELS.reshape(6, -1))
    assert whole.all() == (kind in ('none', 'flip'))
