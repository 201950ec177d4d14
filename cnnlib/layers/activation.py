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

LEAK = 0.01
"""The slope of a leaky relu below zero (Maas, Hannun and Ng 2013; PyTorch's default)."""
TANH_SCALE = 1.7159
TANH_RATE = 2 / 3
"""f(x) = A tanh(S x) of LeCun et al. 1998, appendix A: with these f(1) is 1 and f(-1) is -1."""


@dataclass(frozen=True)
class Function:
    """A function f and its derivative, for one number and for whole arrays.

    Most functions do not decrease, and have a derivative that is known from y = f(x) alone, so that
    x need not be kept. `from_target` says whether this is one of them; stages that fuse layers fuse
    these alone, because they take the maximum of a window before they apply f.
    """

    formula: str
    """f(x) as documents write it."""
    value: Callable[[float], float]
    """f(x) of one number, as the reference computes it; NaN stays NaN."""
    derivative: Callable[[float, float], float]
    """f'(x) of one number, from x and y = f(x); where `from_target` holds it reads y alone."""
    values: Callable[[Array, Array, Array], object]
    """(source, target, slope): writes f of all elements of `source` in `target`, which may be the
    same array. Where `slopes` is None it writes their derivatives in `slope`, too."""
    slopes: Callable[[Array, Array], object] | None
    """(target, slope): writes the derivatives in `slope`, from the elements of `target`."""
    from_target: bool = True
    """Whether f does not decrease, and its derivative is known from y alone."""
    slope_type: type[bool] | None = None
    """The type of the elements of `slope`; None: that of the source's."""
    kink: tuple[float, float] | None = None
    """The derivatives below and above zero, where they differ; None: f is smooth everywhere.

    There rounding decides which of them is taken, and validation allows for both.
    """


def _relu_values(source: Array, target: Array, slope: Array) -> None:
    # A product with the slope keeps NaN, and is faster than np.maximum.
    np.greater(source, 0, out=slope)
    np.multiply(source, slope, out=target)


def _leaky_relu_values(source: Array, target: Array, slope: Array) -> None:
    np.multiply(source, LEAK, out=slope)
    np.maximum(source, slope, out=target)


def _leaky_relu_slopes(target: Array, slope: Array) -> None:
    np.greater(target, 0, out=slope)
    np.multiply(slope, 1 - LEAK, out=slope)
    np.add(slope, LEAK, out=slope)


def _tanh_values(source: Array, target: Array, slope: Array) -> None:
    np.tanh(source, out=target)


def _tanh_slopes(target: Array, slope: Array) -> None:
    np.multiply(target, target, out=slope)
    np.subtract(1, slope, out=slope)


def _scaled_tanh_values(source: Array, target: Array, slope: Array) -> None:
    np.multiply(source, TANH_RATE, out=target)
    np.tanh(target, out=target)
    np.multiply(target, TANH_SCALE, out=target)


def _scaled_tanh_slopes(target: Array, slope: Array) -> None:
    # A S (1 - (y / A)^2) = A S - (S / A) y^2
    np.multiply(target, target, out=slope)
    np.multiply(slope, -TANH_RATE / TANH_SCALE, out=slope)
    np.add(slope, TANH_SCALE * TANH_RATE, out=slope)


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


def _normal_below(x: float) -> float:
    """The probability that a standard normal variable is below x."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _gelu_derivative(x: float, y: float) -> float:
    density = math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return _normal_below(x) + x * density


def _gelu_values(source: Array, target: Array, slope: Array) -> None:
    from scipy.special import ndtr  # it takes a while to import, and only this function needs it

    below = ndtr(source)
    # the derivative is below + x * density(x), where exp cannot overflow
    np.multiply(source, source, out=slope)
    np.multiply(slope, -0.5, out=slope)
    np.exp(slope, out=slope)
    np.multiply(slope, 1 / math.sqrt(2 * math.pi), out=slope)
    np.multiply(slope, source, out=slope)
    np.add(slope, below, out=slope)
    np.multiply(source, below, out=target)


FUNCTIONS: dict[str, Function] = {
    "relu": Function(
        formula="max(x, 0)",
        value=lambda x: x if x > 0 or math.isnan(x) else 0,
        derivative=lambda x, y: 1 if y > 0 else 0,
        values=_relu_values,
        slopes=None,
        slope_type=bool,
        kink=(0, 1),
    ),
    "leaky_relu": Function(
        formula=f"max(x, {LEAK} x)",
        value=lambda x: x if x > 0 or math.isnan(x) else LEAK * x,
        derivative=lambda x, y: 1 if y > 0 else LEAK,
        values=_leaky_relu_values,
        slopes=_leaky_relu_slopes,
        kink=(LEAK, 1),
    ),
    "tanh": Function(
        formula="tanh(x)",
        value=math.tanh,
        derivative=lambda x, y: 1 - y * y,
        values=_tanh_values,
        slopes=_tanh_slopes,
    ),
    "scaled_tanh": Function(
        formula=f"{TANH_SCALE} tanh(2 x / 3), as in LeCun et al. 1998",
        value=lambda x: TANH_SCALE * math.tanh(TANH_RATE * x),
        derivative=lambda x, y: TANH_RATE * (TANH_SCALE - y * y / TANH_SCALE),
        values=_scaled_tanh_values,
        slopes=_scaled_tanh_slopes,
    ),
    "sigmoid": Function(
        formula="1 / (1 + exp(-x))",
        value=_sigmoid,
        derivative=lambda x, y: y * (1 - y),
        values=_sigmoid_values,
        slopes=_sigmoid_slopes,
    ),
    "gelu": Function(
        formula="x P(x), P the standard normal distribution (Hendrycks and Gimpel 2016)",
        value=lambda x: x * _normal_below(x),
        derivative=_gelu_derivative,
        values=_gelu_values,
        slopes=None,
        from_target=False,
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
            slope = derivative(source.flat[position], target.flat[position])
            source_error.flat[position] = target_error.flat[position] * slope
        return source_error, {}


def enumerator_of(layers: Iterable[Layer]) -> str:
    """The enumerator of kernels/layers.cuh for the activation among `layers`, if there is one."""
    names = (layer.function.upper() for layer in layers if isinstance(layer, Activation))
    return next(names, "IDENTITY")
