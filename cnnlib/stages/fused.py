"""Stage 3: convolution, bias, activation and subsampling in one kernel; errors are pushed back.

The full-size map never reaches device memory: forward keeps each window's value and winner, and
the backward pass rebuilds one image's full-size error map in shared memory. Weight gradients are
left as partial sums, one per group of images, which the update adds up. Dense layers take bias and
activation along.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Argument, Limits
from cnnlib.engine import Planned, Stage, options_of
from cnnlib.engine.gpu import GpuEngine
from cnnlib.engine.gpu_operator import THREADS, GpuOperator, GpuOptions, Launch
from cnnlib.engine.stage import declining
from cnnlib.layers import (
    FUNCTIONS,
    Activation,
    Conv,
    Dense,
    Dropout,
    Layer,
    Shape,
    Subsample,
    enumerator_of,
)
from cnnlib.stages.gemm_cuda import GemmActivation, GemmDropout, GemmSubsample, tile_count, tile_of

PLAIN_SHARED_BYTES = 48 * 1024
"""Shared memory that every CUDA device gives a block without being asked for more."""
MOST_ROWS_EACH = 4
"""Rows of the weight gradient that a thread can keep in registers."""
COMPARED = ("push_errors", "pull_errors")
"""Kernels that send errors back and do nothing else, one for each way of doing it."""
MOST_BLOCKS = 4
"""Blocks of a multiprocessor that sum weight gradients: each leaves a partial sum to be added."""
MOST_WINDOW = 256
"""Most elements of a window: a byte names the winner, and a thread has all of them in registers."""
IMAGES_PER_GROUP = 128
"""Images over which one block sums a dense layer's weight gradient."""


def largest_divisor(number: int, limit: int, good: Callable[[int], bool]) -> int:
    """The largest divisor of `number` up to `limit` that is `good`, or 1."""
    return next((n for n in range(limit, 1, -1) if number % n == 0 and good(n)), 1)


def by_direction(name: str, pair: tuple[int, int]) -> dict[str, int]:
    """The constants NAME_ROWS and NAME_COLUMNS."""
    return {f"{name}_ROWS": pair[0], f"{name}_COLUMNS": pair[1]}


def cannot_fuse(layers: Sequence[Layer], source_shape: Shape) -> str:
    """Why the layers cannot be one kernel, which begin with maps of `source_shape`; "" if they can.

    A window that shares elements with its neighbours would compute them again.
    """
    for layer in layers:
        if isinstance(layer, Activation) and not FUNCTIONS[layer.function].from_target:
            return f"the derivative of {layer.function} needs its source, which is not kept"
        if isinstance(layer, Subsample):
            if any(layer.padding):
                return "its windows have padding"
            if layer.strides != layer.size:
                return "its windows do not lie side by side"
            if math.prod(layer.size) > MOST_WINDOW:
                return f"a window has more than {MOST_WINDOW} elements"
    return ""


