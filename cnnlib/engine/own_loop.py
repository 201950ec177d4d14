"""A training loop of a stage's author as an engine: in numpy, PyTorch, CuPy, Numba or any library.

The author says how to prepare a network, how to take one step and how to go forward. What the
checks need besides is derived from that: above all the gradient, which is read off a step, so that
the step that is timed is the one that is compared with the reference.
"""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from cnnlib.device import Device, Limits
from cnnlib.engine.base import Engine
from cnnlib.engine.profile import PROFILED_SECONDS, KernelTime
from cnnlib.engine.stage import Bytes, Order, Part, Planned, Setup, Stage, plan
from cnnlib.errors import Unsupported
from cnnlib.layers import DEFAULT_LOSS, Array
from cnnlib.levels import for_maps

PROBE = 2.0**20
"""The learning rate of the step that a gradient is read off: so large that rounding the new weights
takes nothing from the gradient, and a power of two, so that the product is exact."""

PROFILED_CALLS = 4
"""Calls of a profile between two waits for the device."""


class OwnLoop(Engine[Any]):
    """Trains by the author's `step`, which gets normalised images on the author's device.

    A subclass sets `weights` in `prepare`, one array for each of `network.parameters`, in their
    order and of their shapes, and `velocities` likewise where `setup.momentum` is not zero. The
    arrays may be of any library that writes `array[...] = values`, as numpy, PyTorch and CuPy do;
    for others `read` and `write` are overridden.

    Where the stage's record has `operators`, the plan of them is in `plan`, and a network with
    other layers is refused by name. Without them `prepare` raises Unsupported for what it cannot
    take.
    """

    losses: ClassVar[tuple[str, ...]] = (DEFAULT_LOSS,)
    """Names of the losses (cnnlib.layers.LOSSES) that `step` knows; others are refused."""
    decays: ClassVar[bool] = False
    """Whether `step` knows setup.weight_decay; if not, a training with one is refused."""
    weights: list[Any]
    """The parameters, one array for each of network.parameters."""
    velocities: list[Any]
    """The momentum's velocities alike; they may be omitted where setup.momentum is zero."""

    def __init__(self, stage: Stage[Any], setup: Setup, device: Device | None = None) -> None:
        self.stage = stage
        self.setup = setup
        self.network = setup.network
        self.plan = self._planned(stage, setup)
        self.operators = [planned.operator for planned in self.plan]
        self.weights, self.velocities = [], []
        self.prepare()
        self._check_arrays()
        # With dimensions: numbers without any do not decide the type of a difference everywhere.
        self._mean, self._deviation = (
            self.place(for_maps(level, stage.dtype).reshape(-1, 1, 1))
            for level in (setup.mean, setup.deviation)
        )
        self._losses: list[Any] = []

    # What an author writes

    @abstractmethod
    def prepare(self) -> None:
        """Set `weights` and `velocities`, and make whatever else the training needs."""

    @abstractmethod
    def step(self, images: Any, labels: Any, rate: float) -> Any:
        """Take one step of gradient descent and return the mean loss over the batch before it.

        images (n, channels, height, width), normalised, of the stage's dtype; labels (n,) int64.
        v <- setup.momentum v + gradient; w <- w - rate v. The loss is a number or a new array of
        one element, which may still be on its way: it is only read after the last step. `steps` is
        the number of steps before this one, by which masks of dropout are drawn.
        """

    @abstractmethod
    def forward(self, images: Any) -> Any:
        """The logits (n, classes) of normalised images; the weights stay as they are."""

    def place(self, array: Array) -> Any:
        """Bring an array of numpy to where the training is; numpy's own stay as they are."""
        return array

    def wait(self) -> None:
        """Return when the last update is done; reading the last weight waits for one stream."""
        self.read(self.weights[-1].reshape(-1)[:1])

    def read(self, array: Any) -> Array:
        """A copy of one of the author's arrays, for numpy."""
        for method in ("detach", "cpu", "get", "copy_to_host"):
            if hasattr(array, method):
                array = getattr(array, method)()
        return np.array(array)

    def write(self, array: Any, values: Array) -> Any:
        """Put `values`, of the same shape, into one of the author's arrays, and return that.

        For a library whose arrays do not change, such as JAX, return a new array of the values.
        """
        target = array.detach() if hasattr(array, "detach") else array
        target[...] = self.place(values)
        return array

    # What is derived from that

    @classmethod
    def _planned(cls, stage: Stage[Any], setup: Setup) -> tuple[Planned[Any], ...]:
        if setup.loss not in cls.losses:
            known = ", ".join(cls.losses)
            raise Unsupported(f"stage '{stage.name}' has no loss {setup.loss}; it knows: {known}")
        if setup.weight_decay and not cls.decays:
            raise Unsupported(f"stage '{stage.name}' has no weight decay")
        if stage.operators:
            return plan(stage, setup.network)
        return (Planned(cls, setup.network, 0, len(setup.network.layers)),)

    @classmethod
    def operators_on(
        cls, stage: Stage[Any], setup: Setup, limits: Limits | None
    ) -> Sequence[object]:
        return [planned.operator for planned in cls._planned(stage, setup)]

    def _check_arrays(self) -> None:
        """Raise TypeError unless the weights are the network's parameters."""
        wanted = [parameter.shape for parameter in self.network.parameters]
        lists = {"weights": self.weights}
        if self.setup.momentum or self.velocities:
            lists["velocities"] = self.velocities
        for name, arrays in lists.items():
            found = [tuple(array.shape) for array in arrays]
            if found != wanted:
                raise TypeError(f"prepare() leaves {name} of shapes {found}, not {wanted}")

    def normalised(self, images: Any) -> Any:
        """Images (n, channels, height, width) of bytes, placed, as numbers of the stage's dtype."""
        return (images - self._mean) / self._deviation

    def load(self, images: Bytes, labels: Bytes) -> None:
        self._images = self.place(np.ascontiguousarray(images))
        self._labels = self.place(labels.astype(np.int64))

    def train(self, order: Order, rates: Array | None = None) -> float:
        size = self.setup.batch_size
        steps = len(order) // size
        places = self.place(np.ascontiguousarray(order[: steps * size], dtype=np.int64))
        self._losses, total = [], 0.0
        for number, rate in enumerate(self.rates_of(steps, rates)):
            chosen = places[number * size : (number + 1) * size]
            images = self.normalised(self._images[chosen])
            loss = self.step(images, self._labels[chosen], float(rate))
            self._losses.append(loss)
            self._steps += 1
            total = total + loss
        self.wait()
        return float(total) / steps if steps else math.nan

    @property
    def step_losses(self) -> Array | None:  # type: ignore[override]
        """The loss of each step of the last `train`, (steps,), for a stage that does not repeat."""
        if self.stage.repeatable:
            return None
        return np.array([float(loss) for loss in self._losses])

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        """(mean loss, flat gradient): what one step at the rate PROBE, from rest, changes."""
        before, velocity = self.parameters, self.velocity
        self.velocity = np.zeros_like(velocity)
        placed = self.place(np.ascontiguousarray(images)), self.place(labels.astype(np.int64))
        loss = float(self.step(self.normalised(placed[0]), placed[1], PROBE))
        exact = before.astype(np.float64)
        gradient = (exact - self.parameters) / PROBE - self.setup.weight_decay * exact
        self.parameters, self.velocity = before, velocity
        return loss, gradient.astype(before.dtype)

    def backward(self, images: Bytes, output_error: Array) -> Array:
        """A loop has the errors of its own loss alone; the checks do without this."""
        raise Unsupported(f"stage '{self.stage.name}' has no way to take the errors of logits")

    def logits(self, images: Bytes) -> Array:
        size = self.setup.batch_size
        found = np.empty((len(images), self.network.classes), self.stage.dtype)
        for start in range(0, len(images), size):
            part = self.place(np.ascontiguousarray(images[start : start + size]))
            found[start : start + size] = self.read(self.forward(self.normalised(part)))
        return found

    def profile(self) -> list[KernelTime]:
        """The way forward, and as `backward` all the rest of a step: errors, loss and update.

        Both are means over the same batch. An engine that knows more of its parts overrides this;
        one that overrides `load` alone has no profile.
        """
        if not hasattr(self, "_images"):
            return []
        size, network = self.setup.batch_size, self.network
        images, labels = self.normalised(self._images[:size]), self._labels[:size]
        saved = self.parameters, self.velocity
        forward = self._mean_seconds(lambda: self.forward(images))
        step = self._mean_seconds(lambda: self.step(images, labels, 0.0))
        self.parameters, self.velocity = saved
        whole = Planned(self, network, 0, len(network.layers))
        times: tuple[tuple[Part, float], ...] = (
            ("forward", forward),
            ("backward", max(step - forward, 0.0)),
        )
        return [
            KernelTime("network", part, "network", part, *whole.arithmetic(part, size), 0, 1, each)
            for part, each in times
        ]

    def _mean_seconds(self, call: Callable[[], object]) -> float:
        """Seconds of a call, once the first of them has done what only the first one does."""
        call()
        self.wait()
        count, began = 0, time.perf_counter()
        while not count or time.perf_counter() - began < PROFILED_SECONDS / 2:
            for _ in range(PROFILED_CALLS):
                call()
            self.wait()
            count += PROFILED_CALLS
        return (time.perf_counter() - began) / count

    def _flat(self, arrays: Sequence[Any]) -> Array:
        parts = [self.read(array).reshape(-1) for array in arrays]
        return np.concatenate(parts).astype(self.stage.dtype)

    def _fill(self, arrays: list[Any], vector: Array) -> None:
        for number, parameter in enumerate(self.network.parameters):
            part = vector[parameter.offset : parameter.offset + parameter.size]
            values = np.ascontiguousarray(part, dtype=self.stage.dtype).reshape(parameter.shape)
            arrays[number] = self.write(arrays[number], values)

    @property
    def parameters(self) -> Array:
        return self._flat(self.weights)

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._fill(self.weights, vector)

    @property
    def velocity(self) -> Array:
        if not self.velocities:
            return np.zeros(self.network.parameter_count, self.stage.dtype)
        return self._flat(self.velocities)

    @velocity.setter
    def velocity(self, vector: Array) -> None:
        if self.velocities:
            self._fill(self.velocities, vector)
