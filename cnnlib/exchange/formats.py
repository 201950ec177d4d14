"""Reading and writing weights in any format; the ending of the file's name says which."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cnnlib.errors import ConfigError
from cnnlib.exchange import npz_file, onnx_export, onnx_import, safetensors_file, torch_file
from cnnlib.exchange.found import Found
from cnnlib.exchange.weights import Weights
from cnnlib.files import write_whole
from cnnlib.levels import Level
from cnnlib.network import Network


@dataclass(frozen=True)
class Format:
    """A kind of file, and how it is written and read."""

    title: str
    write: Callable[[Path, Weights], None]
    read: Callable[[Path], Found]


STATE_DICT = Format("a state_dict of PyTorch", torch_file.write, torch_file.read)
FORMATS: dict[str, Format] = {
    ".safetensors": Format("safetensors", safetensors_file.write, safetensors_file.read),
    ".npz": Format("arrays of numpy", npz_file.write, npz_file.read),
    ".onnx": Format("a model of ONNX", onnx_export.write, onnx_import.read),
    ".pt": STATE_DICT,
    ".pth": STATE_DICT,
}
"""Ending of a file's name -> format.

:meta hide-value:
"""


def format_of(path: Path | str) -> Format:
    """The format by the ending of the file's name; ConfigError naming the choices for others."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise ConfigError(f"{path}: weights are in files that end in one of {', '.join(FORMATS)}")
    return FORMATS[ending]


def save_weights(path: Path | str, weights: Weights) -> None:
    """Write the file in the format of its ending, whole or not at all.

    Raises UserError if that fails, and MissingLibrary where a format needs a library that is not
    installed.
    """
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

    A file of another program does not say how images are normalised, and often not what the network
    is. What it lacks is taken from the arguments; `mean` and `deviation` are in the units of bytes,
    0 to 255. A `network` that is given replaces the file's own, and the tensors must fit it.
    Nothing in a file is ever executed.

    Raises DataError naming the file and the problem when it is missing, damaged, something else or
    incomplete; ConfigError for an unknown ending.
    """
    return read(path).complete(network, mean, deviation)


def read(path: Path | str) -> Found:
    """What a file holds, complete or not; it raises what `load_weights` does."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        # Files of version 0.1 may have any name.
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return npz_file.read(path)
    return format_of(path).read(path)
