"""The engine of the GPU stages: device buffers, generated source, and a step as a list of launches.

Everything happens on the device: forward, loss, backward, update. Images go up as bytes, one loss
an epoch comes down. Stages differ in their operators alone.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Argument, Device, DeviceArray, Limits, Module
from cnnlib.engine.base import Engine
from cnnlib.engine.profile import KernelTime
from cnnlib.engine.source import KernelSource, translation_unit
from cnnlib.engine.stage import (
    Bytes,
    Op,
    Options,
    Order,
    Part,
    Planned,
    Setup,
    Stage,
    batch_arithmetic,
    options_of,
    plan,
)
from cnnlib.engine.upload import (
    LoadTimer,
    LoadTimes,
    ResidentImages,
    device_array,
    resident_limit,
)
from cnnlib.errors import Unsupported
from cnnlib.layers import Array
from cnnlib.network import Network

THREADS = 256
"""Threads a block, in every kernel."""
BLOCKS_PER_MULTIPROCESSOR = 8
"""Upper bound of a grid: 2048 resident threads fill a multiprocessor; grids stride over more."""
SUM_THREADS = 8
"""Threads that add up one weight's partial sums, where there are many."""
FEW_GROUPS = 8
"""Partial sums that one thread adds up by itself."""
PROFILE_SECONDS = 0.01
"""Time spent on each kernel of a profile, about."""
PROFILE_LAUNCHES = 256
"""Launches of a kernel in a row, at most; many, so that the first one's latency does not count."""


class Launch(NamedTuple):
    """One kernel launch: everything but the moment, which is a call of `run`."""

    layer: str
    kernel: str
    grid: int
    run: Callable[[], None]


@dataclass(frozen=True)
class GpuOptions(Options):
    """What variants of a GPU stage can choose without operators of their own."""

    errors: Literal["push", "pull"] = "push"
    """How errors go back through a fused convolution: each error of the target is added to all
    elements of the source that it came from, or each element of the source collects its errors.
    """
    error_slots: int | None = None
    """Buffers of error maps, used in turn, each as large as its largest map. None: as many as
    there are operators.
    """


@dataclass
class Buffers:
    """Where one operator reads and writes on the device.

    source (batch, *source_shape), target (batch, *target_shape) and their errors of the same sizes;
    `source_errors` is None for the first operator. `parameters` and `gradients` map the operator's
    parameters ("weight", "bias", by layer index) to parts of the two flat vectors.
    """

    source: DeviceArray
    target: DeviceArray
    source_errors: DeviceArray | None
    target_errors: DeviceArray
    parameters: list[dict[str, DeviceArray]]
    gradients: list[dict[str, DeviceArray]]
    partials: DeviceArray | None
    """(groups, parameters) for an operator that leaves its gradient as partial sums."""

    @property
    def partial_sums(self) -> DeviceArray:
        """`partials` of an operator that leaves some; TypeError for others."""
        if self.partials is None:
            raise TypeError("an operator whose partial_groups are 0 leaves no partial sums")
        return self.partials


class GpuOperator(ABC):
    """Serves a run of layers by kernels of one file of kernels/.

    A subclass names its `file`, the `kernels` in it and the constants the file needs, and says
    which launches make a forward and a backward pass over `count` images.
    """

    file: ClassVar[str]
    kernels: ClassVar[tuple[str, ...]]

    device: Device
    """Where the operator's kernels run, once it is bound."""

    def __init__(self, planned: Planned, stage: Stage, limits: Limits) -> None:
        self.planned = planned
        self.stage = stage
        self.limits = limits
        self.label = planned.network.layer_names[planned.start]
        self.check()

    def check(self) -> None:
        """Raise Unsupported, naming layer and limit, for sizes this operator cannot take."""

    @abstractmethod
    def constants(self) -> Mapping[str, int | str]:
        """Name -> value of each constant of the kernel file; strings are enumerators."""

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        return device_array(self.device, shape, dtype)

    def partial_groups(self, batch_size: int) -> int:
        """Partial sums that the backward pass leaves of the gradient; 0: it writes the whole."""
        return 0

    def allocate(self, batch_size: int) -> None:
        """Make the operator's own scratch arrays on the device."""

    @abstractmethod
    def forward(self, count: int) -> list[Launch]: ...

    @abstractmethod
    def backward(self, count: int) -> list[Launch]: ...

    def bind(self, device: Device, module: Module, buffers: Buffers, batch_size: int) -> None:
        """Take the compiled kernels and the buffers; called once, before any launch is made."""
        self.device, self.module, self.buffers = device, module, buffers
        self.allocate(batch_size)

    def source(self) -> KernelSource:
        """This operator's part of the generated translation unit."""
        return KernelSource(self.label, self.file, self.constants())

    def entry_points(self) -> list[str]:
        return [f"{self.label}_{kernel}" for kernel in self.kernels]

    def launch(self, kernel: str, elements: int, *args: Argument) -> Launch:
        """Launch of `kernel` with enough blocks for one thread per element, up to a full device."""
        return self.launch_blocks(kernel, ceil_div(elements, THREADS), *args)

    def launch_blocks(
        self, kernel: str, blocks: int, *args: Argument, shared_bytes: int = 0
    ) -> Launch:
        """Launch of `kernel` with `blocks` blocks, or a full device: kernels stride over more."""
        return bound_launch(
            self.device, self.module, self.label, kernel, blocks, args, shared_bytes
        )

    def compared(self, count: int) -> list[Launch]:
        """Launches that no step makes, timed by `profile` to be compared with those it does."""
        return []

    def unsupported(self, reason: str) -> Unsupported:
        return Unsupported(
            f"stage '{self.stage.name}' cannot take {self.planned.name} of network "
            f"'{self.planned.network.name}': {reason}"
        )


