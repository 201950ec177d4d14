"""A data set as one .npz file, and as arrays in memory."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnlib.datasets.idx import read_idx
from cnnlib.datasets.specs import IdxFile, IdxSpec, SyntheticSpec
from cnnlib.datasets.synthetic import Bytes, synthetic
from cnnlib.errors import ConfigError, DataError
from cnnlib.files import read_arrays, sha256, write_whole
from cnnlib.levels import Level


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, with mean and standard deviation of the training pixels, 0 to 255.

    Both are one number for all channels, or one of each.
    """

    name: str
    train_images: Bytes
    """(N, channels, height, width) uint8."""
    train_labels: Bytes
    """(N,) uint8, each below `classes`."""
    test_images: Bytes
    test_labels: Bytes
    classes: int
    mean: Level
    deviation: Level


NOISE_TESTS = 16
"""Test images of a data set of noise."""


def noise(name: str, shape: tuple[int, ...], classes: int, count: int) -> Dataset:
    """Random pixels and labels, `count` to train on, for checks that need no real images."""
    random = np.random.default_rng(0)
    total = count + NOISE_TESTS
    images = random.integers(0, 256, (total, *shape), dtype=np.uint8)
    labels = random.integers(0, min(classes, 256), total, dtype=np.uint8)
    mean, deviation = 127.5, 73.9  # of bytes that are equally likely
    return Dataset(
        name,
        images[:count],
        labels[:count],
        images[count:],
        labels[count:],
        classes,
        mean,
        deviation,
    )


def prepare(
    name: str, spec: IdxSpec | SyntheticSpec, folder: Path | str, target: Path | str
) -> None:
    """Check the data set in `folder` and write it as the .npz file `target`, whole or not at all.

    The same data give the same bytes. Synthetic data are made here, and `folder` is ignored.
    Raises DataError naming the file that is missing, damaged or not what the settings say.
    """
    if isinstance(spec, SyntheticSpec):
        train_images, train_labels, test_images, test_labels = synthetic(spec)
    else:
        files, folder = spec.files, Path(folder)
        train_images, train_labels = _read_pair(
            name,
            spec,
            folder,
            files.train_images,
            files.train_labels,
            spec.train_limit,
            f"datasets.{name}.train_limit",
        )
        test_images, test_labels = _read_pair(
            name,
            spec,
            folder,
            files.test_images,
            files.test_labels,
            spec.test_limit,
            f"datasets.{name}.test_limit",
        )
    check_hard_images(name, spec.hard_images, len(test_images))
    mean, deviation = mean_and_deviation(train_images)
    if deviation == 0:
        raise DataError(f"data set '{name}' cannot be learnt: all its training pixels are {mean:g}")
    # The file is not compressed: every measurement loads it, and MNIST takes 55 MB.
    with write_whole(target) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
            classes=np.int64(spec.classes),
            mean=np.float64(mean),
            deviation=np.float64(deviation),
            specification=spec.specification(),
            digest=spec.digest(),
        )


def load(name: str, path: Path | str, spec: IdxSpec | SyntheticSpec) -> Dataset:
    """Read what `prepare` wrote.

    Raises DataError naming `path`, and how to make it, if it is damaged or of another specification
    than `spec`; ConfigError for a hard image that it does not have.
    """
    try:
        found = _read(name, Path(path), spec)
    except DataError as error:
        raise DataError(f"{error}; {how_to_make(name, path, spec)}") from None
    check_hard_images(name, spec.hard_images, len(found.test_labels))
    return found


def problem(name: str, path: Path | str, spec: IdxSpec | SyntheticSpec) -> str:
    """Why `path` does not hold the data set of this specification; "" if it does."""
    try:
        _read(name, Path(path), spec)
    except DataError as error:
        return str(error)
    return ""


def how_to_make(name: str, path: Path | str, spec: IdxSpec | SyntheticSpec) -> str:
    """The commands that make `path`, with the files of the data set in a folder beside it."""
    place = f"--dataset {name} --folder {Path(path).with_suffix('')}"
    commands = [f"`python -m cnnlib prepare {place} --out {path}`"]
    if isinstance(spec, IdxSpec):
        commands.insert(0, f"`python -m cnnlib download {place}`")
    return f"prepare it again, with the same config, by {' and '.join(commands)}"


def check_hard_images(name: str, indices: Sequence[int], count: int, key: str = "") -> None:
    """ConfigError for an index of datasets.NAME.hard_images beyond its `count` test images.

    `key` names the setting that limits the test images, if one does.
    """
    for index in indices:
        if index >= count:
            why = f", by datasets.{name}.{key}" if key else ""
            raise ConfigError(
                f"datasets.{name}.hard_images: there is no test image {index}, since the data set "
                f"has {count}{why}"
            )


