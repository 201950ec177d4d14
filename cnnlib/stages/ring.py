"""Stage 4: only a sliding window of rows is on chip, in a circular buffer in shared memory.

Going forward the window slides over the source maps, going back over the rows of the error maps:
every row is fetched once and used by all rows of the kernel, and one row is exchanged per step.
Shared memory is bounded by the window, not by the map. Device buffers for error maps come from a
ring of two slots, so their memory does not grow with depth.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Limits
from cnnlib.engine import Planned
from cnnlib.engine.gpu_operator import THREADS, GpuOptions, Launch
from cnnlib.engine.upload import MAX_ELEMENTS
from cnnlib.layers import Activation, Conv, Subsample
from cnnlib.stages import fused
from cnnlib.stages.fused import PLAIN_SHARED_BYTES, FusedConv

FLOATS = PLAIN_SHARED_BYTES // 4
"""Shared memory that a block may have."""
FEW_FLOATS = 11_000
"""The largest window, chosen by measuring on an H100 (docs/tuning/ring.md), whose multiprocessor
has room for five of them; a block of any GPU may have as much.
"""
MOST_UNITS = 4
"""Units (an image's tile of columns each) that a block takes through the steps together."""


def halve_until(number: int, good: Callable[[int], bool]) -> int:
    """`number`, halved (upwards) until it is good or 1."""
    while number > 1 and not good(number):
        number = ceil_div(number, 2)
    return number


def pitch(width: int) -> int:
    """Floats from one row of `width` floats in shared memory to the next.

    An odd number of float4s: the rows that a warp's threads read at once lie in different banks.
    """
    return (ceil_div(width, 4) | 1) * 4


class RingConv(FusedConv):
    """FusedConv with a sliding window of rows in shared memory in place of whole maps."""

    file = "ring/conv.cuh"
    kernels: ClassVar[tuple[str, ...]] = ("forward", "backward")

    def choose(self, planned: Planned, limits: Limits) -> None:
        self.taps = math.prod(self.conv.kernel) * ceil_div(self.maps, 4) * 4
        least = self.maps_each * self.terms  # the weights of a thread's maps
        # A tile as wide as the map means that each row is fetched once.
        self.tile = halve_until(
            self.out_columns,
            lambda tile: self._window(tile, 1) + max(self._deltas(tile, 1), least) <= FLOATS,
        )
        self.tiles = ceil_div(self.out_columns, self.tile)
        self.band = self._highest(lambda n: self._window(self.tile, n) + self._deltas(self.tile, n))
        self.forward_band = self._highest(lambda n: self._window(self.tile, n))
        if self._window(self.tile, self.forward_band) + least > FLOATS:
            few = FLOATS - least
            self.forward_band = self._highest(lambda n: self._window(self.tile, n), few)
        window = self._window(self.tile, self.forward_band)
        fits = (FLOATS - window) // self.terms // self.maps_each * self.maps_each
        self.chunk_maps = min(self.maps, max(self.maps_each, fits))
        self.map_chunks = ceil_div(self.maps, self.chunk_maps)
        items = self.chunk_maps // self.maps_each * self.tile * self.forward_band
        left = FLOATS - self.chunk_maps * self.terms
        self.units = max(1, min(MOST_UNITS, THREADS // items, left // window))
        self.own_rows(most_split_k=self.band * self.window[0])

        self.error_tile = halve_until(
            self.padded_width,
            lambda tile: self._errors(tile, 1, self.channels) <= FLOATS - self.taps,
        )
        self.error_tiles = ceil_div(self.padded_width, self.error_tile)
        self.error_band = self._highest(lambda n: self._errors(self.error_tile, n, self.channels))
        self.chunk_channels = self.channels
        while self.chunk_channels > 1 and self._error_arena() > FLOATS:
            self.chunk_channels = ceil_div(self.chunk_channels, 2)
        self.channel_chunks = ceil_div(self.channels, self.chunk_channels)

    def _highest(self, size: Callable[[int], int], few: int | None = None) -> int:
        """Target rows that a step makes: as many as `few` floats allow, which are FEW_FLOATS if not
        given, since a step costs barriers.

        Among the bands that need as few steps it is the lowest; a higher one would only leave rows
        of the last step idle. The search goes downwards: all rows at once need no second buffer.
        """
        few = FEW_FLOATS if few is None else few
        rows = min(self.out_rows, few)  # a row has one float at least
        most = next((n for n in range(rows, 1, -1) if size(n) <= few), 1)
        even = ceil_div(self.out_rows, ceil_div(self.out_rows, most))
        return even if size(even) <= few else most

    # Sizes in shared memory, where a source has its padding around it, in rows or in floats of one
    # unit. The kernel gets those of the plan as constants, and asserts that they are enough.

    def _ring_rows(self, band: int) -> int:
        """Source rows in use and those on their way, for a step of `band` target rows."""
        rows, stride = band * self.window[0], self.conv.stride[0]
        span = (rows - 1) * stride + self.conv.kernel[0]
        return span + (rows * stride if band < self.out_rows else 0)

    def _row_pitch(self, tile: int) -> int:
        """Floats from one source row to the next, for a tile of `tile` target columns."""
        return pitch((tile * self.window[1] - 1) * self.conv.stride[1] + self.conv.kernel[1])

    def _window(self, tile: int, band: int) -> int:
        """Floats of the source rows of a unit."""
        return self.channels * self._ring_rows(band) * self._row_pitch(tile)

    def _deltas(self, tile: int, band: int) -> int:
        """The convolution's errors of a step, and of the next where there is one."""
        rows = self.maps * band * self.window[0] * (1 + (band < self.out_rows))
        return rows * pitch(tile * self.window[1])

    def _error_ring_rows(self, band: int) -> int:
        """Rows of source errors that a step of `band` target rows reaches."""
        if band == self.out_rows:
            return self.padded_height
        return (band * self.window[0] - 1) * self.conv.stride[0] + self.conv.kernel[0]

    def _error_columns(self, tile: int) -> int:
        """Columns of the convolution that reach a tile of `tile` source columns."""
        if tile == self.padded_width:
            return self.columns
        stride, kernel = self.conv.stride[1], self.conv.kernel[1]
        return (tile - 1) // stride + 1 + (kernel - 1) // stride + 1

    def _errors(self, tile: int, band: int, channels: int) -> int:
        """Rows of source errors, and the convolution's errors of a step."""
        deltas = self.maps * band * self.window[0] * self._error_columns(tile)
        return channels * self._error_ring_rows(band) * tile + deltas

    def _error_arena(self) -> int:
        errors = self._errors(self.error_tile, self.error_band, self.chunk_channels)
        return self.chunk_channels * self.taps + errors

    def check(self) -> None:
        if max(self.padded_height, self.padded_width) > MAX_ELEMENTS:
            raise self.unsupported("its padded map is beyond 32-bit indices")
        window = self._window(self.tile, self.forward_band)
        forward = self.chunk_maps * self.terms + self.units * window
        backward = max(
            self._window(self.tile, self.band) + self._deltas(self.tile, self.band),
            self.split_floats,
            0 if self.planned.is_first else self._error_arena(),
        )
        self.backward_bytes = 4 * backward
        wanted = 4 * max(forward, backward)
        if wanted > PLAIN_SHARED_BYTES:
            raise self.unsupported(
                f"a window of rows of {self.channels} channels and {self.maps} maps takes "
                f"{wanted} of {PLAIN_SHARED_BYTES} bytes of shared memory"
            )

    def constants(self) -> Mapping[str, int | str]:
        return {
            **self.common_constants(),
            "TILE": self.tile,
            "TILES": self.tiles,
            "PITCH": self._row_pitch(self.tile),
            "FORWARD_BAND": self.forward_band,
            "FORWARD_RING": self._ring_rows(self.forward_band),
            "UNITS": self.units,
            "CHUNK_MAPS": self.chunk_maps,
            "MAP_CHUNKS": self.map_chunks,
            "BAND": self.band,
            "RING": self._ring_rows(self.band),
            "DELTA_PITCH": pitch(self.tile * self.window[1]),
            "ERROR_TILE": self.error_tile,
            "ERROR_TILES": self.error_tiles,
            "ERROR_BAND": self.error_band,
            "ERROR_RING": self._error_ring_rows(self.error_band),
            "ERROR_COLUMNS": self._error_columns(self.error_tile),
            "CHUNK_CHANNELS": self.chunk_channels,
            "CHANNEL_CHUNKS": self.channel_chunks,
            "ARENA_FLOATS": self.backward_bytes // 4,
        }

    def partial_groups(self, batch_size: int) -> int:
        self.groups = self.groups_of(batch_size * self.tiles, self.backward_bytes)
        return self.groups

    def forward(self, count: int) -> list[Launch]:
        b, views = self.buffers, self.buffers.parameters[0]
        units = count * self.tiles
        # Units are taken together only where every multiprocessor has blocks enough without that.
        together = max(1, min(self.units, units // (2 * self.limits.multiprocessors)))
        return [
            self.launch_blocks(
                "forward",
                ceil_div(units, together) * self.map_chunks,
                *(b.source, views["weight"], views["bias"]),
                *(b.target, self.winners, count, together),
            )
        ]

    def backward(self, count: int) -> list[Launch]:
        jobs = self.groups * self.m_tiles
        if not self.planned.is_first:
            jobs += count * self.error_tiles * self.channel_chunks
        return [self.launch_blocks("backward", jobs, *self.backward_args(count))]

    def compared(self, count: int) -> list[Launch]:
        return []


STAGE = replace(
    fused.STAGE,
    name="ring",
    title="4 ring",
    change="a circular buffer of rows in shared memory; error maps recycled from two slots: "
    "saves time on maps of 64x64, not on LeNet-5's",
    after="fused",
    color="#0a4436",
    marker="v",
    operators={
        **fused.STAGE.operators,
        (Conv, Activation, Subsample): RingConv,
        (Conv, Subsample): RingConv,
        (Conv, Activation): RingConv,
        (Conv,): RingConv,
    },
    options=GpuOptions(error_slots=2),
)
