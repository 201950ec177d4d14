"""What the engines of GPU stages share: the state of a training on the device, and its timing."""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from enum import IntEnum
from types import MappingProxyType

import numpy as np
from numpy.typing import DTypeLike

from cnnlib.device import Device, DeviceArray, Limits
from cnnlib.engine.base import Engine
from cnnlib.engine.shuffle import Shuffle
from cnnlib.engine.stage import Bytes, Op, Order, Setup, Stage
from cnnlib.engine.upload import LoadTimer, LoadTimes, device_array, resident_limit
from cnnlib.errors import Unsupported
from cnnlib.layers import Array
from cnnlib.levels import channels_of, first_of, of_channels

PROFILE_SECONDS = 0.01
"""Approximate time that a profile spends on each kernel."""
PROFILE_LAUNCHES = 256
"""Most launches of a kernel in a row; there are many, so that the first one's latency is lost."""


class Pass(IntEnum):
    """How a batch goes through the network; the values are enum Mode of kernels/tuned/step.cuh."""

    TRAIN = 0
    """Forward and back: losses are added, and the gradient is left."""
    ONLY_FORWARD = 1
    """Logits are left."""
    GIVEN_ERRORS = 2
    """As TRAIN, but with output errors that are given instead of those of the loss."""


def module_name(stage: Stage[Op], setup: Setup) -> str:
    """What a compiler calls the source of an engine of these arguments."""
    return f"{stage.name}_{setup.network.name}"


