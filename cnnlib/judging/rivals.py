"""The stage against the best shipped stage and the best peer: epochs timed in turn.

Each repeat opens every stage once, in a process of its own, warms it up and times one epoch in an
order that the process could not know before. The clock is the judge's. It runs until the weights
have been read, less the time that reading them takes by itself, so that work left for the reader
counts. Ratios are taken within a repeat; their interval is a bootstrap over the repeats.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import Engine, KernelTime, Stage
from cnnlib.engine.shuffle import Shuffle
from cnnlib.errors import DeviceError, Unsupported, UserError, one_line
from cnnlib.judging.remote import StageFailed, Worker
from cnnlib.judging.tricks import JudgedRecording, seconds_of
from cnnlib.measuring.run import warm_up
from cnnlib.network import Network
from cnnlib.peers import PEERS
from cnnlib.stages import LADDER
from cnnlib.training.loop import start
from cnnlib.training.target import open_engine, setup_of
from cnnlib.validation.replay import TimedCall, whole_batches
from cnnlib.validation.trajectory import check_after, check_before

EPOCH_SECONDS = 1.0
"""About how long an epoch of the judged stage takes; it has fewer images where all take longer."""
LEAST_STEPS = 8
RESAMPLES = 4000
LEVEL = 0.95
PINGS = 50

Say = Callable[[str], None]
Role = Literal["judged", "stage", "peer"]


@dataclass(frozen=True)
class Arm:
    """One of the stages that are timed in turn."""

    name: str
    """The name of a shipped stage or a peer, or the judged stage as it was given."""
    role: Role
    device: str
    """The choice of sweep.device for it."""
    shown: str = ""
    """What tables and messages call it, where that is not `name`."""

    def __str__(self) -> str:
        return self.shown or self.name


@dataclass(frozen=True)
class Timing:
    """One epoch of one arm."""

    arm: Arm
    repeat: int
    seconds: float
    images: int
    loss: float
    device: str


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the judged stage is as another one, with a bootstrap interval."""

    other: Arm
    factor: float
    low: float
    high: float


class Course:
    """What all arms train: network, batch size, and a data set that may have been shortened."""

    def __init__(self, config: Config, network: Network, dataset: Dataset, batch_size: int) -> None:
        self.config, self.network = config, network
        self.dataset, self.batch_size = dataset, batch_size
        self.limit = config.measuring.limit_seconds

    @property
    def count(self) -> int:
        return len(self.dataset.train_labels)

    def worker(self, arm: Arm) -> Worker:
        return Worker(arm.name, arm.device, limit=self.limit)

    def open(self, worker: Worker, stage: Stage) -> AbstractContextManager[Engine]:
        setup = setup_of(self.config, self.network, self.dataset, self.batch_size)
        return open_engine(stage, setup, worker.target, self.dataset)


def candidates(kind: str, known: Collection[str]) -> list[Arm]:
    """Shipped stages and peers on the same kind of device as the judged stage, but for `known`.

    Times of emulated kernels are not comparable with those of a library, so that there are no peers
    then. Stage 1, which takes hours, is no rival.
    """
    runs_on = "cpu" if kind == "cpu" else "cuda"
    device = "cuda" if kind == "cuda" else "emulated"
    stages = [Arm(s.name, "stage", device) for s in LADDER if s.runs_on == runs_on]
    peers = [] if kind == "emulated" else [Arm(s.name, "peer", device) for s in PEERS]
    return [arm for arm in (*stages, *peers) if arm.name not in (*known, "naive")]


def quickest(
    course: Course, arms: Iterable[Arm], seed: int, say: Say
) -> tuple[list[Arm], dict[str, list[str]]]:
    """The fastest stage and the fastest peer in one short trial each, and why which are out."""
    found: dict[Role, tuple[float, Arm]] = {}
    out: dict[str, list[str]] = {}
    for arm in arms:
        try:
            with course.worker(arm) as worker, course.open(worker, worker.stage) as engine:
                start(engine, seed)
                each = warm_up(course.config, engine, course.dataset, seed)
        except (Unsupported, DeviceError, StageFailed) as error:
            why = one_line(error).removeprefix(f"stage '{arm.name}' ")
            out.setdefault(why, []).append(arm.name)
            continue
        say(f"  {arm.name}: {1e6 * each:.3g} us an image")
        if arm.role not in found or each < found[arm.role][0]:
            found[arm.role] = each, arm
    return [arm for _, arm in found.values()], out


