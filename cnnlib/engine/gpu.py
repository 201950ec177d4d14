"""The engine of the GPU stages: device buffers, generated source, and a step as a list of launches.

Everything happens on the device: forward, loss, backward, update. Images go up as bytes, one loss
an epoch comes down. Stages differ in their operators alone.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Device, DeviceArray, Limits, Module
from cnnlib.engine.base import (
    Bytes,
    Engine,
    KernelTime,
    Order,
    Part,
    Planned,
    Setup,
    Stage,
    batch_arithmetic,
    plan,
)
from cnnlib.engine.source import HEADERS, kernel_source
from cnnlib.errors import DoesNotFit, Unsupported
from cnnlib.layers import Array
from cnnlib.system.machine import usable_cores

THREADS = 256
"""Threads a block, in every kernel."""
BLOCKS_PER_MULTIPROCESSOR = 8
"""Upper bound of a grid: 2048 resident threads fill a multiprocessor; grids stride over more."""
MAX_ELEMENTS = 2**31 - 1
"""Kernels index with 32-bit integers."""
GATHER_BYTES = 4 * 2**20
"""Bytes of images gathered and uploaded at a time: enough to use the bus, few enough to overlap."""
GATHER_THREADS = 4
"""Host threads that gather images, at most: memory latency, not bandwidth, is what they hide."""
WORTH_A_THREAD = 512
"""Images worth the wake-up of a gathering thread."""
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


class LoadTimes(NamedTuple):
    """Seconds of one `train`, by what they went into; see GpuEngine.train_timed."""

    total: float
    gather: float
    """Host: choosing and copying images into page-locked memory."""
    upload: float
    """Device: copies to it."""
    kernels: float
    """Device: from the first to the last kernel between uploads."""


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


def device_array(device: Device, shape: tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
    """A device array; DoesNotFit also when it has more elements than kernels can index."""
    if math.prod(shape) > MAX_ELEMENTS:
        raise DoesNotFit(f"an array of {shape} elements is beyond 32-bit indices")
    return device.array(shape, dtype)


class GpuOperator(ABC):
    """Serves a run of layers by kernels of one file of kernels/.

    A subclass names its `file`, the `kernels` in it and the constants the file needs, and says
    which launches make a forward and a backward pass over `count` images.
    """

    file: ClassVar[str]
    kernels: ClassVar[tuple[str, ...]]

    def __init__(self, planned: Planned, stage: Stage, device: Device) -> None:
        self.planned = planned
        self.stage = stage
        self.device = device
        self.layer: Any = planned.layers[0]
        self.label = planned.network.layer_names[planned.start]
        self.check()

    def check(self) -> None:
        """Raise Unsupported, naming layer and limit, for sizes this operator cannot take."""

    @abstractmethod
    def constants(self) -> Mapping[str, int | str]:
        """Name -> value of each constant of the kernel file; strings are enumerators."""

    def array(self, shape: tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
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

    def bind(self, module: Module, buffers: Buffers, batch_size: int) -> None:
        """Take the compiled kernels and the buffers; called once, before any launch is made."""
        self.module, self.buffers = module, buffers
        self.allocate(batch_size)

    def source(self) -> str:
        """This operator's part of the generated translation unit."""
        return kernel_source(self.label, self.file, self.constants())

    def entry_points(self) -> list[str]:
        return [f"{self.label}_{kernel}" for kernel in self.kernels]

    def launch(self, kernel: str, elements: int, *args: Any) -> Launch:
        """Launch of `kernel` with enough blocks for one thread per element, up to a full device."""
        return self.launch_blocks(kernel, ceil_div(elements, THREADS), *args)

    def launch_blocks(self, kernel: str, blocks: int, *args: Any, shared_bytes: int = 0) -> Launch:
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


def bound_launch(
    device: Device,
    module: Module,
    layer: str,
    kernel: str,
    blocks: int,
    args: Sequence[Any],
    shared_bytes: int = 0,
) -> Launch:
    """A launch of up to `blocks` blocks of THREADS threads, never more than fill the device."""
    grid = max(1, min(blocks, device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR))
    bound = module.kernel(f"{layer}_{kernel}").bind(grid, THREADS, *args, shared_bytes=shared_bytes)
    return Launch(layer, kernel, grid, bound)


