"""Other views of the same images in each epoch: shifted crops and mirror images (He et al. 2016).

Nothing is drawn in order: what is done to an image is a function of the seed, the epoch and the
image. So a run that goes on sees the same views, whatever the batches, processes and threads.
"""

import numpy as np
from jaxtyping import Int, UInt8

# What each setting does: shift by up to an eighth of a side, and mirror half of the images.
AUGMENTATIONS = {
    'none': (False, False),
    'crop': (True, False),
    'flip': (False, True),
    'crop_flip': (True, True),
}
MARGIN = 8  # of a side of 32 pixels an eighth is 4, as in He et al. (2016, section 4.2)
# Separates this use of the run's seed from every other.
PURPOSE = int.from_bytes(b'view', 'big')


def augment(
    pixels: UInt8[np.ndarray, 'B S H W C'],
    examples: Int[np.ndarray, 'B S'],
    kind: str,
    seed: int,
    epoch: int,
) -> UInt8[np.ndarray, 'B S H W C']:
    """Return views of the images; where `examples` has no number (-1), what was there.

    A shifted image keeps its size; what comes into it from outside is black.
    """
    crops, flips = AUGMENTATIONS[kind]
    views = pixels.copy()
    height, width = pixels.shape[2:4]
    for place in zip(*np.nonzero(examples >= 0), strict=True):
        rng = np.random.default_rng([PURPOSE, seed, epoch, int(examples[place])])
        mirrored, down, right = rng.random(3)
        view = pixels[place]
        if crops:
            view = _shifted(view, _shift(down, height // MARGIN), _shift(right, width // MARGIN))
        views[place] = view[:, ::-1] if flips and mirrored < 0.5 else view
    return views


def _shift(draw: float, most: int) -> int:
    """Return one of -most to most."""
    return int(draw * (2 * most + 1)) - most


def _shifted(image: UInt8[np.ndarray, 'H W C'], down: int, right: int) -> np.ndarray:
    """Return the image moved, with black where nothing comes from."""
    height, width, _ = image.shape
    moved = np.zeros_like(image)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved
