"""Models of ONNX as other programs write them: the layers that they become, and what is refused."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cnnlib.errors import DataError
from cnnlib.exchange.agreement import with_onnxruntime
from cnnlib.exchange.formats import load_weights
from cnnlib.exchange.found import Found
from cnnlib.exchange.onnx_import import read
from cnnlib.layers import Activation, Conv, Dense, Dropout, Layer, Subsample

RANDOM = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return (RANDOM.normal(0, 1, shape) / math.sqrt(max(1, math.prod(shape[1:])))).astype(np.float32)


def node(op: str, *inputs: str, to: str = "", **attributes: Any) -> onnx.NodeProto:
    """A node called after its output, which is `to` or else the operator in small letters."""
    target = to or op.lower()
    return helper.make_node(op, inputs, [target], target, **attributes)


def write(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    shape: Sequence[int | str] = ("N", 1, 8, 8),
    opset: int = 20,
    element: int = TensorProto.FLOAT,
) -> Path:
    """A model of these nodes from x to the last node's output."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ("N", "U"))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


def agrees(path: Path, mean: float = 33.3, deviation: float = 78.6) -> Sequence[Layer]:
    """The layers of the model, whose logits onnxruntime computes alike on random images."""
    found = read(path)
    given = (None, None) if found.mean is not None else (mean, deviation)
    weights = found.complete(None, *given)
    images = RANDOM.integers(0, 256, (9, *weights.network.input_shape), dtype=np.uint8)
    difference = with_onnxruntime(path, weights, images)
    assert difference.agrees, difference
    assert difference.same_class == 9
    return weights.network.layers


def kinds(layers: Sequence[Layer]) -> list[str]:
    return [layer.kind for layer in layers]


@pytest.mark.parametrize("batch", ["N", 2])
def test_the_network_of_pytorch_examples(tmp_path: Path, batch: int | str) -> None:
    """As torch.onnx.export writes it, for any number of images or for those that it has seen."""
    constants = {
        "conv1.weight": normal(32, 1, 3, 3),
        "conv1.bias": normal(32),
        "conv2.weight": normal(64, 32, 3, 3),
        "conv2.bias": normal(64),
        "fc1.weight": normal(128, 9216),
        "fc1.bias": normal(128),
        "fc2.weight": normal(10, 128),
        "fc2.bias": normal(10),
        "shape": np.array([-1 if batch == "N" else batch, 9216]),
    }
    plain = dict(group=1, auto_pad="NOTSET", dilations=[1, 1], kernel_shape=[3, 3])
    conv = dict(pads=[0, 0, 0, 0], strides=[1, 1], **plain)
    pool = dict(storage_order=0, ceil_mode=0, dilations=[1, 1], pads=[0] * 4, strides=[2, 2])
    gemm = dict(alpha=1.0, beta=1.0, transA=0, transB=1)
    nodes = [
        node("Conv", "x", "conv1.weight", "conv1.bias", to="a", **conv),
        node("Relu", "a", to="b"),
        node("Conv", "b", "conv2.weight", "conv2.bias", to="c", **conv),
        node("Relu", "c", to="d"),
        node("MaxPool", "d", to="e", auto_pad="NOTSET", kernel_shape=[2, 2], **pool),
        node("Reshape", "e", "shape", to="f", allowzero=1),
        node("Gemm", "f", "fc1.weight", "fc1.bias", to="g", **gemm),
        node("Relu", "g", to="h"),
        node("Gemm", "h", "fc2.weight", "fc2.bias", to="i", **gemm),
        node("LogSoftmax", "i", to="j", axis=1),
    ]
    layers = agrees(write(tmp_path / "m.onnx", nodes, constants, (batch, 1, 28, 28)))
    assert layers == (
        Conv(maps=32, kernel=3),
        Activation(function="relu"),
        Conv(maps=64, kernel=3),
        Activation(function="relu"),
        Subsample(size=2),
        Dense(units=128),
        Activation(function="relu"),
        Dense(units=10),
    )


