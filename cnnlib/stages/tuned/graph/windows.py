"""A convolution as the products of plan `graph` see it: positions, and what each of them sees."""

import math
from typing import NamedTuple

from cnnlib.arithmetic import ceil_div
from cnnlib.layers.pairs import Pair

EIGHT = 8
"""Numbers of a vector: neighbouring channels, maps or terms."""
UNFOLDING = 1.5
"""How many times as many products as terms a layer may cost before it is unfolded instead."""
BANK_ROWS = 64
"""Rows of a tile by which the distance of a patch's rows is chosen."""


class Windows(NamedTuple):
    """A convolution as its products see it: what its positions are, and what each of them sees."""

    channels: int
    kernel: Pair
    step: Pair
    """Rows and columns of the map from one position to the next."""
    map: Pair
    """Rows and columns, padding included."""
    cells: Pair
    """Windows of the subsampling."""
    window: Pair
    """Positions of such a window."""

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def positions(self) -> int:
        """Positions of an image."""
        return math.prod(self.cells) * math.prod(self.window)

    def used(self, rows: int) -> int:
        """Positions that a tile of `rows` rows has: whole windows."""
        area = math.prod(self.window)
        return rows // area * area

    def patch(self, rows: int) -> Pair:
        """Rows and columns of what the positions of a tile see."""
        return self.patch_rows(rows), self.patch_columns(rows)

    def patch_rows(self, rows: int) -> int:
        """Rows of the map that the positions of any tile see, from the first to the last.

        Images lie below each other, and a tile may reach from one into the next.
        """
        cells, each = math.prod(self.cells), self.used(rows) // math.prod(self.window)
        reach = (self.window[0] - 1) * self.step[0] + self.kernel[0]
        starts = range(0, cells, math.gcd(each, cells))
        return max(self._top(start + each - 1) - self._top(start) for start in starts) + reach

    def patch_columns(self, rows: int) -> int:
        """Pixels from a row of a patch to the next, so that few loads meet in a bank.

        Eight neighbouring rows of a product are loaded together, of 16 bytes each: they take one
        turn if their pixels differ modulo eight.
        """
        used = self.used(min(rows, BANK_ROWS))
        places = [self._place(position) for position in range(used // EIGHT * EIGHT)]

        def turns(pitch: int) -> int:
            banks = [(row * pitch + column) % EIGHT for row, column in places]
            eights = (banks[i : i + EIGHT] for i in range(0, len(banks), EIGHT))
            return sum(max(map(eight.count, eight)) for eight in eights)

        width = self.map[1]
        return min(range(width, width + EIGHT), key=turns)

    def _place(self, position: int) -> Pair:
        """The row, over all images, and the column where a position's window of the map begins."""
        cell, element = divmod(position, math.prod(self.window))
        row, column = divmod(element, self.window[1])
        left = cell % self.cells[1] * self.window[1] + column
        return self._top(cell) + row * self.step[0], left * self.step[1]

    def _top(self, cell: int) -> int:
        """The row, over all images, where a window begins."""
        image, own = divmod(cell, math.prod(self.cells))
        return image * self.map[0] + own // self.cells[1] * self.window[0] * self.step[0]

    def unfolded(self) -> "Windows":
        """The same product with a kernel of 1x1, whose channels are the terms."""
        return self._replace(channels=self.channels * self.taps, kernel=(1, 1))

    @property
    def groups(self) -> int:
        """Groups of eight channels."""
        return ceil_div(self.channels, EIGHT)

    @property
    def costs_too_much(self) -> bool:
        """Whether the channels that fill up vectors cost more products than unfolding saves."""
        even = ceil_div(self.channels, 2 * EIGHT) * self.taps
        terms = ceil_div(self.channels * self.taps, 2 * EIGHT)
        return even > UNFOLDING * terms
