"""Every loss and weight decay, in every stage: gradient and steps are the reference's."""

import dataclasses

import pytest

from cnnlib.device import Device
from cnnlib.engine import Stage
from cnnlib.layers import LOSSES
from cnnlib.stages import LADDER
from cnnlib.validation.parity import validate
from cnnlib.validation.spot_checks import five_steps
from cnnlib.validation.steps import check_real_steps, check_steps
from cnnlib.validation.verdicts import ValidationFailed
from tests.support.engines import each_of, open_engine, pictures, skip_if_declined
from tests.support.networks import build

pytestmark = pytest.mark.usefixtures("in_haste")

NETWORK = build(
    "objectives",
    (1, 12, 12),
    5,
    [
        {"conv": {"maps": 3, "kernel": 3}},
        {"activation": "scaled_tanh"},
        {"subsample": {"size": 2, "method": "mean"}},
        {"dropout": 0.25},
        {"dense": 9},
        {"activation": "leaky_relu"},
        {"dense": 5},
    ],
)
SIZES = {"naive": (1, 2)}


@each_of(LADDER)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_and_steps(stage: Stage, loss: str, device: Device) -> None:
    skip_if_declined(stage, NETWORK)
    for size in SIZES.get(stage.name, (1, 33)):
        settings = {"loss": loss, "weight_decay": 0.05, "momentum": 0.9, "learning_rate": 0.05}
        images, labels = pictures(NETWORK, 5 * size + 40)
        with open_engine(stage, NETWORK, size, device, **settings) as engine:
            start = engine.parameters
            validate(engine, images[:size], labels[:size])
            five_steps(engine, images, labels)
            engine.load(images, labels)
            engine.parameters = start
            check_steps(engine, images, labels)
            engine.parameters = start
            check_real_steps(engine, images, labels)


@pytest.mark.parametrize(
    ("setting", "value"), [("weight_decay", 0.0), ("loss", "cross_entropy"), ("weight_decay", 0.1)]
)
def test_another_objective_is_found(setting: str, value: object) -> None:
    """A stage that decays its weights by another share, or has another loss, is rejected."""
    (stage,) = (stage for stage in LADDER if stage.name == "gemm")
    wanted = {"loss": "mean_squared_error", "weight_decay": 0.05, "learning_rate": 0.05}
    images, labels = pictures(NETWORK, 80)
    with open_engine(stage, NETWORK, 16, **wanted) as engine:
        engine.load(images, labels)
        with open_engine(stage, NETWORK, 16, **(wanted | {setting: value})) as wrong:
            wrong.load(images, labels)
            wrong.setup = dataclasses.replace(wrong.setup, **wanted)
            if setting == "weight_decay":
                update = wrong._update

                def other(rate: float) -> None:
                    wrong.setup = dataclasses.replace(wrong.setup, weight_decay=value)
                    update(rate)
                    wrong.setup = dataclasses.replace(wrong.setup, **wanted)

                wrong._update = other
            with pytest.raises(ValidationFailed):
                check_steps(wrong, images, labels)


def test_steps_with_dropout_are_judged_where_weights_move_far() -> None:
    """After a long first step a network is no longer sure of the images that were silent."""
    (stage,) = (stage for stage in LADDER if stage.name == "gemm")
    images, labels = pictures(NETWORK, 400)
    for size in (64, 600):
        with open_engine(stage, NETWORK, size, learning_rate=3.0) as engine:
            engine.load(images, labels)
            check_steps(engine, images, labels)
