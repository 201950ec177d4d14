"""The layers that have been read on the way along a model of ONNX, and the attributes of a node."""

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from pydantic import ValidationError

from cnnlib.exchange.onnx_export import onnx_parts
from cnnlib.exchange.onnx_graph import Chain
from cnnlib.layers import Array, Layer, Shape
from cnnlib.levels import Level

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


class Walk:
    """Collects layers along the chain of a model.

    `layers` and `arrays` (weight and bias of each layer) are those read so far, and `shape` is that
    of their target, (C, H, W) or (N,).
    """

    def __init__(self, model: "ModelProto", what: str) -> None:
        self.chain = Chain(model, what)
        self.layers: list[Layer] = []
        self.arrays: list[dict[str, Array]] = []
        self.shape: Shape = self.chain.shape
        self.lacks_bias = False
        """Whether the last node was a layer that has been given no bias."""
        channels = self.shape[0]
        self._scale, self._offset = np.ones(channels), np.zeros(channels)
        self.chain.set_shape(self.shape)

    def step(self, node: "NodeProto") -> None:
        """Move on to the tensor that `node` writes."""
        self.chain.advance(node)
        self.chain.set_shape(self.shape)

    def rescale(self, node: "Node", scale: Array | float, offset: Array | float) -> None:
        """Apply scale x + offset to the images: (channels,) or one number for all channels.

        Raises DataError behind the first layer, and for a scale that is not positive.
        """
        if self.layers or len(self.shape) != 3:
            node.refuse("computes with a constant between layers, where no layer does")
        with np.errstate(invalid="ignore", over="ignore"):
            self._scale, self._offset = self._scale * scale, self._offset * scale + offset
        if not (np.isfinite([self._scale, self._offset]).all() and (self._scale > 0).all()):
            node.refuse(
                "does not normalise images: it scales them by a number that is not positive"
            )

    def normalisation(self) -> tuple[Level, Level]:
        """Mean and deviation by which the model normalises its input before the first layer."""
        mean, deviation = -self._offset / self._scale + 0.0, 1 / self._scale
        if len(set(mean.tolist())) == len(set(deviation.tolist())) == 1:
            return mean[0].item(), deviation[0].item()
        return tuple(mean.tolist()), tuple(deviation.tolist())


class Node:
    """A node of the model with the attributes that have not been looked at yet."""

    def __init__(self, walk: Walk, proto: "NodeProto") -> None:
        helper, _, _ = onnx_parts()
        self.walk, self.proto = walk, proto
        self._attributes: dict[str, Any] = {
            each.name: helper.get_attribute_value(each) for each in proto.attribute
        }

    def refuse(self, problem: str) -> NoReturn:
        self.walk.chain.refuse_node(self.proto, problem)

    def get(self, name: str, default: Any) -> Any:
        """The value of an attribute: a number, a text or a tuple of numbers."""
        value = self._attributes.pop(name, default)
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return tuple(value) if isinstance(value, list) else value

    def expect(self, name: str, default: Any, *known: Any) -> Any:
        """The value of an attribute, which must be one of `known`."""
        value = self.get(name, default)
        if value not in known:
            self.refuse(f"has {name}={value}; known: {', '.join(map(str, known))}")
        return value

    def ignore(self, *names: str) -> None:
        """Look at attributes that do not change what the node computes in an inference."""
        for name in names:
            self._attributes.pop(name, None)

    def finish(self) -> None:
        """Raise DataError for an attribute that nothing has looked at."""
        for name, value in self._attributes.items():
            self.refuse(f"has {name}={value!s:.40}, which has no meaning here")

    def pair(self, name: str, default: tuple[int, ...]) -> tuple[int, int]:
        """An attribute of two whole numbers, for rows and for columns."""
        value = self.get(name, default)
        if not isinstance(value, tuple) or len(value) != 2:
            self.refuse(f"has {name}={value}; expected two numbers, for maps of two dimensions")
        return value[0], value[1]

    def padding(self) -> tuple[int, int]:
        """Rows and columns of padding, which must be the same on both sides of a map."""
        automatic = self.expect("auto_pad", "NOTSET", "NOTSET", "VALID")
        pads = self.get("pads", (0, 0, 0, 0))
        if automatic == "VALID":
            return 0, 0
        if len(pads) != 4 or pads[:2] != pads[2:] or min(pads) < 0:
            self.refuse(
                f"has pads={list(pads)}; known are as many rows above as below, and as many "
                "columns left as right"
            )
        return pads[0], pads[1]

    def has(self, index: int) -> bool:
        """Whether the node is given this input."""
        return len(self.proto.input) > index and bool(self.proto.input[index])

    def constant(self, index: int, name: str) -> Array:
        """The value of an input; DataError, calling it `name`, if it depends on the images."""
        value = self.walk.chain.constant(self.proto.input[index]) if self.has(index) else None
        if value is None:
            self.refuse(f"has no constant {name}")
        return value

    def other(self) -> tuple[int, Array]:
        """Which input of two is constant, 0 or 1, and its value."""
        for index in (1, 0):
            value = self.walk.chain.constant(self.proto.input[index])
            if value is not None:
                return index, value
        self.refuse("combines two tensors; a network is one chain of layers")

    def add(self, kind: type[Layer], arrays: dict[str, Array], **settings: object) -> None:
        """Append a layer to the walk; DataError where it cannot take the map before it."""
        walk = self.walk
        try:
            layer = kind(**settings)
            walk.shape = layer.output_shape(walk.shape)
        except ValidationError as error:
            self.refuse(error.errors(include_url=False)[0]["msg"])
        except ValueError as error:
            self.refuse(f"cannot take a map of shape {walk.shape}: {error}")
        walk.layers.append(layer)
        walk.arrays.append(arrays)
        walk.lacks_bias = False
