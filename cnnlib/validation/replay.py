"""Did the timed calls train on the batches they were given? They are replayed, off the clock.

Float32 trainings of the same network part quickly: two that differ by one rounding error at the
start have moved apart by a third of the way after an epoch of LeNet-5 at batch size 64. No bound on
final weights could therefore tell a skipped batch from honest rounding, and none is used. Instead
the state is read before and after every timed call, and later the same batches are given to `train`
in calls of doubling length, in an explicit order. A stage whose sums have a fixed order ends with
the same bits; one that skips, repeats or reorders batches, stops early, resets its velocity or
forgets an update in calls of one length does not. Stages that cannot repeat their bits
(`Stage.repeatable`) report the loss of every step instead, and `unlike` says what that can show: a
step more or less, other batches, steps without effect; not a single wrong step late in an epoch.
Where their products are coarser than float32, how far losses may part is measured, too.

The state must also stay as it is while the network is evaluated or profiled, and after `train` has
returned; and reading the state must not take the time that `train` should have taken.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np

from cnnlib.engine import Engine, Order
from cnnlib.engine.image_by_image import (
    continue_step,
    train_units,
    unfinished_of,
    unit_of,
)
from cnnlib.engine.shuffle import Shuffle
from cnnlib.layers import Array
from cnnlib.system.turns import alone
from cnnlib.training.loop import Epoch, train_epochs
from cnnlib.validation.coarse import weight_errors
from cnnlib.validation.steps import compare_loss
from cnnlib.validation.tolerances import SPREAD
from cnnlib.validation.verdicts import failure

LATE = 0.25
"""Share of a call's time that reading the state may take, beyond what it usually takes."""
LATE_TRIES = 5
LATE_PAUSES = (0.0, 0.1, 0.3, 1.0)
"""Seconds before each round of LATE_TRIES: a busy machine can disturb all tries of a round."""
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
class EngineState:
    """Everything that a training continues from: copies of an engine's vectors."""

    parameters: Array
    velocity: Array
    unfinished: Array
    steps: Array
    """(1,) The number of steps done since the initial weights."""

    @classmethod
    def of(cls, engine: Engine) -> "EngineState":
        """Read the state as a host program would see it now."""
        return cls(
            engine.parameters,
            engine.velocity,
            np.array(unfinished_of(engine)),
            np.array([engine.steps]),
        )

    def put_into(self, engine: Engine) -> None:
        engine.parameters, engine.velocity = self.parameters, self.velocity
        engine.steps = int(self.steps[0])
        continue_step(engine, self.unfinished)

    def equals(self, other: "EngineState") -> bool:
        """Whether all bits agree; two elements that are not a number count as equal."""
        return all(
            np.array_equal(mine, theirs, equal_nan=True)
            for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)
        )


@dataclass(frozen=True)
class TimedCall:
    """One timed call, or several in a row between which the state was not read."""

    what: str
    """Its name in messages."""
    order: Callable[[], Order]
    """Returns the images that it had to train on. A function, so that no order has to be kept."""
    rates: Array | None = None
    """Learning rates of its steps; None for the setup's constant rate. Where it trained units,
    those of the whole epoch."""
    loss: float = math.nan
    """Mean loss of its steps; nan where no single call has returned it."""
    seconds: float = math.inf
    """What the clock said of the call after which the state was read."""
    by_units: bool = False
    """Whether it trained the engine's units, which may be parts of a step."""
    done: int = 0
    """Images of the epoch that had been trained on before, where it trained units."""
    again: Callable[[], object] | None = None
    """Makes the very same call."""
    epoch: int = 0
    """The number of the whole epoch that it was, counted from 1; 0 for anything else."""


@dataclass(frozen=True)
class RecordedCall:
    """A timed call between the states that were read before and after it."""

    timed: TimedCall
    before: EngineState
    after: EngineState
    late: float
    """Share of the time until the state had been read that the reading took."""
    step_losses: Array | None
    """Mean loss of every step, from stages that do not repeat their bits."""


