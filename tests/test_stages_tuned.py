"""Stage tuned: what only it does. What every stage promises is tested in test_stages*.py."""

import math

import numpy as np
import pytest
from engines import open_engine, pictures, training
from networks import NETWORKS, build, lenet5

from cnnlib.device import Device
from cnnlib.engine import plan
from cnnlib.engine.gpu import GpuEngine
from cnnlib.engine.steps import StepPlan
from cnnlib.engine.whole import WholeStepEngine
from cnnlib.errors import Unsupported
from cnnlib.stages.tuned import BLOCK, STAGE, shares_of
from cnnlib.validate import five_steps, validate

H100_SHARED_BYTES = 232448


def step_plan(network, shared_bytes: int) -> StepPlan:
    return StepPlan(STAGE, plan(STAGE, network), shared_bytes)


def held(planned: StepPlan) -> list[str]:
    return [operator.label for operator in planned.operators if operator.held]


def test_an_h100_holds_all_weights_of_lenet5() -> None:
    planned = step_plan(lenet5(), H100_SHARED_BYTES)
    assert held(planned) == ["dense1", "dense2", "dense3"]
    assert planned.shared_bytes <= H100_SHARED_BYTES


def test_the_largest_layer_gives_way_first() -> None:
    all_held = step_plan(lenet5(), H100_SHARED_BYTES).shared_bytes
    assert held(step_plan(lenet5(), all_held)) == ["dense1", "dense2", "dense3"]
    assert held(step_plan(lenet5(), all_held - 16)) == ["dense2", "dense3"]
    with pytest.raises(Unsupported, match="keeps an image's maps"):
        step_plan(lenet5(), 40_000)


@pytest.mark.parametrize("shared_bytes", [60_000, 110_000, 200_000])
def test_weights_may_lie_anywhere(
    device: Device, monkeypatch: pytest.MonkeyPatch, shared_bytes: int
) -> None:
    monkeypatch.setattr(device, "shared_bytes", shared_bytes)
    network = lenet5()
    with open_engine(STAGE, network, 5, device) as engine:
        assert isinstance(engine, WholeStepEngine)
        validate(engine, *pictures(network, 5))


def test_a_network_that_does_not_fit_goes_another_way(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "shared_bytes", 48 * 1024)
    network = build(
        "wide", (1, 64, 64), 5, [{"conv": {"maps": 8, "kernel": 5}}, {"subsample": 2}, {"dense": 5}]
    )
    with open_engine(STAGE, network, 4, device) as engine:
        assert type(engine) is GpuEngine
        assert engine.stage.name == "tuned"
        validate(engine, *pictures(network, 4))
        five_steps(engine, *pictures(network, 12))


def test_more_blocks_than_images_and_fewer(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is the same sum, in another order of adding."""
    network, gradients = lenet5(), []
    images, labels = pictures(network, 6)
    for blocks in (1, 2, 3, 6, 9):
        monkeypatch.setattr(device, "multiprocessors", blocks)
        with open_engine(STAGE, network, 6, device) as engine:
            validate(engine, images, labels)
            gradients.append(engine.gradient(images, labels)[1])
    scale = np.abs(gradients[0]).max()
    for gradient in gradients[1:]:
        assert np.abs(gradient - gradients[0]).max() < 1e-5 * scale


@pytest.mark.parametrize(("pieces", "lines"), [(16, 72), (6, 28), (1, 3), (84, 120), (10, 5000)])
def test_threads_that_share_a_sum(pieces: int, lines: int) -> None:
    shares = shares_of(pieces, lines)
    assert 1 <= shares <= pieces
    assert shares == 1 or shares * lines <= BLOCK
    # one thread fewer would make the longest share longer
    assert shares == 1 or math.ceil(pieces / (shares - 1)) > math.ceil(pieces / shares)


def test_the_profile_names_every_layer_both_ways(device: Device) -> None:
    network = NETWORKS["lenet5_mean_tanh"]
    with training(STAGE, network, 4, 8, device) as engine:
        rows = engine.profile()
        labels = [operator.label for operator in engine.steps.operators]
        for part in ("forward", "backward"):
            assert [row.layer for row in rows if row.part == part] == labels
        phase = [row.seconds for row in rows if row.kernel != "update"]
        images = engine._images, engine._labels, engine._batch_order, 4
        # the sections are shares of one launch
        assert sum(phase) == pytest.approx(engine._time(engine._take_images(*images, 0)), rel=0.9)
        assert all(row.flops > 0 for row in rows if row.part in ("forward", "backward"))
