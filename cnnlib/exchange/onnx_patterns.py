"""Activation functions that a model of ONNX computes by several nodes."""

import math
from typing import TYPE_CHECKING

from cnnlib.exchange.onnx_walk import Node, Walk
from cnnlib.layers import Activation
from cnnlib.layers.activation import TANH_RATE, TANH_SCALE

if TYPE_CHECKING:
    from onnx import NodeProto


def scaled_tanh(walk: Walk) -> "NodeProto | None":
    """A tanh(S x) by Mul, Tanh and Mul. Appends the layer and returns the last of the nodes."""
    for first in walk.chain.readers():
        tanh = walk.chain.reader_of(first.output[0])
        last = tanh and walk.chain.reader_of(tanh.output[0])
        if (
            _multiplies(walk, first, TANH_RATE)
            and tanh is not None
            and tanh.op_type == "Tanh"
            and last is not None
            and _multiplies(walk, last, TANH_SCALE)
        ):
            Node(walk, first).add(Activation, {}, function="scaled_tanh")
            return last
    return None


def gelu(walk: Walk) -> "NodeProto | None":
    """x (1 + erf(x / sqrt 2)) / 2, which PyTorch writes for opsets without Gelu.

    Appends the layer and returns the last of the nodes.
    """
    chain = walk.chain
    nodes = chain.readers()
    for first, product in (nodes, nodes[::-1]) if len(nodes) == 2 else ():
        erf = chain.reader_of(first.output[0])
        plus = erf and chain.reader_of(erf.output[0])
        last = chain.reader_of(product.output[0])
        if (
            _multiplies(walk, first, math.sqrt(0.5))
            and erf is not None
            and erf.op_type == "Erf"
            and plus is not None
            and plus.op_type == "Add"
            and _number(walk, plus) == 1
            and product.op_type == "Mul"
            and set(product.input) == {chain.position, plus.output[0]}
            and last is not None
            and _multiplies(walk, last, 0.5)
        ):
            Node(walk, first).add(Activation, {}, function="gelu")
            return last
    return None


PATTERNS = (scaled_tanh, gelu)
"""Functions that return the last node of a pattern that begins where the walk is, or None."""


def _multiplies(walk: Walk, node: "NodeProto", factor: float) -> bool:
    """Whether the node multiplies by a constant, or divides by its inverse."""
    number = _number(walk, node)
    if node.op_type == "Div" and number and walk.chain.constant(node.input[0]) is None:
        number = 1 / number
    elif node.op_type != "Mul":
        return False
    return number is not None and math.isclose(number, factor, rel_tol=1e-6)


def _number(walk: Walk, node: "NodeProto") -> float | None:
    """The constant single number among two inputs of a node."""
    if len(node.input) != 2:
        return None
    for name in node.input:
        value = walk.chain.constant(name)
        if value is not None and value.size == 1:
            return float(value.item())
    return None
