"""Trained weights in one file, with everything needed to use them again."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnnlib.errors import ConfigError, DataError
from cnnlib.files import read_arrays, write_whole
from cnnlib.layers import Array
from cnnlib.levels import Level, are_sound, level_of
from cnnlib.network import Network, parse_layers

KIND = "cnnlib weights 1"


@dataclass(frozen=True)
class Weights:
    """A network with its flat parameter vector; it sees (byte - mean) / deviation."""

    network: Network
    parameters: Array
    mean: Level
    deviation: Level
    origin: dict[str, Any] = field(default_factory=dict)
    """How the weights were trained (data set, stage, epochs, ...), for people; nothing reads it."""


def save_weights(path: Path | str, weights: Weights) -> None:
    """Write an .npz file, whole or not at all; UserError if that fails."""
    network = weights.network
    with write_whole(path) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            kind=KIND,
            network=network.name,
            input_shape=network.input_shape,
            classes=network.classes,
            layers=json.dumps([{layer.kind: layer.model_dump()} for layer in network.layers]),
            mean=weights.mean,
            deviation=weights.deviation,
            parameters=weights.parameters.astype(np.float32),
            origin=json.dumps(weights.origin),
        )


def load_weights(path: Path | str) -> Weights:
    """Read what `save_weights` wrote; nothing in the file is ever executed or unpickled.

    Raises DataError naming the file when it is missing, damaged or something else.
    """
    names = (
        "kind",
        "network",
        "input_shape",
        "classes",
        "layers",
        "mean",
        "deviation",
        "parameters",
        "origin",
    )
    saved = read_arrays(path, names, "weights file")
    if not np.array_equal(saved["kind"], KIND):
        raise DataError(f"{path} is no weights file of this version: it says {saved['kind']!s:.60}")
    try:
        shape = tuple(int(size) for size in saved["input_shape"])
        layers = parse_layers("weights", json.loads(saved["layers"].item()))
        network = Network(saved["network"].item(), shape, int(saved["classes"].item()), layers)
        mean, deviation = level_of(saved["mean"]), level_of(saved["deviation"])
        origin = json.loads(saved["origin"].item())
    except (TypeError, ValueError, OverflowError, RecursionError, ConfigError) as error:
        raise DataError(f"weights file {path} is damaged: {error}") from None
    parameters = saved["parameters"]
    sound = (
        min(shape, default=0) > 0
        and parameters.dtype == np.float32
        and parameters.shape == (network.parameter_count,)
        and are_sound(mean, deviation)
        and {np.size(mean), np.size(deviation)} <= {1, shape[0]}
    )
    if not sound:
        raise DataError(f"weights file {path} is damaged: its numbers do not fit its network")
    if not np.isfinite(parameters).all():
        raise DataError(f"weights file {path} holds weights that are not finite: it had diverged")
    return Weights(network, parameters, mean, deviation, origin)
