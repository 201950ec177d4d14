"""One measurement: what is timed, and the rows that it leaves."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.engine import Order, Stage
from cnnlib.engine.cpu import MicroBatchEngine
from cnnlib.layers import Dense
from cnnlib.measuring.run import measure
from cnnlib.stages import gemm, naive
from cnnlib.training.loop import epoch_order
from tests.support.runs import COUNT, all_tables, run, tables
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("stage", ["naive", "gemm"])
def test_whole_epochs(data: Dataset, folder: Path, stage: str) -> None:
    assert measure(toy_config(), run(stage, repeat=2), data, folder) == folder
    epochs, steps, facts = tables(folder)
    assert list(epochs.epoch) == [1, 2]
    assert list(epochs.images) == [88, 88]
    assert list(steps.step) == [1, 2, 3]
    for table in (epochs, steps):
        assert set(table.dataset) == {"toy"}
        assert set(table.network) == {"small"}
        assert set(table.stage) == {stage}
        assert set(table.batch_size) == {8}
        assert set(table.seed) == {2}
        assert set(table.repeat) == {2}
        assert set(table.status) == {"ok"}
        assert set(table.device_kind) == {"cpu"}
        assert table.validated.all()
        assert not table.extrapolated.any()
    assert (epochs.epoch_seconds > 0).all()
    assert (steps.step_seconds > 0).all()
    assert epochs.event_seconds.isna().all()
    assert epochs.test_accuracy.between(0, 1).all()
    assert epochs.loss[1] < epochs.loss[0]
    assert facts["status"] == "ok"
    assert facts["seed"] == 2
    assert facts["run"]["stage"] == stage
    assert len(facts["plan"]) >= 1
    assert (facts["epoch_images"], facts["dropped_images"]) == (88, 2)
    assert "numpy" in facts["libraries"]


def test_what_is_recorded_off_the_clock(data: Dataset, folder: Path) -> None:
    found = all_tables(measure(toy_config(), run(), data, folder))
    kernels = found["kernels"]
    assert {"forward", "backward", "loss", "update"} <= set(kernels.part)
    assert (kernels.kernel_seconds > 0).all()
    samples = found["samples"]
    assert list(samples["sample"]) == list(range(1, len(samples) + 1))
    assert samples.time_seconds.is_monotonic_increasing
    assert (samples.host_memory_mib > 1).any()
    phases = {"open", "validate", "warm_up", "train", "evaluate", "profile", "learn"}
    assert set(samples.phase) <= phases  # so short a run need not show all of them
    assert len(samples)
    assert len(found["energy"]) == 1
    learning, predictions = found["learning"], found["predictions"]
    assert learning.images[0] == 0
    assert learning.images.iloc[-1] == 2 * 88
    assert learning.train_seconds.is_monotonic_increasing
    assert set(predictions.images) == set(learning.images)
    assert len(predictions) == len(learning) * predictions.image_index.nunique()
    # The curve ends where the timed epochs did, because it is the same training.
    epochs = found["epochs"]
    assert learning.test_images.iloc[-1] == len(data.test_labels)
    assert learning.test_accuracy.iloc[-1] == epochs.test_accuracy.iloc[-1]


def test_a_curve_is_recorded_once(data: Dataset, folder: Path) -> None:
    found = all_tables(measure(toy_config(), run(repeat=2), data, folder))
    assert not len(found["learning"])
    assert not len(found["predictions"])
    assert len(found["kernels"])


def test_all_stages_see_the_same_training(data: Dataset, tmp_path: Path) -> None:
    """This also holds where stage 1 could be timed on a part of a batch."""
    config = toy_config(measuring={"budget_images": 2})
    losses = []
    for stage in ("naive", "gemm"):
        epochs, _, _ = tables(measure(config, run(stage, batch_size=16), data, tmp_path / stage))
        assert not epochs.extrapolated.any()
        assert list(epochs.images) == [80, 80]
        losses.append(epochs.loss)
    np.testing.assert_allclose(*losses, rtol=1e-4)


class OrderRecorder(naive.OneByOne):
    """An engine that records the orders it was given."""

    asked: ClassVar[list[np.ndarray]] = []

    def train(self, order: np.ndarray, rates: np.ndarray | None = None) -> float:
        self.asked.append(order)
        return super().train(order, rates)


def test_the_order_is_that_of_the_seed(
    data: Dataset, folder: Path, install: Callable[[Stage], None]
) -> None:
    OrderRecorder.asked = []
    install(dataclasses.replace(naive.STAGE, engine=OrderRecorder))
    measure(toy_config(), run(repeat=3), data, folder)
    whole = [order for order in OrderRecorder.asked if len(order) == COUNT // 8 * 8]
    for epoch in (1, 2):
        expected = epoch_order(COUNT, 3, epoch)[: COUNT // 8 * 8]
        assert any((order == expected).all() for order in whole)


class Doubled(gemm.MatrixDense):
    """An operator that only the engine knows about."""


def test_the_plan_is_that_of_the_engine_that_ran(
    data: Dataset, folder: Path, install: Callable[[Stage], None]
) -> None:
    class Other(MicroBatchEngine):
        def __init__(self, stage: Stage, *arguments: Any) -> None:
            operators = {**stage.operators, (Dense,): Doubled}
            super().__init__(dataclasses.replace(stage, operators=operators), *arguments)

    install(dataclasses.replace(gemm.STAGE, engine=Other))
    facts = tables(measure(toy_config(), run(), data, folder))[2]
    assert facts["engine"] == "Other"
    assert facts["plan"][-1] == "dense1: Doubled"
    assert facts["plan"][0] == "conv1: MatrixConv"


class EveryLoss(MicroBatchEngine):
    """An engine that gives the loss of every step of a call, as those of other libraries do."""

    def train(self, order: Order, rates: Any = None) -> float:
        size = self.setup.batch_size
        steps = len(order) // size
        due = self.rates_of(steps, rates)
        losses = [
            super(EveryLoss, self).train(order[i * size : (i + 1) * size], due[i : i + 1])
            for i in range(steps)
        ]
        self.step_losses = np.array(losses)
        return float(np.mean(losses))


@pytest.mark.parametrize(
    ("measuring", "count"),
    [
        ({"latency_steps": 3}, 3),
        ({"budget_seconds": 1e-6, "sample_seconds": 0.2}, 11),
        ({"budget_seconds": 1e-6, "full": True, "latency_steps": 3}, 3),
    ],
    ids=["epochs", "blocks", "checkpoints"],
)
def test_stages_whose_bits_do_not_repeat_are_compared_by_every_step(
    data: Dataset,
    folder: Path,
    install: Callable[[Stage], None],
    measuring: dict[str, Any],
    count: int,
) -> None:
    install(dataclasses.replace(gemm.STAGE, engine=EveryLoss, repeatable=False))
    config = toy_config(measuring=measuring)
    epochs, steps, _ = tables(measure(config, run(), data, folder, checkpoints=folder / "saved"))
    assert set(epochs.status) == {"ok"}
    assert epochs.validated.all()
    assert 1 < len(steps) <= count
