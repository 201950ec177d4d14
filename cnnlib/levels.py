"""How bytes become numbers: (byte - mean) / deviation, of all channels or of each one."""

import numpy as np
from numpy.typing import DTypeLike, NDArray

Level = float | tuple[float, ...]
"""A mean or a deviation of bytes: one for all channels, or one of each channel."""


def level_of(array: NDArray[np.generic]) -> Level:
    """What an array without dimensions, or of one number for each channel, says.

    Raises ValueError for any other array.
    """
    values = np.asarray(array, np.float64)
    if values.ndim > 1:
        raise ValueError(f"a mean or a deviation has at most one dimension, not {values.ndim}")
    return tuple(values.tolist()) if values.ndim else values.item()


def are_sound(mean: Level, deviation: Level) -> bool:
    """Whether both are finite, and no deviation is 0 or less."""
    return bool(np.isfinite(mean).all() and np.isfinite(deviation).all() and np.min(deviation) > 0)


def for_maps(level: Level, dtype: DTypeLike) -> NDArray[np.floating]:
    """The level as an array of `dtype` that broadcasts against maps (..., C, H, W).

    It has no dimension where one number serves all channels, and is (C, 1, 1) otherwise. Maps
    stored as (H, C, W, N) have their channels in the same place from the end.
    """
    values: NDArray[np.floating] = np.asarray(level, dtype)
    return values.reshape(-1, 1, 1) if values.ndim else values


def channels_of(shape: tuple[int, ...]) -> int:
    """How many channels an image of this shape has: C of (C, H, W); a vector has one."""
    return shape[0] if len(shape) == 3 else 1


def of_channels(level: Level, channels: int) -> NDArray[np.float64]:
    """The level of each of so many channels, (channels,).

    Raises ValueError if it has another number of them.
    """
    return np.broadcast_to(np.asarray(level, np.float64), (channels,))


def first_of(level: Level) -> float:
    """The level of the first channel."""
    return level[0] if isinstance(level, tuple) else float(level)
