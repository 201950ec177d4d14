"""Stage 4: only a sliding window of rows is on chip, in a circular buffer in shared memory.

Going forward the window slides over the source maps, going back over the rows of the error maps:
every row is fetched once and used by all rows of the kernel, and one row is exchanged per step.
Shared memory is bounded by the window, not by the map. Device buffers for error maps come from a
ring of two slots, so their memory does not grow with depth.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from cnnlib.device import Device
from cnnlib.engine import Planned
from cnnlib.engine.gpu import THREADS, Launch
from cnnlib.layers import Activation, Conv, Subsample
from cnnlib.stages import fused
from cnnlib.stages.fused import (
    BLOCKS_PER_MULTIPROCESSOR,
    PLAIN_SHARED_BYTES,
    FusedConv,
    largest_divisor,
)

FLOATS = PLAIN_SHARED_BYTES // 4
FEW_FLOATS = 5 * 1024
"""Window that leaves a multiprocessor room for many blocks; wide maps may take up to FLOATS."""
MOST_UNITS = 4
"""Units (image x tile of columns) that a block takes in step."""


class RingConv(FusedConv):
    file = "ring_conv.cuh"

    def choose(self, planned: Planned, device: Device) -> None:
        self.before = (self.conv.kernel - 1) // self.conv.stride
        self.taps = self.conv.kernel**2 * math.ceil(self.maps / 4) * 4
        # A tile as wide as the map means that each row is fetched once; a high band, few barriers.
        self.tile, self.band = self._fit(
            self.out_columns, self.rows // self.window,
            lambda tile, band: self._ring(tile, band) + self._deltas(tile, band),
        )  # fmt: skip
        self.tiles = math.ceil(self.out_columns / self.tile)
        ring = self._ring(self.tile, self.band)
        fits = (FLOATS - ring) // self.terms // self.each * self.each
        self.chunk_maps = min(self.maps, max(self.each, fits))
        self.map_chunks = math.ceil(self.maps / self.chunk_maps)
        items = self.chunk_maps // self.each * self.tile * self.band
        left = FLOATS - self.chunk_maps * self.terms
        self.units = max(1, min(MOST_UNITS, math.ceil(THREADS / items), left // ring))
        self.own_rows(most_splits=self.band * self.window)

        self.error_tile, self.error_band = self._fit(self.width, self.rows, self._error_ring)
        self.error_tiles = math.ceil(self.width / self.error_tile)
        error_ring = self._error_ring(self.error_tile, self.error_band)
        rows = self.error_band * self.conv.stride
        self.error_each = largest_divisor(
            self.channels, 4, lambda each: self.channels // each * self.error_tile * rows >= 128
        )
        fits = (FLOATS - error_ring) // self.taps // self.error_each * self.error_each
        self.chunk_channels = min(self.channels, max(self.error_each, fits))
        self.channel_chunks = math.ceil(self.channels / self.chunk_channels)
        items = rows * (self.chunk_channels // self.error_each) * self.error_tile
        left = FLOATS - self.chunk_channels * self.taps
        self.error_units = max(1, min(MOST_UNITS, math.ceil(THREADS / items), left // error_ring))

    def _fit(self, columns: int, rows: int, size: Callable[[int, int], int]) -> tuple[int, int]:
        """(tile, band): as wide as it can be, then as high as FEW_FLOATS of window allow.

        size(tile, band) is not monotonic in the band: all rows at once need no second buffer.
        """
        tile = columns
        while tile > 1 and size(tile, 1) > FLOATS * 3 // 4:
            tile = math.ceil(tile / 2)
        return tile, next((n for n in range(rows, 1, -1) if size(tile, n) <= FEW_FLOATS), 1)

    # The sizes that kernels/ring_conv.cuh derives from the constants, in floats of one unit.

    def _ring(self, tile: int, band: int) -> int:
        """Window of source rows."""
        rows, stride = band * self.window, self.conv.stride
        several = band < self.rows // self.window
        span = (rows - 1) * stride + self.conv.kernel
        width = (tile * self.window - 1) * stride + self.conv.kernel
        return self.channels * (span + several * rows * stride) * width

    def _deltas(self, tile: int, band: int) -> int:
        """The convolution's errors of a step, and of the next where there is one."""
        several = band < self.rows // self.window
        return (1 + several) * self.maps * band * self.window * tile * self.window

    def _error_ring(self, tile: int, band: int) -> int:
        """Window of error rows."""
        columns = (tile - 1) // self.conv.stride + 1 + self.before + 1
        rows = self.before + 2 * band if band < self.rows else self.rows
        return self.maps * rows * columns

    def check(self) -> None:
        ring = self._ring(self.tile, self.band)
        errors = self.chunk_channels * self.taps
        errors += self.error_units * self._error_ring(self.error_tile, self.error_band)
        wanted = 4 * max(
            self.chunk_maps * self.terms + self.units * ring,
            ring + self._deltas(self.tile, self.band),
            THREADS * self.owned * (self.conv.kernel + 1) * (self.splits > 1),
            0 if self.planned.is_first else errors,
        )
        if wanted > PLAIN_SHARED_BYTES:
            raise self.unsupported(
                f"a window of rows of {self.channels} channels and {self.maps} maps takes "
                f"{wanted} of {PLAIN_SHARED_BYTES} bytes of shared memory"
            )

    def constants(self) -> Mapping[str, int | str]:
        return {
            **self.common_constants(),
            "TILE": self.tile, "BAND": self.band, "UNITS": self.units,
            "CHUNK_MAPS": self.chunk_maps, "ERROR_TILE": self.error_tile,
            "ERROR_BAND": self.error_band, "ERROR_UNITS": self.error_units,
            "CHUNK_CHANNELS": self.chunk_channels, "ERROR_EACH": self.error_each,
        }  # fmt: skip

    def partial_groups(self, batch_size: int) -> int:
        most = self.device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR // self.chunks
        self.groups = max(1, min(batch_size * self.tiles, most))
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
