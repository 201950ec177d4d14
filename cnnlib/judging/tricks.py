"""Checks against known ways to look fast, beyond those that every measurement makes.

They are made from outside (cnnlib/judging/remote.py), with seeds that no earlier run has used. Each
of them asks for something that an honest stage does anyway:

- `check_declared`: the stage asks for no more tolerance than the shipped ones do;
- `check_spotlight` (cnnlib/judging/spotlight.py): among the steps of a call of the usual length,
  one at a random place has a learning rate that matters, and the weights end where this step alone
  leads. This holds for stages without a fixed order of sums too, since no other step moves
  anything;
- `check_outputs`: other weights give other logits and gradients for the same images, and other
  images of the same shape give their own;
- `check_memory`: a training that was done before takes as long as a new one;
- `check_late_steps`: the later steps of a long call take as long as the earlier ones;
- `check_at_rest`: when `train` has returned, weights stay and processors come to rest;
- `check_clock`: the clocks of the stage's process run like the judge's.

Of several tries the shortest counts: whatever else the machine does makes some of them longer, and
none shorter. A busy machine can lengthen all tries of one round, so the comparisons of times reject
only what is still seen after PAUSES: rounds further and further apart, the shortest of all of them
counting.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np

from cnnlib.datasets import Dataset
from cnnlib.engine import Bytes, Engine, Setup, Stage
from cnnlib.engine.shuffle import Shuffle
from cnnlib.judging.remote import RemoteEngine, Worker
from cnnlib.peers import CHOSEN, TF32, WINOGRAD
from cnnlib.training.loop import accuracy, start
from cnnlib.training.target import Target, open_engine
from cnnlib.validation.parity import compare_logits, validate
from cnnlib.validation.replay import (
    RecordedCall,
    Recording,
    recorded_epochs,
    share_of,
)
from cnnlib.validation.trajectory import (
    CHECKED_EPOCHS,
    check_after,
    check_before,
    check_momentum,
)
from cnnlib.validation.verdicts import failure

LEAST_TRIES = 3
MOST_TRIES = 12
BRIEF_SECONDS = 0.05
"""Seconds that tries of one kind take in all, where that allows more than the least of them."""
PAUSES = (0.0, 0.0, 0.25, 0.5, 1.0, 2.0)
"""Seconds before each round of the tries that compare times."""
CALL_SECONDS = 1.0
LEAST_STEPS = 8
"""Steps of the longest call that is timed, whatever it takes."""
REMEMBERED = 0.5
"""Share of a new training's time below which one that was done before counts as remembered."""
REMEMBERED_SECONDS = 5e-4
"""Seconds that it must save, at least."""
HURRIED = 0.5
"""Share of an early step's time below which late steps count as left out."""
SHORTEST = 3e-3
"""Seconds below which a difference of times says nothing."""
GPU_LEFT = 5e-4
"""Seconds that waiting for a GPU may take when `train` has returned, beyond the usual."""
REST = 0.3
"""Seconds that a process is given to come to rest, and seconds in which it is then watched."""
BUSY = 0.15
"""Cores that a process may keep busy while nothing is asked of it."""
LEAST_SHARE = 0.25
"""Share of a core below which no allowance is made for other processes: with less, one tick of the
clock that counts the time of processes would be too much."""
CLOCK = 0.1
"""Relative difference of two clocks over CLOCK_SECONDS that is allowed."""
CLOCK_SECONDS = 0.25

CHECKS: dict[str, str] = {
    "tolerances": "asks for no more tolerance than the shipped stages and peers",
    "spotlight": "one step that matters, at a random place of a call of full length",
    "outputs": "logits and gradients follow the weights and the images",
    "memory": "a training done before takes as long as a new one",
    "late steps": "later steps of a long call take as long as earlier ones",
    "at rest": "no work is left when train has returned",
    "clock": "its clocks run like the judge's",
}


OF_WHOLE_BATCHES = ("spotlight", "memory", "late steps", "at rest")
"""Those that are not made of a stage that takes one image at a time: they would take minutes."""


def check_declared(engine: Engine) -> str:
    """Raise ValidationFailed for tolerances beyond those of shipped stages; says what is asked."""
    stage = engine.stage
    most = {"rounding": TF32, "slack": CHOSEN, "conv_weight_slack": WINOGRAD}
    asked = {name: getattr(stage, name) for name in most}
    for name, value in asked.items():
        if value is not None and value > most[name]:
            raise failure(
                engine,
                f"its record asks for {name}={value:g}, more than any shipped stage or peer needs "
                f"({most[name]:g})",
            )
    unusual = {name: value for name, value in asked.items() if value not in (None, 1.0)}
    if np.dtype(stage.dtype) != np.float32:
        unusual["dtype"] = np.dtype(stage.dtype).name
    if not stage.repeatable:
        unusual["repeatable"] = False
    return ", ".join(f"{name}={value}" for name, value in unusual.items()) or "float32, bit for bit"


