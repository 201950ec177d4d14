"""Stage 2: the easy wins on the CPU. Blocks of images, convolution as a matrix product (BLAS),
buffers allocated once, float32, all cores.

What differs from stage 1 besides the batch is the convolution. The windows of a whole row of
outputs are copied out of the source (im2col), and all maps' outputs of that row are one product of
matrices. Maps lie in memory as (H, C, W, N), see cnnlib/engine/cpu.py.
"""

from typing import cast

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from cnnlib.engine import Planned, Stage
from cnnlib.engine.cpu import BlockEngine, BlockOperator, block_shape, columns
from cnnlib.layers import Activation, Array, Conv, Dense, Subsample, Views


class MatrixConv(BlockOperator):
    """Convolution as products of matrices.

    `windows[y, c, j, x, n] = source[y, c, x s + j, n]` holds the im2col columns of every source
    row. An output row sees K consecutive source rows, whose columns lie one behind the other: its
    (K C K, W' N) matrix is a slice of `windows`, and neighbouring output rows share K - s of their
    rows. So the copy is K times as large as the source, not K K times.
    """

    def __init__(
        self,
        planned: Planned,
        source: Array,
        source_error: Array | None,
        parameters: Views,
        gradients: Views,
        may_overwrite: bool,
    ) -> None:
        super().__init__(planned, source, source_error, parameters, gradients, may_overwrite)
        layer = cast(Conv, planned.layers[0])
        k, s = layer.kernel, layer.stride
        self.kernel, self.stride = k, s
        height, channels, _, images = source.shape
        maps, rows, across = planned.target_shape
        dtype = source.dtype
        self.target = np.full((rows, maps, across, images), np.nan, dtype)
        self._weight = np.empty((maps, k, channels, k), dtype)
        self._windows = np.empty((height, channels, k, across, images), dtype)
        # (H', K C K, W' N): row y's columns, overlapping in memory
        self._columns = _stacks(
            self._windows.reshape(height, channels * k, across * images), k, s, rows
        )
        self._products = np.empty((rows, maps, k * channels * k), dtype)
        self._ones = np.ones(across * images, dtype)
        self._sums = np.empty((rows, maps), dtype)
        # Rows of zeros above and below let every source row see as many rows of errors.
        above = (k - 1) // s
        below = (height - 1) // s - (rows - 1)
        self._padded = np.zeros((above + rows + below, maps, across, images), dtype)
        self.target_error = self._padded[above : above + rows]
        if source_error is not None:
            self._windows_error = np.empty_like(self._windows)

    def forward(self) -> None:
        s = self.stride
        windows = sliding_window_view(self.source, self.kernel, axis=2)[:, :, ::s]
        np.copyto(self._windows, windows.transpose(0, 1, 4, 2, 3))
        np.copyto(self._weight, self.parameters["weight"].transpose(0, 2, 1, 3))
        maps = len(self._weight)
        target = _rows(self.target)
        np.matmul(self._weight.reshape(maps, -1), self._columns, out=target)
        np.add(target, self.parameters["bias"][:, None], out=target)

    def backward(self) -> None:
        error = _rows(self.target_error)
        np.matmul(error, self._columns.transpose(0, 2, 1), out=self._products)
        gradient = self._products.sum(axis=0).reshape(self._weight.shape)
        self.gradients["weight"] += gradient.transpose(0, 2, 1, 3)
        np.matmul(error, self._ones, out=self._sums)
        self.gradients["bias"] += self._sums.sum(axis=0)
        if self.source_error is not None:
            self._push(self.source_error)

    def _push(self, source_error: Array) -> None:
        """The transposed product, then the columns' errors added up where they came from.

        Source row y = q s + r meets kernel rows i = r, r + s, ... with output rows q, q - 1, ...:
        for each r one product with the errors of consecutive output rows.
        """
        k, s = self.kernel, self.stride
        maps, _, channels, _ = self._weight.shape
        padded = _rows(self._padded)
        windows_error = self._windows_error.reshape(len(self._windows), channels * k, -1)
        above = (k - 1) // s
        for r in range(min(s, len(windows_error))):
            part = windows_error[r::s]
            taps = len(range(r, k, s))
            weight = self._weight[:, r::s][:, ::-1].transpose(2, 3, 1, 0)
            errors = _stacks(padded[above - taps + 1 :], taps, 1, len(part)) if taps else None
            if errors is None:
                part.fill(0)  # a row between the windows
            else:
                np.matmul(weight.reshape(channels * k, taps * maps), errors, out=part)
        source_error.fill(0)
        span = (self.target.shape[2] - 1) * s + 1
        for j in range(k):
            source_error[:, :, j : j + span : s] += self._windows_error[:, :, j]


