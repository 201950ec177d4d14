"""Convolutions of plan `graph` whose maps and errors lie in device memory as planes."""

import math
from collections.abc import Mapping

import numpy as np

from cnnlib.device import Limits
from cnnlib.engine.gpu_operator import GpuOperator, Launch
from cnnlib.engine.source import Constant, KernelSource
from cnnlib.engine.stage import Planned, Stage, declining
from cnnlib.layers import Conv
from cnnlib.stages.tuned.graph.operators import GraphConv, GraphDense, cannot_follow
from cnnlib.stages.tuned.graph.options import VECTOR_BYTES, product_options
from cnnlib.stages.tuned.graph.stored_maps import StoredMaps
from cnnlib.stages.tuned.graph.stored_tiles import stored_gradient_tile, stored_tile
from cnnlib.stages.tuned.graph.tiles import BLOCKS, ProductTile
from cnnlib.stages.tuned.graph.windows import EIGHT, Windows

LARGE = 2**16
"""Parameters of a fully connected layer from which on its planes are worth their launches."""
MOST_BYTES = 2**31
"""Bytes of planes from which on a kernel's indices would overflow."""


class StoredConv(GraphConv):
    """A convolution that multiplies planes out of device memory, with what follows it."""

    file = "tuned/graph/stored.cuh"
    stored_kernels = (
        "split_source",
        "split_weights",
        "forward",
        "find_peak",
        "split_errors",
        "backward",
    )

    is_stored: bool
    """Whether tiles were found; else the operator is as its base class."""
    source_maps: StoredMaps
    error_maps: StoredMaps
    split_by: GraphConv | None
    """The operator that leaves the source's planes; None: an own kernel makes them."""

    @property
    def positions(self) -> Windows:
        """The terms of the gradient's sum, row by row."""
        windows = self.windows
        cells = (
            windows.cells[0] * windows.window[0],
            windows.cells[1] * windows.window[1],
        )
        return windows._replace(cells=cells, window=(1, 1))

    def entry_points(self) -> list[str]:
        kernels = self.stored_kernels if self.is_stored else self.kernels
        return [f"{self.label}_{kernel}" for kernel in kernels]

    def source(self) -> KernelSource:
        file = self.file if self.is_stored else GraphConv.file
        return KernelSource(self.label, file, self.constants())

    def prepare(self, batch_size: int, before: GpuOperator | None) -> None:
        super().prepare(batch_size, before)
        self.is_stored = self._store(batch_size, before)

    def _store(self, batch_size: int, before: GpuOperator | None) -> bool:
        """Choose tiles and where planes lie; False, and nothing changed, where they do not fit."""
        options, limits = product_options(self.stage), self.limits
        room, ahead, back = VECTOR_BYTES[self.arithmetic], self.windows, self.windows_back
        pitch, errors_pitch = ahead.stored_columns(), back.stored_columns()
        rest = batch_size, limits, room
        forward = stored_tile(ahead, self.maps, *rest, pitch, options.small_tiles)
        errors = stored_tile(back, ahead.channels, *rest, errors_pitch, options.small_tiles)
        seen = self.positions
        error_rows = seen._replace(channels=self.maps, kernel=(1, 1), map=back.map)
        gradient = stored_gradient_tile(seen, error_rows, self.maps, *rest, (pitch, errors_pitch))
        if forward is None or errors is None or gradient is None:
            return False
        self.error_rows = error_rows.patch_rows(gradient.positions)

        def groups(tile: ProductTile, windows: Windows) -> int:
            return tile.chunks(windows) * tile.chunk

        wide = math.ceil(ahead.groups / gradient.groups)
        high = gradient.tiles // wide
        self.source_maps = StoredMaps(
            batch_size,
            max(groups(forward, ahead), wide * gradient.groups),
            ahead.map[0],
            pitch,
            self.padding,
            room,
            max(forward.patch[0], gradient.patch[0]),
        )
        self.error_maps = StoredMaps(
            batch_size,
            max(groups(errors, back), high * gradient.maps // EIGHT),
            back.map[0],
            errors_pitch,
            (0, 0),
            room,
            max(errors.patch[0], self.error_rows + self.kernel[0]),
        )
        if 4 * max(self.source_maps.words, self.error_maps.words) >= MOST_BYTES:
            return False
        self.forward_tile, self.errors_tile, self.gradient_tile = forward, errors, gradient
        alike = isinstance(before, GraphConv) and before.target_map == self.source_map
        self.split_by = before if alike and isinstance(before, GraphConv) else None
        if self.split_by:
            self.split_by.stored_target = self.source_maps
        return True

    def blocks(self, jobs: int, tile: ProductTile | None) -> int:
        return jobs if self.is_stored else super().blocks(jobs, tile)

    def constants(self) -> Mapping[str, Constant]:
        if not self.is_stored:
            return super().constants()
        return {
            **super().constants(),
            "BATCH": self.source_maps.batch,
            "SOURCE_GROUPS": self.source_maps.groups,
            "SOURCE_PITCH": self.source_maps.pitch,
            "ERRORS_GROUPS": self.error_maps.groups,
            "ERRORS_PITCH": self.error_maps.pitch,
            "GRADIENT_ERROR_ROWS": self.error_rows,
        }

    def allocate(self, batch_size: int) -> None:
        super().allocate(batch_size)
        if not self.is_stored:
            return
        if self.split_by is None:
            self.source_planes = self.array((self.source_maps.words,), np.uint32)
            self.source_planes.fill_bytes(0)
        self.error_planes = self.array((self.error_maps.words,), np.uint32)
        self.error_planes.fill_bytes(0)
        vector = self.source_maps.vector_bytes
        tiles = (
            (self.forward_tile, self.windows, self.maps),
            (self.errors_tile, self.windows_back, self.windows.channels),
        )
        self.forward_weights, self.errors_weights = (
            self.array((_weights(tile, windows, columns) * vector // 4,), np.uint32)
            for tile, windows, columns in tiles
            if tile
        )

    def forward(self, count: int) -> list[Launch]:
        if not self.is_stored:
            return super().forward(count)
        b, views, tile = self.buffers, self.buffers.parameters[0], self.forward_tile
        launches = []
        if self.split_by is None:
            elements = count * math.prod(self.source_map) // EIGHT
            launches.append(
                self.launch("split_source", elements, b.source, self.source_planes, count)
            )
        split = self.forward_weights, self.errors_weights
        vectors = self.forward_weights.size // 8 + self.errors_weights.size // 8
        source = self.split_by.planes if self.split_by else self.source_planes
        return [
            *launches,
            self.launch("split_weights", vectors, views["weight"], *split),
            self.launch_blocks(
                "forward",
                min(tile.jobs, BLOCKS * self.limits.multiprocessors),
                *(source, self.forward_weights, views["bias"], b.target, self.winners),
                *(self.planes, self.partials, self.tickets, self.peak, *b.draws, count),
                shared_bytes=tile.shared_bytes,
            ),
        ]

    def backward(self, count: int) -> list[Launch]:
        if not self.is_stored:
            return super().backward(count)
        b = self.buffers
        launches = []
        if self.peak_is_sought and not self.finds_peak:
            elements = count * math.prod(self.target_map)
            launches.append(self.launch("find_peak", elements, b.target_errors, self.peak, count))
        if b.source_errors is None or self.errors_tile is None:
            raise TypeError("the first operator has no planes for a source")
        source = self.split_by.planes if self.split_by else self.source_planes
        source_peak = self.peak if self.before is None else self.before.peak
        groups = self.gradient_tile.partial_sums
        return [
            *launches,
            self.launch(
                "split_errors",
                count * math.prod(self.target_map) // EIGHT,
                *(b.target_errors, b.target, self.winners, self.peak, self.error_planes, count),
            ),
            self.launch_blocks(
                "backward",
                groups * self.gradient_tile.tiles + self.errors_tile.jobs,
                *(b.target_errors, self.error_planes, source, self.errors_weights),
                *(b.source_errors, source_peak, b.partial_sums),
                *(self.partials, self.tickets, self.peak, count, groups),
                shared_bytes=self.backward_bytes,
            ),
        ]


class StoredDense(StoredConv, GraphDense):
    """A fully connected layer likewise."""


def _weights(tile: ProductTile, windows: Windows, columns: int) -> int:
    """Vectors of all weights, as the blocks of a product copy them."""
    wide = math.ceil(columns / tile.columns)
    return wide * tile.chunks(windows) * tile.chunk * windows.taps * (tile.columns + 1)


@declining(cannot_follow)
def convolution(planned: Planned, stage: Stage, limits: Limits) -> GraphConv:
    """The operator of a convolution: of stored planes where the stage wants them and they help."""
    layer = planned.layer(Conv)
    wanted = product_options(stage).stored != "none" and not planned.is_first
    plain = GraphConv(planned, stage, limits)
    fits = all(p < k for p, k in zip(layer.padding, layer.kernel, strict=True))
    if wanted and fits and not plain.windows.costs_too_much:
        return StoredConv(planned, stage, limits)
    return plain


@declining(cannot_follow)
def dense(planned: Planned, stage: Stage, limits: Limits) -> GraphDense:
    """The operator of a fully connected layer likewise."""
    plain = GraphDense(planned, stage, limits)
    wanted = product_options(stage).stored == "all" and not planned.is_first
    return StoredDense(planned, stage, limits) if wanted and plain.size > LARGE else plain
