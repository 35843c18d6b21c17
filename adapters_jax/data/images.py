"""Images with a class as rows, from folders, tar files and image data sets, and as pixels on disk.

A row says where an image is and what its bytes are (a digest); the image itself is read when it is
needed. Decoded once, all of a split are one array, mapped from a file (`data/stored.py`), so that
a set need not fit in memory.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from jaxtyping import Int64, UInt8

from adapters_jax.data import columns, image_files, sources
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.image_files import File
from adapters_jax.data.pixels import Preparation
from adapters_jax.data.stored import Stored, remembered

PIXELS = 'pixels'  # the column of images, [N, H, W, C]
FORMAT = 1  # raised whenever the same images would be stored as other numbers
BATCH = 256  # images read at a time
NAMES = ('image', 'img', 'picture', 'photo')  # what columns of images are called

Rows = datasets.Dataset


def read(data: Mapping[str, Any]) -> dict[str, Rows]:
    """Read the splits that the config's section `data` names.

    Rows have `image` (where it is, for people), `digest`, `label` (where there is one), and either
    `path`, `start` and `size`, or `data` (bytes or a path, as `datasets` keeps images).

    Raises:
        ValueError, FileNotFoundError: with one sentence on what to change.
    """
    source = sources.source_of(data)
    if source not in ('hub', 'files'):
        raise ValueError(
            f'data names a set of texts ({data.get("name") or data.get("glue")!r}), but the task '
            'is of images; set data.dir to a folder or a tar file, or data.name to a set of images'
        )
    if source == 'hub':
        found = sources.from_hub(data, functools.partial(_of_hub, data))
    else:
        pattern = data.get('class_pattern') or ''
        listings = image_files.named_splits(data)
        found = {k: _of_files(k, listing, pattern) for k, listing in listings.items()}
    return sources.finish(found, data, same_image)


def same_image(rows: Rows) -> Int64[np.ndarray, ' N']:
    """Return a number for each row: rows of the same bytes share it."""
    return np.unique(np.array(rows['digest'][:]), return_inverse=True)[1].astype(np.int64)


def _of_files(split: str, found: image_files.Listing, pattern: str) -> Rows:
    labels = image_files.classes_of(found, pattern, labelled=split != 'test')
    rows = of_files(found.images)
    rows = rows.add_column('digest', _digests(rows))
    return rows if labels is None else rows.add_column('label', labels)


def of_files(files: Sequence[File]) -> Rows:
    """Return rows of image files, without digests and labels."""
    return datasets.Dataset.from_dict(
        {
            'image': [file.shown for file in files],
            'path': [file.path for file in files],
            'start': [file.start for file in files],
            'size': [file.size for file in files],
        }
    )


def _of_hub(data: Mapping[str, Any], rows: Rows, labelled: bool, where: str) -> Rows:
    """Return the rows of a data set with a column of images."""
    column = _image_column(data, rows, where)
    label = _label_column(data, rows, labelled, where)
    place = functools.partial('{}, row {}'.format, where)
    kept = rows.cast_column(column, datasets.Image(decode=False))
    kept = kept.select_columns([column]).rename_column(column, 'data')
    kept = kept.add_column('image', [place(i) for i in range(len(rows))])
    kept = kept.add_column('digest', _digests(kept))
    if label is None:
        return kept
    values, feature = rows[label][:], rows.features[label]
    if isinstance(feature, datasets.ClassLabel):
        values = [None if i in (None, -1) else feature.int2str(i) for i in values]
    if not labelled and (columns.are_hidden(values) or all(value is None for value in values)):
        return kept
    names = [columns.class_name(value, i, place) for i, value in enumerate(values)]
    return kept.add_column('label', names)


def _image_column(data: Mapping[str, Any], rows: Rows, where: str) -> str:
    given = (data.get('columns') or {}).get('text_a')
    typed = [name for name, f in rows.features.items() if isinstance(f, datasets.Image)]
    found = [given] if given else typed if len(typed) == 1 else [n for n in NAMES if n in typed]
    if len(found) != 1 or found[0] not in typed:
        raise ValueError(
            f'{where} has the columns of images {typed}, and data.columns.text_a is {given!r}; '
            'expected one, or the name of one of them'
        )
    return found[0]


def _label_column(data: Mapping[str, Any], rows: Rows, labelled: bool, where: str) -> str | None:
    given = (data.get('columns') or {}).get('label')
    found = [given] if given else [name for name in columns.LABELS if name in rows.column_names]
    if len(found) == 1 and found[0] in rows.column_names:
        return found[0]
    if not labelled and len(found) < 2:
        return None
    raise ValueError(
        f'{where}: the label is one of {found or rows.column_names}; name its column in '
        'data.columns.label'
    )


def content(row: Mapping[str, Any]) -> bytes:
    """Return the bytes of a row's image.

    Raises:
        ValueError: it has none, as rows of a data set may.
    """
    held = row.get('data') or {}
    if held.get('bytes') is not None:
        return held['bytes']
    path = held.get('path') or row.get('path')
    if path is None:
        raise ValueError(f'{row["image"]} has no image; remove the row, or give it one')
    with Path(path).open('rb') as file:
        file.seek(row.get('start') or 0)
        return file.read(row.get('size', -1))


def _mapped(function: Callable[[Mapping[str, Any]], Any], rows: Rows) -> Iterator[Any]:
    """Yield what a function makes of each row, computed by several threads, a part at a time."""
    with ThreadPoolExecutor(min(16, (os.cpu_count() or 1) + 4)) as pool:
        for begin in range(0, len(rows), BATCH):
            yield from pool.map(function, rows.select(range(begin, min(begin + BATCH, len(rows)))))


def _digests(rows: Rows) -> list[str]:
    return list(_mapped(lambda row: hashlib.sha256(content(row)).hexdigest(), rows))


def encode(
    rows: Rows,
    preparation: Preparation,
    label_ids: Callable[[Sequence[Any]], np.ndarray],
    cache_dir: str | os.PathLike | None = None,
) -> Encoded:
    """Decode the images of a split into the column 'pixels', uint8 [N, H, W, C].

    label_ids: turns the column of labels, where there is one, into an array [N]. cache_dir: where
    the pixels are kept between runs; None: in memory only. Each example counts as one token.
    Raises ValueError where an image cannot be read, naming it, and DiskError where the disk is
    full.
    """
    # The labels first: images take long, and a class that is none is soon found.
    labels = {'label': label_ids(rows['label'][:])} if 'label' in rows.column_names else {}
    shape = (len(rows), *preparation.size, preparation.channels)
    fill = functools.partial(_fill, rows, preparation)
    of = _identity(rows, preparation) if 'digest' in rows.column_names else {}
    name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    if cache_dir is None:
        pixels = np.empty(shape, np.uint8)
        fill(pixels)
    else:
        directory = Path(cache_dir) / f'{PIXELS}-{name[:32]}'
        stored = Stored(directory, shape, np.dtype(np.uint8), of)
        pixels = remembered(stored, fill, 'the cache of images')
    known = {PIXELS: name} if of else {}
    return Encoded({}, np.arange(len(rows) + 1), {PIXELS: pixels} | labels, known=known)


def _fill(rows: Rows, preparation: Preparation, array: UInt8[np.ndarray, 'N H W C']) -> None:
    def prepare(row: Mapping[str, Any]) -> np.ndarray:
        try:
            return preparation(content(row))
        except (ValueError, OSError) as error:
            raise ValueError(f'{row["image"]} {error}; replace or remove it') from error

    for i, pixels in enumerate(_mapped(prepare, rows)):
        array[i] = pixels


def _identity(rows: Rows, preparation: Preparation) -> dict[str, Any]:
    """Return what decides the pixels: the images' bytes, and what is done to them once."""
    digest = hashlib.sha256('\n'.join(rows['digest'][:]).encode()).hexdigest()
    once = ('size', 'channels', 'resize', 'resample')
    settings = {key: getattr(preparation, key) for key in once}
    return {'format': FORMAT, 'images': digest} | json.loads(json.dumps(settings))
