"""The engine of stage tuned: a persistent kernel with the training set on the device.

A step has two phases (kernels/tuned/step.cuh). On a GPU one launch does as many steps as it is
given, with barriers of the whole grid between the phases; an emulated device has no such barriers,
and each phase is a launch of its own.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from cnnlib.device import Argument, Changing, Device, DeviceArray, Limits
from cnnlib.device.api import KernelError
from cnnlib.device.cache import content_key, included_files
from cnnlib.engine.autotune import (
    TRIALS,
    Unsteady,
    fastest,
    kept_times,
    measured_steadily,
    not_repeated,
    steady,
    steps_within,
)
from cnnlib.engine.device_engine import DeviceEngine, Pass, module_name, part_of
from cnnlib.engine.gpu_operator import signed_word
from cnnlib.engine.ordered_images import OrderedImages
from cnnlib.engine.profile import KernelTime
from cnnlib.engine.shuffle import Shuffle
from cnnlib.engine.stage import (
    Bytes,
    Order,
    Part,
    Setup,
    Stage,
    batch_arithmetic,
    plan,
)
from cnnlib.engine.step_plan import StepPlan
from cnnlib.engine.upload import LoadTimer
from cnnlib.errors import Unsupported
from cnnlib.layers import Array
from cnnlib.network import FLOAT, Arithmetic
from cnnlib.stages.tuned.operator import TunedFactory, TunedOperator
from cnnlib.stages.tuned.plan import BlockPlan, Objective, PersistentOptions, candidates, choose

TRIED_IMAGES = 1 << 16
"""Images of a timed launch."""
MIN_STEPS, MAX_STEPS = 32, 512
"""Steps of a timed launch. What a launch takes beside its steps must not decide: with 32 steps of
16 images it was a fifth, and a plan was chosen that trained more slowly than another.
"""


class PersistentEngine(DeviceEngine[TunedFactory]):
    """Trains by TunedOperators; each multiprocessor has one block."""

    options_class = PersistentOptions

    def __init__(self, stage: Stage[TunedFactory], setup: Setup, device: Device) -> None:
        super().__init__(stage, setup, device)
        self.device = device
        self.grid = device.multiprocessors
        self.whole = device.kind == "cuda"
        self._set: OrderedImages | None = None
        self._train_loaded: Callable[[int], None] | None = None
        """Trains so many steps on what is loaded."""
        self._number = 0
        plans = self._plans_of(stage, setup, device)
        self._times = self._measured(plans) if len(plans) > 1 else []
        self._build(plans[fastest(self._times) if self._times else 0])
        self._tried = plans
        self.resident = None  # what was tried had a training set of its own

    @classmethod
    def operators_on(
        cls, stage: Stage[TunedFactory], setup: Setup, limits: Limits | None
    ) -> list[TunedOperator]:
        if limits is None:
            raise ValueError(f"stage '{stage.name}' is laid out for the limits of a device")
        return cls.plan_on(stage, setup, limits).operators

    @classmethod
    def source_on(cls, stage: Stage[TunedFactory], setup: Setup, limits: Limits) -> str:
        return cls.plan_on(stage, setup, limits).source()

    @classmethod
    def sources_on(cls, stage: Stage[TunedFactory], setup: Setup, limits: Limits) -> list[str]:
        return [each.source() for each in cls._plans_of(stage, setup, limits)]

    @staticmethod
    def _plans_of(stage: Stage[TunedFactory], setup: Setup, limits: Limits) -> list[BlockPlan]:
        """The plans that an engine measures or, where it may not, the one it takes."""
        planned = plan(stage, setup.network)
        given = stage, planned, setup.batch_size, limits, Objective.of(setup)
        return candidates(*given) if setup.tune else [choose(*given)]

    @classmethod
    def kernels_on(cls, stage: Stage[TunedFactory], setup: Setup, limits: Limits) -> list[str]:
        kernels = ["forward_backward", "time_sections", "update", "shuffle_images", "draw_tables"]
        kernels += ["train"] * (limits.kind == "cuda")
        return [f"step_{kernel}" for kernel in kernels]

    @classmethod
    def plans_on(
        cls, stage: Stage[TunedFactory], setup: Setup, limits: Limits
    ) -> Sequence[StepPlan]:
        """The plan of plan_on; `others_timed` counts those that are timed beside it on a GPU."""
        try:
            first, *others = cls._plans_of(stage, replace(setup, tune=True), limits)
        except Unsupported as error:
            return [StepPlan("persistent", declined=str(error))]
        return [StepPlan("persistent", first.facts | {"others_timed": len(others)})]

    @staticmethod
    def plan_on(stage: Stage[TunedFactory], setup: Setup, limits: Limits) -> BlockPlan:
        """The plan that an engine takes unless it chooses by measuring. Raises Unsupported."""
        planned = plan(stage, setup.network)
        return choose(stage, planned, setup.batch_size, limits, Objective.of(setup))

    def _build(self, plan: BlockPlan) -> None:
        """Kernels and buffers of a plan."""
        self.block = plan
        self.operators = plan.operators
        self.module = self.device.compile(plan.source(), *self._names)
        self._allocate()

    @property
    def _names(self) -> tuple[str, list[str]]:
        """The names of the module and of its kernels."""
        kernels = self.kernels_on(self.stage, self.setup, self.device)
        return module_name(self.stage, self.setup), kernels

    def _measured(self, plans: Sequence[BlockPlan]) -> list[float]:
        """Seconds of a step by each of the plans, from the cache if they are there; none where
        others on the device keep them from repeating.
        """
        batch, device = self.setup.batch_size, self.device
        sources = [plan.source() for plan in plans]
        parts = [device.name, str(device.multiprocessors), str(batch), str(self._tried_steps)]

        def measure() -> list[float]:
            return [self._step_seconds(plan) for plan in plans]

        key = content_key(parts + sources, included_files(*sources))
        if kept_times(key, len(plans)) is None:
            device.precompile(sources, *self._names)
        with contextlib.suppress(Unsteady):
            return measured_steadily(key, len(plans), measure)
        return []

    @property
    def _tried_steps(self) -> int:
        """Steps per timed launch."""
        return steps_within(self.setup.batch_size, TRIED_IMAGES, MIN_STEPS, MAX_STEPS)

    def _step_seconds(self, plan: BlockPlan) -> float:
        """Seconds of a step by this plan, on random images.

        The engine's state is of no use afterwards. Raises Unsteady.
        """
        batch, network = self.setup.batch_size, self.network
        steps = self._tried_steps
        random = np.random.default_rng(0)
        self._build(plan)
        images = random.integers(0, 256, (batch, *network.input_shape), dtype=np.uint8)
        self.load(images, random.integers(0, network.classes, batch, dtype=np.uint8))
        self.parameters = network.initial_parameters(1)
        order = self.array((steps * batch,), np.int32)
        order.set(np.tile(np.arange(batch, dtype=np.int32), steps))
        self._allocate_rates(steps)
        self._upload_rates(np.zeros(steps))  # so that no number grows
        train = self._bound_steps(order)
        times = []
        for _ in range(1 + TRIALS):
            self._begin()
            train(steps)
            self._end()
            self._check_signals()
            times.append(self.event_seconds / steps)
        return steady(times[1:])

    @property
    def choices(self) -> Mapping[str, object]:
        """The plan, and what the others took where it was chosen by measuring."""

        tried = [
            plan.facts | {"step_seconds": seconds}
            for plan, seconds in zip(self._tried, self._times, strict=False)
        ]
        found: dict[str, object] = {
            **super().choices,
            "chosen": self.block.facts,
        }
        if tried:
            found["tried"] = tried
        elif len(self._tried) > 1:
            found["not_tried"] = not_repeated(len(self._tried))
        return found

    def _allocate(self) -> None:
        batch, network = self.setup.batch_size, self.network
        self._allocate_state()
        self._traces = self.array((batch, self.block.trace))
        self._traces.fill_bytes(0)  # what lies between its arrays is multiplied too, for nothing
        self._partials = self.array((self.grid, max(1, self.block.partials)))
        self._logits = self._output_errors = self.array((batch, network.classes))
        self._stash = self.array((self.grid, self.block.images, self.block.layout.kept_floats))
        self._batch_order = self.array((batch,), np.int32)
        self._batch_order.set(np.arange(batch, dtype=np.int32))
        self._cleared = self.array((batch + 2,))
        """What begins as 0: losses, and two words by which blocks say something to all others."""
        self._losses = self._cleared.part(0, (batch,))
        self._signals = self._cleared.part(batch, (2,)).viewed(np.uint32)
        self._signalled = False
        """Whether the signals are those of a launch."""
        if self.block.stamped:
            self._handed = self.array(
                (batch * (self.block.trace + self.block.partials) + self.block.partials,), np.uint64
            )
            self._handed.fill_bytes(0)
        self._stamp = 1
        """Of the next step whose numbers are stamped; none of those in self._handed has it."""

    # Launches

    def _bind(self, kernel: str, *args: Argument) -> Callable[[], None]:
        return self.module.kernel(f"step_{kernel}").bind(
            self.grid, self.block.threads.block, *args, shared_bytes=self.block.layout.bytes
        )

    def _bind_images(
        self,
        kernel: str,
        images: DeviceArray,
        labels: DeviceArray,
        order: DeviceArray,
        count: int,
        *more: Argument,
        number: Changing | None = None,
    ) -> Callable[[], None]:
        """A kernel that takes `count` images through the network, with `more` arguments last.

        `number` is that of the step, if it changes between launches.
        """
        return self._bind(
            kernel,
            images,
            labels,
            order,
            self._parameters,
            self._traces,
            self._partials,
            self._logits,
            self._losses,
            self._stash,
            *self._levels,
            signed_word(self.setup.seed),
            signed_word(self.setup.seed >> 32),
            signed_word(self._number) if number is None else number,
            count,
            *more,
        )

    def _forward_backward(
        self, images: DeviceArray, labels: DeviceArray, order: DeviceArray, count: int, way: Pass
    ) -> Callable[[], None]:
        return self._bind_images("forward_backward", images, labels, order, count, int(way))

    def _update(self, count: int, step: int | None) -> Callable[[], None]:
        """The second phase, at the rate of this step of the load; None: parameters stay."""
        return self._bind(
            "update",
            self._parameters,
            self._traces,
            self._partials,
            self._velocity,
            self._gradient,
            self._rates.part(step or 0, (1,)),
            float(self.setup.momentum),
            int(step is not None),
            count,
        )

    def _bound_steps(self, order: DeviceArray) -> Callable[[int], None]:
        """What does so many steps on the batches of `order`, which index the resident images.

        The launch of a whole epoch is made beforehand, but for what changes between two of them.
        `_clear` has set the signals of the first launch of a training to 0.
        """
        if not self.whole:
            return partial(self._train_by_phases, order)
        given, number, count, stamp = self._loaded(), Changing(), Changing(), Changing()
        launch = self._bind_images(
            "train",
            given.images,
            given.labels,
            order,
            self.setup.batch_size,
            self._velocity,
            self._rates,
            float(self.setup.momentum),
            count,
            self._signals.part(0, (1,)),
            self._signals.part(1, (1,)),
            *self._stamped(stamp),
            number=number,
        )

        def train(steps: int) -> None:
            if self._signalled:
                self._signals.fill_bytes(0)
            number.value, count.value = signed_word(self._number), steps
            stamp.value = self._stamps(steps)
            launch()
            self._signalled = True
            self._number += steps

        return train

    def _train_by_phases(self, order: DeviceArray, steps: int) -> None:
        """Steps by two launches each, for a device without barriers of the grid."""
        batch, given = self.setup.batch_size, self._loaded()
        for step in range(steps):
            part = order.part(step * batch, (batch,))
            self._forward_backward(given.images, given.labels, part, batch, Pass.TRAIN)()
            self._update(batch, step)()
            self._number += 1

    def _stamped(self, stamp: Argument) -> list[Argument]:
        """More arguments of a launch whose numbers are stamped."""
        return [self._handed, stamp] if self.block.stamped else []

    def _stamps(self, steps: int) -> int:
        """The stamp of the first of so many steps; the next ones have those that follow."""
        stamp, self._stamp = self._stamp, (self._stamp + steps) % 2**32
        return signed_word(stamp)

    def _clear(self) -> None:
        self._cleared.fill_bytes(0)
        self._signalled = False

    def _check_signals(self) -> None:
        if self.whole and self._signals.get()[1]:
            raise KernelError(
                f"stage '{self.stage.name}': blocks of one launch waited in vain for each other; "
                f"another program keeps some of the {self.grid} multiprocessors to itself"
            )

    # Engine

    def load(self, images: Bytes, labels: Bytes) -> None:
        batch, limit = self.setup.batch_size, self._resident_limit()
        self.close()
        shuffle_images = self.module.kernel("step_shuffle_images")
        self._set = OrderedImages(
            self.device,
            images,
            labels,
            batch,
            limit,
            shuffle_images,
            piece_bytes=math.inf,
            draw_tables=self.module.kernel("step_draw_tables"),
        )
        self.resident = self._set.count
        self._allocate_rates(self._set.order.size // batch)
        self._train_loaded = self._bound_steps(self._set.order)

    def _loaded(self) -> OrderedImages:
        if self._set is None:
            raise RuntimeError("no training set is loaded")
        return self._set

    def close(self) -> None:
        if self._set is not None:
            self._set.close()
        self._set = self._train_loaded = None

    def _draws_order(self, shuffle: Shuffle) -> bool:
        return self._loaded().draws(shuffle)

    def _train(self, order: Order | Shuffle, rates: Array, timer: LoadTimer | None) -> float:
        batch, training_set, train = self.setup.batch_size, self._loaded(), self._train_loaded
        assert train is not None  # where a training set is loaded
        images = len(order) // batch * batch
        self._number = self.steps
        self._begin()
        for load in training_set.loads(images):
            self._upload_rates(part_of(rates, load, batch))
            for piece in training_set.load(order, load, timer):
                train((piece.stop - piece.start) // batch)
        loss = self._end()
        if not math.isfinite(loss):  # as a launch leaves it that has given up
            self._check_signals()
        return loss / images

    def _run_batch(self, count: int, way: Pass) -> None:
        self._number = self.steps
        self._forward_backward(
            self._batch_images, self._batch_labels, self._batch_order, count, way
        )()
        if way is not Pass.ONLY_FORWARD:
            self._update(count, None)()

    def profile(self) -> list[KernelTime]:
        """The sections of the first phase by the first block's own clock, and the second phase.

        A section's share of that block's time is taken for its share of the whole phase, which is
        timed as launches in a row are.
        """
        saved = self.parameters, self.velocity
        given = self._loaded()
        args = given.images, given.labels, self._batch_order, self.setup.batch_size
        forward_backward = self._forward_backward(*args, Pass.TRAIN)
        forward_backward()  # a first launch finds nothing where it will be
        phase = self.time_launch(forward_backward)
        update = self.time_launch(self._update(self.setup.batch_size, 0))
        shares = self._section_shares(args)
        self.parameters, self.velocity = saved
        return [
            *(
                KernelTime(
                    name.partition("+")[0], kernel, name, part, *least, self.grid, 1, phase * share
                )
                for (name, kernel, part, least), share in zip(self._sections(), shares, strict=True)
            ),
            KernelTime(
                "batch",
                "update",
                "batch",
                "update",
                *batch_arithmetic(self.setup, "update"),
                self.grid,
                1,
                update,
            ),
        ]

    def _sections(self) -> list[tuple[str, str, Part, Arithmetic]]:
        """The sections of a timed step: layers, name, part and the least arithmetic it takes."""
        batch = self.setup.batch_size
        nothing = Arithmetic(0, FLOAT * self.grid * self.block.partials)
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

    def _section_shares(
        self, args: tuple[DeviceArray, DeviceArray, DeviceArray, int]
    ) -> list[float]:
        """The share of the first phase that each section takes, in the second of two steps."""
        spent = self.array((len(self._sections()),), np.uint64)
        run = self._bind_images("time_sections", *args, spent)
        for _ in range(2):
            spent.fill_bytes(0)
            run()
        ticks = spent.get().astype(np.float64)
        return list(ticks / ticks.sum())
