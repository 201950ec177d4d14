"""Which part of a product one block makes, by the sizes of a layer, of a batch and of a device.

The kernels (kernels/tuned/graph/) take these numbers as constants, and assert that they fit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Limits
from cnnlib.layers.pairs import Pair
from cnnlib.stages.tuned.graph.windows import EIGHT, Windows

WARPS = 8
"""Warps of a block."""
SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    8: ((128, 8, 8),),
    16: ((128, 16, 8), (64, 16, 4), (32, 16, 2), (16, 16, 1)),
    32: ((256, 32, 8), (128, 32, 4), (64, 32, 4), (32, 32, 2), (16, 32, 1)),
    64: ((128, 64, 4), (64, 64, 2), (64, 32, 4), (32, 32, 2)),
}
"""Columns that a tile has at most -> its (rows, columns, warps along the rows), largest first.

Each warp makes 32x32, 32x16, 16x16, 16x8 or 32x64: the larger, the fewer loads for a product.
"""
MORE_SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    32: ((192, 32, 4), (160, 32, 2), (96, 32, 2)),
    64: ((160, 64, 2), (96, 64, 2)),
}
"""Shapes between those, where tiles are chosen by how two blocks overlap: for numbers of tiles that
would leave multiprocessors without a second or third one.
"""
SPLITS = (1, 2, 4, 8, 16, 32)
"""Blocks that may share one tile's terms; the last one to come adds as many sums."""
PRODUCTS = 8 * 3 / 1365
"""Cycles of a group of channels for each element: three products at what mma.sync was measured to
make on an H100, of all warps."""
STAGING = 0.8
"""Cycles of a vector that is staged: some 100 instructions of a warp for 32 of them, on four
schedulers. A count of the compiled kernels."""
LOADING = 2 * 4 / 16 / 2
"""Cycles in which a warp loads a group of one row or one column. There are two planes, and shared
memory gives 16 rows of two groups of a plane in four turns."""
CONFLICT = 1.15
"""How much longer than their work two blocks take together that have no waits. An estimate."""
ENDING = 0.25
"""Cycles of an element at the end of a tile: some 30 instructions, counted likewise."""
ADDING = 4 / 60
"""Cycles of a float out of the second-level cache, as one block was measured to read it."""
LATENCY = 1000
"""Cycles for which a block waits for what it stages, and again at the end. An estimate."""
TAPS_AT_ONCE = 9
"""Taps of a kernel whose weights are staged together at most; else those of one of its rows."""
BLOCKS = 2
"""Blocks of a multiprocessor, for which the kernels have registers."""
MANY_TILES = 4
"""Tiles of a block from which on it stages all weights once, and not with each of them."""
FEW_VECTORS = 96
"""Rows and columns up to which twice as many channels are staged at a time."""
TWO_BLOCKS = 100 * 1024
"""Shared memory from which on two blocks are to fit a multiprocessor, one staging for the other."""
RESERVED = 1024
"""Shared memory that the hardware takes of each block's."""
GRADIENT_POSITIONS = (128, 64, 32, 16)
"""Positions that a chunk of a gradient's sum has; the first that fit are taken."""
GRADIENT_WAVES = 2
"""Blocks for each multiprocessor that sum a gradient, if there is so much to sum."""
MOST_PARTIAL_BYTES = 4 * 2**20
"""Partial sums of a gradient, beyond one, that a layer may leave where each is short: all are
written and read again."""
LONG = 8
"""Chunks of a partial sum that is not short."""


