"""Stage 5: what is left of a step when launches, host round trips and gathering are gone.

The data set lies on the GPU as bytes and a whole epoch is one launch. Every block takes its images
through the network alone, with the weights in its shared memory; then every block updates a share
of the weights. A network whose maps do not fit a block is trained by the kernels of stage ring.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cnnlib.device import Device
from cnnlib.engine import Engine, Planned, Setup, Stage, plan
from cnnlib.engine.gpu import GpuEngine
from cnnlib.engine.steps import BLOCK, CHUNK, Places, Room, StepOperator, StepPlan
from cnnlib.engine.whole import WholeStepEngine
from cnnlib.errors import Unsupported
from cnnlib.layers import Activation, Conv, Dense, Subsample
from cnnlib.stages import ring
from cnnlib.stages.fused import function_of

SCHEDULERS = 4
"""Of a multiprocessor: each issues one warp's instruction a cycle."""
MOST_SUMS = 48
"""Registers a thread may spend on its share of a convolution's gradient."""
MOST_SCRATCH = 6144
"""Floats of shared memory for sums that several threads share."""
TILE_UNITS, TILE_INPUTS, AT_ONCE = 16, 32, 64
TEAMS = BLOCK // (TILE_UNITS * TILE_INPUTS // 8)
"""Of kernels/tuned_dense.cuh."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def shares_of(pieces: int, lines: int) -> int:
    """How many threads share one of `lines` sums of `pieces`, so that none is idle for long."""
    most = max(1, min(pieces, BLOCK // lines))
    return math.ceil(pieces / math.ceil(pieces / most))


def bytes_at(place: int) -> str:
    """The block's shared memory from `place` on, as bytes."""
    return f"reinterpret_cast<unsigned char*>(shared + {place})"


