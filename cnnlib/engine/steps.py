"""The operators of a whole training step: their place in shared memory, and the generated source.

Stage tuned's kernels are device functions, one namespace a layer; a namespace `network` calls them
in order (kernels/tuned_step.cuh says for what).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cnnlib.engine.base import (
    Planned,
    Stage,
)
from cnnlib.engine.gpu import HEADERS, kernel_source
from cnnlib.errors import Unsupported

BLOCK = 512
"""Threads a block; a multiprocessor has one block."""
CHUNK = 64
"""Weights of a convolution that a block sums together: CHUNK of kernels/tuned_step.cuh."""
OWN_SECTIONS = ("INPUT", "LOSS", "LEAVE")
"""What a watched step tells apart besides its operators, forward and then backward."""
GROUP = 4
"""Floats: arrays in shared memory begin at multiples of it, and are copied four at once."""


def padded(floats: int) -> int:
    """Up to the next multiple of GROUP."""
    return math.ceil(floats / GROUP) * GROUP


@dataclass
class Room:
    """Shared memory of a block, given out from the beginning; places and sizes in floats."""

    size: int = 0
    common: dict[str, int] = field(default_factory=dict)
    """Arrays that several operators use one after the other: the size of the largest."""

    def take(self, floats: int) -> int:
        place = self.size
        self.size += padded(floats)
        return place

    def share(self, name: str, floats: int) -> None:
        self.common[name] = max(self.common.get(name, 0), floats)


class StepOperator(ABC):
    """Serves a run of layers within a step: device functions in a namespace of their own.

    A subclass names its `file` and its constants, and writes the calls of its functions, in which
    `shared` is the block's shared memory.
    """

    file: ClassVar[str]
    leaves_sums: ClassVar[bool] = False
    """Whether every block sums the gradient of its images and leaves it as a partial sum."""
    update_floats: ClassVar[int] = BLOCK
    """Shared memory that summing a part of the gradient takes."""
    held: bool = False
    """Whether the weights of a dense layer are in shared memory."""

    def __init__(self, planned: Planned, stage: Stage) -> None:
        self.planned, self.stage = planned, stage
        self.layer: Any = planned.layers[0]
        self.label = planned.network.layer_names[planned.start]
        own = [p for p in planned.network.parameters if planned.start <= p.layer < planned.stop]
        self.parameters = sum(p.size for p in own)
        self.offset = own[0].offset if own else 0

    @abstractmethod
    def constants(self) -> Mapping[str, int | str]:
        """Name -> value of each constant of the file; strings are enumerators."""

    @abstractmethod
    def lay_out(self, room: Room, places: "Places") -> None:
        """Take shared memory; `places` are those of the maps before and after."""

    def trace(self, place: int) -> int:
        """Floats of an image's trace that begin at `place` and belong to this operator."""
        return 0

    def hold(self) -> str:
        """Statements that fetch the weights when a step begins."""
        return ""

    @abstractmethod
    def forward(self) -> str: ...

    @abstractmethod
    def backward(self) -> str: ...

    def jobs(self) -> int:
        """Parts of the gradient that blocks sum one at a time."""
        return 0

    def sum_job(self) -> str:
        """Statement that sums part `job` and hands each weight's gradient to `done`."""
        return ""

    def unsupported(self, reason: str) -> Unsupported:
        return Unsupported(
            f"stage '{self.stage.name}' cannot take {self.planned.name} of network "
            f"'{self.planned.network.name}': {reason}"
        )


@dataclass(frozen=True)
class Places:
    """Where an operator's maps lie in shared memory; no errors of the images are kept."""

    source: int
    target: int
    source_errors: int | None
    target_errors: int