def test_lenet5_of_an_old_exporter(tmp_path: Path) -> None:
    """With opset 13: constants as nodes, view(size(0), -1) by shapes, gelu by erf."""
    constants = {
        "w1": normal(6, 1, 5, 5),
        "b1": normal(6),
        "w2": normal(16, 6, 5, 5),
        "b2": normal(16),
        "w3": normal(10, 400),
        "b3": normal(10),
    }

    def constant(name: str, value: Any) -> onnx.NodeProto:
        return node("Constant", to=name, value=numpy_helper.from_array(np.array(value)))

    nodes = [
        node("Conv", "x", "w1", "b1", to="a", kernel_shape=[5, 5], pads=[2, 2, 2, 2]),
        node("Tanh", "a", to="b"),
        node("AveragePool", "b", to="c", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", "c", "w2", "b2", to="d", kernel_shape=[5, 5]),
        constant("root", np.float32(math.sqrt(2))),
        node("Div", "d", "root", to="e"),
        node("Erf", "e", to="f"),
        constant("one", np.float32(1)),
        node("Add", "f", "one", to="g"),
        node("Mul", "d", "g", to="h"),
        constant("half", np.float32(0.5)),
        node("Mul", "h", "half", to="i"),
        node("MaxPool", "i", to="j", kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", "j", to="k"),
        constant("zero", np.int64(0)),
        node("Gather", "k", "zero", to="l", axis=0),
        constant("axes", np.array([0])),
        node("Unsqueeze", "l", "axes", to="m"),
        constant("rest", np.array([-1])),
        node("Concat", "m", "rest", to="n", axis=0),
        node("Reshape", "j", "n", to="o"),
        node("Gemm", "o", "w3", "b3", to="p", transB=1),
        node("Softmax", "p", to="q", axis=-1),
    ]
    layers = agrees(write(tmp_path / "m.onnx", nodes, constants, ("N", 1, 28, 28), opset=13))
    assert layers == (
        Conv(maps=6, kernel=5, padding=2),
        Activation(function="tanh"),
        Subsample(size=2, method="mean"),
        Conv(maps=16, kernel=5),
        Activation(function="gelu"),
        Subsample(size=2),
        Dense(units=10),
    )


def test_a_product_and_a_sum_are_a_dense_layer(tmp_path: Path) -> None:
    constants = {"w": normal(64, 5), "b": normal(5), "t": normal(4, 5)}
    nodes = [
        node("Flatten", "x", to="a"),
        node("MatMul", "a", "w", to="b_"),
        node("Add", "b", "b_", to="c"),
        node("Identity", "c", to="d"),
        node("Transpose", "t", to="tt", perm=[1, 0]),
        node("MatMul", "d", "tt", to="e"),
    ]
    path = write(tmp_path / "m.onnx", nodes, constants)
    assert agrees(path) == (Dense(units=5), Dense(units=4))
    found = load_weights(path, mean=0.0, deviation=1.0).tensors
    np.testing.assert_array_equal(found["dense1.bias"], constants["b"])
    np.testing.assert_array_equal(found["dense2.bias"], np.zeros(4))
    np.testing.assert_array_equal(found["dense2.weight"], constants["t"])


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), None])
def test_factors_of_gemm(tmp_path: Path, transposed: int, shape: tuple[int, ...] | None) -> None:
    constants = {"w": normal(3, 64) if transposed else normal(64, 3)}
    inputs = ["a", "w"]
    if shape is not None:
        constants["b"] = np.full(shape, 0.5, np.float32)
        inputs.append("b")
    gemm = node("Gemm", *inputs, alpha=0.5, beta=2.0, transB=transposed)
    nodes = [node("Flatten", "x", to="a"), gemm]
    path = write(tmp_path / "m.onnx", nodes, constants)
    assert agrees(path) == (Dense(units=3),)
    bias = load_weights(path, mean=0.0, deviation=1.0).tensors["dense1.bias"]
    np.testing.assert_array_equal(bias, np.full(3, 0.0 if shape is None else 1.0))


