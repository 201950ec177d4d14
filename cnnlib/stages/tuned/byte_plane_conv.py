"""Convolution of the image's bytes, of FP16 planes: kernels/tuned/byte_plane_conv.cuh."""

from cnnlib.arithmetic import ceil_div
from cnnlib.engine import Planned, Stage
from cnnlib.stages.tuned.conv import Convolution
from cnnlib.stages.tuned.layout import SharedBuffer, SharedLayout, Threads
from cnnlib.stages.tuned.operator import Method, Position
from cnnlib.stages.tuned.plane_conv import EIGHT, odd
from cnnlib.stages.tuned.schedule import LANE_SUMS, most_sums

SLOPES_OF_0_AND_1 = ("IDENTITY", "RELU")
"""Functions whose slope says nothing more than whether errors go back."""


class TunedBytePlaneConv(Convolution):
    """The convolution that takes the image's bytes, followed by maxima of 2 x 2.

    Raises Unsupported for another window, and where a thread has no room for its sums.
    """

    template = "BytePlaneConv"
    takes_bytes = takes_planes = True
    forward_split_k = 0

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        shape = self.shape
        self.pairs = shape.channels * ceil_div(shape.kernel, 2)
        """Pairs of lines of the kernel: the terms of a tile of the gradient."""
        self._check()
        # then one bit of each number does on the way back: the winner has room for it
        self.may_leave_planes = self.function in SLOPES_OF_0_AND_1
        self.needs = self.needs_of(
            raw_is_used=False,
            scratch=0,
            staged=threads.block_warps * (self.pairs * 16 + 1) * self.gradient_pitch,
            tables=0,
        )

    def _check(self) -> None:
        shape = self.shape
        if (self.window, self.method) != (2, Method.MAX) or shape.kernel > EIGHT:
            raise self.unsupported("no maxima of 2 x 2 follow it, or its kernel is too wide")
        wanted = self.pairs * shape.n_tiles * LANE_SUMS
        limit = most_sums(self.threads.block)
        if wanted > limit:
            raise self.unsupported(
                f"its weights, and their gradient, take {wanted} registers of a thread, and "
                f"{limit} are free"
            )

    @property
    def gradient_pitch(self) -> int:
        return self.shape.n_tiles * EIGHT

    @property
    def weight_floats(self) -> int:
        lines = self.shape.kernel // 2 * 2 + 3  # with lines of zeros before and behind
        pitch = odd(self.shape.channels * lines) * EIGHT
        return self.shape.n_tiles * EIGHT * pitch + self.shape.maps

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        return {**super().config(layout, position), "LEAVES_PLANES": self.leaves_planes}

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        return {
            **super().buffers(layout, position),
            "RawWeights": SharedBuffer(layout.raw_weights[self.label]),
        }
