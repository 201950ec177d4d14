"""Lanes that work side by side in processes of their own, and what they share.

The first lane is the calling process. The others are processes forked from it, not threads: the
many short calls of numpy would spend their time handing Python's lock to each other (two threads
were no faster than one, two processes nearly twice as fast). The processes share memory: images go
in, gradients come out, and a pipe says when.
"""

import math
import mmap
import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import DTypeLike
from threadpoolctl import threadpool_limits

from cnnlib.engine.micro_batch import Lane, Moment
from cnnlib.engine.stage import Setup
from cnnlib.errors import WorkerDied
from cnnlib.layers import Array, Shape

UPDATED_TOGETHER = 2**15
"""Parameters that are updated by one call: so many that they stay in a core's cache."""


class Exchange:
    """What the lanes share: the parameters, one batch, and a gradient for each lane."""

    def __init__(self, setup: Setup, dtype: DTypeLike, lanes: int) -> None:
        network, batch = setup.network, setup.batch_size
        self.parameters = shared_zeros((network.parameter_count,), dtype)
        self.gradients = shared_zeros((lanes, network.parameter_count), dtype)
        self.velocity = shared_zeros((network.parameter_count,), dtype)
        self.images = shared_zeros((batch, *network.input_shape), np.uint8)
        self.labels = shared_zeros((batch,), np.int64)
        self.error = shared_zeros((network.classes, batch), dtype)
        self.positions = shared_zeros((batch,), np.int64)
        self.positions[:] = np.arange(batch)
        self.step = shared_zeros((1,), np.int64)
        self._loss = setup.loss_function
        self._momentum, self._decay = np.array([setup.momentum, setup.weight_decay], dtype)
        self._change = np.empty(UPDATED_TOGETHER, dtype)

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

    def update(self, lane: Lane, part: slice, rate: float) -> float:
        """v = momentum v + gradient + decay parameters; parameters -= rate v, for part of them."""
        rate = self.parameters.dtype.type(rate)
        for start in range(part.start, part.stop, UPDATED_TOGETHER):
            here = slice(start, min(start + UPDATED_TOGETHER, part.stop))
            velocity, parameters = self.velocity[here], self.parameters[here]
            change = self._change[: len(velocity)]
            first, *others = self.gradients[:, here]
            if self._momentum or self._decay:
                np.multiply(velocity, self._momentum, out=velocity)
                if self._decay:
                    np.multiply(parameters, self._decay, out=change)
                    np.add(velocity, change, out=velocity)
                np.add(velocity, first, out=velocity)
            else:
                np.copyto(velocity, first)
            for gradient in others:
                np.add(velocity, gradient, out=velocity)
            np.multiply(velocity, rate, out=change)
            np.subtract(parameters, change, out=parameters)
        return 0.0

    def do(self, task: str, lane: Lane, part: slice, value: float) -> float:
        """Carry out one of the tasks above; a loss that is not finite shows a divergence.

        `part` is of the batch, and `value` its size; or of the parameters, and the learning rate.
        """
        with np.errstate(all="ignore"):
            return float(getattr(self, task)(lane, part, value))


def shared_zeros(shape: Shape, dtype: DTypeLike) -> Array:
    """Zeros in memory that processes forked from now on share; MemoryError if it is too little."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        shared = mmap.mmap(-1, max(size, 1))
    except (OSError, OverflowError):
        raise MemoryError(f"cannot allocate {size} bytes of shared memory") from None
    return np.frombuffer(shared, dtype, math.prod(shape)).reshape(shape)


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

    def begin(self, task: str, part: slice, value: float) -> None:
        """Ask for a task of Exchange, with the arguments of Exchange.do."""
        try:
            self._pipe.send((task, part, value))
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
            task, part, value = message
            pipe.send(exchange.do(task, lane, part, value))
