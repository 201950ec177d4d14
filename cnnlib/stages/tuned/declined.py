"""Layers that plan `persistent` does not take: windows other than plain ones, and gelu."""

from collections.abc import Sequence

from cnnlib.layers import FUNCTIONS, Activation, Conv, Layer, Shape, Subsample


def other_than_square(layers: Sequence[Layer], source_shape: Shape) -> str:
    """Why an operator cannot serve the layers, which begin with maps of `source_shape`.

    "" if it can.
    """
    shape = source_shape
    for layer in layers:
        if isinstance(layer, Conv | Subsample):
            window = layer.kernel if isinstance(layer, Conv) else layer.size
            stride = layer.stride if isinstance(layer, Conv) else layer.strides
            if window[0] != window[1] or stride[0] != stride[1]:
                return "its windows and strides are not square"
            if isinstance(layer, Subsample) and any(layer.padding):
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
