"""What a file of weights holds, which may be less than is needed to use them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cnnlib.errors import DataError
from cnnlib.exchange.weights import Description, Weights, sound
from cnnlib.layers import Array, Shape
from cnnlib.levels import Level, level_of
from cnnlib.named_tensors import gather
from cnnlib.network import Network


@dataclass(frozen=True)
class Found:
    """Named arrays, and what the file says about them."""

    what: str
    """What messages call the file."""
    arrays: Mapping[str, Array]
    ordered: bool = True
    """Whether they are in the order of the layers."""
    network: Network | None = None
    mean: Level | None = None
    deviation: Level | None = None
    class_names: tuple[str, ...] = ()
    steps: int = 0
    origin: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    inner: tuple[Level, Level] = (0.0, 1.0)
    """Mean and deviation by which the file normalises images a second time."""

    def complete(
        self, network: Network | None, mean: Level | None, deviation: Level | None
    ) -> Weights:
        """The weights, with what the file does not say taken from the arguments.

        A network that is given replaces the file's. Raises DataError for what is still missing, and
        for tensors and numbers that do not fit.
        """
        target = network or self.network
        if target is None:
            raise DataError(
                f"{self.what} holds tensors, but does not say of what network: give one (on the "
                "command line --network)"
            )
        mean = mean if self.mean is None else self.mean
        deviation = deviation if self.deviation is None else self.deviation
        if mean is None or deviation is None:
            raise DataError(
                f"{self.what} does not say how images are normalised: give mean and deviation, in "
                "the units of bytes from 0 to 255 (on the command line --mean and --deviation)"
            )
        mean, deviation = composed((mean, deviation), self.inner)
        where = self.what if target == self.network else f"{self.what}, for network {target.name!r}"
        parameters = gather(shapes_of(target), self.arrays, where, self.ordered)
        sound(target, parameters, mean, deviation, self.what)
        names = self.class_names if len(self.class_names) == target.classes else ()
        return Weights(
            target, parameters, mean, deviation, self.origin, names, self.steps, self.version
        )


def composed(first: tuple[Level, Level], then: tuple[Level, Level]) -> tuple[Level, Level]:
    """The mean and the deviation that do at once what two of each do one after the other."""
    if then == (0.0, 1.0):
        return first
    mean = np.add(first[0], np.multiply(first[1], then[0]))
    return level_of(mean), level_of(np.multiply(first[1], then[1]))


def without(both: tuple[Level, Level], then: tuple[Level, Level]) -> tuple[Level, Level]:
    """The first of two normalisations, from `composed` of both and the second one."""
    deviation = np.divide(both[1], then[1])
    return level_of(np.subtract(both[0], deviation * then[0])), level_of(deviation)


def shapes_of(network: Network) -> dict[str, Shape]:
    """Name -> shape of each parameter, in the order of the flat vector."""
    return {p.name: p.shape for p in network.parameters}


def described(what: str, arrays: Mapping[str, Array], kept: Description, network: Network) -> Found:
    """Arrays of a file of this library, with what it says about them and the network it names."""
    return Found(
        what,
        arrays,
        network=network,
        mean=kept.mean,
        deviation=kept.deviation,
        class_names=kept.class_names,
        steps=kept.steps,
        origin=kept.origin,
        version=kept.version,
    )
