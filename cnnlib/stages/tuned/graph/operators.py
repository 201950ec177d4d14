"""Operators of plan `graph`: a layer with weights, with what follows it, is three products."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cnnlib.engine.gpu_operator import THREADS, GpuOperator, Launch, mask_constants
from cnnlib.engine.source import Constant
from cnnlib.engine.stage import declining
from cnnlib.errors import Unsupported
from cnnlib.layers import Conv, Dense, Dropout, Layer, Shape, Subsample, enumerator_of
from cnnlib.layers.pairs import Pair
from cnnlib.stages.fused import by_direction, cannot_fuse
from cnnlib.stages.tuned.graph.options import VECTOR_BYTES, product_options
from cnnlib.stages.tuned.graph.tiles import (
    BLOCKS,
    GradientTile,
    ProductTile,
    gradient_tile,
    product_tile,
)
from cnnlib.stages.tuned.graph.windows import Windows

if TYPE_CHECKING:
    from cnnlib.stages.tuned.graph.head import Head

FEW_ERRORS = 64
"""Errors of an image that every block reads to find the largest, which a launch would cost more."""
MOST_WINDOW = 16
"""Most elements of a window that is subsampled at the end of a product."""


def cannot_follow(layers: Sequence[Layer], source_shape: Shape) -> str:
    """Why the layers cannot be one product with its end; "" if they can."""
    if why := cannot_fuse(layers, source_shape):
        return why
    subsample = next((layer for layer in layers if isinstance(layer, Subsample)), None)
    if subsample is None:
        return ""
    if math.prod(subsample.size) > MOST_WINDOW:
        return f"a window has more than {MOST_WINDOW} elements"
    if subsample.method == "mean" and enumerator_of(layers) != "IDENTITY":
        return "a mean over activations needs the slope at each of them, which is not kept"
    return ""


@declining(cannot_follow)
class GraphConv(GpuOperator):
    """A convolution with the activation, subsampling and dropout that follow it, if they do."""

    file = "tuned/graph/layer.cuh"
    kernels = ("forward", "find_peak", "backward")
    waits = True

    forward_tile: ProductTile
    gradient_tile: GradientTile
    errors_tile: ProductTile | None
    before: "GraphConv | None"
    """The operator of the same kind whose target is the source, if there is one."""
    head: "Head | None" = None
    """The network's last layers, from this one on, which are one launch."""
    in_head: bool = False
    """Whether the layer is one of those, and has no launches of its own."""
    peak_is_sought: bool
    """Whether the largest of the target's errors has to be looked for, as nothing leaves it."""

    def check(self) -> None:
        self.arithmetic = product_options(self.stage).arithmetic
        self.maps, self.kernel, self.stride, self.padding = self.sizes()
        subsample = self.planned.find(Subsample)
        self.window: Pair = subsample.size if subsample else (1, 1)
        self.method = subsample.method if subsample else "max"
        self.source_map, self.target_map = (
            (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)
            for shape in (self._source_shape(), self._target_shape())
        )
        self.size = self.maps * (self.source_map[0] * math.prod(self.kernel) + 1)

    def sizes(self) -> tuple[int, Pair, Pair, Pair]:
        """Maps, and the kernel's size, stride and padding."""
        layer = self.planned.layer(Conv)
        return layer.maps, layer.kernel, layer.stride, layer.padding

    def _source_shape(self) -> Shape:
        return self.planned.source_shape

    def _target_shape(self) -> Shape:
        return self.planned.target_shape

    @property
    def keeps_winners(self) -> bool:
        """Whether elements of the target have bytes: their windows' winners, or that they are 0."""
        return self.drops or (math.prod(self.window) > 1 and self.method == "max")

    @property
    def drops(self) -> bool:
        return self.planned.find(Dropout) is not None

    @property
    def windows(self) -> Windows:
        """The product forward, whose positions are also the terms of the gradient's sum."""
        channels, *source = self.source_map
        rows, columns = (s + 2 * p for s, p in zip(source, self.padding, strict=True))
        cells = self.target_map[1], self.target_map[2]
        return Windows(channels, self.kernel, self.stride, (rows, columns), cells, self.window)

    @property
    def windows_back(self) -> Windows:
        """The product backward: the kernel turned around goes over the errors."""
        _, height, width = self.source_map
        rows, columns = height + self.kernel[0] - 1, width + self.kernel[1] - 1
        places = height, width
        return Windows(self.maps, self.kernel, (1, 1), (rows, columns), places, (1, 1))

    def prepare(self, batch_size: int, before: GpuOperator | None) -> None:
        splits = self.arithmetic == "f16x3"
        self.peak_is_sought = splits
        self.before = before if splits and isinstance(before, GraphConv) else None
        if self.before:
            self.before.peak_is_sought = False
        options, limits = product_options(self.stage), self.limits
        room = VECTOR_BYTES[self.arithmetic]
        rest = batch_size, limits, room
        small = options.small_tiles
        forward = product_tile(self.windows, self.maps, *rest, small, overlapping=True)
        # There the other block of a multiprocessor may have a part of the gradient.
        back = product_tile(self.windows_back, self.source_map[0], *rest, small, overlapping=False)
        gradient = gradient_tile(self.windows, self.maps, *rest)
        if forward is None or gradient is None or back is None:
            raise self.too_large()
        self.forward_tile, self.gradient_tile = forward, gradient
        self.errors_tile = None if self.planned.is_first else back

    @property
    def finds_peak(self) -> bool:
        """Whether each block of the backward pass looks for the largest error itself."""
        return self.peak_is_sought and math.prod(self.target_map) <= FEW_ERRORS

    @property
    def backward_bytes(self) -> int:
        """Shared memory of the backward pass, whose blocks have tiles of both products."""
        errors = self.errors_tile.shared_bytes if self.errors_tile else 0
        return max(errors, self.gradient_tile.shared_bytes)

    def blocks(self, jobs: int, tile: ProductTile | None) -> int:
        """Blocks of a launch: those that keep their weights are as many as are resident."""
        resident = BLOCKS * self.limits.multiprocessors
        return min(jobs, resident) if tile and tile.keeps_weights else jobs

    @property
    def _backward_jobs(self) -> int:
        """Parts of both products of the backward pass."""
        errors = self.errors_tile.jobs if self.errors_tile else 0
        return self.gradient_tile.partial_sums * self.gradient_tile.tiles + errors

    def too_large(self) -> Unsupported:
        return self.unsupported(
            f"no tile of its products fits {self.limits.shared_bytes} bytes of shared memory"
        )

    def constants(self) -> Mapping[str, Constant]:
        parameters = self.planned.network.parameters
        own = next(p for p in parameters if p.layer == self.planned.start)
        errors = self.errors_tile.constants("ERRORS") if self.errors_tile else {}
        return {
            "THREADS": THREADS,
            "ARITHMETIC": self.arithmetic.upper(),
            "FIRST": int(self.planned.is_first),
            "CHANNELS": self.source_map[0],
            "HEIGHT": self.source_map[1],
            "WIDTH": self.source_map[2],
            "MAPS": self.maps,
            **by_direction("KERNEL", self.kernel),
            **by_direction("STRIDE", self.stride),
            **by_direction("PADDING", self.padding),
            **by_direction("WINDOW", self.window),
            **by_direction("OUT", (self.target_map[1], self.target_map[2])),
            "FUNCTION": enumerator_of(self.planned.layers),
            "METHOD": self.method.upper(),
            "DROPS": int(self.drops),
            **(mask_constants(self.planned) if self.drops else {}),
            "PARAMETERS": self.size,
            "WEIGHT_OFFSET": own.offset % 4,
            **self.forward_tile.constants("FORWARD"),
            **errors,
            **self.gradient_tile.constants(),
            "FORWARD_BYTES": self.forward_tile.shared_bytes,
            "BACKWARD_BYTES": self.backward_bytes,
            "FINDS_PEAK": int(self.finds_peak),
            "LEAVES_PEAK": int(self.before is not None),
        }

    def partial_groups(self, batch_size: int) -> int:
        return 0 if self.in_head else self.gradient_tile.partial_sums

    def allocate(self, batch_size: int) -> None:
        # Kernels take all of these arrays, and those that are not needed have one element.
        shape = (batch_size, *self.target_map) if self.keeps_winners else (1,)
        self.winners = self.array(shape, np.uint8)
        self.peak = self.array((1,), np.uint32)
        self.peak.fill_bytes(0)
        tiles = [tile for tile in (self.forward_tile, self.errors_tile) if tile]
        self.partials = self.array((max(tile.partial_size for tile in tiles),))
        self.tickets = self.array((max(tile.tiles for tile in tiles),), np.uint32)
        self.tickets.fill_bytes(0)

    def forward(self, count: int) -> list[Launch]:
        b, views, tile = self.buffers, self.buffers.parameters[0], self.forward_tile
        maps = (b.source, views["weight"], views["bias"], b.target, self.winners)
        scratch = (self.partials, self.tickets, self.peak)
        return [
            self.launch_blocks(
                "forward",
                self.blocks(tile.jobs, tile),
                *(*maps, *scratch, *b.draws, count),
                shared_bytes=tile.shared_bytes,
            )
        ]

    def backward(self, count: int) -> list[Launch]:
        b, weight = self.buffers, self.buffers.parameters[0]["weight"]
        launches = []
        if self.peak_is_sought and not self.finds_peak:
            elements = count * math.prod(self.target_map)
            launches.append(self.launch("find_peak", elements, b.target_errors, self.peak, count))
        # The first operator has no source errors, and its kernel does not touch the array it gets.
        source_errors = b.target_errors if b.source_errors is None else b.source_errors
        source_peak = self.peak if self.before is None else self.before.peak
        groups, jobs = self.gradient_tile.partial_sums, self._backward_jobs
        return [
            *launches,
            self.launch_blocks(
                "backward",
                self.blocks(jobs, self.errors_tile),
                *(b.target_errors, b.target, self.winners, b.source, weight),
                *(source_errors, source_peak, b.partial_sums),
                *(self.partials, self.tickets, self.peak, count, groups),
                shared_bytes=self.backward_bytes,
            ),
        ]


class GraphDense(GraphConv):
    """A fully connected layer with the activation and the dropout that follow it, if they do.

    It is a convolution of maps of one place: each of its inputs is a channel, each unit a map.
    """

    def sizes(self) -> tuple[int, Pair, Pair, Pair]:
        return self.planned.layer(Dense).units, (1, 1), (1, 1), (0, 0)

    def _source_shape(self) -> Shape:
        return (math.prod(self.planned.source_shape),)
