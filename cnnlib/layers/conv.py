"""Convolution (strictly: cross-correlation, as everywhere in this field)."""

import math

import numpy as np
from pydantic import Field

from cnnlib.layers.base import Array, Layer, Shape, Views, like, window_counts
from cnnlib.layers.pairs import Padding, Size, by


class Conv(Layer):
    """target[m, y, x] = bias[m] + sum over c, i, j of weight[m, c, i, j] padded[c, ys + i, xt + j].

    weight (M, C, I, J), bias (M,); s and t are the strides. `padded` is the source with zeros
    around it. Windows that would overhang the lower or right edge are left out, as in LeCun et al.
    1998 and in every framework.
    """

    kind = "conv"
    shorthand = "maps"
    examples = (
        {"maps": 2, "kernel": 3},
        {"maps": 2, "kernel": 3, "padding": 1},
        {"maps": 2, "kernel": 2, "stride": 2},
        {"maps": 3, "kernel": [3, 2], "stride": [1, 2], "padding": [0, 1]},
    )

    maps: int = Field(gt=0, lt=2**31)
    """Maps of the target, each with weights of its own."""
    kernel: Size
    """Rows and columns of a window; one number for both, or [rows, columns]."""
    stride: Size = (1, 1)
    """Rows and columns from one window to the next; one number for both, or [rows, columns]."""
    padding: Padding = (0, 0)
    """Rows of zeros above and below the map, and columns left and right of it."""

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise ValueError(f"needs maps (channels, height, width), not {shape}")
        _, height, width = shape
        rows, columns = window_counts((height, width), self.kernel, self.stride, self.padding)
        if rows < 1 or columns < 1:
            padded = f" padded by {by(self.padding)}" if any(self.padding) else ""
            raise ValueError(
                f"a {by(self.kernel)} kernel is larger than the {height}x{width} map{padded}"
            )
        return self.maps, rows, columns

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return {"weight": (self.maps, shape[0], *self.kernel), "bias": (self.maps,)}

    def fan_in(self, shape: Shape) -> int:
        return shape[0] * math.prod(self.kernel)

    def fan_out(self, shape: Shape) -> int:
        return self.maps * math.prod(self.kernel)

    def forward_flops(self, shape: Shape) -> int:
        maps, height, width = self.output_shape(shape)
        return 2 * maps * height * width * self.fan_in(shape)

    def forward(self, parameters: Views, source: Array) -> Array:
        weight, bias = parameters["weight"], parameters["bias"]
        padded = self._padded(source)
        target = like(source, self.output_shape(source.shape))
        maps, height, width = target.shape
        for m in range(maps):
            for y in range(height):
                for x in range(width):
                    window = padded[:, *self._window(y, x)]
                    target[m, y, x] = np.sum(window * weight[m]) + bias[m]
        return target

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        weight = parameters["weight"]
        padded = self._padded(source)
        padded_error = like(padded, padded.shape)
        weight_gradient = like(weight, weight.shape)
        bias_gradient = like(weight, (self.maps,))
        maps, height, width = target_error.shape
        for m in range(maps):
            for y in range(height):
                for x in range(width):
                    error = target_error[m, y, x]
                    rows, columns = self._window(y, x)
                    weight_gradient[m] += error * padded[:, rows, columns]
                    padded_error[:, rows, columns] += error * weight[m]
                    bias_gradient[m] += error
        source_error = padded_error[:, *self._inside(source.shape)]
        return source_error, {"weight": weight_gradient, "bias": bias_gradient}

    def _padded(self, source: Array) -> Array:
        """The source with zeros around it; the source itself where there is no padding."""
        if not any(self.padding):
            return source
        above, left = self.padding
        channels, height, width = source.shape
        padded = like(source, (channels, height + 2 * above, width + 2 * left))
        padded[:, *self._inside(source.shape)] = source
        return padded

    def _inside(self, shape: Shape) -> tuple[slice, slice]:
        """Where the source lies within the padded map."""
        (above, left), (_, height, width) = self.padding, shape
        return slice(above, above + height), slice(left, left + width)

    def _window(self, y: int, x: int) -> tuple[slice, slice]:
        """The rows and columns of the padded map that the target's position (y, x) sees."""
        top, left = y * self.stride[0], x * self.stride[1]
        return slice(top, top + self.kernel[0]), slice(left, left + self.kernel[1])