def share_of(delay: float, called: float) -> float:
    """A delay as a share of the whole time; 0 where there is none."""
    delay = max(0.0, delay)
    return delay / (delay + called)


class Recording:
    """The states between which a stage was timed.

    `begin`, a timed call, `end`; `unchanged` after whatever must not train; `check` at last. Where
    several calls are recorded together, `noted` follows each of them.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.calls: list[RecordedCall] = []
        self._confirmed = 0
        """Calls for which `confirm_late` has been done."""
        self._noted: list[Array] = []
        self._now = EngineState.of(engine)

    def begin(self) -> None:
        """Read the state from which the next call starts."""
        self._now = EngineState.of(self.engine)
        self._noted.clear()

    def noted(self) -> None:
        """Keep the losses of the last call's steps, which the engine's next call replaces."""
        if self.engine.step_losses is not None:
            self._noted.append(np.array(self.engine.step_losses))

    def end(self, timed: TimedCall) -> None:
        """Read the state in which a call has left the engine, as soon as its clock has stopped."""
        state, late = self._read(timed.seconds)
        if not self._noted:
            self.noted()
        losses = np.concatenate(self._noted) if self._noted else None
        self._noted.clear()
        self.calls.append(RecordedCall(timed, self._now, state, late, losses))
        self._now = state

    def _read(self, seconds: float) -> tuple[EngineState, float]:
        """The state, and the share of the time until now that reading it took."""
        began = time.perf_counter()
        state = EngineState.of(self.engine)
        taken = time.perf_counter() - began
        if not state.equals(EngineState.of(self.engine)):
            raise failure(self.engine, "its weights still change when a timed call has returned")
        return state, taken / (taken + seconds)

    def unchanged(self, after: str) -> None:
        """Raise ValidationFailed unless the engine's state is that of the last call's end."""
        if not self._now.equals(EngineState.of(self.engine)):
            raise failure(self.engine, f"its weights or its velocity have changed by {after}")

    def reached(self, epoch: int) -> None:
        """Compare the engine's state with that after an epoch, replayed by other means."""
        for call in self.calls:
            if call.timed.epoch == epoch:
                self._compare_states(call)

    def restore(self) -> None:
        """Put the engine into the state of the last call's end."""
        self._now.put_into(self.engine)

    def check(self, first: int = 0) -> None:
        """Replay the calls from number `first` on; see the module's docstring.

        The engine is left in the state of the last call's end. Raises ValidationFailed.
        """
        self.confirm_late()
        for call in self.calls[first:]:
            replayed = self._replay(call)
            if self.engine.stage.repeatable:
                self._compare_states(call)
                self._compare_losses(call.timed, replayed)
            else:
                self._compare_step_losses(call, replayed)
        self.restore()

    def confirm_late(self) -> None:
        """Check that no call returned before its work was done; those that look so are repeated.

        This is timed, so that it is best done before other processes may work again. `check` does
        it for all calls for which it has not been done. Raises ValidationFailed.
        """
        for call in self.calls[self._confirmed :]:
            # a pause of the machine may have made the call itself look long
            if call.late > LATE / 8:
                self._confirm_late(call)
            self._confirmed += 1

    def _confirm_late(self, call: RecordedCall) -> None:
        """Make the call again: whatever else the machine was doing does not come back each time."""
        again = call.timed.again
        if again is None:
            return
        share = 0.0
        for pause in LATE_PAUSES:
            time.sleep(pause)
            with alone():
                tries = self._tries(call, again)
            share = self._late_share(tries)
            if share <= LATE:
                return
        raise failure(
            self.engine,
            f"{call.timed.what}: train returns before its work is done, as reading the "
            f"weights takes {100 * share:.0f} % of the whole time",
        )

    def _tries(self, call: RecordedCall, again: Callable[[], object]) -> list[tuple[float, float]]:
        """LATE_TRIES times what `_delayed` returns, or fewer where most say that all is well."""
        tries, well = list[tuple[float, float]](), 0
        while len(tries) < LATE_TRIES and 2 * well < LATE_TRIES:
            tries.append(self._delayed(call, again))
            well += self._late_share(tries[-1:]) <= LATE
        return tries

    def _delayed(self, call: RecordedCall, again: Callable[[], object]) -> tuple[float, float]:
        """Seconds of the call, and seconds more than usual of reading the weights behind it.

        Reading is compared with that of a state that was just put in, since some libraries keep
        what they have read once.
        """
        call.before.put_into(self.engine)
        began = time.perf_counter()
        EngineState.of(self.engine)
        usual = time.perf_counter() - began
        call.before.put_into(self.engine)
        began = time.perf_counter()
        again()
        called = time.perf_counter()
        EngineState.of(self.engine)
        return called - began, time.perf_counter() - called - usual

    def _late_share(self, tries: list[tuple[float, float]]) -> float:
        """The share of the whole time that the delay of reading takes, by several tries."""
        return statistics.median(share_of(delay, called) for called, delay in tries)

    def _replay(self, call: RecordedCall) -> "Replayed":
        """Train on the call's images again, in calls of doubling length."""
        engine, timed, replayed = self.engine, call.timed, Replayed()
        batch = engine.setup.batch_size
        size = unit_of(engine) if timed.by_units else batch
        call.before.put_into(engine)
        order = timed.order()
        for begin, end in pairwise(lengths(len(order) // size)):
            part = order[begin * size : end * size]
            if timed.by_units:
                ended = slice(
                    (timed.done + begin * size) // batch, (timed.done + end * size) // batch
                )
                train_units(engine, part, None if timed.rates is None else timed.rates[ended])
            else:
                rates = None if timed.rates is None else timed.rates[begin:end]
                replayed.losses.append((end - begin, engine.train(part, rates)))
            if engine.step_losses is not None:
                replayed.step_losses.append(np.array(engine.step_losses))
        return replayed

    def _compare_states(self, call: RecordedCall) -> None:
        found = EngineState.of(self.engine)
        if found.equals(call.after):
            return
        apart = float(np.linalg.norm(found.parameters - call.after.parameters))
        way = float(np.linalg.norm(found.parameters - call.before.parameters))
        raise failure(
            self.engine,
            f"{call.timed.what} does not end with the weights that the same batches end with when "
            f"they are trained on in shorter calls: {apart:.3g} apart after a way of {way:.3g} (a "
            "stage whose sums have no fixed order says so: repeatable=False)",
        )

    def _compare_losses(self, timed: TimedCall, replayed: "Replayed") -> None:
        parts = replayed.losses
        steps = sum(count for count, _ in parts)
        mean = sum(count * loss for count, loss in parts) / max(steps, 1)
        if parts and math.isfinite(timed.loss) and math.isfinite(mean):
            compare_loss(self.engine, timed.loss, mean, f"the mean loss of {timed.what}")

    def _compare_step_losses(self, call: RecordedCall, replayed: "Replayed") -> None:
        """For a stage whose bits do not repeat: compare the losses of the steps; see `unlike`."""
        engine = self.engine
        if call.step_losses is None or not replayed.step_losses:
            raise failure(engine, "it says repeatable=False, so its engine has to give step_losses")
        right = np.concatenate(replayed.step_losses)
        why = unlike(call.step_losses, right)
        if why and engine.stage.rounding and len(call.step_losses) == len(right):
            why = self._unlike_coarse(call, call.step_losses, right)
        if why:
            raise failure(
                engine,
                f"{call.timed.what} is not what its batches, given in shorter calls, train: {why}",
            )

    def _unlike_coarse(self, call: RecordedCall, found: Array, right: Array) -> str:
        """`unlike` for a stage whose products are coarser than its numbers.

        Its trainings part from the first steps on. How far they may is seen from trainings that
        begin with rounded weights; what is true of one of those, too, says nothing.
        """
        parting = self._parting(call, right)
        why = unlike(found, right, parting)
        others = self._coarse_losses(call, len(right)) if why else iter(())
        return "" if any(unlike(other, right, parting) == why for other in others) else why

    def _parting(self, call: RecordedCall, right: Array) -> Array:
        """How far coarse products may take the losses of the first FIRM steps from `right`.

        Once losses are apart they are allowed to stay so.
        """
        steps = min(FIRM, len(right))
        apart = [abs(losses - right[:steps]) for losses in self._coarse_losses(call, steps)]
        # twice: a single loss is a number, whose distances scatter more than those of vectors
        return 2 * SPREAD * np.maximum.accumulate(np.max(apart, axis=0))

    def _coarse_losses(self, call: RecordedCall, steps: int) -> Iterator[Array]:
        """Losses of the first steps of a call, if it begins with weights rounded as its products.

        Two trainings in TF32 that differ in the last bit of one sum round some numbers to different
        neighbours, a thousand times as far apart, and after a few steps are as far from each other
        as from these.
        """
        engine, timed, size = self.engine, call.timed, self.engine.setup.batch_size
        order = timed.order()
        for errors in weight_errors(engine.stage.rounding, len(call.before.parameters)):
            call.before.put_into(engine)
            engine.parameters = (call.before.parameters * (1 + errors)).astype(engine.stage.dtype)
            losses = []
            for begin, end in pairwise(lengths(steps)):  # as in the replay: JAX compiles for each
                rates = None if timed.rates is None else timed.rates[begin:end]
                engine.train(order[begin * size : end * size], rates)
                losses.append(np.array(engine.step_losses))
            yield np.resize(np.concatenate(losses), steps)


@dataclass
class Replayed:
    """What the calls of a replay returned."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    """(steps, mean loss) of each call that trained whole steps."""
    step_losses: list[Array] = field(default_factory=list)
    """Losses of the steps of each call, from stages that report them."""


def unlike(found: Array, right: Array, parting: Array | None = None) -> str:
    """Why the losses of a training's steps cannot be those of another one on the same batches.

    Both (steps,); empty where they can. Two honest float32 trainings agree to rounding until one
    decision of relu or max falls differently, after some tens to hundreds of steps, and from then
    on no bound holds for a single step. What still holds is that a batch that is hard for the one
    is hard for the other. In windows of a quarter of the steps the median difference of two honest
    trainings of LeNet-5, at batch sizes 16 to 256, was at most 0.6 of that of trainings which see
    each other's batches a few steps earlier or later (whose own is 1), and their mean losses were
    at most 0.16 standard deviations apart.

    Where products are coarser than float32, trainings part in the first steps: `parting` (FIRM or
    fewer,) is how far apart their losses may be there.
    """
    if len(found) != len(right):
        return f"it took {len(found)} steps, not {len(right)}"
    if not np.isfinite(right).all() or not np.isfinite(found).all():
        return "" if np.array_equal(np.isfinite(right), np.isfinite(found)) else "it diverges"
    start = slice(0, FIRM)
    allowed = NOT_APART * np.maximum(1.0, np.abs(right[start]))
    if parting is not None:
        allowed = np.maximum(allowed, parting)
    if (np.abs(found - right)[start] > allowed).any():
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
        timed = TimedCall(
            f"epoch {done.epoch}",
            partial(whole_batches, shuffle, engine.setup.batch_size),
            rates,
            loss=done.loss,
            seconds=done.seconds,
            epoch=done.epoch,
            again=partial(engine.train_epoch, shuffle, rates),
        )
        recording.end(timed)
        yield done


def whole_batches(shuffle: Shuffle, batch_size: int) -> Order:
    """The order of an epoch, without the images left over."""
    return shuffle.indices()[: len(shuffle) // batch_size * batch_size]
