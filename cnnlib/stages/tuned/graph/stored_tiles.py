"""Tiles of products whose sides are copied into shared memory while the ones before are multiplied.

The kernels (kernels/tuned/graph/stored.cuh) take these numbers as constants.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Limits
from cnnlib.stages.tuned.graph.tiles import (
    ADDING,
    BLOCKS,
    ENDING,
    LATENCY,
    LONG,
    MOST_PARTIAL_BYTES,
    PRODUCTS,
    SPLITS,
    TAPS_AT_ONCE,
    WARPS,
    GradientTile,
    ProductTile,
    room,
    weight_vectors,
)
from cnnlib.stages.tuned.graph.windows import EIGHT, Windows

SHAPES: dict[int, tuple[tuple[int, int, int], ...]] = {
    8: ((128, 8, 8),),
    16: ((128, 16, 8), (64, 16, 4), (32, 16, 2)),
    32: ((256, 32, 8), (128, 32, 4), (64, 32, 4), (32, 32, 2)),
    64: ((128, 64, 4), (96, 64, 2), (64, 64, 2), (64, 32, 4), (32, 32, 2)),
}
"""Columns that a tile has at most -> its (rows, columns, warps along the rows)."""
COPYING = 1 / 24
"""Cycles of a byte that is copied from the second-level cache, where all multiprocessors copy;
measured on an H100 as 1/31 for sources of their own and 1/62 for one of all."""
WAVEFRONTS = 4 / 16
"""Cycles in which a warp loads a row or a column of a group of channels: two planes, of each of
which an `ldmatrix.x4` loads 16 rows of two groups in four turns."""
ROUND = 300
"""Cycles between two rounds: barriers, and the first loads. An estimate."""
CHUNK_POSITIONS = 96
"""Positions of a chunk by which it is judged whether a gradient's sum is long."""
GRADIENT_JOBS = 2
"""Jobs of a gradient for each multiprocessor."""


def stored_tile(
    windows: Windows,
    columns: int,
    batch: int,
    limits: Limits,
    vector_bytes: int,
    pitch: int,
    smallest: bool,
) -> ProductTile | None:
    """The tile of a product with which a device is done first; None if none fits.

    `pitch`: vectors from a row of the maps in memory to the next.
    """
    widest = next((width for width in SHAPES if columns <= width), max(SHAPES))
    found = [
        tile
        for shape in SHAPES[widest]
        if windows.used(shape[0])
        for tile in _tiles(windows, shape, columns, batch, vector_bytes, pitch, limits)
    ]
    if not found:
        return None
    if smallest:
        return min(found, key=lambda tile: (tile.rows * tile.columns, -tile.splits))
    return min(found, key=lambda tile: _cycles(tile, windows, limits, vector_bytes))


def _tiles(
    windows: Windows,
    shape: tuple[int, int, int],
    columns: int,
    batch: int,
    vector_bytes: int,
    pitch: int,
    limits: Limits,
) -> Iterator[ProductTile]:
    """The tiles of a shape that fit, with chunks of several sizes."""
    rows, width, high = shape
    tiles = ceil_div(batch * windows.positions, windows.used(rows)) * ceil_div(columns, width)
    patch = windows.patch_rows(rows), pitch
    sums = width * (rows + 4) * 4
    taps_at_once = {windows.kernel[0] if windows.taps <= TAPS_AT_ONCE else 1, 1}
    for tap_rows in sorted(taps_at_once, reverse=True):
        for chunk in (4, 2) if windows.taps > 1 else (16, 8, 4, 2):
            if chunk > 2 and windows.groups % chunk:
                continue
            pixels, taps = math.prod(patch) | 1, tap_rows * windows.kernel[1]
            vectors = chunk * pixels + weight_vectors(taps, chunk, width)
            shared = 2 * (rows * 4 + max(vectors * vector_bytes, sums))
            if shared > room(limits):
                continue
            one = ProductTile(
                rows, width, high, chunk, tap_rows, False, patch, 1, False, tiles, shared
            )
            chunks = one.chunks(windows)
            for splits in sorted({ceil_div(chunks, ceil_div(chunks, n)) for n in SPLITS}):
                if splits == 1 or tiles * splits <= BLOCKS * limits.multiprocessors:
                    yield replace(one, splits=splits)


