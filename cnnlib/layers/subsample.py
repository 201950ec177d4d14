"""Subsampling: one value for every window of a map."""

from typing import Literal

import numpy as np
from pydantic import Field

from cnnlib.layers.base import Array, Layer, Shape, Views, like


class Subsample(Layer):
    """target[c, y, x] = max or mean of source[c, y s : y s + s, x s : x s + s], s the size.

    Windows do not overlap and must cover the map. The winner of `max` is the first of equals in
    reading order; it alone receives the error.
    """

    kind = "subsample"
    shorthand = "size"

    size: int = Field(gt=0, lt=2**31)
    """Rows and columns of a window, which must divide the map."""
    method: Literal["max", "mean"] = "max"
    """What becomes of a window."""

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise ValueError(f"needs maps (channels, height, width), not {shape}")
        channels, height, width = shape
        if height % self.size or width % self.size:
            raise ValueError(
                f"windows of {self.size}x{self.size} do not divide the {height}x{width} map"
            )
        return channels, height // self.size, width // self.size

    def forward(self, parameters: Views, source: Array) -> Array:
        target = like(source, self.output_shape(source.shape))
        for c, y, x in np.ndindex(target.shape):
            target[c, y, x] = getattr(self._window(source, c, y, x), self.method)()
        return target

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        source_error = like(source, source.shape)
        for c, y, x in np.ndindex(target.shape):
            error = target_error[c, y, x]
            window = self._window(source_error, c, y, x)
            if self.method == "mean":
                window += error / self.size**2
            else:
                winner = np.argmax(self._window(source, c, y, x))
                window[np.unravel_index(winner, window.shape)] = error
        return source_error, {}

    def _window(self, maps: Array, c: int, y: int, x: int) -> Array:
        s = self.size
        return maps[c, y * s : y * s + s, x * s : x * s + s]
