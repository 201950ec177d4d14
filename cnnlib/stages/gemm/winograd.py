"""Convolution with kernels of three rows, by two thirds of the multiplications.

Two outputs, one below the other, see four rows d of the source through three kernel rows g.
Winograd (Arithmetic Complexity of Computations, 1980; for networks Lavin and Gray, Fast Algorithms
for Convolutional Neural Networks, 2016) takes four products for them where conv.py takes six:

    m0 = g0 (d0 - d2)                          upper output = m0 + m1 + m2
    m1 = (g0 + g1 + g2) / 2 (d1 + d2)          lower output = m1 - m2 - m3
    m2 = (g0 - g1 + g2) / 2 (d2 - d1)
    m3 = g2 (d1 - d3)

Each is a product of matrices, as in conv.py, which sums over channels and kernel columns.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.engine.cpu import MicroBatchOperator
from cnnlib.layers import Array, Conv, Shape
from cnnlib.stages.gemm.conv import apart
from cnnlib.stages.gemm.windows import Windows

CACHED = 2**20
"""Bytes of columns and products that are made together, to be used while a core's cache has
them."""
FEWEST = 32
"""Channels and maps from which on fewer multiplications make up for the sums."""
MOST = 0.7
"""Share of the plain products' multiplications that may be left, for the same reason."""
SUMS = ((np.subtract, 0, 2), (np.add, 1, 2), (np.subtract, 2, 1), (np.subtract, 1, 3))
"""The four sums of two of the rows d, in the order of their products."""


class Sum(NamedTuple):
    """A sum of two rows for some consecutive pairs of outputs, by views of the buffers."""

    add: Callable[..., Array]
    first: Array
    second: Array
    """Rows (pairs, C, W, N) of the source; a zero for rows of padding."""
    result: Array


class Group(NamedTuple):
    """Consecutive pairs of output rows, which are computed by one product."""

    sums: list[list[Sum]]
    """What makes up each of the four sums."""
    upper: Array
    lower: Array
    """(M, pairs, W', N) The pairs' rows of the target; the last pair may have no lower one."""


class PairedRows:
    """target (H', M, W', N) = source (H, C, W, N) convolved by kernels (3, J), with strides of 1.

    `columns` has the im2col columns of one sum, for one group of pairs: made again whenever they
    are needed, they never leave the cache.
    """

    def __init__(
        self, source: Array, target: Array, kernel: int, padding: tuple[int, int], flipped: bool
    ) -> None:
        """Kernels have `kernel` columns; they come in reverse where they are `flipped`."""
        height, channels, width, images = source.shape
        rows, maps, across, _ = target.shape
        pairs = ceil_div(rows, 2)
        used = (kernel * channels + 2 * maps) * across * images * source.itemsize  # by a pair
        sizes = (n for n in range(pairs, 0, -1) if pairs % n == 0 and n * used <= CACHED)
        self.size = next(sizes, 1)
        shape = self.size, across, images
        self._sums = np.full((self.size, channels, width, images), np.nan, source.dtype)
        columns = apart((kernel, channels, *shape), source.dtype, axes=3)
        columns.fill(0)  # padding stays zero: only the source's elements are ever written
        self.columns = columns.reshape(kernel * channels, -1)
        meetings = Windows(width, kernel, 1, padding[1], across).meetings
        self._copies = [
            (part[:, :, met], self._sums[:, :, elements].swapaxes(0, 1))
            for part, (met, elements) in zip(
                columns[::-1] if flipped else columns, meetings, strict=True
            )
        ]
        self._products = np.full((2, maps, *shape), np.nan, source.dtype)
        seen = Windows(height, 4, 2, padding[0], pairs).meetings
        self.groups = []
        for first in range(0, pairs, self.size):
            part = target[2 * first : 2 * (first + self.size)].swapaxes(0, 1)
            sums = [self._plan(source, seen, first, *terms) for terms in SUMS]
            self.groups.append(Group(sums, part[:, ::2], part[:, 1::2]))

    def _plan(
        self,
        source: Array,
        seen: Sequence[tuple[slice, slice]],
        begin: int,
        add: Callable[..., Array],
        *terms: int,
    ) -> list[Sum]:
        """One of SUMS for the group whose first pair is number `begin`.

        `seen` says for each of the rows d which pairs have it in the map, and not in the padding.
        """
        end = begin + self.size
        edges = [edge for d in terms for edge in (seen[d][0].start, seen[d][0].stop)]
        points = {begin, end, *(min(max(begin, edge), end) for edge in edges)}
        zero = np.zeros((), source.dtype)
        found = []
        for start, stop in pairwise(sorted(points)):
            rows = []
            for d in terms:
                pairs, elements = seen[d]
                inside = pairs.start <= start and stop <= pairs.stop
                first = elements.start + 2 * (start - pairs.start)
                rows.append(source[first : first + 2 * (stop - start) : 2] if inside else zero)
            result = self._sums[start - begin : stop - begin]
            found.append(Sum(add, rows[0], rows[1], result))
        return found

    def fill_columns(self, group: Group, number: int) -> None:
        """Make the columns of one of the four sums."""
        for add, first, second, result in group.sums[number]:
            add(first, second, out=result)
        for columns, elements in self._copies:
            np.copyto(columns, elements)

    def convolve(self, factors: Sequence[Array], bias: Array | None = None) -> None:
        """Compute the target, with four factors (M, J C) for the columns and a bias (M,)."""
        first, second = self._products
        for group in self.groups:
            upper, lower = group.upper, group.lower
            both = slice(lower.shape[1])  # the pairs that have both rows
            self._multiply(group, 1, factors, first)
            self._multiply(group, 2, factors, second)
            if bias is not None:
                np.add(first, bias[:, None, None, None], out=first)
            np.add(first, second, out=upper)
            np.subtract(first[:, both], second[:, both], out=lower)
            self._multiply(group, 0, factors, first)
            self._multiply(group, 3, factors, second)
            np.add(upper, first, out=upper)
            np.subtract(lower, second[:, both], out=lower)

    def _multiply(
        self, group: Group, number: int, factors: Sequence[Array], product: Array
    ) -> None:
        self.fill_columns(group, number)
        np.matmul(factors[number], self.columns, out=product.reshape(len(product), -1))


