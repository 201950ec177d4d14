"""Convolution with what follows it: kernels/tuned/conv.cuh and byte_conv.cuh."""

from abc import abstractmethod

from cnnlib.arithmetic import ceil_div
from cnnlib.engine import Planned, Stage
from cnnlib.layers import Conv, enumerator_of
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


class Convolution(TunedOperator):
    """What the convolutions of kernels/tuned/ have in common: ConvSums of conv_common.cuh."""

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        conv = planned.layer(Conv)
        self.stride = conv.stride[0]
        self.border = conv.padding
        if any(self.border) and not planned.is_first:
            raise self.unsupported("it has padding, which only a network's first layer may have")
        channels, height, width = planned.source_shape
        height, width = height + 2 * self.border[0], width + 2 * self.border[1]
        maps, rows, columns = conv.output_shape(planned.source_shape)
        self.shape = ConvShape(
            *(channels, height, width, maps, conv.kernel[0], rows, columns, self.takes_bytes),
            bordered=any(self.border),
        )
        self.source_size = self.shape.source_size
        self.window, self.method = window_of(planned.layers)
        self.function = enumerator_of(planned.layers)
        # A mean over a curved activation needs the slope at every value.
        self.keeps_activated = (
            self.window > 1 and self.method is Method.MEAN and self.function != "IDENTITY"
        )
        self.partials = self.parameters

    @property
    def full_size(self) -> int:
        """Floats of all sums of the convolution."""
        return self.shape.maps * self.shape.full_pitch

    @property
    @abstractmethod
    def gradient_pitch(self) -> int:
        """Floats from a map's gradient to the next one's."""

    @property
    @abstractmethod
    def forward_split_k(self) -> int:
        """Warps that share the terms of one sum."""

    @property
    @abstractmethod
    def weight_floats(self) -> int:
        """Floats of the weights as they are used."""

    def needs_of(self, raw_is_used: bool, scratch: int, staged: int, tables: int) -> Needs:
        """What it needs in shared memory; the numbers are those of Needs."""
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
            raw_is_used=raw_is_used,
            scratch=scratch,
            staged=staged,
            tables=tables,
        )

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        shape = self.shape
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
            "FORWARD_SPLIT_K": self.forward_split_k,
            "FULL_PITCH": shape.full_pitch,
            "GRADIENT_TERMS": shape.gradient_terms,
            "GRADIENT_PITCH": self.gradient_pitch,
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
        }


class TunedConv(Convolution):
    """A convolution whose source is another layer's floats, or an image with a stride."""

    template = "Conv"

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        self.gradient_limit = gradient_limit(self.shape, threads.block, threads.team_warps)
        self._check()
        self.schedule = ConvSchedule.cheapest(
            self.shape, threads.team_warps, self.gradient_limit, ConvCost(threads.gpu)
        )
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
    def gradient_pitch(self) -> int:
        return self.shape.term_tiles * 16 + 4

    @property
    def forward_split_k(self) -> int:
        return self.schedule.forward_split_k

    @property
    def weight_floats(self) -> int:
        return self.parameters

    @property
    def table_floats(self) -> int:
        """Offsets of the terms of a sum."""
        return ceil_div(self.shape.terms, 8) * 8

    def _needs(self) -> Needs:
        shape, schedule = self.shape, self.schedule
        sums = 0 if self.keeps_activated else self.full_size
        back = 0
        if schedule.data_split_k > 1 and not self.planned.is_first:
            back = schedule.data_split_k * data_pitch(shape)
        shares = self.threads.teams * schedule.weights_split_k
        return self.needs_of(
            raw_is_used=not self.takes_bytes,
            scratch=max(schedule.forward_split_k * self.full_size, sums + back),
            staged=shares * shape.n_tiles * 8 * self.gradient_pitch,
            tables=self.table_floats,
        )

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        schedule = self.schedule
        return {
            **super().config(layout, position),
            "FORWARD_M_TILES": schedule.forward_m_tiles,
            "WEIGHTS_WARPS": schedule.weights_warps,
            "WEIGHTS_SPLIT_K": schedule.weights_split_k,
            "DATA_SPLIT_K": schedule.data_split_k,
            "DATA_PITCH": data_pitch(self.shape),
        }

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        return {
            **super().buffers(layout, position),
            "TermOffsets": SharedBuffer(layout.tables[self.label]),
        }


class TunedByteConv(TunedConv):
    """The convolution that takes the image's bytes, which tensor cores multiply exactly."""

    template = "ByteConv"
    takes_bytes = True

    def _check(self) -> None:
        """Raise Unsupported too where a window may reach beyond two opposite sides at once."""
        super()._check()
        rows, columns = self.border
        shape = self.shape
        least = min(shape.height - 2 * rows, shape.width - 2 * columns)
        if any(self.border) and least < shape.kernel - 1:
            raise self.unsupported("windows reach beyond both sides of the image")

    @property
    def bias_floats(self) -> int:
        """What is added to a map's sums: the same everywhere or, within a border, one number for
        each way in which a window may reach into it.
        """
        rows, columns = self.border
        return (2 * rows + 1) * (2 * columns + 1)

    @property
    def weight_pitch(self) -> int:
        """Words from a map's weights to the next one's: whole tiles of eight pairs, and half one
        more, so that the maps of a tile lie in different banks.
        """
        return ceil_div(self.shape.term_pairs, 8) * 8 + 4

    @property
    def weight_floats(self) -> int:
        """Three words of BF16 for each pair of weights, and what is added to each map's sums."""
        return self.shape.maps * (3 * self.weight_pitch + self.bias_floats)

    @property
    def table_floats(self) -> int:
        """Which pixels of the source lie within the border, as words like those of an image."""
        return self.shape.height * self.shape.width if any(self.border) else 0

    def config(self, layout: SharedLayout, position: Position) -> dict[str, int | str]:
        return {
            **super().config(layout, position),
            "WEIGHT_PITCH": self.weight_pitch,
            "BORDER_ROWS": self.border[0],
            "BORDER_COLUMNS": self.border[1],
        }

    def buffers(self, layout: SharedLayout, position: Position) -> dict[str, SharedBuffer | None]:
        buffers = super().buffers(layout, position)
        table = buffers.pop("TermOffsets")
        return {
            **buffers,
            "RawWeights": SharedBuffer(layout.raw_weights[self.label]),
            "Inside": table if any(self.border) else None,
        }
