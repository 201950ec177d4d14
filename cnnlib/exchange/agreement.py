"""Whether other programs compute what this library does with the same weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cnnlib.engine import Bytes, Setup, Stage, plan
from cnnlib.errors import MissingLibrary, Unsupported
from cnnlib.exchange import onnx_import
from cnnlib.exchange.found import without
from cnnlib.exchange.weights import Weights
from cnnlib.layers import Array, softmax
from cnnlib.levels import Level, for_maps
from cnnlib.network import Network
from cnnlib.stages import find_stage

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

TOLERANCE = 3e-5
"""Share of the largest logit by which logits may differ. Sums of float32 numbers in another order
differ by less than a tenth of it in the networks that are shipped; a wrong attribute costs
thousands of times as much.
"""
CHUNK = 250
"""Images that a program gets at a time."""


@dataclass(frozen=True)
class Difference:
    """How far another program's logits are from this library's."""

    program: str
    """Its name and version."""
    images: int
    largest: float
    """The largest difference of two logits; nan if one of them is not finite."""
    scale: float
    """The magnitude of the largest logit."""
    same_class: int
    """Images for which both find the same class most probable."""

    @property
    def agrees(self) -> bool:
        return self.largest <= TOLERANCE * self.scale

    def __str__(self) -> str:
        return (
            f"{self.program}: on {self.images:,} images the logits differ by at most "
            f"{self.largest:.2g}, the largest of them being {self.scale:.3g}; the same class for "
            f"{self.same_class:,}"
        )


def cpu_stage(network: Network) -> Stage:
    """The stage that computes logits on a CPU: gemm, or naive where gemm has no operator."""
    gemm = find_stage("gemm", "the comparison of logits")
    try:
        plan(gemm, network)
    except Unsupported:
        return find_stage("naive", "the comparison of logits")
    return gemm


def own_logits(weights: Weights, images: Bytes) -> Array:
    """Logits (n, classes) by `cpu_stage`, for images (n, C, H, W) of bytes."""
    stage = cpu_stage(weights.network)
    setup = Setup(weights.network, CHUNK, 0.0, mean=weights.mean, deviation=weights.deviation)
    with stage.engine(stage, setup) as engine:
        engine.parameters = weights.parameters
        return engine.logits(images)


def with_onnxruntime(path: Path, weights: Weights, images: Bytes) -> Difference:
    """How far the logits of a model of ONNX are from those of `weights`, read from it or written.

    A model that takes floats gets images that are normalised as the weights say. One that ends in a
    softmax or a log-softmax is compared with that of the logits. Raises MissingLibrary without
    onnxruntime.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingLibrary(
            "the check of a model needs onnxruntime, which is not installed "
            "(pip install onnxruntime)"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone: it warns of initializers that it optimises away
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outer = without((weights.mean, weights.deviation), onnx_import.read(path).inner)
    theirs = np.concatenate(list(_outputs(session, images, *outer)))
    return compare(
        f"onnxruntime {onnxruntime.__version__}", theirs, _ended(path, own_logits(weights, images))
    )


def _outputs(
    session: "InferenceSession", images: Bytes, mean: Level, deviation: Level
) -> Iterator[Array]:
    (source,) = session.get_inputs()
    size = source.shape[0] if isinstance(source.shape[0], int) else CHUNK
    for first in range(0, len(images), size):
        part: NDArray[np.generic] = images[first : first + size]
        count = len(part)
        if isinstance(source.shape[0], int):  # a model of a fixed number of images
            part = np.resize(part, (size, *part.shape[1:]))
        if source.type != "tensor(uint8)":
            centred = part.astype(np.float64) - for_maps(mean, np.float64)
            part = (centred / for_maps(deviation, np.float64)).astype(np.float32)
        yield session.run(None, {source.name: part})[0].reshape(len(part), -1)[:count]


def _ended(path: Path, logits: Array) -> Array:
    """The logits, after the softmax or log-softmax that the model ends in."""
    import onnx

    last = onnx.load(path, load_external_data=False).graph.node[-1].op_type
    if last not in ("Softmax", "LogSoftmax"):
        return logits
    shares = softmax(logits.astype(np.float64))
    return np.log(shares) if last == "LogSoftmax" else shares


def with_pytorch(weights: Weights, images: Bytes) -> Difference:
    """How far the logits of `Network.to_torch` are; MissingLibrary without PyTorch."""
    from cnnlib.torch_modules.build import torch_module

    torch = torch_module("the check by PyTorch")
    module = weights.network.to_torch(weights.parameters, (weights.mean, weights.deviation))
    with torch.no_grad():
        parts = [
            module(torch.from_numpy(images[first : first + CHUNK])).numpy()
            for first in range(0, len(images), CHUNK)
        ]
    return compare(
        f"PyTorch {torch.__version__}", np.concatenate(parts), own_logits(weights, images)
    )


def compare(program: str, theirs: Array, ours: Array) -> Difference:
    """The Difference of two arrays of logits (n, classes)."""
    return Difference(
        program,
        len(ours),
        float(np.abs(theirs.astype(np.float64) - ours).max()),
        float(np.abs(ours).max()),
        int((theirs.argmax(axis=1) == ours.argmax(axis=1)).sum()),
    )
