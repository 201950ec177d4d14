"""Close decisions: right kernels that decide otherwise are accepted, wrong ones are not."""

import dataclasses
import math

import numpy as np
import pytest
from engines import open_engine, pictures
from networks import build, lenet5

from cnnlib.decisions import Watch
from cnnlib.engine import Setup
from cnnlib.layers import Activation, Conv, Subsample
from cnnlib.stages import gemm
from cnnlib.validate import (
    FACTOR,
    FAST_REFERENCE,
    ValidationFailed,
    five_steps,
    longest_sum,
    validate,
)

CLOSE_CALL = build(
    "close_call",
    (1, 2, 2),
    2,
    [{"conv": {"maps": 1, "kernel": 1}}, {"activation": "relu"}, {"dense": 2}],
)


def watch(network, vector, **settings):
    watched = Watch(Setup(network, 4, 0.1, **settings))
    watched.parameters = vector
    return watched


def test_only_images_that_ask_for_a_close_decision_are_changed():
    # relu of byte - 7, times the weight: close at 7 if the bias makes it so
    images = np.array([[[[9, 8], [3, 1]]], [[[9, 7], [3, 1]]]], np.uint8)
    vector = np.ones(CLOSE_CALL.parameter_count)
    vector[1] = -7 + 1e-6
    with watch(CLOSE_CALL, vector) as watched:
        assert watched.asks(images).tolist() == [False, True]
        cleared, close = watched.clear(images)
        assert np.array_equal(cleared[0], images[0])
        assert not (cleared[1] == 7).any()
        assert not len(close)
        vector[1] = -7  # exactly zero is no close decision
        watched.parameters = vector
        assert np.array_equal(watched.clear(images)[0], images)


def close_calls(*deciding):
    """With the parameters below most images ask for close decisions, whatever noise is added."""
    first, second = {"conv": {"maps": 3, "kernel": 1}}, {"conv": {"maps": 4, "kernel": 3}}
    layers = [first, *deciding, second, {"activation": "tanh"}, {"dense": 3}]
    return build("close_calls", (3, 24, 24), 3, layers)


RELU = close_calls({"activation": "relu"})
MAX = close_calls({"subsample": 2})
BOTH = close_calls({"activation": "relu"}, {"subsample": 2})


def close_parameters(network):
    """The first convolution adds up a number of 1024 levels and a very small one."""
    vector = network.initial_parameters(1)
    views = network.views(vector)
    views[0]["weight"][:, :, 0, 0] = [[1, 0.25, 1e-7], [-1, 0.25, 1e-7], [0.25, 1, -1e-7]]
    views[0]["bias"][...] = 0
    views[-3]["weight"][...] /= 100
    return vector


def open_close_calls(stage, network, batch_size):
    engine = open_engine(stage, network, batch_size, mean=127, deviation=1, learning_rate=1e-4)
    engine.parameters = close_parameters(network)
    return engine


class OtherRelu(gemm.WholeActivation):
    """Decides too early, by 1e-6 of the largest element: as wrong as rounding may be."""

    def forward(self):
        if self.function != "relu":
            return super().forward()
        limit = 1e-6 * np.abs(self.source).max(axis=tuple(range(self.source.ndim - 1)))
        self._slope[...] = (self.source > -limit) & (self.source != 0)
        np.multiply(self.source, self._slope, out=self.target)
        return None


class OtherMax(gemm.SlicedSubsample):
    """Sees later elements of a window larger than they are, by up to 1e-6 of the largest."""

    def forward(self):
        largest = np.abs(self.source).max(axis=tuple(range(self.source.ndim - 1)))
        parts = [part for row in self.along_y(self.source) for part in self.along_x(row)]
        for place, part in enumerate(parts):
            # what relu made zero stays so: equals are equal in any arithmetic
            part += place / len(parts) * 1e-6 * largest * (part > 0)
        super().forward()


def with_operators(stage, name, *changes):
    return dataclasses.replace(stage, name=name, operators=stage.operators | dict(changes))


def gradient_of(stage, network, images, labels):
    with open_close_calls(stage, network, len(images)) as engine:
        return engine.gradient(images, labels)[1]


