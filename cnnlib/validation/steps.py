"""Do a few steps of one `train` call end with the weights that gradient descent ends with?

`check_steps` compares them with the rule written out in float64, from changed weights and, where
the training has a momentum, from a velocity that is not zero. A large batch would hide one image,
and its float64 reference would take seconds. Batches are therefore made of a few *loud* images and
many *silent* ones: the biases of the last layer are shifted until the network is sure of one class,
which makes the error of images of that class vanish and that of all others as large as it can be.
The first and the last position of each batch are always loud. An image that is left out, used twice
or used in another step changes the result by about one in the number of loud images, whatever the
batch size. Images that ask relu or max to decide a near-tie (cnnlib/validation/kinks.py) are
avoided.

`check_real_steps` compares ordinary batches with the rule applied to what the stage's own
`gradient` returns, which `validate` has compared with the reference. That covers paths that exist
in `train` alone, such as a compiled or captured step.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from cnnlib.engine import Bytes, Engine, ImageByImage, Order
from cnnlib.layers import DEFAULT_LOSS, Array
from cnnlib.network import Parameter
from cnnlib.validation.reference import Referee
from cnnlib.validation.tolerances import (
    COARSE,
    FACTOR,
    is_conv_weight,
    longest_sum,
    machine_epsilon,
)
from cnnlib.validation.verdicts import Unjudged, failure, unjudged

STEPS = 3
"""Steps of one call that are compared with the reference."""
FEWER_STEPS = 2
"""Such steps of stages that train image by image and take seconds for a batch."""
LOUD = 6
"""Images of a batch that contribute to its gradient in `check_steps`."""
POOL = 64
"""Training images among which `check_steps` chooses: the first, the last and others."""
MOST_DIFFERENT = 512
"""Images of a batch that the reference takes one by one where dropout makes all of them differ."""
SURE = 15.0
"""Shift of the last layer's biases, which reduces a silent image's error to about e^-30."""
QUIET = 1e-3
"""Share of the last layer's weights that is left where the loss is a mean squared error."""
EXACT = 1e-3
"""Share of the way travelled by which weights may be off after a few steps. Rounding reaches about
1e-6 of it, a loud image that is left out changes a twentieth."""
REAL_STEPS = 2
"""Steps on ordinary batches that are compared with the stage's own gradients."""
REAL_SHARE = 0.02
"""EXACT for ordinary batches, in which relu and max may decide a few near-ties the other way."""
LOSS_SHARE = 1e-3
"""Relative difference of a mean loss, whose sum in float32 is split differently in a replay."""


def check_steps(engine: Engine, images: Bytes, labels: Bytes, seed: int = 0) -> float:
    """Compare STEPS steps of one `train` call with the reference; the largest error as a share.

    `images` and `labels` are what the engine has loaded, and its parameters are those from which
    the weights are derived; the engine is left trained. Raises ValidationFailed naming stage,
    network, parameter and error; Unjudged where the steps are too small to show in the stage's
    numbers, or where every image has near-ties.
    """
    setup, network = engine.setup, engine.network
    steps = _steps(engine, len(labels))
    random = np.random.default_rng((seed, setup.batch_size))
    few = dataclasses.replace(setup, batch_size=LOUD + 4)
    with np.errstate(all="ignore"), Referee(few) as referee:
        began = engine.steps
        trial = _Trial(engine, referee, (images, labels), random, steps)
        batches = [trial.step(0)]
        while len(batches) < steps and trial.tame and trial.affordable:
            batches.append(trial.step(len(batches)))
    if not _representable(trial.parameters, engine):
        return 0.0  # the training will be found to diverge
    order, steps = np.concatenate(batches), len(batches)
    engine.parameters, engine.velocity = trial.start, trial.start_velocity
    engine.steps = began
    loss = engine.train(order, trial.rates[:steps])
    share = compare_loss(engine, loss, trial.loss / steps, f"the mean loss of {steps} steps")
    after = engine.parameters.astype(np.float64)
    judged = False
    for p in network.parameters:
        part = slice(p.offset, p.offset + p.size)
        # what float32 cannot show of a small step onto large weights
        hidden = steps * machine_epsilon(engine.stage) * _length(trial.parameters[part])
        hidden += _length(trial.ambiguity[part])
        travelled = trial.travelled[p.name]
        judged |= hidden < travelled / 2
        error = _length(after[part] - trial.parameters[part])
        allowed = _exactness(engine, p) * travelled + hidden
        if not error <= allowed:
            raise failure(
                engine,
                f"{p.name} after {steps} steps of one call is off by {error:.3g}, allowed "
                f"{allowed:.3g}, where the reference's steps add up to {travelled:.3g}",
            )
        share = max(share, error / allowed if allowed else 0.0)
    if not judged and trial.ambiguity.any():
        raise unjudged(
            engine,
            "near-ties of relu or max in all images leave steps open",
            "fewer layers, tanh for relu, mean for max",
        )
    if not judged:
        raise Unjudged(
            f"stage '{engine.stage.name}' on network '{network.name}': steps of batch size "
            f"{setup.batch_size} at training.learning_rate {setup.learning_rate:g} are too small "
            f"to be seen in its numbers; a larger training.learning_rate can be judged"
        )
    if setup.momentum:
        _compare_velocity(engine, trial.velocity)
    return share