def _rows(block: Array) -> Array:
    """(H, C, W, N) as one matrix (C, W N) a row of the maps; a view."""
    rows, channels, _, _ = block.shape
    return block.reshape(rows, channels, -1)


def _stacks(matrices: Array, height: int, stride: int, count: int) -> Array:
    """`count` stacks of `height` consecutive matrices (R, L), as (count, height R, L); a view.

    Stack i begins with matrix i stride: stacks overlap in memory. `matrices` (.., R, L) must be
    contiguous.
    """
    _, rows, length = matrices.shape
    step, line, item = matrices.strides
    shape = (count, height * rows, length)
    return as_strided(matrices, shape, (stride * step, line, item))


class MatrixDense(BlockOperator):
    """target (U, N) = weight (U, M) source (M, N) + bias."""

    def __init__(
        self,
        planned: Planned,
        source: Array,
        source_error: Array | None,
        parameters: Views,
        gradients: Views,
        may_overwrite: bool,
    ) -> None:
        super().__init__(planned, source, source_error, parameters, gradients, may_overwrite)
        self.target = np.full(
            block_shape(planned.target_shape, source.shape[-1]), np.nan, source.dtype
        )
        self.target_error = np.empty_like(self.target)
        weight = parameters["weight"]
        self._inputs = np.empty((weight.shape[1], source.shape[-1]), source.dtype)
        self._inputs_error = np.empty_like(self._inputs)
        self._products = np.empty_like(weight)

    def forward(self) -> None:
        self._inputs[:] = columns(self.source)
        np.matmul(self.parameters["weight"], self._inputs, out=self.target)
        np.add(self.target, self.parameters["bias"][:, None], out=self.target)

    def backward(self) -> None:
        error = self.target_error
        np.matmul(error, self._inputs.T, out=self._products)
        self.gradients["weight"] += self._products
        self.gradients["bias"] += error.sum(axis=1)
        if self.source_error is not None:
            np.matmul(self.parameters["weight"].T, error, out=self._inputs_error)
            if self.source_error.ndim == 4:
                rows, channels, across, images = self.source_error.shape
                inputs_error = self._inputs_error.reshape(channels, rows, across, images)
                np.copyto(self.source_error, inputs_error.transpose(1, 0, 2, 3))
            else:
                np.copyto(self.source_error, self._inputs_error)


class WholeActivation(BlockOperator):
    """f of every element at once, in the source's place where that is allowed."""

    keeps_target = True

    def __init__(
        self,
        planned: Planned,
        source: Array,
        source_error: Array | None,
        parameters: Views,
        gradients: Views,
        may_overwrite: bool,
    ) -> None:
        super().__init__(planned, source, source_error, parameters, gradients, may_overwrite)
        self.function = cast(Activation, planned.layers[0]).function
        self.target = source if may_overwrite else np.full_like(source, np.nan)
        self.target_error = source_error
        self._slope = np.empty(source.shape, bool if self.function == "relu" else source.dtype)

    def forward(self) -> None:
        source, target = self.source, self.target
        if self.function == "relu":
            # as a product, so that NaN stays NaN; faster than np.maximum, and the slope is kept
            np.greater(source, 0, out=self._slope)
            np.multiply(source, self._slope, out=target)
        elif self.function == "tanh":
            np.tanh(source, out=target)
        else:  # sigmoid(x) = (1 + tanh(x / 2)) / 2, which cannot overflow
            np.multiply(source, 0.5, out=target)
            np.tanh(target, out=target)
            np.multiply(target, 0.5, out=target)
            np.add(target, 0.5, out=target)

    def backward(self) -> None:
        if self.source_error is None:
            return
        target, slope = self.target, self._slope
        if self.function == "tanh":
            np.multiply(target, target, out=slope)
            np.subtract(1, slope, out=slope)
        elif self.function == "sigmoid":
            np.subtract(1, target, out=slope)
            np.multiply(slope, target, out=slope)
        np.multiply(self.source_error, slope, out=self.source_error)