class Piece:
    """The moments of one piece of an epoch: gathered on the host, uploaded, trained on."""

    def __init__(self, device: Device) -> None:
        self.gathered, self.uploaded, self.trained = (device.event() for _ in range(3))
        self._began = time.perf_counter()

    def end_gather(self) -> None:
        self.gather = time.perf_counter() - self._began
        self.gathered.record()


class DeviceEngine(Engine):
    """What engines of GPU stages share: state on the device, and a look at where training goes."""

    device: Device
    resident: int | None = None
    """Images on the device at a time, once a training set is loaded."""

    @property
    def choices(self) -> dict[str, Any]:
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

    def _images_wanted(self) -> int:
        """Images that may be on the device at a time: at least a batch."""
        resident = self.setup.resident_images
        if resident != "auto":
            return resident
        # Half of what is free: the other half is left for the device's other users.
        bytes_each = math.prod(self.network.input_shape) + 1
        return max(self.device.free_bytes() // 2 // bytes_each, self.setup.batch_size)

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
    def _train(self, order: Order, rates: Array, pieces: "list[Piece] | None") -> float:
        """`train`; with `pieces` a Piece is appended for every load, or part of one."""

    def array(self, shape: tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
        """A device array that kernels can index."""
        return device_array(self.device, shape, dtype)

    def train(self, order: Order, rates: Array | None = None) -> float:
        steps = len(order) // self.setup.batch_size
        return self._train(order, self.rates_of(steps, rates), None)

    def train_timed(self, order: Order) -> LoadTimes:
        """Train as `train` does, with a look at where the time goes; the looking takes a little."""
        pieces: list[Piece] = []
        steps = len(order) // self.setup.batch_size
        began = time.perf_counter()
        self._train(order, self.rates_of(steps, None), pieces)
        total = time.perf_counter() - began
        return LoadTimes(
            total,
            sum(piece.gather for piece in pieces),
            sum(piece.uploaded.seconds_since(piece.gathered) for piece in pieces),
            sum(piece.trained.seconds_since(piece.uploaded) for piece in pieces),
        )

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


class GpuEngine(DeviceEngine):
    """Buffers in a chain, one map and one error map between every two operators."""

    BATCH = "batch"
    BATCH_KERNELS = (
        "normalize_images", "softmax_cross_entropy", "update_parameters", "sum_and_update",
    )  # fmt: skip

    def __init__(self, stage: Stage, setup: Setup, device: Device | None = None) -> None:
        super().__init__(stage, setup, device)
        assert device is not None, "a GPU stage needs a device"
        self.device = device
        self.operators: list[GpuOperator] = self.operators_on(stage, setup, device)
        self.module = self._compile()
        self._allocate()
        self._steps: dict[int, list[Launch]] = {}
        self._gatherers = min(GATHER_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(self._gatherers)

    # Building

    @classmethod
    def operators_on(cls, stage: Stage, setup: Setup, device: Limits | None) -> list[GpuOperator]:
        return [p.operator(p, stage, device) for p in plan(stage, setup.network)]

    def _compile(self) -> Module:
        network = self.network
        constants = {"IMAGE_SIZE": math.prod(network.input_shape), "CLASSES": network.classes}
        parts = [f'#include "{header}"\n' for header in HEADERS]
        parts.append(kernel_source(self.BATCH, "batch.cuh", constants))
        parts += [operator.source() for operator in self.operators]
        kernels = [f"{self.BATCH}_{kernel}" for kernel in self.BATCH_KERNELS]
        for operator in self.operators:
            kernels += operator.entry_points()
        return self.device.compile("".join(parts), f"{self.stage.name}_{network.name}", kernels)

    def _allocate(self) -> None:
        batch = self.setup.batch_size
        self._allocate_state()
        shapes = [p.source_shape for p in self.plan] + [self.plan[-1].target_shape]
        maps = [self.array((batch, *shape)) for shape in shapes]
        errors = [None, *self._error_maps(shapes[1:])]
        self._first, self._last, self._last_errors = maps[0], maps[-1], errors[-1]
        partials = self._allocate_partials()
        for i, (planned, operator) in enumerate(zip(self.plan, self.operators, strict=True)):
            target_errors = errors[i + 1]
            assert target_errors is not None
            buffers = Buffers(
                maps[i], maps[i + 1], errors[i], target_errors,
                self._parts(self._parameters, planned), self._parts(self._gradient, planned),
                partials[i],
            )  # fmt: skip
            operator.bind(self.module, buffers, batch)

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

        With the stage's option `error_slots` they lie in a ring of that many slots, each as large
        as its largest map: an operator reads one slot and writes the one before.
        """
        batch = self.setup.batch_size
        slots: int = self.stage.options.get("error_slots", len(shapes))
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

    def _launch(self, kernel: str, elements: int, *args: Any) -> Launch:
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
            shares = 8 if self._most_groups > FEW_GROUPS else 1
            return [
                self._launch(
                    "sum_and_update", count * shares,
                    self._parameters, self._velocity, self._gradient, self._partials,
                    self._segments, self._segment_count, rate, momentum, int(apply), shares, count,
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
        self._images, self._labels = images, labels
        batch = self.setup.batch_size
        count = max(batch, min(self._images_wanted(), len(labels)) // batch * batch)
        self._resident = self.resident = count
        self._steps.clear()
        self._device_images = self.array((count, *self.network.input_shape), np.uint8)
        self._device_labels = self.array((count,), np.uint8)
        self._host_images = self.device.pinned((count, *self.network.input_shape), np.uint8)
        self._host_labels = self.device.pinned((count,), np.uint8)
        self._allocate_rates(count // batch)
        for first in range(0, count, batch):
            self._step(first)  # packed here, so that no clock sees it

    def _train(self, order: Order, rates: Array, pieces: "list[Piece] | None") -> float:
        batch = self.setup.batch_size
        steps = len(order) // batch
        self._losses.set(np.zeros(batch, np.float32))
        began, ended = self.device.event(), self.device.event()
        began.record()
        for start in range(0, steps * batch, self._resident):
            if start:
                # The pinned memory may be filled again only when its images have gone up.
                self.device.synchronize()
            stop = min(start + self._resident, steps * batch)
            self._upload_rates(rates[start // batch : stop // batch])
            self._train_load(order[start:stop], pieces)
        ended.record()
        losses = self._losses.get()
        self.device.synchronize()
        self.event_seconds = ended.seconds_since(began)
        return float(losses.sum(dtype=np.float64) / (steps * batch))

    def _train_load(self, order: Order, pieces: "list[Piece] | None") -> None:
        """Gather and upload the images of `order` piece by piece, and train on each piece.

        The host gathers the next piece while the device still works on the last.
        """
        batch = self.setup.batch_size
        fits = GATHER_BYTES // math.prod(self.network.input_shape)
        most = max(batch, fits // batch * batch)
        for start in range(0, len(order), most):
            stop = min(start + most, len(order))
            piece = Piece(self.device) if pieces is not None else None
            self._gather(self._images, order[start:stop], self._host_images[start:stop])
            self._gather(self._labels, order[start:stop], self._host_labels[start:stop])
            if piece:
                piece.end_gather()
            for host, device in (
                (self._host_images[start:stop], self._device_images),
                (self._host_labels[start:stop], self._device_labels),
            ):
                device.part(start * math.prod(host.shape[1:]), host.shape).set(host)
            if piece:
                piece.uploaded.record()
            for first in range(start, stop, batch):
                self._run(self._step(first))
            if piece and pieces is not None:
                piece.trained.record()
                pieces.append(piece)

    def _gather(self, images: Bytes, order: Order, out: Bytes) -> None:
        """out[i] = images[order[i]], by several threads where there is enough to do."""

        def take(part: slice) -> None:
            # mode="clip" writes straight into `out`; the default would go through a copy
            np.take(images, order[part], axis=0, out=out[part], mode="clip")

        share = max(WORTH_A_THREAD, ceil_div(len(order), self._gatherers))
        parts = [slice(i, min(i + share, len(order))) for i in range(0, len(order), share)]
        if len(parts) == 1:
            take(parts[0])
        else:
            list(self._pool.map(take, parts))

    def _step(self, first: int) -> list[Launch]:
        """The launches of one training step on the batch that begins at resident image `first`."""
        if first not in self._steps:
            batch, shape = self.setup.batch_size, self.network.input_shape
            if not self._steps:
                self._forward_pass = self._forward(batch)
                self._backward_pass = self._backward(batch)
            images = self._device_images.part(first * math.prod(shape), (batch, *shape))
            labels = self._device_labels.part(first, (batch,))
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
        assert self._last_errors is not None
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
        yield "loss", None, [self._loss(self._device_labels.part(0, (batch,)), batch)]
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
        self._pool.shutdown()
