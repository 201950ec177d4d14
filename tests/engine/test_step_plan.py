"""What a stage says of its steps before any of them runs."""

import pytest

from cnnlib.device import Device
from cnnlib.device.architecture import T4
from cnnlib.engine import Setup, Stage
from cnnlib.engine.step_plan import StepPlan
from cnnlib.stages import fused, gemm, gemm_cuda, ring
from tests.support.engines import each_of, training
from tests.support.networks import build, shipped

LAYERS = [{"conv": {"maps": 2, "kernel": 3}}, {"subsample": 2}, {"dropout": 0.2}, {"dense": 3}]
NETWORK = build("few", (1, 8, 8), 3, LAYERS)


@each_of((gemm_cuda.STAGE, ring.STAGE))
def test_kernels_are_counted_that_an_engine_launches(stage: Stage, device: Device) -> None:
    with training(stage, NETWORK, 4, 8, device) as engine:
        (said,) = engine.plans_on(stage, engine.setup, device)
        launched = sum(each.launches for each in engine.profile())
    assert said == StepPlan("layers", {"kernels_a_step": launched})


@pytest.mark.quick
def test_a_network_that_does_not_fit_is_declined() -> None:
    setup = Setup(shipped("pytorch_examples"), 16, 0.1)
    (said,) = fused.STAGE.engine.plans_on(fused.STAGE, setup, T4.limits)
    assert "which takes 89664 of 65536 bytes" in said.declined
    assert not said.facts


@pytest.mark.quick
def test_a_stage_without_kernels_has_no_plans() -> None:
    assert not gemm.STAGE.engine.plans_on(gemm.STAGE, Setup(NETWORK, 4, 0.1), T4.limits)