def test_layers_of_maps(tmp_path: Path) -> None:
    """Strides, padding, no bias, a bias added later, pools of all kinds, dropout, a last map."""
    constants = {
        "w": normal(4, 2, 3, 5),
        "b": normal(1, 4, 1, 1),
        "w2": normal(4, 4, 1, 1),
        "ratio": np.float32(0.1),
        "rate": np.float32(2 / 3),
        "scale": np.float32(1.7159),
    }
    nodes = [
        node("Conv", "x", "w", to="a", strides=[2, 1], pads=[1, 2, 1, 2]),
        node("Add", "a", "b", to="c"),
        node("Mul", "rate", "c", to="d"),
        node("Tanh", "d", to="e"),
        node("Mul", "e", "scale", to="f"),
        node(
            "AveragePool", "f", to="g", kernel_shape=[3, 2], pads=[1, 0, 1, 0], count_include_pad=1
        ),
        node("LeakyRelu", "g", to="h"),
        node("Dropout", "h", "ratio", to="i"),
        node("Conv", "i", "w2", to="j", auto_pad="VALID"),
        node("MaxPool", "j", to="k", kernel_shape=[2, 2], strides=[1, 2], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", "k", to="l"),
        node("Sigmoid", "l", to="m"),
        node("Flatten", "m", to="n"),
    ]
    assert agrees(write(tmp_path / "m.onnx", nodes, constants, (3, 2, 9, 8))) == (
        Conv(maps=4, kernel=[3, 5], stride=[2, 1], padding=[1, 2]),
        Activation(function="scaled_tanh"),
        Subsample(size=[3, 2], stride=1, padding=[1, 0], method="mean"),
        Activation(function="leaky_relu"),
        Dropout(rate=0.1),
        Conv(maps=4, kernel=1),
        Subsample(size=2, stride=[1, 2], padding=1),
        Subsample(size=[6, 4], method="mean"),
        Activation(function="sigmoid"),
    )


def test_bytes_are_normalised_in_the_model(tmp_path: Path) -> None:
    """(x / 255 - mean) / deviation of each channel, as models do that take pictures."""
    constants = {
        "most": np.float32(255),
        "mean": np.array([0.5, 0.25], np.float32).reshape(2, 1, 1),
        "deviation": np.array([0.5, 0.125], np.float32).reshape(1, 2, 1, 1),
        "w": normal(3, 8),
    }
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT),
        node("Div", "a", "most", to="b"),
        node("Sub", "b", "mean", to="c"),
        node("Div", "c", "deviation", to="d"),
        node("Flatten", "d", to="e"),
        node("Gemm", "e", "w", to="f", transB=1),
    ]
    path = write(tmp_path / "m.onnx", nodes, constants, ("N", 2, 2, 2), element=TensorProto.UINT8)
    agrees(path)
    found = load_weights(path)
    np.testing.assert_allclose(found.mean, (127.5, 63.75), rtol=1e-6)
    np.testing.assert_allclose(found.deviation, (127.5, 31.875), rtol=1e-6)
    # ... a second time, where the caller scales bytes to 0 to 1
    nodes[2].input[0] = "x"
    floats = write(tmp_path / "f.onnx", nodes[2:], constants, (1, 2, 2, 2))
    again = load_weights(floats, mean=0.0, deviation=255.0)
    np.testing.assert_allclose(again.mean, found.mean, rtol=1e-6)
    np.testing.assert_allclose(again.deviation, found.deviation, rtol=1e-6)
    agrees(floats, 0.0, 255.0)


DENSE = [node("Flatten", "x", to="flat"), node("Gemm", "flat", "w", to="out", transB=1)]
W = {"w": np.ones((3, 64), np.float32)}


def behind(op: str, *inputs: str, **attributes: Any) -> list[onnx.NodeProto]:
    """A node on the images, and a dense layer behind it."""
    first = node(op, "x", *inputs, to="first", **attributes)
    return [first, node("Flatten", "first", to="flat"), DENSE[1]]


CAST = helper.make_node("Cast", ["x"], ["first"], "first", to=TensorProto.DOUBLE)
K = {"k": np.ones((1, 1, 3, 3), np.float32)}
POOL = {"kernel_shape": [2, 2]}


