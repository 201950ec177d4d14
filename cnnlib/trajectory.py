"""Did a stage train as it should? Its steps, and the very calls that were timed, are checked.

`validate` (cnnlib/validate.py) compares the loss and the gradient of one batch. What a row claims
is more: that the timed calls trained on every image of the epoch's order once, each in its step, by
the rule of gradient descent, at the step's learning rate. Three checks cover that.

**Whole steps against the reference** (`check_steps`). `train` is called on a few batches from
weights that are not the initial ones and with a velocity that is not zero, and the weights it ends
with are compared with the rule written out in float64. A large batch would hide one image, and its
float64 reference would take seconds, so batches are made of a few *loud* images and many *silent*
ones: the biases of the last layer are shifted until the network is sure of one class, which makes
the error of images of that class vanish and that of all others as large as it can be. The first and
the last position of each batch are always loud. An image that is left out, used twice or used in
another step changes the result by about one in the number of loud images, whatever the batch size.

**Real steps against the stage's own gradient** (`check_real_steps`). `train` on batches as they
come has to agree with the rule applied to what `gradient` returns, which `validate` has compared.
This covers paths that exist in `train` alone, such as a compiled or captured step.

**A replay of what was timed** (`Recording`). Float32 trainings of the same network part quickly:
two that differ by one rounding error at the start have moved apart by a third of the way after an
epoch of LeNet-5 at batch size 64. No bound on final weights could therefore tell a skipped batch
from honest rounding, so none is used. Instead the state is read before and after every timed call,
off the clock, and later the same batches are given to `train` in calls of doubling length, in an
explicit order. A stage whose sums have a fixed order ends with the same bits; one that skips,
repeats or reorders batches, stops early, resets its velocity or forgets an update in calls of one
length does not. Stages that cannot repeat their bits (`Stage.repeatable`) report the loss of every
step instead, and `unlike` says what can be told from it: a step more or less, other batches, steps
without effect; not a single wrong step late in an epoch, which only `check_steps` would show.

The state must also stay as it is when the network is only evaluated or profiled, and after `train`
has returned; and reading the state must not take the time that `train` should have taken.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.decisions import Watch
from cnnlib.engine import Bytes, Engine, Order, Stage
from cnnlib.engine.cpu import cross_entropies
from cnnlib.layers import Array
from cnnlib.network import Network, Parameter
from cnnlib.shuffle import Shuffle
from cnnlib.training import Epoch, Place, accuracy, open_engine, start, train_epochs
from cnnlib.validate import (
    COARSE,
    FACTOR,
    FAST_REFERENCE,
    Unjudged,
    failure,
    is_conv_weight,
    longest_sum,
    validate,
)

STEPS = 3
"""Steps of one call that are compared with the reference."""
FEWER_STEPS = 2
"""The same for stages that train image by image and take seconds for a batch."""
LOUD = 6
"""Images of a batch that contribute to its gradient in `check_steps`."""
POOL = 64
"""Training images among which `check_steps` chooses: the first, the last and others."""
SURE = 15.0
"""Shift of the last layer's biases: e^-30 is left of a silent image's error."""
EXACT = 1e-3
"""Share of the way travelled by which weights may be off after a few steps. Rounding reaches about
1e-6 of it, a loud image that is left out changes a twentieth."""
REAL_STEPS = 2
REAL_SHARE = 0.02
"""The same for real batches, in which relu and max may decide a few near-ties the other way."""
LOSS_SHARE = 1e-3
"""Relative difference of a mean loss, whose sum in float32 is split otherwise in a replay."""
LATE = 0.25
"""Share of a call's time that reading the state may take, beyond what it usually takes."""
LATE_TRIES = 5
CHECKED_EPOCHS = 2
"""Epochs of `check_training`."""
MOMENTUM = 0.9
"""Momentum of the check where the experiment trains without any."""
FIRM = 8
"""Steps of a call in which honest trainings have not parted yet."""
NOT_APART = 5e-3
"""Relative difference of two losses that is always allowed: one decision of relu or max that falls
the other way has changed a loss by 1e-3 on an H100."""
WINDOW = 32
"""Steps, at least, in which losses are compared as a whole."""
SHIFTS = (-3, -2, -1, 1, 2, 3)
MATCH = 0.8
LEVEL = 0.5
"""Standard deviations of the steps' losses; see `unlike`."""


