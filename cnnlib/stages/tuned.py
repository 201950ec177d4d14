"""Stage 5: what is left of a step when launches, host round trips and gathering are gone.

The data set lies on the GPU as bytes and a whole epoch is one launch. Every block takes its images
through the network, with the weights in its shared memory as far as they fit; then every block
updates a share of the weights. Tensor cores multiply, to float32's accuracy (kernels/tensor.cuh).
A network whose maps or weights do not fit a block is refused with the sizes that are in the way.
"""

import math
from collections.abc import Callable, Iterable, Mapping

from cnnlib.engine import Planned, Stage
from cnnlib.engine.steps import (
    CHUNK,
    GROUP,
    Map,
    Room,
    StepOperator,
    Threads,
    pitch_of,
    sectors,
)
from cnnlib.engine.whole import WholeStepEngine
from cnnlib.layers import Activation, Conv, Dense, Subsample
from cnnlib.stages.fused import function_of

SCHEDULERS = 4
"""Of a multiprocessor: each issues one warp's instruction a cycle."""
MOST_SUMS = 32
"""Registers a thread may spend on its share of a convolution's gradient, and on sums forward."""
MOST_GRADIENT_SUMS = 64
"""The former where it cannot be fewer, and a block has so few threads that they have room."""
MOST_SCRATCH = 7168
"""Floats of shared memory for sums that several warps or threads share."""
WAIT = 120
"""Cycles that a warp waits in a product of tiles for what it has loaded."""
MOST_ALONE = 1024
"""Inputs of a dense layer for whose one image a warp's registers have room: of tuned_dense.cuh."""
PIECE = 8 * (16 + 32 + 8)
"""Floats of a piece of a dense layer's gradient: STAGE of tuned_dense.cuh."""
TILE_INPUTS = 32
"""Inputs of a tile of a dense layer's gradient: of kernels/tuned_dense.cuh."""


def tiles(count: int, size: int) -> int:
    """Of `size`, to cover `count`."""
    return math.ceil(count / size)


def cycles(warps: int, down: int, across: int) -> int:
    """Of a product of `down` by `across` tiles by each of `warps`, about."""
    instructions = 20 * down + 8 * across + 3 * down * across
    return max(tiles(warps, SCHEDULERS) * instructions, instructions + WAIT)


def bytes_at(there: Map) -> str:
    """An image's map, as bytes."""
    return f"reinterpret_cast<unsigned char*>({there.one})"


