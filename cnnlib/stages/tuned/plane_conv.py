"""Convolution by products of FP16 planes: kernels/tuned/plane_conv.cuh."""

from dataclasses import dataclass, replace

from cnnlib.arithmetic import ceil_div
from cnnlib.engine import Planned, Stage
from cnnlib.stages.tuned.conv import Convolution
from cnnlib.stages.tuned.layout import Needs, SharedBuffer, SharedLayout, Threads, aligned
from cnnlib.stages.tuned.operator import Method, Position, TunedOperator
from cnnlib.stages.tuned.schedule import (
    LANE_SUMS,
    MAX_SCRATCH,
    SHORT_ROW,
    SMALL_BLOCK,
    ConvShape,
    most_sums,
)

EIGHT = 8
"""FP16 of a row that ldmatrix takes: 16 bytes."""
MAX_N_TILES = 8
"""Tiles of eight positions that a warp makes together, at most."""
MAX_LEFT = 80
"""Registers that a thread may spend on the weights of one tile of backward_data."""
LOAD = 4
"""Cycles of a multiprocessor for one ldmatrix of four matrices: it moves 512 bytes, 128 a cycle."""
PRODUCT = 18
"""Cycles of a scheduler for the three products of a tile. A warp has the tensor core of its own
scheduler alone, a quarter of the multiprocessor's 1,365 multiply-adds a cycle (measured).
"""
LATENCY = 40
"""Cycles that a warp waits in each step for what it has loaded or multiplied; an estimate."""


@dataclass(frozen=True)
class PlaneShape:
    """The sizes that follow from a convolution's own, as kernels/tuned/plane_conv.cuh has them."""

    conv: ConvShape
    stride: int

    @property
    def eights(self) -> int:
        """Rows of eight channels of a pixel."""
        return ceil_div(self.conv.channels, EIGHT)

    @property
    def source_plane(self) -> int:
        """Numbers of one plane of the source, which is the floats of both."""
        return self.conv.height * self.conv.width * odd(self.eights) * EIGHT

    @property
    def map_tiles(self) -> int:
        """Tiles of 16 maps."""
        return ceil_div(self.conv.maps, 16)

    @property
    def units(self) -> int:
        """Rows of eight channels of all taps."""
        return self.conv.kernel**2 * self.eights

    @property
    def k_steps(self) -> int:
        """Products that a sum over all terms takes, of 16 terms each."""
        return ceil_div(self.units, 2)

    @property
    def weight_plane(self) -> int:
        """Numbers of one plane of the weights."""
        return self.map_tiles * 16 * (2 * self.k_steps + 1) * EIGHT

    @property
    def padded_columns(self) -> int:
        """Columns of errors, in whole tiles."""
        return ceil_div(self.conv.columns, EIGHT) * EIGHT

    @property
    def error_plane(self) -> int:
        """Numbers of one plane of the errors."""
        positions = ceil_div(self.conv.rows * self.padded_columns, 16) * 16
        return positions * self.map_tiles * 16

    @property
    def data_eights(self) -> int:
        """Rows of eight channels of the columns of a kernel."""
        return self.conv.kernel * self.eights

    @property
    def found_pitch(self) -> int:
        """Floats from a channel's sums of backward_data to the next one's: all rows, and eight more
        than a multiple of the banks, so that four channels lie in different ones.
        """
        return ceil_div(self.conv.height * self.padded_columns - 8, 32) * 32 + 8

    @property
    def data_tiles(self) -> int:
        """Tiles of 16 of these."""
        return ceil_div(self.data_eights, 2)

    def backward_floats(self, row_shares: int, splits: bool = True) -> int:
        """Floats of errors and, one after the other, of the source and of what backward_data finds
        in so many shares. Without `splits` the source lies elsewhere.
        """
        found = self.conv.kernel * self.conv.channels * self.found_pitch
        return self.error_plane + max(splits * self.source_plane, row_shares * found)

    def forward_floats(self, split_k: int, splits: bool = True) -> int:
        """Floats of the source, as in backward_floats, and of the sums of so many shares of the
        terms.
        """
        return splits * self.source_plane + split_k * self.conv.maps * self.conv.full_pitch

    def own_units(self, warps: int) -> int:
        """Units of the gradient of a warp; the bias is one."""
        return ceil_div(self.units + 1, warps)


def odd(count: int) -> int:
    """The number itself or the next one, whichever is odd."""
    return count | 1


