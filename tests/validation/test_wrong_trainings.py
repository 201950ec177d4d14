"""Stages that train wrongly are rejected when they are measured, whatever their engine is."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnlib.datasets import Dataset
from cnnlib.engine import Setup, Stage
from cnnlib.engine.plans import records_of
from cnnlib.measuring import run as measuring
from cnnlib.measuring.run import measure, single_steps
from cnnlib.measuring.runs import Run
from cnnlib.stages import find_stage
from cnnlib.validation.replay import Recording
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.toys import toy_config, toy_data
from tests.wrong.trainings import FAULTS, HalfAnEpoch, Wrong

STAGES = ["naive", "gemm", "fused", "tuned"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


@pytest.fixture
def measured(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Stage, type[Wrong], int], Path]:
    """Measure a stage, or the first of its plans, with a fault put over its engine."""

    def measured(stage: Stage, fault: type[Wrong], repeat: int) -> Path:
        record = next(iter(records_of(stage).values()))
        engine = type(f"{fault.__name__}In{stage.name}", (fault, record.engine), {})
        broken = dataclasses.replace(record, engine=engine)
        monkeypatch.setattr(measuring, "find_stage", lambda name, place: broken)
        settings = toy_config(
            training=fault.training,
            sweep={"device": "emulated"},
            # whole epochs, however slow the machine is
            measuring={"budget_seconds": 1000.0, "emulated_seconds": 1000.0},
        )
        return measure(settings, Run("toy", "small", stage.name, 4, repeat), data, tmp_path / "run")

    return measured


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_is_rejected(
    measured: Callable[[Stage, type[Wrong], int], Path], stage: str, fault: type[Wrong]
) -> None:
    with pytest.raises(ValidationFailed):
        measured(find_stage(stage, "test"), fault, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_the_right_twin_is_not(
    measured: Callable[[Stage, type[Wrong], int], Path], stage: str
) -> None:
    measured(find_stage(stage, "test"), Wrong, 2)


class NoCurve(HalfAnEpoch):
    """Half an epoch, and outputs that end the learning curve before the first epoch has ended."""

    epochs = 0

    def train_epoch(self, shuffle: Any, rates: Any = None) -> float:
        self.epochs += 1
        return super().train_epoch(shuffle, rates)

    def logits(self, images: Any) -> Any:
        found = super().logits(images)
        return np.full_like(found, np.nan) if self.epochs > 2 or self.evaluated > 2 else found

    @property
    def evaluated(self) -> int:
        self.looks = getattr(self, "looks", 0) + 1
        return self.looks


def test_a_curve_that_ends_early_replays_nothing(
    measured: Callable[[Stage, type[Wrong], int], Path],
) -> None:
    with pytest.raises(ValidationFailed, match="epoch 1 does not end with the weights"):
        measured(find_stage("gemm", "test"), NoCurve, 1)


class SlowToRead(Wrong):
    """Nothing is wrong, but reading the weights after a step takes longer than the step itself."""

    trained = False

    def train(self, order: Any, rates: Any = None) -> float:
        self.trained = True
        time.sleep(0.002 * (len(order) // self.size))
        return super().train(order, rates)

    @property
    def parameters(self) -> Any:
        if self.trained:
            time.sleep(0.004)
        self.trained = False
        return super().parameters

    @parameters.setter
    def parameters(self, vector: Any) -> None:
        self.trained = False
        super(SlowToRead, type(self)).parameters.fset(self, vector)  # type: ignore[attr-defined]


class PutOffSteps(SlowToRead):
    """Single steps do nothing; whoever reads the weights waits for the work of all of them."""

    pending: Any = ()

    def train(self, order: Any, rates: Any = None) -> float:
        if len(order) > self.size:
            return super().train(order, rates)
        self.pending = [*self.pending, (order, rates)]
        return 1.0

    @property
    def parameters(self) -> Any:
        todo, self.pending = self.pending, ()
        for order, rates in todo:
            for _ in range(2):
                kept = super().parameters, self.velocity
                super().train(order, rates)
                self.parameters, self.velocity = kept
            super().train(order, rates)
        return super().parameters

    @parameters.setter
    def parameters(self, vector: Any) -> None:
        self.pending = ()
        super(PutOffSteps, type(self)).parameters.fset(self, vector)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("fault", "late"), [(SlowToRead, False), (PutOffSteps, True)])
def test_steps_that_end_before_their_work(data: Dataset, fault: type[Wrong], late: bool) -> None:
    """Steps are judged together: one alone is shorter than the reading of the weights."""
    stage = find_stage("gemm", "test")
    network = toy_config().network("small", "toy", "test")
    engine = type("Engine", (fault, stage.engine), {})(stage, Setup(network, 4, 0.01))
    with engine:
        engine.load(data.train_images, data.train_labels)
        order = np.arange(len(data.train_labels) // 4 * 4)
        recording = Recording(engine)
        recording.begin()
        times = []
        for first in range(0, len(order), 4):
            began = time.perf_counter()
            engine.train(order[first : first + 4])
            times.append(time.perf_counter() - began)
        steps = single_steps("the steps", engine, order, times)
        recording.end(steps)
        if not late:
            recording.check()
            return
        with pytest.raises(ValidationFailed, match="the steps: train returns before its work"):
            recording.check()
