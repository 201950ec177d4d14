"""A network is a tuple of layers: shapes, one flat parameter vector, and its arithmetic."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike
from pydantic import ValidationError

from cnnlib.config_errors import first_problem, short
from cnnlib.errors import ConfigError
from cnnlib.layers import KINDS, Array, Dropout, Layer, Shape, Views
from cnnlib.levels import Level
from cnnlib.named_tensors import gather
from cnnlib.torch_modules.build import arrays_of, sequential, state_dict

if TYPE_CHECKING:
    from torch import Tensor, nn

SCHEMES: dict[str, Callable[[int, int], float]] = {
    "lecun": lambda inputs, outputs: 1 / inputs,
    "glorot": lambda inputs, outputs: 2 / (inputs + outputs),
    "he": lambda inputs, outputs: 2 / inputs,
}
"""Name in config.yaml -> variance of a weight, from the numbers of inputs that its unit sums over
and of units that its input contributes to: LeCun et al. 1998, Glorot and Bengio 2010, He et al.
2015.

:meta hide-value:
"""
DEFAULT_SCHEME = "lecun"
"""It keeps the variance of what goes forward. That of He makes up for the half that relu cuts off;
but where the maximum of a window is taken nothing is lost that way, logits would begin far from 0,
and plain gradient descent without warm-up then starts with steps that are too long.
"""


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

    def part(self, vector: Array) -> Array:
        """Its part of a flat vector, (size,), as a view."""
        return vector[self.offset : self.offset + self.size]


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

    @classmethod
    def from_layers(
        cls,
        input_shape: Sequence[int],
        classes: int,
        layers: Sequence[Layer | Mapping[str, Any]],
        name: str = "network",
    ) -> Self:
        """The network of these layers, for images of `input_shape` (C, H, W).

        Each layer is a Layer, such as Dense(units=10), or an entry as in config.yaml, such as
        {"dense": 10}. Raises ConfigError, naming the layer, for one that is unknown or does not fit
        the layer before it.
        """
        shape = tuple(input_shape)
        if len(shape) != 3 or not all(isinstance(n, int | np.integer) and n > 0 for n in shape):
            raise ConfigError(
                f"input_shape is {short(input_shape)}, not (channels, height, width) from 1 on"
            )
        sizes = tuple(int(n) for n in shape)
        several = isinstance(layers, Iterable) and not isinstance(layers, str | Mapping)
        given = list(layers) if several else layers
        return cls(name, sizes, int(classes), parse_layers(name, given, "layers"))

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

    @cached_property
    def drops_out(self) -> bool:
        """Whether what becomes of an image in training depends on its place in its batch."""
        return any(isinstance(layer, Dropout) for layer in self.layers)

    def views(self, vector: Array) -> list[Views]:
        """For each layer its parameters as views (not copies) of the flat `vector`."""
        views: list[Views] = [{} for _ in self.layers]
        for p in self.parameters:
            views[p.layer][p.key] = vector[p.offset : p.offset + p.size].reshape(p.shape)
        return views

    def named(self, vector: Array) -> dict[str, Array]:
        """Each parameter by its name, as a view (not a copy) of the flat `vector`.

        Raises ConfigError for a vector of another length.
        """
        shape = np.shape(vector)
        if shape != (self.parameter_count,):
            raise ConfigError(
                f"parameters have shape {shape}, but network '{self.name}' has "
                f"{self.parameter_count} of them: expected ({self.parameter_count},)"
            )
        return {
            p.name: vector[p.offset : p.offset + p.size].reshape(p.shape) for p in self.parameters
        }

    def to_torch(
        self, parameters: Array, normalize: tuple[Level, Level] | None = None
    ) -> "nn.Sequential":
        """The network as a torch.nn.Sequential with these weights, in evaluation mode.

        It takes (N, C, H, W) and returns logits (N, classes), float32. Without `normalize` it
        expects images that are normalised already, (byte - mean) / deviation. With it, (mean,
        deviation) in the units of bytes, a module at the beginning normalises bytes or floats from
        0 to 255; its numbers are no part of the state_dict. Raises MissingLibrary without PyTorch.
        """
        return sequential(
            self.layers, self.layer_names, self.shapes, self.named(parameters), normalize
        )

    def state_dict(self, parameters: Array) -> "dict[str, Tensor]":
        """What `to_torch(parameters).state_dict()` holds: copies, by the names in `parameters`."""
        return state_dict(self.named(parameters))

    def from_torch(self, state: "Mapping[str, Tensor] | nn.Module") -> Array:
        """The flat float32 vector of a state_dict, or of a module's.

        Tensors are taken by their names as far as they are those of `parameters`, and the others in
        their order. Raises DataError naming the tensor, its shape and the expected one where they
        do not fit, and for elements that are not finite.
        """
        wanted = {p.name: p.shape for p in self.parameters}
        return gather(wanted, arrays_of(state), f"state_dict for network '{self.name}'")

    def initial_parameters(
        self, seed: int, dtype: DTypeLike = np.float32, scheme: str = DEFAULT_SCHEME
    ) -> Array:
        """Flat vector of initial weights by one of SCHEMES; biases are zero.

        Weights are uniform, with the variance that the scheme gives. Numbers are drawn in float32
        whatever the `dtype`, so that every stage starts from the same ones. Raises ConfigError
        naming the choices for an unknown scheme.
        """
        if scheme not in SCHEMES:
            known = ", ".join(SCHEMES)
            raise ConfigError(f"unknown initial weights {scheme!r}; known: {known}")
        generator = np.random.default_rng(seed)
        vector = np.zeros(self.parameter_count, dtype=np.float32)
        for layer, shape, views in zip(self.layers, self.shapes, self.views(vector), strict=False):
            if "weight" in views:
                variance = SCHEMES[scheme](layer.fan_in(shape), layer.fan_out(shape))
                bound = math.sqrt(3 * variance)
                views["weight"][...] = generator.uniform(-bound, bound, views["weight"].shape)
        return vector.astype(dtype)

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


def parse_layers(name: str, specs: Any, where: str = "") -> tuple[Layer, ...]:
    """Layers from config.yaml's list: each entry `kind: {field: value}` or `kind: value`.

    `where` is what messages call the list, networks.NAME if not given. Raises ConfigError naming
    it, the position, the field and the choices.
    """
    where = where or f"networks.{name}"
    if not isinstance(specs, Sequence) or isinstance(specs, str) or not specs:
        raise ConfigError(f"{where} must be a list of layers, not {short(specs)}")
    return tuple(_parse_layer(f"{where}[{i}]", spec) for i, spec in enumerate(specs))


def _parse_layer(where: str, spec: Any) -> Layer:
    if isinstance(spec, Layer):
        return spec
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