@dataclass(frozen=True)
class ProductTile:
    """A tile of the product forward or of the product backward."""

    rows: int
    columns: int
    warps_high: int
    chunk: int
    """Groups of channels that are staged at a time."""
    tap_rows: int
    """Rows of the kernel whose weights are staged at a time."""
    unfold: bool
    patch: Pair
    """Rows and columns of what the positions see; (0, 0) where they are unfolded."""
    splits: int
    """Blocks that share the terms of one tile."""
    keeps_weights: bool
    """Whether a block stages all weights once, for all of its tiles."""
    tiles: int
    """Tiles of a whole batch."""
    shared_bytes: int

    def constants(self, product: str) -> dict[str, int]:
        """The constants of the kernels, whose names begin with the product's."""
        return {
            f"{product}_M": self.rows,
            f"{product}_N": self.columns,
            f"{product}_WARPS_M": self.warps_high,
            f"{product}_CHUNK": self.chunk,
            f"{product}_TAP_ROWS": self.tap_rows,
            f"{product}_UNFOLD": int(self.unfold),
            f"{product}_PATCH_ROWS": self.patch[0],
            f"{product}_PATCH_COLUMNS": self.patch[1],
            f"{product}_SPLITS": self.splits,
            f"{product}_KEEPS_WEIGHTS": int(self.keeps_weights),
        }

    def chunks(self, windows: Windows) -> int:
        """Parts in which all channels are staged."""
        return ceil_div((windows.unfolded() if self.unfold else windows).groups, self.chunk)

    def weight_vectors(self, windows: Windows) -> int:
        """Vectors of the weights of a tile's columns."""
        seen = windows.unfolded() if self.unfold else windows
        taps = self.tap_rows * seen.kernel[1]
        parts = self.chunks(windows) * seen.kernel[0] // self.tap_rows
        return parts * weight_vectors(taps, self.chunk, self.columns)

    @property
    def jobs(self) -> int:
        """Parts of the product that blocks can have at once."""
        return self.tiles * self.splits

    @property
    def partial_size(self) -> int:
        """Floats of the sums that blocks leave for each other."""
        return self.jobs * self.rows * self.columns if self.splits > 1 else 1


def product_tile(
    windows: Windows,
    columns: int,
    batch: int,
    limits: Limits,
    vector_bytes: int,
    smallest: bool,
    overlapping: bool,
) -> ProductTile | None:
    """The tile with which the busiest multiprocessor has least to do; None if none fits.

    `overlapping`: two blocks of a multiprocessor, where it has room for two, are taken to hide each
    other's waits, and there are more shapes to choose from.
    """
    overlapping = overlapping and limits.shared_bytes >= TWO_BLOCKS
    widest = next((width for width in SHAPES if columns <= width), max(SHAPES))
    found: list[ProductTile] = []
    more = MORE_SHAPES.get(widest, ()) if overlapping else ()
    for shape in SHAPES[widest] + more:
        if windows.used(shape[0]) == 0:
            continue
        fitting = (
            tile
            for tile in _tiles(windows, shape, columns, batch, vector_bytes)
            if tile.shared_bytes <= room(limits)
        )
        if (tile := next(fitting, None)) is not None:
            found += _split(tile, windows, limits)
    if not found:
        return None
    if smallest:
        return min(found, key=lambda tile: (tile.rows * tile.columns, -tile.splits))
    if overlapping:
        kept = (_keeping(tile, windows, columns, limits, vector_bytes) for tile in found)
        return min(kept, key=lambda tile: _overlapping_cycles(tile, windows, limits))
    best = min(found, key=lambda tile: _cycles(tile, windows, limits))
    return _keeping(best, windows, columns, limits, vector_bytes)


def _keeping(
    tile: ProductTile, windows: Windows, columns: int, limits: Limits, vector_bytes: int
) -> ProductTile:
    """The tile with all weights kept in shared memory, if they fit and a block has many tiles."""
    few = tile.tiles < MANY_TILES * BLOCKS * limits.multiprocessors
    if few or columns > tile.columns or tile.splits > 1:
        return tile
    pixels = (tile.rows if tile.unfold else math.prod(tile.patch)) | 1
    weights = tile.weight_vectors(windows) * vector_bytes
    sums = tile.columns * (tile.rows + 4) * 4
    shared = tile.rows * 4 + max(tile.chunk * pixels * vector_bytes, sums) + weights
    if shared > room(limits):
        return tile
    return replace(tile, keeps_weights=True, shared_bytes=shared)