def _read(name: str, path: Path, spec: IdxSpec | SyntheticSpec) -> Dataset:
    """The data set in `path`; DataError if it is damaged or of another specification."""
    kinds = {
        "train_images": (np.uint8, 4),
        "train_labels": (np.uint8, 1),
        "test_images": (np.uint8, 4),
        "test_labels": (np.uint8, 1),
        "classes": (np.int64, 0),
        "mean": (np.float64, 0),
        "deviation": (np.float64, 0),
    }
    found = read_arrays(path, kinds, f"data set '{name}'", ("specification", "digest"))

    def check(right: bool, what: str) -> None:
        if not right:
            raise DataError(f"{path} does not hold data set '{name}': {what}")

    for key, (dtype, dimensions) in kinds.items():
        array = found[key]
        check(
            array.dtype == dtype and array.ndim == dimensions,
            f"{key} is {array.dtype} of {array.ndim} dimensions, "
            f"expected {np.dtype(dtype)} of {dimensions}",
        )
    classes, mean, deviation = (found[key].item() for key in ("classes", "mean", "deviation"))
    check(classes == spec.classes, f"it has {classes} classes, the config says {spec.classes}")
    check(math.isfinite(mean) and 0 < deviation < math.inf, "its mean or deviation is no number")
    for part, wanted in (("train", spec.train_count), ("test", spec.test_count)):
        images, labels = found[f"{part}_images"], found[f"{part}_labels"]
        shape = images.shape[1:]
        check(shape == spec.shape, f"its {part} images are {shape}, the config says {spec.shape}")
        check(len(images) > 0, f"it has no {part} images")
        check(
            len(images) == len(labels),
            f"it has {len(images)} {part} images and {len(labels)} labels",
        )
        check(
            wanted is None or len(images) == wanted,
            f"it has {len(images)} {part} images, the config says {wanted}",
        )
        check(int(labels.max()) < classes, f"a {part} label is {labels.max()}")
    if str(found.get("digest", "")) != spec.digest():
        raise DataError(
            f"{path} was made by another specification than datasets.{name}"
            + _difference(str(found.get("specification", "")), spec)
        )
    return Dataset(
        name,
        found["train_images"],
        found["train_labels"],
        found["test_images"],
        found["test_labels"],
        classes,
        mean,
        deviation,
    )


def _difference(found: str, spec: IdxSpec | SyntheticSpec) -> str:
    """The first setting in which two specifications differ, with both values."""
    try:
        given = _settings(json.loads(found))
    except (ValueError, RecursionError):
        return ""
    wanted = _settings(json.loads(spec.specification()))
    for key in dict.fromkeys([*wanted, *given]):
        if given.get(key) != wanted.get(key):
            return f": {key} is {given.get(key)!s:.70} in it, {wanted.get(key)!s:.70} in the config"
    return ""


def _settings(value: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by their full keys, such as files.train_images.sha256."""
    if not isinstance(value, dict):
        return {key: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _settings(inner, f"{key}.{name}" if key else name)
    return found


def _read_pair(
    name: str,
    spec: IdxSpec,
    folder: Path,
    image_file: IdxFile,
    label_file: IdxFile,
    limit: int | None,
    key: str,
) -> tuple[Bytes, Bytes]:
    """The first `limit` images (N, C, H, W) and labels (N,) of two IDX files, checked."""
    image_path, label_path = folder / image_file.name, folder / label_file.name
    fetched = f"`python -m cnnlib download --dataset {name} --folder {folder}` fetches it"
    for path in (image_path, label_path):
        if not path.exists():
            raise DataError(f"cannot read {path}: No such file or directory; {fetched}")
    images, labels = read_idx(image_path), read_idx(label_path)
    for path, file in ((image_path, image_file), (label_path, label_file)):
        if (found := sha256(path)) != file.sha256:
            raise DataError(f"{path} has SHA-256 {found}, expected {file.sha256}; {fetched}")
    if images.ndim == 3:
        images = images[:, None]
    if images.shape[1:] != spec.shape:
        raise DataError(f"{image_path} holds images of {images.shape[1:]}, expected {spec.shape}")
    if labels.ndim != 1:
        raise DataError(f"{label_path} has {labels.ndim} dimensions, labels have 1")
    if len(images) != len(labels):
        raise DataError(
            f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels"
        )
    if len(images) == 0:
        raise DataError(f"{image_path} holds no images")
    if labels.max() >= spec.classes:
        raise DataError(
            f"{label_path}: label {labels.max()} of image {labels.argmax()} is not below "
            f"{spec.classes}, the number of classes"
        )
    if limit is not None and limit > len(images):
        raise DataError(f"{key} is {limit}, but {image_path} holds {len(images)} images")
    return np.ascontiguousarray(images[:limit]), labels[:limit]


def mean_and_deviation(images: Bytes) -> tuple[float, float]:
    """Mean and (population) standard deviation of all pixels, from exact integer sums."""
    counts = np.zeros(256, np.int64)
    flat = images.reshape(-1)
    for start in range(0, flat.size, 1 << 20):  # bincount makes 8 bytes of each
        counts += np.bincount(flat[start : start + (1 << 20)], minlength=256)
    values = [int(count) for count in counts]
    total = sum(values)
    first = sum(value * count for value, count in enumerate(values))
    second = sum(value * value * count for value, count in enumerate(values))
    # total² variance = total Σx² - (Σx)²: integers, so nothing cancels.
    return first / total, math.sqrt(total * second - first * first) / total