def multiplying(rows: int, columns: int, warp_rows: int, warp_columns: int) -> float:
    """Cycles of a multiprocessor for a group of channels: its tensor cores', or those of loads."""
    warps = rows * columns / warp_rows / warp_columns
    loads = WAVEFRONTS * (warp_rows + warp_columns) * warps
    return max(PRODUCTS * rows * columns, loads)


def _cycles(tile: ProductTile, windows: Windows, limits: Limits, vector_bytes: int) -> float:
    """Cycles until the busiest multiprocessor is done; two blocks share it."""
    wide = max(1, min(WARPS // tile.warps_high, tile.columns // EIGHT))
    chunks = ceil_div(tile.chunks(windows), tile.splits)
    parts = windows.kernel[0] // tile.tap_rows
    taps = windows.taps
    step = multiplying(tile.rows, tile.columns, tile.rows // tile.warps_high, tile.columns // wide)
    multiplied = chunks * taps * tile.chunk * step
    seen = math.prod(tile.patch) * parts + taps * (tile.columns + 1)
    copied = COPYING * chunks * tile.chunk * seen * vector_bytes
    busy = 1.15 * max(multiplied, copied) + ENDING * tile.rows * tile.columns
    waiting: float = 2 * LATENCY + chunks * parts * ROUND
    if tile.splits > 1:
        waiting += 2 * LATENCY + ADDING * tile.splits * tile.rows * tile.columns
    jobs = ceil_div(tile.jobs, limits.multiprocessors)
    return max(jobs * busy, ceil_div(jobs, BLOCKS) * (busy + waiting)) + (busy + waiting) / 4


def stored_gradient_tile(
    windows: Windows,
    errors: Windows,
    maps: int,
    batch: int,
    limits: Limits,
    vector_bytes: int,
    pitches: tuple[int, int],
) -> GradientTile | None:
    """The tile of a weight gradient; None if none fits.

    `windows` and `errors` are what positions, row by row, see of the source and of the errors;
    `pitches` the vectors from a row to the next in memory, of both.
    """
    height = 64 if maps > 32 else 32 if maps > 16 else 16
    high = 1 if height == 16 else 2
    most = WARPS // high * (5 if height != 32 else 10)
    if windows.taps + 1 > most:
        return None
    groups = min(windows.groups, (most - 1) // windows.taps)
    wide = ceil_div(windows.groups, groups)
    groups = ceil_div(windows.groups, wide)
    found: list[tuple[float, GradientTile]] = []
    for positions in range(16, 144, 16):
        seen = windows.patch_rows(positions) * pitches[0]
        own = errors.patch_rows(positions) * pitches[1]
        held = height // EIGHT * ((own + 1) | 1) + (groups + 1) * (seen | 1)
        sums = 0 if windows.taps == 1 else height * (groups * EIGHT * windows.taps + 1) * 4
        side = ceil_div(max(held * vector_bytes, sums), 16) * 16
        shared = 2 * (2 * positions * 4 + side)
        if shared > room(limits):
            continue
        tiles = wide * ceil_div(maps, height)
        chunks = ceil_div(batch * windows.positions, positions)
        size = 4 * maps * (windows.channels * windows.taps + 1)
        sums = max(1, GRADIENT_JOBS * limits.multiprocessors // tiles)
        if batch * windows.positions < LONG * sums * CHUNK_POSITIONS:
            sums = max(1, min(chunks, sums, MOST_PARTIAL_BYTES // size))
        tile = GradientTile(
            *(height, high, groups, positions, False),
            (windows.patch_rows(positions), pitches[0]),
            *(tiles, sums, shared),
        )
        copied = COPYING * vector_bytes * (height // EIGHT * own + groups * seen)
        multiplied = PRODUCTS * positions / EIGHT * height * (windows.taps * groups + 1) * EIGHT
        each = ROUND / 2 + max(copied, 1.3 * multiplied)
        found.append((ceil_div(chunks, sums) * each, tile))
    return min(found, key=lambda pair: pair[0])[1] if found else None
