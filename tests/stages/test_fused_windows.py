"""Stages fused and ring with padding, rectangles and windows that do not divide their map.

What they cannot fuse is served by operators of its own, which the plan shows.
"""

import numpy as np
import pytest

from cnnlib.device.architecture import H100
from cnnlib.engine import plan
from cnnlib.stages import fused, ring
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import exact, five_steps
from tests.support.engines import each_of, on, open_engine, pictures
from tests.support.networks import FUSED_LINEAR, FUSED_WINDOWS, build, lenet5

pytestmark = pytest.mark.usefixtures("in_haste")

each_fusing_stage = each_of([fused.STAGE, fused.PULL, ring.STAGE])


@each_fusing_stage
@on(*FUSED_WINDOWS.values())
@pytest.mark.parametrize("batch_size", [1, 2, 7, 16, 64, 256])
def test_gradient_parity(stage, network, batch_size, device):
    with open_engine(stage, network, batch_size, device) as engine:
        validate(engine, *pictures(network, batch_size))


@each_fusing_stage
@on(*FUSED_WINDOWS.values())
def test_gradient_of_part_of_a_batch(stage, network, device):
    with open_engine(stage, network, 32, device) as engine:
        validate(engine, *pictures(network, 32))  # leaves more than 13 images in the buffers
        validate(engine, *pictures(network, 13, seed=1))


@each_fusing_stage
@on(*FUSED_WINDOWS.values())
def test_five_steps(stage, network, device):
    with open_engine(stage, network, 16, device, momentum=0.9) as engine:
        five_steps(engine, *pictures(network, 48))


@each_fusing_stage
@on(*FUSED_LINEAR.values())
@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_integers_are_exact(stage, network, batch_size, device):
    generator = np.random.default_rng(2)
    images = generator.integers(0, 4, (batch_size, *network.input_shape), dtype=np.uint8)
    with open_engine(stage, network, batch_size, device, mean=0, deviation=1) as engine:
        engine.parameters = generator.integers(-2, 3, network.parameter_count)
        error = generator.integers(-3, 4, (batch_size, network.classes))
        exact(engine, images, error)
        gradient = engine.backward(images, error)
        assert all(gradient[p.offset : p.offset + p.size].any() for p in network.parameters)


# What is fused


def runs(stage, layers, shape=(1, 16, 16)):
    """The runs of layers that operators of the stage serve, without the last dense layer."""
    network = build("runs", shape, 4, [*layers, {"dense": 4}])
    return [planned.name for planned in plan(stage, network)][:-1]


CONV = {"conv": {"maps": 2, "kernel": 3, "padding": 1}}
TANH = {"activation": "tanh"}
GELU = {"activation": "gelu"}


@pytest.mark.quick
@each_fusing_stage
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([CONV, TANH, {"subsample": 2}], ["conv1+activation1+subsample1"]),
        ([CONV, TANH, {"subsample": [3, 5]}], ["conv1+activation1+subsample1"]),
        ([CONV, TANH, {"subsample": 16}], ["conv1+activation1+subsample1"]),
        # A window of 17 x 17 elements has more than a byte can number.
        ([CONV, TANH, {"subsample": 17}], ["conv1+activation1", "subsample1"]),
        # Windows that overlap, are padded or lie apart.
        (
            [CONV, TANH, {"subsample": {"size": 3, "stride": 2}}],
            ["conv1+activation1", "subsample1"],
        ),
        (
            [CONV, TANH, {"subsample": {"size": 2, "padding": 1}}],
            ["conv1+activation1", "subsample1"],
        ),
        (
            [CONV, TANH, {"subsample": {"size": 2, "stride": 3}}],
            ["conv1+activation1", "subsample1"],
        ),
        ([CONV, {"subsample": {"size": 2, "stride": 1}}], ["conv1", "subsample1"]),
        # A derivative that needs its source.
        ([CONV, GELU, {"subsample": 2}], ["conv1", "activation1", "subsample1"]),
        ([{"dense": 5}, GELU], ["dense1", "activation1"]),
        ([CONV, TANH, {"dropout": 0.5}], ["conv1+activation1", "dropout1"]),
    ],
    ids=str,
)
def test_what_cannot_be_fused_is_served_alone(stage, layers, expected):
    assert runs(stage, layers, (1, 18, 18)) == expected


@pytest.mark.quick
@each_fusing_stage
def test_an_operator_says_why_it_declines(stage):
    def why(layers):
        network = build("why", (1, 18, 18), 4, [*layers, {"dense": 4}])
        operator = stage.operators[tuple(type(layer) for layer in network.layers[:-1])]
        return operator.declines(network.layers[:-1], network.input_shape)

    assert why([CONV, TANH, {"subsample": 2}]) == ""
    assert why([CONV, {"subsample": {"size": 3, "stride": 2}}]) == (
        "its windows do not lie side by side"
    )
    assert why([CONV, {"subsample": {"size": 2, "padding": 1}}]) == "its windows have padding"
    assert why([CONV, {"subsample": 17}]) == "a window has more than 256 elements"
    assert why([CONV, GELU]) == "the derivative of gelu needs its source, which is not kept"


@pytest.mark.quick
@each_fusing_stage
def test_positions_that_no_window_covers_are_not_computed(stage):
    network = build("floor", (1, 20, 20), 4, [CONV, {"subsample": [3, 6]}, {"dense": 4}])
    planned = plan(stage, network)[0]
    operator = planned.operator(planned, stage, H100.limits)
    assert (operator.rows, operator.columns) == (18, 18)


@pytest.mark.quick
@each_fusing_stage
def test_a_network_without_padding_needs_no_memory_for_it(stage):
    """Shared memory of LeNet-5 as it was before there was padding."""
    expected = {"fused": [16960, 17152], "fused_pull": [16960, 17152], "ring": [19264, 17152]}
    planned = plan(stage, lenet5())[:2]
    operators = [each.operator(each, stage, H100.limits) for each in planned]
    assert [operator.backward_bytes for operator in operators] == expected[stage.name]
