"""A network with its weights as a graph of ONNX, whose operators most runtimes know."""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np

import cnnlib
from cnnlib.errors import MissingLibrary, Unsupported
from cnnlib.exchange.weights import Weights, describe
from cnnlib.layers import Activation, Array, Conv, Dense, Dropout, Layer, Subsample
from cnnlib.layers.activation import LEAK, TANH_RATE, TANH_SCALE
from cnnlib.levels import Level, for_maps

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

OPSETS = range(20, 29)
"""Versions of ONNX's operators that are written: from the first with Gelu to the current one."""
KEY = "cnnlib"
"""The key of the model's metadata that holds the Description."""
Images = Literal["uint8", "float32"]


def write(path: Path, weights: Weights, images: Images = "uint8", opset: int | None = None) -> None:
    """Write `model_of`, checked by onnx itself; the same weights give the same bytes."""
    model = model_of(weights, images, opset)
    import onnx

    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def model_of(weights: Weights, images: Images = "uint8", opset: int | None = None) -> "ModelProto":
    """The model: from `images` (N, C, H, W) to `logits` (N, classes) float32, for any N.

    With uint8 the graph takes bytes and normalises them itself. With float32 it takes normalised
    images, (byte - mean) / deviation, as the models do that PyTorch exports; the metadata say what
    mean and deviation are. `opset` is one of OPSETS, by default the last that onnx knows. Nodes are
    named like the layers, and initializers like the parameters. Raises MissingLibrary without the
    package onnx, and Unsupported for a layer that ONNX has no operator for.
    """
    helper, numpy_helper, kinds = onnx_parts()
    network, graph = weights.network, _Graph(dict(weights.tensors))
    if images == "uint8":
        graph.normalise(weights.mean, weights.deviation)
    flat = False
    for name, layer in zip(network.layer_names, network.layers, strict=True):
        if isinstance(layer, Dense) and not flat:
            graph.add("Flatten", "flatten", axis=1)
            flat = True
        graph.add_layer(name, layer)
    if not flat:
        graph.add("Flatten", "flatten", axis=1)
    graph.nodes[-1].output[0] = "logits"
    element = kinds.UINT8 if images == "uint8" else kinds.FLOAT
    built = helper.make_graph(
        graph.nodes,
        network.name,
        [helper.make_tensor_value_info("images", element, ["N", *network.input_shape])],
        [helper.make_tensor_value_info("logits", kinds.FLOAT, ["N", network.classes])],
        [numpy_helper.from_array(array, name) for name, array in graph.initializers.items()],
    )
    opsets = [helper.make_opsetid("", opset or newest_opset())]
    model = helper.make_model(
        built,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="cnnlib",
        producer_version=cnnlib.__version__,
    )
    helper.set_model_props(model, {KEY: describe(weights).model_dump_json()})
    return model


def newest_opset() -> int:
    """The last of OPSETS that the installed onnx knows; MissingLibrary where there is none."""
    onnx_parts()
    from onnx import defs

    return min(int(defs.onnx_opset_version()), OPSETS[-1])


@dataclass
class _Graph:
    """A chain of nodes that grows at its end."""

    initializers: dict[str, Array]
    nodes: "list[NodeProto]" = field(default_factory=list)
    end: str = "images"
    """The tensor that the last node writes."""

    def add(self, op: str, name: str, *inputs: str, **attributes: object) -> None:
        """Append a node that reads the chain's end, and then `inputs`."""
        helper, _, _ = onnx_parts()
        node = helper.make_node(op, [self.end, *inputs], [f"{name}.target"], name, **attributes)
        self.nodes.append(node)
        self.end = node.output[0]

    def constant(self, name: str, value: float | Array) -> str:
        """Keep a float32 array under `name`, and return that."""
        self.initializers[name] = np.asarray(value, np.float32)
        return name

    def normalise(self, mean: Level, deviation: Level) -> None:
        _, _, kinds = onnx_parts()
        self.add("Cast", "pixels", to=kinds.FLOAT)
        self.add("Sub", "centred", self.constant("mean", for_maps(mean, np.float32)))
        self.add("Div", "normalised", self.constant("deviation", for_maps(deviation, np.float32)))

    def add_layer(self, name: str, layer: Layer) -> None:
        match layer:
            case Conv():
                self.add(
                    "Conv",
                    name,
                    f"{name}.weight",
                    f"{name}.bias",
                    kernel_shape=layer.kernel,
                    strides=layer.stride,
                    pads=layer.padding * 2,
                )
            case Subsample():
                mean = layer.method == "mean"
                self.add(
                    "AveragePool" if mean else "MaxPool",
                    name,
                    kernel_shape=layer.size,
                    strides=layer.strides,
                    pads=layer.padding * 2,
                    **({"count_include_pad": 1} if mean else {}),
                )
            case Activation(function="scaled_tanh"):
                self.add("Mul", f"{name}.scaled", self.constant(f"{name}.rate", TANH_RATE))
                self.add("Tanh", f"{name}.tanh")
                self.add("Mul", name, self.constant(f"{name}.scale", TANH_SCALE))
            case Activation(function="leaky_relu"):
                self.add("LeakyRelu", name, alpha=LEAK)
            case Activation() if layer.function in OPS:
                self.add(OPS[layer.function], name)
            case Dropout():
                self.add("Dropout", name, self.constant(f"{name}.ratio", layer.rate))
            case Dense():
                self.add("Gemm", name, f"{name}.weight", f"{name}.bias", transB=1)
            case _:
                raise Unsupported(f"layer {name} has no operator of ONNX")


OPS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "gelu": "Gelu"}
"""Activation functions that are one operator without settings."""


def onnx_parts() -> "tuple[ModuleType, ModuleType, type[TensorProto]]":
    """The modules onnx.helper and onnx.numpy_helper, and the enumeration of element types.

    Raises MissingLibrary where onnx is not installed.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingLibrary(
            "files of ONNX need the package onnx, which is not installed (pip install onnx)"
        ) from None
    return helper, numpy_helper, TensorProto