class TunedConv(StepOperator):
    file = "tuned_conv.cuh"
    leaves_sums = True
    used_raw = True

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
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
        self.area = self.rows * self.columns
        self.terms = self.channels * conv.kernel**2
        self.full_pitch = tiles(tiles(self.area, 8) * 8 - 4, 16) * 16 + 4
        self.across = tiles(self.maps, 8)
        self.check_forward()
        self.down, self.shares = self._best(
            ((down, shares) for down in range(1, 9) for shares in range(1, self.threads.warps + 1)),
            self._forward_cost,
        )
        self.term_tiles = tiles(self.terms + 1, 16)
        warps = self.threads.warps
        few = self._gradient_sums(warps) <= MOST_SUMS or self.threads.block > 256
        self.most_gradient_sums = MOST_SUMS if few else MOST_GRADIENT_SUMS
        self.check_gradient()
        self.groups, self.splits = self._best(
            ((groups, splits) for groups in range(1, warps + 1)
             for splits in range(1, warps // groups + 1)),
            self._gradient_cost,
        )  # fmt: skip
        self.sender_pitch = self.source_size + 8
        self.sends_rows = self.columns <= 32 and self.width <= 32
        self.senders = min(range(1, self.maps + 1), key=self._sending_cost)

    def _best(
        self,
        choices: Iterable[tuple[int, int]],
        cost: Callable[[int, int], float],
    ) -> tuple[int, int]:
        return min(choices, key=lambda choice: (cost(*choice), choice))

    def check_forward(self) -> None:
        """Raise Unsupported where a thread has no room for the sums of one position's maps."""
        if self.across * 4 > MOST_SUMS:
            raise self.unsupported(
                f"its {self.maps} maps take {self.across * 4} registers of a thread for the sums "
                f"of a position, and a thread has room for {MOST_SUMS}"
            )

    def check_gradient(self) -> None:
        """Raise Unsupported where all warps of a team together have no room for the gradient."""
        wanted = self._gradient_sums(self.threads.warps)
        if wanted > self.most_gradient_sums:
            raise self.unsupported(
                f"the gradient of its {self.parameters:,} weights is summed in registers, {wanted} "
                f"of each of {self.threads.team} threads, and a thread has room for "
                f"{self.most_gradient_sums}"
            )

    def _forward_cost(self, down: int, shares: int) -> float:
        """Cycles of the forward pass, about, where a warp makes `down` tiles of positions."""
        eights = tiles(self.terms, 8)
        tasks = tiles(tiles(self.area, 16), down) * shares
        fits = shares * self.maps * self.full_pitch <= MOST_SCRATCH or shares == 1
        if down * self.across * 4 > MOST_SUMS or shares > eights or not fits:
            return math.inf
        products = tiles(tasks, self.threads.warps) * tiles(eights, shares)
        took = products * cycles(min(tasks, self.threads.warps), down, self.across)
        return took + shares * self.maps * self.area / 128

    def _gradient_sums(self, groups: int) -> int:
        """Registers of a thread's share of the weights' gradient where so many warps share it."""
        return tiles(self.term_tiles, groups) * self.across * 4

    def _gradient_cost(self, groups: int, splits: int) -> float:
        """Cycles of the weights' gradient, about."""
        own, eights = tiles(self.term_tiles, groups), tiles(self.area, 8)
        if self._gradient_sums(groups) > self.most_gradient_sums or splits > eights:
            return math.inf
        return tiles(eights, splits) * cycles(groups * splits, own, self.across) + 20 * splits

    def _sending_cost(self, senders: int) -> float:
        """Rounds of errors sent back by rows where `senders` threads share the maps."""
        if not self.sends_rows or senders * self.sender_pitch > MOST_SCRATCH:
            return senders * 1e9
        warps = self.height * tiles(self.channels * senders, 32)
        return tiles(warps, SCHEDULERS) * tiles(self.maps, senders) + senders / 16

    def constants(self) -> Mapping[str, int | str]:
        return {
            "CHANNELS": self.channels, "HEIGHT": self.height, "WIDTH": self.width,
            "MAPS": self.maps, "KERNEL": self.conv.kernel, "STRIDE": self.conv.stride,
            "ROWS": self.rows, "COLUMNS": self.columns, "FUNCTION": self.function,
            "WINDOW": self.window, "METHOD": self.method.upper(), "KEEPS": int(self.keeps),
            "FULL_PITCH": self.full_pitch, "DOWN": self.down,
            "SHARES": self.shares, "GROUPS": self.groups, "SPLITS": self.splits,
            "SENDERS": self.senders, "SENDER_PITCH": self.sender_pitch,
        }  # fmt: skip

    @property
    def _full_size(self) -> int:
        return self.maps * self.full_pitch

    def keep(self, room: Room, turn: int, turns: int) -> None:
        winners = self.window > 1 and self.method == "max"
        out_area = self.rows // self.window * (self.columns // self.window)
        self.winners = Map(
            room.take(tiles(self.maps * out_area, 4)) if winners else 0, 0, turn, turns
        )
        if self.keeps:
            self.full = Map(room.take(self._full_size), 0, turn, turns)

    def lay_out(self, room: Room) -> None:
        self.weights = room.take(self.raw_floats) + self.offset % GROUP

    def keep_always(self, room: Room) -> None:
        self.term_places = room.take(tiles(self.terms, 8) * 8)

    def prepare(self) -> str:
        return f"::{self.label}::prepare(shared + {self.term_places});"

    def work(self) -> int:
        back = 0
        if self.senders > 1 and self.places.source_errors is not None:
            back = self.senders * self.sender_pitch
        return max(self.shares * self._full_size, (not self.keeps) * self._full_size + back)

    def last_work(self) -> int:
        return self.threads.teams * self.splits * self.across * 8 * (self.term_tiles * 16 + 4)

    @property
    def _full(self) -> str:
        return self.full.one if self.keeps else "shared + {work}"

    @property
    def _scratch(self) -> str:
        return "shared + {work}" + ("" if self.keeps else f" + {self._full_size}")

    def _forward(self, last: str) -> str:
        return (
            f"::{self.label}::forward({self.places.source.one}, shared + {self.weights}, "
            f"{self.places.target.one}, {bytes_at(self.winners)}, {self._full}, "
            f"shared + {{work}}, {last});"
        )

    def forward(self) -> str:
        return self._forward(f"shared + {self.term_places}")

    def backward(self) -> str:
        lines = [
            f"::{self.label}::spread({self.places.target.one}, {bytes_at(self.winners)}, "
            f"{self.places.target_errors.one}, {self._full});",
            "team_barrier();",
            f"::{self.label}::add_gradient({self.places.source.one}, {self._full}, "
            f"sums.of_{self.label});",
        ]
        if self.places.source_errors is not None:
            lines.append(
                f"::{self.label}::send_back({self._full}, shared + {self.weights}, "
                f"{self.places.source_errors.one}, {self._scratch});"
            )
        return "\n".join(lines)

    def put_gradient(self) -> str:
        return f"::{self.label}::put_gradient(sums.of_{self.label}, shared + {{last}});"

    def write_gradient(self) -> str:
        return f"::{self.label}::write_gradient(shared + {{last}}, partial);"

    def jobs(self) -> int:
        return tiles(self.parameters, CHUNK)

    def sum_job(self) -> str:
        return (
            f"::convolved::sum_chunk<CONVOLVED>(partials, {{partial}} + job * {CHUNK}, "
            f"min({CHUNK}, {self.parameters} - job * {CHUNK}), groups, shared, "
            f"weights.from({self.offset} + job * {CHUNK}));"
        )


class TunedFirst(TunedConv):
    """The convolution that takes the image's bytes, which tensor cores multiply exactly."""

    file = "tuned_first.cuh"
    takes_bytes = True
    used_raw = False

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        self.term_pitch = tiles(self._pairs, 8) * 8 + 4

    @property
    def _pairs(self) -> int:
        """Of neighbouring weights of a map; a row's last may be half empty."""
        return self.channels * self.conv.kernel * tiles(self.conv.kernel, 2)

    def constants(self) -> Mapping[str, int | str]:
        return {**super().constants(), "TERM_PITCH": self.term_pitch}

    def _forward_cost(self, down: int, shares: int) -> float:
        if down * self.across * 4 > MOST_SUMS or shares > 1:
            return math.inf
        tasks = tiles(tiles(self.area, 16), down)
        return (
            tiles(tasks, self.threads.warps)
            * tiles(self._pairs, 8)
            * cycles(min(tasks, self.threads.warps), down, self.across)
        )

    def _gradient_cost(self, groups: int, splits: int) -> float:
        own, sixteenths = tiles(self.term_tiles, groups), tiles(self.area, 16)
        if self._gradient_sums(groups) > self.most_gradient_sums or splits > sixteenths:
            return math.inf
        return tiles(sixteenths, splits) * cycles(groups * splits, own, self.across) + 20 * splits

    def lay_out(self, room: Room) -> None:
        self.weights = room.take(self.maps * (3 * self.term_pitch + 1))

    def keep_always(self, room: Room) -> None:
        pass

    def prepare(self) -> str:
        return ""

    def hold(self) -> str:
        return f"::{self.label}::hold(shared + {{raw}}, shared + {self.weights}, mean, deviation);"

    def forward(self) -> str:
        return self._forward("deviation")

    def write_gradient(self) -> str:
        return f"{super().write_gradient()[:-2]}, mean, deviation);"


def convolution(planned: Planned, stage: Stage, threads: Threads, images: int) -> TunedConv:
    """The operator of a convolution and what follows it."""
    conv = planned.layers[0]
    assert isinstance(conv, Conv)
    first = planned.is_first and conv.stride == 1
    return (TunedFirst if first else TunedConv)(planned, stage, threads, images)


class TunedDense(StepOperator):
    file = "tuned_dense.cuh"
    takes_all = True

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
        self.inputs, self.units = math.prod(planned.source_shape), int(self.layer.units)
        self.held = True
        # One image alone is multiplied by threads, which meet in no bank whatever the pitch is.
        alone = self.images == 1 and self.inputs % GROUP == 0 and self.inputs <= MOST_ALONE
        self.pitch = self.inputs if alone else pitch_of(tiles(self.inputs, 8) * 8)

    def constants(self) -> Mapping[str, int | str]:
        return {
            "INPUTS": self.inputs, "UNITS": self.units, "IMAGES": self.images,
            "FUNCTION": function_of(self.planned.layers),
            "HELD": int(self.held), "PITCH": self.pitch,
            "ALIGNED": int(self.inputs % GROUP == 0 and self.offset % GROUP == 0),
            "SOURCE_PITCH": self.places.source.pitch, "TARGET_PITCH": self.places.target.pitch,
            "STAGES": self.stages, "TRACE_SOURCE": self.trace_place,
            "TRACE_DELTA": self.trace_place + sectors(self.inputs),
        }  # fmt: skip

    def lay_out(self, room: Room) -> None:
        if self.held:
            self.weights = room.take(self.units * (self.pitch + 1))

    def _shared_sums(self, rows: int, terms: int) -> tuple[int, int]:
        """Warps that share a sum of `terms`, and floats of scratch for what they have to say."""
        high = tiles(rows, 16)
        warps = max(1, min(self.threads.block // 32 // high, tiles(terms, 8)))
        return warps, warps * high * 16 * tiles(self.images, 8) * 8

    def work(self) -> int:
        _, forward = self._shared_sums(self.units, self.inputs)
        senders, back = self._shared_sums(self.inputs, self.units)
        return max(forward, back if senders > 1 else 0, self.threads.block * GROUP)

    def update_work(self, stages: int) -> int:
        return self.threads.block // 32 * stages * PIECE

    def trace(self, place: int) -> int:
        self.trace_place = place
        return sectors(self.inputs) + sectors(self.units)

    def hold(self) -> str:
        if not self.held:
            return ""
        return f"::{self.label}::hold(parameters + {self.offset}, shared + {self.weights});"

    def hold_whole(self) -> str:
        return (
            f"::{self.label}::hold_whole(parameters + {self.offset}, shared + {self.weights}, "
            "arrivals);"
        )

    @property
    def _weights(self) -> str:
        return f"shared + {self.weights}" if self.held else f"parameters + {self.offset}"

    def forward(self) -> str:
        source = self.places.source.all
        return (
            f"::{self.label}::pad({source});\n__syncthreads();\n"
            f"::{self.label}::forward({source}, {self._weights}, {self.places.target.all}, "
            "shared + {work});"
        )

    def backward(self) -> str:
        errors = self.places.target_errors.all
        text = (
            f"::{self.label}::leave_trace({self.places.source.all}, {self.places.target.all}, "
            f"{errors}, trace, stride, here);"
        )
        if self.places.source_errors is not None:
            text += (
                f"\n__syncthreads();\n::{self.label}::send_back({errors}, {self._weights}, "
                f"{self.places.source_errors.all}, shared + {{work}});"
            )
        return text

    def jobs(self) -> int:
        return tiles(self.inputs, TILE_INPUTS) * tiles(self.units, 16)

    def sum_job(self) -> str:
        return (
            f"::{self.label}::sum_tile<TRACE>(job, traces, count, shared, "
            f"weights.from({self.offset}));"
        )


class TunedPlain(StepOperator):
    file = "tuned_plain.cuh"

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        super().__init__(planned, stage, threads, images)
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

    def keep(self, room: Room, turn: int, turns: int) -> None:
        winners = self.window > 1 and self.method == "max"
        size = tiles(math.prod(self.planned.target_shape), 4)
        self.winners = Map(room.take(size) if winners else 0, 0, turn, turns)

    def _each(self, call: str) -> str:
        """The call for one image or, after a dense layer, for all of a block's."""
        if not self.places.source.pitch:
            return call
        return f"for (int slot = 0; slot < {self.images}; slot++)\n{call}"

    def forward(self) -> str:
        return self._each(
            f"::{self.label}::forward({self.places.source.one}, {self.places.target.one}, "
            f"{bytes_at(self.winners)});"
        )

    def backward(self) -> str:
        if self.places.source_errors is None:
            return ""
        return self._each(
            f"::{self.label}::send_back({self.places.target.one}, {bytes_at(self.winners)}, "
            f"{self.places.target_errors.one}, {self.places.source_errors.one});"
        )


STAGE = Stage(
    name="tuned",
    title="5 tuned",
    change="a whole epoch in one launch; weights in shared memory, images gathered on the GPU",
    runs_on="cuda",
    engine=WholeStepEngine,
    after="ring",
    color="#d55e00",
    marker="P",
    operators={
        (Conv, Activation, Subsample): convolution,
        (Conv, Subsample): convolution,
        (Conv, Activation): convolution,
        (Conv,): convolution,
        (Dense, Activation): TunedDense,
        (Dense,): TunedDense,
        (Activation,): TunedPlain,
        (Subsample,): TunedPlain,
    },
)
