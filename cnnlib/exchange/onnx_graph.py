"""A model of ONNX as a chain of nodes from one input to one output, and its constants."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from cnnlib.errors import DataError
from cnnlib.exchange.onnx_export import onnx_parts
from cnnlib.layers import Array, Shape

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

BATCH = 2
"""The number of images that a model is read for where it takes any number."""
FOLDABLE = (
    *("Constant", "Identity", "Cast", "Transpose", "Reshape", "Concat", "Gather", "Slice"),
    *("Unsqueeze", "Squeeze", "Add", "Sub", "Mul", "Div", "Neg", "Sqrt"),
)
"""Operators that are computed at once where all they read is constant."""


def load_model(path: Path, known: Iterable[str]) -> "ModelProto":
    """The model in a file, with tensors that lie in files beside it.

    Raises DataError naming the file when it is missing, damaged or no model, and one that names the
    node and the operators `known` to the caller for an operator that ONNX does not have.
    """
    onnx_parts()
    import onnx
    from google.protobuf.message import DecodeError

    what = f"weights file {path}"
    try:
        model = onnx.load(path)
        for node in model.graph.node:
            if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
                raise DataError(
                    f"{what}: node '{node.name or node.output[0]}' ({node.op_type}) is no operator "
                    f"of ONNX; known here: {', '.join(sorted(known))}"
                )
        onnx.checker.check_model(model)
    except OSError as error:
        beside = f": {error.filename}" if error.filename not in (None, str(path), path) else ""
        raise DataError(f"cannot read {what}: {error.strerror or error}{beside}") from None
    except (DecodeError, onnx.checker.ValidationError, ValueError, TypeError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "no model")
        raise DataError(f"{what} is damaged, or no model of ONNX: {said}") from None
    return model


class Chain:
    """The nodes of a graph from its input to its output, one after the other.

    `shape` is that of an image at the input, (C, H, W). Raises DataError, beginning with `what`,
    for a graph with another number of inputs or outputs, or with images of another kind.
    """

    def __init__(self, model: "ModelProto", what: str) -> None:
        _, numpy_helper, kinds = onnx_parts()
        self.what = what
        graph: GraphProto = model.graph
        self._opsets = model.opset_import
        self._constants: dict[str, Array] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer
        }
        self._writers: dict[str, NodeProto] = {}
        self._readers: defaultdict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            self._writers |= dict.fromkeys(node.output, node)
            for name in dict.fromkeys(node.input):
                self._readers[name].append(node)
        self._shapes: dict[str, Shape] = {}
        image = self._only(graph.input, "input", but=self._constants)
        self.end = self._only(graph.output, "output").name
        tensor = image.type.tensor_type
        if tensor.elem_type not in (kinds.UINT8, kinds.FLOAT):
            self.refuse(
                f"input '{image.name}' is {kinds.DataType.Name(tensor.elem_type)}; known: UINT8, "
                "FLOAT"
            )
        self.takes_bytes: bool = tensor.elem_type == kinds.UINT8
        sizes = [size.dim_value or size.dim_param or "?" for size in tensor.shape.dim]
        if len(sizes) != 4 or not all(isinstance(size, int) for size in sizes[1:]):
            said = ", ".join(map(str, sizes))
            self.refuse(
                f"input '{image.name}' has shape ({said}); expected (images, channels, height, "
                "width), the last three as numbers"
            )
        self.batch: int = sizes[0] if isinstance(sizes[0], int) else BATCH
        self.shape: Shape = tuple(int(size) for size in sizes[1:])
        self.position: str = image.name

    def refuse(self, problem: str) -> NoReturn:
        raise DataError(f"{self.what}: {problem}")

    def refuse_node(self, node: "NodeProto", problem: str) -> NoReturn:
        name = node.name or node.output[0]
        self.refuse(f"node '{name}' ({node.op_type}) {problem}")

    def _only(
        self, values: "Iterable[ValueInfoProto]", kind: str, but: Mapping[str, Array] | None = None
    ) -> "ValueInfoProto":
        """The one value that is no initializer."""
        found = [value for value in values if value.name not in (but or {})]
        if len(found) != 1:
            names = ", ".join(value.name for value in found) or "none"
            self.refuse(f"it has {len(found)} {kind}s, {names}; a network has one")
        return found[0]

    def set_shape(self, shape: Shape) -> None:
        """Note the shape of one image's map at the current position, for nodes that ask for it."""
        self._shapes[self.position] = (self.batch, *shape)

    def at_end(self) -> bool:
        return bool(self.position == self.end)

    def readers(self) -> "list[NodeProto]":
        """The nodes that compute with the tensor at the current position."""
        return [node for node in self._readers[self.position] if node.op_type != "Shape"]

    def next(self) -> "NodeProto":
        """The only node that reads the tensor at the current position."""
        nodes = self.readers()
        if len(nodes) != 1:
            names = ", ".join(f"'{n.name or n.output[0]}' ({n.op_type})" for n in nodes) or "none"
            self.refuse(
                f"tensor '{self.position}' is read by {names}; a network is one chain of layers"
            )
        return nodes[0]

    def reader_of(self, name: str) -> "NodeProto | None":
        """The node that computes with a tensor, if there is only one."""
        nodes = self._readers[name]
        return nodes[0] if len(nodes) == 1 else None

    def advance(self, node: "NodeProto") -> None:
        self.position = node.output[0]

    def constant(self, name: str) -> Array | None:
        """The value of a tensor that does not depend on the images' content; None if it does."""
        if name in self._constants:
            return self._constants[name]
        node = self._writers.get(name)
        if node is None:
            return None
        if node.op_type == "Shape" and node.input[0] in self._shapes and not node.attribute:
            value = np.array(self._shapes[node.input[0]], np.int64)
        elif node.op_type in FOLDABLE and len(node.output) == 1:
            values = {each: self.constant(each) for each in node.input if each}
            given = {each: array for each, array in values.items() if array is not None}
            if len(given) < len(values):
                return None
            value = self._computed(node, given)
        else:
            return None
        self._constants[name] = value
        return value

    def _computed(self, node: "NodeProto", values: Mapping[str, Array]) -> Array:
        from onnx.reference import ReferenceEvaluator

        helper, _, _ = onnx_parts()
        graph = helper.make_graph(
            [node],
            "constant",
            [
                helper.make_tensor_value_info(
                    name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
                )
                for name, array in values.items()
            ],
            [helper.make_empty_tensor_value_info(node.output[0])],
        )
        try:
            model = helper.make_model(graph, opset_imports=self._opsets)
            (value,) = ReferenceEvaluator(model).run(None, dict(values))
        except Exception as error:  # the evaluator raises whatever numpy does
            self.refuse_node(node, f"cannot be computed: {error}")
        return np.asarray(value)
