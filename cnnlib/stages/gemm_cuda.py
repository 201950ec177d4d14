"""Stage 2 on the GPU: the algorithm of `gemm` in CUDA, one kernel per operation, nothing fused.

A convolution is im2col and a matrix product (Chellapilla et al. 2006), the product by tiles in
shared memory (kernels/matmul.cuh). Every map is in device memory. This is the honest baseline.
"""

import math
from collections.abc import Mapping

from cnnlib.arithmetic import ceil_div
from cnnlib.device import DeviceArray
from cnnlib.engine import Stage
from cnnlib.engine.gpu import GpuEngine
from cnnlib.engine.gpu_operator import SUM_THREADS, THREADS, GpuOperator, Launch, mask_constants
from cnnlib.engine.source import Constant
from cnnlib.engine.upload import MAX_ELEMENTS
from cnnlib.layers import Activation, Conv, Dense, Dropout, Subsample, enumerator_of
from cnnlib.layers.pairs import Pair

BLOCKS_PER_MULTIPROCESSOR = 2
"""Blocks of a multiprocessor that sum weight gradients: more would leave more slices to add."""
SHORTEST_SLICE = 64
"""Terms of a sum that are worth a block of their own."""


def tile_of(rows: int) -> tuple[int, int]:
    """(M_TILE, N_TILE): the rows and columns that one block makes of a product with `rows` rows.

    A thread makes four rows of one, two or four columns: see Tile in kernels/matmul.cuh.
    """
    threads_high = 2 if rows <= 8 else 4 if rows <= 16 else 8 if rows <= 32 else 16
    threads_wide = THREADS // threads_high
    each = 1 if threads_wide >= 64 else 2 if threads_wide >= 32 else 4
    return threads_high * 4, threads_wide * each


def tile_count(tile: tuple[int, int], rows: int, columns: int) -> int:
    """Tiles that cover a product of rows x columns."""
    return ceil_div(rows, tile[0]) * ceil_div(columns, tile[1])


