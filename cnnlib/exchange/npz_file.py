"""Weights as an .npz file, which numpy alone reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from cnnlib.errors import DataError
from cnnlib.exchange.found import Found, described
from cnnlib.exchange.weights import Weights, describe, read_description, sound
from cnnlib.files import read_arrays

KIND = "cnnlib weights 1"
OLD = (
    *("kind", "network", "input_shape", "classes", "layers"),
    *("mean", "deviation", "parameters", "origin"),
)
NEW = ("class_names", "steps", "version")
"""Arrays that files of version 0.1 lack."""
TEXTS = ("layers", "origin", "class_names")
"""Arrays that hold JSON."""


def write(path: Path, weights: Weights) -> None:
    """Write the arrays of OLD and NEW; `parameters` is the flat vector."""
    kept = describe(weights)
    with open(path, "wb") as out:
        np.savez(
            out,
            kind=KIND,
            network=kept.network,
            input_shape=kept.input_shape,
            classes=kept.classes,
            layers=json.dumps(kept.layers),
            mean=kept.mean,
            deviation=kept.deviation,
            parameters=weights.parameters.astype(np.float32),
            origin=json.dumps(kept.origin),
            class_names=json.dumps(kept.class_names),
            steps=kept.steps,
            version=kept.version,
        )


def read(path: Path) -> Found:
    """Read what `write`, of this version or version 0.1, wrote; nothing is ever unpickled.

    Raises DataError naming the file when it is missing, damaged or something else.
    """
    saved = read_arrays(path, OLD, "weights file", NEW)
    what = f"weights file {path}"
    if not np.array_equal(saved["kind"], KIND):
        raise DataError(f"{path} is no weights file of this version: it says {saved['kind']!s:.60}")
    values: dict[str, Any] = {}
    try:
        for name in saved.keys() - {"kind", "parameters"}:
            value = saved[name].tolist()
            values[name] = json.loads(value) if name in TEXTS else value
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{what} is damaged: {name}: {error}") from None
    for name in values.keys() - {"layers"}:
        if isinstance(values[name], list):
            values[name] = tuple(values[name])
    kept = read_description(values, what)
    network, vector = kept.built(what), saved["parameters"]
    sound(network, vector, kept.mean, kept.deviation, what)
    return described(what, network.named(vector), kept, network)
