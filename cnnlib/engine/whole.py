"""The engine of stage tuned: whole training steps in one launch, the data set on the device.

A step has two phases (kernels/tuned_step.cuh). On a GPU a launch does as many steps as it is given,
with barriers of the whole grid between the phases; elsewhere each phase is a launch of its own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from cnnlib.device import Device, DeviceArray
from cnnlib.device.api import KernelError
from cnnlib.engine.base import (
    Bytes,
    KernelTime,
    Order,
    Part,
    Planned,
    Setup,
    Stage,
    batch_arithmetic,
)
from cnnlib.engine.gpu import HEADERS, DeviceEngine, Piece, kernel_source
from cnnlib.errors import Unsupported
from cnnlib.layers import Array
from cnnlib.network import FLOAT, Arithmetic

BLOCK = 512
"""Threads a block; a multiprocessor has one block."""
TRAIN, ONLY_FORWARD, GIVEN_ERRORS = range(3)
"""enum Mode of kernels/tuned_step.cuh."""
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


class WholeStepEngine(DeviceEngine):
    """Trains by operators that are StepOperators; each multiprocessor has one block."""

    def __init__(self, stage: Stage, setup: Setup, device: Device | None = None) -> None:
        super().__init__(stage, setup, device)
        assert device is not None, "a GPU stage needs a device"
        self.device = device
        self.steps = StepPlan(stage, self.plan, device.shared_bytes)
        self.grid = device.multiprocessors
        self.whole = device.kind == "cuda"
        kernels = ["step_take_images", "step_watch_images", "step_update"]
        kernels += ["step_train"] * self.whole
        self.module = device.compile(
            self.steps.source(), f"{stage.name}_{self.network.name}", kernels
        )
        self._allocate()

    def _allocate(self) -> None:
        batch, network = self.setup.batch_size, self.network
        self._parameters = self.array((network.parameter_count,))
        self._velocity = self.array((network.parameter_count,))
        self._velocity.fill_bytes(0)
        self._gradient = self.array((network.parameter_count,))
        self._traces = self.array((batch, self.steps.trace))
        self._partials = self.array((self.grid, max(1, self.steps.convolved)))
        self._outputs = self.array((batch, network.classes))
        self._losses = self.array((batch,))
        self._batch_images = self.array((batch, *network.input_shape), np.uint8)
        self._batch_labels = self.array((batch,), np.uint8)
        self._batch_order = self.array((batch,), np.int32)
        self._batch_order.set(np.arange(batch, dtype=np.int32))
        self._signals = self.array((2,), np.uint32)

    # Launches

    def _bind(self, kernel: str, *args: Any) -> Callable[[], None]:
        bound = self.module.kernel(f"step_{kernel}").bind(
            self.grid, BLOCK, *args, shared_bytes=self.steps.shared_bytes
        )
        return bound

    def _take_images(
        self, images: DeviceArray, labels: DeviceArray, order: DeviceArray, count: int, mode: int
    ) -> Callable[[], None]:
        return self._bind(
            "take_images", images, labels, order, self._parameters, self._traces, self._partials,
            self._outputs, self._losses, float(self.setup.mean), float(self.setup.deviation),
            count, mode,
        )  # fmt: skip

    def _update(self, count: int, apply: bool) -> Callable[[], None]:
        return self._bind(
            "update", self._parameters, self._traces, self._partials, self._velocity,
            self._gradient, float(self.setup.learning_rate), float(self.setup.momentum),
            int(apply), count,
        )  # fmt: skip

    def _train_steps(self, order: DeviceArray, steps: int) -> None:
        """`steps` steps on the batches of `order`, which index the resident images."""
        batch = self.setup.batch_size
        if not self.whole:
            update = self._update(batch, apply=True)
            for step in range(steps):
                part = order.part(step * batch, (batch,))
                self._take_images(self._images, self._labels, part, batch, TRAIN)()
                update()
            return
        self._signals.fill_bytes(0)
        self._bind(
            "train", self._images, self._labels, order, self._parameters, self._traces,
            self._partials, self._outputs, self._losses, float(self.setup.mean),
            float(self.setup.deviation), batch, self._velocity, self._gradient,
            float(self.setup.learning_rate), float(self.setup.momentum), steps,
            self._signals.part(0, (1,)), self._signals.part(1, (1,)),
        )()  # fmt: skip

    def _check_signals(self) -> None:
        if self.whole and self._signals.get()[1]:
            raise KernelError(
                f"stage '{self.stage.name}': blocks of one launch waited in vain for each other; "
                f"another program keeps some of the {self.grid} multiprocessors to itself"
            )

    # Engine

    def load(self, images: Bytes, labels: Bytes) -> None:
        batch, resident = self.setup.batch_size, self.setup.resident_images
        bytes_each = math.prod(self.network.input_shape) + 1
        fits = self.device.free_bytes() // 2 // bytes_each
        wanted = max(fits, batch) if resident == "auto" else resident
        count = len(labels)
        self._all = wanted >= count
        if not self._all:
            count = max(batch, min(wanted, count) // batch * batch)
        self._count = count
        self._images = self.array((count, *self.network.input_shape), np.uint8)
        self._labels = self.array((count,), np.uint8)
        self._order = self.array((max(count, len(labels)),), np.int32)
        if self._all:
            self._images.set(np.ascontiguousarray(images))
            self._labels.set(np.ascontiguousarray(labels))
            return
        self._host = images, labels
        self._host_images = self.device.pinned((count, *self.network.input_shape), np.uint8)
        self._host_labels = self.device.pinned((count,), np.uint8)
        self._order.set(np.arange(self._order.size, dtype=np.int32))

    def _train(self, order: Order, pieces: list[Piece] | None) -> float:
        batch = self.setup.batch_size
        images = len(order) // batch * batch
        self._losses.fill_bytes(0)
        began, ended = self.device.event(), self.device.event()
        began.record()
        load = max(batch, (images if self._all else self._count) // batch * batch)
        for start in range(0, images, load):
            part = order[start : min(start + load, images)]
            piece = Piece(self.device) if pieces is not None else None
            if start:
                # the pinned memory may be filled again only when its images have gone up
                self.device.synchronize()
            if not self._all:
                self._gather(part)
            if piece:
                piece.end_gather()
            self._upload_load(part)
            if piece:
                piece.uploaded.record()
            self._train_steps(self._order, len(part) // batch)
            if piece and pieces is not None:
                piece.trained.record()
                pieces.append(piece)
        ended.record()
        losses = self._losses.get()
        self._check_signals()
        self.event_seconds = ended.seconds_since(began)
        return float(losses.sum(dtype=np.float64) / images)

    def _gather(self, order: Order) -> None:
        images, labels = self._host
        np.take(images, order, axis=0, out=self._host_images[: len(order)], mode="clip")
        np.take(labels, order, axis=0, out=self._host_labels[: len(order)], mode="clip")

    def _upload_load(self, order: Order) -> None:
        """Where all images are there only their order goes up; else the images, in order."""
        count = len(order)
        if self._all:
            self._order.part(0, (count,)).set(np.ascontiguousarray(order, dtype=np.int32))
            return
        shape = (count, *self.network.input_shape)
        self._images.part(0, shape).set(self._host_images[:count])
        self._labels.part(0, (count,)).set(self._host_labels[:count])

    def _run_batch(self, images: Bytes, count: int, mode: int) -> None:
        self._batch_images.part(0, images.shape).set(np.ascontiguousarray(images))
        self._take_images(
            self._batch_images, self._batch_labels, self._batch_order, count, mode
        )()  # fmt: skip
        if mode != ONLY_FORWARD:
            self._update(count, apply=False)()

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        count = len(labels)
        self._losses.fill_bytes(0)
        self._batch_labels.part(0, (count,)).set(np.ascontiguousarray(labels))
        self._run_batch(images, count, TRAIN)
        losses = self._losses.get()[:count]
        return float(losses.sum(dtype=np.float64) / count), self._gradient.get()

    def backward(self, images: Bytes, output_error: Array) -> Array:
        errors = np.ascontiguousarray(output_error, dtype=np.float32)
        self._outputs.part(0, errors.shape).set(errors)
        self._run_batch(images, len(images), GIVEN_ERRORS)
        return self._gradient.get()

    def logits(self, images: Bytes) -> Array:
        batch, classes = self.setup.batch_size, self.network.classes
        outputs = np.empty((len(images), classes), np.float32)
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            self._run_batch(part, len(part), ONLY_FORWARD)
            outputs[start : start + batch] = self._outputs.part(0, (len(part), classes)).get()
        return outputs

    def profile(self) -> list[KernelTime]:
        """The sections of the first phase by the first block's own clock, and the second phase.

        A section's share of that block's time is taken for its share of the whole phase, which is
        timed as launches in a row are.
        """
        saved = self.parameters, self.velocity
        args = self._images, self._labels, self._batch_order, self.setup.batch_size
        phase = self._time(self._take_images(*args, TRAIN))
        update = self._time(self._update(self.setup.batch_size, apply=True))
        shares = self._watch(args)
        self.parameters, self.velocity = saved
        return [
            *(
                KernelTime(
                    name.partition("+")[0], kernel, name, part, *least, self.grid, 1, phase * share
                )
                for (name, kernel, part, least), share in zip(self._sections(), shares, strict=True)
            ),
            KernelTime(
                "batch", "update", "batch", "update", *batch_arithmetic(self.setup, "update"),
                self.grid, 1, update,
            ),
        ]  # fmt: skip

    def _sections(self) -> list[tuple[str, str, Part, Arithmetic]]:
        """What a watched step tells apart: layers, name, part and the least it takes."""
        batch = self.setup.batch_size
        nothing = Arithmetic(0, FLOAT * self.grid * self.steps.convolved)
        found: list[tuple[str, str, Part, Arithmetic]] = [
            ("batch", "input", "input", batch_arithmetic(self.setup, "input")),
            ("batch", "loss", "loss", batch_arithmetic(self.setup, "loss")),
            ("batch", "leave_gradient", "update", nothing),
        ]
        directions: tuple[Part, Part] = ("forward", "backward")
        for part in directions:
            for planned in self.plan:
                found.append((planned.name, part, part, planned.arithmetic(part, batch)))
        return found

    def _watch(self, args: tuple[DeviceArray, DeviceArray, DeviceArray, int]) -> list[float]:
        """Share of the first phase that each section takes; the last of two steps counts."""
        spent = self.array((len(self._sections()),), np.uint64)
        images, labels, order, count = args
        run = self._bind(
            "watch_images", images, labels, order, self._parameters, self._traces, self._partials,
            self._outputs, self._losses, float(self.setup.mean), float(self.setup.deviation),
            count, spent,
        )  # fmt: skip
        for _ in range(2):
            spent.fill_bytes(0)
            run()
        ticks = spent.get().astype(np.float64)
        return list(ticks / ticks.sum())

    def _time(self, run: Callable[[], None], times: int = 20) -> float:
        """Seconds of one launch: the mean of several in a row."""
        began, ended = self.device.event(), self.device.event()
        run()
        times = times if self.device.kind == "cuda" else 1
        began.record()
        for _ in range(times):
            run()
        ended.record()
        self.device.synchronize()
        return ended.seconds_since(began) / times
