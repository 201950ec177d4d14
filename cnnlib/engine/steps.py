"""The operators of a whole training step: their place in shared memory, and the generated source.

Stage tuned's kernels are device functions, one namespace a layer; a namespace `network` calls them
in order (kernels/tuned_step.cuh says for what).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cnnlib.engine.source import HEADERS, kernel_source
from cnnlib.engine.stage import Planned, Stage
from cnnlib.errors import Unsupported
from cnnlib.layers import Dense


@dataclass(frozen=True)
class Threads:
    """How a block's threads are used; a multiprocessor has one block."""

    block: int
    teams: int = 1
    """Each takes images of its own through the convolutions."""

    @property
    def team(self) -> int:
        return self.block // self.teams

    @property
    def warps(self) -> int:
        """Of a team."""
        return self.team // 32


CHUNK = 64
"""Weights of a convolution that a block sums together: CHUNK of kernels/tuned_sum.cuh."""
LEAST_STAGES, MOST_STAGES = 2, 8
"""Of the second phase (StepOperator.stages)."""
PLACES = 2
"""Images whose maps a team has in shared memory where a block takes several together."""
OWN_SECTIONS = ("INPUT", "LOSS", "LEAVE")
"""What a watched step tells apart besides its operators, forward and then backward."""
STEP_HEADERS = ("grid.cuh", "tensor.cuh", "team.cuh")
GROUP = 4
"""Floats: arrays in shared memory begin at multiples of it, and are copied four at once."""


ONE_TEAM = Threads(256)
INSTEAD = "use stage 'ring'"
"""What to do with a network that does not fit: that stage keeps only a window of rows on chip."""
SECTOR = 8
"""Floats that device memory moves at once; arrays of a trace begin at multiples of it."""


def sectors(floats: int) -> int:
    """Up to the next multiple of SECTOR."""
    return math.ceil(floats / SECTOR) * SECTOR


def padded(floats: int) -> int:
    """Up to the next multiple of GROUP."""
    return math.ceil(floats / GROUP) * GROUP


@dataclass
class Room:
    """Shared memory of a block, given out from the beginning; places and sizes in floats."""

    size: int = 0

    def take(self, floats: int) -> int:
        place = self.size
        self.size += padded(floats)
        return place


@dataclass(frozen=True)
class Map:
    """Where a map, or its errors, lie in shared memory; floats."""

    place: int
    pitch: int = 0
    """From an image's to the next one's, where the block takes several together; 0: one image."""
    turn: int = 0
    """From an image's to the next one's, where they lie in `turns` places by turns; 0: in one."""
    turns: int = 1

    @property
    def all(self) -> str:
        return f"shared + {self.place}"

    @property
    def one(self) -> str:
        """Of image `slot` of those that the block takes together."""
        if self.turn:
            return f"{self.all} + slot % {self.turns} * {self.turn}"
        return f"{self.all} + slot * {self.pitch}" if self.pitch else self.all


@dataclass(frozen=True)
class Places:
    """An operator's maps; no errors of the images are kept."""

    source: Map
    target: Map
    source_errors: Map | None
    target_errors: Map