def _split(tile: ProductTile, windows: Windows, limits: Limits) -> Iterator[ProductTile]:
    """The tile with its terms for one block, and for more where there are multiprocessors left."""
    chunks = tile.chunks(windows)
    # the same number of chunks for each of them, but for the last one
    for splits in sorted({ceil_div(chunks, ceil_div(chunks, wanted)) for wanted in SPLITS}):
        if splits == 1 or tile.tiles * splits <= 2 * limits.multiprocessors:
            yield replace(tile, splits=splits)


def _cycles(tile: ProductTile, windows: Windows, limits: Limits) -> float:
    """A rough count of the cycles that the busiest multiprocessor takes for its tiles.

    Tensor cores multiply while other warps stage what comes next; a block alone does one after the
    other.
    """
    seen = windows.unfolded() if tile.unfold else windows
    chunks = ceil_div(tile.chunks(windows), tile.splits)
    pixels = tile.rows if tile.unfold else math.prod(tile.patch)
    products = PRODUCTS * tile.chunk * seen.taps * tile.rows * tile.columns
    staging = STAGING * tile.chunk * (pixels + seen.taps * tile.columns)
    each = chunks * (products + staging + LATENCY) + ENDING * tile.rows * tile.columns + LATENCY
    if tile.splits > 1:
        each += 2 * LATENCY + ADDING * tile.splits * tile.rows * tile.columns
    waiting = chunks * (staging + LATENCY) / 2
    blocks = ceil_div(tile.jobs, limits.multiprocessors)
    return each + (blocks - 1) * (each - waiting)


