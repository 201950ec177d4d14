"""Reasons of operators that serve only some of the layers of a kind."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from cnnlib.layers import FUNCTIONS, Activation, Conv, Layer, Shape, Subsample

Factory = TypeVar("Factory")
Why = Callable[[Sequence[Layer], Shape], str]


def declining(why: Why) -> Callable[[Factory], Factory]:
    """A decorator: the operator declines layers for which `why` gives a reason."""

    def mark(operator: Factory) -> Factory:
        setattr(operator, "declines", staticmethod(why) if isinstance(operator, type) else why)  # noqa: B010
        return operator

    return mark


def other_than_square(layers: Sequence[Layer], source_shape: Shape) -> str:
    """Why such an operator cannot serve the layers, which begin with maps of `source_shape`.

    "" if it can.
    """
    shape = source_shape
    for layer in layers:
        if isinstance(layer, Conv | Subsample):
            window = layer.kernel if isinstance(layer, Conv) else layer.size
            stride = layer.stride if isinstance(layer, Conv) else layer.strides
            if window[0] != window[1] or stride[0] != stride[1]:
                return "its windows and strides are not square"
            if any(layer.padding):
                return "it has padding"
        if isinstance(layer, Subsample):
            if layer.strides != layer.size:
                return "its windows do not lie side by side"
            if any(length % size for length, size in zip(shape[1:], layer.size, strict=True)):
                return "its windows do not divide the map"
        if isinstance(layer, Activation) and not FUNCTIONS[layer.function].from_target:
            return f"the derivative of {layer.function} needs its source"
        shape = layer.output_shape(shape)
    return ""
