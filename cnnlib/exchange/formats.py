"""Reading and writing weights in any format; the file's ending says which."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cnnlib.errors import UserError
from cnnlib.exchange import npz_file, safetensors_file
from cnnlib.exchange.found import Found
from cnnlib.exchange.weights import Weights
from cnnlib.files import write_whole
from cnnlib.levels import Level
from cnnlib.network import Network


@dataclass(frozen=True)
class Format:
    """A kind of file: how it is written and read."""

    title: str
    write: Callable[[Path, Weights], None]
    read: Callable[[Path], Found]


FORMATS: dict[str, Format] = {
    ".safetensors": Format("safetensors", safetensors_file.write, safetensors_file.read),
    ".npz": Format("numpy", npz_file.write, npz_file.read),
}
"""Ending of a file's name -> format."""


def format_of(path: Path | str) -> Format:
    """The format by the ending of the file's name; UserError naming the choices for another one."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: weights are in files that end in one of {known}")
    return FORMATS[ending]


def save_weights(path: Path | str, weights: Weights) -> None:
    """Write the file in the format of its ending, whole or not at all; UserError if that fails."""
    write = format_of(path).write
    with write_whole(path) as temporary:
        write(temporary, weights)


def load_weights(
    path: Path | str,
    network: Network | None = None,
    mean: Level | None = None,
    deviation: Level | None = None,
) -> Weights:
    """The weights in a file.

    A file of another program does not say how images are normalised, and often not what the
    network is. What it lacks is taken from the arguments: `mean` and `deviation` are in the units
    of bytes, 0 to 255. A `network` that is given replaces the file's own, whose tensors must fit
    it. Nothing in a file is ever executed.

    Raises DataError naming the file and the problem when it is missing, damaged, something else or
    incomplete; UserError for an unknown ending.
    """
    return _reader(Path(path))(Path(path)).complete(network, mean, deviation)


def _reader(path: Path) -> Callable[[Path], Found]:
    """By the ending of the file's name; files of earlier versions may have any other."""
    if path.suffix.lower() not in FORMATS:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return npz_file.read
    return format_of(path).read