class TunedConv(StepOperator):
    file = "tuned_conv.cuh"
    leaves_sums = True

    def __init__(self, planned: Planned, stage: Stage) -> None:
        super().__init__(planned, stage)
        conv = planned.layers[0]
        assert isinstance(conv, Conv)
        self.conv = conv
        self.channels, self.height, self.width = planned.source_shape
        self.maps, self.rows, self.columns = conv.output_shape(planned.source_shape)
        subsample = next((x for x in planned.layers if isinstance(x, Subsample)), None)
        self.window = subsample.size if subsample else 1
        self.method = subsample.method if subsample else "max"
        self.function = function_of(planned.layers)
        # A mean over a curved activation needs the slope at every value.
        self.keeps = self.window > 1 and self.method == "mean" and self.function != "IDENTITY"
        self.source_size = math.prod(planned.source_shape)
        self.out_area = self.rows // self.window * (self.columns // self.window)
        self.each, self.shares = min(
            (
                (each, shares)
                for each in divisors(self.maps)
                for shares in divisors(self.channels)
                if each <= 4 and (shares == 1 or self.sums(shares) <= MOST_SCRATCH)
            ),
            key=lambda choice: (self.cost(*choice), choice),
        )
        gradient_rows = self.maps * self.channels * conv.kernel
        self.splits = 1
        while gradient_rows * self.splits * 2 <= BLOCK and self.splits * 2 <= self.rows:
            self.splits *= 2
        self.owned = math.ceil(gradient_rows * self.splits / BLOCK)
        if self.owned * (conv.kernel + 1) > MOST_SUMS:
            raise self.unsupported(f"its {gradient_rows} rows of weights are too many for a block")
        self.senders = shares_of(self.maps, self.channels * self.height)
        self.sends_rows = self.columns <= 32 and self.width <= 32

    def sums(self, shares: int) -> int:
        """Floats of scratch for sums whose channels `shares` threads share."""
        return shares * self.maps * self.out_area * self.window**2

    def cost(self, each: int, shares: int) -> float:
        """Instructions that a scheduler issues for the forward pass, about."""
        jobs = self.maps // each * self.out_area * shares
        warps = math.ceil(math.ceil(jobs / 32) / SCHEDULERS)
        span = (self.window - 1) * self.conv.stride + self.conv.kernel
        channel = span**2 + self.conv.kernel**2 * (1 + self.window**2 * each)
        adding = 0 if shares == 1 else 60 + (shares + 2) * self.window**2 * each
        return warps * channel * self.channels / shares + adding

    def constants(self) -> Mapping[str, int | str]:
        return {
            "CHANNELS": self.channels, "HEIGHT": self.height, "WIDTH": self.width,
            "MAPS": self.maps, "KERNEL": self.conv.kernel, "STRIDE": self.conv.stride,
            "ROWS": self.rows, "COLUMNS": self.columns, "FUNCTION": self.function,
            "WINDOW": self.window, "METHOD": self.method.upper(), "EACH": self.each,
            "SHARES": self.shares, "OWNED": self.owned, "SPLITS": self.splits,
            "SENDERS": self.senders, "KEEPS": int(self.keeps),
        }  # fmt: skip

    def lay_out(self, room: Room, places: Places) -> None:
        self.places = places
        self.weights = room.take(self.parameters)
        winners = self.window > 1 and self.method == "max"
        self.winners = room.take(math.ceil(self.maps * self.out_area / 4)) if winners else 0
        full = self.maps * self.rows * self.columns
        # A map that is kept from forward to backward is nobody else's meanwhile.
        self.full = str(room.take(full)) if self.keeps else "{full}"
        if not self.keeps:
            room.share("full", full)
        scratch = [self.sums(self.shares)] * (self.shares > 1)
        if self.splits > 1:
            scratch.append(BLOCK * self.owned * (self.conv.kernel + 1))
        if self.senders > 1 and self.sends_rows and not self.planned.is_first:
            scratch.append(self.senders * self.source_size)
        room.share("scratch", max(scratch, default=0))

    def hold(self) -> str:
        return f"::{self.label}::hold(parameters + {self.offset}, shared + {self.weights});"

    def forward(self) -> str:
        return (
            f"::{self.label}::forward(shared + {self.places.source}, shared + {self.weights}, "
            f"shared + {self.places.target}, {bytes_at(self.winners)}, shared + {self.full}, "
            "shared + {scratch});"
        )

    def backward(self) -> str:
        lines = [
            f"::{self.label}::spread(shared + {self.places.target}, {bytes_at(self.winners)}, "
            f"shared + {self.places.target_errors}, shared + {self.full});",
            "__syncthreads();",
            f"::{self.label}::add_gradient(shared + {self.places.source}, shared + {self.full}, "
            f"sums.of_{self.label});",
        ]
        if self.places.source_errors is not None:
            lines.append(
                f"::{self.label}::send_back(shared + {self.full}, shared + {self.weights}, "
                f"shared + {self.places.source_errors}, shared + {{scratch}});"
            )
        return "\n".join(lines)

    def jobs(self) -> int:
        return math.ceil(self.parameters / CHUNK)

    def sum_job(self) -> str:
        return (
            f"::convolved::sum_chunk<CONVOLVED>(partials, {{partial}} + job * {CHUNK}, "
            f"min({CHUNK}, {self.parameters} - job * {CHUNK}), groups, shared, "
            f"[&](int i, float sum) {{ done({self.offset} + job * {CHUNK} + i, sum); }});"
        )


