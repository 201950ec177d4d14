"""The learning curve is that of the timed training, at numbers of steps that double."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from cnnlib.config import Config
from cnnlib.datasets import Dataset, load, prepare
from cnnlib.device import Device
from cnnlib.engine import Engine, Stage
from cnnlib.errors import ConfigError
from cnnlib.layers import softmax
from cnnlib.measuring.learning_curve import (
    learning_curve,
    pauses,
    pictures,
    watched_images,
)
from cnnlib.stages import fused, gemm, naive
from cnnlib.training.loop import start, train_epochs
from cnnlib.training.target import Target, open_engine, setup_of
from tests.support.toys import SETTINGS, toy_config, toy_data

pytestmark = pytest.mark.quick

COUNT, BATCH, EPOCHS = 88, 8, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_data(tmp_path_factory.mktemp("toy"))[1]


def opened(stage: Stage, data: Dataset, device: Device | None = None, rate: float = 0.1):
    config: Config = toy_config(training={"learning_rate": rate})
    network = config.network("small", "toy", "a test")
    setup = setup_of(config, network, data, BATCH)
    return open_engine(stage, setup, Target("somewhere", "cpu", device), data)


def curve(engine: Engine, data: Dataset, **options):
    settings = dict(seed=3, epochs=EPOCHS, test_images=20) | options
    return learning_curve(engine, data, watched_images(data, []), **settings)


def test_pauses_double_and_hold_the_end_of_every_epoch() -> None:
    assert pauses(steps=11, epochs=2) == [0, 1, 2, 4, 8, 11, 16, 22]
    assert pauses(steps=1, epochs=1) == [0, 1]
    assert pauses(steps=4, epochs=1) == [0, 1, 2, 4]


@pytest.mark.parametrize("stage", [gemm.STAGE, fused.STAGE], ids=lambda stage: stage.name)
def test_it_is_the_same_training(stage: Stage, data: Dataset, device: Device) -> None:
    with opened(stage, data, device) as engine:
        points, _ = curve(engine, data)
        looked_at = engine.parameters
        start(engine, 3)
        list(train_epochs(engine, len(data.train_labels), EPOCHS, 3))
        assert np.array_equal(engine.parameters, looked_at)
    assert [point["images"] for point in points] == [
        BATCH * steps for steps in pauses(COUNT // BATCH, EPOCHS)
    ]
    assert points[0]["train_seconds"] == 0
    seconds = [point["train_seconds"] for point in points]
    assert seconds == sorted(seconds)
    assert all(point["test_images"] == 20 for point in points)


def test_exact_stages_believe_the_same(data: Dataset, device: Device) -> None:
    found, weights = [], []
    for stage in (naive.STAGE, gemm.STAGE, fused.STAGE):
        with opened(stage, data, device) as engine:
            found.append(curve(engine, data)[1])
            weights.append(engine.parameters)
    for other in weights[1:]:
        assert np.abs(other - weights[0]).max() < 1e-4
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert (one["images"], one["image_index"]) == (other["images"], other["image_index"])
            chances = [np.array(row["probabilities"].split(), float) for row in (one, other)]
            assert np.abs(chances[0] - chances[1]).max() < 1e-3


def test_beliefs_are_those_of_the_network(data: Dataset) -> None:
    with opened(gemm.STAGE, data) as engine:
        _, beliefs = curve(engine, data)
        last = beliefs[-data.classes :]
        right = softmax(engine.logits(data.test_images[[row["image_index"] for row in last]]))
    for row, chances in zip(last, right, strict=True):
        assert row["images"] == EPOCHS * COUNT
        assert row["label"] == data.test_labels[row["image_index"]]
        written = np.array(row["probabilities"].split(), float)
        assert np.abs(written - chances).max() <= 0.00005001
        assert written.sum() == pytest.approx(1, abs=1e-3)


def test_no_time_means_one_look_beyond_the_start(data: Dataset) -> None:
    with opened(gemm.STAGE, data) as engine:
        points, _ = curve(engine, data, budget_seconds=1e-9)
    assert [point["images"] for point in points] == [0, BATCH]


def test_a_training_that_diverges_ends_there(data: Dataset) -> None:
    with opened(gemm.STAGE, data, rate=1e30) as engine:
        points, beliefs = curve(engine, data)
    assert math.isnan(points[-1]["test_accuracy"])
    assert len(points) < len(pauses(COUNT // BATCH, EPOCHS))
    assert not any("nan" in row["probabilities"] for row in beliefs)


def test_softmax_of_large_logits() -> None:
    chances = softmax(np.array([[1e4, 1e4, -1e4], [0, 0, 0]]))
    assert chances == pytest.approx(np.array([[0.5, 0.5, 0], [1 / 3] * 3]))


def test_a_digit_of_each_class_and_the_hard_ones(data: Dataset) -> None:
    chosen = watched_images(data, [7, 0])
    first = [int(np.flatnonzero(data.test_labels == label)[0]) for label in range(data.classes)]
    assert chosen[: data.classes] == first
    assert set(chosen) == {*first, 0, 7}
    assert len(set(chosen)) == len(chosen)
    with pytest.raises(ConfigError, match="hard image 30 of data set 'toy' is beyond its 30 test"):
        watched_images(data, [30])


def test_pictures_are_the_images(data: Dataset) -> None:
    config = toy_config()
    spec = config.datasets["toy"].model_copy(update={"hard_images": [7]})
    config = config.model_copy(update={"datasets": {"toy": spec}})
    rows = pictures(config, "toy", data)
    assert [row["image_index"] for row in rows] == watched_images(data, [7])
    for row in rows:
        pixels = np.frombuffer(bytes.fromhex(row["pixels"]), np.uint8)
        shape = row["channels"], row["height"], row["width"]
        assert np.array_equal(pixels.reshape(shape), data.test_images[row["image_index"]])


def test_pictures_have_the_names_of_their_classes(data: Dataset) -> None:
    named = dataclasses.replace(data, class_names=("bird", "cat", "dog"))
    for found, names in ((data, {""}), (named, {"bird", "cat", "dog"})):
        assert {row["class_name"] for row in pictures(toy_config(), "toy", found)} == names


def test_validation_images_are_watched_too(tmp_path: Path) -> None:
    settings = SETTINGS["datasets"]["toy"] | {"validation": 30}
    spec = toy_config(datasets={"toy": settings}).datasets["toy"]
    prepare("toy", spec, tmp_path, tmp_path / "toy.npz")
    split = load("toy", tmp_path / "toy.npz", spec)
    assert len(split.train_labels) == 60
    with opened(gemm.STAGE, split) as engine:
        points, _ = curve(engine, split, epochs=1)
        right = engine.logits(split.validation_images).argmax(axis=1) == split.validation_labels
    assert points[-1]["validation_accuracy"] == pytest.approx(right.mean())
    assert points[-1]["images"] == 56
