"""How the warps of a team share a convolution's three products: the cheapest by an estimate.

Forward multiplies (positions, terms) by (terms, maps), the gradient of the weights
(terms, positions) by (positions, maps); a term is a (channel, i, j). Both are made of tiles of 16
by 8 numbers (kernels/tensor.cuh), and a warp makes several tiles side by side. The errors of the
source go back row by row, without tensor cores.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cnnlib.arithmetic import ceil_div
from cnnlib.device.architecture import H100, LANES, TENSOR_CORES, Architecture

MAX_SUMS = 32
"""Registers that a thread may spend on its share of a gradient, and on sums forward.

Chosen by hand so that nothing is spilled at 255 registers a thread (ptxas -v).
"""
MAX_SUMS_OF_SMALL_BLOCK = 64
"""Registers for a gradient in blocks of at most SMALL_BLOCK threads, where MAX_SUMS do not do."""
SMALL_BLOCK = 256
"""Threads with which each may have 255 registers."""
MAX_SCRATCH = 7168
"""Floats of shared memory for sums that several warps or threads share; chosen by hand."""
MAX_M_TILES = 8
"""Tiles of positions that a warp makes together, at most."""
LANE_SUMS = 4
"""Numbers of a tile that each lane of a warp has."""
SHORT_ROW = 32
"""Columns of a row that fits a thread's registers: SHORT_ROWS of kernels/tuned/conv.cuh."""


@dataclass(frozen=True)
class ConvShape:
    """The sizes of a convolution that its schedule depends on."""

    channels: int
    height: int
    width: int
    maps: int
    kernel: int
    rows: int
    columns: int
    takes_bytes: bool
    """Whether the source is bytes, multiplied as BF16 (kernels/tuned/byte_conv.cuh)."""
    bordered: bool = False
    """Whether height and width are those of bytes within a border of zeros."""

    @property
    def area(self) -> int:
        """Positions of a map."""
        return self.rows * self.columns

    @property
    def terms(self) -> int:
        """Terms of a sum."""
        return self.channels * self.kernel**2

    @property
    def source_size(self) -> int:
        return self.channels * self.height * self.width

    @property
    def term_pairs(self) -> int:
        """Pairs of neighbouring weights of a map; a row's last may be half empty."""
        return self.channels * self.kernel * ceil_div(self.kernel, 2)

    @property
    def n_tiles(self) -> int:
        """Tiles of eight maps."""
        return ceil_div(self.maps, 8)

    @property
    def forward_k_tiles(self) -> int:
        """Tiles that a sum over all terms takes: of 8 floats, or of 8 pairs of bytes."""
        return ceil_div(self.term_pairs if self.takes_bytes else self.terms, 8)

    @property
    def weights_k_tiles(self) -> int:
        """Tiles that a sum over all positions takes: of 8 floats, or of 16 bytes."""
        return ceil_div(self.area, 16 if self.takes_bytes else 8)

    @property
    def gradient_terms(self) -> int:
        """Terms of the gradient. The bias is one too; and where bytes have a border, so is the sum
        of the deltas that a place of the kernel meets within it.
        """
        return self.terms + 1 + (self.kernel**2 if self.takes_bytes and self.bordered else 0)

    @property
    def term_tiles(self) -> int:
        """Tiles of 16 terms of the gradient."""
        return ceil_div(self.gradient_terms, 16)

    @property
    def full_pitch(self) -> int:
        """Floats from a map of sums to the next one: an odd multiple of four, so that the maps of
        a tile lie in different banks, and room for whole tiles of positions.
        """
        return ceil_div(ceil_div(self.area, 8) * 8 - 4, 16) * 16 + 4

    @property
    def forward_sums(self) -> int:
        """Registers of a thread for the sums of one tile of positions, all maps."""
        return self.n_tiles * LANE_SUMS

    def gradient_sums(self, warps: int) -> int:
        """Registers of a thread's share of the weights' gradient where `warps` share it."""
        return ceil_div(self.term_tiles, warps) * self.n_tiles * LANE_SUMS


