"""The engine of batched CPU stages: buffers made once, micro-batches, and one lane for each core.

What an operator and a lane are says cnnlib/engine/micro_batch.py, how lanes work side by side
cnnlib/engine/lanes.py.

Which lane computes what, and in which order gradients are added, depends only on the batch size and
the number of lanes: the same training gives the same bits, run after run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
from threadpoolctl import ThreadpoolController

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Device
from cnnlib.engine.base import Engine
from cnnlib.engine.lanes import Exchange, Worker
from cnnlib.engine.micro_batch import (
    Lane,
    MicroBatchFactory,
    MicroBatchOperator,
    Moment,
    in_c_order,
    micro_batch_shape,
)
from cnnlib.engine.profile import KernelTime, profile_operators
from cnnlib.engine.stage import Bytes, Order, Setup, Stage
from cnnlib.layers import Array
from cnnlib.network import Network
from cnnlib.system.machine import usable_cores

__all__ = [
    "MICRO_BATCH",
    "Lane",
    "MicroBatchEngine",
    "MicroBatchFactory",
    "MicroBatchOperator",
    "Moment",
    "in_c_order",
    "micro_batch_shape",
]

MICRO_BATCH = 64
"""Most images in a micro-batch: enough for long inner loops, few enough for the cache."""
LANE_FLOPS = 2**24
"""Least work of a lane, going forward: with less, waking another lane costs more."""
LANE_IMAGES = 4, 16
"""Fewest images of a lane: with fewer, runs of memory are short; and how many always suffice."""
UPDATED_ALONE = 2**21
"""Elements of all lanes' gradients from which on the lanes share an update, not the first alone."""


def lane_images(network: Network) -> int:
    """Fewest images of a batch for each lane."""
    fewest, enough = LANE_IMAGES
    flops = max(1, sum(network.forward_flops))
    return max(fewest, min(enough, ceil_div(LANE_FLOPS, flops)))


