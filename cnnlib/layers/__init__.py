"""The layer kinds. A new kind is a new file here: every module of this folder is imported."""

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module

from cnnlib.layers.activation import FUNCTIONS, Activation, enumerator_of
from cnnlib.layers.base import Array, Layer, Shape, Views
from cnnlib.layers.conv import Conv
from cnnlib.layers.dense import Dense
from cnnlib.layers.dropout import MASK, Dropout
from cnnlib.layers.losses import DEFAULT_LOSS, LOSSES, Loss, find_loss
from cnnlib.layers.softmax import softmax
from cnnlib.layers.subsample import Subsample


def _kinds_in_this_folder() -> Iterator[type[Layer]]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for value in vars(import_module(module.name)).values():
            own = inspect.isclass(value) and value.__module__ == module.name
            if own and issubclass(value, Layer) and not inspect.isabstract(value):
                yield value


def _by_kind(layers: list[type[Layer]]) -> dict[str, type[Layer]]:
    kinds: dict[str, type[Layer]] = {}
    for layer in layers:
        other = kinds.setdefault(layer.kind, layer)
        if other is not layer:
            raise ImportError(
                f"layers {other.__module__}.{other.__name__} and {layer.__module__}."
                f"{layer.__name__} are both of kind '{layer.kind}'; rename one"
            )
    return kinds


KINDS: dict[str, type[Layer]] = _by_kind(
    [Conv, Activation, Subsample, Dense, Dropout, *_kinds_in_this_folder()]
)
"""Kind -> class, those of an ordinary network first."""

__all__ = [
    "DEFAULT_LOSS",
    "FUNCTIONS",
    "KINDS",
    "LOSSES",
    "MASK",
    "Activation",
    "Array",
    "Conv",
    "Dense",
    "Dropout",
    "Layer",
    "Loss",
    "Shape",
    "Subsample",
    "Views",
    "enumerator_of",
    "find_loss",
    "softmax",
]
