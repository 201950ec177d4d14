"""Fully connected layer."""

import math

import numpy as np
from pydantic import Field

from cnnlib.layers.base import Array, Layer, Shape, Views, like


class Dense(Layer):
    """target[u] = bias[u] + sum over n of weight[u, n] source[n]; maps are read in C order.

    weight (U, N), bias (U,), N the number of elements of the source.
    """

    kind = "dense"
    shorthand = "units"

    units: int = Field(gt=0, lt=2**31)
    """Elements of the target."""

    def output_shape(self, shape: Shape) -> Shape:
        return (self.units,)

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return {"weight": (self.units, math.prod(shape)), "bias": (self.units,)}

    def fan_in(self, shape: Shape) -> int:
        return math.prod(shape)

    def fan_out(self, shape: Shape) -> int:
        return self.units

    def forward_flops(self, shape: Shape) -> int:
        return 2 * self.units * math.prod(shape)

    def forward(self, parameters: Views, source: Array) -> Array:
        target = like(source, (self.units,))
        inputs = source.reshape(-1)
        for u in range(self.units):
            target[u] = np.sum(parameters["weight"][u] * inputs) + parameters["bias"][u]
        return target

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        weight = parameters["weight"]
        inputs = source.reshape(-1)
        source_error = like(source, inputs.shape)
        weight_gradient = like(weight, weight.shape)
        for u in range(self.units):
            weight_gradient[u] = target_error[u] * inputs
            source_error += target_error[u] * weight[u]
        return source_error.reshape(source.shape), {
            "weight": weight_gradient,
            "bias": target_error.copy(),
        }
