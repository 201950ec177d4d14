"""How commands read files of weights, and what they ask for that a file does not say."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnnlib.commands.options import first

if TYPE_CHECKING:
    from cnnlib.config import Config
    from cnnlib.exchange.found import Found
    from cnnlib.exchange.weights import Weights
    from cnnlib.levels import Level
    from cnnlib.network import Network

Levels = tuple["Level", "Level"]
ENDINGS = ".safetensors, .npz, .onnx, .pt or .pth"
MeanOption = Annotated[
    str | None,
    typer.Option(
        "--mean",
        help="What is subtracted from each byte, 0 to 255, where the file does not say: one "
        "number, or one of each channel as 125.3,123,113.9.",
    ),
]
DeviationOption = Annotated[
    str | None,
    typer.Option("--deviation", help="What the difference is divided by, likewise."),
]


def level(text: str | None, option: str) -> "Level | None":
    """One number, or several between commas; ConfigError naming the option for anything else."""
    from cnnlib.errors import ConfigError

    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{option} is a number, or one of each channel as 1.5,2,3; not {text!r}")
    return numbers if len(numbers) > 1 else numbers[0]


@dataclass(frozen=True)
class Asked:
    """What the options say about a file of weights."""

    settings: "Config"
    network: str | None
    """A network of the config, by its name; None for the file's own."""
    dataset: str | None
    """A data set of the config whose images and classes the network must suit."""
    mean: "Level | None" = None
    deviation: "Level | None" = None

    def read(self, path: Path, fallback: Callable[[], Levels] | None = None) -> "Weights":
        """The weights in a file, with the network of the options or of the file.

        `fallback` gives the mean and the deviation where neither says them. Raises ConfigError for
        a network that does not suit the data set, or that neither the file nor an option names, and
        for options that contradict the file; DataError for a file that is missing, damaged or
        incomplete.
        """
        from cnnlib.errors import ConfigError
        from cnnlib.exchange.formats import read

        found = read(path)
        options: dict[str, Level | None] = {"--mean": self.mean, "--deviation": self.deviation}
        for option, value in options.items():
            if value is not None and found.mean is not None:
                raise ConfigError(
                    f"{option} {value}: {found.what} says itself that images are normalised by "
                    f"mean {found.mean} and deviation {found.deviation}"
                )
        mean = deviation = None
        if found.mean is None and None in options.values() and fallback is not None:
            mean, deviation = fallback()
        return found.complete(
            self._network(found),
            mean if self.mean is None else self.mean,
            deviation if self.deviation is None else self.deviation,
        )

    def _network(self, found: "Found") -> "Network | None":
        """The network of the options; None for the file's own, which must suit the data set."""
        from cnnlib.errors import ConfigError

        dataset = first(self.dataset, self.settings.sweep.datasets)
        if self.network is not None:
            return self.settings.network(self.network, dataset, "--network")
        own = found.network
        if own is None:
            known = ", ".join(self.settings.networks)
            raise ConfigError(
                f"{found.what} holds tensors, but does not say of what network: name it by "
                f"--network; known: {known}"
            )
        if self.dataset is not None:
            spec = self.settings.dataset(dataset, "--dataset")
            if (own.input_shape, own.classes) != (tuple(spec.shape), spec.classes):
                raise ConfigError(
                    f"{found.what} is for images of shape {own.input_shape} in {own.classes} "
                    f"classes, but those of data set '{dataset}' are {tuple(spec.shape)} in "
                    f"{spec.classes}"
                )
        return None
