"""Reads a data set of any kind from its files: images and labels, checked against the settings."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnlib.datasets.base import FileSpec
from cnnlib.datasets.cifar import parse_cifar
from cnnlib.datasets.contents import Contents
from cnnlib.datasets.folder import find_pictures, read_pictures
from cnnlib.datasets.idx import parse_idx
from cnnlib.datasets.npz import images_of, labels_of, named
from cnnlib.datasets.sources import DataFile
from cnnlib.datasets.specs import AnySpec, CifarSpec, FolderSpec, IdxSpec, NpzSpec
from cnnlib.datasets.synthetic import synthetic
from cnnlib.errors import DataError
from cnnlib.files import arrays_in

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) and their labels (N,), all bytes."""

    images: Bytes
    labels: Bytes


@dataclass(frozen=True)
class Found:
    """A data set as its files have it."""

    train: Images
    test: Images
    class_names: tuple[str, ...] = ()
    """Names that the files give to the classes."""


def read(name: str, spec: AnySpec, folder: Path) -> Found:
    """The data set whose files are in `folder`; made-up images and pictures need none there.

    Raises DataError naming the file that is missing, damaged or not what the settings say.
    """
    if isinstance(spec, FolderSpec):
        pictures = find_pictures(name, spec)
        train, test = (Images(*read_pictures(p, spec)) for p in (pictures.train, pictures.test))
        return Found(train, test, pictures.class_names)
    if not isinstance(spec, FileSpec):
        train_images, train_labels, test_images, test_labels = synthetic(spec)
        return Found(Images(train_images, train_labels), Images(test_images, test_labels))
    reader = _Reader(name, spec, Contents(name, spec, folder))
    parts = (("train", spec.train_limit), ("test", spec.test_limit))
    train, test = (reader.read(part, limit) for part, limit in parts)
    return Found(train, test)


class _Reader:
    """Reads the training or the test images of a data set that comes as files."""

    def __init__(self, name: str, spec: FileSpec, contents: Contents) -> None:
        self.name, self.spec, self.contents = name, spec, contents
        self._arrays: dict[str, dict[str, NDArray[Any]]] = {}

    def read(self, part: str, limit: int | None) -> Images:
        """The first `limit` images and labels of the part."""
        spec = self.spec
        labels: NDArray[np.integer[Any]]
        if isinstance(spec, IdxSpec):
            images, labels, images_at, labels_at = self._idx(spec, part)
        elif isinstance(spec, NpzSpec):
            images, labels, images_at, labels_at = self._npz(spec, part)
        elif isinstance(spec, CifarSpec):
            images, labels, images_at = self._cifar(spec, part)
            labels_at = images_at
        else:
            raise TypeError(f"{spec!r} is of no kind that is known here")
        if images.shape[1:] != spec.shape:
            raise DataError(
                f"{images_at} holds images of {images.shape[1:]}, expected {spec.shape}"
            )
        if len(images) != len(labels):
            raise DataError(
                f"{images_at} holds {len(images)} images, but {labels_at} {len(labels)} labels"
            )
        if len(images) == 0:
            raise DataError(f"{images_at} holds no images")
        if limit is not None and limit > len(images):
            raise DataError(
                f"datasets.{self.name}.{part}_limit is {limit}, but {images_at} holds "
                f"{len(images)} images"
            )
        labels = self._from_zero(labels, labels_at)
        return Images(np.ascontiguousarray(images[:limit]), labels[:limit])

    def _from_zero(self, labels: NDArray[np.integer], where: str) -> Bytes:
        """Labels from 0 on, as bytes; DataError for one that is no class."""
        first, end = self.spec.first_label, self.spec.first_label + self.spec.classes
        if labels.min() < first:
            raise DataError(
                f"{where}: label {labels.min()} of image {labels.argmin()} is below {first}, the "
                "first label"
            )
        if labels.max() >= end:
            why = "the number of classes" if not first else "the first label and all classes"
            raise DataError(
                f"{where}: label {labels.max()} of image {labels.argmax()} is not below {end}, "
                f"{why}"
            )
        return (labels - first).astype(np.uint8)

    def _idx(self, spec: IdxSpec, part: str) -> tuple[Bytes, Bytes, str, str]:
        files: tuple[DataFile, DataFile] = (
            getattr(spec.files, f"{part}_images"),
            getattr(spec.files, f"{part}_labels"),
        )
        where = [self.contents.where(file) for file in files]
        found = [
            parse_idx(self.contents.read(file), place)
            for file, place in zip(files, where, strict=True)
        ]
        for file in files:
            self.contents.check(file)
        images, labels = found
        if images.ndim == 3:
            images = images[:, None]
        if spec.transpose and images.ndim == 4:
            images = images.transpose(0, 1, 3, 2)
        if labels.ndim != 1:
            raise DataError(f"{where[1]} has {labels.ndim} dimensions, labels have 1")
        return images, labels, where[0], where[1]

    def _npz(self, spec: NpzSpec, part: str) -> tuple[Bytes, NDArray[np.integer], str, str]:
        images, images_at = self._array(spec, f"{part}_images")
        labels, labels_at = self._array(spec, f"{part}_labels")
        images_ready = images_of(images, spec, images_at)
        return images_ready, labels_of(labels, labels_at), images_at, labels_at

    def _array(self, spec: NpzSpec, role: str) -> tuple[NDArray[Any], str]:
        """The array that plays this role, and where it was found."""
        names, wanted = named(spec, role)
        for file in spec.files:
            if file.name in names and wanted in self._arrays_of(file):
                found = f"{self.contents.where(file)}: array {wanted!r}"
                return self._arrays[file.name][wanted], found
        known = dict.fromkeys(key for name in names for key in self._arrays.get(name, {}))
        raise DataError(
            f"{' and '.join(names)}: no array {wanted!r}, which datasets.{self.name}.arrays.{role} "
            f"names; known: {', '.join(known) or 'none'}"
        )

    def _arrays_of(self, file: DataFile) -> dict[str, NDArray[Any]]:
        """All arrays of an .npz file; each file is read once."""
        if file.name not in self._arrays:
            where = self.contents.where(file)
            data = self.contents.read(file)
            found = arrays_in(io.BytesIO(data), where, None, "an .npz file")
            self.contents.check(file)
            self._arrays[file.name] = found
        return self._arrays[file.name]

    def _cifar(self, spec: CifarSpec, part: str) -> tuple[Bytes, Bytes, str]:
        files: list[DataFile] = getattr(spec.files, part)
        images, labels = [], []
        for file in files:
            where = self.contents.where(file)
            data = self.contents.read(file)
            some_images, some_labels = parse_cifar(data, spec.shape, spec.label_bytes, where)
            self.contents.check(file)
            self._from_zero(some_labels, where)  # so that the file is named
            images.append(some_images)
            labels.append(some_labels)
        where = self.contents.where(files[0])
        if len(files) > 1:
            where += f" and {len(files) - 1} more"
        return np.concatenate(images), np.concatenate(labels), where
