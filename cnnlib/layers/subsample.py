"""Subsampling: one value for every window of a map."""

import math
from typing import Literal

import numpy as np
from pydantic import model_validator

from cnnlib.layers.base import Array, Layer, Shape, Views, like, window_counts
from cnnlib.layers.pairs import Padding, Pair, Size, by


class Subsample(Layer):
    """target[c, y, x] = max or mean of the window of source[c] that begins at row ys, column xt.

    s and t are the strides; without any, windows lie side by side. Windows may overlap, and those
    that would overhang the lower or right edge are left out. The winner of `max` is the first of
    equals in reading order; it alone receives the window's error. Elements of the padding never win
    a max, and they count as zeros in a mean (as in PyTorch, whose count_include_pad is true).
    """

    kind = "subsample"
    shorthand = "size"
    examples = tuple(
        settings | {"method": method}
        for settings in (
            {"size": 2},
            {"size": 3, "stride": 2},
            {"size": [2, 3], "stride": [2, 1], "padding": [1, 0]},
        )
        for method in ("max", "mean")
    )

    size: Size
    """Rows and columns of a window; one number for both, or [rows, columns]."""
    stride: Size | None = None
    """Rows and columns from one window to the next; the window's size if not given."""
    padding: Padding = (0, 0)
    """Rows above and below the map, and columns left and right of it, that windows may reach into:
    at most half of a window, so that each one has an element of the map."""
    method: Literal["max", "mean"] = "max"
    """What becomes of a window."""

    @model_validator(mode="after")
    def _windows_meet_the_map(self) -> "Subsample":
        if any(2 * p > s for p, s in zip(self.padding, self.size, strict=True)):
            raise ValueError(
                f"a padding of {by(self.padding)} is more than half of a {by(self.size)} window"
            )
        return self

    @property
    def strides(self) -> Pair:
        """Rows and columns from one window to the next."""
        return self.size if self.stride is None else self.stride

    @property
    def overlaps(self) -> bool:
        """Whether neighbouring windows share elements."""
        return any(step < size for step, size in zip(self.strides, self.size, strict=True))

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise ValueError(f"needs maps (channels, height, width), not {shape}")
        channels, height, width = shape
        rows, columns = window_counts((height, width), self.size, self.strides, self.padding)
        if rows < 1 or columns < 1:
            raise ValueError(
                f"a window of {by(self.size)} is larger than the {height}x{width} map"
                + (f" padded by {by(self.padding)}" if any(self.padding) else "")
            )
        return channels, rows, columns

    def forward(self, parameters: Views, source: Array) -> Array:
        target = like(source, self.output_shape(source.shape))
        for c, y, x in np.ndindex(target.shape):
            window = self._window(source, c, y, x)
            if self.method == "max":
                target[c, y, x] = window.max()
            else:
                target[c, y, x] = window.sum() / math.prod(self.size)
        return target

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        source_error = like(source, source.shape)
        for c, y, x in np.ndindex(target.shape):
            error = target_error[c, y, x]
            window = self._window(source_error, c, y, x)
            if self.method == "mean":
                window += error / math.prod(self.size)
            else:
                winner = np.argmax(self._window(source, c, y, x))
                window[np.unravel_index(winner, window.shape)] += error
        return source_error, {}

    def _window(self, maps: Array, c: int, y: int, x: int) -> Array:
        """The elements of the map in a window, without those of the padding."""
        top = y * self.strides[0] - self.padding[0]
        left = x * self.strides[1] - self.padding[1]
        rows = slice(max(top, 0), top + self.size[0])
        columns = slice(max(left, 0), left + self.size[1])
        return maps[c, rows, columns]