class TunedDense(StepOperator):
    file = "tuned_dense.cuh"
    update_floats = AT_ONCE * (TILE_UNITS + TILE_INPUTS) + TEAMS * TILE_UNITS * TILE_INPUTS

    def __init__(self, planned: Planned, stage: Stage) -> None:
        super().__init__(planned, stage)
        self.inputs, self.units = math.prod(planned.source_shape), int(self.layer.units)
        self.held = True
        self.senders = shares_of(self.units, self.inputs)

    def constants(self) -> Mapping[str, int | str]:
        return {
            "INPUTS": self.inputs, "UNITS": self.units,
            "FUNCTION": function_of(self.planned.layers),
            "HELD": int(self.held), "PHASE": self.offset % 4, "SENDERS": self.senders,
            "TRACE_SOURCE": self.trace_place, "TRACE_DELTA": self.trace_place + self.inputs,
        }  # fmt: skip

    def lay_out(self, room: Room, places: Places) -> None:
        self.places = places
        if self.held:
            self.weights = room.take(self.parameters + 3) + self.offset % 4
        if self.senders > 1 and places.source_errors is not None:
            room.share("scratch", self.senders * self.inputs)

    def trace(self, place: int) -> int:
        self.trace_place = place
        return self.inputs + self.units

    def hold(self) -> str:
        if not self.held:
            return ""
        return f"::{self.label}::hold(parameters + {self.offset}, shared + {self.weights});"

    @property
    def _weights(self) -> str:
        return f"shared + {self.weights}" if self.held else f"parameters + {self.offset}"

    def forward(self) -> str:
        wait = "wait_for_copies();\n__syncthreads();\n" if self.held else ""
        return (
            f"{wait}::{self.label}::forward(shared + {self.places.source}, {self._weights}, "
            f"shared + {self.places.target});"
        )

    def backward(self) -> str:
        errors = f"shared + {self.places.target_errors}"
        text = (
            f"::{self.label}::leave_trace(shared + {self.places.source}, "
            f"shared + {self.places.target}, {errors}, trace);"
        )
        if self.places.source_errors is not None:
            text += (
                f"\n__syncthreads();\n::{self.label}::send_back({errors}, {self._weights}, "
                f"shared + {self.places.source_errors}, shared + {{scratch}});"
            )
        return text

    def jobs(self) -> int:
        return math.ceil((self.inputs + 1) / TILE_INPUTS) * math.ceil(self.units / TILE_UNITS)

    def sum_job(self) -> str:
        return (
            f"::{self.label}::sum_tile<TRACE>(job, traces, count, shared, "
            f"[&](int i, float sum) {{ done({self.offset} + i, sum); }});"
        )


class TunedPlain(StepOperator):
    file = "tuned_plain.cuh"

    def __init__(self, planned: Planned, stage: Stage) -> None:
        super().__init__(planned, stage)
        shape = planned.source_shape
        self.shape = shape if len(shape) == 3 else (math.prod(shape), 1, 1)
        subsample = isinstance(self.layer, Subsample)
        self.window = self.layer.size if subsample else 1
        self.method = self.layer.method if subsample else "max"

    def constants(self) -> Mapping[str, int | str]:
        channels, height, width = self.shape
        return {
            "CHANNELS": channels, "HEIGHT": height, "WIDTH": width, "WINDOW": self.window,
            "METHOD": self.method.upper(), "FUNCTION": function_of(self.planned.layers),
        }  # fmt: skip

    def lay_out(self, room: Room, places: Places) -> None:
        self.places = places
        winners = self.window > 1 and self.method == "max"
        self.winners = (
            room.take(math.ceil(math.prod(self.planned.target_shape) / 4)) if winners else 0
        )

    def forward(self) -> str:
        return (
            f"::{self.label}::forward(shared + {self.places.source}, "
            f"shared + {self.places.target}, {bytes_at(self.winners)});"
        )

    def backward(self) -> str:
        if self.places.source_errors is None:
            return ""
        return (
            f"::{self.label}::send_back(shared + {self.places.target}, {bytes_at(self.winners)}, "
            f"shared + {self.places.target_errors}, shared + {self.places.source_errors});"
        )


class TunedEngine(WholeStepEngine):
    """Whole steps in one launch; where a network does not fit them, stage ring's kernels."""

    def __new__(cls, stage: Stage, setup: Setup, device: Device | None = None) -> Any:
        assert device is not None, "a GPU stage needs a device"
        try:
            StepPlan(stage, plan(stage, setup.network), device.shared_bytes)
        except Unsupported:
            return otherwise(stage, setup, device)
        return super().__new__(cls)


def otherwise(stage: Stage, setup: Setup, device: Device) -> Engine:
    """The engine of stage ring under this stage's name."""
    slower = replace(
        stage, engine=GpuEngine, operators=ring.STAGE.operators, options=ring.STAGE.options
    )
    return GpuEngine(slower, setup, device)


STAGE = Stage(
    name="tuned",
    title="5 tuned",
    change="a whole epoch in one launch; weights in shared memory, images gathered on the GPU",
    runs_on="gpu",
    engine=TunedEngine,
    operators={
        (Conv, Activation, Subsample): TunedConv,
        (Conv, Subsample): TunedConv,
        (Conv, Activation): TunedConv,
        (Conv,): TunedConv,
        (Dense, Activation): TunedDense,
        (Dense,): TunedDense,
        (Activation,): TunedPlain,
        (Subsample,): TunedPlain,
    },
)
