"""Subsampling by operations on strided slices of the maps."""

import math
from typing import NamedTuple

import numpy as np

from cnnlib.engine.cpu import MicroBatchOperator
from cnnlib.layers import Array, Subsample
from cnnlib.stages.gemm.windows import Windows

ROWS, COLUMNS = 0, 2
"""The axes of maps (H, C, W, N) along which there are windows."""


class SlicedSubsample(MicroBatchOperator):
    """Elements of all windows at once, as strided slices of the maps: along x, then along y.

    Among equals the left one wins in its row, and then the upper row: first in reading order.
    """

    keeps_target = True

    def make_buffers(self) -> None:
        layer = self.planned.layer(Subsample)
        self.method, self._elements = layer.method, math.prod(layer.size)
        down, right = (
            Windows(*numbers)
            for numbers in zip(
                (self.source.shape[ROWS], self.source.shape[COLUMNS]),
                layer.size,
                layer.strides,
                layer.padding,
                self.planned.target_shape[1:],
                strict=True,
            )
        )
        # the first operator of a network passes no errors on
        error = np.empty_like(self.source) if self.source_error is None else self.source_error
        self.along_x = Along(right, COLUMNS, self.method, self.source, error)
        narrow = self.along_x
        self.along_y = Along(down, ROWS, self.method, narrow.target, narrow.target_error)
        self.target = self.along_y.target
        self.target_error = None if self.source_error is None else self.along_y.target_error

    def forward(self) -> None:
        self.along_x.forward()
        self.along_y.forward()
        if self.method == "mean":
            np.divide(self.target, self._elements, out=self.target)

    def backward(self) -> None:
        if self.target_error is None:
            return
        if self.method == "mean":
            np.divide(self.target_error, self._elements, out=self.target_error)
        self.along_y.backward()
        self.along_x.backward()


class Place(NamedTuple):
    """One place in all windows that have an element of the map there, and not of the padding."""

    element: Array
    element_error: Array
    result: Array
    """What the windows yield; this and what follows has an element for each of them."""
    result_error: Array
    won: Array
    """bool: the windows whose element here is the winner."""
    passed: Array
    """The error that the element here receives."""


class Along:
    """The maximum or the sum of each window along one axis; the first of equals wins."""

    def __init__(
        self, windows: Windows, axis: int, method: str, source: Array, source_error: Array
    ) -> None:
        self._windows, self._method, self._source_error = windows, method, source_error
        shape = list(source.shape)
        shape[axis] = windows.count
        self.target = np.full(shape, np.nan, source.dtype)
        self.target_error = np.empty_like(self.target)
        won, passed = np.zeros(shape, bool), np.empty_like(self.target)
        of_windows = self.target, self.target_error, won, passed
        all_before = (slice(None),) * axis
        self.places = []
        for met, elements in windows.meetings:
            of_source = [maps[*all_before, elements] for maps in (source, source_error)]
            self.places.append(Place(*of_source, *(maps[*all_before, met] for maps in of_windows)))

    def forward(self) -> None:
        """Compute `target` from the source."""
        combine = np.maximum if self._method == "max" else np.add
        places = self.places
        if self._windows.padding:
            self.target.fill(-np.inf if self._method == "max" else 0)
        elif len(places) == 1:
            np.copyto(self.target, places[0].element)
            return
        else:
            combine(places[0].element, places[1].element, out=self.target)
            places = places[2:]
        for place in places:
            combine(place.result, place.element, out=place.result)

    def backward(self) -> None:
        """Compute the source's errors from `target_error`, which may be overwritten."""
        if self._windows.cover:
            backward = self._copy_errors if self._method == "mean" else self._move_errors
        else:
            self._source_error.fill(0)
            backward = self._add_errors
        backward()

    def _copy_errors(self) -> None:
        for place in self.places:
            np.copyto(place.element_error, place.result_error)

    def _move_errors(self) -> None:
        """Move each error to the first element that won; later ones get what is left: nothing."""
        *others, last = self.places
        left = last.result_error
        for place in others:
            np.equal(place.element, place.result, out=place.won)
            np.multiply(left, place.won, out=place.element_error)
            rest = last.element_error if place is others[-1] else left
            np.subtract(left, place.element_error, out=rest)
        if not others:
            np.copyto(last.element_error, left)

    def _add_errors(self) -> None:
        """The same where an element may be in several windows, or in none."""
        for place in self.places:
            passed = place.result_error
            if self._method == "max":
                passed = place.passed
                np.equal(place.element, place.result, out=place.won)
                np.multiply(place.result_error, place.won, out=passed)
                np.subtract(place.result_error, passed, out=place.result_error)
            np.add(place.element_error, passed, out=place.element_error)