def _overlapping_cycles(tile: ProductTile, windows: Windows, limits: Limits) -> float:
    """The same where two blocks of a multiprocessor hide each other's waits.

    Shared memory is counted too: a warp loads its rows and columns for every tap.
    """
    seen = windows.unfolded() if tile.unfold else windows
    chunks = ceil_div(tile.chunks(windows), tile.splits)
    pixels = tile.rows if tile.unfold else math.prod(tile.patch)
    wide = min(WARPS // tile.warps_high, tile.columns // EIGHT)
    loads = tile.rows * wide + tile.columns * tile.warps_high
    multiplied = max(PRODUCTS * tile.rows * tile.columns, LOADING * loads) * seen.taps
    weights = 0 if tile.keeps_weights else seen.taps * tile.columns
    staged = STAGING * (pixels + weights)
    busy = chunks * tile.chunk * (multiplied + staged) + ENDING * tile.rows * tile.columns
    waits = chunks * seen.kernel[0] // tile.tap_rows + 2
    if tile.splits > 1:
        waits += 2
        busy += ADDING * tile.splits * tile.rows * tile.columns
    alone = busy + waits * LATENCY
    two = max(alone, CONFLICT * BLOCKS * busy)
    rounds, rest = divmod(ceil_div(tile.jobs, limits.multiprocessors), BLOCKS)
    return rounds * two + rest * alone


def weight_pitches(taps: int, chunk: int, columns: int) -> tuple[int, int]:
    """Vectors of staged weights from a group of channels to the next, and from a tap to the next.

    Eight neighbouring threads stage neighbouring taps, and then the next column, or, where there is
    one tap, neighbouring groups. Each vector has 16 bytes, a multiple of 8 of them lies in the
    same banks, and the square of an odd number is one more than such a multiple.
    """
    if taps == 1:
        pitch = columns + (EIGHT // chunk if chunk <= 4 else 1)
        return pitch, chunk * pitch
    more = taps % EIGHT if taps % 2 else EIGHT // taps if taps <= 4 else 1
    return columns, chunk * columns + more


def weight_vectors(taps: int, chunk: int, columns: int) -> int:
    """Vectors of the weights that are staged together."""
    return taps * weight_pitches(taps, chunk, columns)[1]


def room(limits: Limits) -> int:
    """Shared memory that a block may take."""
    if limits.shared_bytes < TWO_BLOCKS:
        return limits.shared_bytes
    return limits.shared_bytes // 2 - RESERVED


def _tiles(
    windows: Windows, shape: tuple[int, int, int], columns: int, batch: int, vector_bytes: int
) -> Iterator[ProductTile]:
    """Ways to make tiles of a shape, the better ones first; the last one needs little memory."""
    rows, width, warps_high = shape
    tiles = ceil_div(batch * windows.positions, windows.used(rows)) * ceil_div(columns, width)
    whole = windows.kernel[0] if windows.taps <= TAPS_AT_ONCE else 1
    many = 8 if rows + width > FEW_VECTORS else 16
    unfolded = [(True, 1, many), (True, 1, 2)]
    few = many if windows.taps == 1 else 2
    ways = [(False, whole, few), (False, 1, few), *unfolded]
    for unfold, tap_rows, most in unfolded if windows.costs_too_much else ways:
        seen = windows.unfolded() if unfold else windows
        chunk = min(most, ceil_div(seen.groups, 2) * 2)
        patch = (0, 0) if unfold else windows.patch(rows)
        pixels = (rows if unfold else math.prod(patch)) | 1
        vectors = chunk * pixels + weight_vectors(tap_rows * seen.kernel[1], chunk, width)
        shared = rows * 4 + max(vectors * vector_bytes, width * (rows + 4) * 4)
        yield ProductTile(
            rows, width, warps_high, chunk, tap_rows, unfold, patch, 1, False, tiles, shared
        )


@dataclass(frozen=True)
class GradientTile:
    """A tile of the weight gradient, and how the sum over positions is cut."""

    maps: int
    warps_high: int
    groups: int
    """Groups of eight channels."""
    positions: int
    """Terms that are staged at a time."""
    unfold: bool
    patch: Pair
    """Rows and columns of what the positions see; (0, 0) where they are unfolded."""
    tiles: int
    """Tiles of the whole gradient."""
    partial_sums: int
    shared_bytes: int

    def constants(self) -> dict[str, int]:
        """The constants of the kernel."""
        return {
            "GRADIENT_M": self.maps,
            "GRADIENT_WARPS_M": self.warps_high,
            "GRADIENT_GROUPS": self.groups,
            "GRADIENT_POSITIONS": self.positions,
            "GRADIENT_UNFOLD": int(self.unfold),
            "GRADIENT_PATCH_ROWS": self.patch[0],
            "GRADIENT_PATCH_COLUMNS": self.patch[1],
        }


def gradient_tile(
    windows: Windows, maps: int, batch: int, limits: Limits, vector_bytes: int
) -> GradientTile | None:
    """The tile of a layer's weight gradient; None if none fits."""
    height = 64 if maps > 32 else 32 if maps > 16 else 16
    warps_high = 1 if height == 16 else 2
    # Tiles of 16x8 that a warp sums: twice 40 registers in two arithmetics.
    most = WARPS // warps_high * (5 if height != 32 else 10)
    unfold_first = windows.costs_too_much or windows.taps + 1 > most
    for unfold in [True] if unfold_first else [False, True]:
        seen = windows.unfolded() if unfold else windows
        groups = min(seen.groups, (most - 1) // seen.taps)
        wide = ceil_div(seen.groups, groups)
        groups = ceil_div(seen.groups, wide)
        for positions in GRADIENT_POSITIONS:
            if windows.used(positions) == 0 or positions >= 2 * max(16, batch * windows.positions):
                continue
            patch = (0, 0) if unfold else windows.patch(positions)
            pixels = (positions if unfold else math.prod(patch)) | 1
            vectors = height // EIGHT * (positions + 1) + (groups + 1) * pixels
            sums = 0 if seen.taps == 1 else height * (groups * EIGHT * seen.taps + 1) * 4
            shared = positions * 4 + max(vectors * vector_bytes, sums)
            if shared > room(limits):
                continue
            tiles = wide * ceil_div(maps, height)
            chunks = ceil_div(batch * windows.positions, windows.used(positions))
            size = 4 * maps * (windows.channels * windows.taps + 1)
            sums = max(1, GRADIENT_WAVES * limits.multiprocessors // tiles)
            if chunks < LONG * sums:
                sums = max(1, min(chunks, sums, MOST_PARTIAL_BYTES // size))
            return GradientTile(
                height, warps_high, groups, positions, unfold, patch, tiles, sums, shared
            )
    return None
