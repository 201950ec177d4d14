"""Makes one checked .npz file of a data set's files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnlib.datasets.folder import checksum, fingerprint
from cnnlib.datasets.reading import Images, read
from cnnlib.datasets.specs import AnySpec, FolderSpec
from cnnlib.datasets.split import held_out
from cnnlib.datasets.store import check_hard_images
from cnnlib.errors import DataError
from cnnlib.files import write_whole

Bytes = NDArray[np.uint8]
Levels = NDArray[np.float64]


def prepare(name: str, spec: AnySpec, folder: Path | str, target: Path | str) -> None:
    """Check the data set in `folder` and write it as the .npz file `target`, whole or not at all.

    The same data give the same bytes. Synthetic data are made here, pictures are read from where
    they lie, and `folder` is ignored for both. Raises DataError naming the file that is missing,
    damaged or not what the settings say.
    """
    if isinstance(spec, FolderSpec) and spec.sha256 is not None:
        found_sum = checksum(Path(spec.path).expanduser(), (spec.train, spec.test))
        if found_sum != spec.sha256:
            raise DataError(
                f"the pictures in {spec.path} have SHA-256 {found_sum}, expected {spec.sha256}"
            )
    found = read(name, spec, Path(folder))
    train, validation = _split(name, spec, found.train)
    check_hard_images(name, spec.hard_images, len(found.test.labels))
    means, deviations = _levels(name, spec, train.images)
    more: dict[str, NDArray[Any]] = {}
    if spec.validation is not None:
        more = {"validation_images": validation.images, "validation_labels": validation.labels}
    if isinstance(spec, FolderSpec):
        more["class_names"] = np.array(found.class_names)
        more["pictures"] = np.array(fingerprint(spec))
    # The file is not compressed: every measurement loads it, and MNIST takes 55 MB.
    with write_whole(target) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            train_images=train.images,
            train_labels=train.labels,
            test_images=found.test.images,
            test_labels=found.test.labels,
            classes=np.int64(spec.classes),
            mean=means,
            deviation=deviations,
            specification=spec.specification(),
            digest=spec.digest(),
            allow_pickle=False,
            **more,
        )


def _split(name: str, spec: AnySpec, train: Images) -> tuple[Images, Images]:
    """(images to train on, images to watch instead)."""
    total = len(train.labels)
    count = spec.validation_count(total)
    if count >= total:
        raise DataError(
            f"datasets.{name}.validation is {spec.validation}, and there are {total} training "
            "images: none is left to train on"
        )
    if spec.validation is None:
        return train, Images(train.images[:0], train.labels[:0])
    if not count:
        raise DataError(
            f"datasets.{name}.validation is {spec.validation}: of {total} training images that is "
            "none"
        )
    mask = held_out(train.labels, count, spec.validation_seed)
    return tuple(  # type: ignore[return-value]
        Images(train.images[part], train.labels[part]) for part in (~mask, mask)
    )


def _levels(name: str, spec: AnySpec, images: Bytes) -> tuple[Levels, Levels]:
    """Mean and deviation of the pixels: arrays without dimensions, or (C,) for those of channels.

    DataError where all pixels are the same.
    """
    if not spec.per_channel:
        mean, deviation = mean_and_deviation(images)
        if deviation == 0:
            raise DataError(
                f"data set '{name}' cannot be learnt: all its training pixels are {mean:g}"
            )
        return np.array(mean), np.array(deviation)
    levels = [mean_and_deviation(images[:, channel]) for channel in range(images.shape[1])]
    for channel, (mean, deviation) in enumerate(levels):
        if deviation == 0:
            raise DataError(
                f"data set '{name}' has {mean:g} in all training pixels of channel {channel}, "
                f"which has no deviation of its own; `normalise: all` of datasets.{name} takes one "
                "of all channels"
            )
    both = np.array(levels)
    return both[:, 0], both[:, 1]


def mean_and_deviation(images: Bytes) -> tuple[float, float]:
    """Mean and (population) standard deviation of all pixels, from exact integer sums."""
    counts = np.zeros(256, np.int64)
    for start in range(0, len(images), 256):  # bincount makes 8 bytes of each pixel
        counts += np.bincount(images[start : start + 256].reshape(-1), minlength=256)
    values = [int(count) for count in counts]
    total = sum(values)
    first = sum(value * count for value, count in enumerate(values))
    second = sum(value * value * count for value, count in enumerate(values))
    # total² variance = total Σx² - (Σx)²: integers, so nothing cancels.
    return first / total, math.sqrt(total * second - first * first) / total
