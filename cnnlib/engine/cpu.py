"""The engine of batched CPU stages: buffers made once, batches cut into blocks, a lane a core.

A *block* is a number of images that an operator handles by one call; its maps are meant to stay in
a core's cache from one operator to the next. A *lane* is one core's thread with the buffers of one
block and a gradient of its own. Numpy lets go of Python's lock inside its loops and in BLAS, so
lanes run at the same time. Who computes what, and in which order gradients are added, depends on
the batch size and the number of lanes alone: the same training gives the same bits, run after run.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from cnnlib.device import Device
from cnnlib.engine.base import Bytes, Engine, Order, Planned, Setup, Stage
from cnnlib.layers import Array, Shape, Views
from cnnlib.machine import usable_cores

BLOCK_IMAGES = 32
"""Most images in a block: enough for long inner loops, few enough for the cache."""
LANE_IMAGES = 8
"""Fewest images a batch must have for each lane: with less, starting a lane costs more."""

Result = TypeVar("Result")


class BlockOperator(ABC):
    """One layer over a block of N images, for good: its buffers are made here, once.

    Maps are stored (H, C, W, N), vectors (U, N): the image is the innermost index, so that a row of
    a map is one long run of memory for all images together, and every product has long rows.

    `source` is the target of the operator below. `source_error` is where the derivative of the loss
    by it is wanted, or None if nobody wants it. `parameters` and `gradients` are named views of the
    flat vectors, the layer's own shapes; gradients are added to what is there.
    """

    keeps_target: ClassVar[bool] = False
    """Whether `backward` reads `target`, so that the next operator must not write over it."""

    target: Array
    target_error: Array | None

    def __init__(
        self,
        planned: Planned,
        source: Array,
        source_error: Array | None,
        parameters: Views,
        gradients: Views,
        may_overwrite: bool,
    ) -> None:
        """`may_overwrite`: the target may take the source's place."""
        self.planned = planned
        self.source = source
        self.source_error = source_error
        self.parameters = parameters
        self.gradients = gradients

    @abstractmethod
    def forward(self) -> None:
        """Compute `target` from `source`."""

    @abstractmethod
    def backward(self) -> None:
        """Compute `source_error` from `target_error` (which may be spoilt), add to `gradients`."""


def block_shape(shape: Shape, images: int) -> Shape:
    """Shape of the block of maps (C, H, W) or vectors (U,) of so many images."""
    if len(shape) == 3:
        channels, height, width = shape
        return height, channels, width, images
    return *shape, images


def columns(block: Array) -> Array:
    """The block as (elements, N) with an image's elements in C order of (C, H, W); may copy."""
    if block.ndim == 4:
        block = block.transpose(1, 0, 2, 3)
    return block.reshape(-1, block.shape[-1])


class Lane:
    """The operators and buffers of one thread."""

    def __init__(self, engine: "BlockEngine", size: int) -> None:
        network, setup, dtype = engine.network, engine.setup, np.dtype(engine.stage.dtype)
        self.size = size
        self.mean, self.deviation = dtype.type(setup.mean), dtype.type(setup.deviation)
        self.bytes = np.zeros((size, *network.input_shape), np.uint8)
        self.source = np.full(block_shape(network.input_shape, size), np.nan, dtype)
        self.gradient = np.zeros(network.parameter_count, dtype)
        parameters, gradients = network.views(engine.vector), network.views(self.gradient)
        self.operators: list[BlockOperator] = []
        target, target_error, may_overwrite = self.source, None, True
        for planned in engine.plan:
            operator: BlockOperator = planned.operator(
                planned,
                target,
                target_error,
                parameters[planned.start],
                gradients[planned.start],
                may_overwrite,
            )
            self.operators.append(operator)
            target, target_error = operator.target, operator.target_error
            may_overwrite = not operator.keeps_target
        self.output, self.output_error = target, target_error

    def blocks(self, where: Order) -> Iterator[tuple[slice, Order]]:
        """(positions, values) of `where`, at most a block at a time."""
        for start in range(0, len(where), self.size):
            positions = slice(start, min(start + self.size, len(where)))
            yield positions, where[positions]

    def forward(self, images: Bytes, where: Order) -> Array:
        """Logits (classes, n) of the images at `where`; the rest of the block is filled up."""
        count = len(where)
        # mode="clip" only because the default makes a copy of `out`; indices are known to be good
        np.take(images, where, axis=0, out=self.bytes[:count], mode="clip")
        # A short block repeats an image, as stale values could be infinite; its error will be zero.
        self.bytes[count:] = self.bytes[0]
        np.copyto(self.source, self.bytes.transpose(2, 1, 3, 0))
        np.subtract(self.source, self.mean, out=self.source)
        np.divide(self.source, self.deviation, out=self.source)
        for operator in self.operators:
            operator.forward()
        return columns(self.output)[:, :count]

    def backward(self, error: Array) -> None:
        """Add the gradient for `error` (classes, n), of the block last seen by `forward`."""
        if self.output_error is None:
            return  # a network without parameters
        by_class = self.output_error
        if by_class.ndim == 4:
            by_class = by_class.transpose(1, 0, 2, 3)
            error = error.reshape(*by_class.shape[:-1], -1)
        by_class[..., : error.shape[-1]] = error
        by_class[..., error.shape[-1] :] = 0
        for operator in reversed(self.operators):
            operator.backward()

    def add_losses(self, images: Bytes, labels: Bytes, where: Order, batch: int) -> float:
        """Sum of the losses at `where`; the gradient of that sum, over `batch`, is added."""
        total = 0.0
        for _, block in self.blocks(where):
            losses, error = cross_entropies(self.forward(images, block), labels[block])
            error /= batch
            self.backward(error)
            total += float(losses.sum(dtype=np.float64))
        return total


