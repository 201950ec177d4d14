"""Activation functions, element by element."""

import math
from typing import Literal

from cnnlib.layers.base import Array, Layer, Shape, Views, like


class Activation(Layer):
    """target = f(source), f one of relu, tanh, sigmoid.

    Each derivative is written in terms of the target, so that the source need not be kept:
    relu 1 where target > 0 (and 0 at 0), tanh 1 - target^2, sigmoid target (1 - target).
    """

    kind = "activation"
    shorthand = "function"

    function: Literal["relu", "tanh", "sigmoid"]
    """max(x, 0), tanh(x), or 1 / (1 + exp(-x))."""

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def value(self, x: float) -> float:
        """f(x) of one number."""
        if self.function == "relu":
            return x if x > 0 or math.isnan(x) else 0
        if self.function == "tanh":
            return math.tanh(x)
        # exp of a large positive number would overflow; the two forms are the same function
        return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))

    def derivative(self, y: float) -> float:
        """f'(x) of one number, from y = f(x)."""
        if self.function == "relu":
            return 1 if y > 0 else 0
        if self.function == "tanh":
            return 1 - y * y
        return y * (1 - y)

    def forward(self, parameters: Views, source: Array) -> Array:
        target = like(source, source.shape)
        for position in range(source.size):
            target.flat[position] = self.value(source.flat[position])
        return target

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        source_error = like(source, source.shape)
        for position in range(source.size):
            slope = self.derivative(target.flat[position])
            source_error.flat[position] = target_error.flat[position] * slope
        return source_error, {}
