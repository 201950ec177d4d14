"""The engine of batched CPU stages: buffers made once, micro-batches, and one lane for each core.

A *micro-batch* is a number of images that an operator handles by one call; its maps are meant to
stay in a core's cache from one operator to the next. A *lane* has the buffers of one micro-batch
and a gradient of its own, and works through its part of every batch.

The first lane is the calling process. The others are processes forked from it, not threads: the
many short calls of numpy would spend their time handing Python's lock to each other (two threads
were no faster than one, two processes nearly twice as fast). The processes share memory: images go
in, gradients come out, and a pipe says when.

Which lane computes what, and in which order gradients are added, depends only on the batch size and
the number of lanes: the same training gives the same bits, run after run.
"""

import math
import mmap
import multiprocessing
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike
from threadpoolctl import ThreadpoolController, threadpool_limits

from cnnlib.arithmetic import ceil_div
from cnnlib.device import Device
from cnnlib.engine.base import Engine
from cnnlib.engine.profile import KernelTime, profile_operators
from cnnlib.engine.stage import Bytes, Order, Planned, Setup, Stage
from cnnlib.errors import WorkerDied
from cnnlib.layers import Array, Shape, Views
from cnnlib.levels import for_maps
from cnnlib.system.machine import usable_cores

MICRO_BATCH = 64
"""Most images in a micro-batch: enough for long inner loops, few enough for the cache."""
LANE_IMAGES = 16
"""Fewest images of a batch for each lane: with fewer, waking another lane costs more."""


class Moment(NamedTuple):
    """When and where images are trained on, by which dropout's masks are drawn."""

    step: int
    positions: Array
    """(n,) The place of each image in its batch."""


class MicroBatchOperator(ABC):
    """One layer over a micro-batch of N images; its buffers are made once, with the operator.

    Maps are stored (H, C, W, N), vectors (U, N): the image is the innermost index, so that a row of
    a map is one long run of memory for all images together, and every product has long rows.

    `source` is the target of the operator below. `source_error` receives the derivative of the loss
    by it, or is None where that is not needed. `parameters` and `gradients` are named views of the
    flat vectors, the layer's own shapes; gradients are added to what is there.
    """

    keeps_target: ClassVar[bool] = False
    """Whether `backward` reads `target`, so that the next operator must not write over it."""

    target: Array
    target_error: Array | None
    moment: Moment | None = None
    """Set before `forward`: None where images are only read, and nothing is trained."""
    setup: Setup
    """What is trained; set by the lane as soon as the operator has been made."""

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
        self.may_overwrite = may_overwrite
        self.make_buffers()

    @abstractmethod
    def make_buffers(self) -> None:
        """Make `target`, `target_error` (None only where no error is needed) and other buffers."""

    @abstractmethod
    def forward(self) -> None:
        """Compute `target` from `source`."""

    @abstractmethod
    def backward(self) -> None:
        """Compute `source_error` from `target_error`, and add to `gradients`.

        `target_error` may be overwritten.
        """

    def buffer(self, *shape: int) -> Array:
        """A new array of the source's dtype, full of NaN: reading before writing is noticed."""
        return np.full(shape, np.nan, self.source.dtype)


class MicroBatchFactory(Protocol):
    """What a stage's record holds for a run of layers: mostly a class of MicroBatchOperators."""

    def __call__(
        self,
        planned: Planned,
        source: Array,
        source_error: Array | None,
        parameters: Views,
        gradients: Views,
        may_overwrite: bool,
    ) -> MicroBatchOperator: ...


def micro_batch_shape(shape: Shape, images: int) -> Shape:
    """Shape in which a micro-batch of maps (C, H, W) or vectors (U,) is stored."""
    if len(shape) == 3:
        channels, height, width = shape
        return height, channels, width, images
    return *shape, images


def in_c_order(maps: Array) -> Array:
    """View of (H, C, W, N) as (C, H, W, N); vectors (U, N) as they are."""
    return maps.transpose(1, 0, 2, 3) if maps.ndim == 4 else maps


