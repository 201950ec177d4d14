"""Convolution as products of matrices (im2col and BLAS)."""

import math
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import DTypeLike

from cnnlib.arithmetic import ceil_div
from cnnlib.engine.cpu import MicroBatchOperator
from cnnlib.layers import Array, Conv, Shape
from cnnlib.stages.gemm.windows import Windows

PAGE = 4096
"""Numbers this many bytes apart share few places of a core's cache."""
SPARE = 64
"""Bytes that are left free behind rows that would begin a multiple of PAGE apart."""
GROUP = 2**20
"""Bytes of columns, or of their errors, that are made together, to be used while a core's cache has
them."""
SMALL = 10**6
"""Multiplications up to which OpenBLAS takes a product's factors as they lie, without copying parts
of them: with few maps and channels that is twice as fast (interface/gemm.c, for AVX-512)."""
SHORTEST = 256
"""Columns that a product has at least, if rows are cut to make it small."""


class Step(NamedTuple):
    """How some rows of the target are computed, by views of the buffers."""

    copies: list[tuple[Array, Array]]
    """Parts of the columns and the elements of the source that they are copies of."""
    seen: Array
    """(count, pieces, I C J, W' N / pieces) The columns that each row sees."""
    target: Array
    """(count, pieces, M, W' N / pieces)"""


