"""The order in which an epoch visits images: a permutation that host and device draw alike."""

import math

import numpy as np

from cnnlib.layers import Array

ROUNDS = 6
"""Luby and Rackoff (1988): with random functions in its rounds, four make a Feistel network a
permutation that cannot be told from a random one by asking for a few of its values.
"""


class Shuffle:
    """A random permutation of range(count) of which any element can be computed by itself.

    A Feistel network over the numbers of 2 `half` bits whose round functions are tables of random
    numbers; what comes out too large goes through it again, as often as it takes (Black and
    Rogaway's cycle walking, 2002). kernels/shuffle.cuh does the same on a device.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self.count = count
        self.half = max(1, math.ceil((count - 1).bit_length() / 2))
        random = np.random.default_rng((seed, epoch))
        self.tables: Array = random.integers(
            0, 1 << self.half, (ROUNDS, 1 << self.half), dtype=np.uint16
        )
        """(ROUNDS, 2^half) numbers below 2^half."""

    def __len__(self) -> int:
        return self.count

    def indices(self) -> Array:
        """All of it: (count,) integers."""
        tables = self.tables.astype(np.intp)  # what indices are made of need not be converted
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
