"""Convolution as products of matrices (im2col and BLAS)."""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cnnlib.arithmetic import ceil_div
from cnnlib.engine.cpu import MicroBatchOperator
from cnnlib.layers import Array, Conv
from cnnlib.stages.gemm.windows import Windows

PAGE = 4096
"""Bytes from one number to another that caches keep in the same few places."""
SPARE = 64
"""Bytes that are left free behind rows of that length."""


class MatrixConv(MicroBatchOperator):
    """Convolution as products of matrices, one for each row of outputs.

    `columns[y, c, j, x, n] = padded[y, c, x t + j, n]` holds the im2col columns of every row of the
    padded source that a window sees; kernels have I rows and J columns, strides are s and t. An
    output row sees I consecutive rows, whose columns lie one behind the other: its (I C J, W' N)
    matrix is a slice of `columns`, and neighbouring output rows share I - s of their rows. So the
    copy is J times as large as the source, not I J times.
    """

    def make_buffers(self) -> None:
        layer = self.planned.layer(Conv)
        (i, j), (s, t), (p, q) = layer.kernel, layer.stride, layer.padding
        height, channels, width, images = self.source.shape
        maps, rows, across = self.planned.target_shape
        self.stride = s
        self.target = self.buffer(rows, maps, across, images)
        # The weight with kernel rows before channels, in the order of the columns.
        self._weight = self.buffer(maps, i, channels, j)
        seen = (rows - 1) * s + i
        # Of the rows seen, the source's own; those before and behind them are padding.
        self._begin, self._end = min(p, seen), min(p + height, seen)
        columns = self._apart(seen, channels, j, across, images)
        if p or q:
            columns.fill(0)  # padding stays zero: only the source's elements are ever written
        self._seen = stacks(columns.reshape(seen, channels * j, across * images), i, s, rows)
        # Zero rows above and below, so that every source row meets equally many rows of errors.
        self._above = (i - 1) // s
        below = max(0, (self._end - 1) // s - (rows - 1))
        self._padded_error = self.buffer(self._above + rows + below, maps, across, images)
        self._padded_error.fill(0)
        self._error = self._padded_error[self._above : self._above + rows]
        self.target_error = self._error
        self._columns_error = self._apart(self._end - self._begin, channels, j, across, images)
        self._meetings = Windows(width, j, t, q, across).meetings
        own = columns[self._begin : self._end]
        self._copies = self._pairs(own, self.source)
        self._sums_of_copies = []
        if self.source_error is not None:
            self._sums_of_copies = self._pairs(self._columns_error, self.source_error)
        self._products = self.buffer(rows, i * channels * j, maps)
        self._sums = self.buffer(rows, maps)
        self._ones = np.ones(across * images, self.source.dtype)

    def _apart(self, *shape: int) -> Array:
        """A buffer whose rows (W, N) do not begin a multiple of PAGE bytes apart."""
        *before, width, images = shape
        run, size = width * images, self.source.dtype.itemsize
        spare = SPARE // size if run * size % PAGE == 0 else 0
        return self.buffer(*before, run + spare)[..., :run].reshape(shape)

    def _pairs(self, columns: Array, maps: Array) -> list[tuple[Array, Array]]:
        """For each kernel column, the part of `columns` and the elements of `maps` that it has."""
        return [
            (columns[:, :, j, met], maps[: len(columns), :, elements])
            for j, (met, elements) in enumerate(self._meetings)
        ]

    def forward(self) -> None:
        for columns, elements in self._copies:
            np.copyto(columns, elements)
        np.copyto(self._weight, self.parameters["weight"].swapaxes(1, 2))
        weight = self._weight.reshape(len(self._weight), -1)
        target = row_matrices(self.target)
        np.matmul(weight, self._seen, out=target)
        np.add(target, self.parameters["bias"][:, None], out=target)

    def backward(self) -> None:
        error = row_matrices(self._error)
        # The transpose of what is wanted: BLAS takes half the time where there are few maps.
        np.matmul(self._seen, error.transpose(0, 2, 1), out=self._products)
        maps, i, channels, j = self._weight.shape
        gradient = self._products.sum(axis=0).reshape(i, channels, j, maps)
        self.gradients["weight"] += gradient.transpose(3, 1, 0, 2)
        np.matmul(error, self._ones, out=self._sums)  # a product with ones is faster than a sum
        self.gradients["bias"] += self._sums.sum(axis=0)
        if self.source_error is not None:
            self._backward_data(self.source_error)

    def _backward_data(self, source_error: Array) -> None:
        """Write the source's errors: the columns' errors, added up where the columns came from.

        Row y = q s + r of the padded source met kernel rows i = r, r + s, ... for output rows q,
        q - 1, ...: so for each r, the errors of consecutive output rows make one product.
        """
        s = self.stride
        maps, _, channels, j = self._weight.shape
        padded = row_matrices(self._padded_error)
        columns_error = self._columns_error
        flat_error = columns_error.reshape(len(columns_error), channels * j, -1)
        for r in range(s):
            first = max(0, ceil_div(self._begin - r, s))  # the q of the first such row
            result = flat_error[first * s + r - self._begin :: s]
            weight = self._weight[:, r::s][:, ::-1]  # the last kernel row met the first output row
            met = weight.shape[1]
            if met and len(result):
                seen = stacks(padded[self._above + first - (met - 1) :], met, 1, len(result))
                flat = weight.transpose(2, 3, 1, 0).reshape(channels * j, met * maps)
                np.matmul(flat, seen, out=result)
            else:
                result.fill(0)  # stride beyond the kernel: no window has this row
        source_error.fill(0)
        for columns, elements in self._sums_of_copies:
            np.add(elements, columns, out=elements)


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
