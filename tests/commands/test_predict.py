"""The command `predict`: answers, doubts, and what it refuses."""

import json
import os
import re
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from cnnlib.__main__ import main
from cnnlib.commands import predict
from cnnlib.exchange.formats import load_weights
from tests.support.command_line import TRAIN, Home
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


def test_predict(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    ink = np.zeros((40, 30), np.uint8)
    ink[5:35, 10:14] = 255
    for name, picture in (("dark", ink), ("light", 255 - ink)):
        Image.fromarray(picture).save(f"{name}.png")
    said = home("predict", "--weights", "w.npz", "dark.png", "light.png")
    first, second = said.split("light.png")
    assert first.removeprefix("dark.png") == second
    digit, *shares = second.splitlines()
    numbers = [float(line.split()[1]) for line in shares]
    said_digit, doubt = re.fullmatch(
        r": (\d)( \(doubtful: \d+\.\d %; or \d: \d+\.\d %\))?", digit
    ).groups()
    assert int(said_digit) == np.argmax(numbers)
    assert (doubt is not None) == (max(numbers) < 90)
    assert sum(numbers) == pytest.approx(100, abs=0.05)
    assert len(numbers) == 3
    for line, number in zip(shares, numbers, strict=True):
        assert line.count("#") == pytest.approx(0.4 * number, abs=0.51)


def strokes(home: Home) -> None:
    """Two pictures with a stroke each, and two others that cannot be read."""
    ink = np.zeros((40, 30), np.uint8)
    ink[5:35, 10:14] = 255
    Image.fromarray(ink).save("one.png")
    Image.fromarray(255 - ink.T).save("two.webp", lossless=True)
    Image.new("L", (28, 28), 255).save("empty.png")
    (home.folder / "text.gif").write_text("hello")


def test_each_of_several_pictures_gets_its_answer_or_its_error(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    strokes(home)
    os.rename("text.gif", "two\nlines.gif")
    names = ["two\nlines.gif", "one.png", "nothing.png", "empty.png", "two.webp"]
    home.capture.readouterr()
    assert main(["predict", "--weights", "w.npz", *names]) == 2
    out, err = home.capture.readouterr()
    answers = [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert answers == ["one.png", "two.webp"]
    errors = err.splitlines()
    assert len(errors) == 3
    for line, name in zip(errors, (r"two\nlines.gif", "nothing.png", "empty.png"), strict=True):
        assert line.startswith("error: ")
        assert name in line


def test_predict_as_json(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    strokes(home)
    shown = json.loads(home("predict", "--weights", "w.npz", "--json", "one.png"))
    assert (
        main(["predict", "--json", "--weights", "w.npz", "one.png", "empty.png", "two.webp"]) == 2
    )
    first, second, third = json.loads(home.capture.readouterr().out)
    assert [first] == shown
    assert second == {
        "picture": "empty.png",
        "error": "empty.png is empty: nothing on it stands out from the background",
    }
    for name, found in (("one.png", first), ("two.webp", third)):
        shares = found["probabilities"]
        assert found["picture"] == name
        assert sum(shares) == pytest.approx(1)
        assert found["class"] == np.argmax(shares)
        assert found["probability"] == max(shares)
        assert shares[found["runner_up"]] == sorted(shares)[-2]
        assert found["doubtful"] == (max(shares) < 0.9)


def test_names_of_classes(home: Home) -> None:
    toy = toy_config().datasets["toy"].model_dump() | {"class_names": ["ant", "bee", "cow"]}
    home.write(toy_config(datasets={"toy": toy}))
    home(*TRAIN, "--epochs", "1")
    strokes(home)
    (found,) = json.loads(home("predict", "--weights", "w.npz", "--json", "one.png"))
    assert found["name"] == ["ant", "bee", "cow"][found["class"]]
    assert found["runner_up_name"] == ["ant", "bee", "cow"][found["runner_up"]]
    said = home("predict", "--weights", "w.npz", "one.png")
    assert said.startswith(f"one.png: {found['name']}")
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["ant", "bee", "cow"]
    home("convert", "w.npz", "w.onnx", "--input", "float32")
    model = onnx.load("w.onnx")
    del model.metadata_props[:]
    onnx.save(model, "foreign.onnx")
    again = home("predict", "--weights", "foreign.onnx", "--dataset", "toy", "one.png")
    assert again == said
    said = home("predict", "--weights", "w.npz", "--class-names", "x,y,zebra", "one.png")
    assert [line.split()[0] for line in said.splitlines()[1:]] == ["x", "y", "zebra"]
    said = home.fails("predict", "--weights", "w.npz", "--class-names", "x,y", "one.png")
    assert "--class-names has 2 names for 3 classes" in said


def test_weights_of_another_program(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    strokes(home)
    home("convert", "w.npz", "w.onnx", "--input", "float32")
    model = onnx.load("w.onnx")
    del model.metadata_props[:]
    onnx.save(model, "foreign.onnx")
    said = home.fails("predict", "--weights", "foreign.onnx", "one.png")
    assert "foreign.onnx does not say how images are normalised" in said
    usual, trained = home("predict", "--weights", "w.npz", "one.png"), load_weights("w.npz")
    levels = ["--mean", str(trained.mean), "--deviation", str(trained.deviation)]
    assert home("predict", "--weights", "foreign.onnx", *levels, "one.png") == usual


def test_doubt_is_shown() -> None:
    doubtful = predict.answer("a.png", [0.02, 0.61, 0.37])
    assert predict.in_words(doubtful).splitlines()[0] == (
        "a.png: 1 (doubtful: 61.0 %; or 2: 37.0 %)"
    )
    certain = predict.answer("a.png", [0.02, 0.06, 0.92])
    assert predict.in_words(certain).splitlines()[0] == "a.png: 2"
    assert not predict.answer("a.png", [1.0])["doubtful"]
    assert predict.answer("a.png", [float("nan")] * 2)["doubtful"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_weights_that_are_a_picture(home: Home, kind: str) -> None:
    strokes(home)
    Image.open("one.png").save("picture", kind)
    said = home.fails("predict", "--weights", "picture", "one.png")
    assert f"--weights picture is a {kind} picture" in said


def test_predict_refuses(home: Home) -> None:
    home(*TRAIN, "--epochs", "1")
    Image.new("L", (28, 28), 255).save("empty.png")
    (home.folder / "text.png").write_text("hello")
    for name, problem in (
        ("nothing.png", "cannot read nothing.png: No such file"),
        ("empty.png", "empty.png is empty"),
        ("text.png", "text.png is not a PNG or JPEG"),
        ("toy.npz", "toy.npz is not a PNG or JPEG"),
    ):
        assert problem in home.fails("predict", "--weights", "w.npz", name)
    whole = (home.folder / "w.npz").read_bytes()
    ink = np.zeros((28, 28), np.uint8)
    ink[5:20, 14] = 255
    Image.fromarray(ink).save("one.png")
    for content in (b"", b"hello", whole[:200], whole[:-40]):
        (home.folder / "bad.npz").write_bytes(content)
        assert "weights file bad.npz is damaged" in home.fails(
            "predict", "--weights", "bad.npz", "one.png"
        )
    assert "toy.npz is no weights file: it lacks" in home.fails(
        "predict", "--weights", "toy.npz", "one.png"
    )
    assert "cannot read weights file results/weights.npz" in home.fails("predict", "one.png")
    assert "--weights w.npz takes it for one" in home.fails("predict", "w.npz", "one.png")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("kind", "something else", "is no weights file of this version"),
        ("layers", "[{", "is damaged"),
        ("layers", "[" * 100_000, "is damaged"),
        ("layers", '[{"conv": 3}]', "is damaged.*kernel"),
        ("layers", '[{"dense": 4}]', "is damaged.*3 classes"),
        ("layers", 3, "is damaged"),
        ("input_shape", [8, 8], "is damaged"),
        ("input_shape", [-1, 8, 8], "is damaged"),
        ("input_shape", [1, 2, 2], "is damaged.*larger than the 2x2 map"),
        ("classes", [3, 3], "is damaged"),
        ("parameters", np.zeros(3, np.float32), "do not fit"),
        ("parameters", np.zeros(77), "do not fit"),
        ("parameters", np.full(77, np.nan, np.float32), "not finite"),
        ("mean", np.nan, "is damaged: its metadata.mean.*finite"),
        ("deviation", 0.0, "do not fit"),
        ("deviation", "x", "is damaged"),
        ("origin", "{", "is damaged"),
    ],
)
def test_weights_that_contradict_themselves(
    home: Home, name: str, value: Any, problem: str
) -> None:
    home(*TRAIN, "--epochs", "1")
    Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save("one.png")
    with np.load("w.npz") as saved:
        arrays = dict(saved)
    np.savez("bad.npz", **(arrays | {name: value}))
    assert re.search(problem, home.fails("predict", "--weights", "bad.npz", "one.png"))


def test_a_grey_photo_is_not_searched_for_ink(home: Home) -> None:
    """White paper has no ink; as a photo it is an image like any other."""
    home(*TRAIN)
    Image.new("L", (12, 12), 255).save(home.folder / "white.png")
    said = home("predict", "white.png", "--weights", "w.npz", code=2)
    assert "white.png is empty" in said
    assert "white.png: " in home("predict", "--photo", "white.png", "--weights", "w.npz")
