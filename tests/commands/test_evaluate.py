"""The command `evaluate`: what it counts, and what it refuses."""

import json
import re

import numpy as np
import pytest

from cnnlib.datasets import load
from cnnlib.exchange.agreement import own_logits
from cnnlib.exchange.formats import load_weights, save_weights
from tests.support.command_line import TRAIN, Home
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick

NAMES = {"class_names": ["ant", "bee", "cow"]}


def named(home: Home) -> None:
    """Give the classes of the toy data set names, and train on it for an epoch."""
    toy = toy_config().datasets["toy"].model_dump() | NAMES
    home.write(toy_config(datasets={"toy": toy}))
    home(*TRAIN, "--epochs", "1")


def test_evaluate(home: Home) -> None:
    named(home)
    said = home("evaluate", "--weights", "w.npz", "--data", "toy.npz")
    found = json.loads(home("evaluate", "--weights", "w.npz", "--data", "toy.npz", "--json"))
    data = load("toy", "toy.npz", home.config.datasets["toy"])
    logits = own_logits(load_weights("w.npz"), data.test_images).astype(np.float64)
    right = logits.argmax(axis=1) == data.test_labels
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    losses = -np.log(shares[np.arange(30), data.test_labels])
    assert found["images"] == 30
    assert found["accuracy"] == pytest.approx(right.mean())
    assert found["loss"] == pytest.approx(losses.mean())
    for label, (each, name) in enumerate(zip(found["classes"], NAMES["class_names"], strict=True)):
        ours = right[data.test_labels == label]
        assert each == {
            "class": label,
            "name": name,
            "images": len(ours),
            "accuracy": pytest.approx(ours.mean()),
        }
        assert re.search(rf"(?m)^{name} +{len(ours)} +{100 * ours.mean():.2f} %$", said)
    assert said.startswith("w.npz on 30 test images of toy, by stage gemm\n")
    assert f"accuracy {100 * right.mean():.2f} %, {(~right).sum()} wrong\n" in said
    assert f"loss {losses.mean():.4f}\n" in said


@pytest.mark.parametrize("stage", ["naive", "gemm"])
def test_every_stage_finds_the_same(home: Home, stage: str) -> None:
    named(home)
    usual = json.loads(home("evaluate", "--weights", "w.npz", "--json"))
    found = json.loads(home("evaluate", "--weights", "w.npz", "--json", "--stage", stage))
    assert found["stage"] == stage
    assert found["accuracy"] == usual["accuracy"]
    assert found["loss"] == pytest.approx(usual["loss"])


def test_given_images(home: Home) -> None:
    named(home)
    data = load("toy", "toy.npz", home.config.datasets["toy"])
    labels = np.full(len(data.test_labels), 1)
    np.savez("mine.npz", images=data.test_images[:, 0], labels=labels)
    found = json.loads(home("evaluate", "--weights", "w.npz", "--images", "mine.npz", "--json"))
    logits = own_logits(load_weights("w.npz"), data.test_images)
    assert found["accuracy"] == pytest.approx((logits.argmax(axis=1) == 1).mean())
    assert found["classes"][0]["accuracy"] is None
    assert found["classes"][1]["name"] == "bee"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"labels": None}, "mine.npz is no file of images: it lacks labels"),
        ({"images": np.zeros((4, 9, 9), np.uint8)}, "images are uint8 of shape (1, 9, 9) each"),
        ({"images": np.zeros((4, 8, 8))}, "images are float64 of shape (1, 8, 8) each, expected"),
        ({"labels": np.zeros(3, np.uint8)}, "labels are uint8 of shape (3,), expected whole"),
        (
            {"labels": np.zeros(4)},
            "labels are float64 of shape (4,), expected whole numbers",
        ),
        ({"labels": np.array([0, 1, 3, 0])}, "label 3 of image 2 is not below 3, the number"),
        ({"labels": np.array([0, -1, 2, 0])}, "label -1 of image 1 is not below 3, the number"),
        (
            {"images": np.zeros((0, 8, 8), np.uint8), "labels": np.zeros(0, np.uint8)},
            "mine.npz holds no images",
        ),
    ],
)
def test_images_that_do_not_suit(
    home: Home, changes: dict[str, np.ndarray | None], problem: str
) -> None:
    home(*TRAIN, "--epochs", "1")
    arrays = {"images": np.zeros((4, 8, 8), np.uint8), "labels": np.zeros(4, np.uint8)} | changes
    np.savez("mine.npz", **{k: v for k, v in arrays.items() if v is not None})
    assert problem in home.fails("evaluate", "--weights", "w.npz", "--images", "mine.npz")


def test_weights_that_do_not_suit(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    other = toy_config().datasets["toy"].model_dump() | {"classes": 2}
    wide = [{"dense": 2}]
    home.write(
        toy_config(
            datasets={"toy": toy_config().datasets["toy"].model_dump(), "two": other},
            networks={"wide": wide},
        )
    )
    said = home.fails("evaluate", "--weights", "w.npz", "--dataset", "two")
    assert "is for images of shape (1, 8, 8) in 3 classes, but those of data set 'two'" in said
    said = home.fails("evaluate", "--weights", "w.npz", "--network", "nothing")
    assert "unknown network 'nothing' in --network; known: small, wide" in said
    said = home.fails("evaluate", "--weights", "w.npz", "--mean", "3", "--deviation", "1")
    assert "--mean 3.0: weights file w.npz says itself that images are normalised by mean" in said
    assert "--mean is a number" in home.fails("evaluate", "--weights", "w.npz", "--mean", "a,b")
    assert "cannot read weights file none.npz" in home.fails("evaluate", "--weights", "none.npz")


def test_logits_that_are_not_finite(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    trained = load_weights("w.npz")
    trained.parameters[:] = 1e30
    save_weights("w.npz", trained)
    assert "w.npz computes logits that are not finite" in home(
        "evaluate", "--weights", "w.npz", code=1
    )
