"""Shapes, the flat parameter vector, what cannot be a network, and the plan of a stage."""

import dataclasses
import math

import numpy as np
import pytest

from cnnlib.engine import Stage, plan
from cnnlib.errors import ConfigError, Unsupported
from cnnlib.layers import Activation, Conv, Dense, Subsample
from cnnlib.network import Network, parse_layers
from cnnlib.stages import naive
from tests.support.engines import STAGES
from tests.support.networks import ANY_FUNCTION, awkward, build, lenet5, simard

pytestmark = pytest.mark.quick


def test_shapes_of_lenet5():
    network = lenet5()
    assert network.shapes == (
        (1, 28, 28),
        (6, 24, 24),
        (6, 24, 24),
        (6, 12, 12),
        (16, 8, 8),
        (16, 8, 8),
        (16, 4, 4),
        (120,),
        (120,),
        (84,),
        (84,),
        (10,),
    )
    assert network.layer_names[:6] == (
        "conv1",
        "activation1",
        "subsample1",
        "conv2",
        "activation2",
        "subsample2",
    )


def test_shapes_of_odd_sizes():
    assert awkward().shapes[1:] == (
        (7, 14, 10),
        (7, 14, 10),
        (7, 7, 5),
        (3, 5, 3),
        (3, 5, 3),
        (11,),
        (11,),
        (5,),
    )
    assert simard().shapes[1:5:2] == ((5, 12, 12), (50, 4, 4))


def test_arithmetic_of_lenet5():
    network = lenet5()
    assert network.parameter_count == 44_426
    conv1, conv2 = 2 * 6 * 24**2 * 25, 2 * 16 * 8**2 * 150
    dense = [2 * 256 * 120, 2 * 120 * 84, 2 * 84 * 10]
    assert [flops for flops in network.forward_flops if flops] == [conv1, conv2, *dense]
    # the first layer has no one below it who wants an error
    assert sum(network.training_flops) == 2 * conv1 + 3 * (conv2 + sum(dense))


def test_arithmetic_of_a_run_of_layers():
    network, batch = lenet5(), 10
    image, pooled, weights = 28 * 28, 6 * 12 * 12, 6 * 25 + 6
    conv1 = 2 * 6 * 24**2 * 25
    # conv1, its activation and subsampling as one
    assert network.forward_arithmetic(0, 3, batch) == (
        batch * conv1,
        4 * (batch * (image + pooled) + weights),
    )
    # the images need no error: only the weight gradient counts, and no weights are read
    assert network.backward_arithmetic(0, 3, batch) == (
        batch * conv1,
        4 * (batch * (image + pooled) + weights),
    )
    source, target, weights = 16 * 4 * 4, 120, 256 * 120 + 120
    assert network.backward_arithmetic(6, 7, batch) == (
        batch * 2 * (2 * 256 * 120),
        4 * (batch * (2 * source + target) + 2 * weights),
    )
    count = network.parameter_count
    assert network.update_arithmetic(momentum=False) == (2 * count, 4 * 3 * count)
    assert network.update_arithmetic(momentum=True) == (4 * count, 4 * 5 * count)


def test_views_share_the_vector_and_cover_it():
    network = awkward()
    vector = np.zeros(network.parameter_count)
    for number, views in enumerate(network.views(vector), start=1):
        for view in views.values():
            assert np.shares_memory(view, vector)
            view += number
    assert (vector > 0).all()
    assert [p.name for p in network.parameters] == [
        "conv1.weight",
        "conv1.bias",
        "conv2.weight",
        "conv2.bias",
        "dense1.weight",
        "dense1.bias",
        "dense2.weight",
        "dense2.bias",
    ]
    assert network.parameters[2].shape == (3, 7, 3, 3)
    for p, following in zip(network.parameters, network.parameters[1:], strict=False):
        assert following.offset == p.offset + p.size


def test_initial_parameters():
    network = lenet5()
    vector = network.initial_parameters(seed=1)
    assert vector.dtype == np.float32
    assert np.array_equal(vector, network.initial_parameters(seed=1))
    assert np.array_equal(vector, network.initial_parameters(seed=1, dtype=np.float64))
    assert not np.array_equal(vector, network.initial_parameters(seed=2))
    views = network.views(vector)
    assert not views[0]["bias"].any()
    assert views[6]["weight"].std() == pytest.approx(math.sqrt(1 / 256), rel=0.02)
    assert views[10]["weight"].std() == pytest.approx(math.sqrt(1 / 84), rel=0.05)