class StepOperator(ABC):
    """Serves a run of layers within a step: device functions in a namespace of their own.

    A subclass names its `file` and its constants, and writes the calls of its functions, in which
    `shared` is the block's shared memory. Up to the first operator that `takes_all` images of a
    block together, each takes image `slot` alone.
    """

    file: ClassVar[str]
    takes_all: ClassVar[bool] = False
    takes_bytes: ClassVar[bool] = False
    """Whether it takes the image's bytes, as words of two neighbours, where it is the first."""
    leaves_sums: ClassVar[bool] = False
    """Whether every block sums the gradient of its images and leaves it as a partial sum."""
    used_raw: ClassVar[bool] = False
    """Whether a convolution's weights are used as they lie in device memory."""
    weights: int
    """Where they are in shared memory."""
    held: bool = False
    """Whether the weights of a dense layer are in shared memory."""
    places: Places
    stages: int
    """How many pieces of what it sums in the second phase are on their way at once; even."""

    def __init__(self, planned: Planned, stage: Stage, threads: Threads, images: int) -> None:
        self.planned, self.stage, self.threads = planned, stage, threads
        self.images = images
        """How many a block takes together."""
        self.layer: Any = planned.layers[0]
        self.label = planned.network.layer_names[planned.start]
        own = [p for p in planned.network.parameters if planned.start <= p.layer < planned.stop]
        self.parameters = sum(p.size for p in own)
        self.offset = own[0].offset if own else 0

    @abstractmethod
    def constants(self) -> Mapping[str, int | str]:
        """Name -> value of each constant of the file; strings are enumerators."""

    def keep(self, room: Room, turn: int, turns: int) -> None:
        """Take shared memory for what an image leaves forward and needs again backward."""

    def lay_out(self, room: Room) -> None:
        """Take shared memory for weights."""

    def keep_always(self, room: Room) -> None:
        """Take shared memory for what is made when a launch begins and stays until it ends."""

    def prepare(self) -> str:
        """Statement that makes it."""
        return ""

    def work(self) -> int:
        """Floats of shared memory, from {work} on, that nobody else uses meanwhile."""
        return 0

    def last_work(self) -> int:
        """The same from {last} on, when no image is left."""
        return 0

    def update_work(self, stages: int) -> int:
        """The same from 0 on in the second phase, with `stages` pieces on their way at once."""
        return 0

    @property
    def raw_floats(self) -> int:
        """Of a convolution's parameters as they are, from a 16-byte boundary to another."""
        return padded(self.offset % GROUP + self.parameters) if self.leaves_sums else 0

    def trace(self, place: int) -> int:
        """Floats of an image's trace that begin at `place` and belong to this operator."""
        return 0

    def hold(self) -> str:
        """Statement of all threads that fetches the weights when a step begins."""
        return ""

    def hold_whole(self) -> str:
        """The same of one thread alone, for what the hardware copies by itself."""
        return ""

    @abstractmethod
    def forward(self) -> str: ...

    @abstractmethod
    def backward(self) -> str: ...

    def put_gradient(self) -> str:
        """Statement that puts the threads' sums together at {last}, if the operator leaves any."""
        return ""

    def write_gradient(self) -> str:
        """Statement that leaves a partial sum in `partial`, if the operator leaves any."""
        return ""

    def jobs(self) -> int:
        """Parts of the gradient that blocks sum one at a time."""
        return 0

    def sum_job(self) -> str:
        """Statement that sums part `job` and changes its weights."""
        return ""

    def unsupported(self, reason: str) -> Unsupported:
        return Unsupported(
            f"stage '{self.stage.name}' cannot take {self.planned.name} of network "
            f"'{self.planned.network.name}': {reason}; {INSTEAD}"
        )


def pitch_of(floats: int) -> int:
    """Of rows of at least so many, so that eight rows' neighbours lie in different banks.

    Rows are read four floats wide eight at a time, or eight floats wide four at a time; both are
    free of conflicts where rows begin an odd multiple of eight banks apart.
    """
    return math.ceil((padded(floats) - GROUP * 2) / (GROUP * 4)) * GROUP * 4 + GROUP * 2


