"""Fully connected layers: kernels/tuned/dense.cuh; few images kernels/tuned/dense_by_threads.cuh.

All images of a block are taken together.
"""

from cnnlib.arithmetic import ceil_div
from cnnlib.device.architecture import LANES, TENSOR_CORES
from cnnlib.engine import Planned, Stage, options_of
from cnnlib.engine.stage import declining
from cnnlib.layers import Dense, enumerator_of
from cnnlib.stages.tuned.declined import other_than_square
from cnnlib.stages.tuned.layout import (
    ALIGNMENT,
    Needs,
    SharedBuffer,
    SharedLayout,
    Threads,
    row_pitch,
    sectors,
)
from cnnlib.stages.tuned.operator import Position, TunedOperator
from cnnlib.stages.tuned.plan import PersistentOptions

MAX_INPUTS_BY_THREADS = 1024
"""Inputs of all images for which a warp's registers have room: 32 numbers of each lane."""
FEW_IMAGES, MAX_LANE_FLOAT4S = 4, 16
"""Images that threads multiply together where weights stay in device memory, at most, and Float4s
of each lane's that hold their numbers.
"""
WORTH_IMAGES = 2
"""Images up to which they do so even if a lane has one Float4 of a unit's weights, and so few loads
on their way, and there are tensor cores: with four images LeNet-5's dense2 by threads made a step
2.8 % slower on an H100.
"""
REDUCE_UNITS, REDUCE_INPUTS = 16, 32
"""A tile of the gradient that a block makes: one row of a warp's tiles, four side by side."""
REDUCE_PITCH = REDUCE_UNITS + REDUCE_INPUTS + 8
"""Floats from an image's deltas and sources in that tile to the next one's: rows begin in banks of
their own.
"""
REDUCE_IMAGES = 8
"""Images of a stage of the pipeline: the terms of one tensor-core product."""


@declining(other_than_square)
class TunedDense(TunedOperator):
    template = "Dense"

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        self.inputs, self.units = self.source_size, planned.layer(Dense).units
        options = options_of(stage, PersistentOptions)
        # Few images are multiplied by threads, which meet in no bank whatever the pitch is.
        self.on_chip_by_threads = (
            self.inputs % ALIGNMENT == 0
            and images <= options.few_images
            and images * self.inputs <= MAX_INPUTS_BY_THREADS
        )
        lane_float4s = ceil_div(self.inputs, LANES * ALIGNMENT)
        worth = lane_float4s > 1 or not threads.gpu.has(TENSOR_CORES)
        self.few_images = (
            self.inputs % ALIGNMENT == 0
            and images <= (FEW_IMAGES if worth else WORTH_IMAGES)
            and images * lane_float4s <= MAX_LANE_FLOAT4S
        )
        self.by_threads = options.threads_read_l2
        whole_tiles = ceil_div(self.inputs, 8) * 8
        self.weight_pitch = self.inputs if self.on_chip_by_threads else row_pitch(whole_tiles)
        self.trace = sectors(self.inputs) + sectors(self.units)
        self.needs = self._needs()

    def _split_k(self, rows: int, terms: int) -> tuple[int, int]:
        """Warps that share a sum of `terms`, and floats of scratch for their shares."""
        high = ceil_div(rows, 16)
        warps = max(1, min(self.threads.block_warps // high, ceil_div(terms, 8)))
        return warps, warps * high * 16 * ceil_div(self.images, 8) * 8

    def _needs(self) -> Needs:
        self.forward_split_k, forward = self._split_k(self.units, self.inputs)
        self.data_split_k, data = self._split_k(self.inputs, self.units)
        # Each thread has four inputs' errors, of every image, at most.
        threads = self.threads.block * ALIGNMENT
        if self.on_chip_by_threads or (self.by_threads and self.few_images):
            threads = max(threads, self.inputs) * self.images
        return Needs(
            self.label,
            self.parameters,
            per_batch=True,
            weights=self.units * (self.weight_pitch + 1),
            optional=True,
            scratch=max(forward, data if self.data_split_k > 1 else 0, threads),
            stage=self.threads.block_warps * REDUCE_IMAGES * REDUCE_PITCH,
        )

    @property
    def aligned(self) -> bool:
        """Whether rows of weights begin at 16-byte boundaries in device memory."""
        return self.inputs % ALIGNMENT == 0 and self.offset % ALIGNMENT == 0

    def may_read_l2(self, layout: SharedLayout) -> bool:
        return self.few_images and self.label not in layout.weights

    def copied_by_one_warp(self, layout: SharedLayout) -> bool:
        return self.label in layout.weights and self.aligned and self.weight_pitch == self.inputs

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        in_global = self.label not in layout.weights
        return {
            "INPUTS": self.inputs,
            "UNITS": self.units,
            "IMAGES": self.images,
            "FUNCTION": enumerator_of(self.planned.layers),
            "WEIGHTS_IN_GLOBAL": in_global,
            "WEIGHT_PITCH": self.weight_pitch,
            "ALIGNED": self.aligned,
            "BY_THREADS": (
                self.by_threads and self.may_read_l2(layout)
                if in_global
                else self.on_chip_by_threads
            ),
            "FORWARD_SPLIT_K": self.forward_split_k,
            "DATA_SPLIT_K": self.data_split_k,
            "TRACE_SOURCE": position.trace,
            "TRACE_DELTA": position.trace + sectors(self.inputs),
            "REDUCE_UNITS": REDUCE_UNITS,
            "REDUCE_INPUTS": REDUCE_INPUTS,
            "REDUCE_PITCH": REDUCE_PITCH,
            "REDUCE_STAGES": layout.stages,
            "FIRST_WEIGHT": self.offset,
            "SCRATCH_FLOATS": layout.scratch_floats[1],
            "REDUCE_FLOATS": layout.update_floats,
        }

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        weights = layout.weights.get(self.label)
        return {
            **super().buffers(layout, position),
            "Scratch": layout.batch_scratch,
            "Weights": None if weights is None else SharedBuffer(weights),
        }
