"""Operators that notice when relu or max has to decide between numbers equal but for rounding.

They compute what stage `gemm` computes and, besides, keep where each decision is a *near-tie*: one
that float32 may take otherwise than float64, because the numbers compared differ by less than
NEAR_TIE of the image's largest element. Numbers that differ by less than TIE are equal in any
arithmetic, and their order decides, which is the same in all stages.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import cast

import numpy as np

from cnnlib.engine import Planned
from cnnlib.engine.cpu import MicroBatchFactory, MicroBatchOperator
from cnnlib.layers import FUNCTIONS, Activation, Array, Layer, Subsample, Views
from cnnlib.stages import gemm

NEAR_TIE = 3e-6
"""Gap, as a share of the map's largest element, below which float32 may decide either way."""
TIE = 1e-12
"""Gap, likewise, below which two numbers are equal in any arithmetic."""

Flip = list[tuple[tuple[int, ...], float]]
"""The change of an operator's source error by one other decision: (index, summand) of elements."""


class KinkedOperator(MicroBatchOperator):
    """A layer with kinks: points at which its derivative jumps.

    After `forward`, `open` is a mask of the source: the elements that a near-tie concerns. `images`
    (N,) is the mask of the images that have such an element.
    """

    open: Array
    images: Array

    def make_buffers(self) -> None:
        self.open = np.zeros(self.source.shape, bool)
        self.images = np.zeros(self.source.shape[-1], bool)

    @abstractmethod
    def flips(self) -> Iterator[Flip]:
        """For each near-tie of the images that last went backward, the other decision's effect."""

    def mark(self, open_elements: Array, near_ties: Array) -> None:
        """Keep the open elements; images are those with any of `near_ties`, both masks (.., N)."""
        self.open = open_elements
        self.images = np.any(near_ties, axis=tuple(range(near_ties.ndim - 1)))

    def largest(self) -> Array:
        """(N,) The largest absolute value of each image's source, with which gaps are compared."""
        source = self.source
        largest: Array = np.max(np.abs(source), axis=tuple(range(source.ndim - 1)))
        return largest


class KinkedActivation(KinkedOperator, gemm.WholeActivation):
    """An activation whose kink is at zero, such as relu."""

    def make_buffers(self) -> None:
        gemm.WholeActivation.make_buffers(self)
        KinkedOperator.make_buffers(self)
        assert self.function.kink is not None
        self.below, self.above = self.function.kink

    def forward(self) -> None:
        gaps, largest = np.abs(self.source), self.largest()
        near_ties = (gaps > TIE * largest) & (gaps < NEAR_TIE * largest)
        self.mark(near_ties, near_ties)
        gemm.WholeActivation.forward(self)
        if self.function.slopes is not None:
            self.function.slopes(self.target, self._slope)

    def backward(self) -> None:
        if self.source_error is None:
            return
        if self.images.any():
            self._open_error = self.source_error[self.open]
        np.multiply(self.source_error, self._slope, out=self.source_error)

    @property
    def passes_any(self) -> bool:
        """Whether the error of any element of the images last seen is passed on."""
        return bool(self._slope.any())

    def pass_near_ties(self) -> None:
        """Pass errors, until the next `forward`, wherever another decision may do so."""
        self._slope[self.open] = max(self.below, self.above)

    def flips(self) -> Iterator[Flip]:
        for index, error in zip(np.argwhere(self.open), self._open_error, strict=True):
            yield [(tuple(index), float(error) * (self.above - self.below))]


