"""The race: every seed is timed, a stage that cannot run gets one row, and a table sums it up."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cnnlib import peers, stages
from cnnlib.config import Config
from cnnlib.datasets import Dataset
from cnnlib.engine import Stage
from cnnlib.errors import ConfigError, DoesNotFit, Unsupported
from cnnlib.measuring import race, schema
from cnnlib.measuring.race import run_race
from cnnlib.stages import naive
from cnnlib.training.loop import accuracy, start, train_epochs
from cnnlib.training.target import open_engine, open_target, setup_of
from cnnlib.validation.verdicts import Unjudged
from tests.support.toys import SETTINGS, parse_experiment, toy_data
from workflow.glue import modules

pytestmark = pytest.mark.quick

RACE: dict[str, Any] = {
    "dataset": "toy",
    "network": "small",
    "stages": ["naive"],
    "batch_size": 6,
    "training": {"learning_rate": 0.2, "momentum": 0.5, "schedule": "one_cycle", "epochs": 2},
    "seeds": 3,
    "target": 0.8,
}


def racing(**changes: Any) -> Config:
    return parse_experiment({**SETTINGS, "race": RACE | changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("data"))[1]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stage], None]:
    return lambda stage: monkeypatch.setattr(race, "find_stage", lambda name, place: stage)


def summary(path: Path) -> pd.DataFrame:
    table = modules.load("tables", "race_summary")
    made: pd.DataFrame = table.make({"race": schema.read(path, "race")})
    return made


@pytest.mark.slow
def test_every_seed_is_trained_by_the_recipe(data: Dataset, tmp_path: Path) -> None:
    config = racing()
    run_race(config, "naive", data, tmp_path / "race.csv")
    rows = schema.read(tmp_path / "race.csv", "race")
    assert list(rows["seed"]) == [1, 1, 2, 2, 3, 3]
    assert list(rows["epoch"]) == [1, 2] * 3
    assert rows["validated"].all()
    assert set(rows["status"]) == {"ok"}
    assert set(rows["target_accuracy"]) == {0.8}
    times = rows["train_seconds"].to_numpy().reshape(3, 2)
    assert (times[:, 0] > 0).all()
    assert (times[:, 1] > times[:, 0]).all()
    # These are the results of the race's recipe, not of the config's training.
    recipe = config.model_copy(update={"training": config.race and config.race.training})
    network = config.network("small", "toy", "here")
    with (
        open_target(naive.STAGE) as target,
        open_engine(naive.STAGE, setup_of(recipe, network, data, 6), target, data) as engine,
    ):
        assert engine.setup.warmup == 0.2
        for seed in (1, 2, 3):
            start(engine, seed)
            losses = [done.loss for done in train_epochs(engine, 90, 2, seed)]
            found = rows[rows["seed"] == seed]
            np.testing.assert_allclose(found["loss"], losses, rtol=1e-12)
            right = accuracy(engine, data.test_images, data.test_labels)
            assert found["test_accuracy"].iloc[-1] == right


def test_the_summary_is_that_of_the_last_epoch(tmp_path: Path) -> None:
    rows = [
        {
            "dataset": "toy",
            "network": "small",
            "stage": "naive",
            "device": "a cpu",
            "batch_size": 6,
            "seed": seed,
            "repeat": seed,
            "epoch": epoch,
            "images": 90,
            "train_seconds": seconds * epoch,
            "loss": 1.0,
            "test_accuracy": right * epoch / 2,
            "target_accuracy": 0.8,
            "device_kind": "cpu",
            "status": "ok",
            "validated": True,
            "extrapolated": False,
        }
        for seed, (seconds, right) in enumerate([(1.0, 0.7), (2.0, 0.8), (3.0, 0.9)], 1)
        for epoch in (1, 2)
    ]
    schema.write(tmp_path / "race.csv", "race", rows)
    (line,) = summary(tmp_path / "race.csv").itertuples()
    assert (line.n, line.epochs) == (3, 2)
    assert line.accuracy_mean == pytest.approx(0.8)
    assert line.accuracy_sd == pytest.approx(0.1)
    # Student's t for two degrees of freedom at 97.5 %: 4.3027
    assert line.accuracy_low == pytest.approx(0.8 - 4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    assert line.accuracy_high == pytest.approx(0.8 + 4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    seconds = (line.train_seconds_mean, line.train_seconds_min, line.train_seconds_max)
    assert seconds == pytest.approx((4.0, 2.0, 6.0))
    text = modules.load("tables", "race_summary").markdown(summary(tmp_path / "race.csv"))
    assert "80.000 % (55.159 to 104.841)" in text
    assert "80 %: reached" in text


class Refused(naive.OneByOne):
    problem: Exception

    def load(self, images: np.ndarray, labels: np.ndarray) -> None:
        raise self.problem


@pytest.mark.parametrize(
    ("problem", "status"),
    [
        (DoesNotFit("too large"), "does_not_fit"),
        (MemoryError(), "does_not_fit"),
        (Unsupported("not here"), "unavailable"),
        (Unjudged("not by anybody"), "unjudged"),
    ],
)
def test_what_cannot_run_is_one_row(
    data: Dataset,
    tmp_path: Path,
    install: Callable[[Stage], None],
    problem: Exception,
    status: str,
) -> None:
    engine = type("Engine", (Refused,), {"problem": problem})
    install(dataclasses.replace(naive.STAGE, engine=engine))
    run_race(racing(), "naive", data, tmp_path / "race.csv")
    rows = schema.read(tmp_path / "race.csv", "race")
    assert list(rows["status"]) == [status]
    assert list(rows["reason"]) == [str(problem) or "out of memory"]
    assert not rows["validated"].any()
    (line,) = summary(tmp_path / "race.csv").itertuples()
    assert (line.n, line.status) == (0, status)
    below = modules.load("tables", "race_summary").footnotes({"race": rows})
    assert f": {rows['reason'][0]}\n" in below


class Wrong(naive.OneByOne):
    def gradient(self, images: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = super().gradient(images, labels)
        return loss, 2 * gradient


def test_a_wrong_stage_does_not_run(
    data: Dataset, tmp_path: Path, install: Callable[[Stage], None]
) -> None:
    install(dataclasses.replace(naive.STAGE, engine=Wrong))
    run_race(racing(), "naive", data, tmp_path / "race.csv")
    assert list(schema.read(tmp_path / "race.csv", "race")["status"]) == ["failed"]


class Raising(naive.OneByOne):
    def update(self, gradient: np.ndarray, rate: float) -> None:
        raise RuntimeError("a stage of a user")


def test_a_stage_that_raises_has_failed(
    data: Dataset,
    tmp_path: Path,
    install: Callable[[Stage], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    install(dataclasses.replace(naive.STAGE, engine=Raising))
    run_race(racing(), "naive", data, tmp_path / "race.csv")
    assert list(schema.read(tmp_path / "race.csv", "race")["status"]) == ["failed"]
    assert "a stage of a user" in capfd.readouterr().err


def test_a_training_that_diverges_says_so(data: Dataset, tmp_path: Path) -> None:
    wild = RACE["training"] | {"learning_rate": 1e200}
    run_race(racing(training=wild), "naive", data, tmp_path / "race.csv")
    rows = schema.read(tmp_path / "race.csv", "race")
    assert set(rows["status"]) == {"diverged"}
    assert summary(tmp_path / "race.csv")["n"].iloc[0] == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"stages": ["fuzed"]}, r"unknown stage 'fuzed' in race\.stages; known: "),
        ({"network": "big"}, r"unknown network 'big' in race\.network; known: small"),
        ({"dataset": "toys"}, r"unknown data set 'toys' in race\.(network|dataset); known: toy"),
        ({"batch_size": 91}, r"race\.batch_size 91 is larger than data set 'toy' \(90 "),
        ({"seeds": 0}, r"race\.seeds: .*greater than 0"),
        ({"goal": 0.9}, r"unknown key 'goal' in config\.race; known: .*target"),
    ],
)
def test_a_bad_race_is_named(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        racing(**changes)


def test_without_a_race_there_is_none(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no section race"):
        run_race(parse_experiment(SETTINGS), "naive", data, tmp_path / "race.csv")


def test_peers_may_take_part() -> None:
    names = [stage.name for stage in (*stages.LADDER, *peers.PEERS)]
    assert racing(stages=names).race is not None