@dataclass(frozen=True)
class ConvCost:
    """Estimated cycles of the parts of a convolution; only their order matters.

    Every coefficient says where it comes from. None is fitted to measurements.
    """

    architecture: Architecture = H100
    split_cycles: int = 20
    """Cycles for each warp that shares the positions of a gradient and so stages sums that have to
    be added. Set by eye, so that no split is taken which saves no round of products.
    """
    share_cycles: float = 1 / 16
    """Cycles for each thread that shares a row's maps. Set by eye: of equals, fewer threads win."""

    @property
    def row_instructions(self) -> int:
        """Instructions of a warp for a tile of the left side.

        Sixteen are counted in mma_3xtf32 of kernels/tensor.cuh: four loads, and four numbers that
        are split by three instructions each. Without tensor cores there are eight loads. Four for
        addresses are an estimate.
        """
        return 20 if self.architecture.has(TENSOR_CORES) else 12

    @property
    def column_instructions(self) -> int:
        """Instructions for a tile of the right side, counted likewise: two loads, and two numbers
        that are split by three instructions each; or eight loads.
        """
        return 8

    @property
    def pair_instructions(self) -> int:
        """Instructions for each pair of tiles: the three products of 3xTF32, or a multiply-add of
        each lane for four numbers and eight terms.
        """
        return 3 if self.architecture.has(TENSOR_CORES) else 32

    def product(self, warps: int, m_tiles: int, n_tiles: int) -> int:
        """A product of `m_tiles` by `n_tiles` tiles by each of `warps`: as long as a scheduler
        takes to issue it for all its warps, or as one warp waits.
        """
        instructions = (
            self.row_instructions * m_tiles
            + self.column_instructions * n_tiles
            + self.pair_instructions * m_tiles * n_tiles
        )
        issued = ceil_div(warps, self.architecture.schedulers) * instructions
        return max(issued, instructions + self.architecture.product_latency)

    def forward(self, conv: ConvShape, warps: int, m_tiles: int, split_k: int) -> float:
        """Forward, where a warp makes `m_tiles` tiles and `split_k` warps share a sum; inf where
        registers or shared memory do not do.
        """
        scratch = split_k * conv.maps * conv.full_pitch
        if m_tiles * conv.forward_sums > MAX_SUMS or split_k > conv.forward_k_tiles:
            return math.inf
        if split_k > 1 and (conv.takes_bytes or scratch > MAX_SCRATCH):
            return math.inf
        tasks = ceil_div(ceil_div(conv.area, 16), m_tiles) * split_k
        rounds = ceil_div(tasks, warps) * ceil_div(conv.forward_k_tiles, split_k)
        cycles = rounds * self.product(min(tasks, warps), m_tiles, conv.n_tiles)
        if conv.takes_bytes:
            return cycles
        # every lane of the multiprocessor adds up one share of a sum a cycle
        lanes = self.architecture.schedulers * LANES
        return cycles + split_k * conv.maps * conv.area / lanes

    def weights(self, conv: ConvShape, limit: int, warps: int, split_k: int) -> float:
        """The gradient of the weights, where `warps` share its terms and `split_k` the positions;
        inf where a thread had more than `limit` registers of it.
        """
        if conv.gradient_sums(warps) > limit or split_k > conv.weights_k_tiles:
            return math.inf
        own = ceil_div(conv.term_tiles, warps)
        rounds = ceil_div(conv.weights_k_tiles, split_k)
        return rounds * self.product(warps * split_k, own, conv.n_tiles) + (
            self.split_cycles * split_k
        )

    def data(self, conv: ConvShape, split_k: int) -> float:
        """Rounds of errors sent back by rows, where `split_k` threads share a row's maps."""
        short = conv.columns <= SHORT_ROW and conv.width <= SHORT_ROW
        if not short or split_k * data_pitch(conv) > MAX_SCRATCH:
            return split_k * 1e9
        warps = conv.height * ceil_div(conv.channels * split_k, LANES)
        rounds = ceil_div(warps, self.architecture.schedulers) * ceil_div(conv.maps, split_k)
        return rounds + split_k * self.share_cycles


def data_pitch(conv: ConvShape) -> int:
    """Floats from the source errors that one thread of a row found to those of the next."""
    return conv.source_size + 8


@dataclass(frozen=True)
class ConvSchedule:
    """How the warps of a team share a convolution's products."""

    forward_m_tiles: int
    """Tiles of 16 positions that a warp makes together."""
    forward_split_k: int
    """Warps that share the terms of one sum."""
    weights_warps: int
    """Warps that share the terms of the gradient."""
    weights_split_k: int
    """Warps that share the positions which it is summed over."""
    data_split_k: int
    """Threads that share the maps of one row of source errors."""

    @classmethod
    def cheapest(
        cls, conv: ConvShape, warps: int, gradient_limit: int, cost: ConvCost
    ) -> "ConvSchedule":
        """That of the least cost for a team of `warps`, whose threads have `gradient_limit`
        registers for the gradient. The first of equals in the order of its numbers.
        """
        forward = itertools.product(range(1, MAX_M_TILES + 1), range(1, warps + 1))
        weights = (
            (sharing, split)
            for sharing in range(1, warps + 1)
            for split in range(1, warps // sharing + 1)
        )
        return cls(
            *_best(forward, lambda m_tiles, split: cost.forward(conv, warps, m_tiles, split)),
            *_best(
                weights, lambda sharing, split: cost.weights(conv, gradient_limit, sharing, split)
            ),
            min(range(1, conv.maps + 1), key=lambda split: cost.data(conv, split)),
        )


def _best(choices: Iterable[tuple[int, int]], cost: Callable[[int, int], float]) -> tuple[int, int]:
    return min(choices, key=lambda choice: (cost(*choice), choice))


def most_sums(block: int) -> int:
    """Registers that a thread of a block of `block` threads may spend on a gradient, at most."""
    return MAX_SUMS_OF_SMALL_BLOCK if block <= SMALL_BLOCK else MAX_SUMS


def gradient_limit(conv: ConvShape, block: int, warps: int) -> int:
    """Registers that a thread of a block of `block` threads may spend on a convolution's gradient,
    which `warps` can share.
    """
    return MAX_SUMS if conv.gradient_sums(warps) <= MAX_SUMS else most_sums(block)
