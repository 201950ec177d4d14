"""Convolutions of plan `graph` whose maps and errors lie in device memory as planes."""

import math
from collections.abc import Mapping

import numpy as np

from cnnlib.device import Limits
from cnnlib.engine.gpu_operator import GpuOperator, Launch
from cnnlib.engine.source import Constant, KernelSource
from cnnlib.engine.stage import Planned, Stage, declining
from cnnlib.layers import Conv
from cnnlib.stages.tuned.graph.operators import GraphConv, cannot_follow
from cnnlib.stages.tuned.graph.options import VECTOR_BYTES, product_options
from cnnlib.stages.tuned.graph.stored_maps import StoredMaps
from cnnlib.stages.tuned.graph.stored_tiles import stored_gradient_tile, stored_tile
from cnnlib.stages.tuned.graph.tiles import BLOCKS, ProductTile, weight_pitches
from cnnlib.stages.tuned.graph.windows import EIGHT, Windows

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
    """Whether the layer is large enough and tiles were found; else it is as its base class."""
    source_maps: StoredMaps
    error_maps: StoredMaps
    together: "list[StoredConv]"
    """Operators that follow each other and whose weights are split by the first one's launch."""
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
        joined = self._stored_before()
        self.together = joined.together if joined else []
        if self.is_stored:
            self.together.append(self)

    def _stored_before(self) -> "StoredConv | None":
        """The stored operator that comes next towards the input, if only ones of plan `graph` lie
        between.
        """
        before = self.before
        while before and not (isinstance(before, StoredConv) and before.is_stored):
            before = before.before
        return before if isinstance(before, StoredConv) else None

    def _store(self, batch_size: int, before: GpuOperator | None) -> bool:
        """Choose tiles and where planes lie; False, and nothing changed, where they are too large,
        or the layer too small for them.
        """
        least, seen = product_options(self.stage).stored, self.positions
        work = batch_size * seen.positions * self.maps * seen.channels * seen.taps
        if least is None or work < least:
            return False
        options, limits = product_options(self.stage), self.limits
        room, ahead, back = VECTOR_BYTES[self.arithmetic], self.windows, self.windows_back
        pitch, errors_pitch = ahead.stored_columns(), back.stored_columns()
        rest = batch_size, limits, room
        forward = stored_tile(ahead, self.maps, *rest, pitch, options.small_tiles)
        errors = stored_tile(back, ahead.channels, *rest, errors_pitch, options.small_tiles)
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
        first = self.together[0]
        if first is self:
            vectors = sum(sum(operator.weight_vectors) for operator in self.together)
            self.split = self.array((vectors * self._words,), np.uint32)
            table = [job for operator in self.together for job in operator.split_jobs()]
            self.split_table = self.array((len(table), len(table[0])), np.int32)
            self.split_table.set(np.array(table, np.int32))
        ahead, back = self.weight_vectors
        start = first.split_start(self) * self._words
        self.forward_weights = first.split.part(start, ahead * self._words)
        self.errors_weights = first.split.part(start + ahead * self._words, back * self._words)

    @property
    def _words(self) -> int:
        """Words of a vector in all planes."""
        return self.source_maps.vector_bytes // 4

    @property
    def products(self) -> list[tuple[ProductTile, Windows, int]]:
        """Tile, windows and columns of the products forward and backward."""
        assert self.errors_tile is not None  # the first operator is not stored
        return [
            (self.forward_tile, self.windows, self.maps),
            (self.errors_tile, self.windows_back, self.windows.channels),
        ]

    @property
    def weight_vectors(self) -> list[int]:
        """Vectors of the weights of both products."""
        return [_weights(*product) for product in self.products]

    def split_start(self, operator: "StoredConv") -> int:
        """The first vector of an operator's weights among those that are split together."""
        before = self.together[: self.together.index(operator)]
        return sum(sum(other.weight_vectors) for other in before)

    def split_jobs(self) -> list[tuple[int, ...]]:
        """SplitJobs of kernels/tuned/graph/stored.cuh: what the launch for all operators does."""
        first = self.together[0]
        start, jobs = first.split_start(self), list[tuple[int, ...]]()
        begins = self._own_offset() - first._own_offset()
        area = self.windows.taps
        for turned, (tile, windows, columns) in enumerate(self.products):
            taps = tile.tap_rows * windows.kernel[1]
            steps = (area, columns * area) if turned else (windows.channels * area, area)
            pitches = weight_pitches(taps, tile.chunk, tile.columns)
            sizes = tile.columns, tile.chunk, *pitches, tile.chunks(windows), area // taps
            jobs.append(
                (
                    start,
                    begins,
                    start,
                    columns,
                    windows.channels,
                    *sizes,
                    taps,
                    area,
                    *steps,
                    turned,
                )
            )
            start += _weights(tile, windows, columns)
        return jobs

    def _own_offset(self) -> int:
        """Where the weights begin in the vector of all parameters."""
        parameters = self.planned.network.parameters
        return next(p.offset for p in parameters if p.layer == self.planned.start)

    def _splits(self) -> list[Launch]:
        """The launch that splits the weights, if this operator makes one."""
        if self.together[0] is not self:
            return []
        weight = self.buffers.parameters[0]["weight"]
        vectors = sum(sum(operator.weight_vectors) for operator in self.together)
        table = self.split_table, self.split_table.shape[0]
        return [self.launch("split_weights", vectors, *table, weight, self.split, vectors)]

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
        source = self.split_by.planes if self.split_by else self.source_planes
        return [
            *launches,
            *self._splits(),
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
                count * math.prod(self.target_map) * self.window[1] // EIGHT,
                *(b.target_errors, b.target, self.winners, self.peak, self.error_planes, count),
            ),
            self.launch_blocks(
                "backward",
                self._backward_jobs,
                *(b.target_errors, self.error_planes, source, self.errors_weights),
                *(b.source_errors, source_peak, b.partial_sums),
                *(self.partials, self.tickets, self.peak, count, groups),
                shared_bytes=self.backward_bytes,
            ),
        ]


def _weights(tile: ProductTile, windows: Windows, columns: int) -> int:
    """Vectors of all weights, as the blocks of a product copy them."""
    wide = math.ceil(columns / tile.columns)
    return wide * tile.weight_vectors(windows)


@declining(cannot_follow)
def convolution(planned: Planned, stage: Stage, limits: Limits) -> GraphConv:
    """The operator of a convolution: of stored planes where the stage wants them and they help."""
    layer = planned.layer(Conv)
    wanted = product_options(stage).stored is not None and not planned.is_first
    plain = GraphConv(planned, stage, limits)
    fits = all(p < k for p, k in zip(layer.padding, layer.kernel, strict=True))
    if wanted and fits and not plain.windows.costs_too_much:
        return StoredConv(planned, stage, limits)
    return plain
