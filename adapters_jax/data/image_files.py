"""Where the images of a set lie: in folders, or in a tar file that is read in place.

An image is named by the way from the root of its split to it; the first folder on that way is its
class, unless a pattern finds the class in the name. Files that are no images by their endings are
passed over, and counted in the log.
"""

import logging
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from adapters_jax.data import folders

SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.gif', '.webp', '.avif', '.jp2')
SUFFIXES += ('.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.pnm')

_LOG = logging.getLogger(__name__)


class File(NamedTuple):
    """An image: its name below a root, and the bytes of which file hold it (size -1: all).

    `shown` says where it is, for people.
    """

    name: PurePosixPath
    shown: str
    path: str
    start: int = 0
    size: int = -1


class Listing(NamedTuple):
    """The images below a root, and the folders there, which may be empty."""

    root: str
    images: list[File]
    directories: list[PurePosixPath]

    @property
    def first_folders(self) -> set[str]:
        """The folders at the root."""
        deep = [image.name for image in self.images if len(image.name.parts) > 1]
        return {name.parts[0] for name in (*deep, *self.directories)}

    def inside(self, folder: str) -> 'Listing':
        """Return what is in one of the folders at the root."""
        images = [f._replace(name=_below(f.name)) for f in self.images if f.name.parts[0] == folder]
        own = [d for d in self.directories if d.parts[0] == folder and len(d.parts) > 1]
        return Listing(f'{self.root}/{folder}', images, [_below(directory) for directory in own])


def _below(name: PurePosixPath) -> PurePosixPath:
    return PurePosixPath(*name.parts[1:])


def listing(root: Path) -> Listing:
    """Return what is in a folder or a tar file.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: a file that is no tar file, or a compressed one.
    """
    if root.is_dir():
        return _in_folder(root)
    if not root.is_file():
        raise FileNotFoundError(
            f'there is no folder or tar file {root}; {folders.content(root.parent)}'
        )
    try:
        with tarfile.open(root, 'r:') as archive:
            return _in_tar(root, archive)
    except tarfile.ReadError as error:
        raise ValueError(
            f'{root} cannot be read as a tar file ({error}); expected one that is not compressed, '
            'because images are read in place, or a folder'
        ) from error


def _in_folder(root: Path) -> Listing:
    below = [(path, PurePosixPath(path.relative_to(root).as_posix())) for path in _entries(root)]
    seen = sorted((name, path) for path, name in below if not _hidden(name))
    images = [
        File(name, str(path), str(path))
        for name, path in seen
        if _is_image(name) and path.is_file()
    ]
    directories = [name for name, path in seen if path.is_dir()]
    lost = [n for n, path in seen if _is_image(n) and path.is_symlink() and not path.exists()]
    _tell_passed_over(root, {name for name, _ in seen}.difference(directories), lost)
    return Listing(str(root), images, directories)


def _entries(folder: Path, above: Set[Path] = frozenset()) -> Iterator[Path]:
    """Yield what is in a folder and below it, also by way of links, save those that lead back."""
    above = above | {folder.resolve()}
    try:
        inside = list(folder.iterdir())
    except PermissionError:  # such as the lost+found of a disk
        return
    for path in inside:
        yield path
        if path.is_dir() and path.resolve() not in above:
            yield from _entries(path, above)


def _in_tar(root: Path, archive: tarfile.TarFile) -> Listing:
    # A later member takes the place of an earlier one of its name, as where a tar file is unpacked.
    members = {PurePosixPath(member.name): member for member in archive}
    seen = {name: members[name] for name in sorted(members) if name.parts and not _hidden(name)}
    files = {name: _file_of(member, members) for name, member in seen.items() if _is_image(name)}
    images = [
        File(name, f'{root}:{name}', str(root), member.offset_data, member.size)
        for name, member in files.items()
        if member is not None
    ]
    directories = [name for name, member in seen.items() if member.isdir()]
    links = {name for name, member in seen.items() if member.issym() or member.islnk()}
    lost = [name for name, member in files.items() if member is None and name in links]
    _tell_passed_over(root, seen.keys() - set(directories), lost)
    return Listing(str(root), images, directories)


def _file_of(
    member: tarfile.TarInfo | None, members: Mapping[PurePosixPath, tarfile.TarInfo]
) -> tarfile.TarInfo | None:
    """Return the file that a member is, or leads to as a link within the tar file."""
    followed: set[str] = set()
    while member is not None and not member.isreg():
        if member.name in followed or not (member.issym() or member.islnk()):
            return None
        followed.add(member.name)
        # Of links of the file system's own kind tar tells the way from the root.
        folder = posixpath.dirname(member.name) if member.issym() else ''
        target = posixpath.normpath(posixpath.join(folder, member.linkname))
        member = members.get(PurePosixPath(target))
    return member


