"""Every stage that serves dropout draws the same masks, however its training is asked for."""

import numpy as np
import pytest

from cnnlib.device import Device
from cnnlib.engine import Engine, Stage
from cnnlib.layers import Array, Dropout
from cnnlib.network import Network
from tests.support.engines import (
    STAGES,
    each_gpu_stage,
    each_of,
    on,
    open_engine,
    pictures,
    skip_if_declined,
    training,
)
from tests.support.networks import build, dropped

pytestmark = pytest.mark.usefixtures("in_haste")

BATCH = 9
CONV = {"conv": {"maps": 1, "kernel": 1}}
RELU = {"activation": "relu"}
DROPOUT = {"dropout": 0.4}
DENSE = {"dense": BATCH}
WHERE = [
    build(name, (1, 5, 7), BATCH, layers)
    for name, layers in (
        ("first", [DROPOUT, DENSE]),
        ("behind_a_convolution", [CONV, DROPOUT, DENSE]),
        ("behind_an_activation", [CONV, RELU, DROPOUT, DENSE]),
        ("behind_subsampling", [CONV, RELU, {"subsample": 1}, DROPOUT, DENSE]),
        ("behind_a_dense_layer", [{"dense": 35}, DROPOUT, DENSE]),
        ("behind_a_dense_activation", [{"dense": 35}, RELU, DROPOUT, DENSE]),
        ("of_all", [{"dropout": 0.0}, CONV, DROPOUT, DENSE]),
        ("of_nearly_none", [{"dropout": 0.95}, DENSE]),
    )
]
"""Networks whose last layer sees images through one mask, if the others hand them on."""


def handing_on(network: Network) -> Array:
    """Parameters with which all layers but the last one hand on what they get."""
    vector = np.zeros(network.parameter_count)
    for views in network.views(vector)[:-1]:
        if "weight" in views:
            weight = views["weight"]
            weight[...] = np.eye(len(weight)).reshape(weight.shape)
    return vector


def masked(engine: Engine, count: int) -> Array:
    """(count, 35) What the last layer gets for images of ones, read off its gradient."""
    images = np.ones((count, *engine.network.input_shape), np.uint8)
    gradient = engine.backward(images, np.eye(count, engine.network.classes))
    return engine.network.views(gradient)[-1]["weight"][:count]


@each_of(STAGES)
@on(*WHERE)
@pytest.mark.parametrize("step", [0, 1, 2**31 + 7])
def test_the_masks_are_those_of_the_reference(
    stage: Stage, network: Network, step: int, device: Device
) -> None:
    skip_if_declined(stage, network)
    layer = max(i for i, each in enumerate(network.layers) if isinstance(each, Dropout))
    seed = 2**40 + 2**31 + step
    with open_engine(stage, network, BATCH, device, mean=0, deviation=1, seed=seed) as engine:
        engine.parameters = handing_on(network)
        engine.steps = step
        dropout = network.layers[layer]
        assert isinstance(dropout, Dropout)
        for count in (BATCH, 4):
            right = engine.setup.mask(layer, step, np.arange(count)).reshape(count, -1)
            found = masked(engine, count)
            assert np.array_equal(found != 0, right)
            assert found[right] == pytest.approx(dropout.scale, rel=1e-6)
        assert right.any()
        assert not right.all()


@each_of(STAGES)
@on(dropped())
def test_nothing_is_dropped_where_nothing_is_trained(
    stage: Stage, network: Network, device: Device
) -> None:
    skip_if_declined(stage, network)
    images, labels = pictures(network, 8)
    with training(stage, network, 8, 16, device) as engine:
        before = engine.logits(images)
        engine.gradient(images, labels)
        assert np.array_equal(engine.logits(images), before)
    kept = build("kept", network.input_shape, network.classes, without_dropout(network))
    with open_engine(stage, kept, 8, device) as engine:
        assert engine.logits(images) == pytest.approx(before, rel=1e-5, abs=1e-5)


def without_dropout(network: Network) -> list[object]:
    return [each for each in network.layers if not isinstance(each, Dropout)]


STEPS = 8


@each_gpu_stage
@on(dropped())
@pytest.mark.parametrize("resident", ["auto", 8, 24])
def test_the_same_steps_in_any_number_of_calls(
    stage: Stage, network: Network, resident: int | str, device: Device
) -> None:
    """Nor does it matter how many images lie on the device, or what is asked in between."""
    skip_if_declined(stage, network)
    order = np.random.default_rng(0).permutation(8 * STEPS)
    images, labels = pictures(network, 5)
    results = []
    for calls in (1, 2, 4, STEPS):
        with training(
            stage, network, 8, 8 * STEPS, device, momentum=0.9, resident_images=resident
        ) as engine:
            for part in np.split(order, calls):
                engine.train(part)
                engine.logits(images)
                engine.gradient(images, labels)
            assert engine.steps == STEPS
            results.append((engine.parameters, engine.velocity))
    for again in results[1:]:
        assert np.array_equal(again, results[0])


@each_gpu_stage
@on(dropped())
def test_a_profile_and_a_resumed_training_keep_the_masks(
    stage: Stage, network: Network, device: Device
) -> None:
    skip_if_declined(stage, network)
    order = np.arange(32)
    with training(stage, network, 8, 32, device, momentum=0.9) as engine:
        engine.train(order)
        engine.train(order)
        right = engine.parameters
    with training(stage, network, 8, 32, device, momentum=0.9) as engine:
        engine.train(order)
        engine.profile()
        state = engine.parameters, engine.velocity, engine.steps
        engine.train_timed(order)
        assert np.array_equal(engine.parameters, right)
    with training(stage, network, 8, 32, device, momentum=0.9) as resumed:
        resumed.parameters, resumed.velocity, resumed.steps = state
        resumed.train(order)
        assert np.array_equal(resumed.parameters, right)
        resumed.parameters, resumed.velocity, resumed.steps = *state[:2], state[2] + 1
        resumed.train(order)
        assert not np.array_equal(resumed.parameters, right)