class JudgedRecording(Recording):
    """A recording of calls to another process, whose answers take a little longer now and then.

    A short delay is therefore no reason to reject. Work that hides in it is found all the same: the
    judge's clock runs until the weights have been read.
    """

    def _confirm_late(self, call: RecordedCall) -> None:
        if call.timed.seconds * call.late / (1 - call.late) >= SHORTEST:
            super()._confirm_late(call)

    def _late_share(self, tries: list[tuple[float, float]]) -> float:
        if min(delay for _, delay in tries) < SHORTEST:
            return 0.0
        return min(share_of(delay, called) for called, delay in tries)


def check_epochs(stage: Stage, setup: Setup, target: Target, data: Dataset, seed: int) -> float:
    """The checks of `check_training`, by a recording of its own.

    Returns the largest error of the checks before the epochs as a share of what is allowed.
    """
    images, labels = data.train_images, data.train_labels
    with open_engine(stage, setup, target, data) as engine:
        start(engine, seed)
        share = check_before(engine, images, labels, seed)
        start(engine, seed)
        recording = JudgedRecording(engine)
        for _ in recorded_epochs(recording, len(labels), CHECKED_EPOCHS, seed):
            accuracy(engine, data.test_images, data.test_labels)
            recording.unchanged("an evaluation")
        check_after(recording, images, labels, seed)
    if not setup.momentum:
        check_momentum(stage, setup, target, data, seed)
    return share