class StepPlan:
    """The operators of a network in order, the layout of shared memory, the generated source.

    Raises Unsupported where a network's maps and convolution weights do not fit a block.
    """

    def __init__(self, stage: Stage, planned: Sequence[Planned], shared_bytes: int) -> None:
        self.network = planned[0].network
        # The most is gained by holding all weights; the largest layers give way first.
        self.operators: list[StepOperator] = [p.operator(p, stage) for p in planned]
        give_way = sorted((o for o in self.operators if o.held), key=lambda o: o.parameters)
        while (room := self._lay_out()).size * 4 > shared_bytes and give_way:
            give_way.pop().held = False
        self.shared_bytes = room.size * 4
        if self.shared_bytes > shared_bytes:
            raise Unsupported(
                f"stage '{stage.name}' keeps an image's maps and the weights of convolutions in "
                f"shared memory, which takes {self.shared_bytes} of {shared_bytes} bytes for "
                f"network '{self.network.name}'"
            )
        self.trace = 0
        for operator in self.operators:
            self.trace += operator.trace(self.trace)
        self.trace = max(1, self.trace)
        self.partial_places: dict[str, int] = {}
        self.convolved = 0
        for operator in self.operators:
            if operator.leaves_sums:
                self.partial_places[operator.label] = self.convolved
                self.convolved += operator.parameters

    def _lay_out(self) -> Room:
        room, network = Room(), self.network
        room.share("scratch", 0)
        bounds = [o.planned.start for o in self.operators] + [len(network.layers)]
        sizes = [math.prod(network.shapes[i]) for i in bounds]
        maps = [room.take(size) for size in sizes]
        errors = [None, *(room.take(size) for size in sizes[1:])]
        self.image, self.logits, last = maps[0], maps[-1], errors[-1]
        assert last is not None
        self.errors = last
        for i, operator in enumerate(self.operators):
            target_errors = errors[i + 1]
            assert target_errors is not None
            operator.lay_out(room, Places(maps[i], maps[i + 1], errors[i], target_errors))
        self.common = {name: room.take(size) for name, size in room.common.items()}
        # The second phase needs nothing of the first: its arrays lie over all of these.
        room.size = max(room.size, padded(max(o.update_floats for o in self.operators)))
        return room

    def source(self) -> str:
        """The translation unit."""
        block = {"BLOCK": BLOCK}
        return "".join(
            [
                *[f'#include "{header}"\n' for header in (*HEADERS, "grid.cuh")],
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
            "IMAGE": self.image, "LOGITS": self.logits, "ERRORS": self.errors,
            "TRACE": self.trace, "CONVOLVED": self.convolved,
            "JOBS": sum(o.jobs() for o in self.operators),
            "SHARED_QUADS": self.shared_bytes // 16,
            **{name: i for i, name in enumerate(OWN_SECTIONS)},
        }  # fmt: skip
        first = len(OWN_SECTIONS)
        forward = range(first, first + len(self.operators))
        backward = range(forward.stop, forward.stop + len(self.operators))
        summed = [o for o in self.operators if o.label in self.partial_places]
        upwards = self.operators[::-1]
        function = "__device__ __forceinline__ void"
        return [
            "namespace network {",
            *[f"constexpr int {name} = {value};" for name, value in constants.items()],
            "struct Sums {",
            *[f"::{o.label}::Sums of_{o.label};" for o in summed],
            "};",
            f"{function} clear(Sums& sums) {{",
            *[f"::{o.label}::clear(sums.of_{o.label});" for o in summed],
            "}",
            f"{function} hold(const float* parameters, float* shared) {{",
            # dense layers first: the hardware copies them while the others are fetched by threads
            *[self._filled(o, o.hold()) for o in upwards],
            "}",
            "template <class Watch>",
            f"{function} forward(const float* parameters, float* shared, Watch& watch) {{",
            *[
                f"{self._filled(o, o.forward())}\n__syncthreads();\nwatch.mark({section});"
                for o, section in zip(self.operators, forward, strict=True)
            ],
            "}",
            "template <class Watch>",
            f"{function} backward(const float* parameters, float* shared, Sums& sums, "
            "float* trace, Watch& watch) {",
            *[
                f"{self._filled(o, o.backward())}\n__syncthreads();\nwatch.mark({section});"
                for o, section in zip(upwards, reversed(backward), strict=True)
            ],
            "}",
            f"{function} write_gradient(Sums& sums, float* shared, float* partial) {{",
            *[
                self._filled(
                    o, f"::{o.label}::write_gradient(sums.of_{o.label}, shared + {{scratch}}, "
                    "partial + {partial});\n__syncthreads();"
                )
                for o in summed
            ],
            "}",
            "template <class Done>",
            f"{function} sum_job(int job, const float* traces, const float* partials, int count, "
            "int groups, float* shared, Done done) {",
            *[
                f"if (job < {o.jobs()}) {{\n{self._filled(o, o.sum_job())}\nreturn;\n}}\n"
                f"job -= {o.jobs()};"
                for o in self.operators
                if o.jobs()
            ],
            "}",
            "}",
        ]  # fmt: skip

    def _filled(self, operator: StepOperator, text: str) -> str:
        """The text with the places that are known only now."""
        places = {**self.common, "partial": self.partial_places.get(operator.label, 0)}
        for name, place in places.items():
            text = text.replace(f"{{{name}}}", str(place))
        return text
