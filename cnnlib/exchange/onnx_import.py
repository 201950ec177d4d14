"""Reads a network and its weights from a model of ONNX.

Only chains of known operators are read, with attributes that have a meaning here. Anything else is
an error that names the node: a model is never read as one that is merely similar.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cnnlib.errors import ConfigError, DataError
from cnnlib.exchange.found import Found, described
from cnnlib.exchange.onnx_export import KEY
from cnnlib.exchange.onnx_graph import load_model
from cnnlib.exchange.onnx_nodes import KNOWN, layers_of
from cnnlib.exchange.weights import read_description
from cnnlib.network import Network

if TYPE_CHECKING:
    from onnx import ModelProto


def read(path: Path) -> Found:
    """The network and the weights of a model; DataError naming the file and the node at fault.

    How images are normalised is known where the model takes bytes, and where this library wrote it.
    """
    return found_in(load_model(path, KNOWN), f"weights file {path}", path.stem)


def found_in(model: "ModelProto", what: str, name: str) -> Found:
    """`read` for a model in memory; the network is called `name` unless this library wrote it."""
    try:
        walk = layers_of(model, what)
    except RecursionError:
        raise DataError(f"{what}: its constants depend on too many others") from None
    text = next((p.value for p in model.metadata_props if p.key == KEY), None)
    kept = None if text is None else read_description(text, what)
    classes = int(np.prod(walk.shape))
    try:
        network = Network(
            kept.network if kept else name, walk.chain.shape, classes, tuple(walk.layers)
        )
    except ConfigError as error:
        raise DataError(f"{what}: {error}") from None
    arrays = {p.name: walk.arrays[p.layer][p.key] for p in network.parameters}
    inner = walk.normalisation()
    if kept is None:
        known = (0.0, 1.0) if walk.chain.takes_bytes else (None, None)
        return Found(what, arrays, network=network, mean=known[0], deviation=known[1], inner=inner)
    if walk.chain.takes_bytes:
        # The graph has the numbers in float32. Those of the metadata, if they agree, are exact.
        alike = all(
            np.allclose(*pair, rtol=1e-6)
            for pair in zip(inner, (kept.mean, kept.deviation), strict=True)
        )
        if not alike:
            kept = kept.model_copy(update={"mean": inner[0], "deviation": inner[1]})
        inner = (0.0, 1.0)
    names = kept.class_names if len(kept.class_names) == classes else ()
    kept = kept.model_copy(update={"class_names": names})
    return dataclasses.replace(described(what, arrays, kept, network), inner=inner)
