"""Energy: training that is sustained, and a counter that moves in jumps."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from cnnlib.engine import Engine
from cnnlib.measuring import energy
from cnnlib.measuring.energy import energy_row, sustain, window_energy
from cnnlib.measuring.telemetry import Reading, TelemetryRecord


class Timed:
    """An engine whose steps take `seconds` of a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int, seconds: float) -> None:
        self.setup = SimpleNamespace(batch_size=size)
        self.now, self._seconds = 0.0, seconds
        self.calls: list[int] = []
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(energy, "time", clock)

    def train(self, order: np.ndarray, rates: np.ndarray | None = None) -> float:
        assert len(set(order.tolist())) == len(order)
        assert len(order) % self.setup.batch_size == 0
        self.calls.append(len(order))
        self.now += self._seconds * len(order) / self.setup.batch_size
        return 1.0

    train_epoch = Engine.train_epoch  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("step", "window"),
    [(0.001, 1.0), (0.3, 1.0), (5.0, 1.0)],
    ids=["many epochs", "less than an epoch", "less than a step"],
)
def test_training_is_sustained(monkeypatch: pytest.MonkeyPatch, step: float, window: float) -> None:
    engine = Timed(monkeypatch, size=8, seconds=step)
    images = sustain(engine, 100, 1, window)  # type: ignore[arg-type]
    assert images == sum(engine.calls) > 0
    assert all(call % 8 == 0 for call in engine.calls)
    # It lasts as long as requested, and at most about a part or a step longer.
    assert window <= engine.now <= window + max(0.2 * window, step)
    # Epochs that fit the window well are trained as a whole, in whole batches.
    assert (max(engine.calls) == 96) == (step == 0.001)


def test_energy_of_a_counter_that_jumps() -> None:
    times = np.arange(0, 1, 0.01)
    counter = 100.0 * np.floor(times / 0.1 + 1e-9)  # 1000 W, seen ten times a second
    assert window_energy(times, counter, 0.25, 0.75) == pytest.approx(500)
    assert window_energy(times, counter, 0.05, 0.98) == pytest.approx(930)
    assert math.isnan(window_energy(times, counter, 0.25, 0.45))
    assert math.isnan(window_energy(times, np.full(100, np.nan), 0.0, 1.0))


def test_energy_of_a_run() -> None:
    record = TelemetryRecord([(0.0, "open"), (1.0, "sustain"), (2.0, "close"), (3.0, "")])
    times = np.arange(0, 3, 0.02)
    record.readings = np.array(
        [Reading(at, power_watts=80 + 10 * at, energy_joules=300 * at) for at in times]
    )
    row = energy_row(record, 5000)
    assert row["status"] == "ok"
    assert row["images"] == 5000
    assert row["window_seconds"] == 1.0
    assert row["energy_joules"] == pytest.approx(300)
    assert row["idle_watts"] == 80
