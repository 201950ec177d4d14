"""Every layer kind by hand-worked examples and by finite differences."""

import math
import re

import numpy as np
import pytest

from cnnlib.engine import Setup
from cnnlib.layers import FUNCTIONS, Activation, Conv, Dense, Subsample, cross_entropy, softmax
from cnnlib.paths import KERNELS
from cnnlib.stages import naive
from cnnlib.validation.reference import FAST_REFERENCE
from cnnlib.validation.spot_checks import finite_differences
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.networks import build

pytestmark = pytest.mark.quick

MAP = np.arange(16.0).reshape(1, 4, 4)


def test_conv_by_hand():
    parameters = {"weight": np.array([[[[1.0, 2.0], [3.0, 4.0]]]]), "bias": np.array([100.0])}
    target = Conv(maps=1, kernel=2).forward(parameters, MAP)
    # 1 * 0 + 2 * 1 + 3 * 4 + 4 * 5 = 34, and 10 more for every step to the right
    assert target.tolist() == [[[134, 144, 154], [174, 184, 194], [214, 224, 234]]]


def test_conv_adds_up_channels_and_keeps_maps_apart():
    weight = np.zeros((2, 3, 1, 1))
    weight[0, :, 0, 0] = 1, 10, 100
    weight[1, 1, 0, 0] = -1
    source = np.stack([np.full((2, 2), value) for value in (1.0, 2.0, 3.0)])
    target = Conv(maps=2, kernel=1).forward({"weight": weight, "bias": np.zeros(2)}, source)
    assert target.tolist() == [[[321, 321], [321, 321]], [[-2, -2], [-2, -2]]]


def test_conv_stride_leaves_out_overhanging_windows():
    layer = Conv(maps=1, kernel=2, stride=2)
    source = np.arange(25.0).reshape(1, 5, 5)
    parameters = {"weight": np.array([[[[1.0, 0.0], [0.0, 0.0]]]]), "bias": np.zeros(1)}
    assert layer.output_shape(source.shape) == (1, 2, 2)
    assert layer.forward(parameters, source).tolist() == [[[0, 2], [10, 12]]]


def test_conv_backward_by_hand():
    layer = Conv(maps=1, kernel=2, stride=2)
    weight = np.array([[[[1.0, 2.0], [3.0, 4.0]]]])
    parameters = {"weight": weight, "bias": np.zeros(1)}
    error = np.array([[[1.0, 0.0], [0.0, 10.0]]])
    target = layer.forward(parameters, MAP)
    source_error, gradients = layer.backward(parameters, MAP, target, error)
    assert source_error.tolist() == [
        [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 10, 20], [0, 0, 30, 40]],
    ]
    assert gradients["weight"].tolist() == [[[[100, 111], [144, 155]]]]
    assert gradients["bias"].tolist() == [11]


def test_subsample_max_by_hand():
    layer = Subsample(size=2)
    target = layer.forward({}, MAP)
    assert target.tolist() == [[[5, 7], [13, 15]]]
    source_error, _ = layer.backward({}, MAP, target, np.array([[[1.0, 2.0], [3.0, 4.0]]]))
    assert source_error.tolist() == [
        [[0, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 0], [0, 3, 0, 4]],
    ]


@pytest.mark.parametrize(
    ("window", "winner"),
    [
        ([[1, 1], [1, 1]], (0, 0)),
        ([[0, 1], [1, 1]], (0, 1)),
        ([[0, 0], [1, 1]], (1, 0)),
        ([[0, 1], [1, 0]], (0, 1)),
    ],
)
def test_first_of_equals_in_reading_order_wins(window, winner):
    source = np.array([window], dtype=float)
    layer = Subsample(size=2)
    source_error, _ = layer.backward({}, source, layer.forward({}, source), np.array([[[7.0]]]))
    assert source_error[0][winner] == 7
    assert source_error.sum() == 7


def test_subsample_mean_by_hand():
    layer = Subsample(size=2, method="mean")
    target = layer.forward({}, MAP)
    assert target.tolist() == [[[2.5, 4.5], [10.5, 12.5]]]
    source_error, _ = layer.backward({}, MAP, target, np.full((1, 2, 2), 4.0))
    assert source_error.tolist() == np.ones((1, 4, 4)).tolist()


def test_dense_reads_maps_in_c_order():
    weight = np.arange(24.0).reshape(2, 12)
    source = np.arange(12.0).reshape(3, 2, 2)
    parameters = {"weight": weight, "bias": np.array([0.5, 0.25])}
    layer = Dense(units=2)
    target = layer.forward(parameters, source)
    assert target.tolist() == [506.5, 506.25 + 12 * 66]
    error = np.array([1.0, 10.0])
    source_error, gradients = layer.backward(parameters, source, target, error)
    assert source_error.tolist() == (weight[0] + 10 * weight[1]).reshape(3, 2, 2).tolist()
    assert gradients["weight"].tolist() == np.outer(error, np.arange(12.0)).tolist()
    assert gradients["bias"].tolist() == [1, 10]


@pytest.mark.parametrize(
    ("function", "values"),
    [
        ("relu", [0, 0, 3]),
        ("tanh", [math.tanh(-2), 0, math.tanh(3)]),
        ("sigmoid", [1 / (1 + math.exp(2)), 0.5, 1 / (1 + math.exp(-3))]),
    ],
)
def test_activation_values(function, values):
    target = Activation(function=function).forward({}, np.array([-2.0, 0.0, 3.0]))
    assert target == pytest.approx(values, rel=1e-14)


