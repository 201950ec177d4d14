"""The head of a network in plan `graph`: its last fully connected layers and the loss.

One launch takes images through these layers forward, makes the loss, and sends the errors back. It
leaves values and errors of each layer in `traces`, from which the update makes the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Limits
from cnnlib.engine.gpu_operator import THREADS, GpuOperator
from cnnlib.engine.source import Constant, KernelSource
from cnnlib.layers import enumerator_of
from cnnlib.stages.tuned.graph.operators import GraphDense
from cnnlib.stages.tuned.graph.options import ProductOptions

MOST_LAYERS = 3
"""Layers of a head, at most: kernels/tuned/graph/head.cuh has names for as many."""
MOST_IMAGES = 8
"""Images that a block has at a time, at most: each of its warps has the loss of one."""

FEW_GROUPS, MANY_GROUPS = 8, 64
"""Partial sums of a weight up to which one thread adds them up, and up to which a few do."""
MANY_SUMS = 64 * 1024
"""Sums of a layer from which on each of its threads has several."""
TILE_UNITS, TILE_INPUTS = 4, 32
"""Units and inputs of the part of a gradient that a block of the update makes."""
JOBS = 8
"""Where a row of the update's table has the number of its parts."""


@dataclass(frozen=True)
class HeadLayer:
    """A fully connected layer of a head, and where its numbers are."""

    inputs: int
    units: int
    function: str
    offset: int
    """Of its weights in the vector of all parameters."""
    values: int
    """Of its source (batch, inputs) in the traces."""
    errors: int
    """Of the errors of its sums (batch, units) in the traces."""

    @property
    def size(self) -> int:
        return self.inputs * self.units + self.units


@dataclass(frozen=True)
class Head:
    """The last layers of a network, from operator `start` on, with batches of one size."""

    start: int
    layers: tuple[HeadLayer, ...]
    images: int
    """Images that a block has at a time."""
    traces: int
    """Floats of all layers' traces."""
    leaves_peak: bool
    """Whether the layer before wants to know its largest error."""

    @property
    def shared_bytes(self) -> int:
        """What LastLayers of kernels/tuned/graph/head.cuh has in shared memory."""
        layers = self.layers
        weights = sum(
            _fours(layer.offset % 4 + layer.units * layer.inputs) + _fours(layer.units)
            for layer in layers
        )
        values = sum(_fours(layer.inputs) + _fours(layer.units) for layer in layers)
        logits = _fours(layers[-1].units)
        sums = max(_parts(layer.inputs) * _fours(layer.inputs) for layer in layers)
        return 4 * (weights + self.images * (values + logits + sums))

    def source(self, loss: str, counts: bool) -> KernelSource:
        constants: dict[str, Constant] = {
            "THREADS": THREADS,
            "IMAGES": self.images,
            "LAYERS": len(self.layers),
            "CLASSES": self.layers[-1].units,
            "LOSS": f"graph::{loss.upper()}",
            "FIRST": int(self.start == 0),
            "LEAVES_PEAK": int(self.leaves_peak),
            "COUNTS": int(counts),
            "BYTES": self.shared_bytes,
        }
        for i, layer in enumerate(self.layers):
            constants |= {
                f"INPUTS_{i}": layer.inputs,
                f"UNITS_{i}": layer.units,
                f"FUNCTION_{i}": layer.function,
                f"WEIGHTS_{i}": layer.offset,
                f"VALUES_{i}": layer.values,
                f"ERRORS_{i}": layer.errors,
            }
        return KernelSource("head", "tuned/graph/head.cuh", constants)


def _fours(floats: int) -> int:
    return ceil_div(floats, 4) * 4


def _parts(inputs: int) -> int:
    """Groups of threads that share the terms of an error that is sent back."""
    return max(1, THREADS // (ceil_div(inputs, 32) * 32))


def head_of(
    operators: Sequence[GpuOperator], options: ProductOptions, batch: int, limits: Limits
) -> Head | None:
    """The longest head that is allowed and fits a block's shared memory; None if there is none."""
    if batch > options.head_batch:
        return None
    found: Head | None = None
    for start in reversed(range(max(0, len(operators) - MOST_LAYERS), len(operators))):
        operator = operators[start]
        if not isinstance(operator, GraphDense) or operator.drops:
            break
        head = _head(operators[start:], start, batch, limits)
        weights = sum(layer.inputs * layer.units for layer in head.layers)
        if weights > options.head or head.shared_bytes > limits.shared_bytes:
            break
        found = head
    return found


def _head(operators: Sequence[GpuOperator], start: int, batch: int, limits: Limits) -> Head:
    layers, place = list[HeadLayer](), 0
    for operator in operators:
        assert isinstance(operator, GraphDense)
        planned = operator.planned
        inputs, units = operator.source_map[0], operator.maps
        own = next(p for p in planned.network.parameters if p.layer == planned.start)
        errors = place + batch * inputs
        function = enumerator_of(planned.layers)
        layers.append(HeadLayer(inputs, units, function, own.offset, place, errors))
        place = errors + batch * units
    images = min(MOST_IMAGES, ceil_div(batch, limits.multiprocessors))
    first = operators[0]
    leaves_peak = isinstance(first, GraphDense) and first.before is not None
    return Head(start, tuple(layers), images, place, leaves_peak)


def update_shares(size: int, groups: int) -> tuple[int, int]:
    """How many threads add up the partial sums of how many weights, where each of `size` has
    `groups` of them.
    """
    shares = 1 if groups <= FEW_GROUPS else 8 if groups <= MANY_GROUPS else 32
    return shares, 4 if shares == 1 or size * shares >= MANY_SUMS else 1


def pixels_together(image_size: int) -> int:
    """Pixels that a thread gathers at once."""
    return 4 if image_size % 4 == 0 else 1


def update_segment(
    shares: int,
    offset: int,
    size: int,
    groups: int,
    start: int,
    units: int,
    inputs: int = 0,
    errors: int = 0,
) -> tuple[int, ...]:
    """A row of the update's table: UpdateSegment of kernels/tuned/graph/update.cuh."""
    if shares:
        apart = THREADS // shares
        jobs = ceil_div(size, apart * units)
    else:
        apart = ceil_div(inputs + 1, TILE_INPUTS)
        jobs = apart * ceil_div(units, TILE_UNITS)
    return (shares, offset, size, groups, start, units, inputs, errors, jobs, apart, 0, 0)


def update_blocks(segments: Sequence[Sequence[int]], gathered: int) -> int:
    """Blocks of StepUpdate (kernels/tuned/graph/update.cuh) that have something to do."""
    return sum(segment[JOBS] for segment in segments) + ceil_div(gathered, THREADS)
