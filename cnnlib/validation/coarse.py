"""The reference with factors of its products off by as much as a coarser format rounds them.

A stage whose tensor cores multiply TF32 is no less right for it, but it is further from the
reference than float32, and how much further depends on the network. An error of 2^-11 in a map
changes a few hundredths of what relu and max decide in every layer above it, and the gradients of
the first layers collect all these changes. A bound that holds for every network would be too wide
to say anything about this one. So the distance is measured: the same batches go through a reference
whose products have such factors, and a right stage is not much further away than that.

Each factor of a product is rounded by itself, once for all products that it is in: a layer's
source, its weights, and the error of its target. Sums are exact beside that, as sums in float32
are. Tensor cores round to nearest or, where nothing converts the numbers that they are given, cut
off the last bits, which makes all products smaller. Both are tried.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import numpy as np

from cnnlib.engine import Setup
from cnnlib.engine.cpu import MicroBatchEngine, MicroBatchFactory, MicroBatchOperator
from cnnlib.layers import Array, Conv, Dense
from cnnlib.validation.reference import FAST_REFERENCE
from cnnlib.validation.tolerances import SPREAD

TRIES = 4
"""Coarse references: half of them round to nearest, half of them toward zero."""


class _Rounded(MicroBatchOperator):
    """Mixed into an operator that copies its source before it multiplies: changes the factors."""

    rounding: float
    toward_zero: bool
    random: np.random.Generator

    def make_buffers(self) -> None:
        super().make_buffers()  # type: ignore[safe-super]
        self._factors = 1 + self._errors(self.parameters["weight"])

    def forward(self) -> None:
        weight = self.parameters["weight"]
        # The operator below may look for the largest of its window in what is the source here.
        with _changed(self.source, 1 + self._errors(self.source)), _changed(weight, self._factors):
            super().forward()  # type: ignore[safe-super]

    def backward(self) -> None:
        assert self.target_error is not None
        self.target_error *= 1 + self._errors(self.target_error)
        with _changed(self.parameters["weight"], self._factors):
            super().backward()  # type: ignore[safe-super]

    def _errors(self, factor: Array) -> Array:
        return rounding_errors(self.random, self.rounding, factor.shape, self.toward_zero)


@contextmanager
def _changed(array: Array, factors: Array) -> Iterator[None]:
    """An array times some factors, element by element, until the end of the block."""
    exact = array.copy()
    array *= factors
    try:
        yield
    finally:
        array[...] = exact


def rounding_errors(
    random: np.random.Generator, rounding: float, shape: tuple[int, ...], toward_zero: bool
) -> Array:
    """Relative errors of numbers whose neighbours in the format are `rounding` apart, relative."""
    errors = random.random(shape)
    errors -= 1.0 if toward_zero else 0.5
    errors *= rounding
    return errors


def weight_errors(rounding: float | None, count: int) -> Iterator[Array]:
    """TRIES vectors of relative errors for `count` weights; none where `rounding` is None."""
    for number in range(TRIES if rounding else 0):
        random = np.random.default_rng(number)
        yield rounding_errors(random, rounding or 0.0, (count,), _toward_zero(number))


def spread_of(right: Array, others: Sequence[Array]) -> float:
    """How far from `right` a vector may be, as a length, if coarse products led to `others`."""
    return SPREAD * max((length(other - right) for other in others), default=0.0)


def length(vector: Array) -> float:
    """Euclidean length; not by BLAS, whose threads take longer to wake than so short a sum."""
    return math.sqrt(float(np.square(vector).sum()))


@contextmanager
def coarse_references(setup: Setup, rounding: float | None) -> Iterator[list[MicroBatchEngine]]:
    """TRIES engines whose products have factors off by `rounding`; none where that is None."""
    with ExitStack() as opened:
        yield [
            opened.enter_context(coarse_reference(setup, rounding, number))
            for number in range(TRIES if rounding else 0)
        ]


def coarse_reference(setup: Setup, rounding: float | None, number: int) -> MicroBatchEngine:
    """A coarse reference; each `number` is another one, and even ones round to nearest."""
    settings = {
        "rounding": rounding,
        "toward_zero": _toward_zero(number),
        "random": np.random.default_rng(number),
    }
    operators = dict(FAST_REFERENCE.operators)
    for kind in (Conv, Dense):
        exact = cast(type[MicroBatchOperator], operators[kind,])
        rounded = type(f"Rounded{exact.__name__}", (_Rounded, exact), settings)
        operators[kind,] = cast(MicroBatchFactory, rounded)
    stage = dataclasses.replace(FAST_REFERENCE, name="coarse reference", operators=operators)
    return MicroBatchEngine(stage, setup)


def _toward_zero(number: int) -> bool:
    return number % 2 == 1
