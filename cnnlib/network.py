"""A network is a tuple of layers: shapes, one flat parameter vector, and its arithmetic."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from pydantic import ValidationError

from cnnlib.config_errors import first_problem, short
from cnnlib.errors import ConfigError
from cnnlib.layers import FUNCTIONS, KINDS, Activation, Array, Layer, Shape, Views


@dataclass(frozen=True)
class Parameter:
    """One named view of the flat parameter vector."""

    name: str
    layer: int
    key: str
    offset: int
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Network:
    """`layers` applied to images of `input_shape` (C, H, W), ending in `classes` logits.

    Raises ConfigError, naming the layer and its shapes, when the layers do not fit together.
    """

    name: str
    input_shape: Shape
    classes: int
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if len(self.shapes) - 1 == 0 or math.prod(self.shapes[-1]) != self.classes:
            raise ConfigError(
                f"network '{self.name}' ends in shape {self.shapes[-1]}, "
                f"but the data set has {self.classes} classes"
            )

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """conv1, activation1, subsample1, conv2, ...: the kind and its count from the input on."""
        seen: Counter[str] = Counter()
        names = []
        for layer in self.layers:
            seen[layer.kind] += 1
            names.append(f"{layer.kind}{seen[layer.kind]}")
        return tuple(names)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shape of the input and of every layer's target, one image: len(layers) + 1 of them."""
        shapes = [self.input_shape]
        for name, layer in zip(self.layer_names, self.layers, strict=True):
            try:
                shapes.append(layer.output_shape(shapes[-1]))
            except ValueError as error:
                raise ConfigError(
                    f"network '{self.name}': {name} cannot take its source of shape "
                    f"{shapes[-1]}: {error}"
                ) from None
        return tuple(shapes)

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The named views, in the order in which they lie in the flat vector."""
        parameters, offset = [], 0
        for i, layer in enumerate(self.layers):
            for key, shape in layer.parameter_shapes(self.shapes[i]).items():
                parameters.append(Parameter(f"{self.layer_names[i]}.{key}", i, key, offset, shape))
                offset += parameters[-1].size
        return tuple(parameters)

    @cached_property
    def parameter_count(self) -> int:
        return sum(parameter.size for parameter in self.parameters)

    def views(self, vector: Array) -> list[Views]:
        """For each layer its parameters as views (not copies) of the flat `vector`."""
        views: list[Views] = [{} for _ in self.layers]
        for p in self.parameters:
            views[p.layer][p.key] = vector[p.offset : p.offset + p.size].reshape(p.shape)
        return views

    def initial_parameters(self, seed: int, dtype: DTypeLike = np.float32) -> Array:
        """Flat vector of initial weights: uniform with variance gain / fan-in; biases are zero.

        This is the scheme of LeCun et al. (1998) for all activations; `Function.gain` says why
        not that of He et al. (2015) for relu. Numbers are drawn in float32 whatever the `dtype`, so
        that every stage starts from the same ones.
        """
        generator = np.random.default_rng(seed)
        vector = np.zeros(self.parameter_count, dtype=np.float32)
        for i, views in enumerate(self.views(vector)):
            if "weight" in views:
                bound = math.sqrt(3 * self._gain(i) / self.layers[i].fan_in(self.shapes[i]))
                views["weight"][...] = generator.uniform(-bound, bound, views["weight"].shape)
        return vector.astype(dtype)

    def _gain(self, layer: int) -> float:
        following = self.layers[layer + 1 : layer + 2]
        if following and isinstance(following[0], Activation):
            return FUNCTIONS[following[0].function].gain
        return 1.0

    @cached_property
    def forward_flops(self) -> tuple[int, ...]:
        """Floating-point operations of each layer's forward pass, one image."""
        return tuple(
            layer.forward_flops(shape)
            for layer, shape in zip(self.layers, self.shapes, strict=False)
        )

    @cached_property
    def training_flops(self) -> tuple[int, ...]:
        """Operations of each layer to train on one image: forward, weight gradient, source error.

        The first layer with weights owes its source no error, so it counts twice, not three times.
        """
        first = next((i for i, flops in enumerate(self.forward_flops) if flops), None)
        return tuple(flops * (2 if i == first else 3) for i, flops in enumerate(self.forward_flops))

    def forward_arithmetic(self, start: int, stop: int, batch: int) -> "Arithmetic":
        """The least that layers[start:stop] need to go forward over `batch` images."""
        flops = sum(self.forward_flops[start:stop])
        numbers = math.prod(self.shapes[start]) + math.prod(self.shapes[stop])
        return Arithmetic(batch * flops, FLOAT * (batch * numbers + self._weights(start, stop)))

    def backward_arithmetic(self, start: int, stop: int, batch: int) -> "Arithmetic":
        """The least that layers[start:stop] need to go backward over `batch` images.

        The source and the target's error come in; the gradient and, except below the first weights,
        the source's error go out.
        """
        flops = sum(self.training_flops[start:stop]) - sum(self.forward_flops[start:stop])
        sources = 2 if any(self.forward_flops[:start]) else 1
        numbers = sources * math.prod(self.shapes[start]) + math.prod(self.shapes[stop])
        return Arithmetic(
            batch * flops, FLOAT * (batch * numbers + sources * self._weights(start, stop))
        )

    def update_arithmetic(self, momentum: bool) -> "Arithmetic":
        """The least that one update needs: weights and gradient come in, weights go out."""
        each = 2 if momentum else 1
        return Arithmetic(
            2 * each * self.parameter_count, FLOAT * (1 + 2 * each) * self.parameter_count
        )

    def _weights(self, start: int, stop: int) -> int:
        return sum(p.size for p in self.parameters if start <= p.layer < stop)


class Arithmetic(NamedTuple):
    """The least that a piece of work takes: floating-point operations, and bytes moved once."""

    flops: int
    bytes: int


FLOAT = 4
"""Bytes of a float32 number."""


def parse_layers(name: str, specs: Any) -> tuple[Layer, ...]:
    """Layers from config.yaml's list: each entry `kind: {field: value}` or `kind: value`.

    Raises ConfigError naming the network, the position, the field and the choices.
    """
    if not isinstance(specs, Sequence) or isinstance(specs, str) or not specs:
        raise ConfigError(f"networks.{name} must be a list of layers, not {short(specs)}")
    return tuple(_parse_layer(f"networks.{name}[{i}]", spec) for i, spec in enumerate(specs))


def _parse_layer(where: str, spec: Any) -> Layer:
    known = ", ".join(KINDS)
    if not isinstance(spec, dict) or len(spec) != 1:
        raise ConfigError(
            f"{where} must be one `kind: settings` pair, not {short(spec)}; known: {known}"
        )
    ((kind, settings),) = spec.items()
    if kind not in KINDS:
        raise ConfigError(f"unknown layer kind {short(kind)} in {where}; known: {known}")
    if not isinstance(settings, dict):
        settings = {KINDS[kind].shorthand: settings}
    try:
        return KINDS[kind].model_validate(settings)
    except ValidationError as error:
        raise ConfigError(first_problem(error, f"{where}.{kind}", KINDS[kind])) from None
