"""The time that a run may take, and what is extrapolated from a part of it."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.engine import Stage
from cnnlib.measuring import budgets
from cnnlib.measuring import run as measuring
from cnnlib.measuring.run import measure
from cnnlib.stages import naive
from tests.support.runs import COUNT, all_tables, run, tables
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


def test_a_part_of_the_batch_learns_nothing(data: Dataset, folder: Path) -> None:
    """Stage 1 that is timed on 4 of 8 images has made no step of the real training."""
    config = toy_config(
        training={"epochs": 1000}, measuring={"budget_seconds": 0.05, "budget_images": 4}
    )
    found = all_tables(measure(config, run("naive"), data, folder))
    assert found["epochs"].extrapolated.all()
    assert not found["kernels"].extrapolated.any()
    assert not len(found["learning"])


def test_beyond_the_budget_it_is_scaled(data: Dataset, folder: Path) -> None:
    config = toy_config(
        training={"epochs": 1000}, measuring={"budget_seconds": 0.05, "budget_images": 4}
    )
    measure(config, run("naive", batch_size=16), data, folder)
    epochs, steps, facts = tables(folder)
    assert epochs.extrapolated.all()
    assert steps.extrapolated.all()
    assert epochs.validated.all()
    assert len(epochs) == len(steps) >= 1
    assert set(epochs.images) == {4}  # stage 1 trains on a part of the batch
    assert epochs.test_accuracy.isna().all()
    np.testing.assert_allclose(epochs.epoch_seconds, steps.step_seconds * (COUNT // 16))
    assert facts["status"] == "ok"


def test_kernels_compiled_for_the_cpu_have_a_budget_of_their_own(
    data: Dataset, tmp_path: Path
) -> None:
    """Emulated runs are scaled like stage 1; what the network has learned by then is recorded."""
    config = toy_config(
        training={"epochs": 5000},
        measuring={"emulated_seconds": 0.05},
        sweep={"device": "emulated"},
    )
    found = all_tables(measure(config, run("gemm_cuda"), data, tmp_path / "gemm_cuda"))
    assert set(found["epochs"].device_kind) == {"emulated"}
    assert found["epochs"].extrapolated.all()
    assert found["epochs"].validated.all()
    assert (found["learning"].train_seconds < 0.05).sum() == len(found["learning"]) - 1
    assert not found["learning"].extrapolated.any()
    assert set(found["predictions"].images) == set(found["learning"].images)
    assert found["learning"].images.max() >= 8

    # The curve is drawn at one batch size, which is the sweep's here.
    other = all_tables(measure(config, run("gemm_cuda", 16), data, tmp_path / "other"))
    assert other["epochs"].extrapolated.all()
    assert not len(other["learning"])
    assert not len(other["predictions"])

    config = toy_config(measuring={"emulated_seconds": 1e-6})
    epochs, _, _ = tables(measure(config, run("gemm"), data, tmp_path / "gemm"))
    assert set(epochs.device_kind) == {"cpu"}
    assert not epochs.extrapolated.any()


@pytest.mark.parametrize(
    ("kind", "changes", "seconds"),
    [
        ("cpu", {}, 20.0),
        ("cuda", {}, 20.0),
        ("emulated", {}, 3.0),
        ("emulated", {"budget_seconds": 2.0}, 2.0),
        ("emulated", {"full": True}, math.inf),
        ("cpu", {"full": True}, math.inf),
    ],
)
def test_the_budget_of_a_run(kind: str, changes: dict[str, Any], seconds: float) -> None:
    assert budgets.epochs_budget(toy_config(measuring=changes), kind) == seconds


@pytest.mark.parametrize(
    ("kind", "batch_size", "extrapolated", "seconds"),
    [
        ("cpu", 8, False, math.inf),
        ("emulated", 8, False, math.inf),
        ("emulated", 8, True, 3.0),
        ("cuda", 8, True, 5.0),
        ("cpu", 8, True, 20.0),  # at the batch size of the sweep, which is drawn
        ("cpu", 16, True, 5.0),
    ],
)
def test_the_budget_of_a_learning_curve(
    kind: str, batch_size: int, extrapolated: bool, seconds: float
) -> None:
    found = budgets.learning_budget(toy_config(), batch_size, kind, extrapolated=extrapolated)
    assert found == seconds


class Steady(naive.OneByOne):
    """An engine that takes 2 ms per image and 4 ms per update, by a clock of its own."""

    now: ClassVar[float] = 0.0

    def train(self, order: np.ndarray, rates: np.ndarray | None = None) -> float:
        Steady.now += 0.002 * len(order) + 0.004
        return super().train(order, rates)

    def time_update(self) -> float:
        return 0.004


def test_scaled_times_are_right(
    data: Dataset,
    folder: Path,
    install: Callable[[Stage], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Timed on 4 images, 16 images take four times as long, except for the single update."""
    install(dataclasses.replace(naive.STAGE, engine=Steady))
    clock = SimpleNamespace(perf_counter=lambda: Steady.now)
    monkeypatch.setattr(measuring, "time", clock)
    monkeypatch.setattr(measuring, "_CLOCK", clock.perf_counter)
    config = toy_config(training={"epochs": 1000}, measuring={"budget_seconds": 0.05})
    measure(config, run(batch_size=16), data, folder)
    epochs, steps, _ = tables(folder)
    expected = 16 * 0.002 + 0.004
    assert list(steps.step_seconds) == pytest.approx([expected] * len(steps))
    assert list(epochs.epoch_seconds) == pytest.approx([5 * expected] * len(steps))


def test_in_full_nothing_is_scaled(data: Dataset, folder: Path) -> None:
    config = toy_config(measuring={"budget_seconds": 1e-6, "full": True})
    measure(config, run("naive"), data, folder)
    epochs, _, _ = tables(folder)
    assert not epochs.extrapolated.any()
    assert list(epochs.images) == [88, 88]


def test_a_part_of_a_batch_is_said_to_be_one(data: Dataset, folder: Path) -> None:
    config = toy_config(
        training={"epochs": 1000}, measuring={"budget_seconds": 0.05, "budget_images": 4}
    )
    facts = tables(measure(config, run("naive"), data, folder))[2]
    assert facts["engine_batch_size"] == 4
    assert facts["run"]["batch_size"] == 8


def test_settled_is_about_the_median() -> None:
    assert not measuring.is_settled([1.0] * 4)
    assert measuring.is_settled([1.0] * 5)
    assert not measuring.is_settled([1.0, 2.0, 1.0, 2.0, 1.0])
