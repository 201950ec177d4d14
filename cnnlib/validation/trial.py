"""Steps of the reference on batches of a few images that count and many that do not.

cnnlib/validation/steps.py says why the batches are made like that.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cnnlib.engine import Bytes, Engine, Order
from cnnlib.engine.cpu import MicroBatchEngine
from cnnlib.layers import DEFAULT_LOSS, Array
from cnnlib.network import Parameter
from cnnlib.validation.coarse import length, spread_of
from cnnlib.validation.reference import Referee
from cnnlib.validation.tolerances import SPREAD

LOUD = 6
"""Images of a batch that contribute to its gradient in `check_steps`."""
POOL = 64
"""Training images among which `check_steps` chooses: the first, the last and others."""
MOST_DIFFERENT = 512
"""Images of a batch that the reference takes one by one where dropout makes all of them differ."""
SURE = 15.0
"""Shift of the last layer's biases, which reduces a silent image's error to about e^-30."""
SURE_OF_STEP = 0.1
"""Share of the way that coarse products may leave open before another step, which makes it more."""
QUIET = 1e-3
"""Share of the last layer's weights that is left where the loss is a mean squared error."""


class Distinct(NamedTuple):
    """The images of a batch whose contributions to its step differ."""

    chosen: Array
    """(n,) Indices into the training set."""
    positions: Array
    """(n,) A position of each in the batch."""
    weights: Array
    """(n,) The share of each in the mean over the batch."""


class Descent:
    """Weights and a velocity that follow the gradients of one reference."""

    def __init__(self, reference: MicroBatchEngine, start: Array) -> None:
        self._reference = reference
        self.parameters = start.astype(np.float64)
        self.velocity = np.zeros_like(self.parameters)
        self.loss = 0.0
        """The sum of the mean losses of all steps."""

    def gradient(
        self, images: Bytes, labels: Bytes, batch: Distinct, step: int
    ) -> tuple[Array, Array]:
        """The gradient of a batch, and (n, classes) its images' derivatives by their logits."""
        reference = self._reference
        setup, positions = reference.setup, batch.positions
        reference.parameters, reference.steps = self.parameters, step
        logits = reference.training_logits(images, positions)
        losses, error = setup.loss_function.many(logits.T, labels)
        self.loss += float(losses @ batch.weights)
        error = error.T * batch.weights[:, None]
        gradient = setup.weight_decay * self.parameters
        for first in range(0, len(images), setup.batch_size):
            part = slice(first, first + setup.batch_size)
            gradient += reference.backward(images[part], error[part], positions[part])
        return gradient, error

    def go(self, gradient: Array, rate: float) -> None:
        """Take one step."""
        self.velocity = self._reference.setup.momentum * self.velocity + gradient
        self.parameters = self.parameters - rate * self.velocity