def _tell_passed_over(root: Path, names: Set[PurePosixPath], lost: Sequence[PurePosixPath]) -> None:
    """Log how many files are no images, and how many links to images are `lost`."""
    if lost:
        _LOG.warning(
            '%s: %d links to images lead to no file and are passed over, such as %s.',
            *(root, len(lost), lost[0]),
        )
    endings = Counter(name.suffix.lower() or 'none' for name in names if not _is_image(name))
    if endings:
        shown = ', '.join(f'{count} {ending}' for ending, count in endings.most_common(5))
        _LOG.warning(
            '%s: %d files are passed over, whose endings are not those of images (%s).',
            *(root, endings.total(), shown),
        )


def _hidden(name: PurePosixPath) -> bool:
    """Whether it is a file of some system, such as .DS_Store and what macOS puts beside files."""
    return any(part.startswith('.') or part == '__MACOSX' for part in name.parts)


def _is_image(name: PurePosixPath) -> bool:
    return name.suffix.lower() in SUFFIXES


def splits_in(whole: Listing) -> dict[str, Listing]:
    """Return the splits of a set: its folders train, validation (dev, valid, val) and test.

    Where there is none of these, everything is for training. One folder around all is looked into.
    """
    at = whole.first_folders
    if len(at) == 1 and not at & _names() and whole.inside(*at).first_folders & _names():
        whole = whole.inside(*at)
        at = whole.first_folders
    found = {
        split: [whole.inside(name) for name in sorted(at) if name.lower() in names]
        for split, names in folders.SPLITS.items()
    }
    if not any(found.values()):
        return {'train': whole}
    _refuse_classes_beside(whole, at)
    for split, several in found.items():
        if len(several) > 1:
            raise ValueError(
                f'{whole.root} has several folders for {split}: '
                f'{", ".join(one.root for one in several)}; keep one of them, or name it in '
                f'data.{split}'
            )
    return {split: one for split, several in found.items() for one in several}


def _refuse_classes_beside(whole: Listing, at: Set[str]) -> None:
    """Raises ValueError where other folders beside those of splits hold images, as classes do."""
    splits = {name for name in at if name.lower() in _names()}
    others = sorted(name for name in at - splits if whole.inside(name).images)
    if others:
        raise ValueError(
            f'{whole.root} has folders of splits ({", ".join(sorted(splits))}) beside others that '
            f'hold images ({", ".join(others)}); if all are classes, put them into a folder '
            f"'train', else move the others away or name each split's folder in data.train, "
            'data.validation and data.test'
        )


def _names() -> set[str]:
    return {name for names in folders.SPLITS.values() for name in names}


def classes_of(found: Listing, pattern: str, labelled: bool) -> list[str] | None:
    """Return the class of each image; None where no image has one and none is needed.

    `pattern` is a regular expression whose group is the class; empty: the first folder.

    Raises:
        ValueError: no images, a class without images, or an image without a class.
    """
    if not found.images:
        raise ValueError(f'{found.root} holds no images (files ending in {", ".join(SUFFIXES)})')
    if pattern:
        return _by_pattern(found, pattern)
    images, empty = found.images, found.first_folders - {f.name.parts[0] for f in found.images}
    if empty:
        raise ValueError(
            f'{found.root}/{min(empty)} holds no images, though a folder is a class; put images '
            'there, or remove it'
        )
    without = [image for image in images if len(image.name.parts) == 1]
    if len(without) == len(images) and not labelled:
        return None
    if without:
        raise ValueError(
            f'{without[0].shown} lies in no folder, which would be its class; put each image into '
            "the folder of its class, or set data.class_pattern, such as '([a-z]+)_'"
        )
    return [image.name.parts[0] for image in images]


def _by_pattern(found: Listing, pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f'data.class_pattern is {pattern!r}, which is no regular expression: {error}'
        ) from error
    if compiled.groups != 1:
        raise ValueError(f'data.class_pattern is {pattern!r}; expected one group, around the class')
    return [_matched(compiled, image) for image in found.images]


def _matched(pattern: re.Pattern[str], image: File) -> str:
    match = pattern.search(image.name.as_posix())
    if not match or not match[1]:
        raise ValueError(
            f'data.class_pattern {pattern.pattern!r} finds no class in {image.name.as_posix()!r} '
            f'({image.shown})'
        )
    return match[1]


def select_root(given: str, key: str, base: Path) -> Listing:
    """Return the listing of one split's own folder or tar file.

    Raises:
        ValueError: it holds several splits itself.
    """
    found = listing(base / Path(given).expanduser())
    if len(splits := splits_in(found)) > 1 or 'train' not in splits:
        raise ValueError(
            f'data.{key}: {found.root} holds the splits {", ".join(splits)}; give it as data.dir'
        )
    return splits['train']


def named_splits(data: dict[str, str]) -> dict[str, Listing]:
    """Return the splits that a config's section `data` names, by `dir` or one by one.

    Raises:
        FileNotFoundError, ValueError: with one sentence on what to change.
    """
    base = Path(data.get('dir') or '.').expanduser()
    given: Sequence[str] = [split for split in folders.SPLITS if data.get(split)]
    if given:
        return {split: select_root(data[split], split, base) for split in given}
    return splits_in(listing(base))
