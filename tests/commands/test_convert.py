"""The command `convert`: from each format to each, checked by other programs, whole or not."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from cnnlib.commands import convert
from cnnlib.exchange import agreement
from cnnlib.exchange.formats import load_weights
from tests.support.command_line import TRAIN, Home
from tests.support.toys import toy_config

pytestmark = pytest.mark.quick


@pytest.fixture
def trained(home: Home) -> Home:
    toy = toy_config().datasets["toy"].model_dump() | {"class_names": ["ant", "bee", "cow"]}
    home.write(toy_config(datasets={"toy": toy}))
    home(*TRAIN, "--epochs", "1")
    return home


def test_to_onnx_and_back(trained: Home) -> None:
    said = trained("convert", "w.npz", "w.onnx", "--check", "--images", "50")
    first, second = said.splitlines()
    assert first.startswith("onnxruntime ")
    assert "on 50 images the logits differ by at most" in first
    assert first.endswith("the same class for 50")
    assert second == "w.onnx: a model of ONNX, network small (77 parameters)"
    trained("convert", "w.onnx", "back.safetensors", "--check")
    trained("convert", "back.safetensors", "back.npz")
    before, after = load_weights("w.npz"), load_weights("back.npz")
    np.testing.assert_array_equal(after.parameters, before.parameters)
    for name in ("network", "mean", "deviation", "origin", "class_names", "steps"):
        assert getattr(after, name) == getattr(before, name), name
    assert before.steps == 11
    assert before.class_names == ("ant", "bee", "cow")


def test_what_a_model_takes(trained: Home) -> None:
    trained("convert", "w.npz", "bytes.onnx")
    trained("convert", "w.npz", "floats.onnx", "--input", "float32", "--opset", "20", "--check")
    for name, kind, opset in (("bytes", onnx.TensorProto.UINT8, 28), ("floats", 1, 20)):
        model = onnx.load(f"{name}.onnx")
        assert model.graph.input[0].type.tensor_type.elem_type == kind
        assert model.opset_import[0].version == opset
    said = trained.fails("convert", "w.npz", "new.onnx", "--opset", "12")
    assert "--opset is one of 20 to 28, not 12" in said
    assert "'int8'" in trained.fails("convert", "w.npz", "new.onnx", "--input", "int8")
    assert not Path("new.onnx").exists()


def test_tensors_alone(trained: Home) -> None:
    trained("convert", "w.npz", "w.safetensors")
    save_file(load_file("w.safetensors"), "bare.safetensors")
    said = trained.fails("convert", "bare.safetensors", "n.npz")
    assert "does not say of what network: name it by --network; known: small" in said
    said = trained.fails("convert", "bare.safetensors", "n.npz", "--network", "small")
    assert "does not say how images are normalised: give mean and deviation" in said
    trained("convert", "bare.safetensors", "n.npz", "--network", "small", "--dataset", "toy")
    before, after = load_weights("w.npz"), load_weights("n.npz")
    np.testing.assert_array_equal(after.parameters, before.parameters)
    assert (after.mean, after.deviation) == (before.mean, before.deviation)
    assert after.class_names == before.class_names
    options = ["--network", "small", "--mean", "1", "--deviation", "2.5"]
    trained("convert", "bare.safetensors", "n.npz", *options)
    assert (load_weights("n.npz").mean, load_weights("n.npz").deviation) == (1.0, 2.5)


def test_nothing_is_written_unless_programs_agree(
    trained: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained("convert", "w.npz", "w.onnx")
    before = Path("w.onnx").read_bytes()
    right = agreement.own_logits
    monkeypatch.setattr(agreement, "own_logits", lambda *given: right(*given) * 1.001)
    said = trained("convert", "w.npz", "w.onnx", "--check", code=1)
    assert "differ by more than 3e-05 of the largest: nothing is written" in said
    assert Path("w.onnx").read_bytes() == before
    trained("convert", "w.npz", "new.onnx", "--check", code=1)
    assert trained.names() == ["config.yaml", "toy.npz", "w.npz", "w.onnx"]


def test_a_file_that_lost_something_is_noticed(
    trained: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters that are read back are compared, too."""
    trained("convert", "w.npz", "w.onnx")
    model = onnx.load("w.onnx")
    (bias,) = (each for each in model.graph.initializer if each.name == "conv1.bias")
    moved = numpy_helper.to_array(bias) + np.float32(1e-6)
    bias.CopyFrom(numpy_helper.from_array(moved, bias.name))
    onnx.save(model, "other.onnx")
    weights = load_weights("w.npz")
    images = convert.noise(weights.network.input_shape, 5)
    assert len(convert.differences([Path("w.onnx")], weights, images)) == 1
    with pytest.raises(Exception, match=r"other.onnx does not hold the parameters"):
        convert.differences([Path("other.onnx")], weights, images)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("w.h5", "w.h5: weights are in files that end in one of .safetensors, .npz, .onnx, .pt"),
        ("config.yaml/w.npz", "cannot write config.yaml/w.npz"),
    ],
)
def test_targets_that_are_refused(trained: Home, target: str, problem: str) -> None:
    assert problem in trained.fails("convert", "w.npz", target)
    assert trained.names() == ["config.yaml", "toy.npz", "w.npz"]


def test_without_the_libraries(trained: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are optional: one line names the one that is missing, and nothing is written."""
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    said = trained.fails("convert", "w.npz", "w.pt")
    assert "a file of torch.save needs PyTorch, which is not installed (pip install" in said
    said = trained.fails("convert", "w.npz", "w.safetensors", "--check")
    assert "the check by PyTorch needs PyTorch, which is not installed" in said
    said = trained.fails("evaluate", "--weights", "w.pt", "--network", "small")
    assert "weights file w.pt needs PyTorch, which is not installed" in said
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    assert "package onnx, which is not" in trained.fails("convert", "w.npz", "w.onnx")
    assert trained.names() == ["config.yaml", "toy.npz", "w.npz"]


def test_pytorch(trained: Home) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    said = trained("convert", "w.npz", "w.pt", "--check")
    assert said.startswith("PyTorch ")
    state = torch.load("w.pt", weights_only=True)
    assert list(state) == ["conv1.weight", "conv1.bias", "dense1.weight", "dense1.bias"]
    trained("convert", "w.pt", "n.npz", "--network", "small", "--dataset", "toy")
    np.testing.assert_array_equal(
        load_weights("n.npz").parameters, load_weights("w.npz").parameters
    )
    torch.save({"epoch": 3, "model_state_dict": state}, "checkpoint.pth")
    found = json.loads(
        trained("evaluate", "--weights", "checkpoint.pth", "--network", "small", "--json")
    )
    assert found == json.loads(trained("evaluate", "--weights", "w.npz", "--json")) | {
        "weights": "checkpoint.pth"
    }
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    said = trained.fails("evaluate", "--weights", "module.pt", "--network", "small")
    assert "module.pt holds more than tensors, which could run code when it is read" in said
