"""The sets of images that an experiment adapts between, as folders of classes.

One set of images becomes two that share no class, and a third is drawn: digits, which look like
neither.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL.Image

from adapters_jax import files
from adapters_jax.data import image_files, images
from adapters_jax.lazy import Functions

sklearn_datasets, selection = Functions('sklearn.datasets'), Functions('sklearn.model_selection')

SETS = ('first', 'classes', 'digits')
SIDE, HELD_OUT = 32, 3  # pixels of a side; classes that the first set has not


def write_sets(source: str, directory: Path) -> dict[str, Path]:
    """Write the sets as folders, unless they are there, and return them by name.

    Raises:
        FileNotFoundError, ValueError: a source that is no set of images with train and test.
    """
    sets = {name: directory / name for name in SETS}
    if all(folder.is_dir() for folder in sets.values()):
        return sets
    rows = images.read({'dir': source, 'split_fractions': (0.0, 0.0)})
    if not {'train', 'test'} <= rows.keys():
        raise ValueError(
            f'--images={source} has the splits {", ".join(rows)}; expected train, test'
        )
    labels = sorted(set(rows['train']['label']))
    of = {label: 'classes' if label in labels[-HELD_OUT:] else 'first' for label in labels}
    for name in ('first', 'classes'):
        with files.atomic(sets[name]) as temporary:
            for split in ('train', 'test'):
                own = (row for row in rows[split] if of[row['label']] == name)
                _write(temporary / split, ((r['label'], '.jpg', images.content(r)) for r in own))
    with files.atomic(sets['digits']) as temporary:
        _write_digits(temporary)
    return sets


def _write(folder: Path, rows: Iterable[tuple[str, str, bytes]]) -> None:
    """Write images as files, in a folder for each class."""
    for number, (label, suffix, content) in enumerate(rows):
        path = folder / label / f'{number:05}{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _write_digits(folder: Path) -> None:
    """Write scikit-learn's digits, of which a fifth of each kind is for the test."""
    pixels, labels = sklearn_datasets.load_digits(return_X_y=True)
    parts = selection.train_test_split(
        pixels.reshape(-1, 8, 8), labels, test_size=0.2, stratify=labels, random_state=0
    )
    for split, grey, kinds in zip(('train', 'test'), parts[:2], parts[2:], strict=True):
        for number, (image, kind) in enumerate(zip(grey, kinds, strict=True)):
            path = folder / split / str(kind) / f'{number:05}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn = PIL.Image.fromarray(np.minimum(image * 16, 255).astype(np.uint8))
            drawn.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC).save(path)


def count(folder: Path) -> tuple[list[int], int]:
    """Return how many images a set has to train and to test, and how many classes."""
    found = image_files.named_splits({'dir': str(folder)})
    sizes = [len(found[split].images) for split in ('train', 'test')]
    return sizes, len(found['train'].first_folders)