class GpuFactory(Protocol):
    """What a stage's record holds for a run of layers: mostly a class of GpuOperators."""

    def __call__(self, planned: Planned, stage: Stage, limits: Limits, /) -> GpuOperator: ...


def bound_launch(
    device: Device,
    module: Module,
    layer: str,
    kernel: str,
    blocks: int,
    args: Sequence[Argument],
    shared_bytes: int = 0,
) -> Launch:
    """A launch of up to `blocks` blocks of THREADS threads, never more than fill the device."""
    grid = max(1, min(blocks, device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR))
    bound = module.kernel(f"{layer}_{kernel}").bind(grid, THREADS, *args, shared_bytes=shared_bytes)
    return Launch(layer, kernel, grid, bound)


class DeviceEngine(Engine[Op]):
    """What engines of GPU stages share: state on the device, and a look at where training goes."""

    device: Device
    resident: int | None = None
    """Images on the device at a time, once a training set is loaded."""

    @classmethod
    def kernels_on(cls, stage: Stage[Op], setup: Setup, limits: Limits) -> list[str]:
        """Names of the kernels that are launched of what source_on gives for these arguments."""
        raise Unsupported(f"stage '{stage.name}' has no generated source")

    @property
    def choices(self) -> Mapping[str, object]:
        return {"resident_images": self.resident}

    def _allocate_state(self) -> None:
        """Parameters, velocity and gradient, and what one batch brings: images, labels, losses."""
        batch, network = self.setup.batch_size, self.network
        self._parameters = self.array((network.parameter_count,))
        self._velocity = self.array((network.parameter_count,))
        self._velocity.fill_bytes(0)
        self._gradient = self.array((network.parameter_count,))
        self._losses = self.array((batch,))
        self._batch_images = self.array((batch, *network.input_shape), np.uint8)
        self._batch_labels = self.array((batch,), np.uint8)
        self._allocate_rates(1)

    def _allocate_rates(self, steps: int) -> None:
        """Room for the learning rates of the steps of a load; constant so far."""
        self._rates, self._last_rates = self.array((steps,)), np.zeros(0)
        self._upload_rates(self.rates_of(steps, None))

    def _upload_rates(self, rates: Array) -> None:
        """The learning rates (steps,) of the next steps, unless the device has them from before."""
        if np.array_equal(rates, self._last_rates[: len(rates)]):
            return
        self._rates.part(0, (len(rates),)).set(np.ascontiguousarray(rates, dtype=np.float32))
        self._last_rates = rates.copy()

    def _resident_limit(self) -> int:
        """Images that may be on the device at a time, where that is at least a batch."""
        image_bytes = math.prod(self.network.input_shape)
        return resident_limit(self.device, self.setup.resident_images, image_bytes)

    def _time(self, run: Callable[[], None]) -> float:
        """Seconds of one launch: the mean over as many in a row as PROFILE_SECONDS allow."""
        began, ended = self.device.event(), self.device.event()
        count = 1
        while True:
            began.record()
            for _ in range(count):
                run()
            ended.record()
            self.device.synchronize()
            seconds = ended.seconds_since(began)
            if seconds > PROFILE_SECONDS / 4 or count >= PROFILE_LAUNCHES:
                return seconds / count
            count *= 4

    @abstractmethod
    def _train(self, order: Order, rates: Array, timer: LoadTimer | None) -> float:
        """Train on the batches of `order` at `rates`, one a step; returns the mean loss.

        With `timer`, the moments of every piece of the images are recorded.
        """

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """A device array that kernels can index."""
        return device_array(self.device, shape, dtype)

    def train(self, order: Order, rates: Array | None = None) -> float:
        steps = len(order) // self.setup.batch_size
        return self._train(order, self.rates_of(steps, rates), None)

    def train_timed(self, order: Order) -> LoadTimes:
        """Train as `train` does and measure where the time goes, which takes a little more."""
        timer = LoadTimer(self.device)
        steps = len(order) // self.setup.batch_size
        began = time.perf_counter()
        self._train(order, self.rates_of(steps, None), timer)
        return timer.times(time.perf_counter() - began)

    @property
    def parameters(self) -> Array:
        return self._parameters.get()

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._parameters.set(np.ascontiguousarray(vector, dtype=np.float32))

    @property
    def velocity(self) -> Array:
        return self._velocity.get()

    @velocity.setter
    def velocity(self, vector: Array) -> None:
        self._velocity.set(np.ascontiguousarray(vector, dtype=np.float32))


