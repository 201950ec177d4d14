"""What the checks of whole trainings accept and reject; tests/wrong/trainings.py has the faults."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnlib.datasets import Dataset, noise
from cnnlib.engine import Engine, Setup
from cnnlib.layers import Array
from cnnlib.measuring.run import measure
from cnnlib.measuring.runs import Run
from cnnlib.network import Network
from cnnlib.stages import gemm, naive
from cnnlib.training.loop import start
from cnnlib.training.target import open_target, setup_of
from cnnlib.validation.replay import Recording, lengths, recorded_epochs, unlike
from cnnlib.validation.steps import check_real_steps, check_steps
from cnnlib.validation.trajectory import check_training
from cnnlib.validation.verdicts import Unjudged, ValidationFailed
from tests.support.networks import build, lenet5
from tests.support.toys import toy_config, toy_data
from tests.wrong.trainings import (
    FirstBatchAgain,
    HalfAnEpoch,
    NoUpdateAfterSevenSteps,
    StaleGradient,
    Wrong,
)

NETWORK = build(
    "small",
    (1, 8, 8),
    3,
    [{"conv": {"maps": 2, "kernel": 3}}, {"activation": "relu"}, {"subsample": 2}, {"dense": 3}],
)


def engine_of(network: Network, batch_size: int, **settings: Any) -> tuple[Engine, Dataset]:
    data = noise("noise", network.input_shape, network.classes, 5 * batch_size + 3)
    chosen = dict(learning_rate=0.1, mean=data.mean, deviation=data.deviation) | settings
    engine = gemm.STAGE.engine(gemm.STAGE, Setup(network, batch_size, **chosen))
    engine.load(data.train_images, data.train_labels)
    start(engine, 1)
    return engine, data


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64, 300])
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9}, {"momentum": 0.5, "warmup": 0.3}, {"learning_rate": 1e-5}],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_right_steps_pass(batch_size: int, settings: dict[str, Any]) -> None:
    engine, data = engine_of(NETWORK, batch_size, **settings)
    with engine:
        images, labels = data.train_images, data.train_labels
        assert check_steps(engine, images, labels) < 0.5
        check_real_steps(engine, images, labels)


@pytest.mark.parametrize("position", ["first", "last", "between"])
def test_one_image_of_a_large_batch_is_missed(
    position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in which one loud image is replaced, in a batch of 2000."""
    engine, data = engine_of(lenet5(), 2000)
    whole = engine.train

    def without(order: Array, rates: Array | None = None) -> float:
        order = np.array(order)
        loud = np.flatnonzero(data.train_labels[order] != sure_of(data, order))
        at = {"first": loud[0], "last": loud[-1], "between": loud[len(loud) // 2]}[position]
        silent = np.flatnonzero(data.train_labels[order] == sure_of(data, order))
        order[at] = order[silent[0]]
        return whole(order, rates)

    def sure_of(data: Dataset, order: Array) -> int:
        return int(np.bincount(data.train_labels[order]).argmax())

    with engine:
        check_steps(engine, data.train_images, data.train_labels)
        monkeypatch.setattr(engine, "train", without)
        start(engine, 1)
        with pytest.raises(ValidationFailed, match="after 3 steps of one call|loss of 3 steps"):
            check_steps(engine, data.train_images, data.train_labels)


def test_steps_too_small_to_see_are_unjudged() -> None:
    engine, data = engine_of(NETWORK, 64, learning_rate=1e-12)
    with engine, pytest.raises(Unjudged, match=r"a larger training\.learning_rate can be judged"):
        check_steps(engine, data.train_images, data.train_labels)


def test_a_training_that_diverges_is_not_called_wrong() -> None:
    engine, data = engine_of(NETWORK, 8, learning_rate=1e30)
    with engine, np.errstate(all="ignore"):
        check_steps(engine, data.train_images, data.train_labels)
        start(engine, 1)
        check_real_steps(engine, data.train_images, data.train_labels)


def test_a_network_whose_outputs_are_bounded() -> None:
    """Biases cannot make it sure of a class; images are compared all the same."""
    network = build(
        "bounded",
        (1, 8, 8),
        3,
        [
            {"conv": {"maps": 2, "kernel": 3}},
            {"activation": "tanh"},
            {"dense": 3},
            {"activation": "tanh"},
        ],
    )
    engine, data = engine_of(network, 16, momentum=0.5)
    with engine:
        assert check_steps(engine, data.train_images, data.train_labels) < 0.5


def test_all_labels_alike() -> None:
    engine, data = engine_of(NETWORK, 16)
    alike = np.ones_like(data.train_labels)
    with engine:
        engine.load(data.train_images, alike)
        check_steps(engine, data.train_images, alike)


def test_a_replay_pauses_at_doubling_numbers() -> None:
    assert lengths(0) == [0, 0]
    assert lengths(1) == [0, 1]
    assert lengths(2) == [0, 1, 2]
    assert lengths(11) == [0, 1, 2, 4, 8, 11]


def test_a_replay_of_another_training_does_not_match() -> None:
    engine, data = engine_of(NETWORK, 8)
    with engine:
        recording = Recording(engine)
        for _ in recorded_epochs(recording, len(data.train_labels), 2, seed=1):
            pass
        recording.check()
        changed = recording.calls[1].after.parameters.copy()
        changed[-1] = np.nextafter(changed[-1], np.float32(9))
        after = dataclasses.replace(recording.calls[1].after, parameters=changed)
        recording.calls[1] = dataclasses.replace(recording.calls[1], after=after)
        with pytest.raises(ValidationFailed, match=r"epoch 2 does not end with the weights"):
            recording.check()


# Stages whose bits do not repeat ------------------------------------------------------------------


class Restless(gemm.STAGE.engine):  # type: ignore[misc, name-defined]
    """Rounding errors of its own in every call, and the losses of its steps."""

    random = np.random.default_rng(5)

    def train(self, order: Array, rates: Array | None = None) -> float:
        size = self.setup.batch_size
        due = self.rates_of(len(order) // size, rates)
        losses = []
        for step, rate in enumerate(due):
            part = order[step * size : (step + 1) * size]
            losses.append(super().train(part, np.array([rate])))
            vector = self.parameters
            self.parameters = vector * (1 + 1e-7 * self.random.standard_normal(len(vector)))
        self.step_losses = np.array(losses)
        return float(np.mean(losses))


RESTLESS = dataclasses.replace(gemm.STAGE, engine=Restless, repeatable=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


def check(stage: Any, data: Dataset) -> None:
    config = toy_config()
    network = config.network("small", "toy", "test")
    with open_target(stage) as target:
        check_training(stage, setup_of(config, network, data, 4), target, data, seed=1)


def test_a_stage_that_does_not_repeat_is_compared_by_its_losses(data: Dataset) -> None:
    check(RESTLESS, data)


def test_one_that_claims_to_repeat_is_found_out(data: Dataset) -> None:
    with pytest.raises(ValidationFailed, match="a stage whose sums have no fixed order says so"):
        check(dataclasses.replace(RESTLESS, repeatable=True), data)


def test_one_without_losses_of_its_steps_cannot_be_compared(data: Dataset) -> None:
    with pytest.raises(ValidationFailed, match="its engine has to give step_losses"):
        check(dataclasses.replace(gemm.STAGE, repeatable=False), data)


@pytest.mark.parametrize(
    "fault", [HalfAnEpoch, FirstBatchAgain, NoUpdateAfterSevenSteps, StaleGradient]
)
def test_faults_show_in_losses_too(data: Dataset, fault: type[Wrong]) -> None:
    engine = type("Broken", (fault, Restless), {})
    with pytest.raises(ValidationFailed):
        check(dataclasses.replace(RESTLESS, engine=engine), data)


def losses_of(steps: int, seed: int, apart: float) -> Array:
    """Losses of honest trainings that fall while batches are easy and hard; `seed` is the part."""
    hard = np.random.default_rng(0).normal(1, 0.25, steps).clip(0.2)
    noise = np.random.default_rng(seed).normal(0, apart, steps)
    noise[: max(8, steps // 8)] = 0
    return np.asarray((0.2 + 2 * np.exp(-np.arange(steps) / 40)) * hard + noise)


@pytest.mark.parametrize("steps", [3, 14, 60, 900])
def test_losses_of_honest_trainings_are_alike(steps: int) -> None:
    assert unlike(losses_of(steps, 1, 0.02), losses_of(steps, 2, 0.02)) == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda right: right[:-1], "took 899 steps, not 900"),
        (lambda right: np.roll(right, 1), "first 8 steps"),
        (lambda right: np.r_[right[:200], np.roll(right[200:], 1)], "rise and fall"),
        (lambda right: np.r_[right[:200], np.full(700, right[200])], "rise and fall"),
        (lambda right: np.r_[right[:450], right[450:] + 0.035], "the mean loss is"),
        (lambda right: np.where(np.arange(900) < 500, right, math.nan), "it diverges"),
    ],
)
def test_losses_of_other_trainings_are_not(change: Any, why: str) -> None:
    assert why in unlike(change(losses_of(900, 1, 0.02)), losses_of(900, 2, 0.02))


# Runs in full -------------------------------------------------------------------------------------


def test_a_long_run_is_replayed_in_its_first_and_last_part(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that end within steps, which is where checkpoints may be."""
    replayed = []
    original = Recording._replay

    def replay(self: Recording, call: Any) -> Any:
        timed = call.timed
        if timed.by_units:
            replayed.append((timed.what, timed.done, len(timed.order())))
        return original(self, call)

    monkeypatch.setattr(Recording, "_replay", replay)
    monkeypatch.setattr("cnnlib.training.loop.CHUNK_SECONDS", 0.01)
    config = toy_config(
        measuring={"budget_seconds": 1e-6, "full": True},
        sweep={"stages": ["naive"]},
    )
    run = Run("toy", "small", naive.STAGE.name, 8, 2)
    measure(config, run, data, tmp_path / "run", checkpoints=tmp_path / "checkpoints")
    assert [what for what, _, _ in replayed] == ["a part of epoch 1", "a part of epoch 2"]
    assert replayed[0][1] == 0
    assert 1 <= replayed[0][2] < 88
    assert replayed[1][1] + replayed[1][2] == 88
