"""A data set as one .npz file, and as arrays in memory."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnlib.datasets.base import FileSpec
from cnnlib.datasets.folder import fingerprint
from cnnlib.datasets.specs import AnySpec, FolderSpec
from cnnlib.errors import ConfigError, DataError
from cnnlib.files import read_arrays
from cnnlib.levels import Level, are_sound, level_of

Bytes = NDArray[np.uint8]

ARRAYS = {"train_images": 4, "train_labels": 1, "test_images": 4, "test_labels": 1}
"""Array of bytes -> its number of dimensions."""


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
    class_names: tuple[str, ...] = ()
    """What the classes are called, in the order of their labels; empty: by their numbers."""
    validation_images: Bytes = field(default_factory=lambda: np.zeros((0, 0, 0, 0), np.uint8))
    """(M, channels, height, width): training images that were left out, to be watched."""
    validation_labels: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))

    @property
    def has_validation(self) -> bool:
        """Whether training images were left out to be watched."""
        return len(self.validation_labels) > 0

    def name_of(self, label: int, otherwise: str | None = None) -> str:
        """What a class is called; where it has no name `otherwise`, or its number."""
        if self.class_names:
            return self.class_names[label]
        return str(label) if otherwise is None else otherwise


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


def load(name: str, path: Path | str, spec: AnySpec) -> Dataset:
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


def problem(name: str, path: Path | str, spec: AnySpec) -> str:
    """Why `path` does not hold the data set of this specification; "" if it does.

    Pictures that were added or changed since are a reason; that they are gone is none.
    """
    try:
        _read(name, Path(path), spec)
        if isinstance(spec, FolderSpec):
            then = read_arrays(path, ["pictures"], f"data set '{name}'")["pictures"]
            if (now := fingerprint(spec)) and now != str(then):
                return f"{path} was made of other pictures than are in {spec.path} now"
    except DataError as error:
        return str(error)
    return ""


def how_to_make(name: str, path: Path | str, spec: AnySpec) -> str:
    """The commands that make `path`, with the files of the data set in a folder beside it."""
    place = f"--dataset {name} --folder {Path(path).with_suffix('')}"
    commands = [f"`python -m cnnlib prepare {place} --out {path}`"]
    if isinstance(spec, FileSpec):
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


def _read(name: str, path: Path, spec: AnySpec) -> Dataset:
    """The data set in `path`; DataError if it is damaged or of another specification."""
    what = f"data set '{name}'"
    given = (("validation_images", 4), ("validation_labels", 1)) if spec.validation else ()
    dimensions = {**ARRAYS, **dict(given)}
    numbers = ("classes", "mean", "deviation")
    more = ("specification", "digest", "class_names")
    found = read_arrays(path, [*dimensions, *numbers], what, more)

    def check(right: bool, what: str) -> None:
        if not right:
            raise DataError(f"{path} does not hold data set '{name}': {what}")

    for key, expected in dimensions.items():
        array = found[key]
        check(
            array.dtype == np.uint8 and array.ndim == expected,
            f"{key} is {array.dtype} of {array.ndim} dimensions, expected uint8 of {expected}",
        )
    classes, mean, deviation = found["classes"], found["mean"], found["deviation"]
    check(classes.dtype == np.int64 and classes.ndim == 0, f"classes is {classes.dtype}")
    check(classes == spec.classes, f"it has {classes} classes, the config says {spec.classes}")
    levels = (spec.shape[0],) if spec.per_channel else ()
    check(
        all(level.dtype == np.float64 and level.shape == levels for level in (mean, deviation))
        and are_sound(level_of(mean), level_of(deviation)),
        "its mean or deviation is no number" + (" of each channel" if spec.per_channel else ""),
    )
    parts = {"train": spec.train_count, "test": spec.test_count}
    for part, wanted in (parts | ({"validation": None} if spec.validation else {})).items():
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
        check(int(labels.max()) < spec.classes, f"a {part} label is {labels.max()}")
    if str(found.get("digest", "")) != spec.digest():
        raise DataError(
            f"{path} was made by another specification than datasets.{name}"
            + _difference(str(found.get("specification", "")), spec)
        )
    names = spec.class_names or found.get("class_names", np.array([], str)).reshape(-1).tolist()
    check(len(names) in (0, spec.classes), f"it has {len(names)} names of classes")
    return Dataset(
        name,
        found["train_images"],
        found["train_labels"],
        found["test_images"],
        found["test_labels"],
        spec.classes,
        level_of(mean),
        level_of(deviation),
        tuple(map(str, names)),
        found.get("validation_images", found["train_images"][:0]),
        found.get("validation_labels", found["train_labels"][:0]),
    )


def _difference(found: str, spec: AnySpec) -> str:
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
