"""The comparisons of times, on a clock that only the tried engine and a busy machine move."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from cnnlib.engine import Engine
from cnnlib.engine.shuffle import Shuffle
from cnnlib.judging import remote, tricks
from cnnlib.validation.verdicts import ValidationFailed

BATCH, COUNT = 8, 8 * 400
STEP = 1e-3  # seconds of an honest step


class Clock:
    """What the checks take for the module `time`; sleeping takes no time of the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Timed:
    """An engine that trains nothing: its calls last as long as `seconds` says."""

    def __init__(self, clock: Clock, seconds: Callable[["Timed", int], float]) -> None:
        self.clock, self.seconds = clock, seconds
        self.setup = SimpleNamespace(batch_size=BATCH)
        self.stage = SimpleNamespace(name="timed")
        self.network = SimpleNamespace(name="none", initial_parameters=self._drawn)
        self.parameters = self.velocity = np.zeros(3, np.float32)
        self.seen: set[bytes] = set()

    def _drawn(self, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).random(3, np.float32)

    def rates_of(self, steps: int, rates: None) -> np.ndarray:
        return np.full(steps, 0.1, np.float32)

    def train(self, order: np.ndarray, rates: np.ndarray) -> float:
        self.clock.now += self.seconds(self, len(order) // BATCH)
        self.seen.add(self.parameters.tobytes())
        return 0.0


def honest(engine: Timed, steps: int) -> float:
    return steps * STEP


def hurried(engine: Timed, steps: int) -> float:
    return min(steps, 200) * STEP


def remembering(engine: Timed, steps: int) -> float:
    return 1e-3 if engine.parameters.tobytes() in engine.seen else steps * STEP


class Busy:
    """An honest engine on a machine that adds half a second to some calls of `steps` steps."""

    def __init__(self, calls: int, steps: int) -> None:
        self.calls, self.steps, self.count = calls, steps, 0

    def __call__(self, engine: Timed, steps: int) -> float:
        self.count += 1
        disturbed = self.count <= self.calls and steps == self.steps
        return steps * STEP + (0.5 if disturbed else 0.0)


class OnGPU:
    """An engine that leaves work to a GPU; each wait for it is delayed as the machine is busy."""

    def __init__(self, clock: Clock, left: float, delays: list[float]) -> None:
        self.clock, self.left, self.delays = clock, left, delays
        self.stage = self.network = SimpleNamespace(name="on a GPU")
        self.pending = 0.0

    def train_epoch(self, shuffle: Shuffle) -> None:
        self.pending = self.left

    def synchronize(self) -> None:
        self.clock.now += self.pending + 1e-4 + (self.delays.pop() if self.delays else 0.0)
        self.pending = 0.0


CHECKS = {"memory": tricks.check_memory, "late steps": tricks.check_late_steps}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tricks, "time", clock)
    return clock


@pytest.mark.parametrize("check", CHECKS)
def test_an_honest_engine_passes_in_one_round(clock: Clock, check: str) -> None:
    engine = Timed(clock, honest)
    CHECKS[check](cast(Engine, engine), COUNT, 1)
    assert clock.now < 3 * 7 * 400 * STEP


@pytest.mark.parametrize(
    ("check", "seconds", "says"),
    [
        ("late steps", hurried, "steps 201 to 400 of a call take 0 us each, steps 101 to 200 1e"),
        ("memory", remembering, "a training that was done before takes 1 ms, a new one 400 ms"),
    ],
)
def test_a_dishonest_engine_fails(
    clock: Clock, check: str, seconds: Callable[[Timed, int], float], says: str
) -> None:
    with pytest.raises(ValidationFailed, match=says):
        CHECKS[check](cast(Engine, Timed(clock, seconds)), COUNT, 1)
    assert clock.now > sum(tricks.PAUSES)


def test_what_ends_in_a_while_is_no_reason_to_reject(clock: Clock) -> None:
    # Each call of half the length is disturbed for three rounds, and no other one.
    busy = Busy(calls=3 * 3 * tricks.LEAST_TRIES, steps=200)
    tricks.check_late_steps(cast(Engine, Timed(clock, busy)), COUNT, 1)
    assert busy.count > busy.calls


def test_work_that_is_left_to_a_gpu(clock: Clock) -> None:
    busy = OnGPU(clock, left=0.0, delays=6 * [0.02])
    tricks.check_gpu_at_rest(cast(remote.RemoteEngine, busy), COUNT, 1, usual=0.0)
    leaves = OnGPU(clock, left=2e-3, delays=[])
    with pytest.raises(ValidationFailed, match="waiting for it takes 2 ms"):
        tricks.check_gpu_at_rest(cast(remote.RemoteEngine, leaves), COUNT, 1, usual=0.0)
