"""Convolution with what follows it: kernels/tuned/conv.cuh and byte_conv.cuh."""

from cnnlib.arithmetic import ceil_div
from cnnlib.engine import Planned, Stage
from cnnlib.engine.stage import declining
from cnnlib.layers import Conv, enumerator_of
from cnnlib.stages.tuned.declined import other_than_square
from cnnlib.stages.tuned.layout import (
    ALIGNMENT,
    Needs,
    SharedBuffer,
    SharedLayout,
    Threads,
    aligned,
)
from cnnlib.stages.tuned.operator import (
    Method,
    Position,
    TunedOperator,
    window_of,
    winners,
)
from cnnlib.stages.tuned.schedule import (
    MAX_SUMS,
    ConvCost,
    ConvSchedule,
    ConvShape,
    data_pitch,
    gradient_limit,
)


class TunedConv(TunedOperator):
    """A convolution whose source is another layer's floats, or an image with a stride."""

    template = "Conv"

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        conv = planned.layer(Conv)
        self.stride = conv.stride[0]
        channels, height, width = planned.source_shape
        maps, rows, columns = conv.output_shape(planned.source_shape)
        self.shape = ConvShape(
            channels, height, width, maps, conv.kernel[0], rows, columns, self.takes_bytes
        )
        self.window, self.method = window_of(planned.layers)
        self.function = enumerator_of(planned.layers)
        # A mean over a curved activation needs the slope at every value.
        self.keeps_activated = (
            self.window > 1 and self.method is Method.MEAN and self.function != "IDENTITY"
        )
        self.gradient_limit = gradient_limit(self.shape, threads.block, threads.team_warps)
        self._check()
        self.schedule = ConvSchedule.cheapest(
            self.shape, threads.team_warps, self.gradient_limit, ConvCost(threads.gpu)
        )
        self.partials = self.parameters
        self.needs = self._needs()

    def _check(self) -> None:
        """Raise Unsupported where a thread has no room for its sums."""
        shape = self.shape
        if shape.forward_sums > MAX_SUMS:
            raise self.unsupported(
                f"its {shape.maps} maps take {shape.forward_sums} registers of a thread for the "
                f"sums of a position, and a thread has room for {MAX_SUMS}"
            )
        wanted = shape.gradient_sums(self.threads.team_warps)
        if wanted > self.gradient_limit:
            raise self.unsupported(
                f"the gradient of its {self.parameters:,} weights is summed in registers, {wanted} "
                f"of each of {self.threads.team} threads, and a thread has room for "
                f"{self.gradient_limit}"
            )

    @property
    def full_size(self) -> int:
        """Floats of all sums of the convolution."""
        return self.shape.maps * self.shape.full_pitch

    @property
    def gradient_pitch(self) -> int:
        """Floats from a map's gradient to the next one's."""
        return self.shape.term_tiles * 16 + 4

    @property
    def weight_floats(self) -> int:
        """Floats of the weights as they are used."""
        return self.parameters

    def _needs(self) -> Needs:
        shape, schedule = self.shape, self.schedule
        sums = 0 if self.keeps_activated else self.full_size
        back = 0
        if schedule.data_split_k > 1 and not self.planned.is_first:
            back = schedule.data_split_k * data_pitch(shape)
        shares = self.threads.teams * schedule.weights_split_k
        return Needs(
            self.label,
            self.parameters,
            kept={
                **winners(self.window, self.method, self.target_size),
                "activated": self.full_size if self.keeps_activated else 0,
            },
            weights=self.weight_floats,
            lead=self.offset % ALIGNMENT,
            raw=aligned(self.offset % ALIGNMENT + self.parameters),
            raw_is_used=not self.takes_bytes,
            scratch=max(schedule.forward_split_k * self.full_size, sums + back),
            staged=shares * shape.n_tiles * 8 * self.gradient_pitch,
            tables=0 if self.takes_bytes else ceil_div(shape.terms, 8) * 8,
        )

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        shape, schedule = self.shape, self.schedule
        return {
            "CHANNELS": shape.channels,
            "HEIGHT": shape.height,
            "WIDTH": shape.width,
            "MAPS": shape.maps,
            "KERNEL": shape.kernel,
            "STRIDE": self.stride,
            "ROWS": shape.rows,
            "COLUMNS": shape.columns,
            "FUNCTION": self.function,
            "WINDOW": self.window,
            "METHOD": self.method,
            "KEEPS_ACTIVATED": self.keeps_activated,
            "FORWARD_M_TILES": schedule.forward_m_tiles,
            "FORWARD_SPLIT_K": schedule.forward_split_k,
            "WEIGHTS_WARPS": schedule.weights_warps,
            "WEIGHTS_SPLIT_K": schedule.weights_split_k,
            "DATA_SPLIT_K": schedule.data_split_k,
            "FULL_PITCH": shape.full_pitch,
            "GRADIENT_PITCH": self.gradient_pitch,
            "DATA_PITCH": data_pitch(shape),
            "FIRST_WEIGHT": self.offset,
            "FIRST_PARTIAL": position.partial,
            "SCRATCH_FLOATS": layout.scratch_floats[0],
            "STAGED_FLOATS": self.needs.staged,
        }

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        kept = layout.kept[self.label]
        return {
            **super().buffers(layout, position),
            "Winners": kept["winners"],
            "Full": kept["activated"] if self.keeps_activated else layout.image_scratch,
            "Scratch": layout.image_scratch,
            "Weights": SharedBuffer(layout.weights[self.label]),
            "Staged": SharedBuffer(layout.staged[self.label]),
            "TermOffsets": SharedBuffer(layout.tables[self.label]),
        }


class TunedByteConv(TunedConv):
    """The convolution that takes the image's bytes, which tensor cores multiply exactly."""

    template = "ByteConv"
    takes_bytes = True

    @property
    def weight_pitch(self) -> int:
        """Words from a map's weights to the next one's: whole tiles of eight pairs, and half one
        more, so that the maps of a tile lie in different banks.
        """
        return ceil_div(self.shape.term_pairs, 8) * 8 + 4

    @property
    def weight_floats(self) -> int:
        """Three words of BF16 for each pair of weights, and what is added to each map's sums."""
        return self.shape.maps * (3 * self.weight_pitch + 1)

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        return {**super().config(layout, position), "WEIGHT_PITCH": self.weight_pitch}

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        buffers = super().buffers(layout, position)
        del buffers["TermOffsets"]
        return {**buffers, "RawWeights": SharedBuffer(layout.raw_weights[self.label])}


@declining(other_than_square)
def convolution(planned: Planned, stage: Stage, threads: Threads, images: int) -> TunedConv:
    """The operator of a convolution and what follows it."""
    takes_bytes = planned.is_first and planned.layer(Conv).stride == (1, 1)
    return (TunedByteConv if takes_bytes else TunedConv)(planned, stage, threads, images)