def test_relu_has_no_slope_at_zero():
    source = np.array([-1.0, 0.0, 1.0])
    layer = Activation(function="relu")
    source_error, _ = layer.backward({}, source, layer.forward({}, source), np.full(3, 5.0))
    assert source_error.tolist() == [0, 0, 5]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activation_passes_nan_on(function):
    assert math.isnan(Activation(function=function).forward({}, np.array([np.nan]))[0])


def test_the_kernels_have_the_same_activation_functions_in_the_same_order():
    text = (KERNELS / "layers.cuh").read_text(encoding="utf-8")
    names = re.findall(r"^ +ENTRY\((\w+),", text, re.MULTILINE)
    assert names == [name.upper() for name in FUNCTIONS]


def test_sigmoid_does_not_overflow():
    target = Activation(function="sigmoid").forward({}, np.array([-1e4, 1e4]))
    assert target.tolist() == [0, 1]


def test_softmax_and_cross_entropy_by_hand():
    logits = np.log(np.array([1.0, 2.0, 5.0]))
    assert softmax(logits) == pytest.approx([0.125, 0.25, 0.625])
    loss, error = cross_entropy(logits, 1)
    assert loss == pytest.approx(math.log(4))
    assert error == pytest.approx([0.125, -0.75, 0.625])


def test_cross_entropy_of_a_hopeless_guess_is_finite():
    loss, error = cross_entropy(np.array([1000.0, -1000.0]), 1)
    assert loss == 2000
    assert error.tolist() == [1, -1]


# Each network has parameters below the layer in question, so that the layer's source error counts.
DIFFERENCES = {
    "conv": [{"conv": {"maps": 2, "kernel": 3}}, {"conv": {"maps": 3, "kernel": 2}}, {"dense": 3}],
    "conv stride 2": [
        {"conv": {"maps": 2, "kernel": 2}},
        {"conv": {"maps": 3, "kernel": 3, "stride": 2}},
        {"dense": 3},
    ],
    "conv stride 3, kernel 2": [
        {"conv": {"maps": 2, "kernel": 2}},
        {"conv": {"maps": 2, "kernel": 2, "stride": 3}},
        {"dense": 3},
    ],
    "conv of one element": [
        {"conv": {"maps": 2, "kernel": 1}},
        {"conv": {"maps": 3, "kernel": 6}},
        {"dense": 3},
    ],
    "dense": [{"dense": 4}, {"dense": 5}, {"dense": 3}],
    "subsample max": [{"conv": {"maps": 2, "kernel": 3}}, {"subsample": 2}, {"dense": 3}],
    "subsample mean": [
        {"conv": {"maps": 2, "kernel": 3}},
        {"subsample": {"size": 4, "method": "mean"}},
        {"dense": 3},
    ],
    "subsample by 3": [
        {"conv": {"maps": 2, "kernel": 1}},
        {"subsample": {"size": 3, "method": "max"}},
        {"dense": 3},
    ],
    "subsample first": [{"subsample": 2}, {"dense": 3}],
    "activation first and last": [{"activation": "tanh"}, {"dense": 3}, {"activation": "sigmoid"}],
    "conv last": [{"conv": {"maps": 3, "kernel": 6}}],
    **{
        f"{function} on maps and units": [
            {"conv": {"maps": 2, "kernel": 3}},
            {"activation": function},
            {"dense": 4},
            {"activation": function},
            {"dense": 3},
        ]
        for function in FUNCTIONS
    },
    "activations in a row": [
        {"dense": 4},
        {"activation": "tanh"},
        {"activation": "sigmoid"},
        {"activation": "relu"},
        {"dense": 3},
    ],
    "activation after subsample": [
        {"conv": {"maps": 2, "kernel": 3}},
        {"subsample": {"size": 2, "method": "max"}},
        {"activation": "tanh"},
        {"dense": 3},
    ],
}


@pytest.mark.parametrize("stage", [naive.STAGE, FAST_REFERENCE], ids=lambda stage: stage.name)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_finite_differences(name, stage):
    network = build(name, (2, 6, 6), 3, DIFFERENCES[name])
    generator = np.random.default_rng(5)
    images = generator.integers(0, 256, (3, 2, 6, 6), dtype=np.uint8)
    labels = np.array([0, 2, 1], dtype=np.uint8)
    setup = Setup(network, batch_size=3, learning_rate=0.1, mean=120, deviation=70)
    with stage.engine(stage, setup) as engine:
        engine.parameters = network.initial_parameters(3) + 0.05
        count = network.parameter_count
        positions = generator.permutation(count)[:60] if stage is naive.STAGE else None
        finite_differences(engine, images, labels, positions)


def test_finite_differences_see_a_wrong_gradient():
    network = build("one", (1, 2, 2), 2, [{"dense": 2}])
    setup = Setup(network, batch_size=1, learning_rate=0.1)

    class Wrong(naive.OneByOne):
        def gradient(self, images, labels):
            loss, gradient = super().gradient(images, labels)
            return loss, gradient * 1.001

    with Wrong(naive.STAGE, setup) as engine:
        image, label = np.full((1, 1, 2, 2), 3, np.uint8), np.array([1])
        with pytest.raises(ValidationFailed, match=r"finite difference by dense1\.weight"):
            finite_differences(engine, image, label)