def check_outputs(
    engine: Engine, images: Bytes, labels: Bytes, random: np.random.Generator
) -> None:
    """Compare logits and gradients of the same images at two sets of weights, then of others."""
    count = min(engine.setup.batch_size, len(labels) // 2)
    first, second = (slice(0, count), slice(count, 2 * count))
    for part in (first, first, second):
        engine.parameters = engine.network.initial_parameters(int(random.integers(2**31)))
        validate(engine, images[part], labels[part])
        compare_logits(engine, images[part])


class Trials:
    """Calls of an engine that are timed by this process's clock.

    The longest has all `steps` of an epoch, or fewer where these take longer than CALL_SECONDS. Of
    brief calls there are more `tries`, since waiting for a processor takes longer than they do.
    """

    def __init__(self, engine: Engine, count: int, seed: int) -> None:
        self.engine, self._random, self.count = engine, np.random.default_rng(seed), count
        few = self.new(2)
        few()
        step = few() / 2
        self.steps = min(
            count // engine.setup.batch_size, max(LEAST_STEPS, int(CALL_SECONDS / step))
        )
        brief = int(BRIEF_SECONDS / (self.steps * step))
        self.tries = min(max(LEAST_TRIES, brief), MOST_TRIES)

    def new(self, steps: int) -> Callable[[], float]:
        """A call on images in an order and from weights that are new; it returns its seconds."""
        engine, random = self.engine, self._random
        weights = engine.network.initial_parameters(int(random.integers(2**31)))
        shuffle = Shuffle(self.count, int(random.integers(2**31)), 1)
        order = shuffle.indices()[: steps * engine.setup.batch_size]
        rates = engine.rates_of(steps, None)

        def call() -> float:
            engine.parameters, engine.velocity = weights, np.zeros_like(weights)
            began = time.perf_counter()
            engine.train(order, rates)
            engine.parameters  # noqa: B018 - work that waits for a reader counts
            return time.perf_counter() - began

        return call


def check_memory(engine: Engine, count: int, seed: int) -> None:
    """Compare the time of trainings that are new with that of one that is done again.

    Raises ValidationFailed if the one that is done again takes less than REMEMBERED of it, after
    all PAUSES.
    """
    trials = Trials(engine, count, seed)
    fresh, repeated = math.inf, math.inf
    for _ in rounds():
        new = [trials.new(trials.steps)() for _ in range(trials.tries)]
        same = trials.new(trials.steps)
        same()
        again = [same() for _ in range(trials.tries)]
        fresh, repeated = min(fresh, *new), min(repeated, *again)
        if repeated > REMEMBERED * fresh or fresh - repeated < REMEMBERED_SECONDS:
            return
    raise failure(
        engine,
        f"it remembers: a training that was done before takes {1e3 * repeated:.3g} ms, a new one "
        f"{1e3 * fresh:.3g} ms",
    )


def check_late_steps(engine: Engine, count: int, seed: int) -> None:
    """Compare the time of a step in the second half of a long call with that of an earlier one.

    Raises ValidationFailed if it is less than HURRIED of it, after all PAUSES.
    """
    trials = Trials(engine, count, seed)
    quarter = trials.steps // 4
    if quarter < 2:
        return
    shortest = {1: math.inf, 2: math.inf, 4: math.inf}  # by quarters of a call
    for _ in rounds():
        for _ in range(trials.tries):
            for quarters in shortest:
                seconds = trials.new(quarters * quarter)()
                shortest[quarters] = min(shortest[quarters], seconds)
        second_quarter, second_half = shortest[2] - shortest[1], shortest[4] - shortest[2]
        early, late = second_quarter / quarter, second_half / (2 * quarter)
        if late > HURRIED * early or second_quarter < SHORTEST:
            return
    raise failure(
        engine,
        f"it hurries at the end: steps {2 * quarter + 1} to {4 * quarter} of a call take "
        f"{1e6 * max(late, 0.0):.3g} us each, steps {quarter + 1} to {2 * quarter} "
        f"{1e6 * early:.3g} us",
    )


def check_at_rest(engine: Engine, count: int, seed: int) -> None:
    """Look for work that is left when `train` has returned: on processors and in the weights.

    Raises ValidationFailed.
    """
    trials = Trials(engine, count, seed)
    call = trials.new(trials.steps)
    start(engine, seed)
    engine.train_epoch(Shuffle(count, seed, 1))
    left = engine.parameters
    remote = cast(RemoteEngine, engine)
    time.sleep(REST)
    if not np.array_equal(left, engine.parameters, equal_nan=True):
        raise failure(engine, "its weights still change when train has returned")
    if remote.worker.target.kind == "cuda":
        check_gpu_at_rest(remote, count, seed, call())
    worker = remote.worker
    if (cores := sorted(_busy_cores(worker) for _ in range(3))[1]) > BUSY:
        raise failure(
            engine, f"it keeps {cores:.1f} cores busy while nothing is asked of it: work ahead?"
        )


def _busy_cores(worker: Worker) -> float:
    """Cores that the process keeps busy while nothing is asked of it.

    They count in units of what a loop in this process gets of a core in the same time, which is
    less than a whole one where other processes run too.
    """
    busy, had, ends = worker.busy_seconds(), time.thread_time(), time.perf_counter() + REST
    while time.perf_counter() < ends:
        pass
    return (worker.busy_seconds() - busy) / max(time.thread_time() - had, LEAST_SHARE * REST)


def check_gpu_at_rest(engine: RemoteEngine, count: int, seed: int, usual: float) -> None:
    """Wait for the GPU after `train` has returned: an honest stage has waited already."""
    idle, waited = math.inf, math.inf
    for _ in rounds():
        for epoch in range(1, 4):
            engine.train_epoch(Shuffle(count, seed, epoch))
            waited = min(waited, seconds_of(engine.synchronize))
            idle = min(idle, seconds_of(engine.synchronize))
        if waited - idle <= max(GPU_LEFT, 0.25 * usual):
            return
    raise failure(
        engine,
        "train returns while the GPU is at work: waiting for it takes "
        f"{1e3 * (waited - idle):.3g} ms",
    )


def check_clock(engine: Engine) -> None:
    """Compare the clocks of the stage's process with this one's. Raises ValidationFailed."""
    worker = cast(RemoteEngine, engine).worker

    def look() -> tuple[float, list[float], float]:
        before = time.perf_counter()
        clocks = cast(list[float], worker.ask("clocks").head["clocks"])
        return before, clocks, time.perf_counter()

    def read() -> tuple[float, list[float], float]:
        return min((look() for _ in range(5)), key=lambda each: each[2] - each[0])

    first = read()
    # The clocks were read somewhere between the judge's readings before and after; where a busy
    # machine left much time between these two, more has to pass from the first to the second.
    for seconds in (CLOCK_SECONDS, 4 * CLOCK_SECONDS, 16 * CLOCK_SECONDS):
        time.sleep(seconds)
        second = read()
        least, most = second[0] - first[2], second[2] - first[0]
        if most <= (1 + CLOCK) * least:
            break
    names = ("time.perf_counter", "time.monotonic", "time.time")
    for name, began, ended in zip(names, first[1], second[1], strict=True):
        passed = ended - began
        if not least * (1 - CLOCK) <= passed <= most * (1 + CLOCK):
            raise failure(
                engine,
                f"in its process {name} runs {passed / least:.2g} times as fast as the judge's "
                "clock",
            )


def rounds() -> Iterator[None]:
    """The rounds of tries that compare times, each after its pause."""
    for pause in PAUSES:
        time.sleep(pause)
        yield


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