class Trial:
    """Steps of the reference, in float64, and the batches they are made on."""

    def __init__(
        self,
        engine: Engine,
        referee: Referee,
        training_set: tuple[Bytes, Bytes],
        random: np.random.Generator,
        steps: int,
        coarse: Sequence[MicroBatchEngine] = (),
    ) -> None:
        """`coarse`: references that make the same steps less exactly."""
        self._referee, self._random, self._setup = referee, random, engine.setup
        self._began = engine.steps
        self._images, self._labels = training_set
        dtype = engine.stage.dtype
        count = len(self._labels)
        inner = random.choice(count, min(count, POOL - 2), replace=False)
        self._pool = np.unique([0, count - 1, *inner])
        classes = np.unique(self._labels[self._pool])
        # The network is to be sure of a class that only some of the images belong to.
        self._sure_of = int(random.choice(classes)) if len(classes) > 1 else int(not classes[0])
        # Both begin at numbers that the engine can hold.
        self.start = self._start(engine).astype(dtype)
        self.start_velocity = np.zeros_like(self.start)
        self.right = Descent(referee.reference, self.start)
        self._coarse = [Descent(each, self.start) for each in coarse]
        self.ambiguity = np.zeros(len(self.start))
        self._velocity_ambiguity = np.zeros(len(self.start))
        self.travelled = {p.name: 0.0 for p in engine.network.parameters}
        rates = np.full(steps, self._setup.learning_rate)
        if self._setup.warmup is not None:
            rates *= random.uniform(0.3, 1.0, steps)
        self.rates = rates

    def _start(self, engine: Engine) -> Array:
        """The engine's weights, changed, with last biases that make the network sure of a class.

        A mean squared error vanishes where the logits are 1 for that class and 0 for the others.
        """
        vector = engine.parameters.astype(np.float64)
        network = self._setup.network
        for p in network.parameters:
            view = p.part(vector)
            usual = float(np.sqrt(np.mean(view**2))) or 0.1
            view += 0.1 * usual * self._random.standard_normal(p.size)
        last = [p for p in network.parameters if p.layer == len(network.layers) - 1]
        for p in last:
            view = p.part(vector)
            if self._setup.loss != DEFAULT_LOSS:
                view *= QUIET if p.key == "weight" else 0
                if p.key == "bias" and p.size == network.classes:
                    view[self._sure_of] = 1
            elif p.key == "bias" and p.size == network.classes:
                view -= SURE
                view[self._sure_of] += 2 * SURE
        return vector

    def step(self, number: int) -> Order:
        """One step on a batch of loud and silent images; its indices, in order."""
        setup = self._setup
        batch = setup.batch_size
        self._referee.parameters = self.right.parameters
        self._referee.steps = self._began + number
        tied = self._referee.detector.has_near_tie(self._images[self._pool])
        clean = self._pool[~tied]
        usable = clean if len(clean) else self._pool
        sure = self._labels[usable] == self._sure_of
        silent, loud = usable[sure], usable[~sure]
        quiet = bool(len(silent) and len(loud))
        if not quiet:
            silent = loud = usable
        order: Order = np.resize(self._random.permutation(silent)[:2], batch)
        inner = self._random.choice(batch, min(LOUD, batch), replace=False)
        positions = np.unique([0, batch - 1, *inner])
        order[positions] = np.resize(self._random.permutation(loud), len(positions))
        quiet = quiet and not number and setup.loss == DEFAULT_LOSS
        self._descend(self._distinct(order, positions, quiet), number, clean=bool(len(clean)))
        return order

    def _distinct(self, order: Order, loud: Array, quiet: bool) -> Distinct:
        """The images of a batch that differ, and how many there are of each.

        Dropout makes copies of an image differ. Those at the positions `loud` then count one by
        one, and all others do so, too, unless they are `quiet`, that is, hardly contribute: as they
        do for a network that is sure of them, before its first step.
        """
        batch = len(order)
        if not self._setup.network.drops_out:
            chosen, first, counts = np.unique(order, return_index=True, return_counts=True)
            return Distinct(chosen, first, counts / batch)
        if not quiet:
            return Distinct(order, np.arange(batch), np.full(batch, 1 / batch))
        others = np.setdiff1d(np.arange(batch), loud)
        _, first, counts = np.unique(order[others], return_index=True, return_counts=True)
        positions = np.concatenate([loud, others[first]])
        weights = np.concatenate([np.ones(len(loud)), counts]) / batch
        return Distinct(order[positions], positions, weights)

    @property
    def affordable(self) -> bool:
        """Whether the reference can take all images of a further batch one by one, if it has to."""
        return not self._setup.network.drops_out or self._setup.batch_size <= MOST_DIFFERENT

    @property
    def tame(self) -> bool:
        """Whether the weights have moved less than they are large, so that errors grow slowly, and
        coarse products have not made them uncertain yet.
        """
        way = math.hypot(*self.travelled.values())
        if not (math.isfinite(way) and way < length(self.start)):
            return False
        others = [each.parameters for each in self._coarse]
        return not others or spread_of(self.right.parameters, others) < SURE_OF_STEP * way

    @property
    def spread_of_loss(self) -> float:
        """How far apart coarse products may leave the sum of the steps' losses."""
        return SPREAD * max((abs(each.loss - self.right.loss) for each in self._coarse), default=0)

    def _descend(self, batch: Distinct, number: int, *, clean: bool) -> None:
        setup, positions = self._setup, batch.positions
        images, labels = self._images[batch.chosen], self._labels[batch.chosen]
        gradient, error = self.right.gradient(images, labels, batch, self._began + number)
        if number == 0 and setup.momentum:
            self._begin_moving(gradient)
        rate = self.rates[number]
        if self._setup.network.drops_out or not clean:
            detector = self._referee.detector
            tied = np.arange(len(images))
            if self._setup.network.drops_out:  # the masks of these positions were not known before
                tied = np.flatnonzero(detector.has_near_tie(images, positions))
            self._velocity_ambiguity *= setup.momentum
            self._velocity_ambiguity += detector.ambiguity_bound(
                images[tied], error[tied], positions[tied]
            )
            self.ambiguity += rate * self._velocity_ambiguity
        self.right.go(gradient, rate)
        for coarse in self._coarse:
            theirs, _ = coarse.gradient(images, labels, batch, self._began + number)
            coarse.go(theirs, rate)
        for p in setup.network.parameters:
            self.travelled[p.name] += rate * length(p.part(self.right.velocity))

    def _begin_moving(self, gradient: Array) -> None:
        """A velocity to start with, as large as the first gradient."""
        for p in self._setup.network.parameters:
            usual = float(np.sqrt(np.mean(p.part(gradient) ** 2)))
            p.part(self.start_velocity)[:] = usual * self._random.standard_normal(p.size)
        for descent in (self.right, *self._coarse):
            descent.velocity = self.start_velocity.astype(np.float64)

    def spread(self, parameter: Parameter) -> float:
        """How far apart coarse products may leave a parameter, as a length."""
        right = parameter.part(self.right.parameters)
        return spread_of(right, [parameter.part(each.parameters) for each in self._coarse])

    def spread_of_velocity(self, parameter: Parameter) -> float:
        """Likewise for its velocity."""
        right = parameter.part(self.right.velocity)
        return spread_of(right, [parameter.part(each.velocity) for each in self._coarse])