@dataclass(frozen=True)
class Weights:
    """All that a training goes on from: copies of an engine's vectors."""

    parameters: Array
    velocity: Array
    unfinished: Array

    @classmethod
    def of(cls, engine: Engine) -> "Weights":
        """Read it, as a host program would see it now."""
        return cls(engine.parameters, engine.velocity, np.array(engine.unfinished))

    def put_into(self, engine: Engine) -> None:
        engine.parameters, engine.velocity = self.parameters, self.velocity
        engine.unfinished = self.unfinished

    def equals(self, other: "Weights") -> bool:
        """Whether all bits agree; what is not a number equals itself."""
        return all(
            np.array_equal(mine, theirs, equal_nan=True)
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )


# Whole steps


def check_steps(engine: Engine, images: Bytes, labels: Bytes, seed: int = 0) -> float:
    """Compare STEPS steps of one `train` call with the reference; the largest error as a share.

    `images` and `labels` are what the engine has loaded, its parameters are where the weights are
    taken from; the engine is left trained. Raises ValidationFailed naming stage, network, parameter
    and error; Unjudged where the steps are too small to show in the stage's numbers.
    """
    setup, network = engine.setup, engine.network
    steps = _steps(engine, len(labels))
    random = np.random.default_rng((seed, setup.batch_size))
    few = dataclasses.replace(setup, batch_size=LOUD + 4)
    with (
        np.errstate(all="ignore"),
        Watch(few) as watch,
        FAST_REFERENCE.engine(FAST_REFERENCE, few) as reference,
    ):
        trial = _Trial(engine, reference, watch, images, labels, random, steps)
        batches = [trial.step(0)]
        while len(batches) < steps and trial.tame:
            batches.append(trial.step(len(batches)))
    if not _representable(trial.parameters, engine):
        return 0.0  # the training will be found to diverge
    order, steps = np.concatenate(batches), len(batches)
    engine.parameters, engine.velocity = trial.start, trial.start_velocity
    loss = engine.train(order, trial.rates[:steps])
    share = _compare_loss(engine, loss, trial.loss / steps, f"the mean loss of {steps} steps")
    after = engine.parameters.astype(np.float64)
    judged = False
    for p in network.parameters:
        part = slice(p.offset, p.offset + p.size)
        # what float32 cannot show of a small step onto large weights
        hidden = steps * _eps(engine) * _length(trial.parameters[part])
        hidden += _length(trial.doubt[part])
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
    most = FEWER_STEPS if engine.image_by_image else STEPS
    return max(1, min(most, count // engine.setup.batch_size))


class _Trial:
    """Steps of the reference, in float64, and the batches they are made on."""

    def __init__(
        self,
        engine: Engine,
        reference: Engine,
        watch: Watch,
        images: Bytes,
        labels: Bytes,
        random: np.random.Generator,
        steps: int,
    ) -> None:
        self._reference, self._watch, self._random = reference, watch, random
        self._images, self._labels, self._setup = images, labels, engine.setup
        dtype = engine.stage.dtype
        count = len(labels)
        inner = random.choice(count, min(count, POOL - 2), replace=False)
        self._pool = np.unique([0, count - 1, *inner])
        classes = np.unique(self._labels[self._pool])
        # of a class that only some of the images belong to
        self._sure_of = int(random.choice(classes)) if len(classes) > 1 else int(not classes[0])
        # What the engine can hold is where both begin.
        self.start = self._start(engine).astype(dtype)
        self.parameters = self.start.astype(np.float64)
        self.start_velocity = np.zeros_like(self.start)
        self.velocity = np.zeros_like(self.parameters)
        self.doubt = np.zeros_like(self.parameters)
        self._velocity_doubt = np.zeros_like(self.parameters)
        self.travelled = {p.name: 0.0 for p in engine.network.parameters}
        self.loss = 0.0
        rates = np.full(steps, self._setup.learning_rate)
        if self._setup.warmup is not None:
            rates *= random.uniform(0.3, 1.0, steps)
        self.rates = rates

    def _start(self, engine: Engine) -> Array:
        """The engine's weights, changed, with last biases that make the network sure of a class."""
        vector = engine.parameters.astype(np.float64)
        network = self._setup.network
        for p in network.parameters:
            view = vector[p.offset : p.offset + p.size]
            usual = float(np.sqrt(np.mean(view**2))) or 0.1
            view += 0.1 * usual * self._random.standard_normal(p.size)
        last = [p for p in network.parameters if p.layer == len(network.layers) - 1]
        for p in last:
            if p.key == "bias" and p.size == network.classes:
                view = vector[p.offset : p.offset + p.size]
                view -= SURE
                view[self._sure_of] += 2 * SURE
        return vector

    def step(self, number: int) -> Order:
        """One step on a batch of loud and silent images; its indices, in order."""
        setup = self._setup
        batch = setup.batch_size
        self._watch.parameters = self._reference.parameters = self.parameters
        clean = self._pool[~self._watch.asks(self._images[self._pool])]
        usable = clean if len(clean) else self._pool
        sure = self._labels[usable] == self._sure_of
        silent, loud = usable[sure], usable[~sure]
        if not len(silent) or not len(loud):
            silent = loud = usable
        order: Order = np.resize(self._random.permutation(silent)[:2], batch)
        inner = self._random.choice(batch, min(LOUD, batch), replace=False)
        positions = np.unique([0, batch - 1, *inner])
        order[positions] = np.resize(self._random.permutation(loud), len(positions))
        self._descend(order, number, clean=bool(len(clean)))
        return order

    @property
    def tame(self) -> bool:
        """Whether the weights have moved less than they are large, so that errors grow slowly."""
        way = math.hypot(*self.travelled.values())
        return math.isfinite(way) and way < _length(self.start)

    def _descend(self, order: Order, number: int, *, clean: bool) -> None:
        setup, batch = self._setup, self._setup.batch_size
        chosen, counts = np.unique(order, return_counts=True)
        weights = counts / batch
        images, labels = self._images[chosen], self._labels[chosen]
        losses, error = cross_entropies(self._reference.logits(images).T, labels)
        self.loss += float(losses @ weights)
        error = error.T * weights[:, None]
        gradient = self._reference.backward(images, error)
        if number == 0 and setup.momentum:
            self._begin_moving(gradient)
        self.velocity = setup.momentum * self.velocity + gradient
        rate = self.rates[number]
        if not clean:
            self._velocity_doubt *= setup.momentum
            self._velocity_doubt += self._watch.doubt(images, error)
            self.doubt += rate * self._velocity_doubt
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

    From the engine's weights, with a velocity as large as a gradient; the engine is left trained.
    A training whose loss is no longer finite is not compared. Raises ValidationFailed.
    """
    setup = engine.setup
    random = np.random.default_rng((seed, setup.batch_size, 1))
    batch = setup.batch_size
    steps = min(REAL_STEPS, _steps(engine, len(labels)))
    order = np.resize(random.permutation(len(labels)), steps * batch)
    start = engine.parameters
    parameters = start.astype(np.float64)
    velocity, travelled = np.zeros_like(parameters), np.zeros_like(parameters)
    losses, first = [], np.zeros_like(start)
    for step in range(steps):
        part = order[step * batch : (step + 1) * batch]
        engine.parameters = parameters.astype(start.dtype)
        loss, gradient = engine.gradient(images[part], labels[part])
        if not step:
            if setup.momentum:
                usual = float(np.sqrt(np.mean(gradient.astype(np.float64) ** 2)))
                first[:] = usual * random.standard_normal(len(start))
            velocity = first.astype(np.float64)
        losses.append(loss)
        velocity = setup.momentum * velocity + gradient
        parameters = parameters - setup.learning_rate * velocity
        travelled += np.abs(setup.learning_rate * velocity)
        if not _length(travelled) < _length(start):
            break  # from there on, errors grow too fast
    if not (np.isfinite(losses).all() and _representable(parameters, engine)):
        return  # the training will be found to diverge
    steps = len(losses)
    engine.parameters, engine.velocity = start, first
    loss = engine.train(order[: steps * batch], engine.rates_of(steps, None))
    _compare_loss(engine, loss, float(np.mean(losses)), f"the mean loss of {steps} real steps")
    after = engine.parameters.astype(np.float64)
    unit = (
        FACTOR * engine.stage.slack * _eps(engine) * math.sqrt(longest_sum(engine.network, batch))
    )
    coarse = COARSE * (engine.stage.rounding or 0.0)
    share = max(REAL_SHARE, unit * (engine.stage.conv_weight_slack or 1.0), coarse)
    for p in engine.network.parameters:
        part_of = slice(p.offset, p.offset + p.size)
        way = _length(travelled[part_of])
        hidden = steps * _eps(engine) * _length(parameters[part_of])
        error = _length(after[part_of] - parameters[part_of])
        if not error <= share * way + hidden:
            raise failure(
                engine,
                f"{p.name} after {steps} real steps at batch size {batch} is off by "
                f"{error:.3g} of {way:.3g} from what the stage's own gradients add up to",
            )


def _compare_loss(engine: Engine, found: float, right: float, what: str) -> float:
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
                engine, f"the velocity of {p.name} after a few steps is off by {error:.3g} of "
                f"{size:.3g}"
            )  # fmt: skip


def _representable(vector: Array, engine: Engine) -> bool:
    """Whether the stage's numbers can hold the vector, and its length squared."""
    with np.errstate(over="ignore"):
        return math.isfinite(_length(vector.astype(engine.stage.dtype)))


def _length(vector: Array) -> float:
    """Euclidean length; not by BLAS, whose threads take longer to wake than so short a sum."""
    return math.sqrt(float(np.square(vector).sum()))


def _eps(engine: Engine) -> float:
    return float(np.finfo(np.dtype(engine.stage.dtype)).eps)


# The replay of what was timed


@dataclass
class Call:
    """One timed call, or several in a row between which nobody looked at the state."""

    what: str
    """For messages."""
    order: Callable[[], Order]
    """Gives the images that it had to train on. A function, so that no order has to be kept."""
    rates: Array | None
    before: Weights
    after: Weights
    loss: float
    """Mean loss of its steps; nan where no single call has returned it."""
    by_units: bool
    """Whether it trained the engine's units, which may be parts of a step; `rates` are then those
    of the whole epoch, of which `done` images had been trained on.
    """
    done: int
    again: Callable[[], object] | None
    """Makes the very same call."""
    epoch: int
    """Which whole epoch it was, counted from 1; 0: none."""
    late: float
    """Share of the time until the state had been read that the reading took."""
    step_losses: Array | None


class Recording:
    """The states between which a stage was timed.

    `begin`, a timed call, `end`; `unchanged` after whatever must not train; `check` at last. Where
    several calls are recorded together, `noted` follows each of them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls: list[Call] = []
        self._noted: list[Array] = []
        self._now = Weights.of(engine)

    def begin(self) -> None:
        """Read the state from which the next call starts."""
        self._now = Weights.of(self.engine)
        self._noted.clear()

    def noted(self) -> None:
        """Keep the losses of the last call's steps, which the engine's next call replaces."""
        if self.engine.step_losses is not None:
            self._noted.append(np.array(self.engine.step_losses))

    def end(
        self,
        what: str,
        order: Callable[[], Order],
        rates: Array | None,
        *,
        loss: float = math.nan,
        seconds: float = math.inf,
        by_units: bool = False,
        done: int = 0,
        again: Callable[[], object] | None = None,
        epoch: int = 0,
    ) -> None:
        """Read the state in which a call has left the engine, as soon as its clock has stopped."""
        state, late = self._read(seconds)
        if not self._noted:
            self.noted()
        losses = np.concatenate(self._noted) if self._noted else None
        self._noted.clear()
        self.calls.append(
            Call(
                what, order, rates, self._now, state, loss, by_units, done, again, epoch, late,
                losses,
            )
        )  # fmt: skip
        self._now = state

    def _read(self, seconds: float) -> tuple[Weights, float]:
        """The state, and the share of the time until now that reading it took."""
        began = time.perf_counter()
        state = Weights.of(self.engine)
        taken = time.perf_counter() - began
        if not state.equals(Weights.of(self.engine)):
            raise failure(self.engine, "its weights still change when a timed call has returned")
        return state, taken / (taken + seconds)

    def unchanged(self, after: str) -> None:
        """Raise ValidationFailed unless the engine's state is that of the last call's end."""
        if not self._now.equals(Weights.of(self.engine)):
            raise failure(self.engine, f"its weights or its velocity have changed by {after}")

    def reached(self, epoch: int) -> None:
        """Compare the engine's state with that after an epoch, replayed by other means."""
        for call in self.calls:
            if call.epoch == epoch:
                self._compare_states(call)

    def restore(self) -> None:
        """Put the engine into the state of the last call's end."""
        self._now.put_into(self.engine)

    def check(self, first: int = 0) -> None:
        """Replay the calls from number `first` on; see the module's docstring.

        The engine is left in the state of the last call's end. Raises ValidationFailed.
        """
        for call in self.calls:
            # a pause of the machine may have made the call itself look long
            if call.late > LATE / 8:
                self._confirm_late(call)
        for call in self.calls[first:]:
            losses = self._replay(call, call.before)
            if self.engine.stage.repeatable:
                self._compare_states(call)
                self._compare_losses(call, losses)
            else:
                self._compare_step_losses(call)
        self.restore()

    def _confirm_late(self, call: Call) -> None:
        """Make the call again: whatever else the machine was doing does not come back each time.

        This time the reading is compared with one of a state that was just put in, since some
        libraries keep what they have read once.
        """
        if call.again is None:
            return
        shares = []
        for _ in range(LATE_TRIES):
            call.before.put_into(self.engine)
            began = time.perf_counter()
            Weights.of(self.engine)
            usual = time.perf_counter() - began
            call.before.put_into(self.engine)
            began = time.perf_counter()
            call.again()
            called = time.perf_counter()
            Weights.of(self.engine)
            extra = max(0.0, time.perf_counter() - called - usual)
            shares.append(extra / (extra + called - began))
        if (share := statistics.median(shares)) > LATE:
            raise failure(
                self.engine,
                f"{call.what} returns before its work is done: reading the weights takes "
                f"{100 * share:.0f} % of the whole time",
            )

    def _replay(self, call: Call, start: Weights) -> list[tuple[int, float]]:
        """Train on the call's images again, in calls of doubling length; (steps, loss) of each."""
        engine = self.engine
        size = engine.unit if call.by_units else engine.setup.batch_size
        batch = engine.setup.batch_size
        start.put_into(engine)
        order, parts = call.order(), []
        self._step_losses: list[Array] = []
        for begin, end in pairwise(lengths(len(order) // size)):
            part = order[begin * size : end * size]
            if call.by_units:
                assert call.rates is not None
                ended = slice(
                    (call.done + begin * size) // batch, (call.done + end * size) // batch
                )
                engine.train_units(part, call.rates[ended])
            else:
                rates = None if call.rates is None else call.rates[begin:end]
                parts.append((end - begin, engine.train(part, rates)))
            if engine.step_losses is not None:
                self._step_losses.append(np.array(engine.step_losses))
        return parts

    def _compare_states(self, call: Call) -> None:
        found = Weights.of(self.engine)
        if found.equals(call.after):
            return
        apart = _length(found.parameters - call.after.parameters)
        way = _length(found.parameters - call.before.parameters)
        raise failure(
            self.engine,
            f"{call.what} does not end with the weights that the same batches end with when they "
            f"are trained on in shorter calls: {apart:.3g} apart after a way of {way:.3g} (a stage "
            "whose sums have no fixed order says so: repeatable=False)",
        )

    def _compare_losses(self, call: Call, parts: list[tuple[int, float]]) -> None:
        steps = sum(count for count, _ in parts)
        mean = sum(count * loss for count, loss in parts) / max(steps, 1)
        if parts and math.isfinite(call.loss) and math.isfinite(mean):
            _compare_loss(self.engine, call.loss, mean, f"the mean loss of {call.what}")

    def _compare_step_losses(self, call: Call) -> None:
        """For a stage whose bits do not repeat: the losses of the steps; see `unlike`."""
        engine = self.engine
        if call.step_losses is None or not self._step_losses:
            raise failure(engine, "it says repeatable=False, so its engine has to give step_losses")
        if why := unlike(call.step_losses, np.concatenate(self._step_losses)):
            raise failure(engine, f"{call.what} is not what its batches, given in shorter calls, "
                          f"train: {why}")  # fmt: skip


def unlike(found: Array, right: Array) -> str:
    """Why the losses of a training's steps cannot be those of another one on the same batches.

    Both (steps,); empty where they can. Two honest float32 trainings agree to rounding until one
    decision of relu or max falls differently, after some tens to hundreds of steps, and from then
    on no bound holds for a single step. What still holds is that a batch that is hard for the one
    is hard for the other. In windows of a quarter of the steps the median difference of two honest
    trainings of LeNet-5, at batch sizes 16 to 256, was at most 0.6 of that of trainings which see
    each other's batches a few steps earlier or later (whose own is 1), and their mean losses were
    at most 0.16 standard deviations apart.
    """
    if len(found) != len(right):
        return f"it took {len(found)} steps, not {len(right)}"
    if not np.isfinite(right).all() or not np.isfinite(found).all():
        return "" if np.array_equal(np.isfinite(right), np.isfinite(found)) else "it diverges"
    start = slice(0, FIRM)
    if (np.abs(found - right) > NOT_APART * np.maximum(1.0, np.abs(right)))[start].any():
        return f"the first {FIRM} steps have other losses"
    if len(right) < FIRM:
        return ""
    for window in np.array_split(np.arange(len(right)), max(1, min(4, len(right) // WINDOW))):
        where = f"in steps {window[0] + 1} to {window[-1] + 1}"
        near = float(np.median(np.abs(found - right)[window]))
        far = min(
            float(np.median(np.abs(found - np.roll(right, shift))[window])) for shift in SHIFTS
        )
        if near > max(MATCH * far, NOT_APART):
            return f"{where} the losses do not rise and fall with the batches"
        apart = abs(float(found[window].mean() - right[window].mean()))
        if apart > max(LEVEL * float(right[window].std()), NOT_APART):
            return f"{where} the mean loss is {apart:.3g} off"
    return ""


def lengths(count: int) -> list[int]:
    """0, 1, 2, 4, ... and `count`: where a replay pauses."""
    return [0, *(2**k for k in range(count.bit_length()) if 2**k < count), count]


def recorded_epochs(recording: Recording, count: int, epochs: int, seed: int) -> Iterator[Epoch]:
    """training.train_epochs, each epoch one call, with the states in which they end recorded."""
    engine = recording.engine
    steps = count // engine.setup.batch_size
    recording.begin()
    for done in train_epochs(engine, count, epochs, seed):
        shuffle = Shuffle(count, seed, done.epoch)
        rates = engine.setup.schedule.rates(done.epoch, epochs, steps)
        recording.end(
            f"epoch {done.epoch}", partial(whole_batches, shuffle, engine.setup.batch_size), rates,
            loss=done.loss, seconds=done.seconds, epoch=done.epoch,
            again=partial(engine.train_epoch, shuffle, rates),
        )  # fmt: skip
        yield done


def whole_batches(shuffle: Shuffle, batch_size: int) -> Order:
    """The order of an epoch, without the images left over."""
    return shuffle.indices()[: len(shuffle) // batch_size * batch_size]


# All of it, for one engine


def check_before(engine: Engine, images: Bytes, labels: Bytes, seed: int) -> float:
    """What can be checked before a clock starts, from the engine's weights; the worst share.

    `images` and `labels` are the training set that the engine has loaded; the engine is left
    trained. Raises ValidationFailed or Unjudged.
    """
    state, size = Weights.of(engine), engine.setup.batch_size
    share = validate(engine, images[:size], labels[:size])
    if engine.setup.momentum:  # otherwise check_momentum does the same, with one
        state.put_into(engine)
        share = max(share, check_steps(engine, images, labels, seed))
    if not engine.image_by_image:
        state.put_into(engine)
        check_real_steps(engine, images, labels, seed)
    return share


def check_after(
    recording: Recording, images: Bytes, labels: Bytes, seed: int, first: int = 0
) -> None:
    """What can be checked once the clock has been read: the recorded calls from `first` on, and
    steps from the weights they ended with, to which the engine returns.

    Raises ValidationFailed or Unjudged.
    """
    engine = recording.engine
    recording.check(first)
    trained = Weights.of(engine)
    if not np.isfinite(trained.parameters).all():
        return
    check_steps(engine, images, labels, seed + 1)
    if not engine.image_by_image:
        trained.put_into(engine)
        check_real_steps(engine, images, labels, seed + 1)
    recording.restore()


def check_momentum(
    stage: Stage,
    config: Config,
    network: Network,
    dataset: Dataset,
    batch_size: int,
    place: Place,
    seed: int,
) -> None:
    """Check steps with a momentum, by an engine of their own, where the experiment has none."""
    if stage.engine.image_by_image:
        batch_size = min(batch_size, 2)  # images do not meet, and take long
    count = max(STEPS * batch_size, POOL)
    few = dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:count],
        train_labels=dataset.train_labels[:count],
    )
    training = config.training.model_copy(update={"momentum": MOMENTUM})
    moving = config.model_copy(update={"training": training})
    with open_engine(stage, moving, network, few, batch_size, place) as engine:
        start(engine, seed)
        check_steps(engine, few.train_images, few.train_labels, seed)


def check_training(
    stage: Stage,
    config: Config,
    network: Network,
    dataset: Dataset,
    batch_size: int,
    place: Place,
    seed: int,
) -> float:
    """All checks of a measurement around CHECKED_EPOCHS epochs that nobody times.

    Returns the largest error of the checks before them as a share of what is allowed. Raises
    ValidationFailed or Unjudged.
    """
    count = len(dataset.train_labels)
    with open_engine(stage, config, network, dataset, batch_size, place) as engine:
        start(engine, seed)
        share = check_before(engine, dataset.train_images, dataset.train_labels, seed)
        start(engine, seed)
        recording = Recording(engine)
        for _ in recorded_epochs(recording, count, CHECKED_EPOCHS, seed):
            accuracy(engine, dataset.test_images, dataset.test_labels)
            recording.unchanged("an evaluation")
        check_after(recording, dataset.train_images, dataset.train_labels, seed)
    if not config.training.momentum:
        check_momentum(stage, config, network, dataset, batch_size, place, seed)
    return share
