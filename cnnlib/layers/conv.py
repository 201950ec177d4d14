"""Convolution (strictly: cross-correlation, as everywhere in this field), without padding."""

import numpy as np
from pydantic import Field

from cnnlib.layers.base import Array, Layer, Shape, Views, like, window_count


class Conv(Layer):
    """target[m, y, x] = bias[m] + sum over c, i, j of weight[m, c, i, j] source[c, ys + i, xs + j].

    weight (M, C, K, K), bias (M,), s the stride. Windows that would overhang the lower or right
    edge are left out, as in LeCun et al. 1998 and in every framework.
    """

    kind = "conv"
    shorthand = "maps"

    maps: int = Field(gt=0, lt=2**31)
    """Maps of the target, each with weights of its own."""
    kernel: int = Field(gt=0, lt=2**31)
    """Rows and columns of a window."""
    stride: int = Field(default=1, gt=0, lt=2**31)
    """Rows or columns from one window to the next."""

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 3:
            raise ValueError(f"needs maps (channels, height, width), not {shape}")
        _, height, width = shape
        if self.kernel > min(height, width):
            raise ValueError(
                f"a {self.kernel}x{self.kernel} kernel is larger than the {height}x{width} map"
            )
        return (
            self.maps,
            window_count(height, self.kernel, self.stride),
            window_count(width, self.kernel, self.stride),
        )

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return {"weight": (self.maps, shape[0], self.kernel, self.kernel), "bias": (self.maps,)}

    def fan_in(self, shape: Shape) -> int:
        return shape[0] * self.kernel**2

    def forward_flops(self, shape: Shape) -> int:
        maps, height, width = self.output_shape(shape)
        return 2 * maps * height * width * self.fan_in(shape)

    def forward(self, parameters: Views, source: Array) -> Array:
        weight, bias = parameters["weight"], parameters["bias"]
        k, s = self.kernel, self.stride
        target = like(source, self.output_shape(source.shape))
        maps, height, width = target.shape
        for m in range(maps):
            for y in range(height):
                for x in range(width):
                    window = source[:, y * s : y * s + k, x * s : x * s + k]
                    target[m, y, x] = np.sum(window * weight[m]) + bias[m]
        return target

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        weight = parameters["weight"]
        k, s = self.kernel, self.stride
        source_error = like(source, source.shape)
        weight_gradient = like(weight, weight.shape)
        bias_gradient = like(weight, (self.maps,))
        maps, height, width = target_error.shape
        for m in range(maps):
            for y in range(height):
                for x in range(width):
                    error = target_error[m, y, x]
                    rows, columns = slice(y * s, y * s + k), slice(x * s, x * s + k)
                    weight_gradient[m] += error * source[:, rows, columns]
                    source_error[:, rows, columns] += error * weight[m]
                    bias_gradient[m] += error
        return source_error, {"weight": weight_gradient, "bias": bias_gradient}
