"""Stage 4: only a sliding window of rows is on chip, in a circular buffer in shared memory.

Going forward the window slides over the source maps, going back over the rows of the error maps:
every row is fetched once and used by all rows of the kernel, and one row is exchanged per step.
Shared memory is bounded by the window, not by the map. Device buffers for error maps come from a
ring of two slots, so their memory does not grow with depth.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from cnnlib.device import Device
from cnnlib.engine import Planned, Stage
from cnnlib.engine.gpu import THREADS, Launch
from cnnlib.layers import Activation, Conv, Subsample
from cnnlib.stages import fused
from cnnlib.stages.fused import SHARED_BYTES, FusedConv, largest_divisor

FLOATS = SHARED_BYTES // 4
MOST_UNITS = 8
"""Units (image x tile of columns) that a block takes in step."""
BLOCKS_PER_MULTIPROCESSOR = 2


class RingConv(FusedConv):
    file = "ring_conv.cuh"

    def choose(self, planned: Planned, stage: Stage) -> None:
        kernel, stride = self.conv.kernel, self.conv.stride
        advance = self.window * stride
        # The sizes below are those that kernels/ring_conv.cuh derives from the constants.
        self.ring_rows = (self.window - 1) * stride + kernel + advance
        self.tile = self.out_columns
        while self.tile > 1 and self._ring() + 2 * self._deltas() > FLOATS // 2:
            self.tile = math.ceil(self.tile / 2)
        self.tiles = math.ceil(self.out_columns / self.tile)
        half = max(self.each, (FLOATS - self._ring()) // self.terms // self.each * self.each)
        self.chunk_maps = min(self.maps, half)
        self.map_chunks = math.ceil(self.maps / self.chunk_maps)
        left = FLOATS - self.chunk_maps * self.terms
        items = self.chunk_maps // self.each * self.tile
        self.units = max(1, min(MOST_UNITS, math.ceil(THREADS / items), left // self._ring()))
        self.own_rows(
            most_splits=min(MOST_UNITS, FLOATS // (self._ring() + 2 * self._deltas()))
        )

        taps = kernel * kernel * self.maps
        self.before = (kernel - 1) // stride
        self.error_tile = self.width
        while self.error_tile > 1 and self._error_ring() > FLOATS // 2:
            self.error_tile = math.ceil(self.error_tile / 2)
        self.error_tiles = math.ceil(self.width / self.error_tile)
        self.error_each = largest_divisor(
            self.channels, 4, lambda each: self.channels // each * self.error_tile * advance >= 32
        )
        fits = (FLOATS - self._error_ring()) // taps // self.error_each * self.error_each
        self.chunk_channels = min(self.channels, max(self.error_each, fits))
        self.channel_chunks = math.ceil(self.channels / self.chunk_channels)
        left = FLOATS - self.chunk_channels * taps
        items = advance * (self.chunk_channels // self.error_each) * self.error_tile
        self.error_units = max(
            1, min(MOST_UNITS, math.ceil(THREADS / items), left // self._error_ring())
        )

    def _ring(self) -> int:
        """Floats of one unit's window of source rows."""
        width = (self.tile * self.window - 1) * self.conv.stride + self.conv.kernel
        return self.channels * self.ring_rows * width

    def _deltas(self) -> int:
        """Floats of one step's rows of the convolution's errors, one unit."""
        return self.maps * self.window * self.tile * self.window

    def _error_ring(self) -> int:
        """Floats of one unit's window of error rows."""
        columns = (self.error_tile - 1) // self.conv.stride + 1 + self.before + 1
        return self.maps * (self.before + 2 * self.window) * columns

    def check(self) -> None:
        taps = self.conv.kernel**2 * self.maps
        errors = self.chunk_channels * taps + self.error_units * self._error_ring()
        wanted = 4 * max(
            self.chunk_maps * self.terms + self.units * self._ring(),
            self.splits * (self._ring() + 2 * self._deltas()),
            THREADS * self.owned * (self.conv.kernel + 1) * (self.splits > 1),
            0 if self.planned.is_first else errors,
        )
        if wanted > SHARED_BYTES:
            raise self.unsupported(
                f"a window of {self.ring_rows} rows of {self.channels} channels and {self.maps} "
                f"maps takes {wanted} of {SHARED_BYTES} bytes of shared memory"
            )

    def constants(self) -> Mapping[str, int | str]:
        return {
            **self.common_constants(),
            "TILE": self.tile, "UNITS": self.units, "CHUNK_MAPS": self.chunk_maps,
            "ERROR_TILE": self.error_tile, "ERROR_UNITS": self.error_units,
            "CHUNK_CHANNELS": self.chunk_channels, "ERROR_EACH": self.error_each,
        }  # fmt: skip

    def partial_groups(self, device: Device, batch_size: int) -> int:
        sets = math.ceil(batch_size * self.tiles / self.splits)
        most = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR // self.chunks
        self.groups = max(1, min(sets, most))
        return self.groups

    def _together(self, units: int, most: int) -> int:
        """Units a block takes in step: one, until every multiprocessor has its blocks."""
        blocks = self.device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR
        return max(1, min(most, units // blocks))

    def forward(self, count: int) -> list[Launch]:
        b, views = self.buffers, self.buffers.parameters[0]
        units = count * self.tiles
        together = self._together(units, self.units)
        return [
            self.launch_blocks(
                "forward", math.ceil(units / together) * self.map_chunks,
                b.source, views["weight"], views["bias"], b.target, self.winners, count, together,
            )
        ]  # fmt: skip

    def backward_launch(self, count: int, groups: int) -> Launch:
        b, views = self.buffers, self.buffers.parameters[0]
        units = count * self.error_tiles
        together = self._together(units, self.error_units)
        jobs = groups * self.chunks
        if b.source_errors is not None:
            jobs += math.ceil(units / together) * self.channel_chunks
        errors = b.target_errors if b.source_errors is None else b.source_errors
        return self.launch_blocks(
            "backward", jobs, b.source, views["weight"], views["bias"], b.target, self.winners,
            b.target_errors, errors, b.partials, count, groups, together,
        )  # fmt: skip


STAGE = replace(
    fused.STAGE,
    name="ring",
    title="4 ring",
    change="a circular buffer of rows in shared memory; error maps recycled from two slots",
    operators={
        **fused.STAGE.operators,
        (Conv, Activation, Subsample): RingConv,
        (Conv, Subsample): RingConv,
        (Conv, Activation): RingConv,
        (Conv,): RingConv,
    },
    options={"error_slots": 2},
)