@declining(cannot_fuse)
class FusedConv(GpuOperator):
    """A convolution with the activation and the subsampling that follow it, if they do."""

    file = "fused/conv.cuh"
    kernels: ClassVar[tuple[str, ...]] = ("forward", "backward", *COMPARED)

    def __init__(self, planned: Planned, stage: Stage, limits: Limits) -> None:
        conv = planned.layer(Conv)
        self.channels, self.height, self.width = planned.source_shape
        self.maps = conv.maps
        self.conv, self.terms = conv, conv.fan_in(planned.source_shape)
        self.padded_height = self.height + 2 * conv.padding[0]
        self.padded_width = self.width + 2 * conv.padding[1]
        subsample = planned.find(Subsample)
        self.window = subsample.size if subsample else (1, 1)
        self.method = subsample.method if subsample else "max"
        self.function = enumerator_of(planned.layers)
        subsampled = math.prod(self.window) > 1
        # A mean over a curved activation needs the slope at every value: it alone recomputes.
        self.recompute = subsampled and self.method == "mean" and self.function != "IDENTITY"
        self.keeps_winners = subsampled and self.method == "max"
        self.out_rows, self.out_columns = planned.target_shape[1:]
        self.out_area = self.out_rows * self.out_columns
        # Positions that no window covers are not computed: their errors are zero.
        self.rows = self.out_rows * self.window[0]
        self.columns = self.out_columns * self.window[1]
        self.maps_each = largest_divisor(
            self.maps, 4, lambda each: self.maps // each * self.out_area >= 128
        )
        self.gradient_rows = self.maps * self.channels * conv.kernel[0]
        self.choose(planned, limits)
        super().__init__(planned, stage, limits)

    def choose(self, planned: Planned, limits: Limits) -> None:
        """Choose the sizes that are free, so that shared memory suffices and threads have work."""
        size = self.padded_size
        items = self.maps // self.maps_each * self.out_area
        # A block takes several small images, but needs no more memory than it has without asking.
        fits = PLAIN_SHARED_BYTES // 4 - self.maps * self.terms
        self.images = max(1, min(THREADS // items, fits // size))
        self.own_rows(most_split_k=self.rows)

    @property
    def padded_size(self) -> int:
        """Floats of a source image with its padding."""
        return self.channels * self.padded_height * self.padded_width

    @property
    def split_floats(self) -> int:
        """Floats in which the threads that share a row of the weight gradient add up its parts."""
        return THREADS * self.rows_each * (self.conv.kernel[1] + 1) * (self.split_k > 1)

    def own_rows(self, most_split_k: int) -> None:
        """Share the rows of the weight gradient out to threads (see kernels/conv.cuh)."""
        self.split_k = 1
        while self.gradient_rows * self.split_k * 2 <= THREADS and self.split_k * 2 <= most_split_k:
            self.split_k *= 2
        self.rows_each = min(MOST_ROWS_EACH, ceil_div(self.gradient_rows * self.split_k, THREADS))
        self.m_tiles = ceil_div(self.gradient_rows, self.rows_each * THREADS // self.split_k)

    def check(self) -> None:
        # The arrays of the kernels in shared memory; kernels/fused/conv.cuh asserts that they fit.
        size = self.padded_size
        weights, maps = self.maps * self.terms, self.maps * self.rows * self.columns
        gradient = size + maps + self.recompute * weights
        errors = 0
        if not self.planned.is_first:
            held = self.terms * ceil_div(self.maps, 4) * 4
            errors = held + size + maps + self.recompute * (size + weights)
        self.forward_bytes = 4 * (weights + self.images * size)
        self.backward_bytes = 16 * ceil_div(max(gradient, errors, self.split_floats), 4)
        wanted = max(self.forward_bytes, self.backward_bytes)
        if wanted > self.limits.shared_bytes:
            raise self.unsupported(
                f"it keeps a whole image, its map and the weights in shared memory, which takes "
                f"{wanted} of {self.limits.shared_bytes} bytes; stage 'ring' needs only a window "
                f"of rows"
            )

    def constants(self) -> Mapping[str, int | str]:
        return {
            **self.common_constants(),
            "FORWARD_BYTES": self.forward_bytes,
            "BACKWARD_BYTES": self.backward_bytes,
            "IMAGES": self.images,
            "PUSH": int(options_of(self.stage, GpuOptions).errors == "push"),
        }

    def common_constants(self) -> Mapping[str, int | str]:
        """The constants that the kernels of stages fused and ring both need."""
        return {
            "THREADS": THREADS,
            "CHANNELS": self.channels,
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "MAPS": self.maps,
            **by_direction("KERNEL", self.conv.kernel),
            **by_direction("STRIDE", self.conv.stride),
            **by_direction("PADDING", self.conv.padding),
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "FUNCTION": self.function,
            **by_direction("WINDOW", self.window),
            "METHOD": self.method.upper(),
            "FIRST": int(self.planned.is_first),
            "RECOMPUTE": int(self.recompute),
            "MAPS_EACH": self.maps_each,
            "ROWS_EACH": self.rows_each,
            "SPLIT_K": self.split_k,
            "M_TILES": self.m_tiles,
            "PARAMETERS": self.maps * self.terms + self.maps,
        }

    def partial_groups(self, batch_size: int) -> int:
        self.groups = self.groups_of(batch_size, self.backward_bytes)
        return self.groups

    def groups_of(self, units: int, shared_bytes: int) -> int:
        """Groups in which `units` images or tiles are summed: as many as blocks are resident."""
        resident = max(1, min(MOST_BLOCKS, self.limits.shared_bytes // shared_bytes))
        return max(1, min(units, self.limits.multiprocessors * resident // self.m_tiles))

    def allocate(self, batch_size: int) -> None:
        # Where there are no winners the array is one byte an image: kernels take it all the same.
        shape = self.planned.target_shape if self.keeps_winners else ()
        self.winners = self.array((batch_size, *shape), np.uint8)

    def forward(self, count: int) -> list[Launch]:
        b, views = self.buffers, self.buffers.parameters[0]
        args = (b.source, views["weight"], views["bias"], b.target, self.winners, count)
        blocks = ceil_div(count, self.images)
        return [self.launch_blocks("forward", blocks, *args, shared_bytes=self.forward_bytes)]

    def backward(self, count: int) -> list[Launch]:
        jobs = self.groups * self.m_tiles + (0 if self.planned.is_first else count)
        return [
            self.launch_blocks(
                "backward", jobs, *self.backward_args(count), shared_bytes=self.backward_bytes
            )
        ]

    def compared(self, count: int) -> list[Launch]:
        b, views = self.buffers, self.buffers.parameters[0]
        if b.source_errors is None:
            return []
        maps = (b.target, self.winners, b.target_errors, b.source_errors)
        args = (b.source, views["weight"], views["bias"], *maps, count)
        return [
            self.launch_blocks(kernel, count, *args, shared_bytes=self.backward_bytes)
            for kernel in COMPARED
        ]

    def backward_args(self, count: int) -> tuple[Argument, ...]:
        """Arguments of the backward kernel, which sums gradients and sends errors back."""
        b, views = self.buffers, self.buffers.parameters[0]
        # The first operator has no source errors; its kernel does not touch the array it gets.
        errors = b.target_errors if b.source_errors is None else b.source_errors
        maps = (b.target, self.winners, b.target_errors, errors)
        return (b.source, views["weight"], views["bias"], *maps, b.partial_sums, count, self.groups)


SMALL_TILE = tile_of(16)
"""Few rows: a dense layer is little work, and only many blocks reach all of the GPU."""


@declining(cannot_fuse)
class FusedDense(GpuOperator):
    """A fully connected layer with the activation that follows it, if one does."""

    file = "fused/dense.cuh"
    kernels = ("forward", "backward")

    def constants(self) -> Mapping[str, int | str]:
        return {
            "THREADS": THREADS,
            "INPUTS": self.inputs,
            "UNITS": self.units,
            "FUNCTION": enumerator_of(self.planned.layers),
            "FIRST": int(self.planned.is_first),
            "M_TILE": SMALL_TILE[0],
            "N_TILE": SMALL_TILE[1],
            "PARAMETERS": self.units * self.inputs + self.units,
        }

    def check(self) -> None:
        self.inputs = math.prod(self.planned.source_shape)
        self.units = self.planned.layer(Dense).units

    def partial_groups(self, batch_size: int) -> int:
        self.groups = ceil_div(batch_size, IMAGES_PER_GROUP)
        return self.groups

    def forward(self, count: int) -> list[Launch]:
        b, views = self.buffers, self.buffers.parameters[0]
        args = (b.source, views["weight"], views["bias"], b.target, count)
        return [self.launch_blocks("forward", tile_count(SMALL_TILE, count, self.units), *args)]

    def backward(self, count: int) -> list[Launch]:
        b, views = self.buffers, self.buffers.parameters[0]
        blocks = tile_count(SMALL_TILE, self.units, self.inputs + 1) * self.groups
        if b.source_errors is not None:
            blocks += tile_count(SMALL_TILE, count, self.inputs)
        errors = b.target_errors if b.source_errors is None else b.source_errors
        return [
            self.launch_blocks(
                "backward",
                blocks,
                *(b.source, views["weight"], b.target, b.target_errors, errors),
                *(b.partial_sums, count, self.groups),
            )
        ]


STAGE = Stage(
    name="fused",
    title="3 fused",
    change="convolution, bias, activation and subsampling in one kernel; errors pushed to inputs",
    runs_on="cuda",
    engine=GpuEngine,
    after="gemm_cuda",
    color="#1857a8",
    marker="D",
    operators={
        (Conv, Activation, Subsample): FusedConv,
        (Conv, Subsample): FusedConv,
        (Conv, Activation): FusedConv,
        (Conv,): FusedConv,
        (Dense, Activation): FusedDense,
        (Dense,): FusedDense,
        (Activation,): GemmActivation,
        (Subsample,): GemmSubsample,
        (Dropout,): GemmDropout,
    },
    options=GpuOptions(errors="push"),
)

PULL = replace(
    STAGE,
    name="fused_pull",
    title="3 fused, pull",
    change="stage fused with errors gathered (pulled) by the lower units",
    color="#5b8fd8",
    marker=">",
    options=GpuOptions(errors="pull"),
)
VARIANTS = (PULL,)