def slice_count(terms: int, product_tiles: int, multiprocessors: int) -> int:
    """Slices of a sum of `terms` (split-K), so that a product of few tiles fills the device."""
    most = max(1, multiprocessors * BLOCKS_PER_MULTIPROCESSOR // product_tiles)
    return max(1, min(most, terms // SHORTEST_SLICE))


def product_constants(
    tile: tuple[int, int], data_tile: tuple[int, int], parameters: int
) -> dict[str, int]:
    """The constants that the products of both kinds of layers need (kernels/gemm/)."""
    return {
        "THREADS": THREADS,
        "SUM_THREADS": SUM_THREADS,
        "M_TILE": tile[0],
        "N_TILE": tile[1],
        "DATA_M_TILE": data_tile[0],
        "DATA_N_TILE": data_tile[1],
        "PARAMETERS": parameters,
    }


def window_constants(name: str, size: Pair, stride: Pair, padding: Pair) -> dict[str, int]:
    """The constants of windows (or kernels, by `name`) that go over maps (kernels/gemm/)."""
    return {
        f"{name}_ROWS": size[0],
        f"{name}_COLUMNS": size[1],
        "ROW_STRIDE": stride[0],
        "COLUMN_STRIDE": stride[1],
        "ROW_PADDING": padding[0],
        "COLUMN_PADDING": padding[1],
    }


class GemmConv(GpuOperator):
    """A convolution as im2col and a matrix product, backward as the transposes of both."""

    file = "gemm/conv.cuh"
    kernels = (
        "im2col",
        "multiply",
        "add_bias",
        "sum_bias_gradient",
        "multiply_weight_gradient",
        "sum_slices",
        "multiply_errors",
        "col2im",
    )

    def constants(self) -> Mapping[str, Constant]:
        channels, height, width = self.planned.source_shape
        maps, rows, columns = self.planned.target_shape
        conv = self.planned.layer(Conv)
        return {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "MAPS": maps,
            "ROWS": rows,
            "COLUMNS": columns,
            **window_constants("KERNEL", conv.kernel, conv.stride, conv.padding),
            **product_constants(self.map_tile, self.term_tile, self.slice_size),
        }

    def check(self) -> None:
        self.maps, rows, columns = self.planned.target_shape
        self.area = rows * columns
        layer = self.planned.layer(Conv)
        self.terms = layer.fan_in(self.planned.source_shape)
        self.map_tile, self.term_tile = tile_of(self.maps), tile_of(self.terms)
        self.slice_size = self.maps * self.terms + self.maps
        _, *source = self.planned.source_shape
        padded = [length + 2 * p for length, p in zip(source, layer.padding, strict=True)]
        if max(self.slice_size, *padded) > MAX_ELEMENTS:
            raise self.unsupported("its weights or its padded map are beyond 32-bit indices")

    def allocate(self, batch_size: int) -> None:
        size = (self.terms, batch_size * self.area)
        self.columns = self.array(size)
        self.column_errors = None if self.planned.is_first else self.array(size)
        self.slices = self.array((self._slice_count(batch_size), self.slice_size))

    def _slice_count(self, count: int) -> int:
        tiles_each = tile_count(self.map_tile, self.maps, self.terms)
        return slice_count(count * self.area, tiles_each, self.limits.multiprocessors)

    def forward(self, count: int) -> list[Launch]:
        b, positions = self.buffers, count * self.area
        weight, bias = b.parameters[0]["weight"], b.parameters[0]["bias"]
        blocks = tile_count(self.map_tile, self.maps, positions)
        return [
            self.launch("im2col", positions * self.terms, b.source, self.columns, count),
            self.launch_blocks("multiply", blocks, weight, self.columns, b.target, count),
            self.launch("add_bias", positions * self.maps, bias, b.target, count),
        ]

    def backward(self, count: int) -> list[Launch]:
        b, positions, slices = self.buffers, count * self.area, self._slice_count(count)
        weight, gradient = b.parameters[0]["weight"], b.gradients[0]["weight"]
        launches = [
            self.launch_blocks(
                "sum_bias_gradient",
                self.maps * slices,
                *(b.target_errors, self.slices, count, slices),
            ),
            self.launch_blocks(
                "multiply_weight_gradient",
                tile_count(self.map_tile, self.maps, self.terms) * slices,
                *(b.target_errors, self.columns, self.slices, count, slices),
            ),
            self.launch("sum_slices", self.slice_size * SUM_THREADS, self.slices, gradient, slices),
        ]
        errors = self.column_errors
        if b.source_errors is None or errors is None:
            return launches
        blocks = tile_count(self.term_tile, self.terms, positions)
        return [
            *launches,
            self.launch_blocks("multiply_errors", blocks, weight, b.target_errors, errors, count),
            self.launch(
                "col2im",
                math.prod(self.planned.source_shape) * count,
                *(errors, b.source_errors, count),
            ),
        ]


class GemmDense(GpuOperator):
    """A fully connected layer as a matrix product."""

    file = "gemm/dense.cuh"
    kernels = (
        "multiply",
        "add_bias",
        "sum_bias_gradient",
        "multiply_weight_gradient",
        "sum_slices",
        "multiply_errors",
    )

    def constants(self) -> Mapping[str, Constant]:
        return {
            "INPUTS": self.inputs,
            "UNITS": self.units,
            **product_constants(self.unit_tile, self.image_tile, self.slice_size),
        }

    def check(self) -> None:
        self.inputs = math.prod(self.planned.source_shape)
        self.units = self.planned.layer(Dense).units
        self.unit_tile, self.image_tile = tile_of(self.units), tile_of(64)
        self.slice_size = self.units * self.inputs + self.units

    def allocate(self, batch_size: int) -> None:
        self.slices = self.array((self._slice_count(batch_size), self.slice_size))

    def _slice_count(self, count: int) -> int:
        tiles_each = tile_count(self.unit_tile, self.units, self.inputs)
        return slice_count(count, tiles_each, self.limits.multiprocessors)

    def forward(self, count: int) -> list[Launch]:
        b, units = self.buffers, self.units
        weight, bias = b.parameters[0]["weight"], b.parameters[0]["bias"]
        blocks = tile_count(self.unit_tile, units, count)
        return [
            self.launch_blocks("multiply", blocks, weight, b.source, b.target, count),
            self.launch("add_bias", count * units, bias, b.target, count),
        ]

    def backward(self, count: int) -> list[Launch]:
        b, units, inputs = self.buffers, self.units, self.inputs
        weight, gradient = b.parameters[0]["weight"], b.gradients[0]["weight"]
        slices = self._slice_count(count)
        launches = [
            self.launch(
                "sum_bias_gradient", units * slices, b.target_errors, self.slices, count, slices
            ),
            self.launch_blocks(
                "multiply_weight_gradient",
                tile_count(self.unit_tile, units, inputs) * slices,
                *(b.target_errors, b.source, self.slices, count, slices),
            ),
            self.launch("sum_slices", self.slice_size * SUM_THREADS, self.slices, gradient, slices),
        ]
        if b.source_errors is None:
            return launches
        blocks = tile_count(self.image_tile, count, inputs)
        return [
            *launches,
            self.launch_blocks(
                "multiply_errors", blocks, weight, b.target_errors, b.source_errors, count
            ),
        ]


class GemmActivation(GpuOperator):
    """An activation function of every unit."""

    file = "gemm/activation.cuh"
    kernels = ("activate", "activate_backward")

    def constants(self) -> Mapping[str, Constant]:
        return {
            "SIZE": math.prod(self.planned.source_shape),
            "FUNCTION": enumerator_of(self.planned.layers),
        }

    def forward(self, count: int) -> list[Launch]:
        b, elements = self.buffers, count * math.prod(self.planned.source_shape)
        return [self.launch("activate", elements, b.source, b.target, count)]

    def backward(self, count: int) -> list[Launch]:
        b, elements = self.buffers, count * math.prod(self.planned.source_shape)
        if b.source_errors is None:
            return []
        args = (b.source, b.target, b.target_errors, b.source_errors, count)
        return [self.launch("activate_backward", elements, *args)]


class GemmSubsample(GpuOperator):
    """The maximum or the mean of every window."""

    file = "gemm/subsample.cuh"
    kernels = ("subsample", "subsample_backward")

    def check(self) -> None:
        layer = self.planned.layer(Subsample)
        (_, *source), (_, *target) = self.planned.source_shape, self.planned.target_shape
        covered = [count * size for count, size in zip(target, layer.size, strict=True)]
        together = layer.strides == layer.size and not any(layer.padding)
        self.tiled = together and source == covered
        """Whether every element of the source is in exactly one window."""

    def constants(self) -> Mapping[str, Constant]:
        layer = self.planned.layer(Subsample)
        channels, height, width = self.planned.source_shape
        _, rows, columns = self.planned.target_shape
        return {
            "CHANNELS": channels,
            "HEIGHT": height,
            "WIDTH": width,
            "ROWS": rows,
            "COLUMNS": columns,
            "METHOD": layer.method.upper(),
            "TILED": int(self.tiled),
            **window_constants("WINDOW", layer.size, layer.strides, layer.padding),
        }

    def forward(self, count: int) -> list[Launch]:
        b, elements = self.buffers, count * math.prod(self.planned.target_shape)
        return [self.launch("subsample", elements, b.source, b.target, count)]

    def backward(self, count: int) -> list[Launch]:
        b = self.buffers
        if b.source_errors is None:
            return []
        # A thread writes a window's errors, or collects those of one element of the source.
        shape = self.planned.target_shape if self.tiled else self.planned.source_shape
        args = (b.source, b.target_errors, b.source_errors, count)
        return [self.launch("subsample_backward", count * math.prod(shape), *args)]


class GemmDropout(GpuOperator):
    """Dropout; the backward pass draws the mask of the forward pass again."""

    file = "gemm/dropout.cuh"
    kernels = ("drop", "drop_backward")

    def constants(self) -> Mapping[str, Constant]:
        return {
            "SIZE": math.prod(self.planned.source_shape),
            **mask_constants(self.planned),
        }

    def forward(self, count: int) -> list[Launch]:
        b = self.buffers
        return [self._launch("drop", b.source, b.target, count)]

    def backward(self, count: int) -> list[Launch]:
        b = self.buffers
        if b.source_errors is None:
            return []
        return [self._launch("drop_backward", b.target_errors, b.source_errors, count)]

    def _launch(self, kernel: str, values: DeviceArray, masked: DeviceArray, count: int) -> Launch:
        # A thread draws the mask of four elements.
        blocks = count * ceil_div(math.prod(self.planned.source_shape), 4)
        return self.launch(kernel, blocks, values, masked, *self.buffers.draws, count)


STAGE = Stage(
    name="gemm_cuda",
    title="2 gemm_cuda",
    change="the same matrix products in CUDA: one kernel per operation, every map in device memory",
    runs_on="cuda",
    engine=GpuEngine,
    after="gemm",
    color="#a0529b",
    marker="^",
    operators={
        (Conv,): GemmConv,
        (Activation,): GemmActivation,
        (Subsample,): GemmSubsample,
        (Dense,): GemmDense,
        (Dropout,): GemmDropout,
    },
)
