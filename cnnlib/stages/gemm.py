"""Stage 2: the easy wins on the CPU. Micro-batches, convolution as a matrix product (BLAS), buffers
allocated once, float32, all cores.

What differs from stage 1 besides the batch is the convolution: the windows of a whole row of
outputs are copied out of the source (im2col), and all maps' outputs of that row are one product of
matrices. Maps lie in memory as (H, C, W, N), the image innermost: see cnnlib/engine/cpu.py.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view

from cnnlib.engine import Stage
from cnnlib.engine.cpu import MicroBatchEngine, MicroBatchOperator, in_c_order, micro_batch_shape
from cnnlib.engine.plain_windows import declining, other_than_square
from cnnlib.layers import (
    FUNCTIONS,
    Activation,
    Array,
    Conv,
    Dense,
    Dropout,
    Subsample,
)


@declining(other_than_square)
class MatrixConv(MicroBatchOperator):
    """Convolution as products of matrices, one for each row of outputs.

    `columns[y, c, j, x, n] = source[y, c, x s + j, n]` holds the im2col columns of every source
    row. An output row sees K consecutive source rows, whose columns lie one behind the other: its
    (K C K, W' N) matrix is a slice of `columns`, and neighbouring output rows share K - s of their
    source rows. So the copy is K times as large as the source, not K K times.
    """

    def make_buffers(self) -> None:
        layer = self.planned.layer(Conv)
        k, s = self.kernel, self.stride = layer.kernel[0], layer.stride[0]
        height, channels, _, images = self.source.shape
        maps, rows, across = self.planned.target_shape
        self.target = self.buffer(rows, maps, across, images)
        # The weight with kernel rows before channels, in the order of the columns.
        self._weight = self.buffer(maps, k, channels, k)
        self._columns = self.buffer(height, channels, k, across, images)
        self._seen = stacks(
            self._columns.reshape(height, channels * k, across * images), k, s, rows
        )
        # Zero rows above and below, so that every source row meets equally many rows of errors.
        self._above = (k - 1) // s
        below = (height - 1) // s - (rows - 1)
        self._padded_error = self.buffer(self._above + rows + below, maps, across, images)
        self._padded_error.fill(0)
        self._error = self._padded_error[self._above : self._above + rows]
        self.target_error = self._error
        self._columns_error = np.empty_like(self._columns)
        self._products = self.buffer(rows, maps, k * channels * k)
        self._sums = self.buffer(rows, maps)
        self._ones = np.ones(across * images, self.source.dtype)

    def forward(self) -> None:
        windows = sliding_window_view(self.source, self.kernel, axis=2)[:, :, :: self.stride]
        np.copyto(self._columns, windows.transpose(0, 1, 4, 2, 3))
        np.copyto(self._weight, self.parameters["weight"].swapaxes(1, 2))
        weight = self._weight.reshape(len(self._weight), -1)
        target = row_matrices(self.target)
        np.matmul(weight, self._seen, out=target)
        np.add(target, self.parameters["bias"][:, None], out=target)

    def backward(self) -> None:
        error = row_matrices(self._error)
        np.matmul(error, self._seen.transpose(0, 2, 1), out=self._products)
        gradient = self._products.sum(axis=0).reshape(self._weight.shape)
        self.gradients["weight"] += gradient.swapaxes(1, 2)
        np.matmul(error, self._ones, out=self._sums)  # a product with ones is faster than a sum
        self.gradients["bias"] += self._sums.sum(axis=0)
        if self.source_error is not None:
            self._backward_data(self.source_error)

    def _backward_data(self, source_error: Array) -> None:
        """Write the source's errors: the columns' errors, added up where the columns came from.

        Source row y = q s + r met kernel rows i = r, r + s, ... for output rows q, q - 1, ...: so
        for each r, the errors of consecutive output rows make one product.
        """
        k, s = self.kernel, self.stride
        maps, _, channels, _ = self._weight.shape
        across = self.target.shape[2]
        padded = row_matrices(self._padded_error)
        columns_error = self._columns_error.reshape(len(self._columns), channels * k, -1)
        for r in range(min(s, len(columns_error))):
            result = columns_error[r::s]
            weight = self._weight[:, r::s][:, ::-1]  # the last kernel row met the first output row
            met = weight.shape[1]
            if met:
                seen = stacks(padded[self._above - met + 1 :], met, 1, len(result))
                flat = weight.transpose(2, 3, 1, 0).reshape(channels * k, met * maps)
                np.matmul(flat, seen, out=result)
            else:
                result.fill(0)  # stride beyond the kernel: no window has this row
        source_error.fill(0)
        for j in range(k):
            part = source_error[:, :, j : j + (across - 1) * s + 1 : s]
            np.add(part, self._columns_error[:, :, j], out=part)


def row_matrices(maps: Array) -> Array:
    """A view of (H, C, W, N) as one matrix (C, W N) for each row of the maps."""
    rows, channels, _, _ = maps.shape
    return maps.reshape(rows, channels, -1)


def stacks(matrices: Array, height: int, stride: int, count: int) -> Array:
    """A view (count, height R, L) of contiguous matrices (.., R, L), `height` of them stacked.

    Stack i begins with matrix number i * stride; stacks overlap in memory.
    """
    _, rows, length = matrices.shape
    step, line, item = matrices.strides
    shape = (count, height * rows, length)
    return as_strided(matrices, shape, (stride * step, line, item))


class MatrixDense(MicroBatchOperator):
    """target (U, N) = weight (U, M) source (M, N) + bias."""

    def make_buffers(self) -> None:
        images = self.source.shape[-1]
        weight = self.parameters["weight"]
        self.target = self.buffer(*micro_batch_shape(self.planned.target_shape, images))
        self._error = self.target_error = np.empty_like(self.target)
        self._inputs = self.buffer(weight.shape[1], images)
        self._inputs_error = np.empty_like(self._inputs)
        self._products = np.empty_like(weight)

    def forward(self) -> None:
        source = in_c_order(self.source)
        np.copyto(self._inputs.reshape(source.shape), source)
        np.matmul(self.parameters["weight"], self._inputs, out=self.target)
        np.add(self.target, self.parameters["bias"][:, None], out=self.target)

    def backward(self) -> None:
        np.matmul(self._error, self._inputs.T, out=self._products)
        self.gradients["weight"] += self._products
        self.gradients["bias"] += self._error.sum(axis=1)
        if self.source_error is not None:
            np.matmul(self.parameters["weight"].T, self._error, out=self._inputs_error)
            source_error = in_c_order(self.source_error)
            np.copyto(source_error, self._inputs_error.reshape(source_error.shape))


class WholeActivation(MicroBatchOperator):
    """target = f(source) in one operation, in place where that is allowed."""

    keeps_target = True

    def make_buffers(self) -> None:
        self.function = FUNCTIONS[self.planned.layer(Activation).function]
        self.target = self.source if self.may_overwrite else np.full_like(self.source, np.nan)
        self.target_error = self.source_error  # the operator above writes into it directly
        slope_type = self.function.slope_type or self.source.dtype
        self._slope = np.zeros(self.source.shape, slope_type)

    def forward(self) -> None:
        self.function.values(self.source, self.target, self._slope)

    def backward(self) -> None:
        if self.source_error is None:
            return
        if self.function.slopes is not None:
            self.function.slopes(self.target, self._slope)
        np.multiply(self.source_error, self._slope, out=self.source_error)


@declining(other_than_square)
class SlicedSubsample(MicroBatchOperator):
    """Elements of all windows at once, as strided slices of the maps: along x, then along y.

    Among equals the left one wins in its row, and then the upper row: first in reading order.
    """

    keeps_target = True

    def make_buffers(self) -> None:
        layer = self.planned.layer(Subsample)
        self.size, self.method = layer.size[0], layer.method
        height, channels, _, images = self.source.shape
        _, rows, across = self.planned.target_shape
        self._narrow = self.buffer(height, channels, across, images)
        self._narrow_error = np.empty_like(self._narrow)
        self._won = np.zeros(self._narrow.shape, bool)
        self.target = self.buffer(rows, channels, across, images)
        self.target_error = None if self.source_error is None else np.empty_like(self.target)

    def along_x(self, maps: Array) -> list[Array]:
        """Views (H, C, W', N): the first elements of all windows, the second ones, ..."""
        return [maps[:, :, j :: self.size] for j in range(self.size)]

    def along_y(self, maps: Array) -> list[Array]:
        """Views (H', C, W, N): the first elements of all windows, the second ones, ..."""
        return [maps[i :: self.size] for i in range(self.size)]

    def forward(self) -> None:
        combine = np.maximum if self.method == "max" else np.add
        for parts, result in (
            (self.along_x(self.source), self._narrow),
            (self.along_y(self._narrow), self.target),
        ):
            if len(parts) == 1:
                np.copyto(result, parts[0])
            else:
                combine(parts[0], parts[1], out=result)
            for part in parts[2:]:
                combine(result, part, out=result)
        if self.method == "mean":
            np.divide(self.target, self.size**2, out=self.target)

    def backward(self) -> None:
        if self.source_error is None or self.target_error is None:
            return
        parts_error = self.along_x(self.source_error)
        narrow_parts_error = self.along_y(self._narrow_error)
        if self.method == "max":
            narrow_parts, parts = self.along_y(self._narrow), self.along_x(self.source)
            self._to_winners(self.target_error, self.target, narrow_parts, narrow_parts_error)
            self._to_winners(self._narrow_error, self._narrow, parts, parts_error)
        else:
            np.divide(self.target_error, self.size**2, out=self.target_error)
            for part in narrow_parts_error:
                np.copyto(part, self.target_error)
            for part in parts_error:
                np.copyto(part, self._narrow_error)

    def _to_winners(
        self, error: Array, largest: Array, parts: list[Array], parts_error: list[Array]
    ) -> None:
        """Pass each error to the first of `parts` that equals the largest; overwrites `error`."""
        won = self._won[: len(error)]
        for part, part_error in zip(parts[:-1], parts_error[:-1], strict=True):
            np.equal(part, largest, out=won)
            np.multiply(error, won, out=part_error)
            np.subtract(
                error, part_error, out=error
            )  # later parts get what is left, which is nothing
        np.copyto(parts_error[-1], error)


class MaskedDropout(MicroBatchOperator):
    """target = source * mask, in place where that is allowed; without dropout a copy at most."""

    def make_buffers(self) -> None:
        self.target = self.source if self.may_overwrite else np.full_like(self.source, np.nan)
        self.target_error = self.source_error  # the operator above writes into it directly
        self._mask = np.ones(self.source.shape, self.source.dtype)
        self._scale = self.source.dtype.type(self.planned.layer(Dropout).scale)

    def forward(self) -> None:
        if self.moment is None:
            if self.target is not self.source:
                np.copyto(self.target, self.source)
            return
        step, positions = self.moment
        kept = self.setup.mask(self.planned.start, step, positions)
        # A short micro-batch is filled up with copies of an image, whose errors are 0.
        mask = in_c_order(self._mask)[..., : len(positions)]
        np.multiply(kept.transpose(*range(1, kept.ndim), 0), self._scale, out=mask)
        np.multiply(self.source, self._mask, out=self.target)

    def backward(self) -> None:
        if self.source_error is not None:
            np.multiply(self.source_error, self._mask, out=self.source_error)


STAGE = Stage(
    name="gemm",
    title="2 gemm",
    change="mini-batches, convolution as matrix products (im2col and BLAS), buffers allocated "
    "once, float32, all cores",
    runs_on="cpu",
    engine=MicroBatchEngine,
    after="naive",
    color="#0072b2",
    marker="s",
    operators={
        (Conv,): MatrixConv,
        (Activation,): WholeActivation,
        (Subsample,): SlicedSubsample,
        (Dense,): MatrixDense,
        (Dropout,): MaskedDropout,
    },
)