@dataclass
class Race:
    """What timing in turn has given so far."""

    timings: list[Timing]
    profile: list[KernelTime]
    """The judged stage's, of the first repeat."""
    failures: dict[str, str]
    """Why an arm other than the judged one dropped out."""

    def times(self, arm: Arm) -> list[float]:
        return [each.seconds for each in self.timings if each.arm == arm]


def run(
    course: Course, arms: Sequence[Arm], repeats: int, seed: Callable[[], int], race: Race, say: Say
) -> None:
    """Time one epoch of every arm in every repeat; `race` is filled as it goes.

    The judged stage's epochs are replayed afterwards. Raises ValidationFailed, StageFailed and the
    like for the judged stage; another one that fails drops out.
    """
    for repeat in range(1, repeats + 1):
        # each comes first, in the middle and last about equally often
        turn = repeat % len(arms)
        said = []
        for arm in (*arms[turn:], *arms[:turn]):
            if arm.name in race.failures:
                continue
            try:
                timing = _one(course, arm, repeat, seed(), race)
            except UserError as error:
                if arm.role == "judged":
                    raise
                race.failures[arm.name] = one_line(error)
                continue
            race.timings.append(timing)
            said.append(f"{arm} {1e3 * timing.seconds:.4g} ms")
        say(f"  repeat {repeat} of {repeats}: {', '.join(said)}")


def _one(course: Course, arm: Arm, repeat: int, seed: int, race: Race) -> Timing:
    with course.worker(arm) as worker, course.open(worker, worker.stage) as engine:
        start(engine, seed)
        if arm.role == "judged":
            data = course.dataset
            check_before(engine, data.train_images, data.train_labels, seed)
            start(engine, seed)
        warm_up(course.config, engine, course.dataset, seed)
        start(engine, seed)
        shuffle = Shuffle(course.count, seed, 1)
        steps = course.count // course.batch_size
        rates = engine.setup.schedule.rates(1, 1, steps)
        empty = statistics.median(seconds_of(lambda: worker.ask("nothing")) for _ in range(PINGS))
        usual = min(seconds_of(lambda: engine.parameters) for _ in range(3))
        recording = JudgedRecording(engine)
        recording.begin()
        began = time.perf_counter()
        loss = engine.train_epoch(shuffle, rates)
        seconds = time.perf_counter() - began - empty
        timed = TimedCall(
            "the timed epoch",
            lambda: whole_batches(shuffle, course.batch_size),
            rates,
            loss=loss,
            seconds=seconds,
            epoch=1,
            again=lambda: engine.train_epoch(shuffle, rates),
        )
        recording.end(timed)
        late = recording.calls[-1].late
        reading = seconds * late / (1 - late)
        seconds += max(0.0, reading - 3 * usual)  # parameters, velocity and what is unfinished
        if arm.role == "judged":
            check_after(recording, data.train_images, data.train_labels, seed)
            if not race.profile:
                race.profile = engine.profile()
                recording.unchanged("a profile")
        return Timing(arm, repeat, seconds, steps * course.batch_size, loss, worker.target.name)


def ratio(race: Race, judged: Arm, other: Arm, seed: int = 1) -> Ratio | None:
    """Median over the repeats of the other's time over the judged one's, with its interval."""
    own = {each.repeat: each.seconds for each in race.timings if each.arm == judged}
    theirs = {each.repeat: each.seconds for each in race.timings if each.arm == other}
    both = sorted(own.keys() & theirs.keys())
    if not both:
        return None
    factors = np.array([theirs[repeat] / own[repeat] for repeat in both])
    random = np.random.default_rng(seed)
    drawn = np.median(random.choice(factors, (RESAMPLES, len(factors))), axis=1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if len(both) == 1:
        low = high = np.nan
    return Ratio(other, float(np.median(factors)), float(low), float(high))