class SlicedSubsample(BlockOperator):
    """Windows' elements as strided slices of the whole block: first along rows, then columns.

    Along x first, then along y: among equals the left one wins in a row and then the upper row,
    which is the first in reading order.
    """

    keeps_target = True

    def __init__(
        self,
        planned: Planned,
        source: Array,
        source_error: Array | None,
        parameters: Views,
        gradients: Views,
        may_overwrite: bool,
    ) -> None:
        super().__init__(planned, source, source_error, parameters, gradients, may_overwrite)
        layer = cast(Subsample, planned.layers[0])
        self.size, self.method = layer.size, layer.method
        height, channels, _, images = source.shape
        _, rows, across = planned.target_shape
        self._narrow = np.empty((height, channels, across, images), source.dtype)
        self._won = np.empty((height, channels, across, images), bool)
        self.target = np.full((rows, channels, across, images), np.nan, source.dtype)
        self.target_error = None
        if source_error is not None:
            self.target_error = np.empty_like(self.target)
            self._narrow_error = np.empty_like(self._narrow)

    def _along_x(self, block: Array) -> list[Array]:
        return [block[:, :, j :: self.size] for j in range(self.size)]

    def _along_y(self, block: Array) -> list[Array]:
        return [block[i :: self.size] for i in range(self.size)]

    def forward(self) -> None:
        combine = np.maximum if self.method == "max" else np.add
        for parts, result in (
            (self._along_x(self.source), self._narrow),
            (self._along_y(self._narrow), self.target),
        ):
            np.copyto(result, parts[0])
            for part in parts[1:]:
                combine(result, part, out=result)
        if self.method == "mean":
            np.divide(self.target, self.size**2, out=self.target)

    def backward(self) -> None:
        if self.source_error is None or self.target_error is None:
            return
        error, narrow_error = self.target_error, self._narrow_error
        if self.method == "mean":
            np.divide(error, self.size**2, out=error)
            for part in self._along_y(narrow_error):
                np.copyto(part, error)
            for part in self._along_x(self.source_error):
                np.copyto(part, narrow_error)
            return
        self._to_winners(
            error, self.target, self._along_y(self._narrow), self._along_y(narrow_error)
        )
        self._to_winners(
            narrow_error, self._narrow, self._along_x(self.source), self._along_x(self.source_error)
        )

    def _to_winners(
        self, error: Array, largest: Array, parts: list[Array], parts_error: list[Array]
    ) -> None:
        """Give each error to the first of `parts` that equals the largest; `error` is used up."""
        won = self._won[: len(error)]
        for part, part_error in zip(parts[:-1], parts_error[:-1], strict=True):
            np.equal(part, largest, out=won)
            np.multiply(error, won, out=part_error)
            np.subtract(error, part_error, out=error)
        np.copyto(parts_error[-1], error)


STAGE = Stage(
    name="gemm",
    title="2 gemm",
    change="mini-batches, convolution as matrix products (im2col and BLAS), buffers allocated once, "
    "float32, all cores",
    runs_on="cpu",
    engine=BlockEngine,
    operators={
        (Conv,): MatrixConv,
        (Activation,): WholeActivation,
        (Subsample,): SlicedSubsample,
        (Dense,): MatrixDense,
    },
)