class StepPlan:
    """The operators of a network in order, the layout of shared memory, the generated source.

    A block takes `images` together where the network lets it. Raises Unsupported where a network's
    maps and convolution weights do not fit a block.
    """

    def __init__(
        self,
        stage: Stage,
        planned: Sequence[Planned],
        shared_bytes: int,
        images: int = 1,
        threads: Threads = ONE_TEAM,
    ) -> None:
        self.network = planned[0].network
        dense = any(isinstance(layer, Dense) for layer in self.network.layers)
        self.images = images if dense else 1
        self.threads = threads if self.images % threads.teams == 0 else Threads(threads.block)
        self.operators: list[StepOperator] = [
            p.operator(p, stage, self.threads, self.images) for p in planned
        ]
        takes_all = [i for i, operator in enumerate(self.operators) if operator.takes_all]
        self.first_all = takes_all[0] if takes_all else len(self.operators)
        # The most is gained by holding all weights; the largest layers give way first.
        give_way = sorted((o for o in self.operators if o.held), key=lambda o: o.parameters)
        while (room := self._lay_out(shared_bytes)).size * 4 > shared_bytes and give_way:
            give_way.pop().held = False
        self.shared_bytes = room.size * 4
        if self.shared_bytes > shared_bytes:
            convolved = sum(o.parameters for o in self.operators if o.leaves_sums)
            raise Unsupported(
                f"stage '{stage.name}' keeps an image's maps and the weights of convolutions in "
                f"shared memory: those of network '{self.network.name}' ({convolved:,} weights, "
                f"{sum(map(math.prod, self.network.shapes)):,} numbers in its maps) need "
                f"{self.shared_bytes:,} bytes, and a block may have {shared_bytes:,}; {INSTEAD}"
            )
        self.trace = 0
        for operator in self.operators:
            self.trace += operator.trace(self.trace)
        self.trace = max(SECTOR, self.trace)
        self.partial_places: dict[str, int] = {}
        self.convolved = 0
        for operator in self.operators:
            if operator.leaves_sums:
                self.partial_places[operator.label] = self.convolved
                self.convolved += operator.parameters

    def _lay_out(self, shared_bytes: int) -> Room:
        room, network, first = Room(), self.network, self.first_all
        bounds = [o.planned.start for o in self.operators] + [len(network.layers)]
        sizes = [math.prod(network.shapes[i]) for i in bounds]

        def several(size: int) -> Map:
            pitch = pitch_of(size)
            return Map(room.take(pitch * self.images), pitch)

        # What is kept of one image comes first, so that its size is known: it lies there by turns.
        one = Room()
        for size in sizes[:first]:
            one.take(size)
        for operator in self.operators[:first]:
            operator.keep(one, 0, 1)
        self.kept = one.size
        teams = self.threads.teams
        self.turns = PLACES * teams if self.images > 1 else 1
        turn = (self.kept if self.turns > 1 else 0), self.turns
        maps = [Map(room.take(size), 0, *turn) for size in sizes[:first]]
        for operator in self.operators[:first]:
            operator.keep(room, *turn)
        room.take(self.kept * (self.turns - 1))

        def by_team(size: int) -> Map:
            return Map(room.take(padded(size) * teams), 0, padded(size) if teams > 1 else 0, teams)

        maps += [several(size) for size in sizes[first:]]
        errors: list[Map | None] = [None]
        errors += [by_team(size) for size in sizes[1:first]]
        errors += [several(size) for size in sizes[max(1, first) :]]
        self.labels = room.take(self.images)
        for i, operator in enumerate(self.operators):
            target_errors = errors[i + 1]
            assert target_errors is not None
            operator.places = Places(maps[i], maps[i + 1], errors[i], target_errors)
            if i >= first:
                operator.keep(room, 0, 1)
            operator.lay_out(room)
        self.image, self.logits = maps[0], maps[-1]
        assert errors[-1] is not None
        self.errors = errors[-1]
        raw = sum(o.raw_floats for o in self.operators)
        one_work = padded(max((o.work() for o in self.operators[:first]), default=0))
        all_work = max(raw, one_work * teams, *(o.work() for o in self.operators))
        self.work = Map(room.take(all_work), 0, one_work if teams > 1 else 0, teams)
        # From here on nothing of the images is needed: arrays lie over all of these.
        last = Room()
        self.last_places = {o.label: last.take(o.last_work()) for o in self.operators}

        def update_work(stages: int) -> int:
            return max(self.threads.block, *(o.update_work(stages) for o in self.operators))

        # Behind all of these is what no phase may touch.
        always = Room(GROUP)
        for operator in self.operators:
            operator.keep_always(always)
        stages = LEAST_STAGES
        while (
            stages < MOST_STAGES
            and (padded(update_work(stages + 2)) + always.size) * 4 <= shared_bytes
        ):
            stages += 2
        room.size = max(room.size, last.size, padded(update_work(stages)))
        self.arrivals = room.take(GROUP)
        for operator in self.operators:
            operator.stages = stages
            operator.keep_always(room)
        return room

    def source(self) -> str:
        """The translation unit."""
        block = {"BLOCK": self.threads.block, "TEAM": self.threads.team}
        return "".join(
            [
                f"constexpr int TEAM = {self.threads.team}, TEAMS = {self.threads.teams};\n",
                *[f'#include "{header}"\n' for header in HEADERS + STEP_HEADERS],
                *[
                    kernel_source(o.label, o.file, {**o.constants(), **block})
                    for o in self.operators
                ],
                kernel_source("convolved", "tuned_sum.cuh", block),
                "\n".join(self._network()),
                "\n",
                kernel_source("step", "tuned_step.cuh", block),
            ]
        )  # fmt: skip

    def _network(self) -> list[str]:
        """The namespace `network`: the operators' calls, one after the other."""
        constants = {
            "IMAGE_SIZE": math.prod(self.network.input_shape), "CLASSES": self.network.classes,
            "IMAGES": self.images, "LABELS": self.labels,
            "LOGITS": self.logits.place, "ERRORS": self.errors.place,
            "BYTES": int(self.operators[0].takes_bytes), "CLASS_PITCH": self.logits.pitch,
            "KEPT": self.kept, "PLACES": self.turns, "ARRIVALS": self.arrivals,
            "TRACE": self.trace, "CONVOLVED": self.convolved,
            "JOBS": sum(o.jobs() for o in self.operators),
            "SHARED_QUADS": self.shared_bytes // 16,
            **{name: i for i, name in enumerate(OWN_SECTIONS)},
        }  # fmt: skip
        summed = [o for o in self.operators if o.label in self.partial_places]
        function = "__device__ __forceinline__ void"
        everyone = "const float* parameters, float* shared"
        forward_marks = range(len(OWN_SECTIONS), len(OWN_SECTIONS) + len(self.operators))
        marks = dict(zip((o.label for o in self.operators), forward_marks, strict=True))

        def calls(operators: Sequence[StepOperator], back: bool, one: bool) -> list[str]:
            return [
                f"{self._filled(o.backward() if back else o.forward(), one=one)}\n"
                f"{'team_barrier' if one else '__syncthreads'}();\n"
                f"watch.mark({marks[o.label] + back * len(self.operators)});"
                for o in (operators[::-1] if back else operators)
            ]

        singles, together = self.operators[: self.first_all], self.operators[self.first_all :]
        return [
            "namespace network {",
            *[f"constexpr int {name} = {value};" for name, value in constants.items()],
            "__device__ __forceinline__ float* image_of(float* shared, int slot) {",
            f"return {self.image.one};",
            "}",
            "struct Sums {",
            *[f"::{o.label}::Sums of_{o.label};" for o in summed],
            "};",
            f"{function} clear(Sums& sums) {{",
            *[f"::{o.label}::clear(sums.of_{o.label});" for o in summed],
            "}",
            f"{function} prepare(float* shared) {{",
            *[operator.prepare() for operator in self.operators],
            "}",
            f"{function} hold({everyone}, float mean, float deviation, "
            "BulkCopyBarrier& arrivals) {",
            *self._hold(),
            "}",
            "template <class Watch>",
            f"{function} forward_one(float* shared, int slot, float deviation, Watch& watch) {{",
            *calls(singles, back=False, one=True),
            "}",
            "template <class Watch>",
            f"{function} forward_all({everyone}, BulkCopyBarrier& arrivals, Watch& watch) {{",
            "wait_for_bulk_copies(arrivals);",
            "wait_for_copies();",
            *calls(together, back=False, one=False),
            "}",
            "template <class Watch>",
            f"{function} backward_all({everyone}, float* trace, int stride, int here, "
            "Watch& watch) {",
            *calls(together, back=True, one=False),
            "}",
            "template <class Watch>",
            f"{function} backward_one(float* shared, Sums& sums, int slot, Watch& watch) {{",
            *calls(singles, back=True, one=True),
            "}",
            f"{function} write_gradient(Sums& sums, float* shared, float* partials, float mean, "
            "float deviation) {",
            *[
                self._filled(o.put_gradient(), o.label)
                for o in summed
            ],
            *(["__syncthreads();"] if summed else []),
            *[
                f"{{\nfloat* partial = partials + {self.partial_places[o.label]};\n"
                f"{self._filled(o.write_gradient(), o.label)}\n}}"
                for o in summed
            ],
            *(["__syncthreads();"] if summed else []),
            "}",
            "template <class Weights>",
            f"{function} sum_job(int job, const float* traces, const float* partials, int count, "
            "int groups, float* shared, const Weights& weights) {",
            *[
                f"if (job < {o.jobs()}) {{\n{self._filled(o.sum_job(), o.label)}\nreturn;\n}}\n"
                f"job -= {o.jobs()};"
                for o in self.operators
                if o.jobs()
            ],
            "}",
            "}",
        ]  # fmt: skip

    def _hold(self) -> list[str]:
        """Statements that fetch the weights: convolutions' are waited for, dense layers' are on
        their way while convolutions work.
        """
        raw = [o for o in self.operators if o.raw_floats]
        rows = [o for o in self.operators if o.held]
        places, place = {}, self.work.place
        for operator in raw:
            # what is used as it comes goes where it is used
            direct = operator.weights - operator.offset % GROUP
            places[operator.label] = direct if operator.used_raw else place
            place += 0 if operator.used_raw else operator.raw_floats
        text = [
            f"copy_float4s(shared + {places[operator.label]}, parameters + "
            f"{operator.offset - operator.offset % GROUP}, {operator.raw_floats // GROUP});"
            for operator in raw
        ]
        text.append("end_group_of_copies();")
        if rows:
            sizes = " + ".join(f"::{o.label}::WHOLE_BYTES" for o in rows)
            text += [
                f"arrivals.pending = {sizes} > 0;",
                "if (arrivals.pending && threadIdx.x == 0) {",
            ]
            text += ["fence_async_proxy();", f"expect_bytes(arrivals, {sizes});"]
            text += [operator.hold_whole() for operator in rows]
            text += ["}", *[operator.hold() for operator in rows]]
        text.append("end_group_of_copies();")
        if raw:
            text += ["wait_for_groups<1>();", "__syncthreads();"]
            text += [
                operator.hold().replace(
                    "{raw}", str(places[operator.label] + operator.offset % GROUP)
                )
                for operator in raw
            ]
            if self.threads.teams > 1:  # which do not wait for each other before the first image
                text.append("__syncthreads();")
        return text

    def _filled(self, text: str, label: str = "", one: bool = False) -> str:
        """The text with the places that are known only now; `one`: of an image alone."""
        work = self.work.one if one else self.work.all
        text = text.replace("shared + {work}", work)
        text = text.replace("{last}", str(self.last_places.get(label, 0)))
        return text.replace("{partial}", str(self.partial_places.get(label, 0)))