class GpuEngine(DeviceEngine[GpuFactory]):
    """Buffers in a chain, one map and one error map between every two operators."""

    BATCH = "batch"
    BATCH_KERNELS = (
        "normalize_images", "softmax_cross_entropy", "update_parameters", "sum_and_update",
    )  # fmt: skip

    options_class = GpuOptions

    def __init__(self, stage: Stage[GpuFactory], setup: Setup, device: Device) -> None:
        super().__init__(stage, setup, device)
        self.device = device
        self.operators: list[GpuOperator] = self.operators_on(stage, setup, device)
        self.module = self._compile()
        self._allocate()
        self._steps: dict[int, list[Launch]] = {}
        self._images: ResidentImages | None = None

    # Building

    @classmethod
    def operators_on(
        cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits | None
    ) -> list[GpuOperator]:
        if limits is None:
            raise ValueError(f"stage '{stage.name}' is laid out for the limits of a device")
        return [p.operator(p, stage, limits) for p in plan(stage, setup.network)]

    @classmethod
    def source_on(cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits) -> str:
        return cls._source(setup.network, cls.operators_on(stage, setup, limits))

    @classmethod
    def kernels_on(cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits) -> list[str]:
        return cls._kernels(cls.operators_on(stage, setup, limits))

    @classmethod
    def _kernels(cls, operators: Sequence[GpuOperator]) -> list[str]:
        names = [f"{cls.BATCH}_{kernel}" for kernel in cls.BATCH_KERNELS]
        return [*names, *(name for operator in operators for name in operator.entry_points())]

    @classmethod
    def _source(cls, network: Network, operators: Sequence[GpuOperator]) -> str:
        """The translation unit: the kernels of a batch, then those of every operator."""
        constants = {
            "THREADS": THREADS,
            "IMAGE_SIZE": math.prod(network.input_shape),
            "CLASSES": network.classes,
            "SUM_THREADS": SUM_THREADS,
        }
        batch = KernelSource(cls.BATCH, "batch.cuh", constants)
        return translation_unit([batch, *(operator.source() for operator in operators)])

    def _compile(self) -> Module:
        source, kernels = self._source(self.network, self.operators), self._kernels(self.operators)
        return self.device.compile(source, f"{self.stage.name}_{self.network.name}", kernels)

    def _allocate(self) -> None:
        batch = self.setup.batch_size
        self._allocate_state()
        shapes = [p.source_shape for p in self.plan] + [self.plan[-1].target_shape]
        maps = [self.array((batch, *shape)) for shape in shapes]
        target_errors = self._error_maps(shapes[1:])
        self._first, self._last, self._last_errors = maps[0], maps[-1], target_errors[-1]
        source_errors = [None, *target_errors]
        partials = self._allocate_partials()
        for i, (planned, operator) in enumerate(zip(self.plan, self.operators, strict=True)):
            buffers = Buffers(
                maps[i], maps[i + 1], source_errors[i], target_errors[i],
                self._parts(self._parameters, planned), self._parts(self._gradient, planned),
                partials[i],
            )  # fmt: skip
            operator.bind(self.device, self.module, buffers, batch)

    def _allocate_partials(self) -> list[DeviceArray | None]:
        """One array for all partial sums, a part of it for each operator that leaves some."""
        segments: list[tuple[int, int, int, int]] = []
        places: list[tuple[int, tuple[int, int]] | None] = []
        start = 0
        for planned, operator in zip(self.plan, self.operators, strict=True):
            groups = operator.partial_groups(self.setup.batch_size)
            own = [p for p in self.network.parameters if planned.start <= p.layer < planned.stop]
            if not groups or not own:
                places.append(None)
                continue
            size = sum(p.size for p in own)
            segments.append((own[0].offset, size, groups, start))
            places.append((start, (groups, size)))
            start += groups * size
        self._segment_count = len(segments)
        self._most_groups = max((groups for _, _, groups, _ in segments), default=0)
        if not segments:
            return [None] * len(places)
        self._segments = self.array((len(segments), 4), np.int32)
        self._segments.set(np.array(segments, np.int32))
        self._partials = self.array((start,))
        return [place and self._partials.part(*place) for place in places]

    def _error_maps(self, shapes: Sequence[tuple[int, ...]]) -> list[DeviceArray]:
        """Arrays (batch, *shape) for the errors of every operator's target.

        They lie in a ring of as many slots as GpuOptions.error_slots says, each as large as its
        largest map: an operator reads one slot and writes the one before.
        """
        batch = self.setup.batch_size
        slots = options_of(self.stage, GpuOptions).error_slots or len(shapes)
        sizes = [max(map(math.prod, shapes[slot::slots]), default=0) for slot in range(slots)]
        rings = [self.array((batch * size,)) for size in sizes]
        return [rings[i % slots].part(0, (batch, *shape)) for i, shape in enumerate(shapes)]

    def _parts(self, vector: DeviceArray, planned: Planned) -> list[dict[str, DeviceArray]]:
        parts: list[dict[str, DeviceArray]] = [{} for _ in planned.layers]
        for p in self.network.parameters:
            if planned.start <= p.layer < planned.stop:
                parts[p.layer - planned.start][p.key] = vector.part(p.offset, p.shape)
        return parts

    # Launches

    def _launch(self, kernel: str, elements: int, *args: Argument) -> Launch:
        blocks = ceil_div(elements, THREADS)
        return bound_launch(self.device, self.module, self.BATCH, kernel, blocks, args)

    def _normalize(self, images: DeviceArray, count: int) -> Launch:
        elements = count * math.prod(self.network.input_shape)
        mean, deviation = float(self.setup.mean), float(self.setup.deviation)
        return self._launch(
            "normalize_images", elements, images, self._first, mean, deviation, count
        )

    def _loss(self, labels: DeviceArray, count: int) -> Launch:
        return self._launch(
            "softmax_cross_entropy", count,
            self._last, labels, self._last_errors, self._losses, count,
        )  # fmt: skip

    def _forward(self, count: int) -> list[Launch]:
        return [launch for operator in self.operators for launch in operator.forward(count)]

    def _backward(self, count: int) -> list[Launch]:
        return [
            launch for operator in reversed(self.operators) for launch in operator.backward(count)
        ]

    def _update(self, step: int | None) -> list[Launch]:
        """Make the gradient whole and go one step down it, at the rate of this step of the load.

        None: leave the parameters alone.
        """
        count, momentum = self.network.parameter_count, float(self.setup.momentum)
        rate, apply = self._rates.part(step or 0, (1,)), step is not None
        if self._segment_count:
            threads_each = SUM_THREADS if self._most_groups > FEW_GROUPS else 1
            return [
                self._launch(
                    "sum_and_update", count * threads_each,
                    self._parameters, self._velocity, self._gradient, self._partials,
                    self._segments, self._segment_count, rate, momentum, int(apply),
                    threads_each, count,
                )
            ]  # fmt: skip
        if not apply:
            return []
        return [
            self._launch(
                "update_parameters", count,
                self._parameters, self._velocity, self._gradient, rate, momentum, count,
            )
        ]  # fmt: skip

    def _run(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            launch.run()

    # Engine

    def load(self, images: Bytes, labels: Bytes) -> None:
        batch = self.setup.batch_size
        self._drop_images()
        limit = self._resident_limit()
        self._images = ResidentImages(self.device, images, labels, batch, limit)
        self.resident = count = self._images.count
        self._allocate_rates(count // batch)
        for first in range(0, count, batch):
            self._step(first)  # packed here, so that no clock sees it

    def _loaded(self) -> ResidentImages:
        if self._images is None:
            raise RuntimeError("no training set is loaded")
        return self._images

    def _drop_images(self) -> None:
        """Give up the training set loaded before, with the launches that read it."""
        self._steps.clear()
        if self._images is not None:
            self._images.close()
        self._images = None

    def _train(self, order: Order, rates: Array, timer: LoadTimer | None) -> float:
        batch, images = self.setup.batch_size, self._loaded()
        count = len(order) // batch * batch
        self._losses.set(np.zeros(batch, np.float32))
        began, ended = self.device.event(), self.device.event()
        began.record()
        for load in images.loads(count):
            self._upload_rates(rates[load.start // batch : load.stop // batch])
            for piece in images.load(order[load], timer):
                for first in range(piece.start, piece.stop, batch):
                    self._run(self._step(first))
        ended.record()
        losses = self._losses.get()
        self.device.synchronize()
        self.event_seconds = ended.seconds_since(began)
        return float(losses.sum(dtype=np.float64) / count)

    def _step(self, first: int) -> list[Launch]:
        """The launches of one training step on the batch that begins at resident image `first`."""
        if first not in self._steps:
            batch, shape = self.setup.batch_size, self.network.input_shape
            resident = self._loaded()
            if not self._steps:
                self._forward_pass = self._forward(batch)
                self._backward_pass = self._backward(batch)
            images = resident.images.part(first * math.prod(shape), (batch, *shape))
            labels = resident.labels.part(first, (batch,))
            self._steps[first] = [
                self._normalize(images, batch), *self._forward_pass,
                self._loss(labels, batch), *self._backward_pass, *self._update(first // batch),
            ]  # fmt: skip
        return self._steps[first]

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        count = len(labels)
        self._losses.set(np.zeros(self.setup.batch_size, np.float32))
        self._upload(images)
        self._batch_labels.part(0, (count,)).set(np.ascontiguousarray(labels))
        self._run(
            [
                self._normalize(self._batch_images, count), *self._forward(count),
                self._loss(self._batch_labels, count), *self._backward(count),
                *self._update(None),
            ]
        )  # fmt: skip
        losses = self._losses.get()[:count]
        return float(losses.sum(dtype=np.float64) / count), self._gradient.get()

    def backward(self, images: Bytes, output_error: Array) -> Array:
        count = len(images)
        self._upload(images)
        errors = np.ascontiguousarray(output_error, dtype=np.float32)
        self._last_errors.part(0, errors.shape).set(errors)
        self._run(
            [
                self._normalize(self._batch_images, count), *self._forward(count),
                *self._backward(count), *self._update(None),
            ]
        )  # fmt: skip
        return self._gradient.get()

    def logits(self, images: Bytes) -> Array:
        batch = self.setup.batch_size
        outputs = np.empty((len(images), self.network.classes), np.float32)
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            self._upload(part)
            self._run([self._normalize(self._batch_images, len(part)), *self._forward(len(part))])
            size = (len(part), self.network.classes)
            outputs[start : start + batch] = self._last.part(0, size).get()
        return outputs

    def _upload(self, images: Bytes) -> None:
        self._batch_images.part(0, images.shape).set(np.ascontiguousarray(images))

    def profile(self) -> list[KernelTime]:
        saved = self.parameters, self.velocity
        times: dict[tuple[str, str, str], KernelTime] = {}
        for part, planned, launches in self._work():
            least = self._least(part, planned)
            for launch in launches:
                key = (part, launch.layer, launch.kernel)
                if key in times:
                    times[key] = times[key]._replace(launches=times[key].launches + 1)
                    continue
                times[key] = KernelTime(
                    launch.layer, launch.kernel, planned.name if planned else self.BATCH, part,
                    *least, launch.grid, int(part != "compared"), self._time(launch.run),
                )  # fmt: skip
        self.parameters, self.velocity = saved
        return list(times.values())

    def _work(self) -> Iterator[tuple[Part, Planned | None, list[Launch]]]:
        """The launches of a step by the part of its work, and those that are only compared."""
        batch = self.setup.batch_size
        yield "input", None, self._step(0)[:1]
        for operator in self.operators:
            yield "forward", operator.planned, operator.forward(batch)
        yield "loss", None, [self._loss(self._loaded().labels.part(0, (batch,)), batch)]
        for operator in reversed(self.operators):
            yield "backward", operator.planned, operator.backward(batch)
        yield "update", None, self._update(0)
        for operator in self.operators:
            yield "compared", operator.planned, operator.compared(batch)

    def _least(self, part: Part, planned: Planned | None) -> tuple[float, float]:
        """Operations and bytes of a part of the work; unknown for what no step does."""
        if part == "compared":
            return math.nan, math.nan
        if planned is None:
            return batch_arithmetic(self.setup, part)
        return planned.arithmetic(part, self.setup.batch_size)

    def close(self) -> None:
        self._drop_images()
