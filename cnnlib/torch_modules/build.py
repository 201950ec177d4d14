"""Makes a torch.nn.Sequential of a network's layers."""

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from cnnlib.errors import MissingLibrary, Unsupported
from cnnlib.layers import Activation, Array, Conv, Dense, Dropout, Layer, Shape, Subsample
from cnnlib.layers.activation import LEAK
from cnnlib.levels import Level

if TYPE_CHECKING:
    from torch import Tensor, nn


def torch_module(what: str = "this") -> ModuleType:
    """The module torch; MissingLibrary, saying what needs it, where it is not installed."""
    try:
        import torch
    except ImportError:
        raise MissingLibrary(
            f"{what} needs PyTorch, which is not installed (pip install torch)"
        ) from None
    module: ModuleType = torch
    return module


def sequential(
    layers: Sequence[Layer],
    names: Sequence[str],
    shapes: Sequence[Shape],
    tensors: Mapping[str, Array],
    normalize: tuple[Level, Level] | None = None,
) -> "nn.Sequential":
    """The modules of `layers` by their `names`, with the weights of `tensors`, in evaluation mode.

    `shapes` are those of the input and of every layer's target. Before the first layer that takes
    a vector there is a module `flatten`; with `normalize`, (mean, deviation) in the units of bytes,
    there is a module `normalize` at the beginning. Raises MissingLibrary without PyTorch, and
    Unsupported for a kind of layer that has no module.
    """
    torch = torch_module("a network as a module")
    modules: dict[str, nn.Module] = {}
    if normalize is not None:
        from cnnlib.torch_modules.modules import Normalize

        channels = shapes[0][0]
        numbers = [np.broadcast_to(level, (channels,)).tolist() for level in normalize]
        modules["normalize"] = Normalize(*numbers)
    flat = False
    for name, layer, shape in zip(names, layers, shapes, strict=False):
        if isinstance(layer, Dense) and not flat:
            modules["flatten"], flat = torch.nn.Flatten(), True
        modules[name] = _module(torch, layer, shape)
    if not flat:
        modules["flatten"] = torch.nn.Flatten()
    built = torch.nn.Sequential()
    for name, module in modules.items():
        built.add_module(name, module)
    built.load_state_dict(state_dict(tensors))
    return built.eval()


def state_dict(tensors: Mapping[str, Array]) -> "dict[str, Tensor]":
    """The same arrays as tensors of PyTorch on the CPU, copied; MissingLibrary without PyTorch."""
    torch = torch_module("a state_dict")
    return {
        name: torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
        for name, array in tensors.items()
    }


def arrays_of(state: "Mapping[str, Tensor | Array] | nn.Module") -> dict[str, Array]:
    """The tensors of a state_dict, or of a module, as arrays; those of numpy stay what they are.

    Raises TypeError for anything else.
    """
    if not isinstance(state, Mapping):
        if not hasattr(state, "state_dict"):
            raise TypeError(f"a state_dict or a module is expected, not {type(state).__name__}")
        state = state.state_dict()
    return {str(name): _array(str(name), value) for name, value in state.items()}


def _array(name: str, value: "Tensor | Array") -> Array:
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "detach"):
        raise TypeError(f"{name} of the state_dict is {type(value).__name__}, not a tensor")
    tensor = value.detach().cpu()
    # numpy lacks some of PyTorch's types
    array: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


def _module(torch: ModuleType, layer: Layer, shape: Shape) -> "nn.Module":
    """The module of one layer for a source map of `shape`; its weights hold no values yet."""
    nn, without_values = torch.nn, torch.nn.utils.skip_init
    match layer:
        case Conv():
            return without_values(
                nn.Conv2d,
                shape[0],
                layer.maps,
                layer.kernel,
                stride=layer.stride,
                padding=layer.padding,
            )
        case Subsample(method="max"):
            return nn.MaxPool2d(layer.size, stride=layer.strides, padding=layer.padding)
        case Subsample(method="mean"):
            return nn.AvgPool2d(layer.size, stride=layer.strides, padding=layer.padding)
        case Activation():
            return _activation(torch, layer.function)
        case Dropout():
            return nn.Dropout(layer.rate)
        case Dense():
            return without_values(nn.Linear, math.prod(shape), layer.units)
    raise Unsupported(f"layers of kind '{layer.kind}' have no module of PyTorch")


def _activation(torch: ModuleType, function: str) -> "nn.Module":
    nn = torch.nn
    match function:
        case "relu":
            return nn.ReLU()
        case "leaky_relu":
            return nn.LeakyReLU(LEAK)
        case "tanh":
            return nn.Tanh()
        case "sigmoid":
            return nn.Sigmoid()
        case "gelu":
            return nn.GELU()
        case "scaled_tanh":
            from cnnlib.torch_modules.modules import ScaledTanh

            return ScaledTanh()
    raise Unsupported(f"activation function '{function}' has no module of PyTorch")