class Pass(NamedTuple):
    """How the errors of some rows of the source are computed, by views of the buffers."""

    kernel_row: int
    """The first kernel row that these rows meet; the others follow by the stride."""
    error: Array
    """(count, rows met M, W' N) The errors of the outputs that each row was seen by."""
    columns: Array
    """(count, C J, W' N) Their product with the weights: the errors of the rows' columns."""
    sums: list[tuple[Array, Array]]
    """Parts of `columns` and the elements of the source's error that they are added to."""


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
        columns = apart((seen, channels, j, across, images), self.source.dtype)
        if p or q:
            columns.fill(0)  # padding stays zero: only the source's elements are ever written
        flat = columns.reshape(seen, channels * j, across * images)
        self._pieces = pieces_of(maps * i * channels * j, across * images)
        self._seen = self._cut(stacks(flat, i, s, rows))
        # Zero rows above and below, so that every source row meets equally many rows of errors.
        self._above = (i - 1) // s
        below = max(0, (self._end - 1) // s - (rows - 1))
        self._padded_error = self.buffer(self._above + rows + below, maps, across, images)
        self._padded_error.fill(0)
        self._error = self._padded_error[self._above : self._above + rows]
        self.target_error = self._error
        self._meetings = Windows(width, j, t, q, across).meetings
        self._steps = self._plan_rows(columns)
        self._passes = [] if self.source_error is None else self._plan_errors(self.source_error)
        self._products = self.buffer(rows, self._pieces, i * channels * j, maps)
        self._sums = self.buffer(rows, maps)
        self._ones = np.ones(across * images, self.source.dtype)

    def _pairs(self, columns: Array, maps: Array) -> list[tuple[Array, Array]]:
        """For each kernel column, the part of `columns` and the elements of `maps` that it has."""
        return [
            (columns[:, :, j, met], maps[: len(columns), :, elements])
            for j, (met, elements) in enumerate(self._meetings)
        ]

    def _cut(self, matrices: Array) -> Array:
        """A view (count, pieces, R, L / pieces) of matrices (count, R, L), cut between columns."""
        count, rows, _ = matrices.shape
        return matrices.reshape(count, rows, self._pieces, -1).swapaxes(1, 2)

    def _plan_rows(self, columns: Array) -> list[Step]:
        """Steps for all rows of the target, in turn."""
        s, target = self.stride, self._cut(row_matrices(self.target))
        kernel_rows = self._weight.shape[1]
        most = max(1, GROUP // (s * columns[0].nbytes))
        steps, copied = [], self._begin
        for row in range(0, len(target), most):
            part = slice(row, row + most)
            last = min(len(target), part.stop) - 1
            end = max(copied, min(self._end, last * s + kernel_rows))
            source = self.source[copied - self._begin :]
            copies = self._pairs(columns[copied:end], source)
            steps.append(Step(copies, self._seen[part], target[part]))
            copied = end
        return steps

    def forward(self) -> None:
        np.copyto(self._weight, self.parameters["weight"].swapaxes(1, 2))
        weight, bias = self._weight.reshape(len(self._weight), -1), self.parameters["bias"]
        for copies, seen, target in self._steps:
            for columns, elements in copies:
                np.copyto(columns, elements)
            np.matmul(weight, seen, out=target)
            np.add(target, bias[:, None], out=target)

    def backward(self) -> None:
        error = row_matrices(self._error)
        # The transpose of what is wanted: BLAS takes half the time where there are few maps.
        np.matmul(self._seen, self._cut(error).swapaxes(2, 3), out=self._products)
        maps, i, channels, j = self._weight.shape
        gradient = self._products.sum(axis=(0, 1)).reshape(i, channels, j, maps)
        self.gradients["weight"] += gradient.transpose(3, 1, 0, 2)
        np.matmul(error, self._ones, out=self._sums)  # a product with ones is faster than a sum
        self.gradients["bias"] += self._sums.sum(axis=0)
        if self.source_error is not None:
            self._backward_data(self.source_error)

    def _plan_errors(self, source_error: Array) -> list[Pass]:
        """Passes for all rows of the source that a window sees.

        Row y = q s + r of the padded source met kernel rows i = r, r + s, ... for output rows q,
        q - 1, ...: so for each r, the errors of consecutive output rows make one product.
        """
        _, i, channels, j = self._weight.shape
        _, _, across, images = self.target.shape
        s, padded = self.stride, row_matrices(self._padded_error)
        most = GROUP // (channels * j * across * images * padded.itemsize)
        most = max(1, min(most, self._end - self._begin))
        buffer = apart((most, channels, j, across, images), padded.dtype)
        passes = []
        for r in range(min(s, i)):
            met = ceil_div(i - r, s)
            first, end = (max(0, ceil_div(y - r, s)) for y in (self._begin, self._end))  # of q
            for q in range(first, end, most):
                columns = buffer[: min(most, end - q)]
                sums = self._pairs(columns, source_error[q * s + r - self._begin :: s])
                above = padded[self._above + q - (met - 1) :]
                error = stacks(above, met, 1, len(columns))
                passes.append(Pass(r, error, columns.reshape(len(columns), channels * j, -1), sums))
        return passes

    def _backward_data(self, source_error: Array) -> None:
        """Write the source's errors: the columns' errors, added up where the columns came from."""
        _, _, channels, j = self._weight.shape
        weights = []
        for r in range(self.stride):
            met = self._weight[:, r :: self.stride]
            # the last kernel row met the first output row
            weights.append(met[:, ::-1].transpose(2, 3, 1, 0).reshape(channels * j, -1))
        source_error.fill(0)
        for r, error, columns, sums in self._passes:
            np.matmul(weights[r], error, out=columns)
            for part, elements in sums:
                np.add(elements, part, out=elements)


def apart(shape: Shape, dtype: DTypeLike, axes: int = 2) -> Array:
    """A buffer whose rows, of so many last axes, do not begin a multiple of PAGE bytes apart.

    It is full of NaN: reading before writing is noticed.
    """
    run, size = math.prod(shape[-axes:]), np.dtype(dtype).itemsize
    spare = SPARE // size if run * size % PAGE == 0 else 0
    buffer: Array = np.full((*shape[:-axes], run + spare), np.nan, dtype)
    return buffer[..., :run].reshape(shape)


def pieces_of(terms: int, columns: int) -> int:
    """Into how many pieces the columns of a product are cut, if `terms` meet each column."""
    whole = range(1, columns // SHORTEST + 1)
    few = (n for n in whole if columns % n == 0 and terms * columns // n <= SMALL)
    return next(few, 1)


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