@pytest.mark.parametrize(
    ("nodes", "constants", "problem"),
    [
        (
            behind("BatchNormalization", "s", "s", "s", "s"),
            {"s": np.ones(1, np.float32)},
            "node 'first' (BatchNormalization) is no layer here; known: Add, AveragePool, Cast, ",
        ),
        (
            behind("Conv", "k", dilations=[2, 2]),
            K,
            "'first' (Conv) has dilations=(2, 2); known: (1",
        ),
        (
            behind("Conv", "k2", group=2),
            {"k2": np.ones((2, 1, 3, 3), np.float32)},
            "'first' (Conv) has group=2; known: 1",
        ),
        (
            behind("Conv", "k", auto_pad="SAME_UPPER"),
            K,
            "auto_pad=SAME_UPPER; known: NOTSET, VALID",
        ),
        (
            behind("Conv", "k", pads=[0, 0, 1, 1]),
            K,
            "has pads=[0, 0, 1, 1]; known are as many rows",
        ),
        (behind("Conv", "x"), K, "'first' (Conv) has no constant weight"),
        (
            behind("Conv", "k9"),
            {"k9": np.ones((1, 1, 9, 9), np.float32)},
            "'first' (Conv) cannot take a map of shape (1, 8, 8): a 9x9 kernel is larger than the",
        ),
        (
            behind("Conv", "k3"),
            {"k3": np.ones((1, 3, 3, 3), np.float32)},
            "'first' (Conv) has a weight of shape (1, 3, 3, 3) for a map of shape (1, 8, 8)",
        ),
        (behind("MaxPool", ceil_mode=1, **POOL), {}, "'first' (MaxPool) has ceil_mode=1; known: 0"),
        (behind("MaxPool", dilations=[1, 2], **POOL), {}, "has dilations=(1, 2); known: (1, 1)"),
        (
            behind("AveragePool", pads=[1, 1, 1, 1], **POOL),
            {},
            "'first' (AveragePool) has count_include_pad=0 and pads; known: 1",
        ),
        (behind("LeakyRelu", alpha=0.2), {}, "'first' (LeakyRelu) has alpha=0.2; known: 0.01"),
        (behind("Gelu", approximate="tanh"), {}, "has approximate=tanh; known: none"),
        (behind("Mul", "m"), {"m": np.float32(-2)}, "scales them by a number that is not positive"),
        (behind("Div", "m"), {"m": np.float32(0)}, "'first' (Div) does not normalise images"),
        (behind("Add", "x"), {}, "'first' (Add) combines two tensors; a network is one chain"),
        (behind("Softmax"), {}, "'first' (Softmax) is not the last node"),
        ([CAST, *behind("Relu")[1:]], {}, "makes numbers of type DOUBLE; known: FLOAT"),
        (behind("Flatten", axis=2), {}, "'first' (Flatten) has axis=2; known: 1"),
        (
            behind("Reshape", "s"),
            {"s": np.array([0, 8, 8])},
            "makes [0, 8, 8] of [2, 1, 8, 8]; known: [2, 64], a vector an image",
        ),
        (
            [*DENSE[:1], node("Gemm", "flat", "v", to="out")],
            {"v": np.ones((3, 64), np.float32)},
            "'out' (Gemm) has a weight of shape (64, 3), as (units, inputs), for (64,)",
        ),
        (
            [*DENSE, node("Mul", "out", "two", to="end")],
            {"two": np.float32(2)},
            "'end' (Mul) computes with a constant between layers",
        ),
        (
            [node("Relu", "x", to="a"), node("Tanh", "x", to="b"), node("Add", "a", "b", to="c")],
            {},
            "tensor 'x' is read by 'a' (Relu), 'b' (Tanh); a network is one chain of layers",
        ),
        (
            [node("Relu", "x", to="a"), node("Constant", to="out", value_float=1.0)],
            {},
            "tensor 'a' is read by none",
        ),
        (
            [helper.make_node("Relu", ["x"], ["out"], "mine", domain="com.example")],
            {},
            "node 'mine' (Relu) is no layer here",
        ),
        (
            [helper.make_node("Swoosh", ["x"], ["out"], "last")],
            {},
            "node 'last' (Swoosh) is no operator of ONNX; known here: Add, AveragePool, Cast, ",
        ),
    ],
)
def test_models_that_are_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], problem: str
) -> None:
    path = write(tmp_path / "m.onnx", nodes, W | constants)
    if "mine" in problem:
        model = onnx.load(path)
        model.opset_import.append(helper.make_opsetid("com.example", 1))
        onnx.save(model, path)
    with pytest.raises(DataError) as error:
        load_weights(path, mean=0.0, deviation=1.0)
    assert problem in str(error.value)
    assert str(error.value).startswith(f"weights file {path}: ")


@pytest.mark.parametrize(
    ("shape", "element", "problem"),
    [
        (("N", 64), TensorProto.FLOAT, "input 'x' has shape (N, 64); expected (images, channels, "),
        (("N", 1, "H", "W"), TensorProto.FLOAT, "input 'x' has shape (N, 1, H, W); expected"),
        (("N", 1, 8, 8), TensorProto.DOUBLE, "input 'x' is DOUBLE; known: UINT8, FLOAT"),
    ],
)
def test_images_of_other_kinds(
    tmp_path: Path, shape: tuple[int | str, ...], element: int, problem: str
) -> None:
    path = write(tmp_path / "m.onnx", DENSE, W, shape, element=element)
    with pytest.raises(DataError) as error:
        load_weights(path)
    assert problem in str(error.value)


def test_several_inputs_or_outputs(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", DENSE, W)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, (1,)))
    onnx.save(model, path)
    with pytest.raises(DataError, match="it has 2 inputs, x, y; a network has one"):
        load_weights(path)
    del model.graph.input[-1]
    model.graph.output.append(helper.make_tensor_value_info("flat", TensorProto.FLOAT, (1,)))
    onnx.save(model, path)
    with pytest.raises(DataError, match="it has 2 outputs, out, flat; a network has one"):
        load_weights(path)


def test_tensors_in_a_file_beside_it(tmp_path: Path) -> None:
    """As PyTorch's exporter writes them."""
    path = write(tmp_path / "m.onnx", DENSE, W)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    found = load_weights(path, mean=0.0, deviation=1.0)
    np.testing.assert_array_equal(found.tensors["dense1.weight"], W["w"])
    (tmp_path / "m.data").unlink()
    with pytest.raises(DataError, match="weights file .*m.onnx.*m.data"):
        load_weights(path, mean=0.0, deviation=1.0)


def test_a_model_of_floats_does_not_say_how_images_are_normalised(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", DENSE, W)
    found: Found = read(path)
    assert (found.mean, found.deviation, found.network.name) == (None, None, "m")
    with pytest.raises(DataError, match="does not say how images are normalised"):
        load_weights(path)