@pytest.mark.parametrize(
    ("scheme", "variance"), [("lecun", 1 / 150), ("glorot", 2 / (150 + 400)), ("he", 2 / 150)]
)
def test_initial_weights_by_name(scheme: str, variance: float) -> None:
    network = lenet5()
    weight = network.views(network.initial_parameters(1, scheme=scheme))[3]["weight"]
    assert weight.std() == pytest.approx(math.sqrt(variance), rel=0.03)


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ConfigError, match="initial weights 'best'; known: lecun, glorot, he"):
        lenet5().initial_parameters(1, scheme="best")


def test_a_network_from_layers_and_from_entries_is_the_same() -> None:
    layers = [Conv(maps=2, kernel=3, padding=1), Activation(function="relu"), Dense(units=4)]
    entries = [
        {"conv": {"maps": 2, "kernel": [3, 3], "padding": 1}},
        {"activation": "relu"},
        {"dense": 4},
    ]
    network = Network.from_layers((1, 8, 6), 4, layers)
    assert network == Network.from_layers([1, 8, 6], 4, entries)
    assert network.shapes == ((1, 8, 6), (2, 8, 6), (2, 8, 6), (4,))
    with pytest.raises(ConfigError, match=r"unknown layer kind 'lstm' in layers\[0\]; known: conv"):
        Network.from_layers((1, 8, 6), 4, [{"lstm": 4}])
    with pytest.raises(ConfigError, match=r"input_shape is \(8, 6\), not \(channels, height"):
        Network.from_layers((8, 6), 4, layers)


def test_bare_values_and_settings_mean_the_same():
    assert parse_layers("n", [{"dense": 84}, {"activation": "tanh"}, {"subsample": 2}]) == (
        Dense(units=84),
        Activation(function="tanh"),
        Subsample(size=2, method="max"),
    )
    assert parse_layers("n", [{"conv": {"maps": 6, "kernel": 5}}]) == (Conv(maps=6, kernel=5),)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [{"conv": {"maps": 6, "kernel": 29}}],
            r"network 'n': conv1 cannot take its source of shape \(1, 28, 28\): "
            r"a 29x29 kernel is larger than the 28x28 map",
        ),
        (
            [{"conv": {"maps": 6, "kernel": 4}}, {"subsample": 26}, {"dense": 10}],
            r"subsample1 .*\(6, 25, 25\): a window of 26x26 is larger than the 25x25 map",
        ),
        (
            [{"dense": 16}, {"conv": {"maps": 6, "kernel": 3}}],
            r"conv1 .*\(16,\): needs maps \(channels, height, width\)",
        ),
        ([{"dense": 16}, {"subsample": 2}], r"subsample1 .*\(16,\): needs maps"),
        ([{"dense": 9}], r"ends in shape \(9,\), but the data set has 10 classes"),
        ([{"conv": {"maps": 10, "kernel": 27}}], r"ends in shape \(10, 2, 2\), .* 10 classes"),
    ],
)
def test_impossible_networks(layers, message):
    with pytest.raises(ConfigError, match=message):
        build("n", (1, 28, 28), 10, layers)


def test_a_network_without_layers():
    with pytest.raises(ConfigError, match=r"network 'n' ends in shape \(1, 28, 28\)"):
        Network("n", (1, 28, 28), 784, ())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], r"networks\.n must be a list of layers, not \[\]"),
        ("conv", r"networks\.n must be a list of layers, not 'conv'"),
        (None, r"networks\.n must be a list of layers"),
        ({"dense": 10}, r"networks\.n must be a list of layers"),
        (["dense"], r"networks\.n\[0\] must be one `kind: settings` pair, not 'dense'"),
        (
            [{"dense": 10}, {"dense": 10, "activation": "relu"}],
            r"networks\.n\[1\] must be one `kind: settings` pair",
        ),
        (
            [{"convolution": 6}],
            r"unknown layer kind 'convolution' in networks\.n\[0\]; "
            r"known: conv, activation, subsample, dense",
        ),
        ([{"dense": "ten"}], r"networks\.n\[0\]\.dense\.units: .*not 'ten'"),
        ([{"dense": "10"}], r"networks\.n\[0\]\.dense\.units: .*not '10'"),
        ([{"dense": 10.0}], r"networks\.n\[0\]\.dense\.units: .*not 10\.0"),
        ([{"dense": True}], r"networks\.n\[0\]\.dense\.units: .*not True"),
        ([{"dense": 0}], r"networks\.n\[0\]\.dense\.units: .*greater than 0"),
        ([{"dense": None}], r"networks\.n\[0\]\.dense\.units: .*not None"),
        ([{"conv": 6}], r"networks\.n\[0\]\.conv\.kernel: field required"),
        (
            [{"conv": {"maps": 6, "kernel": 5, "stride": 0}}],
            r"networks\.n\[0\]\.conv\.stride: .*greater than 0, not 0",
        ),
        (
            [{"conv": {"maps": 6, "kernel": 5, "dilation": 2}}],
            r"unknown key 'dilation' in networks\.n\[0\]\.conv; known: maps, kernel, stride, pad",
        ),
        ([{"activation": "elu"}], rf"activation\.function: .*{ANY_FUNCTION}, not 'elu'"),
        ([{"subsample": {"size": 2, "method": "min"}}], r"method: .*'max' or 'mean'"),
    ],
)
def test_malformed_layers(layers, message):
    with pytest.raises(ConfigError, match=message):
        parse_layers("n", layers)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_plans_every_network(stage):
    for network in (lenet5(), lenet5("mean", "tanh"), simard(), awkward()):
        covered = plan(stage, network)
        ends = [0, *(planned.stop for planned in covered)]
        assert [planned.start for planned in covered] == ends[:-1]
        assert ends[-1] == len(network.layers)