def pays(layer: Conv, source: Shape, target: Shape) -> bool:
    """Whether WinogradConv takes less time than MatrixConv, for maps (C, H, W) of these shapes.

    Small maps without padding have too few rows in common, on their way down, to gain from pairs.
    """
    channels, height, width = source
    maps, rows, across = target
    paired = 8 * ceil_div(rows, 2) * across + 4 * ceil_div(height, 2) * width
    plain = 6 * rows * across + 3 * height * across
    many = min(channels, maps) >= FEWEST
    return layer.kernel[0] == 3 and layer.stride == (1, 1) and many and paired <= MOST * plain


class WinogradConv(MicroBatchOperator):
    """Convolution of stride 1 by kernels of three rows."""

    def make_buffers(self) -> None:
        layer = self.planned.layer(Conv)
        (i, j), (p, q) = layer.kernel, layer.padding
        _, channels, _, images = self.source.shape
        maps, rows, across = self.planned.target_shape
        self.target = self.buffer(rows, maps, across, images)
        self._paired = PairedRows(self.source, self.target, j, (p, q), flipped=False)
        pairs, size = ceil_div(rows, 2), self._paired.size
        errors = self.buffer(pairs, 2, maps, across, images)
        errors.fill(0)  # where the last pair has no lower row there is no error
        self.target_error = errors.reshape(-1, maps, across, images)[:rows]
        grouped = errors.reshape(pairs // size, size, 2, maps, across * images)
        self._errors = grouped.transpose(0, 2, 3, 1, 4)
        self._error = self.buffer(maps, size, across * images)
        self._half = self.source.dtype.type(0.5)
        self._rows = self.buffer(i, j, maps, channels)
        self._row_sums = self.buffer(4, j, maps, channels)
        self._factors = self.buffer(4, maps, j, channels)
        self._products = self.buffer(4, j * channels, maps)
        self._total = np.empty_like(self._products)
        self._ones = np.ones(size * across * images, self.source.dtype)
        if self.source_error is not None:
            # The errors go down by a convolution of the upper ones with the kernels turned round.
            padding = i - 1 - p, j - 1 - q
            self._down = PairedRows(self.target_error, self.source_error, j, padding, flipped=True)

    def forward(self) -> None:
        np.copyto(self._rows, self.parameters["weight"].transpose(2, 3, 0, 1))
        g0, g1, g2 = self._rows
        outer, inner = (g0 + g2) * self._half, g1 * self._half
        sums = g0, outer + inner, outer - inner, g2
        for kept, each in zip(self._row_sums, sums, strict=True):
            np.copyto(kept, each)
        np.copyto(self._factors, self._row_sums.swapaxes(1, 2))
        factors = self._factors.reshape(4, len(self._factors[0]), -1)
        self._paired.convolve(list(factors), self.parameters["bias"])

    def backward(self) -> None:
        self._backward_weight()
        if self.source_error is not None:
            # turned round, the kernels' rows g2, g1, g0 have the same sums in another order
            channels = self._factors.shape[-1]
            self._down.convolve([self._row_sums[n].reshape(-1, channels).T for n in (3, 1, 2, 0)])

    def _backward_weight(self) -> None:
        """Each product's factor gets the errors of the outputs that the product was added to."""
        error = self._error.reshape(len(self._error), -1)
        self._total.fill(0)
        for group, (upper, lower) in zip(self._paired.groups, self._errors, strict=True):
            for number, product in enumerate(self._products):
                self._paired.fill_columns(group, number)
                if number == 0:
                    np.copyto(self._error, upper)
                elif number == 1:
                    np.add(upper, lower, out=self._error)
                    self.gradients["bias"] += np.matmul(error, self._ones)
                elif number == 2:
                    np.subtract(upper, lower, out=self._error)
                else:
                    np.negative(lower, out=self._error)
                np.matmul(self._paired.columns, error.T, out=product)
            np.add(self._total, self._products, out=self._total)
        _, j, maps, channels = self._rows.shape
        p0, p1, p2, p3 = self._total.reshape(4, j, channels, maps)
        outer, inner = (p1 + p2) * self._half, (p1 - p2) * self._half
        for row, gradient in zip(self._rows, (p0 + outer, inner, outer + p3), strict=True):
            np.copyto(row, gradient.swapaxes(1, 2))
        weight = self.gradients["weight"].reshape(maps * channels, -1)
        weight += self._rows.reshape(-1, maps * channels).T