class MicroBatchEngine(Engine[MicroBatchFactory]):
    """Trains by MicroBatchOperators, on as many cores as the stage allows and the batch can use."""

    def __init__(
        self, stage: Stage[MicroBatchFactory], setup: Setup, device: Device | None = None
    ) -> None:
        super().__init__(stage, setup, device)
        cores = stage.threads or usable_cores()
        lanes = max(1, min(cores, setup.batch_size // lane_images(setup.network)))
        self._share = ceil_div(setup.batch_size, lanes)
        lanes = ceil_div(setup.batch_size, self._share)
        self._exchange = exchange = Exchange(setup, stage.dtype, lanes)
        self._vector = exchange.parameters
        self._velocity = exchange.velocity
        # Micro-batches of equal size, so that as few places as possible stay empty.
        size = ceil_div(self._share, ceil_div(self._share, MICRO_BATCH))
        self.lane = self._new_lane(size, exchange.gradients[0])
        self.operators = self.lane.operators
        self._reader: Lane | None = None
        # Several lanes use one BLAS thread each; a single lane lets BLAS use all cores.
        self._blas, self._blas_threads = ThreadpoolController(), 1 if lanes > 1 else cores
        self._workers: list[Worker] = []
        for gradient in exchange.gradients[1:]:
            lane = self._new_lane(size, gradient)
            self._workers.append(Worker(stage.name, exchange, lane, self._workers))

    def _new_lane(self, size: int, gradient: Array) -> Lane:
        return Lane(self.plan, self.setup, size, self._vector, gradient)

    @property
    def lane_count(self) -> int:
        """Number of processes that compute, this one included."""
        return 1 + len(self._workers)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()

    def load(self, images: Bytes, labels: Bytes) -> None:
        self._images, self._labels = images, labels

    def train(self, order: Order, rates: Array | None = None) -> float:
        size = self.setup.batch_size
        steps = len(order) // size
        total = 0.0
        with self._blas.limit(limits=self._blas_threads, user_api="blas"):
            for step, rate in enumerate(self.rates_of(steps, rates)):
                batch = order[step * size : (step + 1) * size]
                np.take(self._images, batch, axis=0, out=self._exchange.images)
                self._exchange.labels[:] = self._labels[batch]
                total += self._do("add_losses", size)
                self._update(rate)
                self.steps += 1
        return total / (steps * size)

    def _update(self, rate: float) -> None:
        """Go down the gradient; where many numbers are added up, each lane updates its share."""
        count = self.network.parameter_count
        shares = self.lane_count if self.lane_count * count >= UPDATED_ALONE else 1
        self._share_out("update", [count * lane // shares for lane in range(shares + 1)], rate)

    def gradient(self, images: Bytes, labels: Bytes) -> tuple[float, Array]:
        count = len(images)
        self._exchange.images[:count] = images
        self._exchange.labels[:count] = labels
        with self._blas.limit(limits=self._blas_threads, user_api="blas"):
            total = self._do("add_losses", count)
        return total / count, self._sum_of_gradients()

    def _sum_of_gradients(self) -> Array:
        total: Array = self._exchange.gradients.sum(axis=0)
        return total

    def backward(self, images: Bytes, output_error: Array, positions: Array | None = None) -> Array:
        """As every engine does; `positions` (n,) are those of the images in their batch, where
        they are not its first.
        """
        count = len(images)
        self._exchange.images[:count] = images
        self._exchange.error[:, :count] = output_error.T
        with self._at(positions), self._blas.limit(limits=self._blas_threads, user_api="blas"):
            self._do("push_errors", count)
        return self._sum_of_gradients()

    @contextmanager
    def _at(self, positions: Array | None) -> Iterator[None]:
        """Let the first images of the batch have these positions in it."""
        if positions is not None:
            self._exchange.positions[: len(positions)] = positions
        try:
            yield
        finally:
            if positions is not None:
                self._exchange.positions[:] = np.arange(len(self._exchange.positions))

    def training_logits(self, images: Bytes, positions: Array) -> Array:
        """(n, classes) as a step would see them, with dropout, at these positions of a batch."""
        outputs = np.empty((len(images), self.network.classes), self._vector.dtype)
        with self._blas.limit(limits=self._blas_threads, user_api="blas"):
            for part in self.lane.micro_batches(slice(0, len(images))):
                moment = Moment(self.steps, positions[part])
                outputs[part] = self.lane.forward(images[part], moment).T
        return outputs

    def logits(self, images: Bytes) -> Array:
        if self._reader is None:
            # A lane of its own, so that small batches are read as fast as large ones.
            self._reader = self._new_lane(MICRO_BATCH, np.empty_like(self._vector))
        outputs = np.empty((len(images), self.network.classes), self._vector.dtype)
        with (
            self._blas.limit(limits=self._blas_threads, user_api="blas"),
            np.errstate(all="ignore"),
        ):
            for part in self._reader.micro_batches(slice(0, len(images))):
                outputs[part] = self._reader.forward(images[part]).T
        return outputs

    def profile(self) -> list[KernelTime]:
        """Times of the first lane's operators while all lanes work, each on its part of a batch.

        They take the same time side by side, in which the whole batch's arithmetic is done.
        """
        size = self.setup.batch_size
        saved = self.parameters, self.velocity
        self._exchange.images[:] = self._images[:size]
        self._exchange.labels[:] = self._labels[:size]
        with self._blas.limit(limits=self._blas_threads, user_api="blas"):
            rows = profile_operators(
                self.setup,
                self.plan,
                self.lane.operators,
                step=lambda: self._do("add_losses", size),
                update=lambda: self._update(self.setup.learning_rate),
            )
        self.parameters, self.velocity = saved
        return rows

    def _do(self, task: str, batch: int) -> float:
        """The sum of what all lanes return for a task of Exchange on the first `batch` images."""
        ends = [min(lane * self._share, batch) for lane in range(self.lane_count + 1)]
        return self._share_out(task, ends, batch)

    def _share_out(self, task: str, ends: Sequence[int], value: float) -> float:
        """The sum of what lanes return for a task of Exchange; lane i does from ends i to i + 1."""
        own, *others = (slice(*part) for part in pairwise(ends))
        workers = self._workers[: len(others)]
        for worker, part in zip(workers, others, strict=True):
            worker.begin(task, part, value)
        total = self._exchange.do(task, self.lane, own, value)
        return sum((worker.result() for worker in workers), total)

    @property
    def steps(self) -> int:
        return int(self._exchange.step[0])

    @steps.setter
    def steps(self, count: int) -> None:
        self._exchange.step[0] = count

    @property
    def parameters(self) -> Array:
        return self._vector.copy()

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        self._vector[:] = vector

    @property
    def velocity(self) -> Array:
        return self._velocity.copy()

    @velocity.setter
    def velocity(self, vector: Array) -> None:
        self._velocity[:] = vector
