"""Every layer kind by hand-worked examples and by finite differences."""

import math
import re

import numpy as np
import pytest

from cnnlib.engine import Setup
from cnnlib.layers import (
    FUNCTIONS,
    MASK,
    Activation,
    Conv,
    Dense,
    Dropout,
    Subsample,
    find_loss,
    softmax,
)
from cnnlib.layers.philox import philox
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
        ("leaky_relu", [-0.02, 0, 3]),
        ("scaled_tanh", [1.7159 * math.tanh(-4 / 3), 0, 1.7159 * math.tanh(2)]),
        ("gelu", [-2 * 0.022750131948179, 0, 3 * 0.998650101968370]),
    ],
)
def test_activation_values(function, values):
    target = Activation(function=function).forward({}, np.array([-2.0, 0.0, 3.0]))
    assert target == pytest.approx(values, rel=1e-14)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activation_of_whole_arrays_is_that_of_numbers(function):
    """Values and slopes of arrays, in place and apart, as those of single numbers."""
    record = FUNCTIONS[function]
    source = np.array([-30.0, -1.5, -0.1, 0.0, 0.2, 1.0, 30.0])
    right = [record.value(x) for x in source]
    slopes = [record.derivative(x, y) for x, y in zip(source, right, strict=True)]
    for target in (source.copy(), np.empty_like(source)):
        given = target if target[0] == source[0] else source
        slope = np.zeros(source.shape, record.slope_type or source.dtype)
        record.values(given, target, slope)
        if record.slopes is not None:
            record.slopes(target, slope)
        assert target == pytest.approx(right, rel=1e-12, abs=1e-14)
        assert slope == pytest.approx(slopes, rel=1e-12, abs=1e-14)


def test_conv_with_padding_by_hand():
    parameters = {"weight": np.ones((1, 1, 3, 3)), "bias": np.array([0.5])}
    layer = Conv(maps=1, kernel=3, padding=1, stride=[1, 3])
    target = layer.forward(parameters, MAP)
    assert layer.output_shape((1, 4, 4)) == (1, 4, 2)
    # the first column of windows sees columns 0 and 1, the second one columns 2 and 3
    assert target.tolist() == [[[10.5, 18.5], [27.5, 39.5], [51.5, 63.5], [42.5, 50.5]]]


def test_overlapping_windows_add_up_their_errors():
    layer = Subsample(size=3, stride=1)
    source = MAP.copy()
    source[0, 1, 1] = 99
    target = layer.forward({}, source)
    assert target.tolist() == [[[99, 99], [99, 99]]]
    error, _ = layer.backward({}, source, target, np.array([[[1.0, 2.0], [3.0, 4.0]]]))
    assert error[0, 1, 1] == 10
    assert error.sum() == 10


def test_padding_never_wins_and_counts_as_zeros_in_a_mean():
    source = -1 - MAP
    largest = Subsample(size=2, padding=1).forward({}, source)
    assert largest.tolist() == [[[-1, -2, -4], [-5, -6, -8], [-13, -14, -16]]]
    means = Subsample(size=2, padding=1, method="mean").forward({}, source)
    assert means[0, 0].tolist() == [-1 / 4, -5 / 4, -4 / 4]


def test_a_padding_beyond_half_a_window_is_refused():
    with pytest.raises(ValueError, match="padding of 2x2 is more than half of a 3x3 window"):
        Subsample(size=3, padding=2)


def test_philox_is_the_published_generator():
    """Known answers of Random123 for philox4x32-10."""
    ones = 0xFFFFFFFF
    for counter, key, words in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert philox(counter, key).tolist() == list(words)


def test_dropout_keeps_its_share_and_the_mean():
    layer = Dropout(rate=0.3)
    mask = layer.mask((100, 100), seed=7, step=3, layer=1, image=0)
    assert mask.mean() == pytest.approx(0.7, abs=0.02)
    target = layer.forward({MASK: mask}, np.ones((100, 100)))
    assert target.mean() == pytest.approx(1, abs=0.03)
    assert np.array_equal(layer.forward({}, MAP), MAP), "nothing is dropped at test"


def test_every_part_of_the_key_changes_the_mask():
    layer = Dropout(rate=0.5)
    usual = dict(seed=1, step=2, layer=3, image=4)
    mask = layer.mask((10, 10), **usual)
    assert np.array_equal(mask, layer.mask((10, 10), **usual))
    for name in usual:
        assert not np.array_equal(mask, layer.mask((10, 10), **(usual | {name: 9}))), name
    many = layer.mask((10, 10), **(usual | {"image": np.array([0, 4])}))
    assert np.array_equal(many[1], mask)


def test_mean_squared_error_by_hand():
    loss, error = find_loss("mean_squared_error").one(np.array([0.5, 2.0]), 1)
    assert loss == pytest.approx((0.25 + 1) / 2)
    assert error.tolist() == [0.5, 1.0]


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
    loss, error = find_loss("cross_entropy").one(logits, 1)
    assert loss == pytest.approx(math.log(4))
    assert error == pytest.approx([0.125, -0.75, 0.625])


def test_cross_entropy_of_a_hopeless_guess_is_finite():
    loss, error = find_loss("cross_entropy").one(np.array([1000.0, -1000.0]), 1)
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
    "conv with padding": [{"conv": {"maps": 2, "kernel": 3, "padding": 1}}, {"dense": 3}],
    "conv with rectangular windows": [
        {"conv": {"maps": 2, "kernel": [3, 2], "stride": [1, 2], "padding": [0, 1]}},
        {"activation": "tanh"},
        {"conv": {"maps": 2, "kernel": [1, 3], "padding": [1, 2]}},
        {"dense": 3},
    ],
    "conv with padding and a stride beyond the kernel": [
        {"conv": {"maps": 2, "kernel": 2, "stride": 3, "padding": 2}},
        {"dense": 3},
    ],
    **{
        f"{method} of overlapping windows": [
            {"conv": {"maps": 2, "kernel": 1}},
            {"subsample": {"size": 3, "stride": 2, "method": method}},
            {"dense": 3},
        ]
        for method in ("max", "mean")
    },
    **{
        f"{method} of padded, rectangular windows": [
            {"conv": {"maps": 2, "kernel": 1}},
            {"subsample": {"size": [2, 3], "stride": [3, 2], "padding": 1, "method": method}},
            {"dense": 3},
        ]
        for method in ("max", "mean")
    },
    "windows that do not divide the map": [
        {"conv": {"maps": 2, "kernel": 2}},
        {"subsample": 2},
        {"dense": 3},
    ],
    "dropout on maps and units": [
        {"dropout": 0.25},
        {"conv": {"maps": 2, "kernel": 3}},
        {"dropout": 0.5},
        {"dense": 4},
        {"activation": "relu"},
        {"dropout": 0.5},
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


@pytest.mark.parametrize("loss", ["cross_entropy", "mean_squared_error"])
@pytest.mark.parametrize("stage", [naive.STAGE, FAST_REFERENCE], ids=lambda stage: stage.name)
@pytest.mark.parametrize("name", DIFFERENCES)
def test_finite_differences(name, stage, loss):
    network = build(name, (2, 6, 6), 3, DIFFERENCES[name])
    generator = np.random.default_rng(5)
    images = generator.integers(0, 256, (3, 2, 6, 6), dtype=np.uint8)
    labels = np.array([0, 2, 1], dtype=np.uint8)
    setup = Setup(network, batch_size=3, learning_rate=0.1, mean=120, deviation=70, loss=loss)
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
