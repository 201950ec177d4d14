"""An author's own training loop is checked like any stage: right ones pass, wrong ones do not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cnnlib.datasets import noise
from cnnlib.engine import OwnLoop, Setup, Stage
from cnnlib.errors import Unsupported
from cnnlib.layers import Activation, Array, Dense
from cnnlib.training.target import open_engine, open_target
from cnnlib.validation.parity import validate
from cnnlib.validation.trajectory import check_training
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.networks import build

pytestmark = pytest.mark.quick

NETWORK = build("flat", (2, 6, 6), 4, [{"dense": 4}])
BATCH = 12


class Softmax(OwnLoop):
    """One dense layer and its softmax, in numpy."""

    def prepare(self) -> None:
        self.weights = [np.zeros(p.shape, np.float32) for p in self.network.parameters]
        self.velocities = [np.zeros_like(weight) for weight in self.weights]

    def forward(self, images: Array) -> Array:
        weight, bias = self.weights
        logits: Array = images.reshape(len(images), -1) @ weight.T + bias
        return logits

    def gradients(self, images: Array, labels: Array) -> tuple[Any, list[Array]]:
        logits = self.forward(images)
        logits -= logits.max(1, keepdims=True)
        rows = np.arange(len(labels))
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        error = np.exp(logs)
        error[rows, labels] -= 1
        error /= len(labels)
        return -logs[rows, labels].mean(), [error.T @ images.reshape(len(images), -1), error.sum(0)]

    def step(self, images: Array, labels: Array, rate: float) -> Any:
        loss, gradients = self.gradients(images, labels)
        for weight, velocity, gradient in zip(
            self.weights, self.velocities, gradients, strict=True
        ):
            velocity *= self.setup.momentum
            velocity += gradient
            weight -= np.float32(rate) * velocity
        return loss


def stage_of(engine: type[OwnLoop], **fields: Any) -> Stage:
    return Stage("loop", "loop", "a loop", runs_on="cpu", engine=engine, **fields)


def check(engine: type[OwnLoop], momentum: float = 0.5, **fields: Any) -> float:
    """All checks of a measurement on noise; the largest error as a share of what is allowed."""
    stage = stage_of(engine, **fields)
    images = noise("noise", NETWORK.input_shape, NETWORK.classes, 5 * BATCH + 3)
    setup = Setup(NETWORK, BATCH, 0.1, momentum, mean=images.mean, deviation=images.deviation)
    with open_target(stage) as target:
        return check_training(stage, setup, target, images, seed=3)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("repeatable", [True, False])
def test_a_right_loop(momentum: float, repeatable: bool) -> None:
    assert check(Softmax, momentum, repeatable=repeatable) < 0.5


def wrong_step(change: Callable[[Softmax, Array, Array, float], Any]) -> type[Softmax]:
    return type("Wrong", (Softmax,), {"step": change})


def no_momentum(self: Softmax, images: Array, labels: Array, rate: float) -> Any:
    for velocity in self.velocities:
        velocity[:] = 0
    return Softmax.step(self, images, labels, rate)


def sum_for_mean(self: Softmax, images: Array, labels: Array, rate: float) -> Any:
    return Softmax.step(self, images, labels, rate * len(images))


def last_image_left_out(self: Softmax, images: Array, labels: Array, rate: float) -> Any:
    return Softmax.step(self, images[:-1], labels[:-1], rate)


def one_rate_for_all(self: Softmax, images: Array, labels: Array, rate: float) -> Any:
    return Softmax.step(self, images, labels, self.setup.learning_rate)


def no_bias(self: Softmax, images: Array, labels: Array, rate: float) -> Any:
    before = self.weights[1].copy()
    loss = Softmax.step(self, images, labels, rate)
    self.weights[1][:] = before
    return loss


def other_loss(self: Softmax, images: Array, labels: Array, rate: float) -> Any:
    return 1.01 * Softmax.step(self, images, labels, rate)


def half_of_the_steps(self: Softmax, images: Array, labels: Array, rate: float) -> Any:
    self.turn = not getattr(self, "turn", False)
    if self.turn:
        return Softmax.step(self, images, labels, rate)
    return self.gradients(images, labels)[0]


def right_only_where_it_is_probed(self: Softmax, images: Array, labels: Array, rate: float) -> Any:
    return Softmax.step(self, images, labels, rate if rate > 1 else 0.9 * rate)


@pytest.mark.parametrize(
    "change",
    [
        no_momentum,
        sum_for_mean,
        last_image_left_out,
        one_rate_for_all,
        no_bias,
        other_loss,
        half_of_the_steps,
        right_only_where_it_is_probed,
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_wrong_loop(
    change: Callable[[Softmax, Array, Array, float], Any], momentum: float
) -> None:
    with pytest.raises(ValidationFailed):
        check(wrong_step(change), momentum)


def test_a_loop_whose_forward_pass_is_another() -> None:
    """Logits are compared with the reference: accuracies are made of them."""

    class Wrong(Softmax):
        def forward(self, images: Array) -> Array:
            return images.reshape(len(images), -1) @ self.weights[0].T

        def step(self, images: Array, labels: Array, rate: float) -> Any:
            return Softmax.step(Right(self), images, labels, rate)

    class Right(Softmax):
        def __init__(self, other: Softmax) -> None:
            vars(self).update(vars(other))

    with pytest.raises(ValidationFailed, match="logits"):
        check(Wrong)


def test_the_gradient_leaves_no_trace() -> None:
    stage = stage_of(Softmax)
    images = noise("noise", NETWORK.input_shape, NETWORK.classes, BATCH)
    setup = Setup(NETWORK, BATCH, 0.1, 0.9, mean=images.mean, deviation=images.deviation)
    with open_target(stage) as target, open_engine(stage, setup, target, images) as engine:
        engine.parameters = NETWORK.initial_parameters(1)
        engine.velocity = np.full(NETWORK.parameter_count, 2.0)
        validate(engine, images.train_images, images.train_labels)
        assert np.array_equal(engine.parameters, NETWORK.initial_parameters(1))
        assert (engine.velocity == 2).all()


def test_arrays_of_other_shapes() -> None:
    class Wrong(Softmax):
        def prepare(self) -> None:
            super().prepare()
            self.weights = self.weights[:1]

    with pytest.raises(TypeError, match=r"leaves weights of shapes \[\(4, 72\)\], not "):
        stage_of(Wrong).engine(stage_of(Wrong), Setup(NETWORK, 4, 0.1))


def test_layers_without_an_operator() -> None:
    stage = stage_of(Softmax, operators={(Dense,): "dense"})
    Softmax(stage, Setup(NETWORK, 4, 0.1))
    with_relu = build("relu", (2, 6, 6), 4, [{"activation": "relu"}, {"dense": 4}])
    with pytest.raises(Unsupported, match=r"'loop' has no operator for activation1 .*: dense$"):
        Softmax.operators_on(stage, Setup(with_relu, 4, 0.1), None)
    both = stage_of(Softmax, operators={(Dense,): "dense", (Activation,): "relu"})
    assert Softmax.operators_on(both, Setup(with_relu, 4, 0.1), None) == ["relu", "dense"]
    assert Softmax.operators_on(stage_of(Softmax), Setup(with_relu, 4, 0.1), None) == [Softmax]


def test_a_loss_or_a_decay_that_a_loop_does_not_know() -> None:
    stage = stage_of(Softmax)
    with pytest.raises(Unsupported, match="'loop' has no loss mean_squared_error; it knows: cross"):
        Softmax(stage, Setup(NETWORK, 4, 0.1, loss="mean_squared_error"))
    with pytest.raises(Unsupported, match="stage 'loop' has no weight decay"):
        Softmax.operators_on(stage, Setup(NETWORK, 4, 0.1, weight_decay=0.1), None)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_profile_has_two_parts_and_leaves_no_trace(momentum: float) -> None:
    stage = stage_of(Softmax)
    images = noise("noise", NETWORK.input_shape, NETWORK.classes, 2 * BATCH)
    with open_target(stage) as target:
        setup = Setup(NETWORK, BATCH, 0.1, momentum)
        with open_engine(stage, setup, target, images) as engine:
            engine.parameters = NETWORK.initial_parameters(1)
            before = engine.parameters, engine.velocity, engine.steps
            forward, rest = engine.profile()
            after = engine.parameters, engine.velocity, engine.steps
    assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
    assert [forward.part, rest.part] == ["forward", "backward"]
    assert forward.layers == rest.layers == "network"
    assert forward.flops == BATCH * sum(NETWORK.forward_flops)
    assert forward.seconds > 0
    assert rest.seconds >= 0


def test_a_library_whose_arrays_do_not_change() -> None:
    """As in JAX, a step makes new weights, and new values are a new array."""

    class Frozen(Softmax):
        def prepare(self) -> None:
            super().prepare()
            for array in (*self.weights, *self.velocities):
                array.flags.writeable = False

        def write(self, array: Array, values: Array) -> Array:
            values = values.copy()
            values.flags.writeable = False
            return values

        def step(self, images: Array, labels: Array, rate: float) -> Any:
            loss, gradients = self.gradients(images, labels)
            momentum = np.float32(self.setup.momentum)
            self.velocities = [
                momentum * velocity + gradient
                for velocity, gradient in zip(self.velocities, gradients, strict=True)
            ]
            self.weights = [
                weight - np.float32(rate) * velocity
                for weight, velocity in zip(self.weights, self.velocities, strict=True)
            ]
            return loss

    assert check(Frozen) < 0.5
