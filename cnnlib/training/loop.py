"""The training loop, and the one iterator that walks through an epoch's order."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnnlib.engine import Bytes, Engine, Order
from cnnlib.engine.image_by_image import train_units, unit_of
from cnnlib.engine.shuffle import Shuffle
from cnnlib.layers import Array
from cnnlib.system.interrupts import Stopped
from cnnlib.training.checkpoint import Checkpoint, State

CHECKPOINT_SECONDS = 30.0
CHUNK_SECONDS = 1.0
"""About how long a training runs between two reports."""


@dataclass(frozen=True)
class Epoch:
    """The outcome of one epoch, counted from 1: seconds, images trained on, mean loss."""

    epoch: int
    seconds: float
    images: int
    loss: float

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)


class Chunk(NamedTuple):
    """Consecutive images of an order, `order[first:end]`, to be trained on by one call."""

    order: Order
    """(end - first,) indices into the training set."""
    rates: Array | None
    """Learning rates of the steps that end in the chunk; None for the setup's constant rate."""
    first: int
    end: int


def batches(
    order: Order,
    rates: Array | None = None,
    *,
    size: int,
    lengths: Iterable[int] | None = None,
    first: int = 0,
) -> Iterator[Chunk]:
    """Walk through the whole batches of `order`, from image `first` on, one batch at a time.

    `rates` are the learning rates of the steps of all of `order`. `lengths` are the images of the
    chunks, if they are not single batches; each is asked for when the chunk before it is done, so
    that a caller can adapt them. Images after the last whole batch of `size` are left out.
    """
    images = len(order) // size * size
    for length in itertools.repeat(size) if lengths is None else lengths:
        if first >= images:
            return
        end = min(first + length, images)
        due = None if rates is None else rates[first // size : end // size]
        yield Chunk(order[first:end], due, first, end)
        first = end


def epoch_order(count: int, seed: int, epoch: int) -> Order:
    """The order in which epoch `epoch` visits `count` images: the same in every stage."""
    return Shuffle(count, seed, epoch).indices()


def start(engine: Engine, seed: int) -> None:
    """Set the initial weights of `seed` and no momentum."""
    scheme = engine.setup.initial_weights
    engine.parameters = engine.network.initial_parameters(seed, scheme=scheme)
    engine.velocity = np.zeros(engine.network.parameter_count, np.float32)
    engine.steps = 0


def train_epochs(
    engine: Engine,
    count: int,
    epochs: int,
    seed: int,
    *,
    checkpoint: Path | None = None,
    report: Callable[[State, int], None] | None = None,
    seconds_between: float = CHECKPOINT_SECONDS,
    stop: Callable[[], int] = lambda: 0,
    notes: Callable[[], str] = str,
    before: int = 0,
    at_once: bool = False,
) -> Iterator[Epoch]:
    """Train on the `count` images loaded, from the engine's current state; yield each Epoch.

    Ends early, after the epoch in question, when the loss is no longer finite. An epoch's clock
    runs from before its order is drawn until its last update is visible to the host. With
    `checkpoint` or `report` an epoch is done in chunks of about a second. After each of them
    `report` is called with the state and the steps per epoch. Every `seconds_between` seconds, and
    when the caller asks for the next epoch, the state is saved, off the clock, together with the
    text that `notes` returns. An existing checkpoint is resumed. Raises Stopped, with the state
    saved, after the chunk in which `stop` begins to return a signal's number.

    `before` epochs of the same seed have been trained in an earlier call: the orders continue.
    With `at_once` an epoch that is known to take less than a chunk is not divided, even if there is
    a `report`.
    """
    size = engine.setup.batch_size
    steps = count // size
    state = State()
    file = None
    if checkpoint is not None:
        file = Checkpoint(checkpoint, engine, count, seed, epochs)
        if file.exists():
            state = file.load()
    saved = time.monotonic()
    watched = file is not None or report is not None
    pace = _Pace(unit_of(engine), steps * size, math.inf if at_once else 2)
    while state.epoch <= epochs:
        began = time.perf_counter()
        rates = engine.setup.schedule.rates(state.epoch, epochs, steps)
        chunks: Iterable[Chunk] = ()
        if watched and not (at_once and pace.covers_epoch):
            order = epoch_order(count, seed, before + state.epoch)
            chunks = batches(order, rates, size=size, lengths=pace, first=state.images_done)
        else:
            loss = engine.train_epoch(Shuffle(count, seed, before + state.epoch), rates)
            elapsed = time.perf_counter() - began
            state.advance(elapsed, loss * steps, steps * size, size)
            pace.adapt(steps * size, elapsed)
            if report is not None:
                report(state, steps)
        for chunk in chunks:
            loss = train_units(engine, chunk.order, chunk.rates)
            elapsed = time.perf_counter() - began
            state.advance(elapsed, loss, chunk.end, size)
            if not math.isfinite(loss):
                break
            pace.adapt(len(chunk.order), elapsed)
            if report is not None:
                report(state, steps)
            number = stop()
            late = time.monotonic() - saved > seconds_between
            if file is not None and (late or number):
                file.save(state, notes())
                saved = time.monotonic()
            if number:
                raise Stopped(number, file is not None)
            began = time.perf_counter()
        done = Epoch(
            state.epoch, state.seconds, state.step * size, state.loss_sum / max(state.step, 1)
        )
        state = State(epoch=state.epoch + 1)
        yield done
        if done.diverged:
            return
        if file is not None:
            file.save(state, notes())
            saved = time.monotonic()


class _Pace:
    """Lengths of chunks that take about CHUNK_SECONDS each, in images.

    Chunks are whole units of the engine, so that a resumed epoch sees the same batches.
    """

    def __init__(self, unit: int, most: int, growth: float) -> None:
        self._unit, self._most, self._growth = unit, most, growth
        self._images = unit

    def __iter__(self) -> Iterator[int]:
        while True:
            yield self._images

    @property
    def covers_epoch(self) -> bool:
        """Whether the next chunk could be a whole epoch."""
        return self._images >= self._most

    def adapt(self, images: int, seconds: float) -> None:
        """Choose the next length, at most `growth` times the one before, now that a chunk of
        `images` took `seconds`.
        """
        units = int(images // self._unit * CHUNK_SECONDS / max(seconds, 1e-3))
        longest = min(self._most, self._growth * self._images)
        self._images = int(max(self._unit, min(longest, units * self._unit)))


def accuracy(engine: Engine, images: Bytes, labels: Bytes) -> float:
    """Share of `images` whose most probable class is the label; nan if any logit is not finite."""
    logits = engine.logits(images)
    if not np.isfinite(logits).all():
        return math.nan
    return float(np.mean(logits.argmax(axis=1) == labels))
