"""Activation functions, element by element.

A function is one entry in FUNCTIONS here, and one in ACTIVATION_FUNCTIONS of kernels/layers.cuh.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from cnnlib.layers.base import Array, Layer, Shape, Views, like


@dataclass(frozen=True)
class Function:
    """A function f and its derivative, for one number and for whole arrays.

    The derivative is written in terms of y = f(x), so that x need not be kept. f must not decrease:
    the fused stages take the maximum of a window before they apply f.
    """

    formula: str
    """f(x) as documents write it."""
    value: Callable[[float], float]
    """f(x) of one number, as the reference computes it; NaN stays NaN."""
    derivative: Callable[[float], float]
    """f'(x) of one number, from y = f(x)."""
    values: Callable[[Array, Array, Array], object]
    """(source, target, slope): writes f of all elements of `source` in `target`, which may be the
    same array. Where `slopes` is None it writes their derivatives in `slope`, too."""
    slopes: Callable[[Array, Array], object] | None
    """(target, slope): writes the derivatives in `slope`, from the elements of `target`."""
    slope_type: type[bool] | None = None
    """The type of the elements of `slope`; None: that of the source's."""
    kink: tuple[float, float] | None = None
    """The derivatives below and above zero, where they differ; None: f is smooth everywhere.

    There rounding decides which of them is taken, and validation allows for both.
    """
    gain: float = 1.0
    """Variance of a unit's output over that of its inputs, with which weights begin.

    1 keeps the variance (LeCun et al. 1998). For relu He et al. 2015 give 2, to make up for the
    half that relu cuts off; but where the maximum of a window is taken nothing is lost that way,
    logits would begin far from 0, and plain gradient descent without warm-up then starts with steps
    that are too long.
    """


def _relu_values(source: Array, target: Array, slope: Array) -> None:
    # A product with the slope keeps NaN, and is faster than np.maximum.
    np.greater(source, 0, out=slope)
    np.multiply(source, slope, out=target)


def _tanh_values(source: Array, target: Array, slope: Array) -> None:
    np.tanh(source, out=target)


def _tanh_slopes(target: Array, slope: Array) -> None:
    np.multiply(target, target, out=slope)
    np.subtract(1, slope, out=slope)


def _sigmoid(x: float) -> float:
    # exp of a large positive number would overflow; the two forms are the same function
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))


def _sigmoid_values(source: Array, target: Array, slope: Array) -> None:
    # sigmoid(x) = (1 + tanh(x / 2)) / 2, which cannot overflow
    np.multiply(source, 0.5, out=target)
    np.tanh(target, out=target)
    np.multiply(target, 0.5, out=target)
    np.add(target, 0.5, out=target)


def _sigmoid_slopes(target: Array, slope: Array) -> None:
    np.subtract(1, target, out=slope)
    np.multiply(slope, target, out=slope)


FUNCTIONS: dict[str, Function] = {
    "relu": Function(
        formula="max(x, 0)",
        value=lambda x: x if x > 0 or math.isnan(x) else 0,
        derivative=lambda y: 1 if y > 0 else 0,
        values=_relu_values,
        slopes=None,
        slope_type=bool,
        kink=(0, 1),
    ),
    "tanh": Function(
        formula="tanh(x)",
        value=math.tanh,
        derivative=lambda y: 1 - y * y,
        values=_tanh_values,
        slopes=_tanh_slopes,
    ),
    "sigmoid": Function(
        formula="1 / (1 + exp(-x))",
        value=_sigmoid,
        derivative=lambda y: y * (1 - y),
        values=_sigmoid_values,
        slopes=_sigmoid_slopes,
    ),
}
"""Name in config.yaml -> function, in the order of kernels/layers.cuh.

:meta hide-value:
"""

if TYPE_CHECKING:
    FunctionName = str
else:
    FunctionName = Literal[tuple(FUNCTIONS)]


class Activation(Layer):
    """target = f(source) for every element, f one of FUNCTIONS."""

    kind = "activation"
    shorthand = "function"

    function: FunctionName = Field(
        description="; ".join(f"{name}: {f.formula}" for name, f in FUNCTIONS.items())
    )
    """The name of f."""

    def output_shape(self, shape: Shape) -> Shape:
        return shape

    def forward(self, parameters: Views, source: Array) -> Array:
        value = FUNCTIONS[self.function].value
        target = like(source, source.shape)
        for position in range(source.size):
            target.flat[position] = value(source.flat[position])
        return target

    def backward(
        self, parameters: Views, source: Array, target: Array, target_error: Array
    ) -> tuple[Array, Views]:
        derivative = FUNCTIONS[self.function].derivative
        source_error = like(source, source.shape)
        for position in range(source.size):
            slope = derivative(target.flat[position])
            source_error.flat[position] = target_error.flat[position] * slope
        return source_error, {}


def enumerator_of(layers: Iterable[Layer]) -> str:
    """The enumerator of kernels/layers.cuh for the activation among `layers`, if there is one."""
    names = (layer.function.upper() for layer in layers if isinstance(layer, Activation))
    return next(names, "IDENTITY")