def test_plan_takes_the_longest_run():
    class Fused:
        pass

    operators = {**naive.STAGE.operators, (Conv, Activation, Subsample): Fused}
    planned = plan(dataclasses.replace(naive.STAGE, operators=operators), lenet5())
    assert [p.name for p in planned[:3]] == [
        "conv1+activation1+subsample1",
        "conv2+activation2+subsample2",
        "dense1",
    ]
    assert planned[1].operator is Fused
    assert planned[1].source_shape == (6, 12, 12)
    assert planned[1].target_shape == (16, 4, 4)
    assert [p.is_first for p in planned[:2]] == [True, False]


def test_plan_names_stage_layer_and_choices():
    operators = {(Conv, Activation): object, (Dense,): object}
    stage = Stage("half", "half", "nothing", "cpu", naive.OneByOne, operators)
    with pytest.raises(
        Unsupported,
        match=r"stage 'half' has no operator for subsample1 of network 'lenet5_max_relu'; "
        r"it knows: conv\+activation, dense",
    ):
        plan(stage, lenet5())


def test_plan_says_a_reason_once():
    class Narrow:
        @staticmethod
        def declines(layers, source_shape):
            return "it has padding" if len(layers) < 3 else "it is long"

    runs = [(Conv,), (Conv, Activation), (Conv, Activation, Subsample)]
    stage = Stage("half", "half", "nothing", "cpu", naive.OneByOne, dict.fromkeys(runs, Narrow))
    with pytest.raises(Unsupported) as caught:
        plan(stage, lenet5())
    assert str(caught.value) == (
        "stage 'half' has no operator for conv1 of network 'lenet5_max_relu'; "
        "conv1+activation1+subsample1: it is long; conv1: it has padding"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv(6, 5), "Conv takes its settings by name: maps, kernel, stride, padding"),
        (lambda: Conv(maps=0, kernel=3), "Conv.maps: input should be greater than 0, not 0"),
        (lambda: Conv(maps=1, kernel=(3, 0)), "Conv.kernel: must be greater than 0, not (3, 0)"),
        (
            lambda: Conv(map=1, kernel=3),
            "unknown key 'map' in Conv; known: maps, kernel, stride, padding",
        ),
        (
            lambda: Subsample(size=2, padding=2),
            "Subsample: a padding of 2x2 is more than half of a 2x2 window",
        ),
    ],
)
def test_a_wrong_layer_is_one_line(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message


def test_settings_of_a_config_say_where_they_are():
    entry = {"conv": {"maps": 1, "kernel": [0, "a"]}}
    with pytest.raises(ConfigError) as caught:
        parse_layers("mine", [entry])
    wanted = (
        "networks.mine[0].conv.kernel: must be a whole number, or [rows, columns], not [0, 'a']"
    )
    assert str(caught.value) == wanted


@pytest.mark.parametrize("layers", ["conv", 3, {"dense": 2}, []])
def test_layers_that_are_no_list(layers):
    with pytest.raises(ConfigError, match="^layers must be a list of layers, not "):
        Network.from_layers((1, 4, 4), 2, layers)


def test_layers_may_come_from_a_generator():
    network = Network.from_layers((1, 4, 4), 2, (Dense(units=n) for n in (3, 2)))
    assert network.layer_names == ("dense1", "dense2")


@pytest.mark.parametrize("shape", [(33,), (35,), (2, 17)])
def test_names_are_for_vectors_of_the_right_length(shape):
    network = Network.from_layers((1, 4, 4), 2, [{"dense": 2}])
    with pytest.raises(ConfigError, match=r"has 34 of them: expected \(34,\)"):
        network.named(np.zeros(shape, np.float32))
