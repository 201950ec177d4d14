"""The engine of the GPU stages: device buffers, generated source, and a step as a list of launches.

Everything happens on the device: forward, loss, backward, update. Images go up as bytes, one loss
an epoch comes down. Stages differ in their operators alone.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Argument, Device, DeviceArray, Limits, Module
from cnnlib.engine.device_engine import DeviceEngine, Pass
from cnnlib.engine.gpu_operator import (
    SUM_THREADS,
    THREADS,
    Buffers,
    Draws,
    GpuFactory,
    GpuOperator,
    GpuOptions,
    Launch,
    bound_launch,
    signed_word,
)
from cnnlib.engine.profile import KernelTime
from cnnlib.engine.source import KernelSource, translation_unit
from cnnlib.engine.stage import (
    Bytes,
    Order,
    Part,
    Planned,
    Setup,
    Stage,
    batch_arithmetic,
    options_of,
    plan,
)
from cnnlib.engine.upload import LoadTimer, ResidentImages
from cnnlib.errors import Unsupported
from cnnlib.layers import Array
from cnnlib.levels import channels_of

LOSS_KERNELS = {
    "cross_entropy": "softmax_cross_entropy",
    "mean_squared_error": "mean_squared_error",
}
"""Name of a loss in config.yaml -> its kernel in kernels/batch.cuh."""
FEW_GROUPS = 8
"""Most partial sums of a weight that one thread adds up by itself."""


class GpuEngine(DeviceEngine[GpuFactory]):
    """Trains by GpuOperators, with a map and an error map between every two of them."""

    BATCH = "batch"
    BATCH_KERNELS = (
        "normalize_images",
        "softmax_cross_entropy",
        "mean_squared_error",
        "count_step",
        "update_parameters",
        "sum_and_update",
    )

    options_class = GpuOptions

    def __init__(self, stage: Stage[GpuFactory], setup: Setup, device: Device) -> None:
        super().__init__(stage, setup, device)
        self.device = device
        self.operators: list[GpuOperator] = self.operators_on(stage, setup, device)
        self.module = self._compile()
        self._allocate()
        self._step_launches: dict[int, list[Launch]] = {}
        self._images: ResidentImages | None = None

    # Building

    @classmethod
    def operators_on(
        cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits | None
    ) -> list[GpuOperator]:
        if limits is None:
            raise ValueError(f"stage '{stage.name}' is laid out for the limits of a device")
        if setup.loss not in LOSS_KERNELS:
            raise Unsupported(f"stage '{stage.name}' has no kernel for the loss {setup.loss}")
        return [p.operator(p, stage, limits) for p in plan(stage, setup.network)]

    @classmethod
    def source_on(cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits) -> str:
        return cls._source(setup, cls.operators_on(stage, setup, limits))

    @classmethod
    def kernels_on(cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits) -> list[str]:
        return cls._kernels(cls.operators_on(stage, setup, limits))

    @classmethod
    def _kernels(cls, operators: Sequence[GpuOperator]) -> list[str]:
        names = [f"{cls.BATCH}_{kernel}" for kernel in cls.BATCH_KERNELS]
        return [*names, *(name for operator in operators for name in operator.entry_points())]

    @classmethod
    def _source(cls, setup: Setup, operators: Sequence[GpuOperator]) -> str:
        """The translation unit: the kernels of a batch, then those of every operator."""
        constants = {
            "THREADS": THREADS,
            "IMAGE_SIZE": math.prod(setup.network.input_shape),
            "CHANNELS": channels_of(setup.network.input_shape),
            "CLASSES": setup.network.classes,
            "SUM_THREADS": SUM_THREADS,
            "WEIGHT_DECAY": float(setup.weight_decay),
        }
        batch = KernelSource(cls.BATCH, "batch.cuh", constants)
        return translation_unit([batch, *(operator.source() for operator in operators)])

    def _compile(self) -> Module:
        source, kernels = self._source(self.setup, self.operators), self._kernels(self.operators)
        return self.device.compile(source, f"{self.stage.name}_{self.network.name}", kernels)

    def _allocate(self) -> None:
        batch = self.setup.batch_size
        self._allocate_state()
        shapes = [p.source_shape for p in self.plan] + [self.plan[-1].target_shape]
        maps = [self.array((batch, *shape)) for shape in shapes]
        target_errors = self._error_maps(shapes[1:])
        self._first, self._logits, self._output_errors = maps[0], maps[-1], target_errors[-1]
        source_errors = [None, *target_errors]
        partials = self._allocate_partials()
        self._moment = self.array((2,), np.int32)
        seed = self.setup.seed
        self._draws = Draws(signed_word(seed), signed_word(seed >> 32), self._moment)
        for i, (planned, operator) in enumerate(zip(self.plan, self.operators, strict=True)):
            buffers = Buffers(
                maps[i],
                maps[i + 1],
                source_errors[i],
                target_errors[i],
                self._parts(self._parameters, planned),
                self._parts(self._gradient, planned),
                partials[i],
                self._draws,
            )
            operator.bind(self.device, self.module, buffers, batch)

    def _allocate_partials(self) -> list[DeviceArray | None]:
        """An array for the partial sums of each operator, or None; all lie in one larger array."""
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
        """For each layer served its named parts of a flat vector."""
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
        return self._launch("normalize_images", elements, images, self._first, *self._levels, count)

    def _loss(self, labels: DeviceArray, count: int) -> Launch:
        return self._launch(
            LOSS_KERNELS[self.setup.loss],
            count,
            self._logits,
            labels,
            self._output_errors,
            self._losses,
            count,
        )

    def _forward(self, count: int) -> list[Launch]:
        return [launch for operator in self.operators for launch in operator.forward(count)]

    def _backward(self, count: int) -> list[Launch]:
        return [
            launch for operator in reversed(self.operators) for launch in operator.backward(count)
        ]

    def _update(self, step: int | None) -> list[Launch]:
        """Sum the partial gradients and take one step, at the rate of this step of the load.

        None: only sum, and leave the parameters as they are.
        """
        count, momentum = self.network.parameter_count, float(self.setup.momentum)
        rate, apply = self._rates.part(step or 0, (1,)), step is not None
        if self._segment_count:
            threads_each = SUM_THREADS if self._most_groups > FEW_GROUPS else 1
            return [
                self._launch(
                    "sum_and_update",
                    count * threads_each,
                    self._parameters,
                    self._velocity,
                    self._gradient,
                    self._partials,
                    self._segments,
                    self._segment_count,
                    rate,
                    momentum,
                    int(apply),
                    threads_each,
                    count,
                )
            ]
        if not apply:
            return []
        return [
            self._launch(
                "update_parameters",
                count,
                self._parameters,
                self._velocity,
                self._gradient,
                rate,
                momentum,
                count,
            )
        ]

    def _count_step(self) -> list[Launch]:
        """Make the number of the step, by which dropout's masks are drawn, that of the next one."""
        return [self._launch("count_step", 1, self._moment)] if self.network.drops_out else []

    def _set_moment(self, training: bool) -> None:
        """Copy the number of steps to the device, and whether images are trained on."""
        if self.network.drops_out:
            self._moment.set(np.array([signed_word(self.steps), training], np.int32))

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
            self._step(first)  # its arguments are packed now, outside the time measured

    def _loaded(self) -> ResidentImages:
        if self._images is None:
            raise RuntimeError("no training set is loaded")
        return self._images

    def _drop_images(self) -> None:
        """Release the training set loaded before, and the launches that read it."""
        self._step_launches.clear()
        if self._images is not None:
            self._images.close()
        self._images = None

    def _train(self, order: Order, rates: Array, timer: LoadTimer | None) -> float:
        batch, images = self.setup.batch_size, self._loaded()
        count = len(order) // batch * batch
        self._losses.set(np.zeros(batch, np.float32))
        self._set_moment(training=True)
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
        if first not in self._step_launches:
            batch, shape = self.setup.batch_size, self.network.input_shape
            resident = self._loaded()
            if not self._step_launches:
                self._forward_pass = self._forward(batch)
                self._backward_pass = self._backward(batch)
            images = resident.images.part(first * math.prod(shape), (batch, *shape))
            labels = resident.labels.part(first, (batch,))
            self._step_launches[first] = [
                self._normalize(images, batch),
                *self._forward_pass,
                self._loss(labels, batch),
                *self._backward_pass,
                *self._update(first // batch),
                *self._count_step(),
            ]
        return self._step_launches[first]

    def _run_batch(self, count: int, way: Pass) -> None:
        launches = [self._normalize(self._batch_images, count), *self._forward(count)]
        self._set_moment(training=way is not Pass.ONLY_FORWARD)
        if way is Pass.TRAIN:
            launches.append(self._loss(self._batch_labels, count))
        if way is not Pass.ONLY_FORWARD:
            launches += [*self._backward(count), *self._update(None)]
        self._run(launches)

    def profile(self) -> list[KernelTime]:
        saved = self.parameters, self.velocity
        self._set_moment(training=True)
        times: dict[tuple[str, str, str], KernelTime] = {}
        for part, planned, launches in self._work():
            least = self._least(part, planned)
            for launch in launches:
                key = (part, launch.layer, launch.kernel)
                if key in times:
                    times[key] = times[key]._replace(launches=times[key].launches + 1)
                    continue
                times[key] = KernelTime(
                    launch.layer,
                    launch.kernel,
                    planned.name if planned else self.BATCH,
                    part,
                    *least,
                    launch.grid,
                    int(part != "compared"),
                    self.time_launch(launch.run),
                )
        self.parameters, self.velocity = saved
        return list(times.values())

    def _work(self) -> Iterator[tuple[Part, Planned | None, list[Launch]]]:
        """The launches of each part of a step, and those that are only compared with them."""
        batch = self.setup.batch_size
        yield "input", None, self._step(0)[:1]
        for operator in self.operators:
            yield "forward", operator.planned, operator.forward(batch)
        yield "loss", None, [self._loss(self._loaded().labels.part(0, (batch,)), batch)]
        for operator in reversed(self.operators):
            yield "backward", operator.planned, operator.backward(batch)
        yield "update", None, [*self._update(0), *self._count_step()]
        for operator in self.operators:
            yield "compared", operator.planned, operator.compared(batch)

    def _least(self, part: Part, planned: Planned | None) -> tuple[float, float]:
        """Least operations and bytes of a part of the work; nan for what no step does."""
        if part == "compared":
            return math.nan, math.nan
        if planned is None:
            return batch_arithmetic(self.setup, part)
        return planned.arithmetic(part, self.setup.batch_size)

    def close(self) -> None:
        self._drop_images()
