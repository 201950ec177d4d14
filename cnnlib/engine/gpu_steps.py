"""The steps of GpuEngine: where their images come from, and how their kernels are launched.

FixedSteps launches every kernel by a call of its own; each step on the device's images has
launches whose arguments say which images and which learning rate. CountedSteps has one list of
launches for all steps, which find both by a counter in device memory; so many steps can be
captured as one CUDA graph, and the host's part of an epoch is a few calls.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from cnnlib.device import Argument, Device, DeviceArray, Graph, Module
from cnnlib.engine.gpu_operator import GpuOptions, Launch
from cnnlib.engine.ordered_images import OrderedImages
from cnnlib.engine.shuffle import Shuffle
from cnnlib.engine.stage import Bytes, Order, Setup
from cnnlib.engine.upload import LoadTimer, ResidentImages

GRAPH_LAUNCHES = 1024
"""Kernels in a graph, at most. On a GPU they take more than half a microsecond each, so that such a
graph takes at least half a millisecond, in which the host launches the next one many times over;
and capturing it takes the host some ten milliseconds, once.
"""


class Step(Protocol):
    """The parts of a step, as GpuEngine has them for both kinds of steps."""

    device: Device
    module: Module
    setup: Setup
    gathers_ahead: bool
    """Whether `update_at` also does the next step's `gather`, so that only the first one is done by
    a launch of its own.
    """

    def normalize(self, images: DeviceArray, count: int) -> Launch: ...
    def passes(self, labels: DeviceArray) -> list[Launch]:
        """Forward, loss and backward, on a batch whose images are numbers already."""

    def update(self, step: int | None) -> list[Launch]:
        """Sum and update at the rate of this step of the load."""

    def count_step(self) -> list[Launch]: ...
    def gather(
        self, images: OrderedImages, position: DeviceArray, labels: DeviceArray, rate: DeviceArray
    ) -> Launch: ...
    def update_at(self, rate: DeviceArray, *position: Argument) -> list[Launch]:
        """Sum and update at `rate`, and count to the next position."""

    def array(self, shape: tuple[int, ...], dtype: type = ...) -> DeviceArray: ...


class FixedSteps:
    """Steps by launches of their own on images that the host has gathered."""

    def __init__(self, step: Step, images: Bytes, labels: Bytes, limit: int) -> None:
        self._step, self._batch = step, step.setup.batch_size
        self._images = ResidentImages(step.device, images, labels, self._batch, limit)
        self.count = self._images.count
        self._launches: dict[int, list[Launch]] = {}

    def prepare(self) -> None:
        """Pack the arguments of all launches, outside the time measured."""
        for first in range(0, self.count, self._batch):
            self._at(first)

    def draws(self, shuffle: Shuffle) -> bool:
        return False

    def loads(self, count: int) -> Iterator[slice]:
        yield from self._images.loads(count)

    def load(self, order: Order | Shuffle, load: slice, timer: LoadTimer | None) -> Iterator[slice]:
        indices = order.indices() if isinstance(order, Shuffle) else order
        yield from self._images.load(indices[load], timer)

    def run(self, piece: slice) -> None:
        for first in range(piece.start, piece.stop, self._batch):
            for launch in self._at(first):
                launch.run()

    def _at(self, first: int) -> list[Launch]:
        """The launches of one training step on the batch that begins at resident image `first`."""
        if first not in self._launches:
            step, batch = self._step, self._batch
            self._launches[first] = [
                step.normalize(self._batch_images(first), batch),
                *step.passes(self._batch_labels(first)),
                *step.update(first // batch),
                *step.count_step(),
            ]
        return self._launches[first]

    def _batch_images(self, first: int) -> DeviceArray:
        shape = self._step.setup.network.input_shape
        return self._images.images.part(first * math.prod(shape), (self._batch, *shape))

    def _batch_labels(self, first: int) -> DeviceArray:
        return self._images.labels.part(first, (self._batch,))

    def ends(self) -> tuple[list[Launch], DeviceArray, list[Launch]]:
        """For a profile: the launches before the first operator, the labels of the batch, and the
        launches after the last operator.
        """
        step = self._step
        first = step.normalize(self._batch_images(0), self._batch)
        return [first], self._batch_labels(0), [*step.update(0), *step.count_step()]

    def close(self) -> None:
        self._launches.clear()
        self._images.close()


class CountedSteps:
    """Steps by one list of launches, with the step's number in the load on the device."""

    def __init__(
        self, step: Step, images: Bytes, labels: Bytes, limit: int, options: GpuOptions
    ) -> None:
        self._step, self._batch = step, step.setup.batch_size
        self._options = options
        self._images = OrderedImages(
            step.device,
            images,
            labels,
            self._batch,
            limit,
            step.module.kernel("batch_shuffle_images"),
            gathered_there=options.gather == "device",
        )
        self.count = self._images.count
        self._position = step.array((1,), np.int32)
        self._labels, self._rate = step.array((self._batch,), np.uint8), step.array((1,))
        self._graphs: dict[int, Graph] = {}
        self._sequences: dict[int, list[Graph]] = {}
        """Steps of a piece -> the graphs that make them."""

    def prepare(self) -> None:
        """Make the launches, and capture the graphs of an epoch, outside the time measured."""
        step = self._step
        self._first = step.gather(self._images, self._position, self._labels, self._rate)
        self._last = step.update_at(self._rate, self._position)
        first = [] if step.gathers_ahead else [self._first]
        self._launches = [*first, *step.passes(self._labels), *self._last]
        if self._options.launch != "each":
            self._sequence(self.count // self._batch)

    def draws(self, shuffle: Shuffle) -> bool:
        return self._images.draws(shuffle)

    def loads(self, count: int) -> Iterator[slice]:
        yield from self._images.loads(count)

    def load(self, order: Order | Shuffle, load: slice, timer: LoadTimer | None) -> Iterator[slice]:
        self._position.fill_bytes(0)
        yield from self._images.load(order, load, timer)

    def run(self, piece: slice) -> None:
        steps = (piece.stop - piece.start) // self._batch
        if self._step.gathers_ahead:
            self._first.run()  # the update before knew no more than the images of its own piece
        if self._options.launch == "each":
            for _ in range(steps):
                self._run_one()
        else:
            for graph in self._sequence(steps):
                graph.launch()

    def _run_one(self) -> None:
        for launch in self._launches:
            launch.run()

    def _sequence(self, steps: int) -> list[Graph]:
        """The graphs that make so many steps."""
        if steps not in self._sequences:
            sizes = graph_sizes(steps, len(self._launches))
            self._sequences[steps] = [self._graph(size) for size in sizes]
        return self._sequences[steps]

    def _graph(self, steps: int) -> Graph:
        """A graph of as many steps; a new one is captured."""
        if steps not in self._graphs:

            def several() -> None:
                for _ in range(steps):
                    self._run_one()

            self._graphs[steps] = self._step.device.capture(several)
        return self._graphs[steps]

    def ends(self) -> tuple[list[Launch], DeviceArray, list[Launch]]:
        """As FixedSteps.ends; the first step of a load comes next."""
        self._position.fill_bytes(0)
        if self._step.gathers_ahead:
            self._first.run()
            return [], self._labels, self._last
        return [self._first], self._labels, self._last

    def close(self) -> None:
        self._sequences.clear()
        self._graphs.clear()
        self._images.close()


def graph_sizes(steps: int, launches: int) -> Sequence[int]:
    """How many steps each graph has that are launched to make `steps` steps of `launches` kernels.

    Powers of two, the largest first and at most GRAPH_LAUNCHES kernels in each: a few graphs then
    serve every number of steps, and an epoch takes few of them.
    """
    most = 1
    while 2 * most * launches <= GRAPH_LAUNCHES:
        most *= 2
    sizes = [most] * (steps // most)
    rest = steps % most
    return sizes + [size for size in (most >> i for i in range(1, 32)) if size & rest]
