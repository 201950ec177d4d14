"""Images and labels as a caller of the library has them, checked and made what engines take."""

from __future__ import annotations  # Sphinx then shows ArrayLike by its name

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cnnlib.config_errors import short
from cnnlib.datasets import mean_and_deviation
from cnnlib.engine import Bytes
from cnnlib.errors import ConfigError
from cnnlib.layers import Array, Shape
from cnnlib.levels import Level

BYTE = 255
"""The largest level of a pixel."""


def as_images(images: ArrayLike, shape: Shape, name: str = "images") -> Bytes:
    """`images` as bytes (N, C, H, W), C-contiguous, for a network that sees images of `shape`.

    They may be (N, H, W) where the network's images have one channel. Whole numbers are levels from
    0 to 255. Floating-point numbers must be from 0 to 1 and become round(255 x): that is exact for
    bytes that were divided by 255, as PyTorch's ToTensor does, and else rounds to 256 levels. Bytes
    are not copied if they are contiguous.

    Raises ConfigError naming the argument, `name`, for anything else.
    """
    array = _array(images, name)
    wanted = f"expected (N, {', '.join(map(str, shape))})"
    if array.ndim == 3 and shape[0] == 1 and array.shape[1:] == shape[1:]:
        array = array[:, None]
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        raise ConfigError(
            f"{name} have shape {array.shape}, {wanted}{_advice(array.shape, shape, name)}"
        )
    return np.ascontiguousarray(_levels(array, name))


def as_labels(labels: ArrayLike, classes: int, count: int, name: str = "labels") -> Bytes:
    """`labels` as bytes (N,): the class of each of `count` images, a whole number below `classes`.

    Raises ConfigError naming the argument, `name`, for anything else.
    """
    array = _array(labels, name)
    if array.shape == (count, classes) and classes > 1:
        raise ConfigError(
            f"{name} have shape {array.shape}, expected ({count},): {name}.argmax(axis=1) makes "
            "class numbers of them"
        )
    if array.ndim != 1:
        advice = f": {name}.ravel() makes it so" if array.shape == (count, 1) else ""
        raise ConfigError(f"{name} have shape {array.shape}, expected (N,){advice}")
    if len(array) != count:
        raise ConfigError(f"there are {count} images, but {len(array)} {name}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(
            f"{name} are {array.dtype}, expected whole numbers{_whole_numbers(array, name)}"
        )
    if count:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            first = int(np.argmax(array == wrong))
            advice = f": {name} - 1 counts from 0" if (low, high) == (1, classes) else ""
            raise ConfigError(
                f"{name}[{first}] is {wrong}, expected a class from 0 to {classes - 1}{advice}"
            )
    return np.ascontiguousarray(array, dtype=np.uint8)


def _whole_numbers(labels: Array, name: str) -> str:
    """What makes whole numbers of labels (N,) that are none, or which of them is none."""
    if labels.dtype.kind not in "fUSO":
        return ""
    try:
        broken = np.flatnonzero(labels.astype(np.float64) % 1 != 0)  # nan and inf leave nan
    except (TypeError, ValueError):  # words
        return f"; np.unique({name}, return_inverse=True)[1] makes class numbers of words"
    if len(broken):
        return f": {name}[{broken[0]}] is {labels[broken[0]]}"
    return f"; {name}.astype(int) makes them so"


def as_parameters(vector: ArrayLike, count: int, name: str = "parameters") -> NDArray[np.floating]:
    """`vector` as a flat vector of `count` finite numbers; ConfigError naming `name` if not."""
    array = _array(vector, name)
    if array.shape != (count,):
        raise ConfigError(
            f"{name} have shape {array.shape}, but the network has {count} parameters: "
            f"expected ({count},)"
        )
    if array.dtype.kind not in "fiu":
        raise ConfigError(f"{name} are {array.dtype}, expected numbers")
    result: NDArray[np.floating] = np.array(
        array, dtype=array.dtype if array.dtype.kind == "f" else np.float64
    )
    if not np.isfinite(result).all():
        raise ConfigError(f"{name} are not all finite")
    return result


def _array(value: ArrayLike, name: str) -> Array:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        # lists of different lengths; a tensor on a GPU
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} are no array: {reason:.100}") from None


def _levels(array: Array, name: str) -> Bytes:
    """The pixels as bytes."""
    if array.dtype == np.uint8:
        return array
    kind = array.dtype.kind
    if kind not in "iuf":
        advice = f": {name} * np.uint8(255)" if kind == "b" else ""
        raise ConfigError(
            f"{name} are {array.dtype}, expected bytes (uint8) or numbers from 0 to 1 (float)"
            f"{advice}"
        )
    if not array.size:
        return array.astype(np.uint8)
    low, high = array.min(), array.max()
    most = 1 if kind == "f" else BYTE
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{name} are not all finite")
    if low < 0 or high > most:
        advice = ""
        if kind == "f" and low >= 0 and high <= BYTE:
            advice = f": {name} / 255, or {name}.astype('uint8') if they are levels up to 255"
        elif kind == "f" and low < 0:
            advice = ": the trainer normalises them itself, by its mean and deviation"
        raise ConfigError(
            f"{name} ({array.dtype}) are from {short(low.item())} to {short(high.item())}, "
            f"expected 0 to {most}{advice}"
        )
    if kind == "f":
        array = array * array.dtype.type(BYTE)
        np.rint(array, out=array)
    return array.astype(np.uint8)


def _advice(given: tuple[int, ...], shape: Shape, name: str) -> str:
    """What makes images of shape `given` fit, if that is clear."""
    if given == shape or (shape[0] == 1 and given == shape[1:]):
        return f": {name}[None] is a batch of one"
    if len(shape) == 3 and given[1:] == (*shape[1:], shape[0]):
        return f": {name}.transpose(0, 3, 1, 2) puts channels first"
    if len(given) == 2 and given[1] == math.prod(shape):
        return f": {name}.reshape(-1, {', '.join(map(str, shape))}) makes images of rows"
    return ""


def normalisation_of(images: Bytes) -> tuple[Level, Level]:
    """(mean, deviation) of images (N, C, H, W): numbers of one channel, or tuples of several.

    Raises ConfigError where all pixels of a channel are the same, so that it has no deviation.
    """
    levels = [mean_and_deviation(images[:, channel]) for channel in range(images.shape[1])]
    for channel, (mean, deviation) in enumerate(levels):
        if deviation == 0:
            where = f" of channel {channel}" if len(levels) > 1 else ""
            raise ConfigError(
                f"images cannot be learnt: all their pixels{where} are {mean:g}"
                + ("; give mean and deviation" if len(levels) > 1 else "")
            )
    if len(levels) == 1:
        return levels[0]
    means, deviations = zip(*levels, strict=True)
    return means, deviations