def cross_entropies(logits: Array, labels: Array) -> tuple[Array, Array]:
    """(losses (n,), error (classes, n)): cnnlib.layers.cross_entropy of every column at once."""
    shifted = logits - logits.max(axis=0)
    powers = np.exp(shifted)
    sums = powers.sum(axis=0)
    images = np.arange(len(labels))
    losses = np.log(sums) - shifted[labels, images]
    error = powers / sums
    error[labels, images] -= 1
    return losses, error


class BlockEngine(Engine):
    """Trains by BlockOperators, on as many cores as the stage allows and the batch can use."""

    def __init__(self, stage: Stage, setup: Setup, device: Device | None = None) -> None:
        super().__init__(stage, setup, device)
        self.vector = np.zeros(self.network.parameter_count, stage.dtype)
        self._velocity = np.zeros_like(self.vector)
        self._scratch = np.zeros_like(self.vector)
        cores = stage.threads or usable_cores()
        lanes = max(1, min(cores, setup.batch_size // LANE_IMAGES))
        per_lane = math.ceil(setup.batch_size / lanes)
        size = math.ceil(per_lane / math.ceil(per_lane / BLOCK_IMAGES))
        self.lanes = [Lane(self, size) for _ in range(lanes)]
        # The calling thread is the first lane.
        self._pool = ThreadPoolExecutor(lanes - 1) if lanes > 1 else None
        self._libraries = ThreadpoolController()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def load(self, images: Bytes, labels: Bytes) -> None:
        self._images, self._labels = images, labels

    def train(self, order: Order) -> float:
        size = self.setup.batch_size
        steps = len(order) // size
        total = 0.0
        with self._one_blas_thread_a_lane():
            for step in range(steps):
                batch = order[step * size : (step + 1) * size]
                total += self._add_gradients(self._images, self._labels, batch)
                self._update()
        return total / (steps * size)

    def _update(self) -> None:
        """velocity = momentum velocity + gradient; parameters -= learning rate velocity."""
        np.multiply(
            self._velocity, self._velocity.dtype.type(self.setup.momentum), out=self._velocity
        )
        for lane in self.lanes:
            np.add(self._velocity, lane.gradient, out=self._velocity)
        rate = self.vector.dtype.type(self.setup.learning_rate)
        np.multiply(self._velocity, rate, out=self._scratch)
        np.subtract(self.vector, self._scratch, out=self.vector)

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        with self._one_blas_thread_a_lane():
            total = self._add_gradients(images, labels, np.arange(len(images)))
        return total / len(images), self._sum_of_gradients()

    def backward(self, images: Bytes, output_error: Array) -> Array:
        error = output_error.T.astype(self.vector.dtype)

        def work(lane: Lane, where: Order) -> None:
            lane.gradient.fill(0)
            for _, block in lane.blocks(where):
                lane.forward(images, block)
                lane.backward(error[:, block])

        with self._one_blas_thread_a_lane():
            self._share(work, np.arange(len(images)))
        return self._sum_of_gradients()

    def logits(self, images: Bytes) -> Array:
        outputs = np.empty((len(images), self.network.classes), self.vector.dtype)

        def work(lane: Lane, where: Order) -> None:
            for _, block in lane.blocks(where):
                outputs[block] = lane.forward(images, block).T

        with self._one_blas_thread_a_lane():
            self._share(work, np.arange(len(images)))
        return outputs

    def _add_gradients(self, images: Bytes, labels: Bytes, where: Order) -> float:
        """Sum of the losses; leaves each lane's part of the mean loss's gradient in the lane."""

        def work(lane: Lane, part: Order) -> float:
            lane.gradient.fill(0)
            return lane.add_losses(images, labels, part, len(where))

        return sum(self._share(work, where))

    def _sum_of_gradients(self) -> Array:
        total = np.zeros_like(self.vector)
        for lane in self.lanes:
            total += lane.gradient
        return total

    def _share(self, work: Callable[[Lane, Order], Result], where: Order) -> list[Result]:
        """`work(lane, its part of where)` on every lane at once; results in the lanes' order."""
        share = math.ceil(len(where) / len(self.lanes))
        parts = [where[i * share : (i + 1) * share] for i in range(len(self.lanes))]
        # Infinities and NaN are no surprise in a training that diverges: the loss tells of them.
        others = [
            self._pool.submit(_quietly, work, lane, part)
            for lane, part in zip(self.lanes[1:], parts[1:], strict=True)
            if self._pool is not None
        ]
        first = _quietly(work, self.lanes[0], parts[0])
        return [first, *(other.result() for other in others)]

    def _one_blas_thread_a_lane(self) -> Any:
        """BLAS leaves the cores to the lanes; a single lane leaves them to BLAS."""
        threads = 1 if len(self.lanes) > 1 else self.stage.threads or usable_cores()
        return self._libraries.limit(limits=threads, user_api="blas")

    @property
    def parameters(self) -> Array:
        return self.vector.copy()

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self.vector[:] = vector

    @property
    def velocity(self) -> Array:
        return self._velocity.copy()

    @velocity.setter
    def velocity(self, vector: Array) -> None:
        self._velocity[:] = vector


def _quietly(work: Callable[[Lane, Order], Result], lane: Lane, part: Order) -> Result:
    with np.errstate(all="ignore"):
        return work(lane, part)
