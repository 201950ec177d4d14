"""A trained network with all that is needed to use it again, whatever file it is kept in."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import cnnlib
from cnnlib.config_errors import first_problem
from cnnlib.errors import ConfigError, DataError
from cnnlib.layers import Array
from cnnlib.levels import Level
from cnnlib.network import Network, parse_layers


@dataclass(frozen=True)
class Weights:
    """A network with its flat parameter vector; it sees (byte - mean) / deviation.

    `mean` and `deviation` are in the units of bytes, 0 to 255: one number for all channels, or one
    for each channel.
    """

    network: Network
    parameters: Array
    """(network.parameter_count,) float32."""
    mean: Level
    deviation: Level
    origin: dict[str, Any] = field(default_factory=dict)
    """How the weights were trained (data set, stage, epochs, ...), for people; nothing reads it."""
    class_names: tuple[str, ...] = ()
    """What the classes are called, in their order; empty if they are only numbered."""
    steps: int = 0
    """Optimizer steps since the initial weights; 0 where nothing is known of them."""
    version: str = cnnlib.__version__
    """The version of cnnlib that wrote the weights; "" if another program did."""

    @property
    def tensors(self) -> dict[str, Array]:
        """Each parameter by its name in `network.parameters`, as a view of the vector."""
        return self.network.named(self.parameters)

    def class_name(self, label: int) -> str:
        """What class `label` is called: its name, or its number if it has none."""
        return self.class_names[label] if self.class_names else str(label)


Size = Annotated[int, Field(gt=0, lt=2**31)]


class Description(BaseModel):
    """All of Weights but the parameters, as files keep it."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    version: str = ""
    network: str
    input_shape: tuple[Size, Size, Size]
    classes: Size
    layers: list[Any]
    mean: Level
    deviation: Level
    class_names: tuple[str, ...] = ()
    steps: int = Field(default=0, ge=0)
    origin: dict[str, Any] = {}

    def built(self, what: str) -> Network:
        """The network; DataError, beginning with `what`, for one that is impossible."""
        try:
            layers = parse_layers("weights", self.layers)
            return Network(self.network, self.input_shape, self.classes, layers)
        except ConfigError as error:
            raise DataError(f"{what} is damaged: {error}") from None


def describe(weights: Weights) -> Description:
    """What a file keeps of the weights beside their numbers."""
    network = weights.network
    return Description.model_validate(
        {
            "version": cnnlib.__version__,
            "network": network.name,
            "input_shape": network.input_shape,
            "classes": network.classes,
            "layers": [{layer.kind: layer.model_dump(mode="json")} for layer in network.layers],
            "mean": weights.mean,
            "deviation": weights.deviation,
            "class_names": weights.class_names,
            "steps": weights.steps,
            "origin": weights.origin,
        }
    )


def read_description(content: str | dict[str, Any], what: str) -> Description:
    """The Description in JSON or in a dictionary; DataError, beginning with `what`, if it is wrong.

    Class names are as many as classes, or none.
    """
    try:
        if isinstance(content, str):
            kept = Description.model_validate_json(content)
        else:
            kept = Description.model_validate(content)
    except ValidationError as error:
        raise DataError(first_problem(error, f"{what} is damaged: its metadata")) from None
    if len(kept.class_names) not in (0, kept.classes):
        raise DataError(
            f"{what} is damaged: it names {len(kept.class_names)} of {kept.classes} classes"
        )
    return kept


def sound(network: Network, parameters: Array, mean: Level, deviation: Level, what: str) -> None:
    """Raise DataError, beginning with `what`, for numbers that the network cannot compute with."""
    wrong = f"{what} is damaged: its numbers do not fit its network"
    channels = network.input_shape[0]
    for name, level in (("mean", mean), ("deviation", deviation)):
        numbers = level if isinstance(level, tuple) else (level,)
        if isinstance(level, tuple) and len(numbers) != channels:
            raise DataError(f"{wrong}: {name} has {len(numbers)} numbers for {channels} channels")
        if not all(math.isfinite(n) and (name == "mean" or n > 0) for n in numbers):
            raise DataError(f"{wrong}: the {name} is {level}")
    wanted = (network.parameter_count,)
    if parameters.dtype != np.float32 or parameters.shape != wanted:
        raise DataError(
            f"{wrong}: its parameters are {parameters.dtype} of shape {parameters.shape}, expected "
            f"float32 of {wanted}"
        )
    for name, array in network.named(parameters).items():
        if not np.isfinite(array).all():
            raise DataError(f"{what} holds weights that are not finite, in {name}: it had diverged")