def _steps(engine: Engine, count: int) -> int:
    """Steps to compare: no more than an epoch of the `count` images loaded has."""
    most = FEWER_STEPS if isinstance(engine, ImageByImage) else STEPS
    return max(1, min(most, count // engine.setup.batch_size))


class _Distinct(NamedTuple):
    """Images whose contributions to a step differ."""

    chosen: Array
    """(n,) Indices into the training set."""
    positions: Array
    """(n,) A position of each in the batch."""
    weights: Array
    """(n,) The share of each in the mean over the batch."""


class _Trial:
    """Steps of the reference, in float64, and the batches they are made on."""

    def __init__(
        self,
        engine: Engine,
        referee: Referee,
        training_set: tuple[Bytes, Bytes],
        random: np.random.Generator,
        steps: int,
    ) -> None:
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
        self.parameters = self.start.astype(np.float64)
        self.start_velocity = np.zeros_like(self.start)
        self.velocity = np.zeros_like(self.parameters)
        self.ambiguity = np.zeros_like(self.parameters)
        self._velocity_ambiguity = np.zeros_like(self.parameters)
        self.travelled = {p.name: 0.0 for p in engine.network.parameters}
        self.loss = 0.0
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
            view = vector[p.offset : p.offset + p.size]
            usual = float(np.sqrt(np.mean(view**2))) or 0.1
            view += 0.1 * usual * self._random.standard_normal(p.size)
        last = [p for p in network.parameters if p.layer == len(network.layers) - 1]
        for p in last:
            view = vector[p.offset : p.offset + p.size]
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
        self._referee.parameters, self._referee.steps = self.parameters, self._began + number
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

    def _distinct(self, order: Order, loud: Array, quiet: bool) -> "_Distinct":
        """The images of a batch that differ, and how many there are of each.

        Dropout makes copies of an image differ. Those at the positions `loud` then count one by
        one, and all others do so, too, unless they are `quiet`, that is, hardly contribute: as they
        do for a network that is sure of them, before its first step.
        """
        batch = len(order)
        if not self._setup.network.drops_out:
            chosen, first, counts = np.unique(order, return_index=True, return_counts=True)
            return _Distinct(chosen, first, counts / batch)
        if not quiet:
            return _Distinct(order, np.arange(batch), np.full(batch, 1 / batch))
        others = np.setdiff1d(np.arange(batch), loud)
        _, first, counts = np.unique(order[others], return_index=True, return_counts=True)
        positions = np.concatenate([loud, others[first]])
        weights = np.concatenate([np.ones(len(loud)), counts]) / batch
        return _Distinct(order[positions], positions, weights)

    @property
    def affordable(self) -> bool:
        """Whether the reference can take all images of a further batch one by one, if it has to."""
        return not self._setup.network.drops_out or self._setup.batch_size <= MOST_DIFFERENT

    @property
    def tame(self) -> bool:
        """Whether the weights have moved less than they are large, so that errors grow slowly."""
        way = math.hypot(*self.travelled.values())
        return math.isfinite(way) and way < _length(self.start)

    def _descend(self, batch: "_Distinct", number: int, *, clean: bool) -> None:
        setup, positions = self._setup, batch.positions
        images, labels = self._images[batch.chosen], self._labels[batch.chosen]
        reference = self._referee.reference
        logits = reference.training_logits(images, positions)
        losses, error = setup.loss_function.many(logits.T, labels)
        self.loss += float(losses @ batch.weights)
        error = error.T * batch.weights[:, None]
        gradient = setup.weight_decay * self.parameters
        most = reference.setup.batch_size
        for first in range(0, len(images), most):
            part = slice(first, first + most)
            gradient += reference.backward(images[part], error[part], positions[part])
        if number == 0 and setup.momentum:
            self._begin_moving(gradient)
        self.velocity = setup.momentum * self.velocity + gradient
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
        self.parameters = self.parameters - rate * self.velocity
        for p in setup.network.parameters:
            part = slice(p.offset, p.offset + p.size)
            self.travelled[p.name] += rate * _length(self.velocity[part])

    def _begin_moving(self, gradient: Array) -> None:
        """A velocity to start with, as large as the first gradient."""
        for p in self._setup.network.parameters:
            part = slice(p.offset, p.offset + p.size)
            usual = float(np.sqrt(np.mean(gradient[part] ** 2)))
            self.start_velocity[part] = usual * self._random.standard_normal(p.size)
        self.velocity = self.start_velocity.astype(np.float64)


def check_real_steps(engine: Engine, images: Bytes, labels: Bytes, seed: int = 0) -> None:
    """Compare REAL_STEPS steps of one `train` call with the rule applied to `gradient`.

    They start from the engine's weights, with a velocity as large as a gradient; the engine is left
    trained.
    A training whose loss is no longer finite is not compared. Raises ValidationFailed.
    """
    setup = engine.setup
    random = np.random.default_rng((seed, setup.batch_size, 1))
    batch = setup.batch_size
    steps = min(REAL_STEPS, _steps(engine, len(labels)))
    order = np.resize(random.permutation(len(labels)), steps * batch)
    start, began = engine.parameters, engine.steps
    parameters = start.astype(np.float64)
    velocity, travelled = np.zeros_like(parameters), np.zeros_like(parameters)
    losses, first = [], np.zeros_like(start)
    for step in range(steps):
        part = order[step * batch : (step + 1) * batch]
        engine.parameters, engine.steps = parameters.astype(start.dtype), began + step
        loss, gradient = engine.gradient(images[part], labels[part])
        if not step:
            if setup.momentum:
                usual = float(np.sqrt(np.mean(gradient.astype(np.float64) ** 2)))
                first[:] = usual * random.standard_normal(len(start))
            velocity = first.astype(np.float64)
        losses.append(loss)
        velocity = setup.momentum * velocity + gradient + setup.weight_decay * parameters
        parameters = parameters - setup.learning_rate * velocity
        travelled += np.abs(setup.learning_rate * velocity)
        if not _length(travelled) < _length(start):
            break  # from there on, errors grow too fast
    if not (np.isfinite(losses).all() and _representable(parameters, engine)):
        return  # the training will be found to diverge
    steps = len(losses)
    engine.parameters, engine.velocity, engine.steps = start, first, began
    loss = engine.train(order[: steps * batch], engine.rates_of(steps, None))
    compare_loss(engine, loss, float(np.mean(losses)), f"the mean loss of {steps} real steps")
    after = engine.parameters.astype(np.float64)
    terms = longest_sum(engine.network, batch)
    unit = FACTOR * engine.stage.slack * machine_epsilon(engine.stage) * math.sqrt(terms)
    coarse = COARSE * (engine.stage.rounding or 0.0)
    share = max(REAL_SHARE, unit * (engine.stage.conv_weight_slack or 1.0), coarse)
    for p in engine.network.parameters:
        part_of = slice(p.offset, p.offset + p.size)
        way = _length(travelled[part_of])
        hidden = steps * machine_epsilon(engine.stage) * _length(parameters[part_of])
        error = _length(after[part_of] - parameters[part_of])
        if not error <= share * way + hidden:
            raise failure(
                engine,
                f"{p.name} after {steps} real steps at batch size {batch} is off by "
                f"{error:.3g} of {way:.3g} from what the stage's own gradients add up to",
            )


def compare_loss(engine: Engine, found: float, right: float, what: str) -> float:
    """The difference of two mean losses as a share of what is allowed.

    Raises ValidationFailed where it is more than that; `what` names the loss in the message.
    """
    coarse = COARSE * (engine.stage.rounding or 0.0)
    allowed = max(LOSS_SHARE, coarse) * max(1.0, abs(right))
    error = abs(found - right)
    if not error <= allowed:
        raise failure(engine, f"{what} is {found:.6g}, not {right:.6g}")
    return error / allowed


def _exactness(engine: Engine, parameter: Parameter) -> float:
    """Share of the way by which a few steps may be off, in the view of a parameter."""
    stage = engine.stage
    if stage.conv_weight_slack and is_conv_weight(engine, parameter):
        return max(REAL_SHARE, COARSE * (stage.rounding or 0.0))
    return max(EXACT * stage.slack, COARSE * (stage.rounding or 0.0))


def _compare_velocity(engine: Engine, right: Array) -> None:
    found = engine.velocity.astype(np.float64)
    for p in engine.network.parameters:
        part = slice(p.offset, p.offset + p.size)
        size = _length(right[part])
        error = _length(found[part] - right[part])
        if not error <= _exactness(engine, p) * size:
            raise failure(
                engine,
                f"the velocity of {p.name} after a few steps is off by {error:.3g} of {size:.3g}",
            )


def _representable(vector: Array, engine: Engine) -> bool:
    """Whether the stage's numbers can hold the vector, and its length squared."""
    with np.errstate(over="ignore"):
        return math.isfinite(_length(vector.astype(engine.stage.dtype)))


def _length(vector: Array) -> float:
    """Euclidean length; not by BLAS, whose threads take longer to wake than so short a sum."""
    return math.sqrt(float(np.square(vector).sum()))
