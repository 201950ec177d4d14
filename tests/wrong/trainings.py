"""Engines that train wrongly while every single gradient of theirs is right.

Each is a mixin over the engine of any stage. Its docstring says what is wrong; `training` holds the
settings under which that matters, over those of tests/toys.py.
"""

import threading
from typing import Any, ClassVar

import numpy as np

from cnnlib.engine import Engine
from cnnlib.engine.shuffle import Shuffle
from cnnlib.layers import Array


class Wrong(Engine):
    """Passes on what it is asked for; a fault changes one of these."""

    training: ClassVar[dict[str, Any]] = {}

    def load(self, images: Array, labels: Array) -> None:
        self.training_labels = np.asarray(labels)
        super().load(images, labels)  # type: ignore[safe-super]

    def right(self, order: Array, rates: Array | None) -> float:
        """What the stage would have done."""
        return super().train(order, rates)  # type: ignore[safe-super]

    @property
    def size(self) -> int:
        return self.setup.batch_size

    def train(self, order: Array, rates: Array | None = None) -> float:
        return self.right(order, rates)

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        size = self.size
        return self.train(shuffle.indices()[: len(shuffle) // size * size], rates)

    def step_by_step(self, order: Array, rates: Array | None, between: Any) -> float:
        """Train, with a call of `between` before each step."""
        size = self.size
        due = self.rates_of(len(order) // size, rates)
        losses = []
        for step in range(len(order) // size):
            between(step)
            losses.append(self.right(order[step * size : (step + 1) * size], due[step : step + 1]))
        return float(np.mean(losses))


class QuarterOfTheVelocity(Wrong):
    """A quarter of the velocity is left after each step, times the momentum."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        def quarter(step: int) -> None:
            self.velocity = self.velocity * np.float32(0.25)

        return self.step_by_step(order, rates, quarter)


class NoMean(Wrong):
    """The sum of a batch's gradients is applied, not their mean."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        return self.right(order, self.rates_of(len(order) // self.size, rates) * self.size)


class NoMomentum(Wrong):
    """Momentum is ignored."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        def forget(step: int) -> None:
            self.velocity = np.zeros_like(self.velocity)

        return self.step_by_step(order, rates, forget)


class NoMomentumWhereThereIsNone(NoMomentum):
    """Momentum is ignored, and the experiment has none."""

    training: ClassVar = {"momentum": 0.0}


class OneRate(Wrong):
    """The rates of the schedule are ignored."""

    training: ClassVar = {"schedule": "one_cycle"}

    def train(self, order: Array, rates: Array | None = None) -> float:
        return self.right(order, None)


class OneRateInEpochs(Wrong):
    """The rates of the schedule are ignored in whole epochs alone."""

    training: ClassVar = {"schedule": "one_cycle"}

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        return super().train_epoch(shuffle)


class NoShuffling(Wrong):
    """An epoch visits the images as they lie."""

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        return self.right(np.arange(len(shuffle) // self.size * self.size), rates)


class AnyOrder(Wrong):
    """Every call visits the images as they lie, whatever order it is given."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        return self.right(np.arange(len(order)), rates)


class SortedBatches(Wrong):
    """The right images in the wrong steps: an epoch's order is sorted by class."""

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        order = shuffle.indices()[: len(shuffle) // self.size * self.size]
        return self.right(order[np.argsort(self.training_labels[order], kind="stable")], rates)


class NoUpdateAfterSevenSteps(Wrong):
    """The weights stay as they are from the eighth step of a call on; its losses are right."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        due = np.array(self.rates_of(len(order) // self.size, rates))
        due[7:] = 0
        return self.right(order, due)


class FirstBatchAgain(Wrong):
    """Calls of more than four steps train on their first batch again and again."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        steps = len(order) // self.size
        return self.right(np.tile(order[: self.size], steps) if steps > 4 else order, rates)


class HalfAnEpoch(Wrong):
    """An epoch ends after half of its steps, twice as fast."""

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        steps = len(shuffle) // self.size // 2
        half = None if rates is None else rates[:steps]
        return self.right(shuffle.indices()[: steps * self.size], half)


class HalfOfEveryCall(Wrong):
    """Every call ends after half of its steps."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        steps = (len(order) // self.size + 1) // 2
        return self.right(order[: steps * self.size], None if rates is None else rates[:steps])


class Background(Wrong):
    """A call returns at once while a thread continues its work, for which no reader waits."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        self.wait()
        self.thread = threading.Thread(target=self.right, args=(order, rates))
        self.thread.start()
        return 1.0

    def wait(self) -> None:
        if hasattr(self, "thread"):
            self.thread.join()

    def close(self) -> None:
        self.wait()
        super().close()


class PutOff(Wrong):
    """An epoch returns the right loss early; whoever reads the weights waits for the work."""

    pending: ClassVar[Any] = None

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        before = self.parameters, self.velocity
        loss = super().train_epoch(shuffle, rates)
        self.parameters, self.velocity = before
        self.pending = shuffle, rates
        return loss

    @property
    def parameters(self) -> Array:
        if self.pending is not None:
            todo, self.pending = self.pending, None
            start = super().parameters, self.velocity
            for _ in range(4):  # by far the larger part of the work
                self.parameters, self.velocity = start
                super().train_epoch(*todo)
        return super().parameters

    @parameters.setter
    def parameters(self, vector: Array) -> None:
        super(PutOff, type(self)).parameters.fset(self, vector)  # type: ignore[attr-defined]


class Counting(Wrong):
    """For faults that begin with the second epoch."""

    epochs: ClassVar[int] = 0

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        self.epochs += 1
        return super().train_epoch(shuffle, rates)


class Frozen(Counting):
    """The first layer no longer learns once an epoch is over."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        before = self.parameters
        loss = self.right(order, rates)
        if self.epochs > 1:
            first = self.network.parameters[0]
            after = self.parameters
            after[: first.size] = before[: first.size]
            self.parameters = after
        return loss


class VelocityReset(Wrong):
    """Each epoch begins at rest."""

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        self.velocity = np.zeros_like(self.velocity)
        return super().train_epoch(shuffle, rates)


class OneClassLeftOut(Wrong):
    """Images of class 1 are passed over; others take their places."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        others = order[self.training_labels[order] != 1]
        return self.right(np.resize(others, len(order)) if len(others) else order, rates)


class LastBatchTwice(Wrong):
    """The last step of an epoch sees the batch of the step before."""

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        order = shuffle.indices()[: len(shuffle) // self.size * self.size].copy()
        order[-self.size :] = order[-2 * self.size : -self.size]
        return self.right(order, rates)


class LastBatchDropped(Wrong):
    """An epoch ends one step early."""

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        steps = len(shuffle) // self.size - 1
        short = None if rates is None else rates[:steps]
        return self.right(shuffle.indices()[: steps * self.size], short)


class LastImageOfABatchTwice(Wrong):
    """The first image of every batch is also its last one."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        order = np.array(order)
        order[self.size - 1 :: self.size] = order[:: self.size]
        return self.right(order, rates)


class HighImagesWrapAround(Wrong):
    """Indices beyond 63 wrap around, as those beyond 65,535 would in 16 bits."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        return self.right(np.asarray(order) % 64, rates)


class RightLossWrongWeights(Wrong):
    """The losses are right; the weights that stay are a little too small."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        loss = self.right(order, rates)
        self.parameters = self.parameters * np.float32(0.99)
        return loss


class LossOfTheLastStep(Wrong):
    """The weights are right; the loss returned is that of the last step."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        size = self.size
        loss = (
            self.right(order[:-size], None if rates is None else rates[:-1])
            if len(order) > size
            else 0.0
        )
        loss = self.right(order[-size:], None if rates is None else rates[-1:])
        return loss


class StaleGradient(Wrong):
    """Each step applies the gradient of the step before, as an asynchronous update would."""

    def train(self, order: Array, rates: Array | None = None) -> float:
        size = self.size
        steps = len(order) // size
        late = np.concatenate([order[:size], order[: (steps - 1) * size]])
        return self.right(late, rates)


class EvaluationTrains(Wrong):
    """Looking at test images trains on the first batch."""

    def logits(self, images: Array) -> Array:
        found = super().logits(images)  # type: ignore[safe-super]
        self.right(np.arange(self.size), None)
        return found


class ProfileTrains(Wrong):
    """The profile leaves the weights changed."""

    def profile(self) -> list[Any]:
        found = super().profile()
        self.right(np.arange(self.size), None)
        return found


class OnlyTheFirstEpoch(Counting):
    """From the second epoch on nothing is trained, and the first epoch's loss is returned."""

    last: ClassVar[float] = 0.0

    def train_epoch(self, shuffle: Shuffle, rates: Array | None = None) -> float:
        if not self.epochs:
            self.last = super().train_epoch(shuffle, rates)
        return self.last


FAULTS = [
    fault
    for fault in list(globals().values())
    if isinstance(fault, type) and issubclass(fault, Wrong) and fault not in (Wrong, Counting)
]