class Lane:
    """The operators and buffers of one process."""

    def __init__(
        self,
        plan: Sequence[Planned[MicroBatchFactory]],
        setup: Setup,
        size: int,
        parameters: Array,
        gradient: Array,
    ) -> None:
        """Micro-batches of `size` images; flat `parameters` are read, flat `gradient` added to."""
        network, dtype = setup.network, parameters.dtype
        self.size = size
        self.gradient = gradient
        self._mean, self._deviation = for_maps(setup.mean, dtype), for_maps(setup.deviation, dtype)
        self._source = np.full(micro_batch_shape(network.input_shape, size), np.nan, dtype)
        weights, gradients = network.views(parameters), network.views(gradient)
        self.operators: list[MicroBatchOperator] = []
        target, target_error, may_overwrite = self._source, None, True
        for planned in plan:
            start = planned.start
            operator = planned.operator(
                planned, target, target_error, weights[start], gradients[start], may_overwrite
            )
            operator.setup = setup
            self.operators.append(operator)
            target, target_error = operator.target, operator.target_error
            may_overwrite = not operator.keeps_target

    def micro_batches(self, part: slice) -> Iterator[slice]:
        """`part` of a batch, cut into micro-batches."""
        for start in range(part.start, part.stop, self.size):
            yield slice(start, min(start + self.size, part.stop))

    def forward(self, images: Bytes, moment: Moment | None = None) -> Array:
        """Logits (classes, n) of images (n, C, H, W), n at most a micro-batch.

        `moment` is given where they are trained on.
        """
        count = len(images)
        np.copyto(self._source[..., :count], images.transpose(2, 1, 3, 0))
        # A short micro-batch is filled up with its first image: old numbers may be infinite.
        self._source[..., count:] = self._source[..., :1]
        np.subtract(self._source, self._mean, out=self._source)
        np.divide(self._source, self._deviation, out=self._source)
        for operator in self.operators:
            operator.moment = moment
            operator.forward()
        return in_c_order(self.operators[-1].target).reshape(-1, self.size)[:, :count]

    def backward(self, error: Array) -> None:
        """Add the gradient of the images that `forward` saw last, for error (classes, n)."""
        target_error = self.operators[-1].target_error
        if target_error is None:
            return  # no layer has parameters
        target_error = in_c_order(target_error)
        count = error.shape[1]
        target_error[..., :count] = error.reshape(*target_error.shape[:-1], count)
        target_error[..., count:] = 0
        for operator in reversed(self.operators):
            operator.backward()


class Exchange:
    """What the lanes share: the parameters, one batch, and a gradient for each lane."""

    def __init__(self, setup: Setup, dtype: DTypeLike, lanes: int) -> None:
        network, batch = setup.network, setup.batch_size
        self.parameters = shared_zeros((network.parameter_count,), dtype)
        self.gradients = shared_zeros((lanes, network.parameter_count), dtype)
        self.images = shared_zeros((batch, *network.input_shape), np.uint8)
        self.labels = shared_zeros((batch,), np.int64)
        self.error = shared_zeros((network.classes, batch), dtype)
        self.positions = shared_zeros((batch,), np.int64)
        self.positions[:] = np.arange(batch)
        self.step = shared_zeros((1,), np.int64)
        self._loss = setup.loss_function

    def moment(self, images: slice) -> Moment:
        """When and where these images of the batch are trained on."""
        return Moment(int(self.step[0]), self.positions[images])

    def add_losses(self, lane: Lane, part: slice, batch: int) -> float:
        """The sum of the losses of `part`; puts its share of the mean's gradient into the lane."""
        total = 0.0
        lane.gradient.fill(0)
        for images in lane.micro_batches(part):
            logits = lane.forward(self.images[images], self.moment(images))
            losses, error = self._loss.many(logits, self.labels[images])
            error /= batch
            lane.backward(error)
            total += float(losses.sum(dtype=np.float64))
        return total

    def push_errors(self, lane: Lane, part: slice, batch: int) -> float:
        """Put the gradient of `part` into the lane, for the derivatives in `error`."""
        lane.gradient.fill(0)
        for images in lane.micro_batches(part):
            lane.forward(self.images[images], self.moment(images))
            lane.backward(self.error[:, images])
        return 0.0

    def do(self, task: str, lane: Lane, part: slice, batch: int) -> float:
        """Carry out one of the tasks above; a loss that is not finite shows a divergence."""
        with np.errstate(all="ignore"):
            return float(getattr(self, task)(lane, part, batch))


