"""The order in which an epoch visits images: one permutation, computed alike on host and device."""

import math

import numpy as np

from cnnlib.layers import Array

ROUNDS = 6
"""Rounds of the Feistel network. By Luby and Rackoff (1988) four rounds of random functions already
make a permutation that a few of its values do not distinguish from a random one.
"""


class Shuffle:
    """A random permutation of range(count); each element can be computed by itself.

    A Feistel network over the numbers of 2 `half` bits whose round functions are tables of random
    numbers. A result outside the range goes through the network again, until it lies within it
    (Black and Rogaway's cycle walking, 2002). kernels/shuffle.cuh computes the same on a device.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self.count = count
        self.half = max(1, math.ceil((count - 1).bit_length() / 2))
        random = np.random.default_rng((seed, epoch))
        self.tables: Array = random.integers(
            0, 1 << self.half, (ROUNDS, 1 << self.half), dtype=np.uint16
        )
        """The rounds' functions: (ROUNDS, 2^half) numbers below 2^half."""

    def __len__(self) -> int:
        return self.count

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
