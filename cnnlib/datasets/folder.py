"""A folder of labelled pictures: train/CLASS/* and test/CLASS/*."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cnnlib.datasets.base import MOST_CLASSES
from cnnlib.datasets.specs import FolderSpec
from cnnlib.errors import DataError
from cnnlib.files import sha256

Bytes = NDArray[np.uint8]

NO_PICTURES = ("Thumbs.db", "desktop.ini")
"""Files that programs leave beside pictures; those whose names begin with a dot are passed over."""


@dataclass(frozen=True)
class Pictures:
    """Where the pictures of a data set lie, checked but not yet opened."""

    class_names: tuple[str, ...]
    """In the order of their labels."""
    train: tuple[tuple[Path, int], ...]
    """(file, label) of each training picture: one of each class in turn, by name within it."""
    test: tuple[tuple[Path, int], ...]


def find_pictures(name: str, spec: FolderSpec) -> Pictures:
    """The pictures of data set `name` by their folders.

    Classes are sorted by name, unless class_names gives them an order. Raises DataError for a
    folder that is missing, a class without pictures, one that only the test pictures have, another
    number of classes than the settings say, and a file where there should be none.
    """
    root = Path(spec.path).expanduser()
    train, test = root / spec.train, root / spec.test
    found = {part: find_classes(part) for part in (train, test)}
    names = tuple(sorted(found[train]))
    if extra := sorted(set(found[test]) - set(names)):
        raise DataError(f"{test / extra[0]} is a class that {train} lacks: it cannot be learnt")
    if lacking := sorted(set(names) - set(found[test])):
        raise DataError(f"{test} has no folder {lacking[0]!r}, a class of {train}")
    if len(names) > MOST_CLASSES:
        raise DataError(f"{train} has {len(names)} classes: at most {MOST_CLASSES}, in a byte")
    if spec.class_names:
        if unknown := sorted(set(names) ^ set(spec.class_names)):
            where = f"no folder of {train}" if unknown[0] in spec.class_names else "not among them"
            raise DataError(f"datasets.{name}.class_names: {unknown[0]!r} is {where}")
        names = tuple(spec.class_names)
    if len(names) != spec.classes:
        raise DataError(
            f"{train} has {len(names)} folders of classes ({_few(names)}), but "
            f"datasets.{name}.classes is {spec.classes}"
        )
    return Pictures(names, _in_turn(found[train], names), _in_turn(found[test], names))


def read_pictures(files: tuple[tuple[Path, int], ...], spec: FolderSpec) -> tuple[Bytes, Bytes]:
    """(images (N, C, H, W), labels (N,)), in the order of `files`.

    Raises DataError naming the first picture that is damaged or, unless they are resized, of
    another size.
    """
    images = np.empty((len(files), *spec.shape), np.uint8)
    labels = np.array([label for _, label in files], np.uint8)
    for image, (path, _) in zip(images, files, strict=True):
        image[...] = read_picture(path, spec.shape, spec.resize)
    return images, labels


def read_picture(path: Path, shape: tuple[int, int, int], resize: str | None) -> Bytes:
    """One picture as (C, H, W): grey for one channel, colours for three.

    Transparency is left out. `resize` is FolderSpec.resize.
    """
    # Imported here, because reading a config should not wait for it.
    from PIL import Image, ImageOps

    from cnnlib.pictures import open_picture

    channels, height, width = shape
    picture = open_picture(path, ("L",) if channels == 1 else ("RGB",))
    if picture.size != (width, height):
        if resize is None:
            raise DataError(
                f"{path} has {picture.width}x{picture.height} pixels, not {width}x{height}; "
                "`resize: stretch` or `resize: crop` accepts other sizes"
            )
        if resize == "crop":
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        else:
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def checksum(folder: Path, parts: tuple[str, str]) -> str:
    """SHA-256 of all pictures below the two parts of `folder` with their paths.

    Raises DataError as `find_pictures` does, and if one cannot be read.
    """
    whole = hashlib.sha256()
    for part in parts:
        for class_name, paths in sorted(find_classes(folder / part).items()):
            for path in paths:
                whole.update(f"{part}/{class_name}/{path.name}\0".encode())
                try:
                    whole.update(f"{sha256(path)}\n".encode())
                except OSError as error:
                    raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return whole.hexdigest()


def fingerprint(spec: FolderSpec) -> str:
    """A digest of names, sizes and times of the pictures, without opening one: it changes when they
    do. "" where there is none.
    """
    whole = hashlib.sha256()
    root = Path(spec.path).expanduser()
    if not root.is_dir():
        return ""
    for part in (spec.train, spec.test):
        for folder, _, names in sorted(os.walk(root / part)):
            for name in sorted(names):
                path = Path(folder, name)
                try:
                    found = path.stat()
                except OSError:
                    return ""
                where = path.relative_to(root)
                whole.update(f"{where}\0{found.st_size} {found.st_mtime_ns}\n".encode())
    return whole.hexdigest()


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """Class -> its pictures by name; DataError for anything else in the folder."""
    found: dict[str, list[Path]] = {}
    for entry in _entries(folder):
        if not entry.is_dir():
            raise DataError(f"{entry} is no folder: {folder} holds one folder for each class")
        found[entry.name] = _entries(entry)
        if not found[entry.name]:
            raise DataError(f"class {entry.name!r} has no pictures: {entry} is empty")
        for path in found[entry.name]:
            if path.is_dir():
                raise DataError(f"{path} is a folder: {entry} holds the pictures of one class")
    if not found:
        raise DataError(f"{folder} is empty: it holds one folder for each class")
    return found


def _entries(folder: Path) -> list[Path]:
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror or error}") from None
    return [path for path in paths if path.name[0] != "." and path.name not in NO_PICTURES]


def _in_turn(found: dict[str, list[Path]], names: tuple[str, ...]) -> tuple[tuple[Path, int], ...]:
    """The first picture of each class, then the second ones: the first images of the set are of all
    classes.
    """

    def each() -> Iterator[tuple[Path, int]]:
        for paths in zip_longest(*(found[name] for name in names)):
            yield from ((path, label) for label, path in enumerate(paths) if path is not None)

    return tuple(each())


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])}, ..."
