"""The engine of the GPU stages: device buffers, generated source, and a step as a list of launches.

Everything happens on the device: forward, loss, backward, update. Images go up as bytes, one loss
an epoch comes down. Stages differ in their operators, and in how a step is launched (gpu_steps.py).
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Argument, Device, DeviceArray, Limits, Module
from cnnlib.device.architecture import PROGRAMMATIC_LAUNCHES
from cnnlib.device.null import NullDevice
from cnnlib.engine.device_engine import DeviceEngine, Pass, module_name, part_of
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
from cnnlib.engine.gpu_steps import CountedSteps, FixedSteps
from cnnlib.engine.ordered_images import OrderedImages
from cnnlib.engine.profile import KernelTime
from cnnlib.engine.shuffle import ROUNDS, Shuffle
from cnnlib.engine.source import Constant, KernelSource, translation_unit
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
from cnnlib.engine.step_plan import StepPlan
from cnnlib.engine.upload import LoadTimer
from cnnlib.errors import DoesNotFit, Unsupported
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
    COUNTED_KERNELS = (
        "shuffle_images",
        "gather_images",
        "update_and_count",
        "sum_update_and_count",
    )

    options_class = GpuOptions
    gathers_ahead = False

    def __init__(self, stage: Stage[GpuFactory], setup: Setup, device: Device) -> None:
        super().__init__(stage, setup, device)
        self.device = device
        self._options = options_of(stage, GpuOptions)
        self.operators: list[GpuOperator] = self.operators_on(stage, setup, device)
        self.module = self._compile()
        self._allocate()
        self._steps_on_device: FixedSteps | CountedSteps | None = None

    # Building

    @classmethod
    def operators_on(
        cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits | None
    ) -> list[GpuOperator]:
        if limits is None:
            raise ValueError(f"stage '{stage.name}' is laid out for the limits of a device")
        if setup.loss not in LOSS_KERNELS:
            raise Unsupported(f"stage '{stage.name}' has no kernel for the loss {setup.loss}")
        graphs = options_of(stage, GpuOptions).launch != "each"
        if graphs and (problem := limits.capture_problem()):
            raise Unsupported(f"stage '{stage.name}' launches its steps as CUDA graphs: {problem}")
        operators = [p.operator(p, stage, limits) for p in plan(stage, setup.network)]
        for before, operator in zip([None, *operators], operators, strict=False):
            operator.prepare(setup.batch_size, before)
        return operators

    @classmethod
    def plans_on(cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits) -> Sequence[StepPlan]:
        """One plan, with the kernels that a step launches, counted on a device without memory."""
        batch, device = setup.batch_size, NullDevice(limits)
        options, facts = options_of(stage, GpuOptions), dict[str, object]()
        if options.counted:
            can = limits.capability >= PROGRAMMATIC_LAUNCHES.since
            launch = "graph" if options.launch == "programmatic" and not can else options.launch
            facts = {"launch": launch, "images_gathered_by": options.gather}
        try:
            with cls(stage, setup, device) as engine:
                images = np.zeros((batch, *setup.network.input_shape), np.uint8)
                engine.load(images, np.zeros(batch, np.uint8))
                before = device.launches
                engine.train(np.arange(batch))
                launched = device.launches - before - int(engine.gathers_ahead)  # once, before all
        except (Unsupported, DoesNotFit) as error:
            return [StepPlan("layers", declined=str(error))]
        return [StepPlan("layers", {"kernels_a_step": launched} | facts)]

    @classmethod
    def source_on(cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits) -> str:
        operators = cls.operators_on(stage, setup, limits)
        return cls._source(setup, operators, options_of(stage, GpuOptions))

    @classmethod
    def kernels_on(cls, stage: Stage[GpuFactory], setup: Setup, limits: Limits) -> list[str]:
        operators = cls.operators_on(stage, setup, limits)
        return cls._kernels(operators, options_of(stage, GpuOptions))

    @classmethod
    def _kernels(cls, operators: Sequence[GpuOperator], options: GpuOptions) -> list[str]:
        own = cls.BATCH_KERNELS + (cls.COUNTED_KERNELS if options.counted else ())
        names = [f"{cls.BATCH}_{kernel}" for kernel in own]
        return [*names, *(name for operator in operators for name in operator.entry_points())]

    @classmethod
    def _source(cls, setup: Setup, operators: Sequence[GpuOperator], options: GpuOptions) -> str:
        """The translation unit: the kernels of a batch, then those of every operator."""
        constants: dict[str, Constant] = {
            "THREADS": THREADS,
            "IMAGE_SIZE": math.prod(setup.network.input_shape),
            "CHANNELS": channels_of(setup.network.input_shape),
            "CLASSES": setup.network.classes,
            "SUM_THREADS": SUM_THREADS,
            "WEIGHT_DECAY": float(setup.weight_decay),
        }
        file = "batch.cuh"
        if options.counted:
            file, constants["SHUFFLE_ROUNDS"] = "counted_batch.cuh", ROUNDS
        batch = KernelSource(cls.BATCH, file, constants)
        parts = [batch, *cls._operator_sources(setup, operators, options)]
        return translation_unit(parts, options.launch == "programmatic")

    @classmethod
    def _operator_sources(
        cls, setup: Setup, operators: Sequence[GpuOperator], options: GpuOptions
    ) -> list[KernelSource]:
        """The kernels of a step beside those of kernels/batch.cuh."""
        return [operator.source() for operator in operators]

    def _compile(self) -> Module:
        source = self._source(self.setup, self.operators, self._options)
        kernels = self._kernels(self.operators, self._options)
        return self.device.compile(source, module_name(self.stage, self.setup), kernels)

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
        self._segment_count, self._segment_list = len(segments), segments
        self._most_groups = max((groups for _, _, groups, _ in segments), default=0)
        covered = sum(size for _, size, _, _ in segments)
        self._sums_everything = covered == self.network.parameter_count
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
        programmatic = self._options.launch == "programmatic"
        return bound_launch(
            self.device, self.module, self.BATCH, kernel, blocks, args, programmatic=programmatic
        )

    def normalize(self, images: DeviceArray, count: int) -> Launch:
        elements = count * math.prod(self.network.input_shape)
        return self._launch("normalize_images", elements, images, self._first, *self._levels, count)

    def gather(
        self, images: OrderedImages, position: DeviceArray, labels: DeviceArray, rate: DeviceArray
    ) -> Launch:
        """The beginning of a step that finds its images and its rate by `position`."""
        batch = self.setup.batch_size
        pixels = batch * math.prod(self.network.input_shape)
        return self._launch(
            "gather_images",
            ceil_div(pixels, 4),
            *(images.images, images.labels, images.order, self._rates, position),
            *(self._first, labels, rate, *self._levels, batch),
        )

    def passes(self, labels: DeviceArray) -> list[Launch]:
        """Forward, loss and backward of a whole batch; the operators' launches are made once."""
        forward, backward = self._whole_batch
        return [*forward, self._loss(labels, self.setup.batch_size), *backward]

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

    def _launched(self) -> Sequence[GpuOperator]:
        """The operators that have launches of their own."""
        return self.operators

    def _forward(self, count: int) -> list[Launch]:
        return [launch for operator in self._launched() for launch in operator.forward(count)]

    def _backward(self, count: int) -> list[Launch]:
        return [
            launch for operator in reversed(self._launched()) for launch in operator.backward(count)
        ]

    def update(self, step: int | None) -> list[Launch]:
        """Sum the partial gradients and take one step, at the rate of this step of the load.

        None: only sum, and leave the parameters as they are.
        """
        if step is None and not self._segment_count:
            return []
        return [self._update(self._rates.part(step or 0, (1,)), apply=step is not None)]

    def update_at(self, rate: DeviceArray, *position: Argument) -> list[Launch]:
        """Sum and take one step at `rate`, and count the step."""
        return [self._update(rate, True, self._moment, *position)]

    def _update(self, rate: DeviceArray, apply: bool, *counters: Argument) -> Launch:
        count, momentum = self.network.parameter_count, float(self.setup.momentum)
        state = self._parameters, self._velocity, self._gradient
        if not self._segment_count:
            kernel = "update_and_count" if counters else "update_parameters"
            return self._launch(kernel, count, *state, rate, momentum, count, *counters)
        each = SUM_THREADS if self._most_groups > FEW_GROUPS else 1
        # A kernel that finds its step by a counter can choose them for each operator's parameters.
        by_segment = bool(counters) and self._sums_everything
        return self._launch(
            "sum_update_and_count" if counters else "sum_and_update",
            count * each,
            *(*state, self._partials, self._segments, self._segment_count),
            *(rate, momentum, int(apply), 0 if by_segment else each, count, *counters),
        )

    def count_step(self) -> list[Launch]:
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
        self.close()
        limit, options = self._resident_limit(), self._options
        steps = (
            CountedSteps(self, images, labels, limit, options)
            if options.counted
            else FixedSteps(self, images, labels, limit)
        )
        self._steps_on_device, self.resident = steps, steps.count
        batch = self.setup.batch_size
        self._whole_batch = self._forward(batch), self._backward(batch)
        self._allocate_rates(steps.count // batch)
        steps.prepare()

    def _loaded(self) -> FixedSteps | CountedSteps:
        if self._steps_on_device is None:
            raise RuntimeError("no training set is loaded")
        return self._steps_on_device

    def close(self) -> None:
        """Release the training set, and the launches that read it."""
        if self._steps_on_device is not None:
            self._steps_on_device.close()
        self._steps_on_device = None

    def _draws_order(self, shuffle: Shuffle) -> bool:
        return self._loaded().draws(shuffle)

    def _train(self, order: Order | Shuffle, rates: Array, timer: LoadTimer | None) -> float:
        batch, steps = self.setup.batch_size, self._loaded()
        count = len(order) // batch * batch
        self._set_moment(training=True)
        self._begin()
        for load in steps.loads(count):
            self._upload_rates(part_of(rates, load, batch))
            for piece in steps.load(order, load, timer):
                steps.run(piece)
        return self._end() / count

    def _run_batch(self, count: int, way: Pass) -> None:
        launches = [self.normalize(self._batch_images, count), *self._forward(count)]
        self._set_moment(training=way is not Pass.ONLY_FORWARD)
        if way is Pass.TRAIN:
            launches.append(self._loss(self._batch_labels, count))
        if way is not Pass.ONLY_FORWARD:
            launches += [*self._backward(count), *self.update(None)]
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
        first, labels, last = self._loaded().ends()
        yield "input", None, first
        for operator in self._launched():
            yield "forward", operator.planned, operator.forward(batch)
        yield "loss", None, [self._loss(labels, batch)]
        for operator in reversed(self._launched()):
            yield "backward", operator.planned, operator.backward(batch)
        yield "update", None, last
        for operator in self._launched():
            yield "compared", operator.planned, operator.compared(batch)

    def _least(self, part: Part, planned: Planned | None) -> tuple[float, float]:
        """Least operations and bytes of a part of the work; nan for what no step does."""
        if part == "compared":
            return math.nan, math.nan
        if planned is None:
            return batch_arithmetic(self.setup, part)
        return planned.arithmetic(part, self.setup.batch_size)