@pytest.mark.parametrize(
    ("network", "change"),
    [
        (RELU, ((Activation,), OtherRelu)),
        (MAX, ((Subsample,), OtherMax)),
        (BOTH, ((Subsample,), OtherMax)),
    ],
    ids=["relu", "max", "both"],
)
def test_doubt_bounds_what_other_decisions_change(network, change):
    images, labels = pictures(network, 16)
    otherwise = with_operators(FAST_REFERENCE, "otherwise", change)
    found = gradient_of(otherwise, network, images, labels)
    right = gradient_of(FAST_REFERENCE, network, images, labels)
    with watch(network, close_parameters(network), mean=127) as watched:
        doubt = watched.doubt_of_loss(images, labels, len(images))
    seen = 0.0
    for p in network.parameters:
        part = slice(p.offset, p.offset + p.size)
        largest = np.abs(right[part]).max()
        errors = np.abs(found[part] - right[part])
        # the rest is what OtherMax adds to the maps
        assert (errors <= doubt[part] + 1e-5 * largest).all()
        seen = max(seen, errors.max() / largest)
    assert seen > 1e-3  # far above rounding


@pytest.mark.parametrize("network", [RELU, MAX, BOTH], ids=["relu", "max", "both"])
def test_float32_that_decides_otherwise_is_accepted(network):
    images, labels = pictures(network, 64)
    with open_close_calls(gemm.STAGE, network, 64) as engine:
        with Watch(engine.setup) as watched:
            watched.parameters = engine.parameters
            assert len(watched.clear(images)[1]) > 16
        assert validate(engine, images, labels) < 1
        five_steps(engine, images, labels)


def test_float32_that_decides_otherwise_is_far_from_float64():
    # or else the test above says nothing
    images, labels = pictures(MAX, 64)
    found, right = (
        gradient_of(stage, MAX, images, labels) for stage in (gemm.STAGE, FAST_REFERENCE)
    )
    first = slice(0, 9)  # the weight of conv1
    rounding = FACTOR * np.finfo(np.float32).eps * math.sqrt(longest_sum(MAX, 64))
    assert np.abs(found - right)[first].max() > 2 * rounding * np.abs(right[first]).max()


def test_a_batch_of_4096_is_accepted_and_left_with_few_close_decisions():
    network = lenet5()
    images, labels = pictures(network, 4096)
    with open_engine(gemm.STAGE, network, 4096) as engine:
        with Watch(engine.setup) as watched:
            watched.parameters = engine.parameters
            asked = watched.asks(images)
            cleared, close = watched.clear(images)
        assert 0 < asked.sum() < 1000
        assert len(close) < 10
        assert np.array_equal(cleared[~asked], images[~asked])
        validate(engine, images, labels)


class LastRowLost(gemm.MatrixConv):
    def backward(self):
        self.target_error[-1] = 0
        super().backward()


class LeakyRelu(gemm.WholeActivation):
    def forward(self):
        super().forward()
        self._slope[0] = True


class LateWinner(gemm.SlicedSubsample):
    """Takes a later element for the winner if it comes near, by a hundredth of the largest."""

    def forward(self):
        largest = np.abs(self.source).max()
        self.source[1::2] += 0.01 * largest * (self.source[1::2] > 0)
        super().forward()
        self.source[1::2] -= 0.01 * largest * (self.source[1::2] > 0)


@pytest.mark.parametrize(
    ("kind", "operator"),
    [(Conv, LastRowLost), (Activation, LeakyRelu), (Subsample, LateWinner)],
    ids=lambda value: value.__name__,
)
def test_wrong_operators_are_rejected_all_the_same(kind, operator):
    stage = with_operators(gemm.STAGE, "wrong", ((kind,), operator))
    with open_close_calls(stage, BOTH, 64) as engine:
        with pytest.raises(ValidationFailed, match=r"stage 'wrong' fails validation .* is off by"):
            validate(engine, *pictures(BOTH, 64))


def test_nothing_is_said_where_decisions_leave_too_much_open():
    # dark places, and so most decisions of relu, are zero but for a very small bias
    images, labels = pictures(RELU, 4)
    images[:, :, 2:] = 127
    with open_close_calls(gemm.STAGE, RELU, 4) as engine:
        vector = close_parameters(RELU)
        RELU.views(vector)[0]["bias"][...] = 1e-5
        engine.parameters = vector
        with pytest.raises(ValidationFailed, match=r"conv1\.bias .* cannot be compared: close"):
            validate(engine, images, labels)
