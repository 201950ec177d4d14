"""The order in which an epoch visits images: one permutation, computed alike on host and device."""

import math
from functools import cached_property
from typing import Self

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.layers import Array

ROUNDS = 6
"""Rounds of the Feistel network. By Luby and Rackoff (1988) four rounds of random functions already
make a permutation that a few of its values do not distinguish from a random one.
"""

ENTROPY_WORDS = 4
"""Words of 32 bits by which a device draws an order: as many as SeedSequence's pool has."""


class Shuffle:
    """A random permutation of range(count); each element can be computed by itself.

    A Feistel network over the numbers of 2 `half` bits whose round functions are tables of random
    numbers. A result outside the range goes through the network again, until it lies within it
    (Black and Rogaway's cycle walking, 2002). kernels/shuffle.cuh computes the same on a device.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self.count = count
        self.half = half_of(count)
        self._drawn_by: tuple[int, int] | None = (seed, epoch)

    @classmethod
    def given(cls, count: int, tables: Array) -> Self:
        """The permutation of these tables; by which seed they were drawn is not known."""
        shuffle = cls(count, 0, 0)
        shuffle.tables, shuffle._drawn_by = tables, None
        return shuffle

    def __len__(self) -> int:
        return self.count

    @property
    def entropy(self) -> list[int] | None:
        """Seed and epoch in ENTROPY_WORDS words of 32 bits, as numpy.random.SeedSequence sees them;
        None where they are not known, or do not fit.
        """
        words: list[int] = []
        for number in self._drawn_by or ():
            words += [number >> at & 0xFFFFFFFF for at in range(0, max(1, number.bit_length()), 32)]
        missing = ENTROPY_WORDS - len(words)
        return words + [0] * missing if words and missing >= 0 else None

    @cached_property
    def tables(self) -> Array:
        """The rounds' functions: (ROUNDS, 2^half) numbers below 2^half, uint16.

        They are the highest bits of each 16 that NumPy's PCG64 gives, seeded by seed and epoch.
        """
        shape = ROUNDS, 1 << self.half
        assert self._drawn_by is not None  # or tables would have been given
        words = np.random.PCG64(self._drawn_by).random_raw(ceil_div(math.prod(shape), 4))
        halves: Array = words.astype("<u8", copy=False).view("<u2")[: math.prod(shape)]
        return (halves >> (16 - self.half)).reshape(shape)

    def indices(self) -> Array:
        """The whole permutation: (count,) integers."""
        tables = self.tables.astype(np.intp)  # the type of indices, so that no step converts them
        order: Array = self._through(tables, np.arange(self.count))
        while len(again := np.flatnonzero(order >= self.count)):
            order[again] = self._through(tables, order[again])
        return order

    def _through(self, tables: Array, numbers: Array) -> Array:
        left, right = numbers >> self.half, numbers & ((1 << self.half) - 1)
        mixed = np.empty_like(left)
        for table in tables:
            # mode="clip" writes straight into `mixed`, in half the time of table[right]
            table.take(right, out=mixed, mode="clip")
            left ^= mixed
            left, right = right, left
        return left << self.half | right


def half_of(count: int) -> int:
    """Half of the bits of the numbers that the network permutes, for a permutation of so many."""
    return max(1, math.ceil((count - 1).bit_length() / 2))
