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


class KinkedMax(KinkedOperator, gemm.SlicedSubsample):
    """The maximum of each window, whose kinks are where its two largest elements are equal.

    An element is open if it may win a near-tie.
    """

    def make_buffers(self) -> None:
        gemm.SlicedSubsample.make_buffers(self)
        KinkedOperator.make_buffers(self)

    def forward(self) -> None:
        gemm.SlicedSubsample.forward(self)
        gaps, largest = self._at_elements(self.target) - self.source, self.largest()
        near = gaps < NEAR_TIE * largest
        rivals = near & (gaps > TIE * largest)
        parts = [part for row in self.along_y(rivals) for part in self.along_x(row)]
        self.mark(near & self._at_elements(np.logical_or.reduce(parts)), rivals)

    def _at_elements(self, windows: Array) -> Array:
        """Each window's value at all of its elements."""
        return windows.repeat(self.size, axis=0).repeat(self.size, axis=2)

    def backward(self) -> None:
        if self.target_error is not None and self.images.any():
            self._coming = self.target_error.copy()
        gemm.SlicedSubsample.backward(self)

    def flips(self) -> Iterator[Flip]:
        size = self.size
        for index in np.argwhere(self.open):
            y, c, x, n = map(int, index)
            row, column = y // size, x // size
            window = self.source[row * size : (row + 1) * size, c, column * size :, n][:, :size]
            down, right = divmod(int(window.argmax()), size)
            winner = (row * size + down, c, column * size + right, n)
            if winner != (y, c, x, n):
                error = float(self._coming[row, c, column, n])
                yield [((y, c, x, n), error), (winner, -error)]


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