@dataclass(frozen=True)
class PlaneSchedule:
    """How the warps of a team share the products."""

    forward_n_tiles: int
    """Tiles of eight positions that a warp makes together."""
    forward_split_k: int
    """Warps that share the terms of one sum."""
    group: int
    """Units of the gradient that a warp makes together."""
    row_shares: int
    """Tasks among which the rows of errors are divided on their way back."""

    @classmethod
    def cheapest(cls, shape: PlaneShape, warps: int, group: int = EIGHT) -> "PlaneSchedule":
        """The one of the fewest cycles, by an estimate that is good for the order alone: what the
        warp with the most tasks multiplies and waits for, and what the multiprocessor moves.
        group: tiles of the gradient that a warp may make together.
        """
        tiles = ceil_div(shape.conv.area, EIGHT)
        forward = [(n, split) for n in range(2, MAX_N_TILES + 1, 2) for split in (1, 2, 4)]

        def forward_cycles(choice: tuple[int, int]) -> float:
            n_tiles, split = choice
            tasks = shape.map_tiles * ceil_div(tiles, n_tiles)
            rounds = ceil_div(tasks * split, warps) * ceil_div(shape.k_steps, split)
            moved = tasks * shape.k_steps * (2 + n_tiles) * LOAD
            added = split * shape.conv.maps * shape.conv.area / 8  # stored and loaded
            return rounds * (n_tiles * PRODUCT + LATENCY) + moved + added

        def data_cycles(shares: int) -> float:
            tasks = shape.data_tiles * (shape.padded_columns // EIGHT) * shares
            rows = ceil_div(shape.conv.rows, shares) * shape.map_tiles
            left = 2 * shape.conv.kernel * shape.map_tiles * LOAD
            return ceil_div(tasks, warps) * rows * (shape.conv.kernel * PRODUCT + LATENCY) + (
                tasks * (left + rows * LOAD)
            )

        fitting = [n for n in (1, 2) if n == 1 or shape.backward_floats(n) <= MAX_SCRATCH]
        row_shares = min(fitting, key=data_cycles)
        room = max(shape.backward_floats(row_shares), shape.forward_floats(1))
        roomy = [choice for choice in forward if shape.forward_floats(choice[1]) <= room]
        return cls(
            *min(roomy, key=lambda choice: (forward_cycles(choice), choice)),
            max(1, min(shape.own_units(warps), group // shape.map_tiles)),
            row_shares,
        )


def cannot_split(shape: PlaneShape, threads: Threads, sends_errors_back: bool) -> str:
    """Why the products of a convolution cannot be made of planes; "" if they can."""
    conv = shape.conv
    if 2 * conv.channels <= shape.eights * EIGHT:
        return (
            f"of the {shape.eights * EIGHT} channels that are multiplied {conv.channels} are there"
        )
    gradient = shape.own_units(threads.team_warps) * shape.map_tiles * LANE_SUMS
    limit = most_sums(threads.block)
    if gradient > limit:
        return f"its gradient takes {gradient} registers of a thread, and {limit} are free"
    if not sends_errors_back:
        return ""
    left = conv.kernel * shape.map_tiles * 2 * LANE_SUMS
    if left > MAX_LEFT:
        return f"the weights of a tile take {left} registers of a thread, and {MAX_LEFT} are free"
    if conv.width > SHORT_ROW:
        return f"rows of {conv.width} floats do not fit the registers of a thread"
    if shape.stride > conv.kernel:
        return "its stride is larger than its kernel"
    return ""


class TunedPlaneConv(Convolution):
    """A convolution whose source is another layer's floats, split into FP16 planes.

    Raises Unsupported where cannot_split gives a reason.
    """

    template = "PlaneConv"

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        self.planes = PlaneShape(self.shape, self.stride)
        if reason := cannot_split(self.planes, threads, not planned.is_first):
            raise self.unsupported(reason)
        group = EIGHT if threads.block <= SMALL_BLOCK else EIGHT // 2
        self.schedule = PlaneSchedule.cheapest(self.planes, threads.team_warps, group)
        if self.lanes_have_windows:
            self.schedule = replace(self.schedule, forward_n_tiles=2, forward_split_k=1)
        self.source_is_planes = False
        self.needs = self.own_needs()

    @property
    def lanes_have_windows(self) -> bool:
        """Whether two tiles of positions are the two lines of one row of windows, and every warp
        has the same number of such rows. The largest value of a window is then found in the
        registers in which it was added up.
        """
        conv = self.shape
        of_maxima = (self.window, self.method) == (2, Method.MAX)
        return (
            of_maxima
            and conv.columns == EIGHT
            and self.planes.map_tiles * conv.rows // 2 % self.threads.team_warps == 0
        )

    def own_needs(self) -> Needs:
        """What it needs in shared memory, wherever its source is split."""
        splits = not self.source_is_planes
        row_shares = 0 if self.planned.is_first else self.schedule.row_shares
        needs = self.needs_of(
            raw_is_used=False,
            scratch=max(
                self.planes.forward_floats(self.forward_split_k, splits),
                self.planes.backward_floats(row_shares, splits),
            ),
            staged=self.threads.teams * self.planes.map_tiles * 16 * self.gradient_pitch,
            tables=aligned(2 * self.planes.k_steps) + EIGHT,
        )
        return replace(needs, source=self.planes.source_plane if self.source_is_planes else 0)

    def follow(self, before: TunedOperator) -> None:
        if before.may_leave_planes:
            self.source_is_planes = before.leaves_planes = True
            self.needs = self.own_needs()

    @property
    def gradient_pitch(self) -> int:
        return (self.planes.units + 1) * EIGHT + 4

    @property
    def forward_split_k(self) -> int:
        return self.schedule.forward_split_k

    @property
    def weight_floats(self) -> int:
        return self.planes.weight_plane + self.shape.maps

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        schedule = self.schedule
        return {
            **super().config(layout, position),
            "FORWARD_N_TILES": schedule.forward_n_tiles,
            "GROUP": schedule.group,
            "ROW_SHARES": schedule.row_shares,
            "FOUND_PITCH": self.planes.found_pitch,
            "SOURCE_IS_PLANES": self.source_is_planes,
        }

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        return {
            **super().buffers(layout, position),
            "RawWeights": SharedBuffer(layout.raw_weights[self.label]),
            "UnitOffsets": SharedBuffer(layout.tables[self.label]),
        }
