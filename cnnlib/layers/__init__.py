"""The layer kinds. A new kind is a new file here and one name in KINDS."""

from cnnlib.layers.activation import Activation
from cnnlib.layers.base import Array, Layer, Shape, Views
from cnnlib.layers.conv import Conv
from cnnlib.layers.dense import Dense
from cnnlib.layers.softmax import cross_entropy, softmax
from cnnlib.layers.subsample import Subsample

KINDS: dict[str, type[Layer]] = {
    layer.kind: layer for layer in (Conv, Activation, Subsample, Dense)
}

__all__ = [
    "KINDS",
    "Activation",
    "Array",
    "Conv",
    "Dense",
    "Layer",
    "Shape",
    "Subsample",
    "Views",
    "cross_entropy",
    "softmax",
]