class KinkedMax(KinkedOperator):
    """The maximum of each window, whose kinks are where its two largest elements are equal.

    An element is open if it may win a near-tie in one of its windows. Maps are padded by -inf.
    """

    keeps_target = True

    def make_buffers(self) -> None:
        layer = self._layer = self.planned.layer(Subsample)
        height, channels, width, images = self.source.shape
        _, rows, columns = self.planned.target_shape
        above, left = layer.padding
        self._padded = np.full(
            (height + 2 * above, channels, width + 2 * left, images), -np.inf, self.source.dtype
        )
        self._inside = slice(above, above + height), slice(None), slice(left, left + width)
        self._padded_error = np.zeros_like(self._padded)
        self._taken = np.zeros((rows, channels, columns, images), bool)
        self.target = self.buffer(rows, channels, columns, images)
        self.target_error = None if self.source_error is None else np.empty_like(self.target)
        self._open: list[Array] = []
        super().make_buffers()

    def _parts(self, padded: Array) -> list[Array]:
        """Views (H', C, W', N): the first elements of all windows in reading order, the second
        ones, and so on.
        """
        (down, across), (rows, _, columns, _) = self._layer.strides, self.target.shape
        return [
            padded[
                i : i + (rows - 1) * down + 1 : down, :, j : j + (columns - 1) * across + 1 : across
            ]
            for i in range(self._layer.size[0])
            for j in range(self._layer.size[1])
        ]

    def forward(self) -> None:
        self._padded[self._inside] = self.source
        parts = self._parts(self._padded)
        np.copyto(self.target, parts[0])
        for part in parts[1:]:
            np.maximum(self.target, part, out=self.target)
        largest = self.largest()
        gaps = [self.target - part for part in parts]
        near = [gap < NEAR_TIE * largest for gap in gaps]
        rivals = [n & (gap > TIE * largest) for n, gap in zip(near, gaps, strict=True)]
        tied = np.logical_or.reduce(rivals)
        self._open = [n & tied for n in near]
        marks = np.zeros(self._padded.shape, bool)
        for mark, is_open in zip(self._parts(marks), self._open, strict=True):
            mark |= is_open
        self.mark(marks[self._inside], tied)

    def backward(self) -> None:
        if self.source_error is None or self.target_error is None:
            return
        if self.images.any():
            self._coming = self.target_error.copy()
        self._taken.fill(False)
        self._padded_error.fill(0)
        parts, errors = self._parts(self._padded), self._parts(self._padded_error)
        for part, error in zip(parts, errors, strict=True):
            won = (part == self.target) & ~self._taken
            self._taken |= won
            error += self.target_error * won
        np.copyto(self.source_error, self._padded_error[self._inside])

    def flips(self) -> Iterator[Flip]:
        size, stride, padding = self._layer.size, self._layer.strides, self._layer.padding
        parts = self._parts(self._padded)
        winners = np.argmax(np.stack([part == self.target for part in parts]), axis=0)

        def element(number: int, row: int, c: int, column: int, n: int) -> tuple[int, ...]:
            i, j = divmod(number, size[1])
            return row * stride[0] + i - padding[0], c, column * stride[1] + j - padding[1], n

        for number, is_open in enumerate(self._open):
            for index in np.argwhere(is_open):
                row, c, column, n = map(int, index)
                winner = int(winners[row, c, column, n])
                if winner != number:
                    error = float(self._coming[row, c, column, n])
                    place = row, c, column, n
                    yield [(element(number, *place), error), (element(winner, *place), -error)]


def activation(
    planned: Planned,
    source: Array,
    source_error: Array | None,
    parameters: Views,
    gradients: Views,
    may_overwrite: bool,
) -> MicroBatchOperator:
    """The operator for an activation, which says whether it has a kink."""
    function = FUNCTIONS[cast(Activation, planned.layers[0]).function]
    operator = gemm.WholeActivation if function.kink is None else KinkedActivation
    return operator(planned, source, source_error, parameters, gradients, may_overwrite)


def subsample(
    planned: Planned,
    source: Array,
    source_error: Array | None,
    parameters: Views,
    gradients: Views,
    may_overwrite: bool,
) -> MicroBatchOperator:
    """The operator for subsampling; of the methods only max has kinks."""
    method = cast(Subsample, planned.layers[0]).method
    operator = KinkedMax if method == "max" else gemm.SlicedSubsample
    return operator(planned, source, source_error, parameters, gradients, may_overwrite)


OPERATORS: dict[tuple[type[Layer], ...], MicroBatchFactory] = {
    (Activation,): activation,
    (Subsample,): subsample,
}