def part_of(rates: Array, load: slice, batch: int) -> Array:
    """The rates of the steps on a load's images; those of all steps are `rates` itself."""
    steps = slice(load.start // batch, load.stop // batch)
    return rates if steps == slice(0, len(rates)) else rates[steps]


class DeviceEngine(Engine[Op]):
    """An engine whose parameters, velocity, gradient and losses lie on a device."""

    device: Device
    _logits: DeviceArray
    """(batch, classes): what a pass leaves."""
    _output_errors: DeviceArray
    """(batch, classes): what Pass.GIVEN_ERRORS reads; it may be the same array."""
    resident: int | None = None
    """Images on the device at a time, once a training set is loaded."""
    decisions: Mapping[str, object] = MappingProxyType({})
    """What was decided before the engine was made, for provenance: the plan of its stage."""

    @classmethod
    def kernels_on(cls, stage: Stage[Op], setup: Setup, limits: Limits) -> list[str]:
        """Names of the kernels that an engine of these arguments launches from its source_on."""
        raise Unsupported(f"stage '{stage.name}' has no generated source")

    @classmethod
    def sources_on(cls, stage: Stage[Op], setup: Setup, limits: Limits) -> list[str]:
        """Every source that is compiled when an engine of these arguments is made.

        That is more than source_on where it first measures which of several ways is the fastest.
        """
        return [cls.source_on(stage, setup, limits)]

    @property
    def choices(self) -> Mapping[str, object]:
        return {**self.decisions, "resident_images": self.resident}

    def _allocate_state(self) -> None:
        """Make arrays for the training's vectors and for a batch's images, labels and losses."""
        batch, network = self.setup.batch_size, self.network
        self._parameters = self.array((network.parameter_count,))
        self._velocity = self.array((network.parameter_count,))
        self._velocity.fill_bytes(0)
        self._gradient = self.array((network.parameter_count,))
        self._losses = self.array((batch,))
        self._host_losses: Array = self.device.pinned((batch,))
        self._between = self.device.event(), self.device.event()
        """The events around the last training."""
        self._event_seconds: float | None = math.nan
        self._batch_images = self.array((batch, *network.input_shape), np.uint8)
        self._batch_labels = self.array((batch,), np.uint8)
        self._levels = self._levels_on_device()
        self._allocate_rates(1)

    def _levels_on_device(self) -> tuple[float, float, DeviceArray]:
        """The arguments of a struct Levels of kernels/levels.cuh."""
        channels = channels_of(self.network.input_shape)
        both = self.setup.mean, self.setup.deviation
        array = self.array((2, channels))
        array.set(np.array([of_channels(level, channels) for level in both], np.float32))
        return first_of(both[0]), first_of(both[1]), array

    def _allocate_rates(self, steps: int) -> None:
        """Make an array for the learning rates of a load's steps, filled with the constant rate."""
        self._rates, self._last_rates = self.array((steps,)), np.zeros(0)
        self._constant_rates: Array | None = None
        """What the device has, if it cannot have been written to since."""
        self._upload_rates(self.rates_of(steps, None))

    def _upload_rates(self, rates: Array) -> None:
        """Copy the rates (steps,) of the next steps, unless the device has them already."""
        if rates is self._constant_rates:
            return
        if not np.array_equal(rates, self._last_rates[: len(rates)]):
            self._rates.part(0, (len(rates),)).set(np.ascontiguousarray(rates, dtype=np.float32))
            self._last_rates = rates.copy()
        self._constant_rates = None if rates.flags.writeable else rates

    @property
    def event_seconds(self) -> float:
        """See Engine; read from the events of the last `train` when it is first asked for."""
        if self._event_seconds is None:
            began, ended = self._between
            self._event_seconds = ended.seconds_since(began)
        return self._event_seconds

    @event_seconds.setter
    def event_seconds(self, seconds: float) -> None:
        self._event_seconds = seconds

    def _begin(self) -> None:
        """Begin a training: no losses so far, and the event before its first launch."""
        self._event_seconds = math.nan  # until both events have been recorded
        self._clear()
        self._between[0].record()

    def _clear(self) -> None:
        """Set to 0 what a training begins with."""
        self._losses.fill_bytes(0)

    def _end(self) -> float:
        """End a training: the event behind its last launch, and the sum of all losses, for which
        the host waits.
        """
        self._between[1].record()
        losses = self._losses.get(self._host_losses)
        self._event_seconds = None
        return float(losses.sum(dtype=np.float64))

    def _resident_limit(self) -> int:
        """Images that may be on the device at a time, if that is at least a batch."""
        image_bytes = math.prod(self.network.input_shape)
        return resident_limit(self.device, self.setup.resident_images, image_bytes)

    def time_launch(self, run: Callable[[], None]) -> float:
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
    def _train(self, order: Order | Shuffle, rates: Array, timer: LoadTimer | None) -> float:
        """Train on the batches of `order` at `rates`, one a step; returns the mean loss.

        A Shuffle, which is given where `_draws_order` says so, is drawn by the device. With
        `timer`, the moments of every piece of the images are recorded.
        """

    def _draws_order(self, shuffle: Shuffle) -> bool:
        """Whether the device itself draws the order of such an epoch."""
        return False

    @abstractmethod
    def _run_batch(self, count: int, way: Pass) -> None:
        """Take the first `count` images of the batch through the network; parameters stay."""

    def _pass(self, images: Bytes, way: Pass) -> None:
        """Upload up to a batch of images and take them through the network."""
        self._batch_images.part(0, images.shape).set(np.ascontiguousarray(images))
        self._run_batch(len(images), way)

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        count = len(labels)
        self._losses.fill_bytes(0)
        self._batch_labels.part(0, (count,)).set(np.ascontiguousarray(labels))
        self._pass(images, Pass.TRAIN)
        losses = self._losses.get()[:count]
        return float(losses.sum(dtype=np.float64) / count), self._gradient.get()

    def backward(self, images: Bytes, output_error: Array) -> Array:
        errors = np.ascontiguousarray(output_error, dtype=np.float32)
        self._output_errors.part(0, errors.shape).set(errors)
        self._pass(images, Pass.GIVEN_ERRORS)
        return self._gradient.get()

    def logits(self, images: Bytes) -> Array:
        batch, classes = self.setup.batch_size, self.network.classes
        outputs = np.empty((len(images), classes), np.float32)
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            self._pass(part, Pass.ONLY_FORWARD)
            outputs[start : start + batch] = self._logits.part(0, (len(part), classes)).get()
        return outputs

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """A device array that kernels can index."""
        return device_array(self.device, shape, dtype)

    def train(self, order: Order, rates: Array | None = None) -> float:
        steps = len(order) // self.setup.batch_size
        loss = self._train(order, self.rates_of(steps, rates), None)
        self.steps += steps
        return loss

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        if not self._draws_order(shuffle):
            return super().train_epoch(shuffle, rates)
        steps = len(shuffle) // self.setup.batch_size
        loss = self._train(shuffle, self.rates_of(steps, rates), None)
        self.steps += steps
        return loss

    def train_timed(self, order: Order) -> LoadTimes:
        """Train as `train` does and measure where the time goes, which itself takes a little."""
        timer = LoadTimer(self.device)
        steps = len(order) // self.setup.batch_size
        began = time.perf_counter()
        self._train(order, self.rates_of(steps, None), timer)
        self.steps += steps
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