def shared_zeros(shape: Shape, dtype: DTypeLike) -> Array:
    """Zeros in memory that processes forked from now on share; MemoryError if it is too little."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        shared = mmap.mmap(-1, max(size, 1))
    except (OSError, OverflowError):
        raise MemoryError(f"cannot allocate {size} bytes of shared memory") from None
    return np.frombuffer(shared, dtype, math.prod(shape)).reshape(shape)


class MicroBatchEngine(Engine[MicroBatchFactory]):
    """Trains by MicroBatchOperators, on as many cores as the stage allows and the batch can use."""

    def __init__(
        self, stage: Stage[MicroBatchFactory], setup: Setup, device: Device | None = None
    ) -> None:
        super().__init__(stage, setup, device)
        cores = stage.threads or usable_cores()
        lanes = max(1, min(cores, setup.batch_size // LANE_IMAGES))
        self._share = ceil_div(setup.batch_size, lanes)
        self._exchange = exchange = Exchange(setup, stage.dtype, lanes)
        self._vector = exchange.parameters
        self._velocity = np.zeros_like(self._vector)
        self._change = np.zeros_like(self._vector)
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
        """v = momentum v + gradient + decay parameters; parameters -= rate v."""
        dtype = self._vector.dtype.type
        np.multiply(self._velocity, dtype(self.setup.momentum), out=self._velocity)
        if self.setup.weight_decay:
            np.multiply(self._vector, dtype(self.setup.weight_decay), out=self._change)
            np.add(self._velocity, self._change, out=self._velocity)
        for gradient in self._exchange.gradients:
            np.add(self._velocity, gradient, out=self._velocity)
        np.multiply(self._velocity, dtype(rate), out=self._change)
        np.subtract(self._vector, self._change, out=self._vector)

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
        own, *others = (slice(*part) for part in pairwise(ends))
        for worker, part in zip(self._workers, others, strict=True):
            worker.begin(task, part, batch)
        total = self._exchange.do(task, self.lane, own, batch)
        return sum((worker.result() for worker in self._workers), total)

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


class Worker:
    """A lane in a process of its own, which ends with `close` or when this process dies."""

    def __init__(
        self, stage: str, exchange: Exchange, lane: Lane, elder: Sequence["Worker"]
    ) -> None:
        self._stage = stage
        self._pipe, far_end = multiprocessing.Pipe()
        near_ends = [self._pipe, *(worker._pipe for worker in elder)]
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(
            target=_serve, args=(exchange, lane, far_end, near_ends), daemon=True
        )
        self._process.start()
        far_end.close()

    def begin(self, task: str, part: slice, batch: int) -> None:
        """Ask for a task of Exchange over `part` of the batch."""
        try:
            self._pipe.send((task, part, batch))
        except OSError:
            raise self._ended() from None

    def result(self) -> float:
        try:
            return float(self._pipe.recv())
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> WorkerDied:
        self._process.join(1)
        return WorkerDied(
            f"a process of stage '{self._stage}' ended with exit code {self._process.exitcode} "
            f"(negative: the signal that killed it; -9 is often a lack of memory)"
        )

    def close(self) -> None:
        with suppress(OSError):  # the process may have ended already
            self._pipe.send(None)
        self._pipe.close()
        self._process.join()


def _serve(
    exchange: Exchange, lane: Lane, pipe: Connection, near_ends: Sequence[Connection]
) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C also reaches the parent, which ends this process
    for end in near_ends:  # inherited ends would keep the pipes open after the parent
        end.close()
    with threadpool_limits(1, user_api="blas"), suppress(EOFError, OSError):
        while (message := pipe.recv()) is not None:
            task, part, batch = message
            pipe.send(exchange.do(task, lane, part, batch))
