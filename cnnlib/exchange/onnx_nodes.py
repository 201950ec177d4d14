"""What each operator of ONNX becomes: a layer, a part of one, or nothing."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from cnnlib.exchange.onnx_export import OPS, onnx_parts
from cnnlib.exchange.onnx_patterns import PATTERNS
from cnnlib.exchange.onnx_walk import Node, Walk
from cnnlib.layers import Activation, Array, Conv, Dense, Dropout, Shape, Subsample
from cnnlib.layers.activation import LEAK

if TYPE_CHECKING:
    from onnx import ModelProto


def layers_of(model: "ModelProto", what: str) -> Walk:
    """All layers of a model; DataError, beginning with `what`, that names the node at fault."""
    walk = Walk(model, what)
    while not walk.chain.at_end():
        last = next((found for find in PATTERNS if (found := find(walk))), None)
        if last is not None:
            walk.step(last)
            continue
        proto = walk.chain.next()
        node = Node(walk, proto)
        take = KNOWN.get(proto.op_type) if proto.domain in ("", "ai.onnx") else None
        if take is None:
            node.refuse(f"is no layer here; known: {', '.join(sorted(KNOWN))}")
        take(node)
        node.finish()
        walk.step(proto)
    return walk


def conv(node: Node) -> None:
    """A convolution, or the product alone where a bias is added by a later node."""
    weight = node.constant(1, "weight")
    if weight.ndim != 4:
        node.refuse(f"has a weight of shape {weight.shape}; expected 4 dimensions")
    node.expect("group", 1, 1)
    node.expect("dilations", (1, 1), (1, 1))
    kernel = node.pair("kernel_shape", weight.shape[2:])
    shape = node.walk.shape
    if kernel != weight.shape[2:] or len(shape) != 3 or weight.shape[1] != shape[0]:
        node.refuse(f"has a weight of shape {weight.shape} for a map of shape {shape}")
    maps = weight.shape[0]
    bias = node.constant(2, "bias") if node.has(2) else np.zeros(maps, np.float32)
    if bias.shape != (maps,):
        node.refuse(f"has a bias of shape {bias.shape}, expected {(maps,)}")
    stride, padding = node.pair("strides", (1, 1)), node.padding()
    arrays = {"weight": weight, "bias": bias}
    node.add(Conv, arrays, maps=maps, kernel=kernel, stride=stride, padding=padding)
    node.walk.lacks_bias = not node.has(2)


def pool(node: Node) -> None:
    """Subsampling by windows."""
    mean = node.proto.op_type == "AveragePool"
    size = node.pair("kernel_shape", ())
    stride, padding = node.pair("strides", (1, 1)), node.padding()
    node.expect("ceil_mode", 0, 0)
    node.expect("dilations", (1, 1), (1, 1))
    if mean:
        if not node.get("count_include_pad", 0) and any(padding):
            node.refuse("has count_include_pad=0 and pads; known: 1, zeros that count in a mean")
    else:
        node.expect("storage_order", 0, 0)
    _subsample(node, size, stride, padding, "mean" if mean else "max")


def global_pool(node: Node) -> None:
    """Subsampling by one window as large as the map."""
    if len(node.walk.shape) != 3:
        node.refuse(f"cannot take a map of shape {node.walk.shape}")
    size = (node.walk.shape[1], node.walk.shape[2])
    mean = node.proto.op_type == "GlobalAveragePool"
    _subsample(node, size, size, (0, 0), "mean" if mean else "max")


def _subsample(
    node: Node, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], how: str
) -> None:
    node.add(
        Subsample,
        {},
        size=size,
        stride=None if stride == size else stride,
        padding=padding,
        method=how,
    )


def activation(node: Node) -> None:
    """A function that is one operator without settings."""
    function = next(name for name, op in OPS.items() if op == node.proto.op_type)
    if function == "gelu":
        node.expect("approximate", "none", "none")
    node.add(Activation, {}, function=function)


def leaky_relu(node: Node) -> None:
    """The slope below zero is that of the layer."""
    slope = node.get("alpha", LEAK)
    if not math.isclose(slope, LEAK, rel_tol=1e-6):
        node.refuse(f"has alpha={slope:g}; known: {LEAK}")
    node.add(Activation, {}, function="leaky_relu")


def dropout(node: Node) -> None:
    """A layer that an inference leaves out; its rate is kept for further training."""
    ratio = node.get("ratio", 0.5)  # an attribute until opset 11
    if node.has(1):
        ratio = node.constant(1, "ratio").item()
    node.ignore("seed")
    if ratio:
        node.add(Dropout, {}, rate=float(f"{ratio:.7g}"))


def gemm(node: Node) -> None:
    """A fully connected layer with its factors multiplied in."""
    node.expect("transA", 0, 0)
    weight = node.constant(1, "weight")
    if node.expect("transB", 0, 0, 1) == 0:
        weight = weight.T
    weight = weight * np.float32(node.get("alpha", 1.0))
    scale = np.float32(node.get("beta", 1.0))
    bias = node.constant(2, "bias") * scale if node.has(2) else None
    _dense(node, weight, bias)


def matmul(node: Node) -> None:
    """A fully connected layer; a later node may add its bias."""
    index, weight = node.other()
    if index != 1:
        node.refuse("multiplies by a weight from the left; known: from the right")
    _dense(node, weight.T, None)


def _dense(node: Node, weight: Array, bias: Array | None) -> None:
    """Add a layer of weight (U, N); bias of a shape that ONNX broadcasts to (images, U)."""
    shape = node.walk.shape
    if weight.ndim != 2 or shape != weight.shape[1:]:
        node.refuse(f"has a weight of shape {weight.shape}, as (units, inputs), for {shape}")
    units = len(weight)
    given = np.zeros(units, np.float32) if bias is None else _broadcast(node, bias, (1, units))
    node.add(Dense, {"weight": weight, "bias": given.reshape(units)}, units=units)
    node.walk.lacks_bias = bias is None


def flatten(node: Node) -> None:
    """Each map as a vector, in the order in which a fully connected layer reads it."""
    node.expect("axis", 1, 1, -len(node.walk.shape))
    node.walk.shape = (math.prod(node.walk.shape),)


def reshape(node: Node) -> None:
    """Only to one vector for each image, or to the shape that the map has."""
    wanted = node.constant(1, "shape").reshape(-1).tolist()
    copies = not node.get("allowzero", 0)
    shape = node.walk.shape
    source = (node.walk.chain.batch, *shape)
    sizes = [source[i] if not n and copies and i < len(source) else n for i, n in enumerate(wanted)]
    if sizes.count(-1) == 1:
        rest = -math.prod(sizes)
        sizes[sizes.index(-1)] = math.prod(source) // rest if rest else 0
    vector = (source[0], math.prod(shape))
    if tuple(sizes) not in (vector, source):
        node.refuse(f"makes {wanted} of {list(source)}; known: {list(vector)}, a vector an image")
    if tuple(sizes) == vector:
        node.walk.shape = vector[1:]


def nothing(node: Node) -> None:
    """The node computes what it reads."""


def cast(node: Node) -> None:
    """Bytes as float32 numbers."""
    _, _, kinds = onnx_parts()
    node.ignore("saturate", "round_mode")
    to = node.get("to", kinds.FLOAT)
    if to != kinds.FLOAT:
        node.refuse(f"makes numbers of type {kinds.DataType.Name(to)}; known: FLOAT")


def softmax(node: Node) -> None:
    """Left out at the end: logits come before it, and their order is that of the probabilities."""
    node.expect("axis", -1, -1, 1)
    if node.proto.output[0] != node.walk.chain.end or len(node.walk.shape) != 1:
        node.refuse("is not the last node of logits; known: at the end")


def add(node: Node) -> None:
    """The bias of the layer before, or a part of the normalisation of images."""
    index, value = node.other()
    negative = node.proto.op_type == "Sub"
    if negative and index != 1:
        node.refuse("subtracts images from a constant, which no layer does")
    value = -value if negative else value
    walk = node.walk
    if walk.lacks_bias:
        units = walk.shape[0]
        ones = (1,) * (len(walk.shape) - 1)
        bias = _broadcast(node, value, (1, units, *ones)).reshape(units)
        walk.arrays[-1]["bias"] = bias.astype(np.float32)
        walk.lacks_bias = False
        return
    walk.rescale(node, 1.0, _per_channel(node, value))


def multiply(node: Node) -> None:
    """A part of the normalisation of images."""
    index, value = node.other()
    divides = node.proto.op_type == "Div"
    if divides and index != 1:
        node.refuse("divides a constant by images, which no layer does")
    factor = _per_channel(node, value)
    with np.errstate(divide="ignore"):
        node.walk.rescale(node, 1 / factor if divides else factor, 0.0)


def _per_channel(node: Node, value: Array) -> Array:
    if len(node.walk.shape) != 3:
        node.refuse("computes with a constant between layers, where no layer does")
    channels = node.walk.shape[0]
    return _broadcast(node, value, (1, channels, 1, 1)).reshape(channels).astype(np.float64)


def _broadcast(node: Node, value: Array, shape: Shape) -> Array:
    try:
        return np.broadcast_to(value, shape)
    except ValueError:
        node.refuse(f"has a constant of shape {value.shape}; expected one that fits {shape}")


KNOWN: dict[str, Callable[[Node], None]] = {
    "Conv": conv,
    "MaxPool": pool,
    "AveragePool": pool,
    "GlobalMaxPool": global_pool,
    "GlobalAveragePool": global_pool,
    **dict.fromkeys(OPS.values(), activation),
    "LeakyRelu": leaky_relu,
    "Dropout": dropout,
    "Gemm": gemm,
    "MatMul": matmul,
    "Flatten": flatten,
    "Reshape": reshape,
    "Identity": nothing,
    "Cast": cast,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Add": add,
    "Sub": add,
    "Mul": multiply,
    "Div": multiply,
}
"""Operator -> what it does to the walk."""
