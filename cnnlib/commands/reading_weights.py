"""How commands read files of weights, and what they ask for that a file does not say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cnnlib.commands.loading import load_data
from cnnlib.commands.options import dataset_for, given_or_usual

if TYPE_CHECKING:
    from cnnlib.config import Config
    from cnnlib.datasets import Dataset
    from cnnlib.exchange.found import Found
    from cnnlib.exchange.weights import Weights
    from cnnlib.levels import Level
    from cnnlib.network import Network

ENDINGS = ".safetensors, .npz, .onnx, .pt or .pth"
NamelessNetworkOption = Annotated[
    str | None,
    typer.Option(
        "--network", help="A network of the config, for a file that does not say its own."
    ),
]
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

    config: Sequence[Path] | None
    """Config files, which are read if another option needs them."""
    network: str | None
    """A network of the config, by its name; None for the file's own."""
    dataset: str | None
    """A data set of the config whose images and classes the network must suit; None for any."""
    data: Path | None = None
    """The data set's .npz file; None: from where the workflow puts it."""
    mean: str | None = None
    deviation: str | None = None

    @cached_property
    def settings(self) -> "Config":
        """The config; ConfigError if it is wrong."""
        from cnnlib.config import load_config

        return load_config(given_or_usual(list(self.config or [])))

    @cached_property
    def images(self) -> "Dataset":
        """The data set's images, of the sweep's first data set if no option names one."""
        return load_data(
            self.settings, dataset_for(self.settings, self.dataset, self.network), self.data
        )

    def class_names(self) -> tuple[str, ...]:
        """What the data set's classes are called; empty where they have no names."""
        spec = self.settings.dataset(
            dataset_for(self.settings, self.dataset, self.network), "--dataset"
        )
        return tuple(spec.class_names) or self.images.class_names

    def read(self, path: Path) -> "Weights":
        """The weights in a file, with the network of the options or of the file.

        Where neither the file nor an option says how images are normalised, they are like those of
        the data set that is named. Raises ConfigError for a network that does not suit the data
        set, or that neither the file nor an option names, and for options that contradict the file;
        DataError for a file that is missing, damaged or incomplete.
        """
        from cnnlib.errors import ConfigError
        from cnnlib.exchange.formats import read

        found = read(path)
        given = level(self.mean, "--mean"), level(self.deviation, "--deviation")
        options = dict(zip(("--mean", "--deviation"), given, strict=True))
        for option, value in options.items():
            if value is not None and found.mean is not None:
                raise ConfigError(
                    f"{option} {value}: {found.what} says itself that images are normalised by "
                    f"mean {found.mean} and deviation {found.deviation}"
                )
        mean, deviation = given
        if found.mean is None and None in given and self.dataset is not None:
            mean = self.images.mean if mean is None else mean
            deviation = self.images.deviation if deviation is None else deviation
        return found.complete(self._network(found), mean, deviation)

    def _network(self, found: "Found") -> "Network | None":
        """The network of the options; None for the file's own, which must suit the data set."""
        from cnnlib.errors import ConfigError

        if self.network is not None:
            dataset = dataset_for(self.settings, self.dataset, self.network)
            return self.settings.network(self.network, dataset, "--network")
        own = found.network
        if own is None:
            known = ", ".join(self.settings.networks)
            raise ConfigError(
                f"{found.what} holds tensors, but does not say of what network: name it by "
                f"--network; known: {known}"
            )
        if self.dataset is not None:
            dataset, spec = self.dataset, self.settings.dataset(self.dataset, "--dataset")
            if (own.input_shape, own.classes) != (tuple(spec.shape), spec.classes):
                raise ConfigError(
                    f"{found.what} is for images of shape {own.input_shape} in {own.classes} "
                    f"classes, but those of data set '{dataset}' are {tuple(spec.shape)} in "
                    f"{spec.classes}"
                )
        return None
